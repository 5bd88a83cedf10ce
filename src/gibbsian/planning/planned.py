"""A plan: what a recipe takes in so many processes, predicted from what was calibrated on the spot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gibbsian.errors import OptionError
from gibbsian.planning.calibration import Budget, around, calibrated, processors
from gibbsian.planning.costs import (
    Device,
    Link,
    Network,
    Quantity,
    Step,
    shard_exchange,
    traffic,
)
from gibbsian.planning.counts import available
from gibbsian.planning.crew import Measured, measured_crew
from gibbsian.planning.model import (
    Costs,
    Crew,
    Row,
    Setting,
    crossover,
    sampling_memory,
    sampling_step,
    scaling,
    training_memory,
    training_step,
)
from gibbsian.recipes import Recipe

NVLINK = Link.of(450.0, 5.0)
"""Between GPUs of a node: NVLink 4 of an H100, 900 GB/s both ways (NVIDIA's data sheet); the latency is assumed."""

INFINIBAND = Link.of(50.0, 10.0)
"""Between nodes: InfiniBand NDR, 400 Gb/s for each GPU (NVIDIA's DGX H100 data sheet); the latency is assumed."""


PHASED = ("gan", "tilted-flow", "vae-ebm", "latent-ebm")
"""Models whose parts are trained one after another."""


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes
    ----------
    recipe
        What is trained, or drawn from.
    ranks
        Processes, 1 or more.
    chains
        To draw with, of all processes together; ``None`` leaves sampling out.
    lanes
        Lanes that batch and chains are divided among, a multiple of ``ranks``; one each when ``None``.
    rows
        Of training data; the batch is all of them where they are fewer.
    streamed
        Whether the data are read as they are needed.
    sharded
        Whether weights are sharded (FSDP2) instead of copied (DDP).
    link
        Between the processes, as stated; measured among local ones when ``None``.
    outer, per_node
        The link between nodes, and the processes of a node; all in one node when ``outer`` is ``None``.
    device
        What computes, as stated; this machine, as measured, when ``None``.
    overlap
        Whether gradients are sent while the backward pass goes on.
    training
        Whether to plan training.

    Raises
    ------
    OptionError
        If numbers do not fit each other.
    """

    recipe: Recipe
    ranks: int = 1
    chains: int | None = None
    lanes: int | None = None
    rows: int | None = None
    streamed: bool = False
    sharded: bool = False
    link: Link | None = None
    outer: Link | None = None
    per_node: int = 8
    device: Device | None = None
    overlap: bool = False
    training: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise OptionError(f"ranks counts processes, 1 or more; got {self.ranks}.")
        lanes = self.ranks if self.lanes is None else self.lanes
        if lanes < 1 or lanes % self.ranks:
            raise OptionError(
                f"{lanes} lanes cannot be shared equally by {self.ranks} processes; take a multiple of {self.ranks}."
            )
        if self.rows is not None and self.rows < 2:
            raise OptionError(f"rows counts the rows of data, 2 or more; got {self.rows}.")
        if self.per_node < 1:
            raise OptionError(f"per_node counts the processes of a node, 1 or more; got {self.per_node}.")
        if not self.training and self.chains is None:
            raise OptionError("There is nothing to plan: ask for training, or for a number of chains.")
        for total, what, option in (
            (self.chains, "chains", "--chains"),
            (self.batch, "rows of a batch", "--batch-size"),
        ):
            if total is None or (what != "chains" and not self.training):
                continue
            if total < self.ranks:
                raise OptionError(
                    f"{self.ranks} processes cannot share {total} {what}; take {self.ranks} or more, or fewer "
                    "processes."
                )
            if total % lanes:
                near = max(1, round(total / lanes)) * lanes
                raise OptionError(
                    f"{total} {what} cannot be divided equally among {lanes} lanes; take {option} {near}, or lanes "
                    f"that divide {total}."
                )

    @property
    def batch(self) -> int:
        """Rows of a step, of all processes together."""
        size = self.recipe.training.batch_size
        return size if self.rows is None else min(size, self.rows)

    @property
    def shares(self) -> int:
        """Lanes."""
        return self.ranks if self.lanes is None else self.lanes


@dataclass(frozen=True)
class Plan:
    """What was predicted.

    Attributes
    ----------
    question
        What was asked.
    costs, setting
        What was calibrated, and where it applies.
    training, sampling
        A step of each, where asked for.
    training_memory, sampling_memory
        Bytes of a process, by what they are for.
    assumptions
        What the numbers rest on, one sentence each.
    available
        Bytes of this machine's memory that are free, where the system tells.
    """

    question: Question
    costs: Costs
    setting: Setting
    training: Step | None
    sampling: Step | None
    training_memory: Mapping[str, float]
    sampling_memory: Mapping[str, float]
    assumptions: tuple[str, ...] = ()
    available: float | None = None
    refused: str = field(default="")

    @property
    def bound(self) -> str:
        """What limits the run: ``memory`` where it does not fit, else ``compute`` or ``communication``."""
        q = self.question
        most = max(sum(self.training_memory.values()), sum(self.sampling_memory.values()))
        here = q.ranks if self.setting.local else 1
        assert self.costs.sizes is not None
        if q.device is None and self.available is not None and most * here > self.available + self.costs.sizes.program:
            return "memory"
        step = self.training or self.sampling
        return "compute" if step is None else step.bound

    @property
    def hours(self) -> Quantity | None:
        """Hours of the recipe's training steps."""
        if self.training is None:
            return None
        return self.training.seconds * (self.question.recipe.training.steps / 3600.0)

    @property
    def sent(self) -> float:
        """Bytes that each process sends in a training step."""
        assert self.costs.sizes is not None
        return traffic(self.costs.sizes.trained, self.question.ranks)

    @property
    def sharded_exchange(self) -> Quantity:
        """Seconds that full sharding talks in a step."""
        assert self.costs.sizes is not None
        return shard_exchange(self.costs.sizes.trained, self.question.ranks, self.setting.network)

    @property
    def crossover(self) -> int | None:
        """Processes from which talking takes longer than computing, the batch being what it is."""
        q = self.question
        return crossover(self.costs, self.setting, q.batch, q.ranks) if self.training is not None else None

    def scaling(self, what: str, strong: bool) -> list[Row]:
        """Carry it on to other numbers of processes; see `gibbsian.planning.model.scaling`."""
        q = self.question
        size = q.batch if what == "training" else q.chains
        assert size is not None
        return scaling(self.costs, self.setting, size, q.ranks, what, strong)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON: seconds and bytes, each prediction with its spread."""
        q = self.question
        found: dict[str, Any] = {
            "recipe": q.recipe.to_dict(),
            "ranks": q.ranks,
            "lanes": q.shares,
            "bound": self.bound,
            "assumptions": list(self.assumptions),
            "refused": self.refused,
        }
        for name, step, size, memory in (
            ("training", self.training, q.batch, self.training_memory),
            ("sampling", self.sampling, q.chains, self.sampling_memory),
        ):
            if step is None:
                continue
            found[name] = {
                "size": size,
                "seconds": dataclasses.asdict(step.seconds),
                "compute": {k: dataclasses.asdict(v) for k, v in step.compute.items()},
                "communication": {k: dataclasses.asdict(v) for k, v in step.talk.items()},
                "bound": step.bound,
                "memory": dict(memory),
                "strong": [_line(row) for row in self.scaling(name, True)],
                "weak": [_line(row) for row in self.scaling(name, False)],
            }
        if self.training is not None:
            found["training"] |= {
                "steps": q.recipe.training.steps,
                "sent": self.sent,
                "sharded_exchange": dataclasses.asdict(self.sharded_exchange),
                "crossover": self.crossover,
            }
        return found


def _line(row: Row) -> dict[str, Any]:
    return {
        "ranks": row.ranks,
        "size": row.size,
        "seconds": dataclasses.asdict(row.step.seconds),
        "communication": row.step.talking.value,
        "efficiency": row.efficiency,
    }


def plan(question: Question, seconds: float = 12.0, data: Tensor | None = None, program: float | None = None) -> Plan:
    """Calibrate the cost model on this machine, and predict.

    Parameters
    ----------
    question
        What to plan.
    seconds
        For measuring, the start of processes aside.
    data
        Training rows in model units; made up when left out.
    program
        Bytes of memory of the process before; see `calibrated`.

    Raises
    ------
    OptionError
        If there is no time, or the model has no chains.
    """
    if not (seconds > 0.0 and math.isfinite(seconds)):
        raise OptionError(f"seconds is the time for measuring, a positive number; got {seconds}.")
    parts = question.training + (question.chains is not None)
    among = question.ranks > 1 and question.link is None and question.device is None
    each = seconds / (parts + among)
    batch = question.batch / question.shares if question.training else None
    chains = None if question.chains is None else question.chains / question.shares
    budget = None if question.device is not None else Budget(each, each)
    costs = calibrated(question.recipe, batch, chains, budget, data, program)
    setting, told, refused = _setting(question, costs, each)
    q = question
    shared = (q.ranks, q.shares)
    return Plan(
        q,
        costs,
        setting,
        training_step(costs, setting, q.batch, *shared) if q.training else None,
        sampling_step(costs, setting, q.chains, *shared) if q.chains is not None else None,
        training_memory(costs, setting, q.batch, *shared, None if q.streamed else (q.rows or q.batch))
        if q.training
        else {},
        sampling_memory(costs, q.chains, *shared) if q.chains is not None else {},
        tuple(told),
        available(),
        refused,
    )


def _setting(q: Question, costs: Costs, seconds: float) -> tuple[Setting, list[str], str]:
    """Find out, or take as stated, how processes are linked and what they do to each other."""
    told: list[str] = []
    threads, cores = torch.get_num_threads(), processors()
    crew, link, refused = Crew(1, cores=cores, threads=threads), q.link, ""
    local = q.link is None and q.outer is None and q.device is None
    if q.ranks > 1 and link is None and local:
        count = min(q.ranks, max(2, cores // threads))
        measured = _among(q, costs, count, threads, cores, seconds)
        assert costs.sizes is not None
        link, crew, refused = measured.link(costs.sizes.trained), measured.crew, measured.refused
        told.append(
            f"Links and slowing down were measured among {count} processes of {threads} thread(s) on this machine's "
            f"{cores} processor(s), all busy at once."
        )
        if q.ranks > count:
            told.append(f"{q.ranks} processes share these processors: steps take longer in proportion.")
    if link is None:
        link = NVLINK if q.device is not None else Link.of(5.0, 20.0)
        told.append(
            "No link was stated or measured; links of "
            f"{1e-9 / link.per_byte.value:.0f} GB/s and {1e6 * link.latency.value:.0f} us are assumed."
        )
    elif q.link is not None:
        told.append(
            f"Processes are linked as stated, by {1e-9 / link.per_byte.value:.3g} GB/s one way and "
            f"{1e6 * link.latency.value:.3g} us a message, and do not slow each other down otherwise."
        )
    if q.outer is not None:
        told.append(
            f"Nodes have {q.per_node} processes each, with a link to other nodes of "
            f"{1e-9 / q.outer.per_byte.value:.3g} GB/s and {1e6 * q.outer.latency.value:.3g} us for every process."
        )
    if q.device is None:
        told.append("Every process computes as fast as one did here; other sizes lie on lines through those measured.")
    else:
        told.append(
            f"Every process sustains {q.device.flops / 1e12:.3g} TFLOP/s in products and convolutions, counted, and "
            f"needs {1e6 * q.device.launch:.3g} us for each call of a kernel, counted; the longer of the two counts."
        )
    told.append(
        "Gradients are sent while the backward pass goes on, all but the last 25 MiB."
        if q.overlap
        else "Gradients are sent after the backward pass."
    )
    if q.device is None and q.training and q.recipe.energy in PHASED:
        told.append("A step of the first phase of training was timed; later phases may take another time.")
    told.append("In the tables every process has one lane, and processors of its own however many there are.")
    network = Network(link, q.outer, q.per_node)
    return Setting(network, crew, local, q.device, q.overlap, q.sharded), told, refused


def _among(q: Question, costs: Costs, count: int, threads: int, cores: int, seconds: float) -> Measured:
    """Measure among local processes, at a size that was affordable alone and is not the one planned."""
    batch = around(q.batch / q.shares, 2) if q.training else []
    chains = around(q.chains / q.shares) if q.chains is not None else []
    assert costs.sizes is not None
    tried = [size for size in batch if size <= max(costs.training["loss"].sizes)] if batch else []
    walked = [size for size in chains if costs.sampling is not None and size <= max(costs.sampling.sizes)]
    return measured_crew(
        q.recipe,
        count,
        threads,
        cores,
        costs.sizes.trained,
        _below(tried, q.batch / q.shares),
        _below(walked, (q.chains or 0) / q.shares),
        seconds,
    )


def _below(sizes: list[int], planned: float) -> int | None:
    """The largest size that is not above the planned one, or the smallest."""
    return max((size for size in sizes if size <= planned), default=min(sizes, default=None))
