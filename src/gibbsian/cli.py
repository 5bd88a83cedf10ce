"""The command line: from data to a trained model and a report, and what one asks of it afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gibbsian.errors import GibbsianError, InputError, OptionError, StorageError, TrainingInterrupted
from gibbsian.options import BY, By, DataOptions, override_class, spell_out
from gibbsian.runs import (
    EVALUATED,
    check_ending,
    clear,
    columns_of,
    history,
    load_data,
    prepare,
    reading_of,
    reload_data,
    saved_command,
    saved_log_z,
    training_labels,
    write_file,
    write_rows,
)

if TYPE_CHECKING:
    from rich.console import Console

    from gibbsian.data import Dataset
    from gibbsian.evaluation import Evaluation
    from gibbsian.models import Model

INTERRUPTED = 130


def train(options: Any, command: str = "gibbsian train") -> None:
    """Fit an energy, draw from it, score with it, bracket its log Z, and write a report."""
    from gibbsian.building import build_annealing, build_objective, initial_weights
    from gibbsian.models import Model, save_model
    from gibbsian.objectives.base import Batch
    from gibbsian.recipes import choose
    from gibbsian.training.fit import fit

    console = _console()
    began = time.perf_counter()
    options, dataset = _load_for(options)
    given = {k: v for k, v in dataclasses.asdict(options.overrides).items() if v is not None} | {"seed": options.seed}
    recipe = choose(dataset.kind, dataset.event_shape, len(dataset.train), given, dataset.label_names)
    scaling = dataset.scaling()
    data = scaling.forward(dataset.train)
    context = training_labels(dataset) if recipe.conditional else {}
    energy, objective = initial_weights(recipe, data), build_objective(recipe, data)
    if recipe.noise_conditional:
        build_annealing(recipe)  # what cannot be sampled is told of before training
    folder = options.out or Path("runs") / dataset.name
    console.print(f"[bold]{dataset}[/]")
    for note in dataset.notes:
        console.print(f"  {note}")
    console.print(f"{recipe.energy} energy by {recipe.objective}, {recipe.training.steps} steps, into {folder}")
    prepare(folder, options, dataset, command)
    rng = _generator(options.seed)
    try:
        run = fit(
            energy,
            Batch(data, context),
            objective,
            rng=rng,
            settings=recipe.training,
            folder=folder,
            resume=options.resume,
            progress=True,
        )
    except (TrainingInterrupted, StorageError) as stopped:
        words = [word for word in shlex.split(command) if word not in ("--resume", "--overwrite")]
        raise type(stopped)(f"{stopped} To go on: {shlex.join([*words, '--resume'])}") from None
    model = Model(energy, recipe, scaling)
    clear(folder, EVALUATED)  # an older evaluation would tell of other weights
    save_model(folder, model)
    console.print(f"{run}")
    if options.evaluation:
        _evaluate(console, folder, model, dataset, options.seed, seconds=began)
    else:
        console.print(f"Saved in {folder}. Evaluate it with: gibbsian evaluate {folder}")


def sample(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    n: int = 64,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    label: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = (),
    guidance: Annotated[float | None, tyro.conf.arg(metavar="S", help_behavior_hint="(default: 1)")] = None,
    corrected: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    seed: int = 0,
) -> None:
    """Draw from a trained model.

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
    """
    from gibbsian.labelled import draw_labelled, in_turn, label_codes
    from gibbsian.models import load_model

    model = load_model(run)
    out = out or run / "draws.npy"
    check_ending(out, (".npy", ".npz", ".csv", ".parquet", ".png"))
    told: dict[str, list[str]] = {}
    if label:
        labels = in_turn(label_codes(model, label), n)
        scale = 1.0 if guidance is None else guidance
        rows = draw_labelled(model, labels, _generator(seed), scale, corrected)
        told[reading_of(run).get("labels") or "label"] = [model.recipe.class_names[i] for i in labels.tolist()]
    elif guidance is not None or corrected:
        raise OptionError("--guidance and --corrected are about draws of a class: name it with --label NAME.")
    else:
        rows = model.draw(n, _generator(seed))
    write_rows(out, rows, columns_of(run) or [f"x{i}" for i in range(rows[0].numel())], told)
    _console().print(f"{n} draws of shape {tuple(rows.shape[1:])} in {out}")


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
        detector = detector_for(model, usual, by, false_positive_rate, _generator(seed), confidence)
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
        _console().print(f"{len(table)} scores in {out} (higher is more likely; {known})")
    if detector is not None:
        # Where the table goes to the terminal, or through a pipe, nothing else stands between its lines.
        _console(stderr=out is None).print(verdict(table, detector, by), soft_wrap=True)


def compose(
    formula: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FORMULA")],
    n: int = 64,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    particles: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(4 for each row)")] = None,
    levels: int = 40,
    steps: int = 5,
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
        Weighted particles that walk down the noise levels.
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
    console = _console()
    with console.status("walking down") as status:
        stage = iter(range(1, levels + 1))
        say: Callable[[int], object] = lambda _: status.update(f"noise level {next(stage)} of {levels}")  # noqa: E731
        drawn = draw(found, n, _generator(seed), particles=particles, levels=levels, steps=steps, progress=say)
    console.print(str(drawn), markup=False, soft_wrap=True)
    if out is not None:
        folder = Path(next(iter(found.models)))
        write_rows(out, drawn.rows, columns_of(folder) or [f"x{i}" for i in range(drawn.rows[0].numel())])
        console.print(f"{n} draws of shape {tuple(drawn.rows.shape[1:])} in {out}")


def evaluate(run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")], seed: int = 0) -> None:
    """Estimate log Z with its bracket, held-out log-likelihood and sample quality; write them and the report.

    Parameters
    ----------
    run
        The model's folder.
    seed
        Of everything random.
    """
    from gibbsian.models import load_model

    model = load_model(run)
    _evaluate(_console(), run, model, reload_data(run), seed)


def report(run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")], seed: int = 0) -> None:
    """Write the report anew from what was evaluated.

    Parameters
    ----------
    run
        The model's folder.
    seed
        Of the noise in the histogram of energies.
    """
    import numpy as np
    import torch

    from gibbsian.evaluation import EVALUATION, SAMPLES, Evaluation, build_report
    from gibbsian.models import load_model

    model = load_model(run)
    try:
        evaluation = Evaluation.from_dict(json.loads((run / EVALUATION).read_text()))
        samples = torch.as_tensor(np.load(run / SAMPLES, allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run} holds no complete evaluation ({error}). Make one: gibbsian evaluate {run}") from error
    path = build_report(
        run, model, reload_data(run), samples, evaluation, history(run), _generator(seed), saved_command(run)
    )
    _console().print(f"Report: {path}")


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
    console = _console()
    console.print(table)
    for remedy in missing:
        console.print(remedy, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every expected failure ends with one message and a code other than 0."""
    warnings.showwarning = _show_warning
    try:
        _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except TrainingInterrupted as stopped:
        _complain(str(stopped), "stopped")
        raise SystemExit(INTERRUPTED) from None
    except KeyboardInterrupt:
        _complain("Stopped by the user.", "stopped")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except GibbsianError as error:
        _complain(str(error))
        raise SystemExit(1) from None
    except OSError as error:
        _complain(f"{error.strerror or error}: {error.filename or ''}")
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        _complain(
            f"There is not enough memory ({error}). Use a smaller --width, --batch-size, --buffer-size or --limit."
        )
        raise SystemExit(1) from None


