r"""Energies on the torus: a periodic network, and mixtures of von Mises densities, normalised and with exact draws.

A function of angles is periodic when it sees them only through :math:`\cos k x` and :math:`\sin k x` with whole k. The
network's features are these, up to a highest k; it is then smooth across the seam, and so are its scores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.directional import VonMises
from gibbsian.energies.domains import Torus
from gibbsian.energies.neural import check_widths
from gibbsian.energies.tractable import Tractable, batch_rows, shape_of
from gibbsian.errors import OptionError, ShapeError

TURN = Torus(2.0 * math.pi)
r"""Angles in radians, in :math:`[-\pi, \pi)`."""

CHUNK = 1 << 14
"""Rows whose components are evaluated at once while a mixture is fitted."""


class PeriodicMLP(Energy):
    r"""A multilayer perceptron over angles in radians, read through :math:`\cos k x_i` and :math:`\sin k x_i`.

    `Fourier features let networks learn high frequency functions in low dimensional domains (Tancik et al., 2020)
    <https://arxiv.org/abs/2006.10739>`_, with whole frequencies, so that every function of them is periodic.

    Parameters
    ----------
    dim
        Number of angles.
    hidden
        Widths of the hidden layers.
    harmonics
        The highest k. Two or three suit torsions' densities; more fits finer detail, noise too.

    Raises
    ------
    OptionError
        If a size is not positive.
    """

    support = TURN
    orders: Tensor

    def __init__(self, dim: int, hidden: Sequence[int] = (64, 64), harmonics: int = 3) -> None:
        super().__init__()
        self.event_shape = shape_of(dim)
        if len(self.event_shape) != 1:
            raise OptionError(f"dim is the number of angles of a point; got {dim!r}.")
        self.hidden = check_widths("hidden", hidden)
        if isinstance(harmonics, bool) or not isinstance(harmonics, int) or harmonics < 1:
            raise OptionError(f"harmonics is the highest frequency of the features, 1 or more; got {harmonics!r}.")
        self.harmonics = harmonics
        self.register_buffer("orders", torch.arange(1, harmonics + 1, dtype=torch.get_default_dtype()))
        sizes = [2 * harmonics * self.event_shape[0], *self.hidden]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row: ``(n, d) -> (n,)``."""
        angle = (batch_rows(x, cast(torch.Size, self.event_shape)).unsqueeze(2) * self.orders).flatten(1)
        return self.net(torch.cat((angle.cos(), angle.sin()), 1)).squeeze(1)

    def extra_repr(self) -> str:
        """Angles, widths and frequencies."""
        return f"{cast(torch.Size, self.event_shape)[0]}, hidden={self.hidden}, harmonics={self.harmonics}"


class VonMisesMixture(Tractable):
    r"""A mixture of products of von Mises densities, over angles in :math:`[-\pi, \pi)`.

    .. math:: E(x) = -\log \sum_k w_k \prod_i \frac{e^{\kappa_{ki} \cos(x_i - \mu_{ki})}}{2\pi I_0(\kappa_{ki})}.

    Parameters
    ----------
    locs
        Mean directions in radians, ``(K, d)``.
    concentrations
        Not negative: a number, or ``(K, d)``; 0 is uniform.
    weights
        Positive, ``(K,)``; equal when left out, and divided by their sum.

    Raises
    ------
    OptionError
        If a value is out of its range.
    ShapeError
        If the shapes do not fit.
    """

    support = TURN
    locs: Tensor
    concentrations: Tensor
    log_weights: Tensor

    def __init__(self, locs: Tensor, concentrations: float | Tensor = 1.0, weights: Tensor | None = None) -> None:
        super().__init__()
        locs = torch.as_tensor(locs)
        locs = locs if locs.is_floating_point() else locs.to(torch.get_default_dtype())
        if locs.ndim != 2 or not bool(locs.isfinite().all()):
            raise ShapeError(f"The mean directions are finite, of shape (K, d); got shape {tuple(locs.shape)}.")
        kappa = torch.as_tensor(concentrations, dtype=locs.dtype)
        w = locs.new_ones(len(locs)) if weights is None else torch.as_tensor(weights, dtype=locs.dtype)
        if kappa.shape not in {torch.Size(()), locs.shape} or w.shape != locs.shape[:1]:
            raise ShapeError(
                f"A mixture with mean directions {tuple(locs.shape)} takes concentrations of shape () or (K, d) and K "
                f"weights; got {tuple(kappa.shape)} and {tuple(w.shape)}."
            )
        if not bool((w > 0).all()) or not bool(((kappa >= 0) & kappa.isfinite()).all()):
            raise OptionError("Weights of a mixture are positive, and concentrations 0 or more and finite.")
        self.event_shape = locs.shape[1:]
        self.register_buffer("locs", locs.clone())
        self.register_buffer("concentrations", kappa.expand(locs.shape).clone())
        self.register_buffer("log_weights", (w / w.sum()).log())

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density: ``(n, d) -> (n,)``."""
        return -torch.logsumexp(self.joint_log_prob(x), 1)

    def joint_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each row together with each component: ``(n, d) -> (n, K)``."""
        half = torch.sin(0.5 * (batch_rows(x, self.event_shape).unsqueeze(1) - self.locs))
        constant = (math.log(2.0 * math.pi) + torch.special.i0e(self.concentrations).log()).sum(1)
        return self.log_weights - constant - (2.0 * self.concentrations * half.square()).sum(2)

    @torch.no_grad()
    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=rng)
        away = VonMises(torch.zeros_like(self.locs[k]), self.concentrations[k]).sample(1, rng)[0]
        return TURN.wrap(self.locs[k] + away)

    def extra_repr(self) -> str:
        """Angles and components."""
        return f"{self.event_shape[0]}, components={len(self.locs)}"


