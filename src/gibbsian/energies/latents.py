r"""What a latent variable is summed over: all of its states, or draws of a proposal.

Both are lists of points :math:`z_1, \ldots, z_K` with log-weights :math:`\log m_k`, for which

.. math:: \sum_z e^{-E(x, z)} \approx \sum_k m_k \, e^{-E(x, z_k)} .

States have weight 1, and the sum is exact. Draws of a proposal q have weight :math:`1 / (K q(z_k \mid x))`: the sum is
then right on average, for every K, and minus its logarithm too large on average; see `gibbsian.energies.latent`.

**Noise is data.** The noise of the draws is a buffer, and the same for all rows: the energy made of them is a function
of x, kernels can walk on it, and it is the same after loading. `ImportanceLatents.redraw` is the one thing that
changes it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.energies.domains import kind_of
from gibbsian.energies.grids import count_states, numbered
from gibbsian.energies.tractable import Tractable, shape_of
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

MOST = 1 << 20
"""States of one latent variable that are summed for every row, unless more are asked for."""


class Latents(nn.Module, ABC):
    """Points with weights that stand for all values of a latent variable. Abstract.

    Attributes
    ----------
    event_shape
        The shape of one value.
    support
        Where values live.
    exact
        Whether the points are all that there are.
    walkable
        Whether kernels can move on the domain.
    """

    event_shape: torch.Size
    support: Constraint
    exact: bool

    walkable: bool = True

    @property
    @abstractmethod
    def count(self) -> int:
        """How many points there are for each row."""

    @abstractmethod
    def points(self, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Points of numbers ``first`` to ``last``, and their log-weights.

        Parameters
        ----------
        x
            Rows ``(n, *event)``.
        first, last
            A range of the points' numbers.

        Returns
        -------
        tuple
            ``(m, *latent)`` and ``(m,)``, the same for all rows, or with an axis of rows before.
        """


