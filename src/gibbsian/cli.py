"""The command line: from data to a trained model and a report, and what one asks of it afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from gibbsian.errors import DataError, GibbsianError, InputError, OptionError, StorageError, TrainingInterrupted

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from gibbsian.data import Dataset
    from gibbsian.evaluation import Evaluation
    from gibbsian.models import Model

SETTINGS = "run.json"
MODEL, EVALUATED = ("model.safetensors", "recipe.json"), ("evaluation.json", "samples.npy", "report.html")
INTERRUPTED = 130
SWITCH = {"yes": True, "true": True, "no": False, "false": False}


def plain_option(hint: Any, help: str, unset: str = "") -> Any:
    """Annotate an option of a plain type that may be left out, with one clear message for what does not parse.

    Names are not compared with a list here: where they become objects, the nearest one is suggested.
    """
    pair, choice = get_origin(hint) is tuple, get_origin(hint) is Literal
    kind = float if pair else str if choice else hint
    count = len(get_args(hint)) if pair else 1
    name = "|".join(get_args(hint)) if choice else {int: "INT", float: "FLOAT", bool: "yes|no"}.get(kind, "NAME")

    def parse(words: list[str]) -> Any:
        try:
            values = tuple(SWITCH[word.lower()] if kind is bool else kind(word) for word in words)
        except (ValueError, KeyError):
            wanted = {int: "a whole number", bool: "yes or no"}.get(kind, "a number" if count == 1 else "two numbers")
            raise ValueError(f"expected {wanted}, got {' '.join(words)!r}") from None
        return values if pair else values[0]

    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=count,
        metavar=" ".join([name] * count),
        instance_from_str=parse,
        is_instance=lambda value: True,
        str_from_instance=lambda value: list(map(str, value)) if pair and value else [str(value)],
    )
    return Annotated[hint | None, spec, tyro.conf.arg(help=help, help_behavior_hint=unset)]


@dataclass(frozen=True)
class DataOptions:
    """How to read the data."""

    labels: plain_option(str, "Column of a table, or array of an .npz, that holds the class of each row.") = None  # type: ignore
    array: plain_option(str, "Array of an .npz to read.") = None  # type: ignore
    kind: plain_option(Literal["image", "table", "binary"], "Read the rows as this instead of guessing.") = None  # type: ignore
    held_out: plain_option(float, "Part of the rows held out for evaluation.") = None  # type: ignore
    limit: plain_option(int, "Rows to use at most, or to draw for a generated set.") = None  # type: ignore
    split_seed: int = 0
    """Seed of the split into training and held-out rows."""


def override_class() -> type:
    """Build the dataclass of all options that a recipe has; those left out are the recipe's choice."""
    from gibbsian.recipes import Recipe
    from gibbsian.training.settings import TrainingSettings

    made: list[tuple[str, Any, Any]] = []
    for kind in (Recipe, TrainingSettings):
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.name in ("training", "kind", "shape", "version", "seed"):
                continue
            annotation = plain_option(hints[f.name], f.metadata.get("help", ""), "(recipe's choice)")
            made.append((f.name, annotation, dataclasses.field(default=None)))
    cls = dataclasses.make_dataclass("Overrides", made, frozen=True)
    cls.__doc__ = "The recipe is chosen from the data's kind and size; every field of it can be set here."
    return cls


def spell_out(arguments: Sequence[str], options: type) -> list[str]:
    """Write switches with their value: ``--spectral-norm`` is yes, ``--no-spectral-norm`` no, ``... yes`` stays."""
    switches = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(options) if _is_switch(f)}
    words: list[str] = []
    for i, word in enumerate(arguments):
        positive = word.replace("--no-", "--", 1)
        if positive not in switches:
            words.append(word)
        elif word != positive:
            words += [positive, "no"]
        else:
            valued = i + 1 < len(arguments) and arguments[i + 1].lower() in SWITCH
            words += [word] if valued else [word, "yes"]
    return words


def _is_switch(field: dataclasses.Field[Any]) -> bool:
    return bool in get_args(get_args(field.type)[0])


