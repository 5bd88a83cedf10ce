r"""Score matching: fit the gradient of the energy to that of the data's negative log-density, which is not known.

The squared distance of the two scores has, after integration by parts, no more of the data's density than a mean over
it:

.. math:: \tfrac12 \, \mathbb{E} \left\| \nabla \log p_{data} - \nabla \log p_\theta \right\|^2
          = \mathbb{E} \left[ \tfrac12 \| \nabla E \|^2 - \operatorname{tr} \nabla^2 E \right] + \text{const},

summed over the coordinates of a point. No chain is run, no noise is added and Z never enters. It asks for an energy
with two derivatives, and for a density of the data that vanishes towards the ends of its space: on a box the
integration by parts leaves a term at the walls, and the loss is wrong.

The trace is the dear part. `ScoreMatching` takes it over all coordinates; `SlicedScoreMatching` along random
directions v with :math:`\mathbb{E} \, v v^\top = I`, for which :math:`v^\top \nabla^2 E \, v` has the trace as its
mean; `FiniteDifferenceScoreMatching` from the energies of neighbouring points.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import is_real, kind_of
from gibbsian.errors import DomainError, OptionError, unknown_name
from gibbsian.kernels.base import row_sum
from gibbsian.objectives.base import Batch, Loss, Objective, check_one_per_row, context_of, energy_and_gradient
from gibbsian.objectives.checks import check_count, check_floating
from gibbsian.objectives.curvature import hessian_products, require_curvature, require_slope, slopes_and_curvature
from gibbsian.typing import Context

LAWS = ("rademacher", "gaussian", "sphere")


class ScoreMatching(Objective):
    r"""Exact score matching: the trace of the Hessian over all coordinates.

    .. math:: \overline{\tfrac12 \| \nabla E(x) \|^2 - \operatorname{tr} \nabla^2 E(x)}

    `Estimation of non-normalized statistical models by score matching (Hyvärinen, 2005)
    <https://jmlr.org/papers/v6/hyvarinen05a.html>`_. On a Gaussian energy the minimum is the maximum of the
    likelihood. The time grows with the dimension: d + 2 passes through a network of linear layers, convolutions and
    smooth elementwise functions, 2 d + 2 through others.

    Parameters
    ----------
    chunk
        Coordinates whose second derivatives are taken together. Where there are more coordinates than that, each
        chunk's intermediate results are dropped and computed again for the gradient, so that memory does not grow with
        the dimension, for a third more time.
    check
        Refuse energies with piecewise linear layers. Turn it off for one that rounds its kinks off itself, like
        ``relu(z) ** 3``.

    Raises
    ------
    OptionError
        If ``chunk`` is below 1.
    """

    full_precision = True

    def __init__(self, chunk: int = 64, check: bool = True) -> None:
        super().__init__()
        check_count("chunk", chunk, "the coordinates taken together")
        self.chunk = chunk
        self.check = check

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Differentiate the energy at the batch; nothing is drawn.

        Raises
        ------
        ArgumentTypeError
            If the energy has no second derivative, does not depend on x, or the data are no floating-point numbers.
        DomainError
            If the energy lives on discrete states, on a bounded domain or on a sphere.
        ShapeError
            If the energy gives anything but one number per row.
        OptionError
            If the batch lacks a label that the energy asks for.
        """
        x, context = _points(energy, batch, self.check)
        axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, 1, *x.shape[1:])
        parts = [self._part(energy, x, some, context) for some in axes.split(self.chunk)]
        square = sum((slopes.square().sum(0) for _, slopes, _ in parts), torch.zeros_like(parts[0][0]))
        trace = sum((curve for _, _, curve in parts), torch.zeros_like(square))
        return _loss(parts[0][0], square, trace)

    def _part(self, energy: Energy, x: Tensor, axes: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if len(axes) == x[0].numel() or not torch.is_grad_enabled():
            return slopes_and_curvature(energy, x, axes, context)
        return checkpoint(slopes_and_curvature, energy, x, axes, context, use_reentrant=False)

    def extra_repr(self) -> str:
        """The chunk."""
        return f"chunk={self.chunk}"


class SlicedScoreMatching(Objective):
    r"""Sliced score matching: the trace along random directions.

    With directions v drawn anew for each row,

    .. math:: \overline{\tfrac12 (v \cdot \nabla E(x))^2 - v^\top \nabla^2 E(x) \, v},

    whose mean over v is the loss of `ScoreMatching`. With ``variance_reduction`` the first term is
    :math:`\tfrac12 \| \nabla E \|^2` itself, which leaves the randomness of the second alone.

    `Sliced score matching: a scalable approach to density and score estimation (Song et al., 2019)
    <https://arxiv.org/abs/1905.07088>`_.

    Parameters
    ----------
    projections
        Directions per row. The cost grows with it by one pass each, or two where reverse differentiation is used.
    law
        Of the directions: ``"rademacher"`` (signs), ``"gaussian"``, or ``"sphere"`` (uniform, of length
        :math:`\sqrt d`).
    variance_reduction
        Take the gradient's whole square, which lowers the loss's variance, for about two thirds more time.
    check
        As in `ScoreMatching`.

    Raises
    ------
    OptionError
        If ``projections`` is below 1, or there is no such law.
    """

    full_precision = True

    def __init__(
        self, projections: int = 1, law: str = "rademacher", variance_reduction: bool = False, check: bool = True
    ) -> None:
        super().__init__()
        check_count("projections", projections, "the directions per row")
        self.projections = projections
        self.law = _check_law(law)
        self.variance_reduction = variance_reduction
        self.check = check

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw directions, and differentiate along them.

        Raises
        ------
        ArgumentTypeError, DomainError, ShapeError, OptionError
            As `ScoreMatching`.
        """
        x, context = _points(energy, batch, self.check)
        v = draw_directions(self.law, self.projections, x, rng)
        if self.variance_reduction:
            value, square, curve = _square_and_curvature(energy, x, v, context)
        else:
            value, slopes, curve = slopes_and_curvature(energy, x, v, context)
            square = slopes.square().mean(0)
        return _loss(value, square, curve if self.projections == 1 else curve / self.projections)

    def extra_repr(self) -> str:
        """The directions."""
        return f"projections={self.projections}, law={self.law}, variance_reduction={self.variance_reduction}"


class FiniteDifferenceScoreMatching(Objective):
    r"""Sliced score matching by finite differences: energies of three points in the place of derivatives.

    With :math:`E_\pm = E(x \pm \epsilon v)` and :math:`E_0 = E(x)`,

    .. math:: \overline{\frac{(E_+ - E_-)^2}{8 \, \epsilon^2} - \frac{E_+ + E_- - 2 E_0}{\epsilon^2}},

    which differs from the loss of `SlicedScoreMatching` by :math:`O(\epsilon^2)`. All energies come from one pass, and
    only they are differentiated. `Efficient learning of generative models via finite-difference score matching (Pang
    et al., 2020) <https://arxiv.org/abs/2007.03317>`_.

    Parameters
    ----------
    eps
        :math:`\epsilon`, in units of x: small against the finest detail of the data, and large enough that the second
        difference is more than rounding: in float32 not below a hundredth of the data's standard deviation.
    projections, law
        As in `SlicedScoreMatching`.

    Raises
    ------
    OptionError
        If ``eps`` is not a positive number, ``projections`` is below 1, or there is no such law.
    """

    full_precision = True

    def __init__(self, eps: float = 0.05, projections: int = 1, law: str = "rademacher") -> None:
        super().__init__()
        if not 0.0 < eps < math.inf:
            raise OptionError(f"eps is a positive distance, in units of x, such as 0.05; got {eps}.")
        check_count("projections", projections, "the directions per row")
        self.eps = float(eps)
        self.projections = projections
        self.law = _check_law(law)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw directions, and take differences along them.

        Raises
        ------
        ArgumentTypeError, DomainError, ShapeError, OptionError
            As `ScoreMatching`, save that no second derivative is asked for.
        """
        x, context = _points(energy, batch, check=False)
        require_slope(energy, x, context)
        n, k = len(x), self.projections
        step = self.eps * draw_directions(self.law, k, x, rng)
        points = torch.cat((x[None], x + step, x - step)).flatten(0, 1)
        times = 2 * k + 1
        many = {name: c.repeat(times, *[1] * (c.ndim - 1)) for name, c in context.items()}
        values = check_one_per_row(energy(points, **many), times * n).view(times, n)
        here, ahead, behind = values.split((1, k, k))
        slope = (ahead - behind) / (2 * self.eps)
        curve = (ahead + behind - 2 * here) / self.eps**2
        return _loss(here[0], slope.square().mean(0), curve.mean(0))

    def extra_repr(self) -> str:
        """The distance and the directions."""
        return f"eps={self.eps}, projections={self.projections}, law={self.law}"


def draw_directions(law: str, k: int, x: Tensor, rng: Generator) -> Tensor:
    """Draw k directions per row, ``(k, n, *event)``, with unit covariance.

    Parameters
    ----------
    law
        One of `LAWS`.
    k
        How many.
    x
        The rows, for shape, dtype and device.
    rng
        The generator.
    """
    shape = (k, *x.shape)
    if law == "rademacher":
        return torch.randint(2, shape, generator=rng, dtype=x.dtype, device=x.device).mul_(2.0).sub_(1.0)
    v = torch.randn(shape, generator=rng, dtype=x.dtype, device=x.device)
    if law == "gaussian":
        return v
    axes = tuple(range(2, v.ndim))
    return v * (math.sqrt(x[0].numel()) / torch.linalg.vector_norm(v, dim=axes, keepdim=True))


def _square_and_curvature(energy: Energy, x: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        value, grad = energy_and_gradient(energy, y, context, True)
        if len(v) == 1:
            # The graph of the gradient is there, and one product along it is cheaper than another pass.
            curve = row_sum(v[0] * next(hessian_products(grad, y, v, training)))
        else:
            curve = slopes_and_curvature(energy, x, v, context)[2]
    square = row_sum(grad.square())
    return (value, square, curve) if training else (value.detach(), square.detach(), curve.detach())


def _points(energy: Energy, batch: Batch, check: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Check what the energy lives on and that it has curvature; return detached rows and their context."""
    x, support = batch.x.detach(), energy.support
    if support.is_discrete:
        raise DomainError(
            f"Score matching follows gradients, but the energy lives on {support}, where there are none. Fit discrete "
            "states with PersistentContrastiveDivergence."
        )
    if not is_real(support) and kind_of(support) != "torus":
        raise DomainError(
            f"Score matching integrates by parts over all of space, but the energy lives on {support}, and a density "
            "that does not vanish at its edge leaves a term there. Use NoiseContrastiveEstimation, or "
            "PersistentContrastiveDivergence with a kernel for that domain; if the density does vanish there, declare "
            "the support real."
        )
    check_floating("Score matching", x)
    context = context_of(energy, batch)
    if check:
        require_curvature(energy, x, context)
    return x, context


def _loss(value: Tensor, square: Tensor, trace: Tensor) -> Loss:
    """Half the squared gradient minus the trace, averaged over rows; what all three have in common."""
    means = {"energy_data": value.detach().mean(), "squared_score": square.mean(), "laplacian": trace.mean()}
    loss = 0.5 * means["squared_score"] - means["laplacian"]
    return Loss(loss, {name: mean.detach() for name, mean in means.items()})


def _check_law(law: str) -> str:
    if law not in LAWS:
        raise unknown_name("law of directions", law, LAWS)
    return law
