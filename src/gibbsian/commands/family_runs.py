"""The folder of a family's run: what it was made from, and whether a run may be made there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gibbsian.errors import InputError, OptionError, StorageError
from gibbsian.runs import clear, lasting

if TYPE_CHECKING:
    from rich.console import Console

    from gibbsian.sequences.alignment import Alignment
    from gibbsian.sequences.settings import FamilySettings

RUN, REPORT = "run.json", "report.html"


def describe(console: Console, found: Alignment, settings: FamilySettings, draws: int) -> None:
    """Say what is fitted and how much memory it takes; refuse what the machine has no room for."""
    from gibbsian.sequences.memory import MEGABYTE, check_memory, memory_available, memory_needed

    console.print(f"[bold]{found}[/]", markup=True)
    if found.effective < found.length:
        console.print(
            f"  [yellow]note:[/] {found.effective:.0f} effective sequences are fewer than {found.length} columns: "
            "couplings and contacts are mostly guesses"
        )
    needed = memory_needed(
        settings.by,
        len(found),
        found.length,
        found.letters,
        chains=settings.chains,
        replicas=settings.tempering,
        hidden=settings.hidden,
        draws=draws,
    )
    free = memory_available()
    told = "" if free is None else f" of {free / MEGABYTE:,.0f} MB free"
    console.print(f"{settings.by}: about {needed / MEGABYTE:,.0f} MB of memory{told}")
    check_memory(needed, free)


def prepare_family(
    folder: Path,
    source: Path,
    found: Alignment,
    settings: FamilySettings,
    reference: str | None,
    seed: int,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make the run's folder by the rules of ``train``, and note what the run is of."""
    from gibbsian.files import replace_file
    from gibbsian.sequences.family import FAMILY, WEIGHTS
    from gibbsian.sequences.fitting import PARTIAL
    from gibbsian.sequences.outputs import DRAWN, PICTURES, RESULTS, TABLES

    if resume and overwrite:
        raise OptionError("--resume goes on with a run and --overwrite replaces it: give one of them.")
    used = (folder / RUN).exists()
    if used and not (resume or overwrite):
        raise OptionError(
            f"A run is already saved in {folder}. Add --resume to go on with it, --overwrite to replace it, or "
            "--out FOLDER for another place."
        )
    if resume and not used:
        raise OptionError(
            f"There is no run in {folder} to go on with. Leave --resume out to start one, or name its folder with "
            "--out FOLDER."
        )
    kept = {
        "alignment": lasting(str(source)),
        "sequences": len(found),
        "columns": found.length,
        "effective": round(found.effective, 3),
        "reference": reference,
        "seed": seed,
        **dataclasses.asdict(settings),
    }
    results = (WEIGHTS, FAMILY, RESULTS, DRAWN, REPORT, *TABLES)
    results += tuple(f"{name}.{ending}" for name in PICTURES for ending in ("png", "svg"))
    try:
        if resume:
            _check_same(folder, kept)
        if overwrite:
            clear(folder, ("checkpoints", "tensorboard", "metrics.jsonl", PARTIAL, RUN))
        # What is left of an earlier end would tell of another model.
        clear(folder, results)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / RUN, json.dumps(kept, indent=1).encode())
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another place with --out FOLDER."
        ) from error


def _check_same(folder: Path, now: dict[str, Any]) -> None:
    """Refuse to go on with a run of another alignment or by another way; more steps may be asked for."""
    try:
        before = json.loads((folder / RUN).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RUN} cannot be read ({error}). Start anew with --overwrite.") from error
    free = ("steps", "iterations", "alignment")
    other = [name for name, value in now.items() if name not in free and before.get(name) != value]
    if other:
        told = ", ".join(f"{name} {before.get(name)}, now {now[name]}" for name in other)
        raise OptionError(f"The run in {folder} was of other settings: {told}. Give the same, or --overwrite it.")


def saved_family_log_z(run: Path) -> dict[str, float] | None:
    """Log Z and its bounds as they were evaluated, or ``None``."""
    from gibbsian.sequences.outputs import RESULTS

    try:
        return {k: float(v) for k, v in json.loads((run / RESULTS).read_text())["log_z"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
