"""``gibbsian protein family`` and ``gibbsian protein score-sequences``: models of protein families."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gibbsian.commands.console import console_of, generator
from gibbsian.commands.family_runs import REPORT, describe, prepare_family, saved_family_log_z
from gibbsian.errors import OptionError, TrainingInterrupted
from gibbsian.runs import check_ending, write_file

if TYPE_CHECKING:
    from rich.console import Console

    from gibbsian.sequences.alignment import Alignment
    from gibbsian.sequences.family import Family
    from gibbsian.sequences.settings import FamilySettings

_FILE = tyro.conf.arg(metavar="FILE", help_behavior_hint="")
_NAME = tyro.conf.arg(metavar="NAME", help_behavior_hint="")


def family(
    alignment: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ALIGNMENT")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None,
    by: Literal["pseudo-likelihood", "boltzmann", "rbm"] = "pseudo-likelihood",
    structure: Annotated[Path | None, _FILE] = None,
    focus: Annotated[str | None, _NAME] = None,
    reference: Annotated[str | None, _NAME] = None,
    format: Annotated[str | None, tyro.conf.arg(metavar="fasta|a2m|stockholm", help_behavior_hint="")] = None,
    alphabet: Annotated[str, tyro.conf.arg(metavar="protein|rna|dna|LETTERS")] = "protein",
    unknown: Literal["refuse", "gap", "drop"] = "refuse",
    identity: float = 0.8,
    max_gaps: float = 1.0,
    coupling_penalty: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(0.01, with --by boltzmann 0.0001)")
    ] = None,
    iterations: int = 200,
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(boltzmann 2000, rbm 4000)")] = None,
    chains: int = 2000,
    tempering: int = 1,
    hidden: int = 100,
    draws: int = 10_000,
    sweeps: int = 200,
    doubles: int = 100_000,
    seed: int = 0,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Fit a model to an aligned family: contacts, mutation effects, new sequences, log-likelihoods, and a report.

    Parameters
    ----------
    alignment
        FASTA, A2M or Stockholm, also packed by gzip.
    out
        The run's folder; runs/NAME by default.
    by
        How to fit: for contacts and mutations (seconds), for new sequences (minutes), or a Boltzmann machine.
    structure
        Distances to compare contacts with: lines "i j value distance", columns from 1, angstroms.
    focus
        Keep the columns of this sequence only, and scan its mutations.
    reference
        Scan the mutations of this sequence; of the focus by default, else of the consensus.
    format
        Of the alignment, where its ending and first line do not tell.
    alphabet
        Its letters, besides the gap.
    unknown
        What becomes of letters that are none of these.
    identity
        Share of equal columns from which on sequences count together as one.
    max_gaps
        Leave out sequences with more than this share of gaps.
    coupling_penalty
        On squared couplings: more is smoother.
    iterations
        Of pseudo-likelihood, at most.
    steps
        Of Boltzmann learning and machines.
    chains
        Persistent chains of these.
    tempering
        Temperatures of parallel tempering in Boltzmann learning.
    hidden
        Units of a machine.
    draws
        Sequences to draw.
    sweeps
        Sweeps that each of them takes.
    doubles
        Double mutations to list, of largest epistasis.
    seed
        Of everything random.
    resume
        Go on with the run in the folder.
    overwrite
        Replace the run in the folder.
    """
    from gibbsian.sequences.alignment import read_alignment
    from gibbsian.sequences.contacts import read_structure
    from gibbsian.sequences.settings import FamilySettings

    console, began = console_of(), time.perf_counter()
    settings = FamilySettings(
        by=by,
        coupling_penalty=coupling_penalty,
        iterations=iterations,
        steps=steps,
        chains=chains,
        tempering=tempering,
        hidden=hidden,
    )
    if draws < 8 or sweeps < 8 or doubles < 0:
        raise OptionError(f"--draws and --sweeps are 8 or more, --doubles 0 or more; got {draws}, {sweeps}, {doubles}.")
    with console.status("reading the alignment"):
        found = read_alignment(
            alignment,
            format=format,
            alphabet=alphabet,
            focus=focus,
            unknown=unknown,
            identity=identity,
            max_gaps=max_gaps,
        )
        found.check_enough()
        if reference is not None:
            found.row_of(reference)
        known = None if structure is None else read_structure(structure, found.length)
    folder = out or Path("runs") / alignment.name.split(".")[0]
    command = shlex.join(["gibbsian", *sys.argv[1:]]) if sys.argv[1:2] == ["protein"] else ""
    describe(console, found, settings, min(draws, 4000))
    prepare_family(folder, alignment, found, settings, reference, seed, resume, overwrite)
    model = _fit(console, found, settings, reference, folder, seed, resume)
    _finish(console, folder, model, found, known, alignment, draws, sweeps, doubles, seed, command, began)


