"""``gibbsian protein sample``: conformations drawn from a learned landscape, as files that viewers open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from gibbsian.commands.console import console_of, generator
from gibbsian.errors import OptionError


def sample_conformations(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    n: int = 100,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    seed: int = 0,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Draw conformations from the learned energy of a landscape.

    Each draw of torsions becomes coordinates by turning the torsions of the nearest frame of the simulation: all else,
    bonds, angles and the torsions that are not modelled, is that frame's.

    Parameters
    ----------
    run
        The landscape's folder, made by gibbsian protein landscape.
    n
        Conformations to draw.
    out
        Where to write them: .pdb, .xtc or .dcd with coordinates (topology.pdb in the folder goes with the latter two),
        or .csv with torsions and energies; draws.pdb in the folder by default.
    seed
        Of the draws.
    overwrite
        Replace the file if there is one.
    """
    from gibbsian.molecules.frames import check_frames
    from gibbsian.molecules.landscape_files import SAMPLE_FILES, write_conformations
    from gibbsian.molecules.torsion_model import load_torsion_model

    path = out or run / "draws.pdb"
    if path.suffix.lower() not in SAMPLE_FILES:
        raise OptionError(f"{path} ends in {path.suffix or 'nothing'}; this command writes {', '.join(SAMPLE_FILES)}.")
    if path.exists() and not overwrite:
        raise OptionError(f"{path} is there already. Add --overwrite to replace it, or --out FILE for another place.")
    console = console_of()
    with console.status("drawing"):
        model = load_torsion_model(run)
        angles = model.draw(n, generator(seed))
        built = write_conformations(path, model, angles)
    told = "" if built is None else f" {check_frames(built)}"
    console.print(
        f"{n} draws of {len(model.names)} torsions at {model.temperature:g} K in {path}.{told}", soft_wrap=True
    )
