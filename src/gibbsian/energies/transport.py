r"""Neural transport: an energy seen from the space of a flow's noise, where it is rounder.

A flow carries noise u to points x = T(u). In u, the density :math:`e^{-E(x)} / Z` has the energy

.. math:: E_u(u) = E(T(u)) - \log |\det \partial T / \partial u|

with the same Z. Where the flow's density is the energy's own, that is the energy of the noise, :math:`|u|^2 / 2` and a
constant, whatever the shape of E: a funnel or a banana becomes a ball. Where it is not, chains in u are exact still,
and as good as what is left of the shape.

`NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport (Hoffman et al., 2019)
<https://arxiv.org/abs/1903.03704>`_.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy, formula
from gibbsian.energies.flows import Flow, check_same_points
from gibbsian.energies.tilted import Tilted
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

CHUNK = 1 << 14
"""Points carried at once."""


class Transported(Energy):
    """An energy of a flow's noise that stands for one of its points: see `neural_transport`.

    Attributes
    ----------
    energy, flow
        The energy of the points, and the flow that carries noise to them, a copy that does not learn.
    own
        Whether the energy is tilted from this very flow, whose density then cancels.
    """

    def __init__(self, energy: Energy, flow: Flow, own: bool) -> None:
        super().__init__()
        self.energy = energy
        self.flow = flow
        self.own = own
        self.context = energy.context
        self.event_shape = torch.Size((flow.event_shape.numel(),))

    def forward(self, u: Tensor, **context: Tensor) -> Tensor:
        """Energy of the point that the noise is carried to, less the log of the volume's change, in nats."""
        x, log_det = self.flow.from_latent(u)
        if self.own:
            return self.flow.latent(u) + self.energy.tilt(x, **context)  # pyright: ignore[reportCallIssue]
        return self.energy(x, **context) - log_det

    def start(self, n: int, rng: Generator) -> Tensor:
        """Draw noise ``(n, d)``, which stands for draws of the flow, to start chains from."""
        return self.flow.sample_latent(n, rng)

    @torch.no_grad()
    def forward_points(self, u: Tensor) -> Tensor:
        """Take noise ``(..., d)``, such as draws, to points ``(..., *event)``."""
        return _flat(lambda rows: self.flow.from_latent(rows)[0], u, 1)

    @torch.no_grad()
    def backward_points(self, x: Tensor) -> Tensor:
        """Take points ``(..., *event)``, such as data, to noise ``(..., d)``."""
        return _flat(self.flow.to_latent, x, len(self.flow.event_shape))

    def extra_repr(self) -> str:
        """The energy of the points."""
        return formula(self.energy)


def neural_transport(energy: Energy | Callable[[Tensor], Tensor], flow: Flow | None = None) -> Transported:
    """See an energy from the space of a flow's noise.

    Any kernel over the reals samples the result; start chains at ``.start(n, rng)``, and take draws to the energy's own
    points by ``.forward_points(draws)``, or let `gibbsian.bridges.transport.sample_transported` do both. Its log Z is
    the energy's. A gradient costs one of the energy and a pass of the flow in the direction of its draws: take
    `inverse_autoregressive_flow`, or a coupling flow such as ``spline_flow(dim, passes=2)``; others need one pass per
    coordinate. Train it by `gibbsian.bridges.transport.fit_transport`, or by `MaximumLikelihood` on samples.

    Parameters
    ----------
    energy
        Over the reals, with the flow's event shape.
    flow
        A trained flow, of which a copy is kept that does not learn. It may be left out for a `tilted` model, whose own
        flow is taken then: the flow's density cancels, and is not computed. Data to fit the tilt with in this space are
        ``.backward_points(data)``.

    Raises
    ------
    ArgumentTypeError
        If the flow is none, or is no invertible map of Gaussian noise.
    OptionError
        If there is no flow, and the energy is not tilted from one.
    ShapeError, DomainError
        If the energy is over other points than the flow.
    """
    adopted = Energy.of(energy)
    if flow is None:
        if not isinstance(adopted, Tilted):
            raise OptionError(
                f"{formula(adopted)} has no flow of its own; pass one trained for it: neural_transport(energy, flow)."
            )
        flow, own = adopted.base, True
    elif isinstance(flow, Flow):
        flow, own = copy.deepcopy(flow).requires_grad_(False), False
    else:
        raise ArgumentTypeError(f"Transport needs a Flow, such as inverse_autoregressive_flow(2); got {flow!r}.")
    check_same_points(flow, adopted, "The energy")
    flow.from_latent(flow.loc.new_zeros((1, flow.event_shape.numel())))
    return Transported(adopted, flow, own)


def _flat(fn: Callable[[Tensor], Tensor], points: Tensor, axes: int) -> Tensor:
    """Apply a function of rows to points with any axes in front."""
    if points.ndim <= axes:
        raise ShapeError(f"Expected points with {axes} axes behind at least one of rows; got {tuple(points.shape)}.")
    front = points.shape[: points.ndim - axes]
    rows = points.reshape(-1, *points.shape[points.ndim - axes :])
    moved = torch.cat([fn(part) for part in rows.split(CHUNK)])
    return moved.reshape(*front, *moved.shape[1:])