def _dispatch(arguments: list[str]) -> None:
    overrides = override_class()
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("data", Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=_DATA_HELP, metavar="DATA")]),
            (
                "out",
                Annotated[Path | None, tyro.conf.arg(help=_OUT_HELP, metavar="FOLDER", help_behavior_hint="")],
                None,
            ),
            ("seed", Annotated[int, tyro.conf.arg(help="Of weights, batches, chains and draws.")], 0),
            ("resume", Annotated[bool, tyro.conf.arg(help="Go on with the run in the folder.")], False),
            ("overwrite", Annotated[bool, tyro.conf.arg(help="Replace the run in the folder.")], False),
            ("evaluation", Annotated[bool, tyro.conf.arg(help="Evaluate the model and write the report.")], True),
            ("reading", DataOptions, dataclasses.field(default_factory=DataOptions)),
            ("overrides", overrides, dataclasses.field(default_factory=overrides)),
        ],
    )

    def train_command(options: Any) -> None:
        train(options, shlex.join(["gibbsian", *arguments]))

    train_command.__annotations__ = {"options": Annotated[options, tyro.conf.arg(name="")], "return": None}
    train_command.__doc__ = train.__doc__
    commands = {
        "train": train_command,
        "sample": sample,
        "score": score,
        "compose": compose,
        "evaluate": evaluate,
        "report": report,
        "datasets": datasets,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="gibbsian",
        description="Energy-based models: from data to a model you can trust.",
        args=spell_out(arguments, overrides),
        config=(tyro.conf.OmitArgPrefixes,),
    )


