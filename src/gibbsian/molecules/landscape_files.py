"""What a landscape leaves in its folder: tables, structures, drawn conformations, the model, and the page.

::

    report.html             maps, profiles, basins, how it was made
    frames.csv              a line per frame: torsions, learned energy in kT and kJ/mol, weight, geometry
    surface.csv             a line per cell of each map: free energies with the frames' band
    decoys.csv              decoys and frames ranked by learned energy, where decoys were given
    basins.csv              populations and free-energy differences with their errors
    low_energy.pdb          frames of the lowest learned energy, unlike each other
    samples.pdb, samples.xtc, samples.csv   conformations drawn from the learned energy, and their torsions
    model.safetensors, torsions.json, topology.pdb, templates.dcd   the model, for gibbsian protein sample
    landscape.json          the numbers of the page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.errors import OptionError, StorageError
from gibbsian.files import replace_file
from gibbsian.molecules.conformations import Landscape, lowest_frames
from gibbsian.molecules.decoys import rank_decoys
from gibbsian.molecules.features import torsion_angles
from gibbsian.molecules.frames import check_frames
from gibbsian.molecules.landscape_tables import basins_table, degrees_of, frames_table, record_of, surface_table
from gibbsian.molecules.reweighting import resampled_rows
from gibbsian.molecules.torsion_model import DESCRIPTION, TEMPLATES, TOPOLOGY, WEIGHTS, TorsionModel, save_torsion_model
from gibbsian.molecules.trajectories import read_trajectory

RECORD, REPORT = "landscape.json", "report.html"
FILES = (
    WEIGHTS, DESCRIPTION, TOPOLOGY, TEMPLATES, RECORD, REPORT, "frames.csv", "surface.csv", "basins.csv",
    "decoys.csv", "low_energy.pdb", "samples.pdb", "samples.xtc", "samples.csv",
)  # fmt: skip
"""All that `write_landscape` writes."""

NATIVE = 2000
"""Frames that stand for the native state where decoys are ranked."""

SAMPLE_FILES = (".pdb", ".xtc", ".dcd", ".csv")
"""Endings of files of drawn conformations."""


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make a landscape's folder; one that is to be replaced stays as it is until another is there to be written.

    Raises
    ------
    OptionError
        If it holds a landscape and is not to be overwritten.
    StorageError
        If it cannot be written.
    """
    there = [name for name in (RECORD, DESCRIPTION) if (folder / name).exists()]
    if there and not overwrite:
        raise OptionError(
            f"{folder} holds a landscape already ({there[0]}). Add --overwrite to replace it, or --out FOLDER for "
            "another place."
        )
    if (folder / "simulation.json").exists():
        raise OptionError(f"{folder} holds a simulation, whose frames must stay: name another place with --out FOLDER.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}. Choose another place.") from error


def write_landscape(
    folder: str | Path, landscape: Landscape, *, rng: Generator, structures: int = 10, samples: int = 100
) -> dict[str, Any]:
    """Write everything but the page; return the record that ``landscape.json`` holds.

    Parameters
    ----------
    folder
        Made where needed; what is there is replaced.
    landscape
        What was learned.
    rng
        Of the drawn conformations.
    structures
        Frames of low energy to write.
    samples
        Conformations to draw.

    Raises
    ------
    StorageError
        If something cannot be written.
    """
    home = Path(folder)
    try:
        home.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (home / name).unlink(missing_ok=True)
        save_torsion_model(home, landscape.model)
        write_table(home / "frames.csv", frames_table(landscape))
        if landscape.maps:
            write_table(home / "surface.csv", surface_table(landscape))
            write_table(home / "basins.csv", basins_table(landscape))
        lowest = lowest_frames(landscape, structures)
        if len(lowest):
            landscape.frames.trajectory[lowest].save_pdb(str(home / "low_energy.pdb"))
        drawn = landscape.model.draw(samples, rng)
        built = landscape.model.conformations(drawn)
        for ending in (".pdb", ".xtc", ".csv"):
            write_conformations(home / f"samples{ending}", landscape.model, drawn, built)
        record = record_of(landscape) | {
            "low_energy_frames": lowest.tolist(),
            "samples": samples,
            "samples_physical": int(check_frames(built).physical.sum()),
        }
        replace_file(home / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{home} cannot be written: {error.strerror or error}. Choose another place.") from error
    return record


def write_decoys(folder: str | Path, landscape: Landscape, files: Sequence[Path], *, rng: Generator) -> Estimate:
    """Rank decoys against the frames by the learned energy, into ``decoys.csv``.

    Parameters
    ----------
    folder
        Of the landscape.
    landscape
        What was learned.
    files
        Structures or trajectories of the same atoms.
    rng
        Of the bootstrap, and of the frames that stand for the native state, drawn by their weights.

    Returns
    -------
    Estimate
        Area under the curve over all decoys.

    Raises
    ------
    DataError
        If a file cannot be read, or holds other atoms.
    StorageError
        If the table cannot be written.
    """
    topology, model = landscape.frames.trajectory.topology, landscape.model
    energies = {}
    for path in files:
        found = read_trajectory(path, topology)
        with torch.no_grad():
            energies[Path(path).stem] = model.energy(torsion_angles(found.xyz, model.atoms))
    lowest = torch.cat([model.energy(part).detach() for part in landscape.torsions.angles.split(1 << 14)]).min()
    native = landscape.energies[resampled_rows(landscape.frames.weights, min(NATIVE, len(landscape.energies)), rng)]
    ranking = rank_decoys(native, {name: e - lowest for name, e in energies.items()}, rng=rng)
    try:
        write_table(Path(folder) / "decoys.csv", ranking.table())
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}. Choose another place.") from error
    return ranking.areas["all"]


def write_conformations(path: Path, model: TorsionModel, angles: Tensor, built: Any | None = None) -> Any:
    """Write drawn torsions as coordinates (.pdb, .xtc, .dcd) or as a table of degrees and energies (.csv).

    Parameters
    ----------
    path
        Of the file.
    model
        From which they were drawn.
    angles
        In radians, ``(n, d)``.
    built
        Their coordinates, where they are there already.

    Returns
    -------
    The coordinates, an mdtraj ``Trajectory``; ``None`` for a table alone.

    Raises
    ------
    OptionError
        If the ending is none of these.
    StorageError
        If the file cannot be written.
    """
    import pandas as pd

    ending = path.suffix.lower()
    if ending not in SAMPLE_FILES:
        raise OptionError(
            f"{path} ends in {ending or 'nothing'}; conformations are written as {', '.join(SAMPLE_FILES)}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".csv":
            table = pd.DataFrame(torch.rad2deg(angles).numpy(), columns=[degrees_of(n) for n in model.names])
            with torch.no_grad():
                table["energy_kt"] = model.energy(angles).double().numpy()
            table["energy_kj_mol"] = model.kt * table["energy_kt"]
            write_table(path, table)
            return None
        made: Any = model.conformations(angles) if built is None else built
        {".pdb": made.save_pdb, ".xtc": made.save_xtc, ".dcd": made.save_dcd}[ending](str(path))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Choose another place.") from error
    return made


def write_table(path: Path, table: Any) -> None:
    """Write a pandas ``DataFrame`` as CSV, in one move."""
    replace_file(path, table.to_csv(index=False, float_format="%.7g").encode())