def train(options: Any, command: str = "gibbsian train") -> None:
    """Fit an energy, draw from it, score with it, bracket its log Z, and write a report."""
    from gibbsian.models import Model, save_model
    from gibbsian.recipes import build_annealing, build_objective, choose, initial_weights
    from gibbsian.training.fit import fit

    console = _console()
    began = time.perf_counter()
    dataset = _load(options.data, options.reading)
    given = {k: v for k, v in dataclasses.asdict(options.overrides).items() if v is not None} | {"seed": options.seed}
    recipe = choose(dataset.kind, dataset.event_shape, len(dataset.train), given)
    scaling = dataset.scaling()
    data = scaling.forward(dataset.train)
    energy, objective = initial_weights(recipe, data), build_objective(recipe, data)
    if recipe.noise_conditional:
        build_annealing(recipe)  # what cannot be sampled is told of before training
    folder = options.out or Path("runs") / dataset.name
    console.print(f"[bold]{dataset}[/]")
    for note in dataset.notes:
        console.print(f"  {note}")
    console.print(f"{recipe.energy} energy by {recipe.objective}, {recipe.training.steps} steps, into {folder}")
    _prepare(folder, options, dataset.columns, command)
    rng = _generator(options.seed)
    try:
        run = fit(
            energy,
            data,
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
    _clear(folder, EVALUATED)  # an older evaluation would tell of other weights
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
    seed
        Of the draws.
    """
    from gibbsian.models import load_model

    model = load_model(run)
    out = out or run / "draws.npy"
    _check_ending(out, (".npy", ".npz", ".csv", ".parquet", ".png"))
    rows = model.draw(n, _generator(seed))
    _write_rows(out, rows, _columns(run) or [f"x{i}" for i in range(rows[0].numel())])
    _console().print(f"{n} draws of shape {tuple(rows.shape[1:])} in {out}")


def score(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    array: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
) -> None:
    """Score rows with a trained model: energy, unnormalised log-density, and log-density where log Z is known.

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
    """
    import pandas as pd

    from gibbsian.data.loading import load_rows
    from gibbsian.models import load_model

    model = load_model(run)
    if out is not None:
        _check_ending(out, (".csv",))
    labels = _reading(run).get("labels")
    rows, columns = load_rows(data, array=array, drop=labels, kind=model.recipe.kind)  # type: ignore[arg-type]
    if tuple(rows.shape[1:]) != tuple(model.recipe.shape):
        raise DataError(f"{data} has rows of shape {tuple(rows.shape[1:])}; the model scores {model.recipe.shape}.")
    _same_columns(_columns(run), columns, data)
    energy = model.energies(rows).double()
    table = pd.DataFrame({"energy": energy.numpy(), "score": (model.scaling.log_det - energy).numpy()})
    log_z = _saved_log_z(run)
    if log_z is not None:
        table["log_prob"] = table["score"] - log_z
    if out is None:
        print(table.to_csv(index_label="row"), end="")
        return
    _replace(out, table.to_csv(index_label="row").encode())
    known = (
        "log_prob uses the log Z of gibbsian evaluate" if log_z is not None else "no log Z yet: run gibbsian evaluate"
    )
    _console().print(f"{len(table)} scores in {out} (higher is more likely; {known})")


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
    _evaluate(_console(), run, model, _reload(run), seed)


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
        run, model, _reload(run), samples, evaluation, _history(run), _generator(seed), _saved_command(run)
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
                folder, model, dataset, samples, evaluation, _history(folder), rng, _saved_command(folder), taken
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

    if evaluation.log_z is not None:
        z = evaluation.log_z
        console.print(
            f"log Z {z.value:.3f} ± {z.stderr:.3f}, bracket [{z.lower:.3f}, {z.upper:.3f}] ({z.method}), model units"
        )
        told = ", ".join(f"{name} {value}" for name, value in evaluation.log_likelihood.items())
        console.print(f"log-likelihood per row, nats: {told}")
    columns = list(dict.fromkeys(c for row in evaluation.quality.values() for c in row))
    table = Table("distance to held-out rows", *columns)
    for name, row in evaluation.quality.items():
        table.add_row(name, *(str(row[c]) if c in row else "" for c in columns))
    console.print(table)
    for name, value in evaluation.detection.items():
        console.print(f"AUROC against {name}: {value}")
    for note in evaluation.notes:
        console.print(f"[yellow]note:[/] {note}")


def _load(source: str, reading: DataOptions) -> Dataset:
    from gibbsian.data import load

    return load(
        source,
        held_out=reading.held_out,
        seed=reading.split_seed,
        limit=reading.limit,
        array=reading.array,
        labels=reading.labels,
        kind=reading.kind,  # type: ignore[arg-type]
    )


def _prepare(folder: Path, options: Any, columns: Sequence[str], command: str) -> None:
    """Make the run's folder and note what it was made from."""
    from gibbsian.models import replace_file

    if options.resume and options.overwrite:
        raise OptionError("--resume goes on with a run and --overwrite replaces it: give one of them.")
    used = (folder / "checkpoints").exists()
    if used and not (options.resume or options.overwrite):
        raise OptionError(
            f"A run is already saved in {folder}. Add --resume to go on with it, --overwrite to replace it, or "
            "--out FOLDER for another place."
        )
    if options.resume and not used:
        raise OptionError(
            f"There is no run in {folder} to go on with. Leave --resume out to start one, or name its folder with "
            "--out FOLDER."
        )
    kept = {
        "data": _lasting(options.data),
        "reading": dataclasses.asdict(options.reading),
        "columns": list(columns),
        "command": command,
    }
    try:
        if options.overwrite:
            _clear(folder, ("checkpoints", "tensorboard", "metrics.jsonl", *MODEL, *EVALUATED))
        folder.mkdir(parents=True, exist_ok=True)
        if not (options.resume and (folder / SETTINGS).exists()):
            replace_file(folder / SETTINGS, json.dumps(kept, indent=1).encode())
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another place with --out FOLDER."
        ) from error


