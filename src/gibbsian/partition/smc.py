r"""Sequential Monte Carlo: weighted draws of a target and its log Z, by carrying populations there from a base.

See `population` for the walk. What a population of n particles gains on its way,

.. math:: \hat Z = \prod_t \frac{1}{n} \sum_i W_{t-1}^i w_t^i , \qquad \textstyle\sum_i W^i = n,

has :math:`E[\hat Z] = Z` when temperatures and step sizes are set beforehand. When they are found by the particles
themselves the estimate is consistent, with a bias that vanishes as 1 / n, and no bound that holds for certain can be
had from it. Several populations tell the error: their estimates are independent but for those common settings.

`Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, 2006)
<https://doi.org/10.1111/j.1467-9868.2006.00553.x>`_; `On the convergence of adaptive sequential Monte Carlo methods
(Beskos, Jasra, Kantas & Thiery, 2016) <https://arxiv.org/abs/1306.6462>`_ for what adaptation costs.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel, has_step_size
from gibbsian.partition.annealed import settle
from gibbsian.partition.base import LogZ, from_log_weights
from gibbsian.partition.paths import Path
from gibbsian.partition.population import Walk, systematic, walk
from gibbsian.partition.schedule import Schedule


class Particles(NamedTuple):
    """What `smc` returns: weighted draws of the target, log Z, and how the walk went.

    Attributes
    ----------
    x
        Particles, ``(n, *event)``, population by population.
    log_weights
        ``(n,)``, float64; the mean of their exponentials is the estimate of Z. Weigh averages with them, or `draw`.
    log_z
        The estimate of log Z. Its ``chains`` are the populations, its ``stderr`` comes from the differences between
        them, and ``lower`` is minus infinity unless the schedule was given.
    schedule
        Temperatures and step sizes, found or given. A second run that is given it is unbiased.
    acceptance
        Mean acceptance of the moves at each temperature after the first, ``(J,)``.
    ess
        Effective number of particles on arrival at each of these temperatures, before resampling, ``(J,)``.
    nonfinite
        Weights, over all stages, that came from a non-finite energy and count as zero.
    """

    x: Tensor
    log_weights: Tensor
    log_z: LogZ
    schedule: Schedule
    acceptance: Tensor
    ess: Tensor
    nonfinite: int = 0

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points of equal weight from the particles, by systematic resampling; some may occur repeatedly.

        Parameters
        ----------
        n
            How many.
        rng
            The generator, on the particles' device.
        """
        return self.x[systematic(self.log_weights, rng, n)]


@torch.no_grad()
def smc(
    energy: Energy,
    base: Tractable,
    *,
    rng: Generator,
    kernel: Kernel | None = None,
    chains: int = 2048,
    populations: int = 16,
    moves: int = 5,
    path: Path | None = None,
    schedule: Schedule | None = None,
    spare: float = 0.9,
    resample: float = 0.5,
    confidence: float = 0.99,
    lanes: int | None = None,
) -> Particles:
    """Draw from an energy and estimate its log Z by sequential Monte Carlo from a base.

    Parameters
    ----------
    energy
        What to draw from.
    base
        Where the particles start; it should be at least as wide as the energy's density.
    rng
        The generator, on the base's device.
    kernel
        How particles move at each temperature: one that leaves the density invariant. Its ``step_size``, where it has
        one, is the first guess. ``None`` for HMC with five leapfrog steps.
    chains
        Particles in all.
    populations
        Equal parts of them that are resampled apart, two or more; their number should leave each a hundred particles.
    moves
        Kernel steps at each temperature.
    path
        From base to energy; geometric when ``None``.
    schedule
        Temperatures and step sizes to keep to, of an earlier run or a `pilot`; found on the way when ``None``.
    spare
        The conditional effective size, as a fraction, that a stage leaves: nearer to 1 means more stages.
    resample
        A population is resampled when its effective size falls to this fraction of it; 1 for at every stage.
    confidence
        Probability with which ``log_z.lower`` is below log Z when a schedule is given.
    lanes
        Equal shares of the populations, each with random numbers of its own, among the processes of a job. They find
        temperatures and step sizes together, and what is returned, complete on every process, does not depend on how
        many there are. All arguments, ``rng``'s state too, are the same everywhere.

    Raises
    ------
    OptionError, DomainError, ArgumentTypeError, DivergenceError
        If an argument does not fit or no energy is finite; the message says what to try.
    """
    kernel, path = settle(energy, base, kernel, path)
    if populations < 2 or chains % populations or chains < 2 * populations:
        raise OptionError(
            f"chains is a multiple of populations, which are 2 or more with 2 or more particles each; got "
            f"chains={chains} and populations={populations}."
        )
    if moves < 1:
        raise OptionError(f"moves counts the kernel's steps at each temperature, 1 or more; got {moves}.")
    if not (0.0 < spare < 1.0 and 0.0 < resample <= 1.0):
        raise OptionError(
            f"spare lies strictly between 0 and 1, and resample above 0, 1 at most; got {spare} and {resample}."
        )
    at = walk(
        path,
        base,
        kernel,
        rng,
        chains=chains,
        moves=moves,
        populations=populations,
        spare=spare,
        resample=resample,
        betas=None if schedule is None else schedule.betas,
        step_sizes=None if schedule is None else _sizes(schedule),
        lanes=lanes,
    )
    log_z = from_log_weights(at.log_z, confidence)
    if schedule is None:
        log_z = log_z._replace(lower=torch.full_like(log_z.value, -torch.inf))
        schedule = _found(at, has_step_size(kernel))
    if float(log_z.ess) < 0.5 * populations:
        warnings.warn(
            f"The populations disagree: their estimates of log Z, {float(at.log_z.min()):.3g} to "
            f"{float(at.log_z.max()):.3g}, count for {float(log_z.ess):.1f} of {populations}. Try more particles, "
            "spare nearer to 1, more moves, or a kernel that moves farther.",
            RuntimeWarning,
            stacklevel=2,
        )
    log_weights = (at.log_w + at.log_z[:, None]).flatten()
    acceptance, ess = (torch.tensor(v, dtype=torch.float64) for v in (at.acceptance, at.ess))
    return Particles(at.x, log_weights, log_z, schedule, acceptance, ess, int(at.nonfinite.sum()))


def _found(at: Walk, adapted: bool) -> Schedule:
    logs = torch.tensor(at.log_sizes[1:-1], dtype=torch.float64)
    return Schedule(torch.tensor(at.betas, dtype=torch.float64), logs.exp() if adapted else None)


def _sizes(schedule: Schedule) -> Tensor | None:
    """A step size for each temperature after the first; the target's is that of the last one before it."""
    inner = schedule.step_sizes
    return None if inner is None or not inner.numel() else torch.cat((inner, inner[-1:]))
