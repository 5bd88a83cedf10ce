"""The page of a landscape: basins first, then maps, profiles, and how it all was made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gibbsian.diagnostics.estimate import Estimate, plain, with_error
from gibbsian.molecules.conformations import Landscape, Map
from gibbsian.molecules.landscape import Band, free_energy, free_energy_band, profile
from gibbsian.molecules.ramachandran import DEPTH, STEP, profile_svg, ramachandran_svg
from gibbsian.report.markup import card, definitions, figure, panels, paragraph, table, text
from gibbsian.report.shell import duration, header, html_page


def landscape_page(
    landscape: Landscape, record: dict[str, Any], command: str = "", seconds: float | None = None
) -> str:
    """Write the page.

    Parameters
    ----------
    landscape
        What was learned.
    record
        As `gibbsian.molecules.landscape_files.write_landscape` returned it.
    command
        That made it, or nothing.
    seconds
        It took, or ``None``.
    """
    frames, maps, kt = landscape.frames, landscape.maps, landscape.model.kt
    facts = [
        f"{plain(len(landscape.energies))} frames, worth {landscape.effective_frames:.0f}",
        f"{len(landscape.torsions)} torsions",
        f"{frames.temperature:g} K",
    ]
    facts += [] if seconds is None else [duration(seconds)]
    top = (
        header("Conformations: report of a landscape", frames.name, facts) + _notes(landscape.notes) + _cards(landscape)
    )
    return html_page(
        f"Landscape of {frames.name}",
        top,
        [
            ("map", "Ramachandran maps", "".join(_map_panel(i, m, kt) for i, m in enumerate(maps))),
            ("profiles", "Free energy along torsions", "".join(_profiles(i, m, kt) for i, m in enumerate(maps))),
            ("basins", "Basins", _basins(landscape)),
            ("frames", "Frames", _frames(landscape, record)),
            ("made", "How it was made", _made(landscape, command)),
        ],
        "kT and kJ/mol as told; ± is one standard error.",
    )  # fmt: skip


def maps_of(one: Map, kt: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Free energies in kJ/mol of the learned energy and of the frames."""
    return free_energy(one.learned, kt), free_energy(one.frames, kt)


def profile_bands(one: Map, axis: int, kt: float) -> tuple[Band, Band]:
    """Free energy along phi (0) or psi (1) in kJ/mol: learned, and by the frames, each with its 90 percent band."""
    frames = free_energy_band(profile(one.frames, axis), profile(one.frames_resampled, axis), kt)
    learned = profile(one.learned, axis)
    if len(one.learned_resampled):
        return free_energy_band(learned, profile(one.learned_resampled, axis), kt), frames
    value = free_energy(learned, kt)
    return Band(value, value, value), frames


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f'<aside class="notes" aria-label="Notes"><ul>{items}</ul></aside>' if items else ""


def _cards(landscape: Landscape) -> str:
    cards = []
    for one in landscape.maps[:1]:
        for pair, value in one.learned_differences.kj_mol.items():
            known = one.frame_differences.kj_mol[pair]
            never = "frames are only there, or never"
            told = f"by the frames {with_error(*known)}" if math.isfinite(known.value) else never
            level = "good" if math.isfinite(value.stderr) and value.stderr < 2.0 else "caution"
            basin = pair.removesuffix(" - rest")
            cards.append(card(f"{basin} of {one.residue}", _kj(value), f"kJ/mol against the rest; {told}", level))
    bad = int((~landscape.checks.physical).sum())
    level = "good" if not bad else "caution"
    cards.append(card("Unphysical frames", str(bad), f"of {plain(len(landscape.energies))}", level))
    return f'<div class="cards">{"".join(cards)}</div>'


def _kj(value: Estimate) -> str:
    return with_error(*value) if math.isfinite(value.value) and math.isfinite(value.stderr) else "unknown"


def _map_panel(i: int, one: Map, kt: float) -> str:
    learned, frames = maps_of(one, kt)
    caption = f"Free energy in kJ/mol, lines every {STEP:g}, darkest lowest, white from {DEPTH:g} on."
    return panels(
        [
            figure(
                f"{one.residue}, learned",
                ramachandran_svg(f"learned-{i}", f"{one.residue} by the learned energy", learned),
                f"{caption} By the learned energy.",
            ),
            figure(
                f"{one.residue}, frames",
                ramachandran_svg(f"frames-{i}", f"{one.residue} by the weighted frames", frames),
                f"{caption} Histogram of the weighted frames; white also where no frame is.",
            ),
        ]
    )


