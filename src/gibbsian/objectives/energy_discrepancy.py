r"""Energy discrepancy: contrast data with what diffusing them back and forth gives.

A row x diffuses for a time t to y, and y to M contrastive points :math:`x'_1, \dots, x'_M`, by a kernel
:math:`q_t(y \mid x)` that is symmetric. The energy of x is compared with the free energy that y has among them,

.. math:: \mathrm{ED}_t(E) = \mathbb{E}_{x} \, E(x)
          + \mathbb{E}_{x} \, \mathbb{E}_{y \mid x} \log \mathbb{E}_{x' \mid y} \, e^{-E(x')},

which is smallest where :math:`e^{-E}` is the data's density, for every t. Neither a chain nor a derivative in x is
needed. A short time makes it score matching, :math:`\mathrm{ED}_t = t \, \mathbb{E} [\tfrac{1}{2} |\nabla E|^2 -
\Delta E] + O(t^2)`, with its blindness to the masses of separate modes; a long one makes it the negative
log-likelihood, up to a constant, with log Z estimated from points that are spread far beyond the data.

The kernel is the heat equation's on the energy's own space: over the reals, Gaussian noise of variance t; on a torus,
the same, wrapped; for binary and one-hot states, every site is drawn anew, uniformly, with probability
:math:`1 - e^{-t}`, so that a binary site flips with probability :math:`(1 - e^{-t}) / 2`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Generator, Tensor
from torch.distributions.constraints import Constraint

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import Torus, kind_of
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.checks import check_count, check_floating


class EnergyDiscrepancy(Objective):
    r"""Energy discrepancy with M contrastive points for each row, stabilised.

    .. math:: \frac{1}{n} \sum_i \log \Big( \frac{w}{M} + \frac{1}{M} \sum_{j=1}^{M} e^{E(x_i) - E(x'_{ij})} \Big)

    `Energy discrepancies: a score-independent loss for energy-based models (Schröder et al., 2023)
    <https://arxiv.org/abs/2307.06431>`_; for discrete states, `Energy-based modelling for discrete and mixed data via
    heat equations on structured spaces (Schröder et al., 2024) <https://arxiv.org/abs/2412.01019>`_.

    With w = 1 the loss is, up to log M, minus the log-probability that x is picked out among itself and its M
    contrastive points: given y, and as the kernel is symmetric, the chances that one of them is the data are as their
    :math:`e^{-E}`. A classification loss is smallest at the truth whatever M is; few points only cost precision. With
    any other w the logarithm of a mean over M points has a bias of order 1 / M, and with w = 0 the loss is not bounded
    below: a network can raise the energies around every row without end.

    Parameters
    ----------
    t
        Time of the diffusion, :math:`t > 0`: over the reals the variance of the noise, in squared units of x, added
        once to y and once more to each contrastive point.
    negatives
        M, 1 or more. The energy is evaluated at M + 1 points for each row, all at once.
    stabilisation
        w, 0 or more; see above for why to keep it at 1.

    Raises
    ------
    OptionError
        If an option is out of its range.
    """

    def __init__(self, t: float, negatives: int = 16, stabilisation: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < t < math.inf:
            raise OptionError(
                f"t is a positive time of diffusion (over the reals, the variance of the noise); got {t}."
            )
        if not 0.0 <= stabilisation < math.inf:
            raise OptionError(f"stabilisation is a weight of 0 or more, and 1 has no bias; got {stabilisation}.")
        self.t = float(t)
        self.negatives = check_count("negatives", negatives, "the contrastive points for each row")
        self.stabilisation = float(stabilisation)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Diffuse the batch there and back, and compare energies.

        Raises
        ------
        DomainError
            If there is no kernel for the space that the energy lives on.
        ArgumentTypeError
            If the data are not floating-point numbers.
        ShapeError
            If the energy does not return one number per row.
        OptionError
            If the energy asks for a label that the batch lacks.
        """
        x, m, n = batch.x.detach(), self.negatives, len(batch)
        _check_space(energy, x)
        context = {k: torch.cat((v, v.repeat_interleave(m, 0))) for k, v in context_of(energy, batch).items()}
        y = diffused(x, energy.support, self.t, rng)
        around = diffused(y.repeat_interleave(m, 0), energy.support, self.t, rng)
        values = energy(torch.cat((x, around)), **context)
        if tuple(values.shape) != (n * (m + 1),):
            raise ShapeError(
                f"The energy of {n * (m + 1)} points must have shape ({n * (m + 1)},); it returned "
                f"{tuple(values.shape)}. Sum over the event's axes, or drop a trailing axis with .squeeze(-1)."
            )
        of_data, of_around = values[:n], values[n:].view(n, m)
        logits = of_data.unsqueeze(1) - of_around
        metrics = {
            "energy_data": of_data.detach().mean(),
            "energy_noisy": of_around.detach().mean(),
            "effective_negatives": _effective(logits.detach()),
        }
        return Loss(log_mean(logits, self.stabilisation).mean(), metrics)

    def extra_repr(self) -> str:
        """The settings."""
        return f"t={self.t}, negatives={self.negatives}, stabilisation={self.stabilisation}"


def log_mean(logits: Tensor, weight: float) -> Tensor:
    r""":math:`\log(w / M + \tfrac{1}{M} \sum_j e^{l_j})` of each row: ``(n, M) -> (n,)``."""
    m = logits.shape[1]
    if weight:
        logits = torch.cat((logits, logits.new_full((len(logits), 1), math.log(weight))), 1)
    return torch.logsumexp(logits, 1) - math.log(m)


def diffused(x: Tensor, support: Constraint, t: float, rng: Generator) -> Tensor:
    """Let points ``(n, *event)`` diffuse for a time t by the heat equation of their space.

    Parameters
    ----------
    x
        Points; those of one-hot sites have their classes on the last axis.
    support
        Their space: real, a box (whose walls it does not know), a torus, boolean or one-hot.
    t
        The time.
    rng
        The generator.
    """
    kind = kind_of(support)
    if kind in ("boolean", "one_hot"):
        sites = x.shape if kind == "boolean" else x.shape[:-1]
        classes = 2 if kind == "boolean" else x.shape[-1]
        anew = torch.rand(sites, generator=rng, device=x.device) < -math.expm1(-t)
        drawn = torch.randint(classes, sites, generator=rng, device=x.device)
        if kind == "one_hot":
            anew, drawn = anew.unsqueeze(-1), torch.nn.functional.one_hot(drawn, classes)
        return torch.where(anew, drawn.to(x.dtype), x)
    moved = x + math.sqrt(t) * torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
    return cast(Torus, support).wrap(moved) if kind == "torus" else moved


def _effective(logits: Tensor) -> Tensor:
    """How many of the M points carry the mean: near 1, one alone does, and t is too long for M."""
    weight = logits.softmax(1)
    return weight.square().sum(1).reciprocal().mean()


def _check_space(energy: Energy, x: Tensor) -> None:
    kind = kind_of(energy.support)
    if kind in ("sphere", "discrete"):
        raise DomainError(
            f"Energy discrepancy diffuses over the reals, a box, a torus, binary or one-hot states, and the energy "
            f"lives on {energy.support}. Fit it with ContrastiveDivergence and a kernel that walks there."
        )
    check_floating("Energy discrepancy", x)
