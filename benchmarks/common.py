"""What the quality benchmarks share: when and where they ran, means over seeds, and Markdown tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gibbsian.diagnostics.estimate import Estimate

RESULTS = Path(__file__).parent / "results"


class Stopwatch:
    """Wall and processor seconds of a block; the second is what counts on a machine with other work."""

    wall = 0.0
    cpu = 0.0

    def __enter__(self) -> Stopwatch:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.wall, self.cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]


def circumstances(seeds: Sequence[int], threads: int) -> dict[str, Any]:
    """Date, machine, versions and seeds of a run."""
    versions = {name: importlib.metadata.version(name) for name in ("gibbsian", "torch", "scikit-learn", "numpy")}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {processor()}, {threads} thread(s)",
        "versions": {"python": platform.python_version()} | versions,
        "seeds": list(seeds),
    }


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "processor unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def over_seeds(values: Iterable[float]) -> Estimate:
    """Mean and standard error over seeds; with one seed the error is unknown."""
    x = torch.tensor(list(values), dtype=torch.float64)
    return Estimate(float(x.mean()), float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a Markdown table, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(name: str, title: str, record: dict[str, Any], sections: Sequence[str]) -> None:
    """Write ``results/name.json`` and ``results/name.md``."""
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    seeds = ", ".join(map(str, record["seeds"]))
    head = f"# {title}\n\n{record['date']}; {record['machine']}; {versions}; seeds {seeds}."
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text("\n\n".join((head, *sections)) + "\n")


def generator(*seeds: int) -> torch.Generator:
    """Build a generator of a purpose: different numbers, different draws."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % 2**32
    return torch.Generator().manual_seed(seed)
