"""The numbers of a landscape as tables and plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.molecules.conformations import Landscape, Map
from gibbsian.molecules.landscape import cell_centres, free_energy, free_energy_band


def frames_table(landscape: Landscape) -> Any:
    """A pandas ``DataFrame`` with a line per frame; with times where they are known."""
    import pandas as pd

    trajectory, kt = landscape.frames.trajectory, landscape.model.kt
    columns: dict[str, Any] = {"frame": np.arange(len(trajectory))}
    # Files without times, such as DCD, are read as if frames were a picosecond apart.
    if not np.array_equal(trajectory.time, columns["frame"]):
        columns["time_ps"] = trajectory.time
    for i, name in enumerate(landscape.torsions.names):
        columns[degrees_of(name)] = torch.rad2deg(landscape.torsions.angles[:, i]).numpy()
    columns["energy_kt"] = landscape.energies.numpy()
    columns["energy_kj_mol"] = kt * landscape.energies.numpy()
    columns["weight"] = landscape.frames.weights.numpy()
    return pd.concat([pd.DataFrame(columns), landscape.checks.table()], axis=1)


def surface_table(landscape: Landscape) -> Any:
    """A pandas ``DataFrame`` with a line per cell of each map; without frames, the frames' columns are empty."""
    import pandas as pd

    kt, parts = landscape.model.kt, []
    for one in landscape.maps:
        band = free_energy_band(one.frames, one.frames_resampled, kt)
        at = torch.rad2deg(cell_centres(len(one.frames)))
        phi, psi = torch.meshgrid(at, at, indexing="ij")
        learned = free_energy(one.learned)
        columns = {
            "phi_deg": phi, "psi_deg": psi, "learned_kt": learned, "learned_kj_mol": kt * learned,
            "frames_kj_mol": band.value, "frames_lower_kj_mol": band.lower, "frames_upper_kj_mol": band.upper,
            "learned_probability": one.learned, "frames_probability": one.frames,
        }  # fmt: skip
        table = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})
        table = table.replace([np.inf, -np.inf], np.nan)
        table.insert(0, "residue", one.residue)
        parts.append(table)
    return pd.concat(parts)


def basins_table(landscape: Landscape) -> Any:
    """A pandas ``DataFrame`` with a line per basin of each map."""
    import pandas as pd

    lines = []
    for one in landscape.maps:
        names = zip(one.frame_differences.populations, one.frame_differences.kj_mol)
        for basin, pair in names:
            line: dict[str, Any] = {"residue": one.residue, "basin": basin}
            for what, found in (("learned", one.learned_differences), ("frames", one.frame_differences)):
                line |= {
                    f"{what}_population": found.populations[basin].value,
                    f"{what}_population_stderr": found.populations[basin].stderr,
                    f"{what}_kj_mol": found.kj_mol[pair].value,
                    f"{what}_kj_mol_stderr": found.kj_mol[pair].stderr,
                }
            lines.append(line)
    return pd.DataFrame(lines)


def record_of(landscape: Landscape) -> dict[str, Any]:
    """The numbers of a landscape as plain values."""
    checks, fit = landscape.checks, landscape.fit
    return {
        "name": landscape.frames.name,
        "temperature_k": landscape.model.temperature,
        "kt_kj_mol": landscape.model.kt,
        "frames": len(landscape.energies),
        "effective_frames": landscape.effective_frames,
        "block_frames": landscape.block,
        "unphysical_frames": int((~checks.physical).sum()),
        "torsions": list(landscape.torsions.names),
        "objective": fit.objective,
        "steps": fit.steps,
        "held_out_loss": {str(k): v for k, v in fit.scores.items()},
        "members": len(landscape.model.members),
        "maps": [_map_record(one) for one in landscape.maps],
        "notes": list(landscape.notes),
    }


def _map_record(one: Map) -> dict[str, Any]:
    def told(values: dict[str, Estimate]) -> dict[str, Any]:
        return {name: {"value": _plain(v.value), "stderr": _plain(v.stderr)} for name, v in values.items()}

    return {
        "residue": one.residue,
        "learned": {
            "kj_mol": told(one.learned_differences.kj_mol),
            "populations": told(one.learned_differences.populations),
        },
        "frames": {
            "kj_mol": told(one.frame_differences.kj_mol),
            "populations": told(one.frame_differences.populations),
        },
    }


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None


def degrees_of(name: str) -> str:
    """A torsion's name as a column: ``phi ALA2`` to ``phi_ALA2_deg``."""
    return f"{name.replace(' ', '_')}_deg"
