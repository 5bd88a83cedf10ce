"""Small Potts families whose law is known: all sequences enumerated, and an alignment drawn from it."""

import itertools

import torch

from gibbsian.energies.pairwise import Potts
from gibbsian.sequences.alignment import Alignment

ALPHABET = "-AC"


def small_potts(sites=5, letters=3, strength=0.6, seed=0):
    """A Potts model with random fields and couplings, float64."""
    rng = torch.Generator().manual_seed(seed)
    half = strength * torch.randn((sites, letters, sites, letters), generator=rng, dtype=torch.float64)
    matrix = half + half.permute(2, 3, 0, 1)
    own = torch.arange(sites)
    matrix[own, :, own, :] = 0.0
    field = 0.5 * torch.randn((sites, letters), generator=rng, dtype=torch.float64)
    return Potts(matrix, field=field)


def every(sites, letters):
    """Codes of all sequences."""
    return torch.tensor(list(itertools.product(range(letters), repeat=sites)))


def hot(codes, letters, dtype=torch.float64):
    return torch.nn.functional.one_hot(codes, letters).to(dtype)


def law(energy):
    """All sequences, and their probabilities."""
    sites, letters = energy.field.shape
    codes = every(sites, letters)
    return codes, (-energy(hot(codes, letters, energy.field.dtype))).softmax(0)


def drawn(energy, n, seed=1):
    codes, p = law(energy)
    return codes[torch.multinomial(p, n, True, generator=torch.Generator().manual_seed(seed))]


def alignment(energy, n, seed=1):
    codes = drawn(energy, n, seed)
    names = tuple(f"s{i}" for i in range(n))
    return Alignment(ALPHABET[: energy.field.shape[1]], names, codes, torch.ones(n))
