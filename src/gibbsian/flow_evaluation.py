"""The probability flow's likelihood of held-out rows under a trained model with noise levels.

Two numbers, each of a bounded number of rows:

* the log-density of rows with the noise of ``sigma_density``, beside the energy's own, minus log Z: where the two
  differ by more than their errors, the levels of the energy are not each other's under the flow, or log Z is off;
* for pictures of whole numbers, bits per dimension: the density at ``sigma_min`` of rows with uniform noise of one step
  added, which bounds the bits of the whole numbers from above, as in the literature on likelihoods of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.bridges.flow_likelihood import FlowLikelihood, bits_per_dim, flow_log_prob
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.models import Model

EXACT = 16
"""Numbers in a row up to which the divergence is exact; beyond it is estimated by random probes."""

ROWS, MANY_ROWS = 100, 400
"""Rows that are followed: where there are probes, and where not."""

PROBES, STEPS = 4, 32


@dataclass(frozen=True)
class FlowSummary:
    """What the flow says of held-out rows; estimates are means over rows with their standard errors.

    Attributes
    ----------
    rows
        How many were followed.
    log_prob
        Nats per row in data units, of rows with the noise of ``sigma``.
    sigma
        The model's ``sigma_density``.
    bits
        Bits per dimension of whole numbers, ``None`` where the rows are none.
    bits_log_prob
        The same in nats per image.
    change
        How much the means moved, at most, when the steps were doubled; nats.
    """

    rows: int
    log_prob: Estimate
    sigma: float
    bits: Estimate | None = None
    bits_log_prob: Estimate | None = None
    change: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {**self.__dict__}

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> FlowSummary:
        """Rebuild what `to_dict` gave."""
        names = ("log_prob", "bits", "bits_log_prob")
        estimates: dict[str, Any] = {k: None if saved[k] is None else Estimate(*saved[k]) for k in names}
        return FlowSummary(**{**saved, **estimates})

    def told(self) -> str:
        """Print it in a line."""
        line = f"{self.log_prob} nats, of {self.rows} held-out rows with noise of sigma {self.sigma:g} (model units)"
        if self.bits is not None:
            line += f"; {self.bits} bits per dimension, {self.bits_log_prob} nats, of rows dequantised by uniform noise"
        return f"{line}; steps to within {self.change:.2g} nats"


def flow_summary(model: Model, rows: Tensor, rng: Generator) -> FlowSummary | None:
    """Follow held-out rows along the flow of a model; ``None`` for one without noise levels, or with open labels.

    Parameters
    ----------
    model
        Trained.
    rows
        Held-out rows in data units, ``(n, *event)``.
    rng
        The generator of the choice of rows, of noise and of probes.

    Raises
    ------
    DivergenceError
        If the flow leaves the numbers.
    """
    recipe, energy = model.recipe, model.unlabelled
    if energy.context != ("sigma",):
        return None
    d = rows[0].numel()
    probes = None if d <= EXACT else PROBES
    x = rows[torch.randperm(len(rows), generator=rng)[: MANY_ROWS if probes is None else ROWS]]

    def flow(points: Tensor, sigma: float) -> tuple[FlowLikelihood, Tensor]:
        z = model.scaling.forward(points)
        # A tolerance that any change meets: the steps are doubled once, to know what that changes.
        rest: dict[str, Any] = {"steps": STEPS // 2, "tolerance": float("inf"), "probes": probes}
        found = flow_log_prob(energy, z, sigma, recipe.sigma_max, rng=rng, **rest)
        return found, found.log_prob.double() + model.scaling.log_det

    noise = recipe.sigma_density * torch.randn(x.shape, generator=rng, dtype=x.dtype)
    found, values = flow(model.scaling.backward(model.scaling.forward(x) + noise), recipe.sigma_density)
    change = abs(float(found.change.mean()))
    if not (recipe.is_image and bool((rows == rows.round()).all())):
        return FlowSummary(len(x), mean(values), recipe.sigma_density, change=change)
    whole = x + torch.rand(x.shape, generator=rng, dtype=x.dtype) - 0.5
    found, nats = flow(whole, recipe.sigma_min)
    change = max(change, abs(float(found.change.mean())))
    return FlowSummary(len(x), mean(values), recipe.sigma_density, mean(bits_per_dim(nats, d)), mean(nats), change)


def mean(values: Tensor) -> Estimate:
    """Mean over rows with its standard error, in which the probes' noise is contained."""
    return Estimate(float(values.mean()), float(values.std()) / len(values) ** 0.5)
