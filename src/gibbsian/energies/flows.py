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

from gibbsian.energies.tractable import Tractable, batch_rows, shape_of
from gibbsian.errors import ArgumentTypeError, DataError, MissingPackageError, OptionError, ShapeError


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
    try:
        import zuko
    except ImportError as error:
        raise MissingPackageError(
            'Flows need the package zuko, which is not installed; try pip install "gibbsian[flows]".'
        ) from error
    if passes is not None and not (isinstance(passes, int) and passes >= 2):
        raise OptionError(f"passes is a whole number from 2, or None for one per coordinate; got {passes!r}.")
    shape = shape_of(dim)
    flow = zuko.flows.NSF(shape.numel(), transforms=transforms, hidden_features=tuple(hidden), bins=bins, passes=passes)
    return Flow(flow, shape)


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
