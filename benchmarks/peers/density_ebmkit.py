"""Densities by ebmkit, with the settings of its README and examples."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import ebm
from density_harness import STEPS_README, main
from torch import Tensor, nn


def fitted(loss: nn.Module, rows: Tensor, steps: int = STEPS_README) -> Callable[[Tensor], Tensor]:
    """Train as the README does."""
    energy = ebm.nets.MLPEnergy(dim=2, hidden=(128, 128))
    ebm.Trainer(energy, loss, lr=1e-3).fit(rows, steps=steps, batch_size=256, verbose=False)
    return energy


def persistent(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """The README's first lines: persistent contrastive divergence, 60 Langevin steps, a buffer of 8192."""
    sampler = ebm.LangevinDynamics(step_size=1e-2, steps=60)
    return fitted(ebm.ContrastiveDivergence(sampler, buffer=ebm.ReplayBuffer(8192, (2,))), rows)


def denoising(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Denoising score matching at its default level."""
    return fitted(ebm.DenoisingScoreMatching(), rows)


def sliced(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Sliced score matching."""
    return fitted(ebm.SlicedScoreMatching(), rows)


def discrepancy(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Energy discrepancy at its defaults."""
    return fitted(ebm.EnergyDiscrepancy(), rows)


if __name__ == "__main__":
    methods = {"PCD": persistent, "DSM": denoising, "SSM": sliced, "energy discrepancy": discrepancy}
    main("ebmkit", version("ebmkit"), methods)
