"""Predictions: steps of training and of chains, and memory, from what was calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gibbsian.errors import OptionError
from gibbsian.planning.costs import (
    NOTHING,
    ONE,
    Curve,
    Device,
    Line,
    Network,
    Quantity,
    Step,
    Work,
    all_reduce,
    exposed,
    shard_exchange,
)

PARTS = ("loss", "backward", "update", "between")
"""Parts of a training step: the objective's forward pass with its chains, the backward pass with the gradient's norm,
the optimiser, and what is between steps (averages, rows, records)."""


COPIES = 2
"""Earlier states of a run that `fit` keeps in memory, to roll back to."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a process holds in training.

    Attributes
    ----------
    weights, trained
        Of all parameters, and of those that are trained, which have gradients.
    moments, average
        Of the optimiser, and of the averaged weights.
    buffer
        Of the replay buffer, of all processes together.
    row
        Of one row of data.
    activations
        What the backward pass of a lane keeps, by its rows, and the largest of them twice more for its gradient.
    program
        Of Python and torch before anything was built.
    """

    weights: float
    trained: float
    moments: float
    average: float
    buffer: float
    row: float
    activations: Line
    program: float


@dataclass(frozen=True)
class Crew:
    """What processes do to each other where they share a machine.

    Attributes
    ----------
    together
        How many were measured at once; 1 where none were.
    training, sampling
        How many times as long steps take when so many run at once.
    telling
        Seconds a step of what processes tell each other besides gradients.
    cores
        Processors of the machine, counting those that this process may use.
    threads
        That each process uses.
    """

    together: int = 1
    training: Quantity = ONE
    sampling: Quantity = ONE
    telling: Quantity = NOTHING
    cores: int = 1
    threads: int = 1

    def crowded(self, ranks: int) -> float:
        """How many times as long anything takes where there are more threads than processors."""
        return max(1.0, ranks * self.threads / self.cores)


@dataclass(frozen=True)
class Costs:
    """What was calibrated.

    Attributes
    ----------
    training
        Seconds of a step's parts by rows of a lane; empty where training was not asked for, or not timed.
    record
        Seconds of a record of the run.
    log_every
        Steps from one to the next.
    chain_step
        Seconds of a step of training chains by rows; ``None`` without chains.
    chain_steps
        How many of them a training step makes.
    sampling
        Seconds of a kernel's step by chains; ``None`` where chains were not asked for, or not timed.
    sizes
        Bytes in training.
    chains
        Bytes of chains and of what their gradient keeps, by chains.
    work, chain_work
        Counts for devices that were not measured: of a training step, and of a kernel's step.
    """

    training: Mapping[str, Curve] = field(default_factory=dict)
    record: Quantity = NOTHING
    log_every: int = 50
    chain_step: Curve | None = None
    chain_steps: int = 0
    sampling: Curve | None = None
    sizes: Sizes | None = None
    chains: Line = Line(0.0, 0.0)
    work: Work | None = None
    chain_work: Work | None = None


@dataclass(frozen=True)
class Setting:
    """Where a plan is carried out.

    Attributes
    ----------
    network
        Links between processes.
    crew
        What processes of one machine do to each other.
    local
        Whether all processes share the machine that was measured, and its processors.
    device
        A processor that was not measured, in the place of this one.
    overlap
        Whether gradients are sent while the backward pass goes on, as GPUs do.
    sharded
        Whether weights, gradients and moments are sharded (FSDP2) instead of copied (DDP).
    enough
        Whether there are processors for all, whatever this machine has.
    """

    network: Network
    crew: Crew = Crew()
    local: bool = True
    device: Device | None = None
    overlap: bool = False
    sharded: bool = False
    enough: bool = False

    def slower(self, ranks: int, measured: Quantity) -> Quantity:
        """How many times as long computing takes among so many processes as alone."""
        if not self.local or ranks == 1:
            return ONE
        return (measured if self.crew.together > 1 else ONE) * (1.0 if self.enough else self.crew.crowded(ranks))


def training_step(costs: Costs, setting: Setting, batch: int, ranks: int, lanes: int) -> Step:
    """Predict a step of training.

    Parameters
    ----------
    costs, setting
        What was calibrated, and where.
    batch
        Rows of all processes together.
    ranks
        Processes.
    lanes
        Lanes that the batch is divided among, a multiple of ``ranks``; each process computes its own one by one.
    """
    own, rows = lanes // ranks, batch / lanes
    if setting.device is not None:
        assert costs.work is not None
        # Products cost by the row, and every lane hands its operations over anew.
        seconds = setting.device.seconds(costs.work.flops_per_row * rows, costs.work.operations) * own
        return Step({"forward and backward": seconds}, _talk(costs, setting, seconds * costs.work.backward, ranks))
    slower = setting.slower(ranks, setting.crew.training)
    parts = {name: curve.at(rows) * slower for name, curve in costs.training.items()}
    for name in ("loss", "backward"):
        parts[name] = parts[name] * own
    parts["between"] = parts["between"] + costs.record * (1.0 / costs.log_every) * slower
    return Step(_named(costs, parts, rows, own, slower), _talk(costs, setting, parts["backward"], ranks))


def _named(costs: Costs, parts: Mapping[str, Quantity], rows: float, own: int, slower: Quantity) -> dict[str, Quantity]:
    """Name the parts as users know them, the chains taken out of the loss."""
    loss, chains = parts["loss"], NOTHING
    if costs.chain_step is not None:
        chains = costs.chain_step.at(rows) * (costs.chain_steps * own) * slower
        # They are a part of it, whatever noise says.
        chains = Quantity(min(chains.value, loss.value), chains.spread)
    found = {"forward": Quantity(loss.value - chains.value, loss.spread), "backward": parts["backward"]}
    if costs.chain_step is not None:
        found = {"chains": Quantity(chains.value), **found}
    return found | {"optimiser": parts["update"], "averages, rows, records": parts["between"]}


def _talk(costs: Costs, setting: Setting, backward: Quantity, ranks: int) -> dict[str, Quantity]:
    if ranks == 1:
        return {}
    assert costs.sizes is not None
    size = costs.sizes.trained
    if setting.sharded:
        return {"gather and scatter": shard_exchange(size, ranks, setting.network)}
    exchange = all_reduce(size, ranks, setting.network)
    if setting.overlap:
        exchange = exposed(exchange, size, backward)
    return {"all-reduce": exchange, "checks": setting.crew.telling if setting.local else NOTHING}


def sampling_step(costs: Costs, setting: Setting, chains: int, ranks: int, lanes: int) -> Step:
    """Predict a step of chains, which need no word from each other.

    Parameters
    ----------
    costs, setting
        What was calibrated, and where.
    chains
        Of all processes together.
    ranks
        Processes.
    lanes
        As in `training_step`.
    """
    own, share = lanes // ranks, chains / lanes
    if setting.device is not None:
        assert costs.chain_work is not None
        work = costs.chain_work
        return Step({"chains": setting.device.seconds(work.flops_per_row * share, work.operations) * own}, {})
    assert costs.sampling is not None
    return Step({"chains": costs.sampling.at(share) * own * setting.slower(ranks, setting.crew.sampling)}, {})


def training_memory(
    costs: Costs, setting: Setting, batch: int, ranks: int, lanes: int, rows: int | None
) -> dict[str, float]:
    """Predict the bytes of a process in training, by what they are for.

    Parameters
    ----------
    costs, setting, batch, ranks, lanes
        As in `training_step`.
    rows
        Of data in memory, in every process; ``None`` where they are streamed, and a process holds two batches.
    """
    sizes = costs.sizes
    assert sizes is not None
    share = ranks if setting.sharded else 1
    # What is sharded is whole for as long as it is computed with.
    whole = sizes.weights + sizes.trained if setting.sharded and ranks > 1 else 0.0
    kept = sizes.weights + sizes.moments + sizes.average
    return {
        "weights": sizes.weights / share,
        "gradients": sizes.trained / share,
        "optimiser": sizes.moments / share,
        "average": sizes.average / share,
        "gathered weights and gradients": whole,
        "copies to go back to": COPIES * (kept / share + sizes.buffer / ranks),
        "buckets of gradients": 0.0 if setting.sharded or ranks == 1 else sizes.trained,
        "replay buffer": sizes.buffer / ranks,
        "activations": sizes.activations.at(batch / lanes),
        "data": sizes.row * (2.0 * batch / ranks if rows is None else rows),
        "Python and torch": sizes.program,
    }


def sampling_memory(costs: Costs, chains: int, ranks: int, lanes: int) -> dict[str, float]:
    """Predict the bytes of a process that runs chains: lanes wait in turn, and one is computed at a time."""
    assert costs.sizes is not None
    waiting = (lanes // ranks - 1) * costs.sizes.row * 4.0 * chains / lanes
    return {
        "weights": costs.sizes.weights,
        "chains": costs.chains.at(chains / lanes) + waiting,
        "Python and torch": costs.sizes.program,
    }


@dataclass(frozen=True)
class Row:
    """One line of a scaling table.

    Attributes
    ----------
    ranks
        Processes.
    size
        Rows or chains of all processes together.
    step
        What a step takes.
    efficiency
        Rows a second and process, over those of one process.
    """

    ranks: int
    size: int
    step: Step
    efficiency: float


LADDER = (1, 2, 4, 8, 16, 64, 256, 1024)
"""Processes of the scaling tables."""


def scaling(
    costs: Costs, setting: Setting, size: int, ranks: int, what: str, strong: bool, ladder: tuple[int, ...] = LADDER
) -> list[Row]:
    """Carry a prediction on to other numbers of processes, each with one lane and processors of its own.

    Parameters
    ----------
    costs, setting
        What was calibrated, and where.
    size
        Rows, or chains, of all ``ranks`` processes together.
    ranks
        For which ``size`` is given.
    what
        ``"training"`` or ``"sampling"``.
    strong
        Whether the total stays, divided among more; else each process keeps its share.
    ladder
        Numbers of processes; those with less than one row or chain each are left out.
    """
    step_of = {"training": training_step, "sampling": sampling_step}.get(what)
    if step_of is None:
        raise OptionError(f"Scaling is of training or sampling; got {what!r}.")
    found: list[Row] = []
    share, alone, setting = size / ranks, None, replace(setting, enough=True)
    for count in ladder:
        whole = size if strong else round(share * count)
        if whole < count:
            continue
        step = step_of(costs, setting, whole, count, count)
        rate = whole / count / step.seconds.value
        alone = alone or rate
        found.append(Row(count, whole, step, rate / alone))
    return found


def crossover(costs: Costs, setting: Setting, batch: int, ranks: int, strong: bool = True) -> int | None:
    """Find the number of processes, a power of two, from which talking takes longer than computing, if there is one.

    Parameters
    ----------
    costs, setting, batch
        As in `training_step`; the batch is that of ``ranks`` processes.
    ranks
        See ``batch``.
    strong
        Whether the batch stays as it is, divided among more processes, or each keeps its share.
    """
    ladder = tuple(2**i for i in range(1, 17))
    rows = scaling(costs, setting, batch, ranks, "training", strong, ladder)
    return next((row.ranks for row in rows if row.step.bound == "communication"), None)