class ListedLatents(Latents):
    """A latent variable of few states, each of which is visited.

    Parameters
    ----------
    shape
        Of one value, bits or one-hot rows ``(*sites, K)``.
    support
        ``constraints.boolean`` or ``constraints.one_hot``.
    states
        A list of values ``(m, *latent)`` instead of shape and support, of any kind of numbers.
    most
        States to visit at most; time grows with them, memory does not.

    Raises
    ------
    OptionError
        If there are more states than ``most``, or not exactly one of shape and list is given.
    DomainError
        If values of that support cannot be listed.
    ShapeError
        If the list has no values.
    """

    states: Tensor | None
    exact = True

    def __init__(
        self,
        shape: int | Sequence[int] | None = None,
        support: Constraint = constraints.boolean,
        *,
        states: Tensor | None = None,
        most: int = MOST,
    ) -> None:
        super().__init__()
        if (shape is None) == (states is None):
            raise OptionError(
                f"Latent states are told by a shape or by a list, one of the two; got {shape=}, {states=}."
            )
        self.register_buffer("states", states)
        self.support = support
        if states is not None:
            if states.ndim < 2 or len(states) < 1:
                raise ShapeError(f"A list of latent states has shape (m, *latent); got {tuple(states.shape)}.")
            self.event_shape = states.shape[1:]
            self.support = constraints.real
            self._count = len(states)
            self.walkable = False
        else:
            assert shape is not None
            self.event_shape = shape_of(shape)
            self._count = count_states(self.event_shape, support)
        if self._count > most:
            raise OptionError(
                f"Latent states of shape {tuple(self.event_shape)} number 2^{math.log2(self._count):.1f}, more than "
                f"the {most} that are visited for every row. Sum over them in closed form where the energy allows it "
                "(RBM, ConvolutionalRBM), take ImportanceLatents with a proposal such as Bernoulli, or train with "
                "chains over both, by CompleteData; a larger most is for those who have the time."
            )

    @property
    def count(self) -> int:
        """How many states there are."""
        return self._count

    def points(self, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """States by their numbers, of weight 1."""
        if self.states is not None:
            z = self.states[first:last]
        else:
            index = torch.arange(first, last, device=x.device)
            z = numbered(self.event_shape, self.support, index, x.dtype)
        return z, x.new_zeros(last - first)

    def extra_repr(self) -> str:
        """Shape and number of states."""
        return f"{tuple(self.event_shape)}, {self._count} states"


class Proposal(nn.Module, ABC):
    """A law q(z | x) that can be drawn from, with its density. Abstract.

    Attributes
    ----------
    event_shape
        The shape of one value of z.
    support
        Where it lives.
    """

    event_shape: torch.Size
    support: Constraint = constraints.real

    @abstractmethod
    def noise(self, shape: Sequence[int], rng: Generator) -> Tensor:
        """Draw what `place` turns into draws, ``(*shape, *any)``."""

    @abstractmethod
    def place(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn noise ``(m, *any)``, or ``(n, m, *any)``, into draws ``(n, m, *latent)`` and log q, ``(n, m)``, nats."""


class GaussianProposal(Proposal):
    r"""Normal with mean and standard deviation by a network: :math:`z = \mu(x) + e^{s(x)} \varepsilon`.

    The encoder of `Auto-encoding variational Bayes (Kingma & Welling, 2014) <https://arxiv.org/abs/1312.6114>`_.

    Parameters
    ----------
    net
        From ``(n, *event)`` to ``(n, 2 d)``: means, then logarithms of standard deviations.
    dim
        Size or shape of one z, of d numbers.

    Raises
    ------
    OptionError
        If the size is not positive.
    ShapeError
        At the first call, if the network gives another number of values.
    """

    def __init__(self, net: nn.Module, dim: int | Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.event_shape = shape_of(dim)

    def noise(self, shape: Sequence[int], rng: Generator) -> Tensor:
        """Standard normals."""
        like = next(self.net.parameters(), torch.empty(()))
        return torch.randn((*shape, *self.event_shape), generator=rng, dtype=like.dtype, device=rng.device)

    def law(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of standard deviations, ``(n, *latent)`` each."""
        told = self.net(x)
        if tuple(told.shape) != (len(x), 2 * self.event_shape.numel()):
            raise ShapeError(
                f"The network of a GaussianProposal of z of shape {tuple(self.event_shape)} gives means and log-scales,"
                f" ({len(x)}, {2 * self.event_shape.numel()}) for {len(x)} rows; it gave {tuple(told.shape)}."
            )
        mean, log_scale = told.chunk(2, 1)
        return mean.reshape(-1, *self.event_shape), log_scale.reshape(-1, *self.event_shape)

    def place(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws that move with the network's parameters."""
        mean, log_scale = (t.unsqueeze(1) for t in self.law(x))
        own = noise if noise.ndim == mean.ndim else noise.unsqueeze(0)
        z = mean + log_scale.exp() * own
        each = -0.5 * own.square() - log_scale - 0.5 * math.log(2.0 * math.pi)
        return z, each.flatten(2).sum(2)


class ImportanceLatents(Latents):
    r"""Draws of a proposal, weighed by :math:`1 / (K q)`.

    A proposal must be wider than the posterior: where :math:`e^{-E} / q` is unbounded, the weights may have no
    variance, and a sample does not show it.

    Parameters
    ----------
    proposal
        A `Tractable` q(z), which is not trained and whose draws are redrawn after it changes; or a `Proposal` q(z | x),
        whose parameters get a gradient.
    draws
        K.
    rng
        Draws the noise that is kept.

    Attributes
    ----------
    noise
        ``(K, ...)``: a buffer.

    Raises
    ------
    OptionError
        If K is below 1.
    ArgumentTypeError
        If the proposal is neither.
    """

    noise: Tensor
    exact = False

    def __init__(self, proposal: Tractable | Proposal, draws: int, rng: Generator) -> None:
        super().__init__()
        if not isinstance(proposal, (Tractable, Proposal)):
            raise ArgumentTypeError(
                "Latents are drawn from a tractable energy, such as Gaussian(2), or a Proposal, such as "
                f"GaussianProposal(net, 2); got {proposal!r}."
            )
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise OptionError(f"draws counts the importance samples of each row, 1 or more; got {draws!r}.")
        self.proposal = proposal
        self.event_shape, self.support = proposal.event_shape, proposal.support
        self.register_buffer("noise", self.fresh((draws,), rng))

    @property
    def count(self) -> int:
        """K."""
        return len(self.noise)

    def fresh(self, shape: Sequence[int], rng: Generator) -> Tensor:
        """Draw noise, ``(*shape, ...)``."""
        if isinstance(self.proposal, Tractable):
            n = torch.Size(shape).numel()
            return self.proposal.sample(n, rng).detach().reshape(*shape, *self.event_shape)
        return self.proposal.noise(shape, rng)

    @torch.no_grad()
    def redraw(self, rng: Generator) -> None:
        """Replace the noise that is kept: the energy becomes another function."""
        self.noise.copy_(self.fresh((self.count,), rng))

    def points(self, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Draws by their numbers."""
        return self.placed(x, self.noise[first:last], self.count)

    def placed(self, x: Tensor, noise: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Turn noise ``(m, ...)``, or ``(n, m, ...)``, into draws and their log-weights among ``count``."""
        share = -math.log(count)
        if isinstance(self.proposal, Proposal):
            z, log_q = self.proposal.place(x, noise)
            return z, share - log_q
        flat = noise.reshape(-1, *self.event_shape)
        with torch.no_grad():
            log_q = -self.proposal(flat)
        return noise, share - log_q.reshape(noise.shape[: noise.ndim - len(self.event_shape)])

    def extra_repr(self) -> str:
        """Shape and number of draws."""
        return f"{tuple(self.event_shape)}, draws={self.count}"


def require_fitting(latents: Latents, energy: object) -> None:
    """Refuse latents of another shape or domain than a joint energy says.

    Raises
    ------
    ShapeError, OptionError
        With both.
    """
    shape = getattr(energy, "latent_shape", None)
    if shape is not None and tuple(shape) != tuple(latents.event_shape):
        raise ShapeError(
            f"The latents have values of shape {tuple(latents.event_shape)} and the energy takes {tuple(shape)}; build "
            f"the list, or the proposal, for values of shape {tuple(shape)}."
        )
    support = getattr(energy, "latent_support", None)
    if support is not None and latents.walkable and kind_of(support) != kind_of(latents.support):
        raise OptionError(
            f"The latents live on {latents.support} and the energy's latent variable on {support}; a proposal, or a "
            "list, has the energy's own."
        )
