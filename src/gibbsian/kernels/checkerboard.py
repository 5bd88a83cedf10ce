r"""Heat bath of a two-dimensional lattice of spins, many sites to the machine word.

On a torus coupled alike along both axes, a site's law given the rest depends on the number k of its neighbours that are
up: :math:`p_k = \sigma(2 J (2k - 4) + 2h)`. All sites of one colour of the checkerboard are drawn at once, and 64 of
them live in the bits of one word, where

* the masks :math:`m_0, \ldots, m_4` of the sites with k neighbours up follow from the neighbours' words;
* bit plane j of every site's threshold is :math:`t_j = T_{j2} \oplus \bigoplus_{k \ne 2} m_k \wedge (T_{jk} \oplus
  T_{j2})`, with bit j of :math:`p_k` in T, as two neighbours up are the most likely number;
* u < p is decided from the highest plane down: :math:`(<, \ne)` of two stretches of planes, the higher one first, is
  :math:`(<_1 \vee (\overline{\ne_1} \wedge <_2),\; \ne_1 \vee \ne_2)`, so that the planes are joined in a tree.

A plane of random bits is a word of a counter-based generator (see `gibbsian.kernels.normals`), and probabilities are
as fine as torch's uniform numbers of the dtype: 24 planes in float32, 48 in float64. All of it is arithmetic of whole
numbers: compiled and eager sweeps agree to the bit.

**Layout.** With w bits to the word and R = H / w, bit b of word row i stands for row b R + i: a site's neighbours above
and below are in the word rows before and behind, at the same bit, except at the ends, where words turn by one bit. The
words of each colour are packed along the columns.

`Multi-spin coding: a very efficient technique for Monte Carlo simulations of spin systems (Jacobs & Rebbi, 1981)
<https://doi.org/10.1016/0021-9991(81)90089-9>`_.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.compilation import compiled, owner_of, wanted
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import Info, State, check_carried, settings_repr
from gibbsian.kernels.discrete import check_states
from gibbsian.kernels.normals import splitmix, varied
from gibbsian.typing import EnergyFn

PLANES = {torch.float32: 24, torch.float64: 48}
"""Bits of a probability."""


@dataclass(frozen=True)
class CheckerboardGibbs:
    """Sweep a square lattice of spins by heat bath, one colour of the checkerboard after the other.

    The same Markov chain as `BlockGibbs` on ``Ising.lattice((H, W))``, for periodic lattices with one coupling and one
    field whose height is a multiple of 4 and whose width is even; fastest where the height is a multiple of 128.
    Between steps the sites stay packed. Best compiled, and with many sweeps to the step, as only the end of a step is
    unpacked and its energy evaluated.

    Parameters
    ----------
    sweeps
        Sweeps over all sites per step.

    Raises
    ------
    OptionError
        If there is no sweep; at the start, if the lattice is another.
    ArgumentTypeError
        At the start, if the energy does not tell its coupling and field.
    """

    sweeps: int = 1

    gradients = 1
    domain = "boolean"
    dynamic = True  # A graph of many sweeps would take minutes to compile: the kernel compiles one, and calls it.
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise OptionError(f"sweeps counts the sweeps of a step, 1 or more; got {self.sweeps}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Pack the sites, and evaluate."""
        check_states(energy, x)
        _check_lattice(x)
        _coupling_and_field(energy)
        return State(x, energy(x).detach(), x.new_zeros((x.shape[0], 0)), memory=(pack(x),))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Seeds of each chain's random bits, ``(steps, sweeps, n)``, and their increments, ``(steps, sweeps)``."""
        seeds = torch.empty((steps, self.sweeps, state.x.shape[0]), dtype=torch.int64, device=state.x.device)
        increments = torch.empty((steps, self.sweeps), dtype=torch.int64, device=state.x.device)
        for each in zip(seeds, increments):
            for out in each:
                torch.randint(-(2**63), 2**63 - 1, out.shape, generator=rng, out=out)
        return seeds, varied(increments)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Make the sweeps; nothing is rejected, and couplings that are finite make nothing that is not."""
        if len(state.memory) != 1:
            check_carried(self, state, grad=False, memory=1)
        x, (words,) = state.x, state.memory
        table = thresholds(*_coupling_and_field(energy), PLANES.get(x.dtype, 24))
        owner = owner_of(energy)
        sweep: Any = compiled(sweep_once, owner) if wanted() else sweep_once
        finish: Any = compiled(evaluate_words, owner) if wanted() else evaluate_words
        bits = word_bits(x.shape[1])
        for seeds, increment in zip(*noise):
            words = sweep(words, seeds, increment, table, bits)
        x, value = finish(energy, words, x, bits)
        fine = torch.isfinite(value).to(value.dtype)
        return State(x, value, state.grad, memory=(words,)), Info(torch.ones_like(fine), 1.0 - fine)


def sweep_once(words: Tensor, seeds: Tensor, increment: Tensor, table: Tensor, bits: int) -> Tensor:
    """Draw the sites of one colour and then those of the other; a pure function, compiled or not.

    Parameters
    ----------
    words
        ``(n, 2, R, W / 2)``: the packed sites of both colours.
    seeds, increment
        Of each chain's random words, ``(n,)``, and 0-d.
    table
        As `thresholds` returns it.
    bits
        To the word.
    """
    planes, count = len(table), words[0, 0].numel()
    first = seeds.view(-1, 1, 1) + torch.arange(count, device=words.device).view(1, *words.shape[2:]) * increment
    # In one array, as a compiler writes it out once; it would list the places of the words anew for each plane.
    even_places, odd_places = torch.stack((first, first + planes * count * increment)).unbind()
    rise = torch.arange(planes, device=words.device).view(-1, 1, 1, 1) * (count * increment)
    even = _draw(words[:, 1], even_places + rise, table, bits, 0)
    odd = _draw(even, odd_places + rise, table, bits, 1)
    return torch.stack((even, odd), 1)


def evaluate_words(energy: Any, words: Tensor, like: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Unpack words and evaluate the energy there; a pure function, compiled or not."""
    x = unpack(words, bits).to(like.dtype)
    return x, energy(x).detach()