@torch.no_grad()
def fit_von_mises_mixture(
    x: Tensor,
    components: int = 8,
    *,
    rng: Generator,
    weights: Tensor | None = None,
    uniform: float = 0.05,
    steps: int = 100,
    most: float = 200.0,
) -> VonMisesMixture:
    r"""Fit a mixture of von Mises densities by expectation maximisation, with a uniform part that covers the torus.

    `Clustering on the unit hypersphere using von Mises-Fisher distributions (Banerjee et al., 2005)
    <https://jmlr.org/papers/v6/banerjee05a.html>`_; the concentration is found from the mean resultant length R by
    :math:`\kappa \approx R (2 - R^2) / (1 - R^2)`, their formula in the plane.

    Parameters
    ----------
    x
        Angles in radians, ``(n, d)``.
    components
        Of the mixture, besides the uniform one.
    rng
        The generator that picks the rows at which components start.
    weights
        Of the rows, ``(n,)``, not negative; equal when left out.
    uniform
        Mass of the uniform component, which stays: with it the mixture covers every point, as noise to contrast with
        must.
    steps
        Rounds of the algorithm.
    most
        The largest concentration of a component.

    Raises
    ------
    OptionError
        If a setting is out of its range, or there are fewer rows than components.
    """
    if not 1 <= components <= len(x) or not 0.0 < uniform < 1.0 or steps < 1 or not most > 0:
        raise OptionError(
            f"A mixture takes 1 or more components, up to the number of rows ({len(x)}), a uniform mass between 0 and "
            f"1, steps of 1 or more and a positive most; got {components}, {uniform}, {steps}, {most}."
        )
    w = x.new_ones(len(x)) if weights is None else weights.to(x)
    w = w / w.sum()
    first = _spread_rows(x, w, components, rng)
    locs, kappa = torch.cat((x[first], x.new_zeros(1, x.shape[1]))), x.new_full((components + 1, x.shape[1]), 4.0)
    kappa[-1] = 0.0
    mass = torch.cat((x.new_full((components,), (1.0 - uniform) / components), x.new_tensor([uniform])))
    waves = torch.stack((x.cos(), x.sin()))
    for _ in range(steps):
        mixture = VonMisesMixture(locs, kappa, mass)
        share = torch.cat([mixture.joint_log_prob(part).softmax(1) for part in x.split(CHUNK)])[:, :-1] * w[:, None]
        total = share.sum(0).clamp(min=1e-12)
        c, s = torch.einsum("nk,wnd->wkd", share, waves) / total[:, None]
        length = torch.hypot(c, s).clamp(max=1.0 - 1e-9)
        locs[:-1] = torch.atan2(s, c)
        kappa[:-1] = (length * (2.0 - length.square()) / (1.0 - length.square())).clamp(max=most)
        mass[:-1] = (1.0 - uniform) * total / total.sum()
    return VonMisesMixture(TURN.wrap(locs), kappa, mass)


def _spread_rows(x: Tensor, w: Tensor, k: int, rng: Generator) -> Tensor:
    """Pick k rows at a distance of each other: `k-means++ (Arthur & Vassilvitskii, 2007)`, on the torus."""
    chosen = torch.multinomial(w, 1, generator=rng)
    apart = torch.full_like(w, torch.inf)
    for _ in range(k - 1):
        apart = torch.minimum(apart, (1.0 - (x - x[chosen[-1]]).cos()).sum(1))
        mass = w * apart
        chosen = torch.cat((chosen, torch.multinomial(mass if bool((mass > 0).any()) else w, 1, generator=rng)))
    return chosen
