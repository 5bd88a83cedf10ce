"""One step of training: the losses of all lanes, their gradient, and what moves the weights and their average."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gibbsian.errors import DomainError, OptionError
from gibbsian.objectives.base import Batch
from gibbsian.processes import alike, world
from gibbsian.training.checks import dtypes_of
from gibbsian.training.lanes import settle
from gibbsian.training.state import TrainingState
from gibbsian.training.votes import from_main


def take_step(state: TrainingState, *batches: Batch) -> None:
    """Move the weights by one step; a gradient that is not finite moves nothing (unless health is off).

    Parameters
    ----------
    state
        Of the run.
    batches
        Rows of each of this process's lanes.
    """
    settings, optimizer, engine = state.settings, state.optimizer, state.engine
    with state.followed():
        value = losses(state, batches)
    if value is None:
        # What fitted when the run began fits no longer: chains stand where the energy has no finite value.
        state.broken |= True
        state.pending.append({"loss": math.nan, "grad_norm": math.nan})
        state.step += 1
        return
    engine.collect(state.originals, state.params)
    norm = engine.norm(state.params)
    broken = ~(torch.isfinite(value) & torch.isfinite(norm))
    # The fused optimiser divides gradients by the first and does nothing where the second is 1, all on the device.
    if settings.clip_norm > 0:
        optimizer.grad_scale = (norm / settings.clip_norm).clamp(min=1.0).to(torch.float32)  # type: ignore[attr-defined]
    held = broken if settings.health else torch.zeros_like(broken)
    optimizer.found_inf = held.to(torch.float32)  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate_at(state.step, state.rollbacks) * group.get("factor", 1.0)
    optimizer.step()
    # It changes the weights behind autograd's back; energies that keep what they derive from them look at the version.
    torch.autograd.graph.increment_version(state.params)
    decay = min(settings.ema_decay, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(state.average, state.params, 1.0 - decay)
    state.broken |= broken
    state.pending[-1] |= {"loss": value, "grad_norm": norm}
    state.step += 1


def losses(state: TrainingState, batches: tuple[Batch, ...]) -> Tensor | None:
    """Compute the mean loss of all lanes and its gradient; ``None`` if chains have left the domain in one.

    Metrics of the lanes are kept for the record.
    """
    engine, lanes = state.engine, state.lanes
    values: list[Tensor] = []
    value, metrics = torch.empty(0), dict[str, Tensor]()
    error: Exception | None = None
    for p in state.params:
        p.grad = None
    try:
        if state.settings.lanes > 1:
            settle(lanes, state.energy, {lane.number: batch for lane, batch in zip(lanes, batches)})
    except Exception as raised:
        error = raised
    kept = Kept(state.energy) if state.settings.lanes > 1 else None
    for place, (lane, batch) in enumerate(zip(lanes, batches) if error is None else ()):
        last, own = place == len(lanes) - 1, None
        try:
            seeded = state.seeded() if kept is None else state.seeded(lane.number)
            with seeded, engine.accumulating(last):
                value, metrics = engine.loss(place, batch, lane.rng)
                if not (last or engine.sharded):
                    (value / len(lanes)).backward()
        except Exception as raised:
            own = raised
        if engine.sharded and not last:
            # Every loss gathers the weights, and every gradient divides them: all processes do both, or none does.
            if state.votes.exchange(state.asked, explained(state, own, batch), state.step == 0).broken:
                own = own or DomainError("The chains of another process stand where the energy has no finite value.")
                engine.forget()
            else:
                (value / len(lanes)).backward()
        error = error or own
        # After a DomainError other lanes go on, in every process: their random numbers must not depend on who failed.
        if own is not None:
            if not isinstance(own, DomainError):
                break
            if kept is not None:
                kept.back()
            continue
        if kept is not None and not last:
            kept.back(place == 0)
        values.append(value.detach())
        told = {name: metric.detach() for name, metric in metrics.items()}
        if kept is None:
            state.pending.append({"loss": value.detach(), **told})
        else:
            lane.pending.append(told)
    votes = state.votes.exchange(state.asked, explained(state, error, batches[0]), state.step == 0)
    state.asked = votes.asked
    if votes.broken:
        if kept is not None:
            kept.back()
        del value
        engine.forget()
        return None
    # Of all lanes but the last the gradients are there already.
    (value if len(lanes) == 1 else value / len(lanes)).backward()
    if kept is None:
        return value.detach()
    kept.back(len(lanes) == 1)
    kept.finish()
    state.pending.append({})
    # In the order of lanes, so that every process has the same.
    return alike(torch.stack(values)).mean()


class Kept:
    """Lets every lane begin with the energy's buffers as they were, and keeps what the first one made of them.

    Spectral norms carry on a power iteration at every call in training: lanes must not do so one after the other.
    """

    def __init__(self, energy: nn.Module) -> None:
        self.buffers = list(energy.buffers())
        # Numbers of the host beside them: of which weights they were made, how often.
        self.counts = {m: _numbers(m) for m in energy.modules() if m._buffers}
        self.before = [b.clone() for b in self.buffers]
        self.versions = [b._version for b in self.buffers]
        self.first: dict[int, Tensor] = {}
        self.first_counts: dict[nn.Module, dict[str, Any]] = {}

    @torch.no_grad()
    def back(self, first: bool = False) -> None:
        """Put them back, after a lane's loss and gradient."""
        for i, b in enumerate(self.buffers):
            if b._version != self.versions[i]:
                if first:
                    self.first[i] = b.clone()
                b.copy_(self.before[i])
                self.versions[i] = b._version
        for module, numbers in self.counts.items():
            if first:
                self.first_counts[module] = _numbers(module)
            module.__dict__.update(numbers)

    @torch.no_grad()
    def finish(self) -> None:
        """Take what the first lane of all processes made of them."""
        for i, value in self.first.items():
            self.buffers[i].copy_(value)
            if world().size > 1:
                from_main(self.buffers[i])
        for module, numbers in self.first_counts.items():
            module.__dict__.update(numbers)


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float))}


def explained(state: TrainingState, error: Exception | None, batch: Batch) -> Exception | None:
    """Say of an error of torch's at the first step what it usually comes from."""
    told = str(error)
    if not isinstance(error, RuntimeError) or state.step or not any(w in told for w in ("dtype", "same device")):
        return error
    better = OptionError(
        f"Energy, objective and data do not fit together: {dtypes_of(state.energy, state.objective, batch)} on "
        f"{batch.x.device} ({error}). Bring them to one with .to(device, dtype), or .float() and .double()."
    )
    better.__cause__ = error
    return better
