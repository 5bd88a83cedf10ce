"""What a composition's walk down the noise levels returns."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.applications.normalisable import Growth
from gibbsian.energies.tractable import Tractable
from gibbsian.kernels.base import Kernel
from gibbsian.partition.base import LogZ, from_log_weights
from gibbsian.partition.population import Walk, systematic


class Composed(NamedTuple):
    """What `compose` returns: weighted draws of a composition, and how the walk went.

    Attributes
    ----------
    x
        Particles, ``(n, *event)``, population by population.
    log_weights
        ``(n,)``, float64; zeros without weights. Weigh averages with them, or `draw`.
    levels
        The noise levels, from the highest.
    acceptance
        Mean acceptance of the moves at each, ``(levels,)``; NaN without moves, 1 for kernels that reject nothing.
    ess
        Effective number of particles on arrival at each, before resampling, ``(levels,)``.
    step_sizes
        The step size with which each level was left, ``(levels,)``; NaN for a kernel without one.
    noise
        The noise of each step down, c above, ``(levels - 1,)``.
    log_z
        The estimate of the log-normaliser of the composition at the last level; ``None`` without weights, or with a
        kernel that is not adjusted. Its error comes from the differences between populations.
    correction
        ``"weights and moves"``, ``"weights"``, ``"moves"``, or ``"none"``, with the reason where a kernel spoils it.
    start
        Where the particles started.
    temperatures
        Temperatures between the start and the highest level: 1 where the start is close.
    growth
        How the energy of a difference grows far away, at the level where it grows least; ``None`` where nothing is
        subtracted.
    nonfinite
        Weights that came from a non-finite energy and count as zero.
    """

    x: Tensor
    log_weights: Tensor
    levels: tuple[float, ...]
    acceptance: Tensor
    ess: Tensor
    step_sizes: Tensor
    noise: Tensor
    log_z: LogZ | None
    correction: str
    start: Tractable | None = None
    temperatures: int = 1
    growth: Growth | None = None
    nonfinite: int = 0

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points of equal weight, by systematic resampling; some may occur repeatedly.

        Parameters
        ----------
        n
            How many.
        rng
            The generator, on the particles' device.
        """
        return self.x[systematic(self.log_weights, rng, n)]

    def __repr__(self) -> str:
        """A few lines of what happened."""
        n, worst = len(self.x), int(self.ess.argmin())
        told = [
            f"Composed: {n} points of shape {tuple(self.x.shape[1:])}, {len(self.levels)} noise levels from "
            f"{self.levels[0]:.4g} to {self.levels[-1]:.4g}",
            f"  corrected by {self.correction}",
        ]
        if self.correction.startswith("weights"):
            told.append(
                f"  effective number {float(self.ess[-1]):.0f} on arrival at the last level, at least "
                f"{float(self.ess[worst]):.0f} (level {self.levels[worst]:.3g})"
            )
        rates = self.acceptance[~self.acceptance.isnan()]
        if len(rates):
            told.append(f"  acceptance {float(rates.mean()):.2f}, lowest {float(rates.min()):.2f}")
        if self.log_z is not None:
            told.append(f"  log Z = {self.log_z}")
        if self.growth is not None and not self.growth.normalisable:
            told.append("  probably not normalisable")
        return "\n".join(told)


def correction_of(weights: bool, steps: int, kernel: Kernel | None = None, exact: bool = True) -> str:
    """Say what corrects a walk.

    Parameters
    ----------
    weights
        Whether particles are weighted.
    steps, kernel
        How many steps of which kernel move them at each level.
    exact
        Whether all kernels leave densities invariant.
    """
    if steps and not exact:
        return f"none ({type(kernel).__name__} is not adjusted: uncorrected)"
    return {(True, True): "weights and moves", (True, False): "weights", (False, True): "moves"}.get(
        (weights, steps > 0), "none"
    )


def log_z_of(at: Walk) -> LogZ:
    """Estimate log Z from the populations at the end of a walk; warn if they disagree."""
    populations = len(at.log_z)
    if populations == 1:
        value = at.log_z[0]
        unknown, infinite = torch.full_like(value, torch.nan), torch.full_like(value, torch.inf)
        return LogZ(value, unknown, -infinite, infinite, torch.ones_like(value), 1)
    log_z = from_log_weights(at.log_z)
    if float(log_z.ess) < 0.5 * populations:
        warnings.warn(
            f"The populations disagree: their estimates of log Z, {float(at.log_z.min()):.3g} to "
            f"{float(at.log_z.max()):.3g}, count for {float(log_z.ess):.1f} of {populations}. Try more chains, more "
            "levels, or more steps at each.",
            RuntimeWarning,
            stacklevel=4,
        )
    # Noise and step sizes were found by the particles themselves, and no bound holds for certain.
    return log_z._replace(lower=torch.full_like(log_z.value, -torch.inf))
