r"""Tilted flows: a flow's density, corrected by an energy that is learned on top of it.

.. math:: p(x) = \frac{1}{Z}\, q(x)\, e^{-t(x)}, \qquad E(x) = -\log q(x) + t(x)

The flow q is kept as it is. The tilt t comes from a network g that gives 0 at the start, so that training begins at the
flow. It is bounded below,

.. math:: t(x) = \log\left(1 + e^{g(x) + \log(e^b - 1)}\right) - b \; > \; -b,

so that the density is raised above the flow's by no more than :math:`e^b` before it is normalised, and lowered by any
factor. Hence Z exists, :math:`Z < e^b`; importance weights :math:`e^{-t}` of the flow's draws are bounded; and
accepting a draw of the flow with probability :math:`e^{-t(x) - b}`, a sigmoid of -g, gives exact draws of p. In this
form it is the learned rejection sampler of `Resampled priors for variational autoencoders (Bauer & Mnih, 2019)
<https://arxiv.org/abs/1810.11428>`_.

Fit it by contrasting data with the flow, ``NoiseContrastiveEstimation(model.base)``, as in `Flow contrastive estimation
of energy-based models (Gao et al., 2020) <https://arxiv.org/abs/1912.00589>`_ with a flow that rests; or by chains,
``PCD``, in the space of the data or in the flow's own, where
`gibbsian.energies.transport.neural_transport` takes it: `Learning energy-based models with neural transport backbone
(Nijkamp et al., 2020) <https://arxiv.org/abs/2006.06897>`_.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import parametrize

from gibbsian.energies.base import Energy, formula
from gibbsian.energies.flows import Flow, check_same_points
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError

TRIES = 10_000
"""Draws of the flow per exact draw of a tilted model, at most."""

FEWEST, CHUNK = 256, 1 << 14
"""Draws of the flow at once, at least and at most."""


class Tilted(Energy):
    """A flow with a learned correction: see `tilted`.

    Attributes
    ----------
    base
        The flow, which does not learn.
    net
        g, which does.
    limit
        b, in nats; ``None`` for no bound.
    """

    def __init__(self, base: Flow, net: Energy, limit: float | None) -> None:
        super().__init__()
        self.base = base
        self.net = net
        self.limit = limit
        self.event_shape = base.event_shape
        self.context = net.context

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """The flow's energy plus the tilt, of each row, in nats."""
        return self.base(x) + self.tilt(x, **context)

    def tilt(self, x: Tensor, **context: Tensor) -> Tensor:
        """What is added to the flow's energy, ``(n,)``, in nats."""
        g = self.net(x, **context)
        if self.limit is None:
            return g
        # log(e^b - 1), where e^b may be too large for a float.
        return softplus(g + self.limit + math.log(-math.expm1(-self.limit))) - self.limit

    @torch.no_grad()
    def sample(self, n: int, rng: Generator, **context: Tensor) -> Tensor:
        """Draw ``n`` independent points exactly, by rejection from the flow, ``(n, *event)``.

        A draw costs :math:`e^b / Z` draws of the flow on average.

        Parameters
        ----------
        n
            How many.
        rng
            The generator, on the model's device.
        context
            Of the network, 0-d values by name.

        Raises
        ------
        OptionError
            If the tilt is not bounded.
        DivergenceError
            If fewer than one draw of the flow in ``TRIES`` is accepted.
        """
        if self.limit is None:
            raise OptionError("Exact draws need a bounded tilt; build it by tilted(flow, net, limit=5.0).")
        kept: list[Tensor] = []
        found = tried = 0
        while found < n:
            size = min(CHUNK, max(FEWEST, 4 * (n - found)))
            x = self.base.sample(size, rng)
            log_accept = -self.tilt(x, **{name: value.expand(len(x)) for name, value in context.items()}) - self.limit
            u = torch.rand(len(x), generator=rng, device=x.device, dtype=log_accept.dtype)
            kept.append(x[u.log() < log_accept])
            found, tried = found + len(kept[-1]), tried + size
            if tried > TRIES * max(found, 1):
                raise DivergenceError(
                    f"Of {tried} draws of the flow {found} were accepted, too few to draw the tilted model from it. "
                    "Run chains instead: sample(neural_transport(model), HMC(0.2), model.base.sample_latent(n, rng), "
                    "...)."
                )
        return torch.cat(kept)[:n]

    def extra_repr(self) -> str:
        """The parts."""
        return f"{formula(self.base)}, {formula(self.net)}, limit={self.limit}"


def tilted(
    flow: Flow, net: Energy | Callable[[Tensor], Tensor], limit: float | None = 5.0, from_zero: bool = True
) -> Tilted:
    r"""Put a learned correction on top of a flow; it starts as the flow itself.

    Parameters
    ----------
    flow
        A trained flow. The model keeps a copy, ``model.base``, whose parameters do not learn.
    net
        g, an energy such as `MLP` over the flow's points. Its last linear layer is set to zero, in place.
    limit
        b, in nats: how far the density may be raised above the flow's before it is normalised. A higher one lets the
        weights vary more. ``None`` for :math:`t = g` without a bound: whether Z exists is then the network's affair.
    from_zero
        Whether the last layer is set to zero; without, the tilt starts at whatever the network gives.

    Raises
    ------
    ArgumentTypeError
        If the flow is none.
    OptionError
        If the limit is not positive and finite, or the network does not give 0 when its last linear layer does.
    ShapeError, DomainError
        If the network is over other points than the flow.
    """
    if not isinstance(flow, Flow):
        raise ArgumentTypeError(f"A tilted model is built on a Flow, such as spline_flow(2); got {flow!r}.")
    if limit is not None and not 0.0 < limit < math.inf:
        raise OptionError(f"limit is a positive number of nats, or None for no bound; got {limit}.")
    adopted = Energy.of(net)
    check_same_points(flow, adopted, "The correction")
    if from_zero:
        _silence(adopted, flow)
    return Tilted(copy.deepcopy(flow).requires_grad_(False), adopted, limit)


@torch.no_grad()
def _silence(net: Energy, flow: Flow) -> None:
    """Set the last linear layer to zero, if that makes the network zero."""
    linear = [m for m in net.modules() if isinstance(m, nn.Linear) and not parametrize.is_parametrized(m)]
    if linear:
        last = linear[-1]
        saved = [p.clone() for p in last.parameters()]
        for p in last.parameters():
            p.zero_()
        if net.context or bool((net(_places(flow).to(saved[0])) == 0).all()):
            return
        for p, value in zip(last.parameters(), saved):
            p.copy_(value)
    raise OptionError(
        f"{formula(net)} does not become zero with the last linear layer that can be set to zero, so that the tilt "
        "would not start at the flow; take an MLP or a convolutional energy without spectral_norm, or pass "
        "from_zero=False."
    )


def _places(flow: Flow) -> Tensor:
    """Some points about a flow's centre."""
    steps = torch.linspace(-1.0, 1.0, 5, dtype=flow.loc.dtype, device=flow.loc.device)
    return flow.loc + flow.scale * steps.reshape(-1, *[1] * len(flow.event_shape))
