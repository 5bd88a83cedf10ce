"""The page of a simulation: where its torsions went, and the free energy that its frames and weights give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gibbsian.molecules.dynamics import nanoseconds_per_day
from gibbsian.molecules.recording import TRAJECTORY
from gibbsian.molecules.thermal import thermal_energy
from gibbsian.report.canvas import colour, svg, tidy
from gibbsian.report.markup import card, definitions, figure, panels, paragraph
from gibbsian.report.shell import duration, header, html_page, save_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
BINS = 36
HIGHEST = 40.0
"""kJ/mol shown above the lowest."""


def write_simulation_page(folder: Path, record: dict[str, Any], frames: Any) -> Path:
    """Write the page beside the files of a simulation.

    Parameters
    ----------
    folder
        Of the simulation.
    record
        Of ``simulation.json``.
    frames
        The table of ``frames.csv``.

    Returns
    -------
    The page's path.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    biased = record["metadynamics"] is not None
    speed = nanoseconds_per_day(record["picoseconds"], record["seconds"])
    cards = [
        card("Simulated", f"{record['picoseconds'] / 1000:.4g} ns", f"{record['frames']} frames"),
        card("Speed", f"{speed} ns/day", f"{duration(record['seconds'])} on OpenMM's {record['platform']} platform"),
    ]
    if biased:
        cards.append(
            card(
                "Worth",
                f"{record['effective_frames']:.0f} frames",
                "of equal weight, for as far as they are independent",
            )
        )
    title = "Metadynamics" if biased else "Molecular dynamics"
    facts = [f"{record['atoms']} atoms", f"{record['temperature_k']:g} K", ", ".join(record["forcefield"])]
    sections = [("torsions", "Torsions", torsion_figures(frames, record) if "phi_deg" in frames else "")]
    sections.append(("settings", "Settings", definitions(_settings(record)) + paragraph(_files(biased))))
    page = html_page(
        f"{title} of {record['molecule']}",
        header(title, str(record["molecule"]), facts) + f'<div class="cards">{"".join(cards)}</div>',
        sections,
        "Free energies are in kJ/mol.",
    )
    return save_page(folder / PAGE, page)


def torsion_figures(frames: Any, record: dict[str, Any]) -> str:
    """Draw the torsions over time, and the free energy over both of them."""
    phi, psi, weight = (frames[name].to_numpy() for name in ("phi_deg", "psi_deg", "weight"))
    free, (low, high) = free_energy(phi, psi, weight, record["temperature_k"]), _span(weight)
    seen = np.isfinite(free)

    def trace(paper: Figure) -> None:
        step = max(1, len(phi) // 1500)
        for axes, values, name in zip(paper.subplots(2, 1, sharex=True), (phi, psi), ("phi", "psi")):
            axes.plot(frames["time_ps"].to_numpy()[::step] / 1000, values[::step], ".", ms=1.2, color=colour("data"))
            axes.set(ylim=(-180, 180), yticks=(-180, -90, 0, 90, 180))
            tidy(axes, "time (ns)" if name == "psi" else "", f"{name} (degrees)")

    def surface(paper: Figure) -> None:
        axes = paper.add_subplot()
        shown = axes.imshow(
            free.T, origin="lower", extent=(-180, 180, -180, 180), cmap="viridis", vmin=0, vmax=HIGHEST, aspect="equal"
        )
        axes.set(xticks=(-180, -90, 0, 90, 180), yticks=(-180, -90, 0, 90, 180))
        tidy(axes, "phi (degrees)", "psi (degrees)", grid="")
        bar = paper.colorbar(shown, ax=axes, label="free energy (kJ/mol)", shrink=0.85)
        bar.outline.set_visible(False)  # type: ignore[operator]

    cut = f" The first {low} frames, when the bias was still growing, weigh nothing." if low else ""
    return panels(
        [
            figure(
                "Torsions over time",
                svg("trace", "Backbone torsions phi and psi over time.", trace, 4.2, 3.4),
                "A torsion that goes back and forth between its basins many times is sampled; one that crosses once or "
                "twice is not, and its populations are guesses.",
            ),
            figure(
                "Free energy over phi and psi",
                svg("surface", f"Free energy over phi and psi, {int(seen.sum())} cells visited.", surface, 4.2, 3.4),
                f"-kT log of the weighted share of frames in {360 // BINS} degree cells, above the lowest one; empty "
                f"where no frame went.{cut} {high} frames count.",
            ),
        ]
    )


def free_energy(phi: np.ndarray, psi: np.ndarray, weight: np.ndarray, temperature: float) -> np.ndarray:
    """Free energy of cells of both torsions in kJ/mol above the lowest, NaN where there is no frame: phi, psi."""
    range_ = [[-180.0, 180.0]] * 2
    mass = np.histogram2d(phi, psi, BINS, range_, weights=weight)[0]
    free = np.full_like(mass, np.nan)
    free[mass > 0] = -thermal_energy(temperature) * np.log(mass[mass > 0] / mass.max())
    return free


def _span(weight: np.ndarray) -> tuple[int, int]:
    """Frames at the start that weigh nothing, and frames that do."""
    return int((weight == 0).sum()), int((weight > 0).sum())


def _settings(record: dict[str, Any]) -> dict[str, object]:
    s, m = record["settings"], record["metadynamics"]
    told: dict[str, object] = {
        "step": f"{s['step_fs']:g} fs, {record['constraints']} distances held",
        "friction": f"{s['friction']:g} per ps",
        "frame every": f"{s['frame_ps']:g} ps",
        "seed": s["seed"],
    }
    if m is not None:
        told |= {
            "bias factor": f"{m['factor']:g}",
            "Gaussians": f"{m['height']:g} kJ/mol, {m['width']:g} rad, every {m['every']:g} ps",
        }
    return told | record["versions"]


def _files(biased: bool) -> str:
    words = (
        f"{TRAJECTORY} opens with topology.pdb in VMD, PyMOL, ChimeraX and mdtraj; frames.csv has a line per frame "
        "with its time, torsions, bias and weight."
    )
    return words + (" Averages over frames are weighted ones; bias.npz holds the bias at the end." if biased else "")
