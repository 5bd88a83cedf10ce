"""A round of contrastive training in one graph: chains start, move, and are contrasted with the data.

Of a small energy the calls of three compiled functions, and the checks between them, take as long as the arithmetic.
What is checked by looking at values is looked at afterwards.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.compilation import compiled, owner_of, wanting
from gibbsian.energies.base import Energy
from gibbsian.energies.layers import dropout_layers
from gibbsian.kernels.base import Kernel, State, is_finite, map_state
from gibbsian.kernels.groups import LARGE
from gibbsian.objectives.contrast import chain_metrics, contrast
from gibbsian.sampling import (
    by_step,
    check_sound,
    checked_start,
    detail_names,
    run_block,
    steps_per_block,
    with_tensor_settings,
)
from gibbsian.typing import Context


@dataclass(frozen=True)
class Shapes:
    """What a round is compiled for: energy, kernel and chains, with a state of theirs that holds no numbers."""

    owner: weakref.ref[Any]
    kernel: Kernel
    state: State

    @staticmethod
    def of(energy: Energy, kernel: Kernel, start: Tensor, rng: Generator) -> Shapes:
        """Check that all fits together, as `gibbsian.sample` does, and keep the shapes."""
        state = checked_start(energy, kernel, start, rng)
        return Shapes(
            weakref.ref(owner_of(energy)), kernel, map_state(lambda t: t.new_empty(()).expand(t.shape), state)
        )

    def serve(self, energy: Energy, kernel: Kernel, start: Tensor) -> bool:
        """Whether these are still the ones."""
        mine, x = (self.state.x.shape, self.state.x.dtype, self.state.x.device), start
        return owner_of(energy) is self.owner() and kernel is self.kernel and mine == (x.shape, x.dtype, x.device)


def is_one_graph(energy: Energy, kernel: Kernel, start: Tensor, steps: int) -> bool:
    """Whether a round is short enough: vectors, all in one block of steps, and no dropout between chains and loss."""
    small = start.ndim == 2 and start.numel() * start.element_size() <= LARGE
    fixed = not getattr(kernel, "dynamic", False) and steps <= steps_per_block(kernel, start)
    return small and fixed and not any(layer.training for layer in dropout_layers(energy))


def run_round(
    energy: Energy,
    conditional: Energy,
    shapes: Shapes,
    start: Tensor,
    data: Tensor,
    data_context: Context,
    samples_context: Context,
    steps: int,
    penalty: float,
    rng: Generator,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Run the round; return the loss, the metrics, and where the chains stopped.

    Parameters
    ----------
    energy, conditional
        The one being fitted, and the same under the chains' labels.
    shapes
        Of these chains.
    start, data, data_context, samples_context, steps, penalty, rng
        As for chains and `contrast`.

    Raises
    ------
    DomainError
        If a chain starts where the energy or its gradient is not finite.
    """
    kernel = with_tensor_settings(shapes.kernel, start)
    with torch.no_grad(), wanting(True):
        noise = by_step(kernel.noise(shapes.state, steps, rng))
    run = compiled(round_of, owner_of(energy))
    value, metrics, samples, sound = run(
        energy, conditional, kernel, start, noise, data, data_context, samples_context, penalty
    )
    check_sound(sound)
    return value, metrics, samples


def round_of(
    energy: Energy,
    conditional: Energy,
    kernel: Kernel,
    start: Tensor,
    noise: list[tuple[Tensor, ...]],
    data: Tensor,
    data_context: Context,
    samples_context: Context,
    penalty: float,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Start, steps and loss; a pure function, compiled or not. Also tells which chains start at numbers."""
    with torch.no_grad():
        state = kernel.init(conditional, start)
        sound = is_finite(state.energy, state.grad)
        totals = torch.zeros((2 + len(detail_names(kernel)), len(start)), dtype=start.dtype, device=start.device)
        state, totals, _ = run_block(conditional, kernel, state, noise, totals, False)
    value, metrics = contrast(energy, data, state.x, data_context, samples_context, penalty)
    metrics = metrics | chain_metrics(start, state.x, totals[0] / len(noise), totals[1])
    return value, metrics, state.x, sound
