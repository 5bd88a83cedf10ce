"""What processes of one machine do to each other, measured among some that are started for it.

Each is a process of its own, joined as those of a job are. They time an all-reduce at some sizes, and steps of training
and of chains first with one process busy, then with all at once: they share caches and memory.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gibbsian.errors import ProcessError
from gibbsian.planning.costs import Curve, Link, Quantity
from gibbsian.planning.model import Crew
from gibbsian.recipes import Recipe

GRADIENTS = (0.5, 1.5)
"""Sizes of all-reduces that are timed, over that of the gradients, which is itself not."""

LEAST = 4096
"""Bytes that tell the latency of a message."""


@dataclass(frozen=True)
class Measured:
    """What was measured among processes.

    Attributes
    ----------
    crew
        Their effect on each other.
    exchange
        Seconds of an all-reduce among them, by bytes.
    refused
        Why `fit` does not train this recipe among processes, or nothing.
    """

    crew: Crew
    exchange: Curve
    refused: str = ""

    def link(self, size: float) -> Link:
        """Say what a link is worth for messages of an all-reduce of so many bytes, by the formula of the ring."""
        ranks = self.crew.together
        least, whole = self.exchange.at(LEAST), self.exchange.at(size)
        latency = least * (1.0 / (2 * (ranks - 1)))
        rest = max(0.0, whole.value - least.value)
        scale = 2.0 * max(size, 1.0) * (ranks - 1) / ranks
        return Link(latency, Quantity(rest / scale, whole.spread / scale))


def measured_crew(
    recipe: Recipe,
    count: int,
    threads: int,
    cores: int,
    gradients: float,
    batch: int | None,
    chains: int | None,
    seconds: float,
) -> Measured:
    """Start processes and measure among them.

    Parameters
    ----------
    recipe
        What they do.
    count
        How many, 2 or more.
    threads
        Of each.
    cores
        Processors that there are.
    gradients
        Bytes of the gradients that are planned.
    batch, chains
        Sizes at which to see how processes slow each other down, other than those planned; ``None`` leaves one out.
    seconds
        For measuring, the starts aside.

    Raises
    ------
    ProcessError
        If they do not start, or not all come to an end.
    """
    job = {
        "recipe": recipe.to_dict(),
        "threads": threads,
        "bytes": [LEAST, *(max(i * LEAST, int(gradients * factor)) for i, factor in enumerate(GRADIENTS, 2))],
        "gradients": gradients,
        "batch": batch,
        "chains": chains,
        "seconds": seconds,
    }
    found = _run(job, count, threads, limit=120.0 + 10.0 * seconds)
    crew = Crew(
        count,
        Quantity(*found["training"]),
        Quantity(*found["sampling"]),
        Quantity(*found["telling"]),
        cores,
        threads,
    )
    return Measured(crew, curve_of(found["exchange"]), found["refused"])


def curve_of(pairs: Iterable[tuple[int, tuple[float, float]]]) -> Curve:
    """Build a curve from sizes with seconds and spreads, in any order."""
    sizes = {size: Quantity(*pair) for size, pair in sorted(pairs)}
    return Curve(tuple(sizes), tuple(sizes.values()))


def _run(job: dict[str, Any], count: int, threads: int, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        told, answer = Path(folder) / "job.json", Path(folder) / "found.json"
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            port, meeting = one.getsockname()[1], other.getsockname()[1]
        told.write_text(json.dumps(job | {"port": meeting}))
        here = str(Path(__file__).parents[2])
        common = os.environ | {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-m", "gibbsian.planning.among", str(told), str(answer)]
        started = [
            subprocess.Popen(
                command,
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            end = time.monotonic() + limit
            complaints = [each.communicate(timeout=max(1.0, end - time.monotonic()))[1] for each in started]
        except subprocess.TimeoutExpired:
            raise ProcessError(
                f"{count} processes did not finish measuring in {limit:.0f} s. Give the links between processes "
                "instead: --bandwidth GB/s --latency MICROSECONDS."
            ) from None
        finally:
            for each in started:
                if each.poll() is None:
                    each.kill()
                    each.wait()
        if any(each.returncode for each in started) or not answer.exists():
            last = next((text.strip().splitlines()[-1] for text in complaints if text.strip()), "no message")
            raise ProcessError(
                f"{count} processes could not be measured ({last}). Give the links between processes instead: "
                "--bandwidth GB/s --latency MICROSECONDS."
            )
        return json.loads(answer.read_text())
