"""Commands that ask something of trained models: draws, scores, compositions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from gibbsian.commands.console import console_of, generator
from gibbsian.errors import OptionError
from gibbsian.options import BY, By, plain_option
from gibbsian.runs import (
    check_ending,
    columns_of,
    reading_of,
    saved_log_z,
    write_file,
    write_rows,
)

_WEIGHTS = plain_option(
    bool,
    "Weigh the particles on their way down noise levels, which brings about the masses of parts that chains do not "
    "pass between. In more than 32 coordinates a few particles outweigh the rest, and chains are left to themselves.",
    "(few coordinates)",
)


def sample(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    n: int = 64,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    label: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = (),
    guidance: Annotated[float | None, tyro.conf.arg(metavar="S", help_behavior_hint="(default: 1)")] = None,
    corrected: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    seed: int = 0,
    lanes: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None,
) -> None:
    """Draw from a trained model; under torchrun the processes share the rows.

    Parameters
    ----------
    run
        The model's folder.
    n
        Rows to draw.
    out
        Where to write them: .npy, .npz, .csv or .parquet, or .png for images; draws.npy in the folder by default.
    label
        Classes to draw, of a model trained with --conditional: one for all rows, or several, each row's in turn.
        Without it rows of all classes are drawn.
    guidance
        How far to go from all classes towards the label's: 0 not at all, 1 to the class itself, more for rows that are
        more of it than its own, and less various. What others call the weight w is this less 1.
    corrected
        Draw from the guided density by Metropolis chains at every noise level, as far as they mix, instead of a plain
        walk down the levels, whose density has no formula unless the guidance is 0 or 1.
    seed
        Of the draws.
    lanes
        Shares of the rows, each with random numbers of its own: the same draws in any number of processes that divides
        it. One for each process when left out, and none in a single one. Draws of classes are the first process's work.
    """
    from gibbsian.labelled import draw_labelled, in_turn, label_codes
    from gibbsian.models import load_model
    from gibbsian.processes import world

    model = load_model(run)
    out = out or run / "draws.npy"
    check_ending(out, (".npy", ".npz", ".csv", ".parquet", ".png"))
    told: dict[str, list[str]] = {}
    here = world()
    if label:
        if lanes is not None:
            raise OptionError("--lanes share rows of all classes; leave it out with --label.")
        if not here.main:
            return
        labels = in_turn(label_codes(model, label), n)
        scale = 1.0 if guidance is None else guidance
        rows = draw_labelled(model, labels, generator(seed), scale, corrected)
        told[reading_of(run).get("labels") or "label"] = [model.recipe.class_names[i] for i in labels.tolist()]
    elif guidance is not None or corrected:
        raise OptionError("--guidance and --corrected are about draws of a class: name it with --label NAME.")
    else:
        if lanes is None and here.size > 1:
            lanes = here.size
        rows = model.draw(n, generator(seed), lanes=lanes)
    if not here.main:
        return
    write_rows(out, rows, columns_of(run) or [f"x{i}" for i in range(rows[0].numel())], told, model.value_range)
    console_of().print(f"{n} draws of shape {tuple(rows.shape[1:])} in {out}")


def score(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    array: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    reference: Annotated[str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = None,
    by: Annotated[By | None, tyro.conf.arg(metavar=BY, help_behavior_hint="")] = None,
    false_positive_rate: float = 0.05,
    label: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    confidence: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None,
    seed: int = 0,
) -> None:
    """Score rows with a trained model: energy, unnormalised log-density, and log-density where log Z is known.

    With a reference, also say which rows are foreign to it, with a guaranteed rate of false alarms. Of a model trained
    with --conditional also the most probable class, and its probability where classes are equally likely before.

    Parameters
    ----------
    run
        The model's folder.
    data
        What to score: a file, a folder of images or a built-in name, of the kind the model was trained on.
    out
        A .csv file with one line per row; printed when left out.
    array
        Array of an .npz to read.
    reference
        Rows of the usual kind that the model was not trained on, as for DATA, or held-out for those of the run. Adds
        p-values and flags of foreign rows.
    by
        What tells foreign rows: their energy, its distance from the usual, the length of its gradient, or energies and
        gradients at several noise levels; when left out, levels for images where the model has them, else energy.
    false_positive_rate
        Part of rows like the reference that may be called foreign.
    label
        Score as rows of this class, of a model trained with --conditional, instead of as rows of any.
    confidence
        With which that rate holds for this very reference, such as 0.95; when left out it holds on average over
        references. Takes more rows.
    seed
        Of the split of the reference, where the score is fitted to a half of it.
    """
    from gibbsian.labelled import label_codes, of_label
    from gibbsian.models import load_model
    from gibbsian.scoring import detector_for, model_rows, reference_rows, score_table, usual_by, verdict

    if out is not None:
        check_ending(out, (".csv",))
    if reference is None and by not in (None, "energy"):
        raise OptionError(f"--by {by} compares rows with a reference: add --reference FILE, or --reference held-out.")
    if reference is None and confidence is not None:
        raise OptionError("--confidence is that of a threshold: add --reference FILE, or --reference held-out.")
    model, log_z = load_model(run), saved_log_z(run)
    if label is not None:
        # What was evaluated is log Z of all classes together.
        model, log_z = of_label(model, label_codes(model, [label])[0]), None
    rows, detector = model_rows(run, model, data, array), None
    by = by or usual_by(model)
    if reference is not None:
        usual = reference_rows(run, model, reference, array)
        detector = detector_for(model, usual, by, false_positive_rate, generator(seed), confidence)
    table = score_table(model, rows, log_z, detector, by)
    text = table.to_csv(index_label="row")
    if out is None:
        print(text, end="")
    else:
        write_file(out, text.encode())
        known = (
            "no log Z yet: run gibbsian evaluate" if log_z is None else "log_prob uses the log Z of gibbsian evaluate"
        )
        known = known if label is None else f"of rows of class {label}, up to its log Z"
        console_of().print(f"{len(table)} scores in {out} (higher is more likely; {known})")
    if detector is not None:
        # Where the table goes to the terminal, or through a pipe, nothing else stands between its lines.
        console_of(stderr=out is None).print(verdict(table, detector, by), soft_wrap=True)


def compose(
    formula: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FORMULA")],
    n: int = 64,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    particles: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(4 for each row, 1 without weights)")
    ] = None,
    levels: int = 40,
    steps: int = 5,
    weights: _WEIGHTS = None,  # type: ignore
    seed: int = 0,
) -> None:
    """Draw from a product, mixture or negation of trained models, and say how well each is met.

    A formula is read as densities: "runs/a * runs/b" is a product, "0.3*runs/a + 0.7*runs/b" a mixture, "runs/a * not
    runs/b^0.5" divides by a power. "runs/a[y=3]" fixes a label, "runs/a[sigma=0.2..2]" noise levels at which a factor
    acts. Quote it for the shell.

    Parameters
    ----------
    formula
        Folders of models, with *, +, not, ^ and brackets.
    n
        Rows to draw.
    out
        Where to write them: .npy, .npz, .csv or .parquet, or .png for images; only the table is printed otherwise.
    particles
        Particles that walk down the noise levels.
    levels
        Noise levels; models without them are walked along temperatures instead.
    steps
        Steps of the chains at each level or temperature.
    seed
        Of the draws.
    """
    from gibbsian.composing import composite, draw

    if out is not None:
        check_ending(out, (".npy", ".npz", ".csv", ".parquet", ".png"))
    found = composite(formula)
    console = console_of()
    with console.status("walking down") as status:
        stage = iter(range(1, levels + 1))
        say: Callable[[int], object] = lambda _: status.update(f"noise level {next(stage)} of {levels}")  # noqa: E731
        rng = generator(seed)
        drawn = draw(found, n, rng, particles=particles, levels=levels, steps=steps, weights=weights, progress=say)
    console.print(str(drawn), markup=False, soft_wrap=True)
    if out is not None:
        folder = Path(next(iter(found.models)))
        columns = columns_of(folder) or [f"x{i}" for i in range(drawn.rows[0].numel())]
        write_rows(out, drawn.rows, columns, value_range=found.first.value_range)
        console.print(f"{n} draws of shape {tuple(drawn.rows.shape[1:])} in {out}")


def datasets() -> None:
    """List the built-in data sets."""
    from rich.table import Column, Table

    from gibbsian.data import datasets

    table = Table(Column("name", no_wrap=True), "kind", "shape", "rows", "from", "here now")
    missing = []
    for info in datasets():
        shape = "x".join(map(str, info.shape))
        table.add_row(info.name, info.kind, shape, str(info.size), info.source, "yes" if info.available else "no")
        missing += [] if info.available else [info.remedy]
    console = console_of()
    console.print(table)
    for remedy in missing:
        console.print(remedy, markup=False)
