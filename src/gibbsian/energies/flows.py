r"""Normalizing flows as tractable energies: :math:`E(x) = -\log q(x)`, drawn by carrying a Gaussian through a network.

Flows come from zuko, ``pip install "gibbsian[flows]"``, which is imported only where one is built. A `Flow` stands
wherever a tractable energy does: as noise to contrast with, as the base of annealing, where chains start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import kind_of
from gibbsian.energies.tractable import Tractable, batch_rows, shape_of
from gibbsian.errors import ArgumentTypeError, DataError, DomainError, MissingPackageError, OptionError, ShapeError


class Flow(Tractable):
    r"""A zuko flow over points of any shape, behind a fixed scaling of each coordinate.

    .. math:: E(x) = -\log q\!\left(\frac{x - \mu}{s}\right) + \sum_i \log s_i

    Draws come from torch's global generator, seeded from ``rng`` and put back afterwards.

    Parameters
    ----------
    flow
        A module that gives a distribution when called, over vectors ``(d,)``: a flow of zuko without context.
    dim
        Size or shape of one point; as the flow has it, when left out. Points of other shapes are read as vectors.

    Attributes
    ----------
    loc, scale
        :math:`\mu` and s, of the event's shape; 0 and 1 until `calibrate` sets them.

    Raises
    ------
    ArgumentTypeError
        If it is no such module.
    ShapeError
        If its points have another size than ``dim``.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, flow: nn.Module, dim: int | Sequence[int] | None = None) -> None:
        super().__init__()
        law = _law_of(flow)
        if law is None or not law.has_rsample or law.batch_shape:
            raise ArgumentTypeError(
                f"A Flow wraps a zuko flow without context, such as zuko.flows.NSF(2), or is built by spline_flow(2); "
                f"got {flow!r}."
            )
        told = tuple(law.event_shape)
        self.event_shape = shape_of(told if dim is None else dim)
        if len(told) != 1 or self.event_shape.numel() != told[0]:
            raise ShapeError(
                f"The flow is over points of shape {told}; a Flow of points of shape {tuple(self.event_shape)} needs "
                f"one over ({self.event_shape.numel()},)."
            )
        self.flow = flow
        like = next(flow.parameters(), torch.zeros(()))
        self.register_buffer("loc", torch.zeros(self.event_shape, dtype=like.dtype))
        self.register_buffer("scale", torch.ones(self.event_shape, dtype=like.dtype))

    @torch.no_grad()
    def calibrate(self, data: Tensor) -> Flow:
        """Scale by the mean and standard deviation of each coordinate of data ``(n, *event)``; returns the flow itself.

        Splines bend what lies within five of these standard deviations and leave alone what lies outside.

        Raises
        ------
        DataError
            If a coordinate does not vary.
        """
        data = batch_rows(data, self.event_shape)
        scale = data.std(0)
        still = int((~(scale > 0)).sum())
        if still:
            raise DataError(
                f"{still} of {scale.numel()} coordinates do not vary over {len(data)} rows; a flow has no density "
                "there: drop them, or add a little noise to the data."
            )
        self.loc.copy_(data.mean(0))
        self.scale.copy_(scale)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density of each row."""
        z = ((batch_rows(x, self.event_shape) - self.loc) / self.scale).flatten(1)
        return self.scale.log().sum() - self._law().log_prob(z)

    @torch.no_grad()
    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points."""
        with _seeded_globally(rng):
            z = self._law().sample((n,))
        return self._placed(z)

    def rsample_and_log_prob(self, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` points as functions of the flow's parameters, with their log-densities ``(n,)``.

        Both can be differentiated: the noise that the flow carries is fixed, and the points move with the parameters.
        """
        law = self._law()
        with _seeded_globally(rng):
            if hasattr(law, "rsample_and_log_prob"):
                z, log_prob = law.rsample_and_log_prob((n,))
            else:
                z = law.rsample((n,))
                log_prob = law.log_prob(z)
        return self._placed(z), log_prob - self.scale.log().sum()

    def sample_latent(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points ``(n, d)`` of the density that the flow carries to the data, before it does."""
        law = self._invertible()
        with _seeded_globally(rng), torch.no_grad():
            return law.base.sample((n,))

    def from_latent(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""Carry points ``(n, d)`` as draws are carried; also :math:`\log |\det \partial x / \partial u|`, ``(n,)``.

        Raises
        ------
        ArgumentTypeError
            If the flow has no such map over the reals.
        ShapeError
            If the points have another shape.
        """
        law = self._invertible()
        z, log_det = law.transform.inv.call_and_ladj(batch_rows(u, law.event_shape))
        return self._placed(z), log_det + self.scale.log().sum()

    def to_latent(self, x: Tensor) -> Tensor:
        """Take points ``(n, *event)`` back to where the flow would carry them from, ``(n, d)``.

        Raises
        ------
        ArgumentTypeError
            If the flow has no such map over the reals.
        ShapeError
            If the points have another shape.
        """
        law = self._invertible()
        return law.transform(((batch_rows(x, self.event_shape) - self.loc) / self.scale).flatten(1))

    def latent(self, u: Tensor) -> Tensor:
        """Energy of points ``(n, d)`` before they are carried: minus the log-density of `sample_latent`, ``(n,)``."""
        return -self._invertible().base.log_prob(u)

    def _invertible(self) -> Any:
        law = self._law()
        base = getattr(law, "base", None)
        if not hasattr(law, "transform") or base is None or kind_of(base.support) != "real":
            raise ArgumentTypeError(
                f"Points can be carried by a flow that is an invertible map of a Gaussian, such as spline_flow(2) or "
                f"inverse_autoregressive_flow(2); got {self.flow!r}."
            )
        return law

    def _law(self) -> Any:
        return self.flow()

    def _placed(self, z: Tensor) -> Tensor:
        return self.loc + self.scale * z.reshape(-1, *self.event_shape)

    def extra_repr(self) -> str:
        """Shape."""
        return f"{tuple(self.event_shape)}"


def spline_flow(
    dim: int | Sequence[int],
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    bins: int = 8,
    passes: int | None = None,
) -> Flow:
    """Build a flow of autoregressive rational-quadratic splines, zuko's ``NSF``.

    `Neural spline flows (Durkan et al., 2019) <https://arxiv.org/abs/1906.04032>`_. A density costs one pass, a draw
    one per coordinate, or ``passes``. Outside of ``[-5, 5]`` the splines are the identity: see `Flow.calibrate`.

    Parameters
    ----------
    dim
        Size or shape of one point.
    transforms
        Autoregressive transforms, one after the other.
    hidden
        Widths of their networks.
    bins
        Pieces of each spline.
    passes
        Groups of coordinates that a transform treats one after the other: each coordinate apart when ``None``, which
        fits best; 2 for coupling transforms, whose draws are quick in many dimensions.

    Raises
    ------
    OptionError
        If ``passes`` is neither ``None`` nor a whole number from 2.
    MissingPackageError
        If zuko is not installed.
    """
    zuko = require_zuko()
    if passes is not None and not (isinstance(passes, int) and passes >= 2):
        raise OptionError(f"passes is a whole number from 2, or None for one per coordinate; got {passes!r}.")
    shape = shape_of(dim)
    flow = zuko.flows.NSF(shape.numel(), transforms=transforms, hidden_features=tuple(hidden), bins=bins, passes=passes)
    return Flow(flow, shape)


def inverse_autoregressive_flow(
    dim: int | Sequence[int],
    transforms: int = 2,
    hidden: Sequence[int] = (32, 32),
    bins: int | None = None,
) -> Flow:
    r"""Build a flow of inverse autoregressive transforms, whose draws are quick: what neural transport needs.

    .. math:: x_i = e^{a_i(u_{<i})} u_i + b_i(u_{<i})

    `Improved variational inference with inverse autoregressive flow (Kingma et al., 2016)
    <https://arxiv.org/abs/1606.04934>`_. A draw, with its density, costs one pass; the density of a given point one per
    coordinate and transform, the other way round than in `spline_flow`. Every second transform runs through the
    coordinates backwards. The networks are smooth (ELU), as trajectories of Hamiltonian Monte Carlo ask for.

    Parameters
    ----------
    dim
        Size or shape of one point.
    transforms
        Autoregressive transforms, one after the other.
    hidden
        Widths of their networks.
    bins
        Pieces of a rational-quadratic spline in place of the affine function, which is then the identity outside of
        ``[-5, 5]``. ``None`` for affine ones, whose tails are Gaussian of any width, between 1e-3 and 1e3 per
        transform.

    Raises
    ------
    MissingPackageError
        If zuko is not installed.
    """
    zuko = require_zuko()
    shape = shape_of(dim)
    options = {"transforms": transforms, "hidden_features": tuple(hidden), "activation": nn.ELU}
    built = (
        zuko.flows.MAF(shape.numel(), **options)
        if bins is None
        else zuko.flows.NSF(shape.numel(), bins=bins, **options)
    )
    # A flow's transform leads from data to noise; turned round, noise to data is the direction of one pass.
    return Flow(zuko.flows.Flow([transform.inv for transform in built.transform.transforms], built.base), shape)


def check_same_points(flow: Flow, energy: Energy, what: str) -> None:
    """Check that a flow's points are those of an energy.

    Raises
    ------
    ShapeError
        If they have another shape.
    DomainError
        If the energy's are discrete, or restricted to a part of the reals.
    """
    shape = energy.event_shape
    if shape is not None and shape != flow.event_shape:
        raise ShapeError(
            f"{what} is over points of shape {tuple(shape)} and the flow over {tuple(flow.event_shape)}; build the "
            f"flow for {tuple(shape)}, such as spline_flow({tuple(shape)})."
        )
    if (kind := kind_of(energy.support)) != "real":
        fits = "take unconstrain(energy) first" if kind == "box" else "a flow has a density over the reals alone"
        raise DomainError(f"{what} lives on {energy.support}, and a flow's points are any real ones; {fits}.")


def check_continuous(x: Tensor, what: str, remedy: str) -> None:
    """Refuse data on a lattice, where a density over the reals has no greatest likelihood.

    Whole numbers are, and so are coordinates whose values repeat: fewer different ones than a quarter of the rows, of
    16 rows or more.

    Parameters
    ----------
    x
        Data, ``(n, *event)``.
    what, remedy
        What is being fitted, and what to do, for the message.

    Raises
    ------
    DomainError
        With how many coordinates are discrete.
    """
    rows = x.detach().flatten(1)
    whole = bool((rows == rows.round()).all())
    ordered = rows.sort(0).values
    kinds = (ordered[1:] != ordered[:-1]).sum(0) + 1
    few = kinds < 0.25 * len(rows) if len(rows) >= 16 else torch.zeros_like(kinds, dtype=torch.bool)
    count = rows.shape[1] if whole else int(few.sum())
    if count:
        at = 0 if whole else int(few.to(torch.uint8).argmax())
        raise DomainError(
            f"{what} has a density over the reals, and {count} of {rows.shape[1]} coordinates of the data are "
            f"discrete: coordinate {at} has {int(kinds[at])} different values in {len(rows)} rows. A density can grow "
            f"there without end, and means nothing. {remedy}"
        )


def require_zuko() -> Any:
    """Import zuko, or say what installs it, by a `MissingPackageError`."""
    try:
        import zuko
    except ImportError as error:
        raise MissingPackageError(
            'Flows need the package zuko, which is not installed; try pip install "gibbsian[flows]".'
        ) from error
    return zuko


def _law_of(flow: object) -> Distribution | None:
    if not isinstance(flow, nn.Module):
        return None
    try:
        law = flow()
        # A flow that lacks its context says so no earlier than here.
        law.log_prob(next(flow.parameters(), torch.zeros(())).new_zeros(law.event_shape))
    except (TypeError, RuntimeError, AttributeError):
        # It asks for an argument, a context or a point, and is no flow of this kind.
        return None
    return law if isinstance(law, Distribution) else None


@contextmanager
def _seeded_globally(rng: Generator) -> Iterator[None]:
    """Seed torch's global generators from ``rng``, and put them back: distributions know no other."""
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    with torch.random.fork_rng(devices=[rng.device] if rng.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