def score_sequences(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    sequences: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SEQUENCES")],
    out: Annotated[Path | None, _FILE] = None,
    format: Annotated[str | None, tyro.conf.arg(metavar="fasta|a2m|stockholm", help_behavior_hint="")] = None,
    unknown: Literal["refuse", "gap", "drop"] = "refuse",
) -> None:
    """Score aligned sequences with a fitted family: energy, and log-likelihood with the bounds of log Z, in nats.

    Parameters
    ----------
    run
        The family's folder.
    sequences
        Aligned to the family's columns: FASTA, A2M or Stockholm.
    out
        A .csv file with one line per sequence; printed when left out.
    format
        Of the sequences, where their ending and first line do not tell.
    unknown
        What becomes of letters that the family does not know.
    """
    import pandas as pd

    from gibbsian.sequences.alignment import read_sequences
    from gibbsian.sequences.family import load_family
    from gibbsian.sequences.likelihood import independent_log_prob

    if out is not None:
        check_ending(out, (".csv",))
    model = load_family(run)
    names, codes = read_sequences(sequences, format=format, alphabet=model.info.alphabet, unknown=unknown)
    energies = model.energies(codes).double()
    z = saved_family_log_z(run)
    columns = {"name": names, "energy": energies.numpy()}
    if z is not None:
        columns |= {
            "log_prob": (-energies - z["value"]).numpy(),
            "log_prob_lower": (-energies - z["upper"]).numpy(),
            "log_prob_upper": (-energies - z["lower"]).numpy(),
        }
    columns["log_prob_independent"] = independent_log_prob(model, codes).numpy()
    text = pd.DataFrame(columns).round(4).to_csv(index=False)
    if out is None:
        print(text, end="")
    else:
        write_file(out, text.encode())
        told = "no log Z: run gibbsian protein family again" if z is None else "higher log_prob is more likely"
        console_of().print(f"{len(names)} scores in {out} ({told})")


def _fit(
    console: Console,
    found: Alignment,
    settings: FamilySettings,
    reference: str | None,
    folder: Path,
    seed: int,
    resume: bool,
) -> Family:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from gibbsian.sequences.family import save_family
    from gibbsian.sequences.fitting import fit_family

    began = time.perf_counter()
    arguments: dict[str, Any] = {"rng": generator(seed), "reference": reference, "folder": folder, "resume": resume}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        if settings.by == "pseudo-likelihood":
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task("pseudo-likelihood", total=settings.iterations)
                model = fit_family(
                    found,
                    settings,
                    told=lambda done, _, loss: bar.update(task, completed=done, description=f"loss {loss:.3f} nats"),
                    **arguments,
                )
        else:
            model = fit_family(found, settings, progress=True, **arguments)
    except TrainingInterrupted as stopped:
        raise TrainingInterrupted(f"{stopped} Give the command again with --resume.") from None
    save_family(folder, model)
    console.print(f"fitted by {settings.by} in {time.perf_counter() - began:.1f} s")
    return model


def _finish(
    console: Console,
    folder: Path,
    model: Family,
    found: Alignment,
    known: Any,
    source: Path,
    draws: int,
    sweeps: int,
    doubles: int,
    seed: int,
    command: str,
    began: float,
) -> None:
    """Evaluate, write all files, and tell the numbers."""
    from gibbsian.sequences.evaluation import evaluate_family
    from gibbsian.sequences.outputs import write_outputs
    from gibbsian.sequences.page import write_page

    with console.status("evaluating") as status:
        worth = evaluate_family(
            model, found, generator(seed + 1), structure=known, draws=draws, sweeps=sweeps, say=status.update
        )
        status.update("writing the report")
        write_outputs(folder, model, worth, known, doubles)
        seconds = time.perf_counter() - began
        name = source.name.split(".")[0]
        path = write_page(folder / REPORT, model, found, worth, known, name=name, command=command, seconds=seconds)
    for name, each in worth.precision.items():
        told = ", ".join(f"{mark} {each.at(n):.3f}" for mark, n in each.marks.items())
        console.print(f"precision of contacts by {name}: {told} (at random {each.base_rate:.3f})", soft_wrap=True)
    a, z = worth.agreement, worth.log_z
    console.print(
        f"drawn and natural sequences: Pearson correlation {a.connected:.3f} of connected pairs, {a.one:.3f} of single "
        f"letters ({worth.ceiling.connected:.3f} for as many of the family's own); R-hat {worth.draws.r_hat:.4f}",
        soft_wrap=True,
    )
    console.print(
        f"log Z {z.value:.3f} ± {z.stderr:.3f}, bracket [{z.lower:.3f}, {z.upper:.3f}]; log-likelihood "
        f"{worth.log_likelihood} nats per sequence, independent columns {worth.independent}",
        soft_wrap=True,
    )
    console.print(f"Model, tables, sequences and report in {folder}; open {path}")
