r"""log Z of Ising and Potts models on lattices, exactly: by transfer matrices, and by Kaufman's closed form.

Slices of a lattice across one axis meet only their neighbours. With the weights :math:`D_k` of the states within slice
k and the couplings :math:`H` between the sites of two slices,

.. math:: Z = \mathbf 1^\top D_1 H D_2 H \cdots H D_L \mathbf 1
          \quad\text{(open)}, \qquad
          Z = \operatorname{tr} (D_1 H D_2 H \cdots D_L H) \quad\text{(torus)} .

A slice of W sites has :math:`q^W` states, but H is a product over its sites, so that a step costs :math:`W q^W` and no
matrix is ever held. The trace takes one run for every state of the first slice; where all slices are alike, for every
class of states that shifts, reflections and relabelling turn into each other, and half as many steps, since then
:math:`\operatorname{tr} T^{2m} = \sum_i |T^m e_i|^2`. All terms are positive: nothing cancels.

`Statistics of the two-dimensional ferromagnet (Kramers & Wannier, 1941) <https://doi.org/10.1103/PhysRev.60.252>`_;
`Crystal statistics II: partition function evaluated by spinor analysis (Kaufman, 1949)
<https://doi.org/10.1103/PhysRev.76.1232>`_.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from gibbsian.energies.base import Energy, formula
from gibbsian.energies.pairwise import Ising, Lattice, Potts
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.partition.base import LogZ, exactly
from gibbsian.sampling import reporter

WIDEST = 1 << 22
"""States of a slice that a vector may hold."""

WORK = 1 << 34
"""Steps of the transfer matrix, times states of a slice, that a run may take: some minutes."""

TINY = 1e-300
"""Below this all of a run is nothing beside the others, and stays nothing: not 0 / 0."""


@torch.no_grad()
def transfer_matrix(energy: Energy, *, progress: bool | Callable[[int], object] = False) -> LogZ:
    r"""Compute log Z of an Ising or Potts model on a `Lattice` by transfer matrices, to rounding.

    Any number of axes, open or periodic, any field. The widths that are within reach: 22 binary sites across an open
    lattice; 18 across a torus whose field is the same everywhere, about 14 otherwise; of any length. Numbers are
    float64, but couplings that were rounded to float32 stay rounded: build the energy in float64 for more than six
    digits.

    Parameters
    ----------
    energy
        An `Ising` or `Potts` energy over a `Lattice`.
    progress
        ``True`` for a bar on the terminal, or a function called with the number of runs just made.

    Raises
    ------
    ArgumentTypeError
        If the energy is of another kind.
    OptionError
        If a slice has too many states; the message says how many, and what to use.
    """
    lattice = _lattice_of(energy, "transfer_matrix", (Ising, Potts))
    strip = _strip(energy, lattice)
    states = strip.classes**strip.width
    if states > WIDEST:
        raise OptionError(_too_wide(lattice, strip, f"more than the {WIDEST} that a vector holds"))
    if not lattice.periodic:
        return _finite(_open(strip))
    steps = (strip.length + 1) // 2 if strip.uniform else strip.length
    runs = max(1, states // _symmetries(strip)) if strip.uniform else states
    if runs * steps * states > WORK:
        raise OptionError(_too_wide(lattice, strip, f"and a run from {runs} of them or more, which would take hours"))
    starts, counts = _starts(strip) if strip.uniform else (torch.arange(states), torch.ones(states))
    report, close = reporter(progress, len(starts), "transfer matrix")
    size = max(1, min(len(starts), (1 << 16) // states))
    logs = []
    trace = _trace_of_power if strip.uniform else _trace_of_product
    try:
        for some in starts.split(size):
            logs.append(trace(strip, some))
            report(len(some))
    finally:
        close()
    return _finite(torch.logsumexp(torch.cat(logs) + counts.to(torch.float64).log(), 0))


@torch.no_grad()
def kaufman(energy: Energy) -> LogZ:
    r"""Compute log Z of an Ising model on a two-dimensional torus without field, of any size, in closed form.

    With couplings K along the m slices and L across their n sites, :math:`\tanh K^* = e^{-2K}` and

    .. math:: \sinh^2 \tfrac{\gamma_l}{2} = \sinh^2(L - K^*) + \frac{\sinh 2L}{\sinh 2K} \sin^2 \frac{l \pi}{2 n},
              \qquad \gamma_0 = 2 (L - K^*),

    Z is half of :math:`(2 \sinh 2K)^{mn/2}` times the sum of four products over n: of :math:`2 \cosh` and
    :math:`2 \sinh` of :math:`m \gamma_l / 2`, for odd l and for even l. (Kaufman, 1949; two couplings as Onsager's.)

    Parameters
    ----------
    energy
        An `Ising` energy over a periodic `Lattice` of two axes, with field 0. A negative coupling takes an even number
        of sites along its axis, where every other slice can be turned over.

    Raises
    ------
    ArgumentTypeError, OptionError
        If the energy is of another kind.
    """
    lattice = _lattice_of(energy, "kaufman", (Ising,))
    field, couplings = _field_of(energy), lattice.coupling.detach().double()
    if len(lattice.shape) != 2 or not lattice.periodic or bool((field != 0).any()):
        raise OptionError(
            f"Kaufman's form is for a torus of two axes without field; got {lattice} with a field up to "
            f"{float(field.abs().max()):.4g}. transfer_matrix takes other boundaries and fields, where it is narrow "
            "enough; bracket any."
        )
    if any(k < 0 and size % 2 for k, size in zip(couplings.tolist(), lattice.shape)):
        raise OptionError(
            f"Kaufman's form takes a negative coupling along an axis of an even number of sites; got {lattice}. "
            "Use transfer_matrix."
        )
    (m, n), (k, across) = lattice.shape, couplings.abs()
    if float(k) == 0.0:
        # Only the coupling along the slices may not vanish; without either the spins are free.
        (m, n), (k, across) = (n, m), (across, k)
    if float(k) == 0.0:
        return exactly(torch.tensor(m * n * math.log(2.0), dtype=torch.float64))
    value = 0.5 * m * n * (2 * k + torch.log1p(-(-4 * k).exp())) + _four_products(m, n, k, across) - math.log(2.0)
    return _finite(value)


def _finite(log_z: Tensor) -> LogZ:
    if not bool(torch.isfinite(log_z)):
        raise DivergenceError(
            "Couplings and fields this large overflow the range of float64: all but the ground states have no weight. "
            "log Z is the logarithm of their number less their energy."
        )
    return exactly(log_z)


def _four_products(m: int, n: int, k: Tensor, across: Tensor) -> Tensor:
    """Log of the sum of Kaufman's four products."""
    zero = across + 0.5 * k.tanh().log()
    waves = (torch.arange(1, 2 * n, dtype=torch.float64) * (0.5 * math.pi / n)).sin().square()
    half = m * (zero.sinh().square() + (2 * across).sinh() / (2 * k).sinh() * waves).sqrt().asinh()
    odd, even = half[0::2], half[1::2]

    def cosh(v: Tensor) -> Tensor:
        return torch.logaddexp(v, -v)

    def sinh(v: Tensor) -> Tensor:
        return v + torch.log(-torch.expm1(-2 * v))

    at_zero = m * zero
    signs = torch.stack((*[torch.ones_like(at_zero)] * 3, at_zero.sign()))
    logs = torch.stack(
        (
            cosh(odd).sum(),
            sinh(odd).sum(),
            cosh(even).sum() + cosh(at_zero),
            sinh(even).sum() + sinh(at_zero.abs()),
        )
    )
    top = logs.max()
    return top + (signs * (logs - top).exp()).sum().log()


@dataclass(frozen=True)
class _Strip:
    """A lattice as slices: ``length`` of them, of the sites ``across``, with what they weigh."""

    classes: int
    length: int
    across: tuple[int, ...]
    within: Tensor  # Log-weights of the states of a slice by its couplings, (q^W,).
    between: Tensor  # Weights between a site and the next slice's, (q, q), the largest 1.
    most: float  # What was divided out of those, for a whole slice: a logarithm.
    field: Tensor  # (length, W, q): what a site's class adds to the log-weight.

    @property
    def width(self) -> int:
        return math.prod(self.across)

    @property
    def uniform(self) -> bool:
        return bool((self.field == self.field[:1, :1]).all())

    def weights(self, k: int) -> Tensor:
        """Log-weights of the states of slice k, ``(q^W,)``."""
        log_w = self.within
        for site in range(self.width):
            log_w = log_w + self.field[k, site][_digit(self, site)]
        return log_w

    def cross(self, v: Tensor) -> Tensor:
        """Apply H to vectors ``(q^W, B)``, some sites at a time."""
        states, count = v.shape
        left = self.width
        while left:
            group = min(left, max(1, int(math.log(16, self.classes))))
            h = self.between
            for _ in range(group - 1):
                h = torch.kron(h, self.between)
            # The sites done move behind the others, and are all back in place, behind the batch, at the end.
            v = v.reshape(len(h), -1).T @ h
            left -= group
        return v.reshape(count, states).T


def _digit(strip: _Strip, site: int) -> Tensor:
    """Class of one site in each state of a slice, ``(q^W,)``."""
    q, w = strip.classes, strip.width
    return torch.arange(q).repeat_interleave(q ** (w - 1 - site)).repeat(q**site)


def _strip(energy: Energy, lattice: Lattice) -> _Strip:
    """Cut a lattice along its longest axis."""
    axis = max(range(len(lattice.shape)), key=lambda i: (lattice.shape[i], -i))
    ising = isinstance(energy, Ising)
    field = _field_of(energy).double().cpu().movedim(axis, 0)
    length, across = field.shape[0], tuple(s for i, s in enumerate(lattice.shape) if i != axis)
    field = torch.stack((-field, field), -1) if ising else field
    q = field.shape[-1]
    couplings = lattice.coupling.detach().double().cpu()
    agree = 2.0 * torch.eye(2, dtype=torch.float64) - 1.0 if ising else torch.eye(q, dtype=torch.float64)
    field = field.reshape(length, math.prod(across), q)
    meet = couplings[axis] * agree
    width = math.prod(across)
    bare = _Strip(q, length, across, torch.empty(0), (meet - meet.max()).exp(), width * float(meet.max()), field)
    if q**bare.width > WIDEST:
        return bare
    within = torch.zeros(q**bare.width, dtype=torch.float64)
    others = [float(j) for i, j in enumerate(couplings) if i != axis]
    places = torch.arange(bare.width).reshape(across)
    for i, (size, j) in enumerate(zip(across, others)):
        first, after = places, places.roll(-1, i)
        if not lattice.periodic:
            first, after = first.narrow(i, 0, size - 1), after.narrow(i, 0, size - 1)
        for a, b in zip(first.flatten().tolist(), after.flatten().tolist()):
            within += j * agree[_digit(bare, a), _digit(bare, b)]
    return replace(bare, within=within)


def _open(strip: _Strip) -> Tensor:
    log_w = strip.weights(0)
    v, scale = _weighed(torch.ones(len(log_w), 1, dtype=torch.float64), log_w)
    for k in range(1, strip.length):
        same = bool((strip.field[k] == strip.field[k - 1]).all())
        log_w = log_w if same else strip.weights(k)
        v, gained = _weighed(strip.cross(v), log_w)
        scale = scale + strip.most + gained
    return v.sum().log() + scale


def _weighed(v: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Divide vectors by their largest entry and weigh them; also the logarithm of what was divided out."""
    # One entry for all vectors: what falls below the range of float64 beside another is nothing in their sum either.
    top, largest = log_w.max(), v.max().clamp(min=TINY)
    return v * ((log_w - top).exp() / largest).unsqueeze(1), top + largest.log()


def _units(starts: Tensor, states: int) -> Tensor:
    v = torch.zeros(states, len(starts), dtype=torch.float64)
    v[starts, torch.arange(len(starts))] = 1.0
    return v


def _trace_of_product(strip: _Strip, starts: Tensor) -> Tensor:
    """Log of the trace's terms for some states of the first slice, ``(B,)``."""
    v, scale = _units(starts, strip.classes**strip.width), torch.zeros((), dtype=torch.float64)
    first = strip.weights(0)
    for k in range(1, strip.length):
        v, gained = _weighed(strip.cross(v), strip.weights(k))
        scale = scale + strip.most + gained
    v = strip.cross(v)
    return v.gather(0, starts.unsqueeze(0))[0].log() + scale + strip.most + first[starts]


def _trace_of_power(strip: _Strip, starts: Tensor) -> Tensor:
    """The same where all slices are alike: T is the symmetric D^1/2 H D^1/2, and half as many steps are enough."""
    log_w = strip.weights(0)
    root = (0.5 * (log_w - log_w.max())).exp().unsqueeze(1)
    v, scale = _units(starts, len(root)), torch.zeros((), dtype=torch.float64)

    def step(v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        v = root * strip.cross(root * v)
        largest = v.max().clamp(min=TINY)
        return v / largest, scale + strip.most + log_w.max() + largest.log()

    for _ in range(strip.length // 2):
        v, scale = step(v, scale)
    after, more = (v, scale) if strip.length % 2 == 0 else step(v, scale)
    return (v * after).sum(0).log() + scale + more


def _labels(strip: _Strip) -> list[tuple[int, ...]]:
    """The ways to rename classes that change no weight; of more than four classes they would be too many to try."""
    q = strip.classes
    if q > 4 or bool((strip.field != 0).any()):
        return [tuple(range(q))]
    return list(itertools.permutations(range(q)))


def _symmetries(strip: _Strip) -> int:
    """How many states, at most, the lattice's symmetries turn into one."""
    return strip.width * 2 ** len(strip.across) * len(_labels(strip))


def _starts(strip: _Strip) -> tuple[Tensor, Tensor]:
    """One state of each class that the lattice's symmetries turn into each other, and how many states it has."""
    q, w = strip.classes, strip.width
    powers = q ** torch.arange(w - 1, -1, -1)
    digits = [_digit(strip, site) for site in range(w)]
    least = torch.arange(q**w)
    places = torch.arange(w).reshape(strip.across)
    for shift in itertools.product(*map(range, strip.across)):
        for mirrored in itertools.product((False, True), repeat=len(strip.across)):
            axes = tuple(range(len(strip.across)))
            moved = places.roll(shift, axes) if axes else places
            moved = moved.flip([i for i in axes if mirrored[i]]).flatten().tolist()
            for labels in _labels(strip):
                label = torch.tensor(labels)
                image = sum(int(p) * label[digits[site]] for p, site in zip(powers, moved))
                least = torch.minimum(least, torch.as_tensor(image))
    return torch.unique(least, return_counts=True)


def _field_of(energy: Energy) -> Tensor:
    return cast(Tensor, energy.field).detach()


def _lattice_of(energy: Energy, name: str, kinds: tuple[type[Energy], ...]) -> Lattice:
    lattice = getattr(energy, "interaction", None)
    if not isinstance(energy, kinds) or not isinstance(lattice, Lattice):
        told = formula(energy) if isinstance(energy, Energy) else repr(energy)
        raise ArgumentTypeError(
            f"{name} takes {' or '.join(k.__name__ for k in kinds)} over a Lattice; got {told}. Put a temperature into "
            "coupling and field. For couplings of any graph use enumeration, where it is small, or bracket."
        )
    return lattice


def _too_wide(lattice: Lattice, strip: _Strip, why: str) -> str:
    shape = " x ".join(map(str, lattice.shape))
    kind = "torus" if lattice.periodic else "open lattice"
    closed = ""
    if lattice.periodic and strip.classes == 2 and len(lattice.shape) == 2:
        closed = "Kaufman's closed form, kaufman(energy), takes a torus of any size without field; "
    return (
        f"The {kind} of {shape} sites has slices of {strip.width} sites with {strip.classes}^{strip.width} = "
        f"{strip.classes**strip.width:.3g} states, {why}. {closed}bracket takes any lattice."
    )