def _profiles(i: int, one: Map, kt: float) -> str:
    shown = []
    for axis, name in enumerate(("φ", "ψ")):
        learned, frames = profile_bands(one, axis, kt)
        shown.append(
            figure(
                f"{name} of {one.residue}",
                profile_svg(f"profile-{i}-{axis}", name, learned, frames),
                "Bands hold 90 percent of the bootstrap: of stretches of the frames, and of networks trained on such.",
            )
        )
    return panels(shown)


def _basins(landscape: Landscape) -> str:
    if not landscape.maps:
        return ""
    rows = []
    kt = landscape.model.kt
    for one in landscape.maps:
        for basin, pair in zip(one.frame_differences.populations, one.frame_differences.kj_mol):
            learned, frames = one.learned_differences, one.frame_differences
            cells = [
                text(with_error(*learned.populations[basin])),
                text(_kj(learned.kj_mol[pair])),
                text(_kj(Estimate(*(v / kt for v in learned.kj_mol[pair])))),
                text(_kj(frames.kj_mol[pair])),
            ]
            rows.append((f"{one.residue}, {basin}", cells, ""))
    heads = ["Basin", "Population", "Learned, kJ/mol", "Learned, kT", "Frames, kJ/mol"]
    told = (
        "Free energy of each basin against the rest of the plane. Left-handed is all of φ > 0; right-handed is φ < 0 "
        "with ψ from −120° to 50°, beta the rest of φ < 0. The error of the frames' values comes from a bootstrap of "
        f"stretches of {landscape.block} frames or more; the learned values' adds their distance "
        "from the frames' in quadrature."
    )
    return paragraph(told) + table(heads, rows)


def _frames(landscape: Landscape, record: dict[str, Any]) -> str:
    checks = landscape.checks
    told = (
        f"{checks} A frame is unphysical with a bond more than {checks.bond_tolerance:.0%} out of the length its "
        f"elements say, heavy atoms nearer than {checks.clash_distance:g} nm, or an amino acid of D hand."
    )
    drawn = (
        f"{record['samples']} conformations were drawn from the learned energy into samples.pdb, samples.xtc and "
        f"samples.csv: the torsions are turned in the nearest frame, and {record['samples_physical']} of them are "
        "physical by the same checks. low_energy.pdb holds the frames of lowest learned energy that differ from each "
        "other by more than 20° in some torsion."
    )
    return paragraph(told) + paragraph(drawn)


def _made(landscape: Landscape, command: str) -> str:
    fit, net = landscape.fit, landscape.model.members[0]
    objective = {
        "exact": "exact maximum likelihood, log Z on a grid",
        "nce": "noise contrastive estimation against a mixture of von Mises densities",
        "denoising": "denoising score matching",
        "score": "exact score matching",
        "pcd": "persistent contrastive divergence by wrapped MALA",
    }[fit.objective]
    weights = "all frames weigh the same"
    if landscape.frames.weighted:
        weights = "of the frames, as they came"
    if landscape.frames.bias is not None:
        weights = "the energy is learned under the known bias, histograms and basins of frames are by weights"
    scores = ", ".join(f"{k}: {v:.4f}" for k, v in fit.scores.items())
    facts: dict[str, object] = {
        "Energy": f"mean of {len(landscape.model.members)} networks, {net.hidden}, harmonics to {net.harmonics}",
        "Trained by": f"{objective}, {fit.steps} steps",
        "Held-out loss by steps": scores or "not compared",
        "Torsions": ", ".join(landscape.torsions.names[:12]) + (", ..." if len(landscape.torsions) > 12 else ""),
        "Weights": weights,
        "Frames in a block of the bootstrap": landscape.block,
    }
    if fit.objective != "exact":
        facts["Networks are added to"] = "a mixture of von Mises densities of the frames"
    facts |= {"Command": command} if command else {}
    return definitions(facts)