def thresholds(coupling: Tensor, field: Tensor, planes: int) -> Tensor:
    """Bits of the five probabilities, highest plane first, as words of all ones or none: ``(planes, 5)``."""
    up = torch.arange(-4, 5, 2, dtype=torch.float64, device=coupling.device)
    p = (2.0 * (coupling.detach().double() * up + field.detach().double())).sigmoid()
    # One below the largest whole number: a certain site is drawn as one that is all but certain, by 2^-planes.
    whole = (p * 2.0**planes).round().clamp(max=2.0**planes - 1.0).long()
    return -((whole >> torch.arange(planes - 1, -1, -1, device=p.device).unsqueeze(1)) & 1)


def word_bits(height: int) -> int:
    """Sites to the word: the largest power of 2 up to 64 that leaves an even number of word rows."""
    return next(w for w in (64, 32, 16, 8, 4, 2) if height % (2 * w) == 0)


def pack(x: Tensor) -> Tensor:
    """Pack states ``(n, H, W)`` of zeros and ones into words ``(n, 2, R, W / 2)``: the even colour, then the odd."""
    n, height, width = x.shape
    bits = word_bits(height)
    rows = x.long().view(n, bits, height // bits, width)
    places = torch.arange(bits, device=x.device).view(-1, 1, 1)
    pairs = (rows << places).sum(1).unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-1)
    straight = _even_rows(first)
    return torch.stack((torch.where(straight, first, second), torch.where(straight, second, first)), 1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Undo `pack`: whole numbers 0 and 1, ``(n, H, W)``."""
    even, odd = words.unbind(1)
    straight = _even_rows(even)
    first, second = torch.where(straight, even, odd), torch.where(straight, odd, even)
    rows = torch.stack((first, second), -1).flatten(-2).unsqueeze(1)
    return ((rows >> torch.arange(bits, device=words.device).view(-1, 1, 1)) & 1).flatten(1, 2)


def _draw(other: Tensor, places: Tensor, table: Tensor, bits: int, colour: int) -> Tensor:
    """Draw the sites of one colour given the other's words, ``(n, R, W / 2)``, with the words at ``(planes, ...)``."""
    random = splitmix(places)
    columns = table.view(-1, 5, 1, 1, 1).unbind(1)
    threshold = columns[2]
    for mask, column in zip(_counts(_neighbours(other, bits, colour)).unbind(), (*columns[:2], *columns[3:])):
        threshold = threshold ^ (mask & (column ^ columns[2]))
    drawn = _is_below(random, threshold)
    return drawn if bits == 64 else drawn & (2**bits - 1)


def _neighbours(other: Tensor, bits: int, colour: int) -> tuple[Tensor, ...]:
    """The words of the neighbours above, below, and at both sides."""
    top, bottom = other[:, :1], other[:, -1:]
    mask = 2 ** (bits - 1) - 1
    turned = ((bottom & mask) << 1) | ((bottom >> (bits - 1)) & 1), ((top >> 1) & mask) | ((top & 1) << (bits - 1))
    tall = torch.cat((turned[0], other, turned[1]), 1)
    wide = torch.cat((other[..., -1:], other, other[..., :1]), -1)
    straight = _even_rows(other)
    side = torch.where(straight if colour == 0 else ~straight, wide[..., :-2], wide[..., 2:])
    return tall[:, :-2], tall[:, 2:], other, side


def _counts(neighbours: tuple[Tensor, ...]) -> Tensor:
    """Masks of the sites with 0, 1, 3, 4 neighbours up, ``(4, n, R, W / 2)``."""
    a, b, c, d = neighbours
    one, two, other_one, other_two = a ^ b, a & b, c ^ d, c & d
    none, other_none = ~(a | b), ~(c | d)
    masks = (
        none & other_none,
        (one & other_none) | (none & other_one),
        (two & other_one) | (one & other_two),
        two & other_two,
    )
    # In one array, as a compiler writes it out once; apart, it would count the neighbours anew for each plane.
    return torch.stack(masks)


def _is_below(random: Tensor, threshold: Tensor) -> Tensor:
    """Compare numbers bit plane by bit plane, ``(planes, ...)`` with the highest first: ones where u < t."""
    differ = random ^ threshold
    less = differ & threshold
    while len(less) % 2 == 0:
        high, low = slice(0, None, 2), slice(1, None, 2)
        less, differ = less[high] | (~differ[high] & less[low]), differ[high] | differ[low]
    # What is left of 24 or 48 planes is three.
    found, above = less[0], differ[0]
    for here, apart in zip(less[1:].unbind(), differ[1:].unbind()):
        found, above = found | (~above & here), above | apart
    return found


def _even_rows(words: Tensor) -> Tensor:
    return (torch.arange(words.shape[1], device=words.device) % 2 == 0).view(1, -1, 1)


def _coupling_and_field(energy: EnergyFn) -> tuple[Tensor, Tensor]:
    tells = getattr(energy, "coupling_and_field", None)
    if tells is None:
        raise ArgumentTypeError(
            f"CheckerboardGibbs sweeps Ising.lattice((H, W)) alone, and {type(energy).__name__} does not tell one "
            "coupling and one field (coupling_and_field()). BlockGibbs serves multiples, sums and other couplings."
        )
    return tells()


def _check_lattice(x: Tensor) -> None:
    if x.ndim != 3 or x.shape[1] % 4 or x.shape[2] % 2:
        raise OptionError(
            "CheckerboardGibbs packs lattices of two dimensions whose height is a multiple of 4 and whose width is "
            f"even; these are {tuple(x.shape[1:])}. BlockGibbs serves others."
        )
