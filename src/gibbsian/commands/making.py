"""Commands that make a run and what belongs to it: training, evaluation, the report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gibbsian.commands.console import console_of, generator
from gibbsian.errors import InputError, ProcessError, StorageError, TrainingInterrupted
from gibbsian.processes import part, together, world
from gibbsian.runs import (
    EVALUATED,
    clear,
    history,
    load_data,
    open_stream,
    prepare,
    reload_data,
    saved_command,
    training_labels,
)

if TYPE_CHECKING:
    from rich.console import Console

    from gibbsian.data import Dataset
    from gibbsian.data.rows import Rows
    from gibbsian.evaluation import Evaluation
    from gibbsian.models import Model


def train(options: Any, command: str = "gibbsian train") -> None:
    """Fit an energy, draw from it, score with it, bracket its log Z, and write a report."""
    from gibbsian.building import build_objective, initial_weights
    from gibbsian.models import Model, save_model
    from gibbsian.objectives.base import Batch
    from gibbsian.recipes import choose
    from gibbsian.training.fit import fit

    console = console_of()
    began, here = time.perf_counter(), world()
    with together():
        options, dataset, rows = _load_for(options)
        given = {k: v for k, v in dataclasses.asdict(options.overrides).items() if v is not None}
        given |= {"seed": options.seed}
        n = len(dataset.train) if rows is None else len(rows)
        recipe = choose(dataset.kind, dataset.event_shape, n, given, dataset.label_names)
        scaling = dataset.scaling()
        data = scaling.forward(dataset.train)
        if rows is None:
            fitted = Batch(data, training_labels(dataset) if recipe.conditional else {})
        else:
            fitted = (rows if recipe.conditional else rows.unlabelled()).scaled(scaling)
        energy = initial_weights(recipe, data)
        objective = build_objective(recipe, data, energy)
        folder = options.out or Path("runs") / dataset.name
    console.print(f"[bold]{dataset}[/]")
    for note in dataset.notes:
        console.print(f"  {note}")
    console.print(f"{recipe.energy} energy by {recipe.objective}, {recipe.training.steps} steps, into {folder}")
    with together():
        if here.main:
            prepare(folder, options, dataset, command)
    rng = generator(options.seed)
    try:
        run = fit(
            energy,
            fitted,
            objective,
            rng=rng,
            settings=recipe.training,
            folder=folder,
            resume=options.resume,
            progress=True,
        )
    except (TrainingInterrupted, StorageError, ProcessError) as stopped:
        words = [word for word in shlex.split(command) if word not in ("--resume", "--overwrite")]
        # The same error, with the codes and marks that it carries.
        stopped.args = (f"{stopped} To go on: {shlex.join([*words, '--resume'])}",)
        raise stopped from None
    # The rest is for one process, and the others are done.
    part()
    if not here.main:
        return
    model = Model(energy, recipe, scaling)
    clear(folder, EVALUATED)  # an older evaluation would tell of other weights
    save_model(folder, model)
    console.print(f"{run}")
    if options.evaluation:
        _evaluate(console, folder, model, dataset, options.seed, seconds=began)
    else:
        console.print(f"Saved in {folder}. Evaluate it with: gibbsian evaluate {folder}")


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
    _evaluate(console_of(), run, model, reload_data(run), seed)


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

    from gibbsian.evaluation import EVALUATION, SAMPLES, Evaluation
    from gibbsian.models import load_model
    from gibbsian.reporting import build_report

    model = load_model(run)
    try:
        evaluation = Evaluation.from_dict(json.loads((run / EVALUATION).read_text()))
        samples = torch.as_tensor(np.load(run / SAMPLES, allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run} holds no complete evaluation ({error}). Make one: gibbsian evaluate {run}") from error
    path = build_report(
        run, model, reload_data(run), samples, evaluation, history(run), generator(seed), saved_command(run)
    )
    console_of().print(f"Report: {path}")


def _load_for(options: Any) -> tuple[Any, Dataset, Rows | None]:
    """Read the data; pictures for a machine on bits become such, and the options then say so, to be kept.

    Of rows that stay on the disk the data set is a sample.
    """
    from gibbsian.data.binarise import HALF, binarised

    rows = open_stream(options.data, options.reading)
    dataset = load_data(options.data, options.reading) if rows is None else rows.dataset()
    asked = options.overrides
    if dataset.kind != "image" or asked.energy != "rbm" or asked.visible not in (None, "bernoulli"):
        return options, dataset, rows
    options = dataclasses.replace(options, reading=dataclasses.replace(options.reading, binarise=HALF))
    if rows is None:
        return options, binarised(dataset, HALF), None
    rows = open_stream(options.data, options.reading)
    assert rows is not None
    return options, rows.dataset(), rows


def _evaluate(
    console: Console, folder: Path, model: Model, dataset: Dataset, seed: int, seconds: float | None = None
) -> None:
    from gibbsian.evaluation import evaluate, write_evaluation
    from gibbsian.reporting import build_report

    rng = generator(seed + 1)
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

    from gibbsian.reporting import likelihood_summary

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
