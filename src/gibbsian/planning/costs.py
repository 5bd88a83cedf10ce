r"""The cost model: what a step takes, as formulas of measured quantities.

A process computes its share of a batch lane by lane; the time of a share is read off a measured curve. Then gradients
are summed over processes. A ring all-reduce of :math:`B` bytes among :math:`R` processes is a reduce-scatter and an
all-gather, each of :math:`R - 1` messages of :math:`B / R` bytes,

.. math:: t = 2 (R - 1)\,\alpha + 2 \frac{R - 1}{R} \frac{B}{\beta},

with the latency :math:`\alpha` of a message and the bandwidth :math:`\beta` of one direction of a link
(`Patarasuk & Yuan, 2009 <https://doi.org/10.1016/j.jpdc.2008.09.002>`_). A tree takes
:math:`2 \lceil\log_2 R\rceil\,\alpha + 2 B / \beta`, pipelined, with two trees that share the links (`Sanders, Speck &
Träff, 2009 <https://doi.org/10.1016/j.parco.2009.09.001>`_): fewer messages, a little more time for the bytes. In nodes
of :math:`g` processes a reduce-scatter inside the node comes first, an all-gather there last, and between nodes each
process sums its part of :math:`B / g` bytes with its fellows over a link of its own.

Nothing here measures; `gibbsian.planning.calibration` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gibbsian.errors import OptionError

BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends together, its default; the last of them cannot be hidden."""


@dataclass(frozen=True)
class Quantity:
    """A number and the spread of what it was calibrated by, half the distance between its quartiles.

    Attributes
    ----------
    value, spread
        In the same unit.
    """

    value: float
    spread: float = 0.0

    def __add__(self, other: Quantity) -> Quantity:
        return Quantity(self.value + other.value, math.hypot(self.spread, other.spread))

    def __mul__(self, factor: float | Quantity) -> Quantity:
        if not isinstance(factor, Quantity):
            return Quantity(self.value * factor, self.spread * abs(factor))
        return Quantity(self.value * factor.value, math.hypot(self.spread * factor.value, self.value * factor.spread))

    __rmul__ = __mul__


NOTHING = Quantity(0.0)
ONE = Quantity(1.0)


def total(parts: Iterable[Quantity]) -> Quantity:
    """Sum quantities that were measured independently."""
    found = NOTHING
    for part in parts:
        found = found + part
    return found


