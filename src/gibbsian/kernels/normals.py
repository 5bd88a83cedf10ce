r"""Noise for many chains: torch's own generator for few numbers, a counter-based one for many on a CPU.

Torch draws normals on a CPU from a Mersenne Twister, one word after the other; for ten thousand chains of a cheap
energy that is most of a Langevin step. A counter-based generator makes any word of its stream directly, so that a
processor makes many at once:

.. math:: w_j = \operatorname{mix}(s + j\gamma), \qquad
   (z_j, z_j') = \sqrt{-2 \log u_j}\,(\cos 2\pi v_j, \sin 2\pi v_j),

where mix is SplitMix64's, u and v are the halves of a word, and the seed s and the odd increment :math:`\gamma` are
drawn anew for every step from the caller's generator. Uniform numbers are words cut into halves of 24 bits, which are
as fine as torch's own. Uncompiled, those many passes over the words would be slower than torch; so it serves compiled
runs only, whose chains then differ from uncompiled ones as by another seed.

`Fast splittable pseudorandom number generators (Steele, Lea & Flood, 2014) <https://doi.org/10.1145/2660193.2660195>`_;
`A note on the generation of random normal deviates (Box & Muller, 1958) <https://doi.org/10.1214/aoms/1177706645>`_.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from gibbsian.compilation import compiled, wanted

MANY = 2**11
"""Numbers of one step from which the counter-based generator takes over."""

DOUBLED = 2**16
"""Numbers of a single step up to which they are made twice rather than by a graph of their own; more come in halves."""

GOLDEN = 0x9E3779B97F4A7C15
"""SplitMix64's own increment."""


def normals(steps: int, like: Tensor, rng: Generator) -> Tensor:
    """Draw the standard normals of a block of steps, ``(steps, n, *event)``.

    They are drawn step by step, so that two blocks of five steps hold the same numbers as one of ten. Which generator
    makes them depends on the size of a step, on its type and device, and on whether compilation is wanted.

    Parameters
    ----------
    steps
        How many.
    like
        Positions, ``(n, *event)``.
    rng
        On their device.
    """
    return normals_and_uniforms(steps, like, rng, uniforms=0)[0]