def _clear(folder: Path, names: Sequence[str]) -> None:
    """Remove what a run wrote."""
    import shutil

    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _lasting(source: str) -> str:
    """Write a path such that it is found from any folder; names of built-in data stay as they are."""
    from gibbsian.data.catalogue import CATALOGUE, standard_name

    built_in = standard_name(source) in CATALOGUE
    return source if built_in else str(Path(source).expanduser().resolve())


def _settings(run: Path) -> Mapping[str, Any]:
    try:
        kept = json.loads((run / SETTINGS).read_text())
        DataOptions(**kept["reading"])  # a field that does not exist is told of here
        return {**kept, "data": str(kept["data"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise InputError(
            f"{run / SETTINGS}, which tells what data the model was trained on, {why}. Evaluation needs the data: "
            "train with gibbsian train, or evaluate in Python: gibbsian.evaluation.evaluate."
        ) from error


def _known_settings(run: Path) -> Mapping[str, Any]:
    """What is noted of the run, or nothing: models saved from Python have no note."""
    try:
        return _settings(run)
    except InputError:
        return {}


def _reading(run: Path) -> Mapping[str, Any]:
    return _known_settings(run).get("reading", {})


def _reload(run: Path) -> Dataset:
    kept = _settings(run)
    return _load(kept["data"], DataOptions(**kept["reading"]))


def _saved_command(run: Path) -> str:
    return str(_known_settings(run).get("command", ""))


def _saved_log_z(run: Path) -> float | None:
    from gibbsian.evaluation import EVALUATION

    try:
        return float(json.loads((run / EVALUATION).read_text())["log_z"]["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _history(run: Path) -> list[dict[str, Any]]:
    from gibbsian.training.metrics import read_metrics

    path = run / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def _columns(run: Path) -> tuple[str, ...]:
    """Names of the columns that the model was trained on, where they are known."""
    return tuple(map(str, _known_settings(run).get("columns", ())))


def _same_columns(expected: Sequence[str], found: Sequence[str], data: str) -> None:
    nameless = tuple(f"x{i}" for i in range(len(found)))
    if not expected or not found or nameless in (tuple(expected), tuple(found)):
        return
    if tuple(expected) != tuple(found):
        raise DataError(
            f"{data} has the columns {', '.join(found)}; the model was trained on {', '.join(expected)}. Give the same "
            "columns in the same order."
        )


def _check_ending(path: Path, known: Sequence[str]) -> None:
    if path.suffix.lower() not in known:
        raise OptionError(f"{path} ends in {path.suffix or 'nothing'}; this command writes {', '.join(known)}.")


def _write_rows(path: Path, rows: Tensor, columns: Sequence[str]) -> None:
    from io import BytesIO

    import numpy as np
    import pandas as pd

    held = BytesIO()
    ending = path.suffix.lower()
    if ending == ".npy":
        np.save(held, rows.numpy())
    elif ending == ".npz":
        np.savez_compressed(held, x=rows.numpy())
    elif ending == ".png":
        _image_grid(rows).save(held, format="PNG")
    else:
        frame = pd.DataFrame(rows.flatten(1).numpy(), columns=list(columns))
        frame.to_csv(held, index=False) if ending == ".csv" else frame.to_parquet(held)
    _replace(path, held.getvalue())


def _image_grid(rows: Tensor) -> Any:
    import numpy as np
    from PIL import Image

    if rows.ndim != 4 or rows.shape[1] not in (1, 3):
        raise OptionError(f"Only images can be drawn as .png; these rows have shape {tuple(rows.shape[1:])}. Use .csv.")
    n, c, h, w = rows.shape
    across = int(np.ceil(np.sqrt(n)))
    down = -(-n // across)
    low, high = rows.quantile(0.001), rows.quantile(0.999)
    pixels = ((rows - low) / (high - low)).clamp(0, 1).mul(255).round().numpy().astype(np.uint8)
    grid = np.full((down * (h + 1) + 1, across * (w + 1) + 1, c), 128, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // across * (h + 1) + 1, i % across * (w + 1) + 1
        grid[y : y + h, x : x + w] = picture.transpose(1, 2, 0)
    image = Image.fromarray(grid[:, :, 0] if c == 1 else grid)
    factor = max(1, 800 // max(grid.shape[:2]))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _replace(path: Path, content: bytes) -> None:
    from gibbsian.models import replace_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Choose another place.") from error


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _complain(message: str, what: str = "error") -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]{what}:[/] ", end="")
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(str(message), "warning")