_OUT_HELP = "The run's folder; runs/NAME by default."
_DATA_HELP = "A built-in name (see gibbsian datasets), a .csv, .npy, .npz or .parquet file, or a folder of images."


def _load_for(options: Any) -> tuple[Any, Dataset]:
    """Read the data; pictures for a machine on bits become such, and the options then say so, to be kept."""
    from gibbsian.data.binarise import HALF, binarised

    dataset = load_data(options.data, options.reading)
    asked = options.overrides
    if dataset.kind != "image" or asked.energy != "rbm" or asked.visible not in (None, "bernoulli"):
        return options, dataset
    reading = dataclasses.replace(options.reading, binarise=HALF)
    return dataclasses.replace(options, reading=reading), binarised(dataset, HALF)


def _evaluate(
    console: Console, folder: Path, model: Model, dataset: Dataset, seed: int, seconds: float | None = None
) -> None:
    from gibbsian.evaluation import build_report, evaluate, write_evaluation

    rng = _generator(seed + 1)
    with console.status("drawing samples") as status:
        samples = model.draw(min(max(len(dataset.train), 256), 2000), rng)
        evaluation = evaluate(model, dataset, samples, rng, say=lambda line: status.update(line))
        status.update("writing the report")
        taken = None if seconds is None else time.perf_counter() - seconds
        try:
            write_evaluation(folder, evaluation, samples)
            path = build_report(
                folder, model, dataset, samples, evaluation, history(folder), rng, saved_command(folder), taken
            )
        except OSError as error:
            raise StorageError(
                f"The evaluation could not be written to {folder}: {error.strerror or error}. The model is intact. "
                f"Free some space, then: gibbsian evaluate {folder}"
            ) from error
    _print_evaluation(console, evaluation)
    console.print(f"Model, samples and report in {folder}; open {path}")


def _print_evaluation(console: Console, evaluation: Evaluation) -> None:
    from rich.table import Table

    from gibbsian.evaluation import likelihood_summary

    if evaluation.log_z is not None:
        z = evaluation.log_z
        console.print(
            f"log Z {z.value:.3f} ± {z.stderr:.3f}, bracket [{z.lower:.3f}, {z.upper:.3f}] ({z.method}), model units"
        )
        told = ", ".join(f"{name} {value}" for name, value in evaluation.log_likelihood.items())
        summary = likelihood_summary(evaluation)
        if summary is not None and summary.bounds is not None:
            told += " (between {:.3f} and {:.3f} by the bounds of log Z)".format(*summary.bounds)
        console.print(f"log-likelihood per row, nats: {told}")
    if evaluation.flow is not None:
        console.print(f"log-likelihood by the probability flow: {evaluation.flow.told()}")
    columns = list(dict.fromkeys(c for row in evaluation.quality.values() for c in row))
    table = Table("distance to held-out rows", *columns)
    for name, row in evaluation.quality.items():
        table.add_row(name, *(str(row[c]) if c in row else "" for c in columns))
    console.print(table)
    for name, value in evaluation.detection.items():
        console.print(f"AUROC against {name}: {value}")
    for name, value in evaluation.classification.items():
        console.print(f"{name} of the held-out rows' classes: {value}")
    for note in evaluation.notes:
        console.print(f"[yellow]note:[/] {note}")


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(highlight=False, stderr=stderr)


def _complain(message: str, what: str = "error") -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]{what}:[/] ", end="")
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(str(message), "warning")
