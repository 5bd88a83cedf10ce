"""A run's folder: what it was made from, what it holds, and the files that commands write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gibbsian.errors import DataError, InputError, OptionError, StorageError
from gibbsian.options import DataOptions

if TYPE_CHECKING:
    from torch import Tensor

    from gibbsian.data import Dataset
    from gibbsian.data.rows import Rows

SETTINGS = "run.json"
MODEL, EVALUATED = ("model.safetensors", "recipe.json"), ("evaluation.json", "samples.npy", "report.html")


def open_stream(source: str, reading: DataOptions) -> Rows | None:
    """Open data that are to stay on the disk, as asked for or because they are large; ``None`` for others.

    Raises
    ------
    OptionError
        If rows are to be chosen from them.
    """
    from gibbsian.data.catalogue import CATALOGUE, standard_name
    from gibbsian.data.rows import open_rows
    from gibbsian.data.rows.opening import why_stream

    if reading.stream is False or standard_name(source) in CATALOGUE:
        return None
    why = "it was asked for" if reading.stream else why_stream(source)
    if not why:
        return None
    if reading.limit is not None:
        raise OptionError(
            f"--limit chooses rows to be held in memory, and those of {source} stay on the disk ({why}). Leave it out; "
            "--no-stream reads a file into memory."
        )
    rows = open_rows(
        source,
        held_out=reading.held_out,
        seed=reading.split_seed,
        labels=reading.labels,
        array=reading.array,
        shape=_shape(reading.shape),
        kind=reading.kind,  # type: ignore[arg-type]
        binarise=reading.binarise,
    )
    return dataclasses.replace(rows, notes=(f"The rows stay on the disk, as {why}.", *rows.notes))


def _shape(told: str | None) -> tuple[int, ...] | None:
    if told is None:
        return None
    parts = told.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"--shape is whole numbers joined by x, such as 1x28x28; got {told!r}.")
    return tuple(int(part) for part in parts)


def load_data(source: str, reading: DataOptions) -> Dataset:
    """Read the data with the options of the command line; of data that stay on the disk, a sample."""
    from gibbsian.data import load

    rows = open_stream(source, reading)
    if rows is not None:
        return rows.dataset()
    if reading.shape is not None:
        raise OptionError(f"--shape is for tables that stay on the disk, and {source} is read into memory: --stream.")
    return load(
        source,
        held_out=reading.held_out,
        seed=reading.split_seed,
        limit=reading.limit,
        array=reading.array,
        labels=reading.labels,
        kind=reading.kind,  # type: ignore[arg-type]
        binarise=reading.binarise,
    )


def prepare(folder: Path, options: Any, dataset: Dataset, command: str) -> None:
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
        "data": lasting(options.data),
        "reading": dataclasses.asdict(options.reading),
        "columns": list(dataset.columns),
        "threshold": dataset.threshold,
        "command": command,
    }
    try:
        if options.overwrite:
            clear(folder, ("checkpoints", "tensorboard", "metrics.jsonl", *MODEL, *EVALUATED))
        folder.mkdir(parents=True, exist_ok=True)
        if not (options.resume and (folder / SETTINGS).exists()):
            replace_file(folder / SETTINGS, json.dumps(kept, indent=1).encode())
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another place with --out FOLDER."
        ) from error


def clear(folder: Path, names: Sequence[str]) -> None:
    """Remove what a run wrote."""
    import shutil

    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def training_labels(dataset: Dataset) -> dict[str, Tensor]:
    """Return the training rows' labels as context.

    Raises
    ------
    DataError
        If a class has no row among them: a model would say nothing of it.
    """
    labels, names = dataset.labels, dataset.label_names
    assert labels is not None
    missing = [name for i, name in enumerate(names) if not bool((labels == i).any())]
    if missing:
        raise DataError(
            f"No training row is of class {', '.join(missing)}, of {len(names)} classes. Hold out fewer rows "
            "(--held-out), raise --limit, choose them anew (--split-seed), or drop the class."
        )
    return {"y": labels}


def lasting(source: str) -> str:
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


def known_settings(run: Path) -> Mapping[str, Any]:
    """What is noted of the run, or nothing: models saved from Python have no note."""
    try:
        return _settings(run)
    except InputError:
        return {}


def reading_of(run: Path) -> Mapping[str, Any]:
    """How the data of a run were read, where that is noted."""
    return known_settings(run).get("reading", {})


def threshold_of(run: Path) -> float | None:
    """The value above which grey values were read as ones, where they were."""
    return known_settings(run).get("threshold")


def reload_data(run: Path) -> Dataset:
    """Read the data of a run again, as they were read for training."""
    kept = _settings(run)
    return load_data(kept["data"], DataOptions(**kept["reading"]))


def saved_command(run: Path) -> str:
    """The command that made a run, or nothing."""
    return str(known_settings(run).get("command", ""))


def saved_log_z(run: Path) -> float | None:
    """The value of log Z that was evaluated, in model units, or ``None``."""
    from gibbsian.evaluation import EVALUATION

    try:
        return float(json.loads((run / EVALUATION).read_text())["log_z"]["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def history(run: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    from gibbsian.training.metrics import read_metrics

    path = run / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def columns_of(run: Path) -> tuple[str, ...]:
    """Names of the columns that the model was trained on, where they are known."""
    return tuple(map(str, known_settings(run).get("columns", ())))


def require_same_columns(expected: Sequence[str], found: Sequence[str], data: str) -> None:
    """Refuse rows whose named columns are not those that the model was trained on."""
    nameless = tuple(f"x{i}" for i in range(len(found)))
    if not expected or not found or nameless in (tuple(expected), tuple(found)):
        return
    if tuple(expected) != tuple(found):
        raise DataError(
            f"{data} has the columns {', '.join(found)}; the model was trained on {', '.join(expected)}. Give the same "
            "columns in the same order."
        )


def check_ending(path: Path, known: Sequence[str]) -> None:
    """Refuse a file whose ending names no format that the command writes."""
    if path.suffix.lower() not in known:
        raise OptionError(f"{path} ends in {path.suffix or 'nothing'}; this command writes {', '.join(known)}.")


def write_rows(
    path: Path,
    rows: Tensor,
    columns: Sequence[str],
    labels: Mapping[str, Sequence[str]] = {},
    value_range: tuple[float, float] | None = None,
) -> None:
    """Write draws in the format that the file's ending names.

    Parameters
    ----------
    path
        Of the file.
    rows
        Draws ``(n, *event)``.
    columns
        Their names, in tables.
    labels
        By name, a column of classes to add, in tables and in .npz; .npy and .png have no place for it.
    value_range
        Black and white of images; the lowest and highest value when left out.
    """
    from io import BytesIO

    import numpy as np
    import pandas as pd

    held = BytesIO()
    ending = path.suffix.lower()
    if ending == ".npy":
        np.save(held, rows.numpy())
    elif ending == ".npz":
        arrays: dict[str, Any] = {"x": rows.numpy()} | {name: np.array(values) for name, values in labels.items()}
        np.savez_compressed(held, **arrays)
    elif ending == ".png":
        _image_grid(rows, value_range).save(held, format="PNG")
    else:
        frame = pd.DataFrame(rows.flatten(1).numpy(), columns=list(columns)).assign(**labels)
        frame.to_csv(held, index=False) if ending == ".csv" else frame.to_parquet(held)
    write_file(path, held.getvalue())


def _image_grid(rows: Tensor, value_range: tuple[float, float] | None) -> Any:
    import numpy as np
    from PIL import Image

    if rows.ndim != 4 or rows.shape[1] not in (1, 3):
        raise OptionError(f"Only images can be drawn as .png; these rows have shape {tuple(rows.shape[1:])}. Use .csv.")
    n, c, h, w = rows.shape
    across = int(np.ceil(np.sqrt(n)))
    down = -(-n // across)
    low, high = value_range or (float(rows.min()), float(rows.max()))
    pixels = ((rows - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().numpy().astype(np.uint8)
    grid = np.full((down * (h + 1) + 1, across * (w + 1) + 1, c), 128, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // across * (h + 1) + 1, i % across * (w + 1) + 1
        grid[y : y + h, x : x + w] = picture.transpose(1, 2, 0)
    image = Image.fromarray(grid[:, :, 0] if c == 1 else grid)
    factor = max(1, 800 // max(grid.shape[:2]))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def write_file(path: Path, content: bytes) -> None:
    """Put a file in its place in one move, its folder made where needed."""
    from gibbsian.models import replace_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Choose another place.") from error
