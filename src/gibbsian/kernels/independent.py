r"""Independent Metropolis-Hastings: proposals that do not depend on where the chain stands.

With x' drawn from a density q, and the importance weight :math:`w(x) = e^{-E(x)} / q(x)`,

.. math:: \alpha = \min\{1, w(x') / w(x)\} .

A q close to the target moves the chain anywhere in one step, whatever lies between; where q is too thin, the chain
stays long once it is there, and the rate of convergence is :math:`1 - 1 / \max w` (with w of mean 1).

**With random weights.** Where q(x) is an integral, and an estimate :math:`\hat q` of it comes with each draw such that
:math:`E[1 / \hat q \mid x] = 1 / q(x)`, the chain that keeps the estimate of where it stands is exact all the same: its
law over points and estimates has the target as its margin. `The pseudo-marginal approach for efficient Monte Carlo
computations (Andrieu & Roberts, 2009) <https://doi.org/10.1214/07-AOS574>`_.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, DomainError, ShapeError
from gibbsian.kernels.base import Info, State, check_carried, energy_only, metropolis, settings_repr
from gibbsian.typing import EnergyFn


@runtime_checkable
class IndependentProposal(Protocol):
    """A density that can be drawn from: ``proposal(x)`` is -log q(x), as of a tractable energy.

    One whose -log q is a random estimate has a method ``propose(n, rng)`` too, which gives draws and their estimates.
    """

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points, ``(n, *event)``."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return -log q(x) in nats, ``(n, *event) -> (n,)``."""
        ...


@dataclass(frozen=True)
class IndependentMH:
    """Metropolis-Hastings with proposals from a density of their own: a flow, a Gaussian, a mixture.

    `Monte Carlo sampling methods using Markov chains and their applications (Hastings, 1970)
    <https://doi.org/10.1093/biomet/57.1.97>`_; its rate of convergence is in `Rates of convergence of the Hastings and
    Metropolis algorithms (Mengersen & Tweedie, 1996) <https://doi.org/10.1214/aos/1033066201>`_.

    Proposals and their densities are noise: they are drawn ahead of a step, and the energy is the only thing that a
    step evaluates. The acceptance is not steered: it says how good the proposal is.

    Parameters
    ----------
    proposal
        Has ``sample(n, rng)`` and is -log q as a function, as every tractable energy; one with the whole mass of the
        target under it. A `GeneratorProposal` brings estimates of its density, and the chain is exact with these.

    Raises
    ------
    ArgumentTypeError
        If the proposal has no draws or no density.
    """

    proposal: Any

    gradients = 1  # One energy, which stands for a gradient where work is counted.
    domain = ("real", "box", "torus", "sphere", "boolean", "one_hot")
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        if isinstance(self.proposal, type) or not isinstance(self.proposal, IndependentProposal):
            raise ArgumentTypeError(
                "The proposal of IndependentMH draws points with sample(n, rng) and is -log q(x) when called, as "
                f"Gaussian(2) and Flow are; got {self.proposal!r}. A generator without noise has draws and no density: "
                "GeneratorProposal gives it one."
            )

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the energy and the proposal's density at the start.

        Raises
        ------
        ShapeError
            If the proposal draws points of another shape.
        DomainError
            If one of proposal and energy is discrete and the other is not, or chains start outside of the proposal.
        """
        shape = getattr(self.proposal, "event_shape", None)
        if shape is not None and tuple(shape) != tuple(x.shape[1:]):
            raise ShapeError(
                f"The proposal draws points of shape {tuple(shape)}, and the chains are at points of shape "
                f"{tuple(x.shape[1:])}; build it for these."
            )
        supports = [getattr(of, "support", None) for of in (self.proposal, energy)]
        discrete = [bool(getattr(support, "is_discrete", False)) for support in supports]
        if supports[1] is not None and discrete[0] != discrete[1]:
            raise DomainError(
                f"The proposal draws from {supports[0]} and the energy lives on {supports[1]}; propose from where the "
                "energy lives: Bernoulli or Categorical for discrete states, Gaussian or a Flow for real ones."
            )
        cost = self.proposal(x).detach().to(x.dtype)
        # Where q is 0 the importance weight is infinite, and a chain would never leave.
        if not torch.compiler.is_compiling() and (out := int((~torch.isfinite(cost)).sum())):
            raise DomainError(
                f"{out} of {len(x)} chains start where the proposal has no density, and would stay there; start them "
                "at draws of it: proposal.sample(n, rng)."
            )
        return energy_only(energy, x)._replace(memory=(cost,))

    @torch.no_grad()
    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Proposals ``(steps, n, *event)``, their -log q ``(steps, n)``, and one uniform number per chain."""
        check_carried(self, state, grad=False, memory=1)
        x, n = state.x, len(state.x)
        points, costs, uniforms = [], [], []
        for _ in range(steps):
            drawn, cost = proposed(self.proposal, n, rng)
            points.append(drawn.to(x.dtype))
            costs.append(cost.to(x.dtype))
            uniforms.append(torch.rand(n, generator=rng, dtype=x.dtype, device=x.device))
        return torch.stack(points), torch.stack(costs), torch.stack(uniforms)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Propose, and accept with the ratio of importance weights."""
        x, cost, uniform = noise
        (here,) = state.memory
        new = energy_only(energy, x)
        old = State(state.x, state.energy, new.grad, memory=state.memory)
        log_ratio = (old.energy - here) - (new.energy - cost)
        kept, info = metropolis(old, new, log_ratio, uniform)
        accepted = uniform < info.acceptance
        return kept._replace(memory=(torch.where(accepted, cost, here),)), info


def proposed(proposal: Any, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Draw ``n`` points, with -log q or the estimate of it that comes with each draw, ``(n,)``."""
    if hasattr(proposal, "propose"):
        return proposal.propose(n, rng)
    x = cast(IndependentProposal, proposal).sample(n, rng)
    return x, proposal(x)
