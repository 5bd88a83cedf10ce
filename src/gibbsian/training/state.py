"""What changes while training, and copies of it.

A captured state holds everything that the next step depends on: weights, their average, the optimiser, the objective's
own state (its replay buffer), the generator, the position in the data, the health monitor. So a run that goes on from
one gives the same numbers, to the bit, as one that never stopped. In a run of several lanes, what a lane has of its own
is under ``lanes`` and the lane's number, and a process captures its own lanes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.layers import dropout_layers
from gibbsian.energies.score import Score
from gibbsian.errors import ModelFileError
from gibbsian.objectives.base import Batch, Objective, context_of
from gibbsian.processes import lane_seed
from gibbsian.training.checks import REFERENCE, trained_parameters
from gibbsian.training.engine import Engine
from gibbsian.training.feed import Feed, MemoryFeed
from gibbsian.training.health import DataScale, Health
from gibbsian.training.lanes import Lane, make_lanes, merge_lanes, own_state, parameters_of
from gibbsian.training.settings import TrainingSettings
from gibbsian.training.votes import Votes

FORMAT = 1

PROBE = 256
"""Rows of data at which the energy's spread is looked at."""

State = dict[str, Any]

_COUNTS = ("order_seed", "rollbacks", "last_target", "records", "seconds")