@dataclass(frozen=True)
class Curve:
    """Seconds by size, measured at some sizes, straight in between and beyond: caches make it bend.

    Attributes
    ----------
    sizes
        Rows, chains or bytes, increasing.
    seconds
        One for each.
    """

    sizes: tuple[int, ...]
    seconds: tuple[Quantity, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds) or list(self.sizes) != sorted(set(self.sizes)):
            raise OptionError(f"A curve has one time for each of increasing sizes; got {self.sizes}.")

    def at(self, size: float) -> Quantity:
        """Read off the seconds of a size."""
        if len(self.sizes) == 1:
            return self.seconds[0] * max(1.0, size / self.sizes[0])
        i = next((i for i, known in enumerate(self.sizes[1:], 1) if size <= known), len(self.sizes) - 1)
        (a, b), (low, high) = self.sizes[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        w = (size - a) / (b - a)
        value = low.value + w * (high.value - low.value)
        spread = math.hypot((1.0 - w) * low.spread, w * high.spread)
        if size < a:
            # No less than the part of the time that grows with the size, no more than that of a larger size.
            value = min(max(value, low.value * size / a), low.value)
        if size > b:
            value = max(value, high.value)
        return Quantity(value, spread)


@dataclass(frozen=True)
class Link:
    """What carries messages between two processes.

    Attributes
    ----------
    latency
        Seconds of a message without content.
    per_byte
        Seconds a byte, one way.
    """

    latency: Quantity
    per_byte: Quantity

    @staticmethod
    def of(gigabytes: float, microseconds: float) -> Link:
        """Build a link from its bandwidth, in GB/s one way, and its latency, in microseconds.

        Raises
        ------
        OptionError
            If the bandwidth is not positive or the latency negative.
        """
        if not (gigabytes > 0.0 and math.isfinite(gigabytes)):
            raise OptionError(f"A bandwidth is a positive number of GB/s, one way; got {gigabytes}.")
        if not (microseconds >= 0.0 and math.isfinite(microseconds)):
            raise OptionError(f"A latency is a number of microseconds, 0 or more; got {microseconds}.")
        return Link(Quantity(microseconds * 1e-6), Quantity(1e-9 / gigabytes))


@dataclass(frozen=True)
class Network:
    """How processes are linked: those of a node by one kind of link, nodes by another.

    Attributes
    ----------
    inner
        Between processes of one node.
    outer
        Between nodes, one for each process of a node; ``None`` where all are in one node.
    per_node
        Processes of a node; counts where there is an outer link.
    """

    inner: Link
    outer: Link | None = None
    per_node: int = 1

    def nodes(self, ranks: int) -> int:
        """How many nodes so many processes fill."""
        return 1 if self.outer is None else -(-ranks // self.per_node)


def ring_pass(size: float, ranks: int, link: Link) -> Quantity:
    """Seconds of a reduce-scatter, or of an all-gather, of ``size`` bytes in all around a ring."""
    if ranks <= 1:
        return NOTHING
    return link.latency * (ranks - 1) + link.per_byte * (size * (ranks - 1) / ranks)


def ring_all_reduce(size: float, ranks: int, link: Link) -> Quantity:
    """Seconds of an all-reduce of ``size`` bytes around a ring: every byte goes round twice."""
    return ring_pass(size, ranks, link) * 2.0


def tree_all_reduce(size: float, ranks: int, link: Link) -> Quantity:
    """Seconds of an all-reduce of ``size`` bytes up and down two pipelined trees."""
    if ranks <= 1:
        return NOTHING
    return link.latency * (2 * math.ceil(math.log2(ranks))) + link.per_byte * (2.0 * size)


def all_reduce(size: float, ranks: int, network: Network) -> Quantity:
    """Seconds of an all-reduce of ``size`` bytes: a ring in a node; between nodes the faster of ring and trees."""
    nodes = network.nodes(ranks)
    if network.outer is None or nodes == 1:
        return ring_all_reduce(size, ranks, network.inner)
    own = size / network.per_node
    between = min((f(own, nodes, network.outer) for f in (ring_all_reduce, tree_all_reduce)), key=lambda t: t.value)
    return ring_all_reduce(size, network.per_node, network.inner) + between


def shard_exchange(size: float, ranks: int, network: Network) -> Quantity:
    """Seconds that full sharding talks in a step: weights are gathered once, gradients scattered as sums once.

    One module is sharded as a whole, whose forward takes the gradient in the points, and is not sharded again between
    forward and backward pass. Between nodes all processes make one ring, whose slowest links are those of nodes.
    """
    nodes = network.nodes(ranks)
    link = network.inner if network.outer is None or nodes == 1 else network.outer
    return ring_pass(size, ranks, link) * 2.0


def traffic(size: float, ranks: int) -> float:
    """Bytes that each process sends for an all-reduce of ``size`` bytes, or for a gather and a scatter of them."""
    return 0.0 if ranks <= 1 else 2.0 * size * (ranks - 1) / ranks


def exposed(exchange: Quantity, size: float, backward: Quantity) -> Quantity:
    """What is left of an exchange beside a backward pass: all but the last bucket goes on while that is computed."""
    hideable = max(0.0, 1.0 - BUCKET / size) if size else 0.0
    hidden = min(exchange.value * hideable, backward.value * hideable)
    return Quantity(exchange.value - hidden, exchange.spread)


@dataclass(frozen=True)
class Device:
    """A processor that nobody measured: what it sustains, for a roofline.

    Attributes
    ----------
    flops
        Operations a second that dense products sustain.
    launch
        Seconds between two operations that the host hands over, without a graph.
    """

    flops: float
    launch: float

    def seconds(self, flops: float, operations: float) -> Quantity:
        """The longer of computing and of handing over."""
        return Quantity(max(flops / self.flops, operations * self.launch))


@dataclass(frozen=True)
class Work:
    """What there is to compute, counted: so much a row, and so many operations whatever the rows.

    Attributes
    ----------
    flops_per_row
        Floating-point operations of products and convolutions, a multiplication and an addition being two.
    operations
        Calls of torch's kernels.
    backward
        Part of them that the backward pass makes, after all chains.
    """

    flops_per_row: float
    operations: float
    backward: float = 0.0


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the rows: ``fixed + per_row * rows``."""

    fixed: float
    per_row: float

    def at(self, rows: float) -> float:
        """Bytes of so many rows."""
        return max(0.0, self.fixed + self.per_row * rows)


@dataclass(frozen=True)
class Step:
    """What a step takes, by its parts.

    Attributes
    ----------
    compute
        Seconds of what a process does alone, by name.
    talk
        Seconds that processes talk, by name.
    """

    compute: Mapping[str, Quantity]
    talk: Mapping[str, Quantity]

    @property
    def computing(self) -> Quantity:
        """Seconds that a process computes."""
        return total(self.compute.values())

    @property
    def talking(self) -> Quantity:
        """Seconds that processes talk and do not compute."""
        return total(self.talk.values())

    @property
    def seconds(self) -> Quantity:
        """Seconds in all."""
        return self.computing + self.talking

    @property
    def bound(self) -> str:
        """What takes longer, ``compute`` or ``communication``."""
        return "communication" if self.talking.value > self.computing.value else "compute"
