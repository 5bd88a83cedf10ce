"""One step of training: the loss, its gradient, and what moves the weights and their average."""

from __future__ import annotations

import math

import torch

from gibbsian.errors import DomainError, OptionError
from gibbsian.objectives.base import Batch
from gibbsian.training.checks import checked_loss, dtypes_of
from gibbsian.training.state import TrainingState


def take_step(state: TrainingState, batch: Batch) -> None:
    """Move the weights by one step; a gradient that is not finite moves nothing (unless health is off)."""
    settings, optimizer = state.settings, state.optimizer
    try:
        with state.seeded(), state.followed():
            loss = checked_loss(state.objective(state.energy, batch, state.rng))
    except RuntimeError as error:
        if state.step == 0 and any(word in str(error) for word in ("dtype", "same device")):
            raise OptionError(
                f"Energy, objective and data do not fit together: {dtypes_of(state.energy, state.objective, batch)} on "
                f"{batch.x.device} ({error}). Bring them to one with .to(device, dtype), or .float() and .double()."
            ) from error
        raise
    except DomainError:
        if state.step == 0:
            raise
        # What fitted when the run began fits no longer: chains stand where the energy has no finite value.
        state.broken |= True
        state.pending.append({"loss": math.nan, "grad_norm": math.nan})
        state.step += 1
        return
    for p in state.params:
        p.grad = None
    loss.value.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.params if p.grad is not None])
    value = loss.value.detach()
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
    metrics = {name: value.detach() for name, value in loss.metrics.items()}
    state.pending.append({"loss": value, **metrics, "grad_norm": norm})
    state.step += 1