class TrainingState:
    """The modules, their averages, the optimiser, and where the run stands.

    Parameters
    ----------
    energy, objective
        Their parameters are trained, together.
    feed
        Of the data, on the parameters' device; a batch is data in memory.
    settings
        Of the run.
    rng
        The caller's generator; one number is drawn from it, for the order of the data, and in a run of several lanes
        another, for theirs.

    Attributes
    ----------
    lanes
        Of this process. A single one has the objective and the generator that were given.
    """

    def __init__(
        self,
        energy: Energy | Score,
        objective: Objective,
        feed: Feed | Batch,
        settings: TrainingSettings,
        rng: Generator,
    ) -> None:
        self.energy, self.objective, self.settings, self.rng = energy, objective, settings, rng
        self.feed = MemoryFeed(feed, settings.batch_size) if isinstance(feed, Batch) else feed
        self.device = self.feed.device
        self.order_seed = int(torch.randint(2**31, (), generator=rng, device=rng.device))
        self.lanes = [Lane(0, objective, rng)]
        if settings.lanes > 1:
            seed = int(torch.randint(2**31, (), generator=rng, device=rng.device))
            self.lanes = make_lanes(energy, objective, settings.lanes, seed, rng.device)
        named = trained_parameters(energy, objective)
        factors = rate_factors(named, objective)
        self.engine = Engine(energy, self.lanes, settings)
        self.originals = list[Tensor](named.values())
        self.names, self.params = list(named), [self.engine.local(p) for p in self.originals]
        self.average = [p.detach().clone() for p in self.params]
        self.optimizer = optimizer_of(self.params, settings, factors)
        self.votes, self.asked = Votes(), 0
        self.health = Health(settings, DataScale.of(self.feed.sample()))
        self.probe, self.reference = self.feed.spread(PROBE), self.feed.spread(REFERENCE)
        self.drops = bool(dropout_layers(energy))
        self.step = 0
        self.pending: list[dict[str, Tensor | float]] = []
        self.broken = torch.zeros((), dtype=torch.bool, device=self.device)
        # What follows, and order_seed, belong to the run and not to the model: a rollback does not take them back.
        self.rollbacks = 0
        self.last_target = -1
        self.records = 0
        self.seconds = 0.0
        self.lap = (0, 0.0)

    @property
    def batch_seed(self) -> int:
        """Seed of the order of the data, another one after every rollback."""
        return self.order_seed + 1_000_003 * self.rollbacks

    @property
    def seconds(self) -> float:
        """Time spent on the run, earlier sessions included."""
        return time.perf_counter() - self._began

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._began = time.perf_counter() - seconds

    def batches(self) -> list[Batch]:
        """Rows of this process's lanes for the step to come."""
        return [self.feed.batch(self.step, self.batch_seed, lane.number) for lane in self.lanes]

    @contextmanager
    def seeded(self, lane: int = 0) -> Iterator[None]:
        """Seed the global generator, which dropout draws from, by run, step and lane; outside it stays as it was."""
        if not self.drops:
            yield
            return
        seed = (self.batch_seed * 2_000_003 + self.step) % 2**63
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed if self.settings.lanes == 1 else lane_seed(seed, lane))
            yield

    def energy_spread(self) -> float | None:
        """Standard deviation of the energies of some data; ``None`` for a score, or where the data lack what is asked.

        Modules are in evaluation mode meanwhile: looking at an energy changes nothing in it.
        """
        if isinstance(self.energy, Score) or any(name not in self.probe.context for name in self.energy.context):
            return None
        training = [module for module in self.energy.modules() if module.training]
        self.energy.eval()
        try:
            values = self.energy(self.probe.x, **context_of(self.energy, self.probe))
        finally:
            for module in training:
                module.training = True
        return float(values.detach().std())

    def capture(self) -> State:
        """Copy everything that the next step depends on to host memory."""
        state = {
            "format": FORMAT,
            "step": self.step,
            "energy": self.energy.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": dict(zip(self.names, self.average)),
            "health": self.health.state_dict(),
            "pending": self.pending,
            "rng": self.rng.get_state(),
        }
        if self.settings.lanes > 1:
            state["objective"] = parameters_of(self.lanes[0].objective)
            state["lanes"] = {lane.number: own_state(lane) for lane in self.lanes}
        if self.engine.sharded:
            # With the whole's shape and their place in it, shards are written by each process and read by any number.
            placed = [self.engine.placed(p, mean) for p, mean in zip(self.originals, self.average)]
            state["average"] = dict(zip(self.names, placed))
            state["optimizer"] = self._for_each(self.optimizer.state_dict(), self.engine.placed)
        return copied(state | {name: getattr(self, name) for name in _COUNTS})

    @torch.no_grad()
    def restore_model(self, state: State) -> None:
        """Go back to a captured state, with new noise: the generator, the seeds and the counts go on."""
        if self.engine.sharded:
            state = self._from_shards(state)
        restore_module(self.energy, state["energy"])
        for lane in self.lanes:
            own = state["lanes"][lane.number] if self.settings.lanes > 1 else {"objective": {}, "pending": []}
            restore_module(lane.objective, {**state["objective"], **own["objective"]})
            lane.pending = copied(own["pending"], self.device)
        # The optimiser keeps the tensors that it is given, and would then change the captured ones in place.
        self.optimizer.load_state_dict(copied(state["optimizer"], self.device))
        for name, average in zip(self.names, self.average):
            average.copy_(state["average"][name])
        self.health.load_state_dict(state["health"])
        self.pending = copied(state["pending"], self.device)
        self.broken.zero_()
        self.step = state["step"]
        self.lap = (self.step, self.seconds)

    def restore(self, state: State) -> None:
        """Take up a captured state as if the run had never stopped."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.rng.set_state(state["rng"])
        if self.settings.lanes > 1:
            for lane in self.lanes:
                lane.rng.set_state(state["lanes"][lane.number]["rng"])
        self.restore_model(state)

    def _from_shards(self, state: State) -> State:
        """Take this process's shards out of a captured state; the weights go to their places at once."""
        saved = {f"energy.{name}": value for name, value in state["energy"].items()}
        saved |= {f"objective.{name}": value for name, value in state["objective"].items()}
        for name, original, p in zip(self.names, self.originals, self.params):
            p.copy_(self.engine.own(original, saved[name]))
        means = [self.engine.own(p, state["average"][name]) for name, p in zip(self.names, self.originals)]
        return {
            **state,
            "energy": state["energy"] | dict(self.energy.named_parameters()),
            "objective": parameters_of(self.lanes[0].objective),
            "average": dict(zip(self.names, means)),
            "optimizer": self._for_each(state["optimizer"], self.engine.own),
        }

    def _for_each(self, optimizer: State, fn: Callable[[Tensor, Tensor], Tensor]) -> State:
        """Pass what an optimiser keeps of each parameter through a function of the parameter and the tensor."""
        originals = {id(p): original for p, original in zip(self.params, self.originals)}
        order = [originals[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        kept = {i: {k: fn(order[i], v) for k, v in each.items()} for i, each in optimizer["state"].items()}
        return {**optimizer, "state": kept}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Let averages follow where an objective moves a Boltzmann machine's offsets, as its weights do.

        They always stand at the present offsets; a mean of biases that belong to different ones would mean nothing.
        """
        machines = [part for part in self.energy.modules() if isinstance(part, RBM)]
        before = [(m.visible_offset.clone(), m.hidden_offset.clone(), version_of(m)) for m in machines]
        try:
            yield
        finally:
            average = dict(zip(self.params, self.average))
            for machine, (visible, hidden, version) in zip(machines, before):
                if version_of(machine) != version:
                    own = (machine.weight, machine.visible_bias, machine.hidden_bias)
                    # What is not trained has no average, and has moved with the machine.
                    weight, b, c = (average[p] if p in average else p.detach().clone() for p in own)
                    machine.carry(weight, b, c, (visible, hidden))

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the modules, and the chains of all lanes into the objective."""
        torch._foreach_copy_(self.params, self.average)
        self.engine.join()
        if self.settings.lanes > 1:
            merge_lanes(self.lanes, self.objective)


def optimizer_of(
    params: list[Tensor], settings: TrainingSettings, factors: list[float] | None = None
) -> torch.optim.Optimizer:
    """Build the optimiser that is named, fused: it takes the clip factor and what to leave out as tensors.

    Parameters
    ----------
    params
        What is trained.
    settings
        Of the run.
    factors
        What the learning rate of each is multiplied by; those with one factor make a group, which knows it.
    """
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True}
    factors = [1.0] * len(params) if factors is None else factors
    groups: list[dict[str, Any]] = [
        {"params": [p for p, own in zip(params, factors) if own == factor], "factor": factor}
        for factor in dict.fromkeys(factors)
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, **common)
    return torch.optim.AdamW(groups, betas=settings.betas, **common)


def rate_factors(named: Mapping[str, Tensor], objective: nn.Module) -> list[float]:
    """Say what the learning rate of each parameter is multiplied by: what the innermost objective that holds it says.

    A generator may be part of the module that is fitted, too, to be saved with it.
    """
    factors: dict[int, float] = {}
    for module in objective.modules():
        if isinstance(module, Objective):
            factors |= {id(p): module.learning_rate_factor for p in module.parameters()}
    return [factors.get(id(p), 1.0) for p in named.values()]


def version_of(machine: RBM) -> tuple[int, int]:
    """How often the offsets were written to: whether they moved is known without waiting for the device."""
    return machine.visible_offset._version, machine.hidden_offset._version


def restore_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state into a module, buffers that were made or resized in use included.

    Tensors are copied in place where the shapes agree, so that optimisers and memory formats stay as they are.

    Raises
    ------
    ModelFileError
        If the state belongs to another module.
    """
    current = module.state_dict()
    device = next((t.device for t in current.values() if isinstance(t, Tensor)), torch.device("cpu"))
    for key in state.keys() | current.keys():
        path, _, name = key.rpartition(".")
        try:
            buffers = module.get_submodule(path)._buffers
        except AttributeError:
            continue
        # An empty buffer (None) has no entry in a state, neither when it was captured nor now.
        if name in buffers and key not in state:
            buffers[name] = None
        elif name in buffers and (key not in current or current[key].shape != state[key].shape):
            buffers[name] = state[key].to(current[key].device if key in current else device, copy=True)
    try:
        module.load_state_dict(copied(dict(state)))
    except RuntimeError as error:
        raise ModelFileError(f"The saved state is of another {type(module).__name__}: {error}") from error


def copied(tree: Any, device: torch.device | str = "cpu") -> Any:
    """Copy a tree of dicts, lists and tensors; the tensors to a device."""
    if isinstance(tree, Tensor):
        return tree.detach().to(device, copy=True)
    if isinstance(tree, Mapping):
        return {k: copied(v, device) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(v, device) for v in tree)
    return tree