def normals_and_uniforms(steps: int, like: Tensor, rng: Generator, uniforms: int = 1) -> tuple[Tensor, ...]:
    """Draw the noise of an accept/reject kernel: normals as above, then ``uniforms`` numbers per chain, ``(steps, n)``.

    Parameters
    ----------
    steps, like, rng
        As above.
    uniforms
        How many tensors ``(steps, n)`` of uniform numbers to return behind the normals.
    """
    shape, own = tuple(like.shape), {"dtype": like.dtype, "device": like.device}
    if come_from_counters(like.numel(), like):
        # The same keys as step by step, in one call.
        draw_key(rng, keys := torch.empty((steps, 1 + uniforms, 2), dtype=torch.int64))
        parts, *rows = any_number([like.numel()] + [shape[0]] * uniforms, *streams(keys))
        z, *u = compiled(noise_from_counters, noise_from_counters)(*rows, like.numel() // parts, shape[0] // parts)
        rows_used = parts * steps
        return z[:rows_used].view(steps, *shape), *(each[:rows_used].view(steps, shape[0]) for each in u)
    z = torch.empty(steps, *shape, **own)
    u = [torch.empty(steps, shape[0], **own) for _ in range(uniforms)]
    for i in range(steps):
        torch.randn(shape, generator=rng, out=z[i], **own)
        for each in u:
            torch.rand(shape[:1], generator=rng, out=each[i], **own)
    return z, *u


def come_from_counters(numbers: int, like: Tensor) -> bool:
    """Whether so many numbers of one step, of the type of ``like``, are better made from counters."""
    return wanted() and numbers >= MANY and like.dtype == torch.float32 and like.device.type == "cpu"


def draw_key(rng: Generator, out: Tensor) -> None:
    """Draw what tells one step's stream from others, into ``(..., 2)`` of int64."""
    torch.randint(-(2**63), 2**63 - 1, out.shape, generator=rng, out=out)


def streams(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds and odd increments of keys ``(steps, ..., 2)``, each ``(steps, ..., 1)``."""
    return keys[..., :1], varied(keys[..., 1:])


def any_number(numbers: list[int], seeds: Tensor, increments: Tensor) -> tuple[int, Tensor, Tensor]:
    """Prepare keys for one compiled function that takes any number of rows.

    The compiler would make another function of a single row. So a step of many numbers is cut into halves, the second
    of which begins where the first ends in the streams; where there is little to make, a single row is made twice.

    Parameters
    ----------
    numbers
        How many of each key a step needs.
    seeds, increments
        As from `streams`.

    Returns
    -------
    parts, seeds, increments
        Rows of a step, and the keys of all rows, ``(parts * steps, ..., 1)``, or of one more for a single step.
    """
    parts = 1
    if numbers[0] > DOUBLED:
        if all(m % 4 == 0 for m in numbers):
            words = torch.tensor(numbers)[:, None] // 4
            seeds = torch.stack((seeds, seeds + words * increments), 1).flatten(0, 1)
            increments, parts = increments.repeat_interleave(2, 0), 2
        elif len(seeds) == 1:
            return 1, seeds.contiguous(), increments.contiguous()
    if len(seeds) == 1:
        seeds, increments = (t.expand(2, *t.shape[1:]).clone() for t in (seeds, increments))
    seeds, increments = seeds.contiguous(), increments.contiguous()
    for t in (seeds, increments):
        torch._dynamo.maybe_mark_dynamic(t, 0)
    return parts, seeds, increments


def varied(increments: Tensor) -> Tensor:
    """Make increments of any shape odd, and rid them of long runs of equal bits."""
    own = [_odd_and_varied(k) for k in increments.flatten().tolist()]
    return torch.tensor(own, dtype=torch.int64, device=increments.device).view(increments.shape)


def noise_from_counters(seeds: Tensor, increments: Tensor, m: int, n: int) -> tuple[Tensor, ...]:
    """Return m normals per step, and n uniform numbers for each further key; keys ``(steps, 1 + uniforms, 1)``."""
    u = [uniforms_from_counters(seeds[:, k], increments[:, k], n) for k in range(1, seeds.shape[1])]
    return from_counters(seeds[:, 0], increments[:, 0], m), *u


def uniforms_from_counters(seeds: Tensor, increments: Tensor, m: int) -> Tensor:
    """Return m uniform numbers in [0, 1) per step, ``(steps, m)``, multiples of 2^-24; seeds as above."""
    w = splitmix(seeds + torch.arange((m + 1) // 2) * increments)
    halves = (((w >> place) & (2**24 - 1)).to(torch.int32).float() * 2.0**-24 for place in (40, 8))
    return torch.stack(tuple(halves), 1).flatten(1)[:, :m].contiguous()


def from_counters(seeds: Tensor, increments: Tensor, m: int) -> Tensor:
    """Return m normals per step by the formula above, ``(steps, m)``; each step has a seed and an odd increment."""
    w = splitmix(seeds + torch.arange((m + 1) // 2) * increments)
    # 31 bits above zero for the radius, so that small u, which make the tails, keep their resolution as floats.
    u = (w >> 33).bitwise_and(2**31 - 1).to(torch.int32).float() * 2.0**-31 + 2.0**-32
    radius = (-2.0 * u.log()).sqrt()
    # 31 bits for an angle within a quarter turn of zero, one for the side of the circle.
    v = w.to(torch.int32)
    cosine, sine = _cosine_and_sine(((v & (2**31 - 1)).float() * 2.0**-31 - 0.5) * math.pi)
    radius = torch.where(v < 0, -radius, radius)
    # One array, written once: assigning the halves to slices would copy it all.
    return torch.stack((radius * cosine, radius * sine), 1).flatten(1)[:, :m].contiguous()


def _cosine_and_sine(a: Tensor) -> tuple[Tensor, Tensor]:
    """Sum Taylor's series within a quarter turn of zero, to 1e-7; torch's functions spend time on other angles."""
    z = a * a
    cosine, sine = torch.ones_like(a), torch.ones_like(a)
    for k in (12, 10, 8, 6, 4, 2):
        cosine = 1.0 - z * cosine * (1.0 / (k * (k - 1)))
    for k in (11, 9, 7, 5, 3):
        sine = 1.0 - z * sine * (1.0 / (k * (k - 1)))
    return cosine, a * sine


def splitmix(w: Tensor) -> Tensor:
    """SplitMix64's function of a 64-bit counter; masks make torch's shifts logical."""
    w = (w ^ ((w >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    w = (w ^ ((w >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return w ^ ((w >> 31) & (2**33 - 1))


def word(keys: Tensor, place: int | Tensor) -> Tensor:
    """Return 64 random bits of one place in the stream of each key, which is a seed of SplitMix64; keys ``(n,)``."""
    if isinstance(place, int):
        return splitmix(keys + ((place * GOLDEN + 2**63) % 2**64 - 2**63))
    return splitmix(keys + place * (GOLDEN - 2**64))


def uniform(keys: Tensor, place: int | Tensor, like: Tensor) -> Tensor:
    """Return the uniform number in [0, 1) of that place, ``(n,)``: 53 bits for float64, 24 in float32 otherwise."""
    bits = word(keys, place)
    if like.dtype == torch.float64:
        return ((bits >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53
    return ((bits >> 40) & (2**24 - 1)).to(torch.float32) * 2.0**-24


def _odd_and_varied(increment: int) -> int:
    """Make an increment odd, for the full period, and rid it of long runs of equal bits, as the paper advises."""
    odd = increment | 1
    if ((odd ^ (odd >> 1)) & (2**64 - 1)).bit_count() < 24:
        odd ^= 0xAAAAAAAAAAAAAAAA - 2**64
    return odd
