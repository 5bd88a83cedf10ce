"""The record of a run: its history, the file of it, TensorBoard, and what the terminal shows meanwhile.

A record is a flat dict of numbers, made every ``log_every`` steps. An event (a rollback) is a record too, with the key
``event``. In a folder they go to ``metrics.jsonl``, one object per line; numbers that are not finite are written as the
strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which JSON has no numbers for.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gibbsian.errors import StorageError
from gibbsian.training.settings import TrainingSettings

Record = dict[str, Any]

QUIET_SECONDS = 10.0
"""Seconds between lines where the terminal cannot redraw a table."""

_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_SHOWN = {
    "loss": "loss",
    "energy_data": "E(data)",
    "energy_samples": "E(samples)",
    "gap": "gap",
    "grad_norm": "gradient norm",
    "acceptance": "acceptance",
    "buffer_age": "buffer age",
    "learning_rate": "learning rate",
}


def mean_metrics(steps: Sequence[Mapping[str, Tensor | float]], like: Tensor) -> dict[str, float]:
    """Average the metrics of some steps, each over the steps that report it, with one transfer to the host.

    Parameters
    ----------
    steps
        One dict of 0-d tensors per step.
    like
        Gives the device on which to average.
    """
    names = list(dict.fromkeys(name for step in steps for name in step))
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    means = []
    for name in names:
        values = [torch.as_tensor(step[name], dtype=dtype, device=like.device) for step in steps if name in step]
        means.append(torch.stack(values).mean())
    return dict(zip(names, torch.stack(means).tolist())) if means else {}


def read_metrics(path: str | Path) -> list[Record]:
    """Read a ``metrics.jsonl``; a last line that was cut off is left out."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                records.append(
                    {k: _NUMBERS.get(v, v) if isinstance(v, str) else v for k, v in json.loads(line).items()}
                )
    return records


class Recorder:
    """Where the records go.

    Parameters
    ----------
    settings
        Of the run.
    folder
        Of the run, or ``None`` to keep the history in memory only.
    progress
        Show the run on the terminal.
    callbacks
        Called with each record.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        folder: Path | None,
        progress: bool,
        callbacks: Iterable[Callable[[Record], object]] = (),
    ) -> None:
        self.history: list[Record] = []
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.callbacks = tuple(callbacks)
        self.display = Display(settings.steps) if progress else None
        self._file: Any = None
        self._board: Any = None
        self._wants_board = settings.tensorboard

    def open(self, records: int, step: int) -> None:
        """Open the file at the point that a checkpoint remembers, and forget what came after.

        Parameters
        ----------
        records, step
            Records made and steps done when the checkpoint was written.
        """
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.history = self._cut(records)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed with the recorder
        except OSError as error:
            raise StorageError(f"The record of the run cannot be written to {self.path} ({error}).") from error
        if self._wants_board:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def _cut(self, records: int) -> list[Record]:
        assert self.path is not None
        if not self.path.exists():
            history: list[Record] = []
        else:
            with open(self.path, "r+b") as file:
                for _ in range(records):
                    file.readline()
                file.truncate(file.tell())
            history = read_metrics(self.path)
        if len(history) < records:
            warnings.warn(
                f"{self.path} holds {len(history)} of the {records} records made so far; the history has a hole.",
                RuntimeWarning,
                stacklevel=4,
            )
        return history

    def write(self, record: Record) -> None:
        """Take in one record.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        self.history.append(record)
        if self._file is not None:
            try:
                self._file.write(json.dumps({k: _plain(v) for k, v in record.items()}, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise StorageError(
                    f"The record of step {record['step']} could not be written to {self.path} ({error}). Checkpoints "
                    "that were saved are intact; free some space and resume."
                ) from error
        if self._board is not None and "event" not in record:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])
        if self.display is not None:
            self.display.show(record)
        for callback in self.callbacks:
            callback(record)

    def sync(self) -> None:
        """Bring the file to the disk, before a checkpoint counts on it."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise StorageError(
                    f"The record of the run could not be written to {self.path} ({error}). Checkpoints that were saved "
                    "are intact; free some space and resume."
                ) from error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self.display, self._board, self._file):
            if part is not None:
                part.close()


class Display:
    """The run on the terminal: a table that redraws itself, or, where that cannot be, a line now and then."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console

        self.steps = steps
        self.console = Console(stderr=True)
        self.live: Any = None
        self.spoke = -math.inf
        if self.console.is_terminal or self.console.is_jupyter:
            from rich.live import Live

            self.live = Live(console=self.console, transient=True, auto_refresh=False)
            self.live.start()

    def show(self, record: Record) -> None:
        """Show a record; events always, others at most every few seconds where lines are printed."""
        if "event" in record:
            self.console.print(event_line(record), markup=False, highlight=False)
        elif self.live is not None:
            self.live.update(self._table(record), refresh=True)
        elif record["step"] >= self.steps or time.monotonic() - self.spoke >= QUIET_SECONDS:
            self.spoke = time.monotonic()
            told = ", ".join(f"{label} {value}" for label, value in self._rows(record))
            self.console.print(told, markup=False, highlight=False, soft_wrap=True)

    def _rows(self, record: Record) -> list[tuple[str, str]]:
        rows = [("step", f"{record['step']} of {self.steps}")]
        rows += [(label, f"{record[name]:.4g}") for name, label in _SHOWN.items() if name in record]
        speed = record["steps_per_second"]
        left = (self.steps - record["step"]) / speed if speed > 0 else math.nan
        return [*rows, ("steps per second", f"{speed:.4g}"), ("time left", clock(left))]

    def _table(self, record: Record) -> Any:
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2))
        for label, value in self._rows(record):
            table.add_row(label, value)
        return table

    def close(self) -> None:
        """Give the terminal back."""
        if self.live is not None:
            self.live.stop()


def event_line(record: Record) -> str:
    """Say an event in one line."""
    was = f"step {record['step']}: {record['metric']} was {record['value']:.4g}"
    return f"{was}; {record['event']}" + (f", back to step {record['to_step']}" if "to_step" in record else "")


def clock(seconds: float) -> str:
    """Write a duration as ``h:mm:ss``."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return _NAMES.get(value, "NaN")
    return value
