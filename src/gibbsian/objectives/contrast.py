"""The contrast between data and samples, and what is told of the chains that made these."""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.typing import Context


def contrast(
    energy: Energy, data: Tensor, samples: Tensor, data_context: Context, samples_context: Context, penalty: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean energy of data minus mean energy of samples, plus the penalty on squared energies.

    Parameters
    ----------
    energy
        The one being fitted.
    data, samples
        ``(n, *event)`` and ``(m, *event)``; no gradient flows into the samples.
    data_context, samples_context
        What each row is conditioned on, with the same names.
    penalty
        Weight of the mean squared energies.

    Returns
    -------
    tuple
        The loss, 0-d, and the metrics ``energy_data``, ``energy_samples`` and ``gap``.
    """
    # One pass over both halves is faster than two, and the rows of an energy do not see each other.
    context = {name: torch.cat((value, samples_context[name])) for name, value in data_context.items()}
    both = energy(torch.cat((data, samples.detach())), **context)
    positive, negative = both.split((data.shape[0], samples.shape[0]))
    gap = positive.mean() - negative.mean()
    value = gap + penalty * (positive.square().mean() + negative.square().mean()) if penalty else gap
    means = {"energy_data": positive.mean(), "energy_samples": negative.mean(), "gap": gap}
    return value, {name: mean.detach() for name, mean in means.items()}


def chain_metrics(start: Tensor, samples: Tensor, acceptance: Tensor, nonfinite: Tensor) -> dict[str, Tensor]:
    """Metrics of a round of chains: ``acceptance``, ``nonfinite`` and ``moved``, from ``start`` to ``samples``."""
    return {
        "acceptance": acceptance.mean(),
        "nonfinite": nonfinite.sum(),
        "moved": (samples - start).square().mean().sqrt(),
    }
