"""A batch in lanes: equal shares, each with random numbers, chains and counters of its own.

The loss of a step is the mean of the lanes' losses. They are computed one after the other and their gradients add up,
which is gradient accumulation: only one lane's share of the batch is in memory at a time. As a lane depends on nothing
but its number and the run's seed, it makes no difference which process computes it.

Parameters are one for all lanes. What else an objective saves is a lane's own: replay buffers, of which each lane has
an equal part, and counts. Where an objective moves the energy by means over its batch (`Settling`), it is asked for
them lane by lane before the losses, and moves it once, by the means of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.buffers import ReplayBuffer, slots_of
from gibbsian.energies.base import Energy
from gibbsian.errors import OptionError
from gibbsian.objectives.base import Batch, Objective, Settling, WeightedSum
from gibbsian.objectives.combination import Phase, Phases
from gibbsian.objectives.parts import OfPart, part_of
from gibbsian.processes import Lanes, gathered, gathered_objects, told_by_main
from gibbsian.training.feed import Feed

M = TypeVar("M", bound=nn.Module)


@dataclass
class Lane:
    """What one lane has of its own.

    Attributes
    ----------
    number
        From 0, among those of all processes.
    objective
        Shares its parameters with those of the other lanes.
    rng
        Of everything random in it.
    pending
        Metrics of the steps since the last record.
    """

    number: int
    objective: Objective
    rng: Generator
    pending: list[dict[str, Tensor]] = field(default_factory=list)


def make_lanes(energy: nn.Module, objective: Objective, count: int, seed: int, device: torch.device) -> list[Lane]:
    """Make this process's lanes, each with its part of the objective's chains.

    Parameters
    ----------
    energy
        Shared by all lanes, and what of it the objective holds as well.
    objective
        As it was given; stays as it is.
    count
        Lanes of all processes.
    seed
        Of the run.
    device
        Of the generators.
    """
    lanes = []
    for number, rng in Lanes(count).generators(seed, device):
        own = twin(objective, {module: module for module in energy.modules()})
        for buffer in _buffers(own):
            buffer.size //= count
            for name, value in slots_of(buffer).items():
                buffer._buffers[name] = value[number * buffer.size : (number + 1) * buffer.size].clone()
        own.train(objective.training)
        for part in own.modules():
            if isinstance(part, Settling):
                part.in_lanes = True
        lanes.append(Lane(number, own, rng))
    return lanes


def twin(module: M, made: dict[nn.Module, nn.Module]) -> M:
    """Copy a module such that parameters and settings are shared, and saved buffers its own.

    Parameters
    ----------
    module
        What is copied, with the modules in it.
    made
        Copies made already; a module that is to stay shared is its own.
    """
    if module in made:
        return cast(M, made[module])
    copy = type(module).__new__(type(module))
    made[module] = copy
    own: dict[str, Any] = {k: _own(v, made) for k, v in vars(module).items()}
    fixed = own["_non_persistent_buffers_set"]
    own["_buffers"] = {k: v if v is None or k in fixed else v.clone() for k, v in module._buffers.items()}
    own["_modules"] = {k: v if v is None else twin(v, made) for k, v in module._modules.items()}
    copy.__dict__.update(own)
    return copy


def _own(value: Any, made: dict[nn.Module, nn.Module]) -> Any:
    """Copy what may be changed in place, and modules that are kept in a tuple, so as not to be registered."""
    if isinstance(value, tuple) and any(isinstance(part, nn.Module) for part in value):
        return tuple(twin(part, made) if isinstance(part, nn.Module) else part for part in value)
    return value.copy() if isinstance(value, (list, dict, set)) else value


@torch.no_grad()
def merge_lanes(lanes: list[Lane], objective: Objective) -> None:
    """Give an objective the chains of all lanes, and of the first one what else they keep; in every process.

    Parameters
    ----------
    lanes
        Of this process.
    objective
        The one that they were made from.
    """
    firsts = [dict(lane.objective.named_modules(remove_duplicate=False)) for lane in lanes]
    for path, module in objective.named_modules():
        own = [cast(nn.Module, first[path]) for first in firsts]
        if own[0] is module:
            continue
        slots = slots_of(cast(ReplayBuffer, own[0])) if isinstance(module, ReplayBuffer) else {}
        if isinstance(module, ReplayBuffer):
            for name in [name for name in module.context if f"context_{name}" not in slots]:
                del module._buffers[f"context_{name}"]
        for name, value in own[0]._buffers.items():
            if name in module._non_persistent_buffers_set:
                continue
            if name in slots:
                module._buffers[name] = gathered(torch.cat([cast(Tensor, part._buffers[name]) for part in own]))
            else:
                kept = told_by_main(None if value is None else value.cpu())
                module._buffers[name] = None if kept is None else kept.to(value.device if value is not None else "cpu")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            module.set_extra_state(told_by_main(own[0].get_extra_state()))


def own_state(lane: Lane) -> dict[str, Any]:
    """What a lane has of its own, for a checkpoint; the parameters are saved with what all share."""
    shared = {name for name, _ in lane.objective.named_parameters(remove_duplicate=False)}
    state = {name: value for name, value in lane.objective.state_dict().items() if name not in shared}
    return {"objective": state, "rng": lane.rng.get_state(), "pending": lane.pending}


def parameters_of(objective: nn.Module) -> dict[str, Tensor]:
    """What all lanes share of an objective."""
    return {name: p.detach() for name, p in objective.named_parameters(remove_duplicate=False)}


def settle(lanes: list[Lane], energy: nn.Module, batches: Mapping[int, Batch]) -> None:
    """Let objectives move the energy by the means over the batches of all lanes and processes, once.

    Parameters
    ----------
    lanes
        Of this process.
    energy
        What is fitted.
    batches
        By the lane's number.
    """
    places = [list(settling(lane.objective, energy)) for lane in lanes]
    for place, (objective, part) in enumerate(places[0]):
        told = [owned[place][0].statistics(part, batches[lane.number]) for lane, owned in zip(lanes, places)]
        if told[0]:
            objective.settle(part, [gathered(torch.stack(each)).mean(0) for each in zip(*told)])


def settling(objective: nn.Module, energy: Any) -> Iterator[tuple[Settling, Energy]]:
    """Find the objectives that move the energy at the coming call, each with the part of the energy that it moves."""
    if isinstance(objective, WeightedSum):
        for term in objective.parts:
            yield from settling(term.objective, energy)
    elif isinstance(objective, Phases):
        yield from settling(cast(Phase, objective.phases[objective.number_at(objective.calls)]).objective, energy)
    elif isinstance(objective, OfPart):
        yield from settling(objective.objective, part_of(energy, objective.part))
    elif isinstance(objective, Settling):
        yield objective, energy
        yield from settling(cast(nn.Module, getattr(objective, "objective", nn.Identity())), energy)


def check_lanes(objective: Objective, count: int, feed: Feed) -> None:
    """Refuse what cannot be done in lanes.

    Raises
    ------
    OptionError
        If lanes cannot share the batch or a replay buffer equally, a lane's part of a buffer is smaller than its batch,
        or an objective that moves the energy stands where it cannot see the whole batch.
    """
    if count == 1:
        return
    batch = Lanes(count).share(feed.batch_size, "rows of a batch")
    for buffer in _buffers(objective):
        size = Lanes(count).share(buffer.size, "chains of a replay buffer")
        if size < batch:
            raise OptionError(
                f"Of {buffer.size} chains in a replay buffer each of {count} lanes has {size}, fewer than the {batch} "
                f"rows of its batch; take buffer_size={batch * count} or more, or a smaller batch."
            )
    for inner in objective.modules():
        if isinstance(inner, Settling) and inner.moves and inner not in _reached(objective):
            raise OptionError(
                f"{type(inner).__name__} moves the energy by means over whole batches, which it cannot see from inside "
                f"of {type(objective).__name__} where batches are shared by {count} lanes; put it outside, or train in "
                "one process with lanes=1."
            )


def mean_over_lanes(own: list[dict[str, float]]) -> dict[str, float]:
    """Average numbers by name over the lanes of all processes, in the order of lanes; each over those that tell it."""
    told = [numbers for each in gathered_objects(own) for numbers in each]
    names = dict.fromkeys(name for numbers in told for name in numbers)
    found = {}
    for name in names:
        values = [numbers[name] for numbers in told if name in numbers]
        found[name] = sum(values) / len(values)
    return found


def _reached(objective: nn.Module) -> list[nn.Module]:
    """Every objective that `settling` may come to."""
    if isinstance(objective, WeightedSum):
        return [found for term in objective.parts for found in _reached(term.objective)]
    if isinstance(objective, Phases):
        return [found for phase in objective.phases for found in _reached(cast(Phase, phase).objective)]
    if isinstance(objective, (OfPart, Settling)):
        return [objective, *_reached(cast(nn.Module, getattr(objective, "objective", nn.Identity())))]
    return [objective]


def _buffers(objective: nn.Module) -> list[ReplayBuffer]:
    return [module for module in objective.modules() if isinstance(module, ReplayBuffer)]
