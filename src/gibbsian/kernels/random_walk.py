r"""Random-walk Metropolis: a normal step to anywhere, accepted by the energy alone.

.. math:: x' = x + \sigma L z, \qquad z \sim N(0, I), \qquad \alpha = \min\{1, e^{E(x) - E(x')}\}.

The proposal is symmetric, so no proposal density enters the ratio, and no gradient is ever asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from gibbsian.kernels.base import Info, State, check_carried, energy_only, metropolis, settings_repr
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.normals import normals_and_uniforms
from gibbsian.kernels.scales import check_scale, over_chains, stretch
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class RandomWalk:
    """Random-walk Metropolis with normal proposals; for energies that cannot be differentiated, or need not be.

    In d dimensions it takes of the order of d steps to move by the size of the target, where MALA takes the cube root
    of d and HMC the fourth root.

    `Equation of state calculations by fast computing machines (Metropolis et al., 1953)
    <https://doi.org/10.1063/1.1699114>`_; the best acceptance is 0.234 in many dimensions, by `Weak convergence and
    optimal scaling of random walk Metropolis algorithms (Roberts, Gelman & Gilks, 1997)
    <https://doi.org/10.1214/aoap/1034625254>`_, where the step size is 2.38 standard deviations over the root of d.

    Parameters
    ----------
    step_size
        Standard deviation of a proposal's coordinate, in units of x (a pure number when there is a scale); one, or one
        per chain ``(n,)``.
    scale
        Lengths of the target: standard deviations of the event's shape, or a lower triangular factor ``(d, d)`` of its
        covariance; the step is then taken where the target is round. ``None`` for all 1.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    scale: Tensor | None = None

    gradients = 1  # One energy, which stands for a gradient where work is counted.
    domain = "real"
    target_acceptance = 0.234
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_scale(self.scale)

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the energy at the start."""
        check_scale(self.scale, x)
        return energy_only(energy, x)

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x, then one uniform number per chain."""
        check_carried(self, state, grad=False)
        return normals_and_uniforms(steps, state.x, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Propose, and accept with the ratio of densities."""
        z, uniform = noise
        new = energy_only(energy, state.x + stretch(self.scale, over_chains(self.step_size, z) * z))
        # Another kernel's gradient would be wrong after a move, so it is not carried on.
        old = State(state.x, state.energy, new.grad)
        return metropolis(old, new, old.energy - new.energy, uniform)
