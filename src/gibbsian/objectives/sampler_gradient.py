r"""The gradient through the sampler: how the last steps of the chains depend on the parameters, and a KL term of it.

Where chains stop, :math:`x_K`, depends on the energy's parameters through every step. Contrastive divergence holds it
fixed. `Improved contrastive divergence training of energy-based models (Du et al., 2021)
<https://arxiv.org/abs/2012.01316>`_ adds to its loss the divergence of the chains' density q from the model's,

.. math:: KL(q_\theta \| p) = \mathbb{E}_{q_\theta}[E(x_K)] - H(q_\theta) + \log Z,

with the parameters of E and Z held fixed, so that only :math:`x_K` moves: the energy is to be one on which its own
sampler gets far. The entropy is that of `nearest_neighbour_entropy`.

The sign is the paper's, and that of its code. It is a regularisation: the contrastive divergence itself,
:math:`KL(p_{data} \| p) - KL(q_\theta \| p)`, has this gradient with the opposite sign as its third term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel, State, is_adjusted, row_sum
from gibbsian.objectives.entropy import nearest_neighbour_entropy
from gibbsian.sampling import begin, sample, with_tensor_settings


@dataclass(frozen=True)
class SamplerKL:
    r"""Settings of the KL term through the sampler.

    .. math:: w \, \bigl( \overline{E(x_K)} - w_H \hat H(x_K) \bigr), \qquad \theta \text{ held fixed in } E

    Parameters
    ----------
    weight
        w of the term in the loss.
    steps
        How many of the last steps of a chain are differentiated; each keeps the graph of a gradient.
    neighbours
        k of the entropy's nearest neighbours. In one or two dimensions take several: the gradient goes with 1/r, which
        has no variance unless k times the dimension exceeds 2.
    references
        How many past samples, drawn from the buffer, a chain is compared with; without a buffer it is the other chains
        of the round, all of them.
    entropy_weight
        :math:`w_H`. 1 is the divergence, in nats. The paper's entropy lacks the factor of d, the number of coordinates,
        and its code weighs it by 0.3: that is 0.3 / d. 0 leaves it out.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    weight: float = 1.0
    steps: int = 1
    neighbours: int = 1
    references: int = 1000
    entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "entropy_weight"):
            if not 0.0 <= (value := getattr(self, name)) < float("inf"):
                raise OptionError(f"{name} of the KL term is 0 or more; got {value}.")
        for name in ("steps", "neighbours", "references"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise OptionError(f"{name} of the KL term counts from 1; got {value!r}.")
        if self.neighbours >= self.references:
            raise OptionError(
                f"The KL term seeks the {self.neighbours}. neighbour among {self.references} references; take more."
            )


class Round(NamedTuple):
    """What a round of chains made.

    Attributes
    ----------
    state
        Where the chains stand, with a graph behind it if their last steps are differentiated.
    acceptance
        Mean probability over the steps, ``(n,)``.
    nonfinite
        Steps that were not finite, ``(n,)``.
    """

    state: State
    acceptance: Tensor
    nonfinite: Tensor


def run_chains(
    energy: Energy, kernel: Kernel, start: Tensor, steps: int, rng: Generator, compile: bool, recorded: int = 0
) -> Round:
    """Run chains, the last steps so that they can be differentiated in the energy's parameters.

    A chain that leaves the numbers in one of those returns to its origin as elsewhere; but if steps follow, their
    derivative is not finite, and nor is that of the loss.

    Parameters
    ----------
    energy, kernel, start, steps, rng, compile
        As in `gibbsian.sample`.
    recorded
        How many of the last steps.

    Raises
    ------
    OptionError
        If the energy supplies its gradient from outside of torch, which ends every derivative.
    """
    state: Tensor | State = start
    n = len(start)
    acceptance, nonfinite = start.new_zeros(n), start.new_zeros(n)
    if steps > recorded:
        if compile:
            state = begin(energy, with_tensor_settings(kernel, start), start, compile)
        run = sample(energy, kernel, state, steps=steps - recorded, rng=rng, compile=compile)
        state, acceptance, nonfinite = run.state, run.acceptance * (steps - recorded), run.nonfinite
    if not recorded:
        assert isinstance(state, State)
        return Round(state, acceptance / steps, nonfinite)
    with torch.enable_grad():
        moving = with_tensor_settings(kernel, start)
        place = state if isinstance(state, Tensor) else state.x
        here = moving.init(energy, place.detach().requires_grad_(True))
        if not here.grad.requires_grad:
            raise OptionError(
                f"The KL term differentiates the energy's gradient, and {energy!r} gives one that depends on nothing; "
                "gradients from outside of torch cannot be differentiated: leave kl=None."
            )
        now = state._replace(x=here.x, energy=here.energy, grad=here.grad) if isinstance(state, State) else here
        noise = moving.noise(now, recorded, rng)
        for i in range(recorded):
            now, info = moving.step(energy, now, tuple(z[i] for z in noise))
            acceptance, nonfinite = acceptance + info.acceptance.detach(), nonfinite + info.nonfinite.detach()
    return Round(now, acceptance / steps, nonfinite)


def sampler_kl(state: State, reference: Tensor, same: Tensor, kl: SamplerKL) -> tuple[Tensor, Tensor]:
    """The KL term without its log Z, and the entropy in it, detached; 0-d tensors, in nats.

    Parameters
    ----------
    state
        Where the chains stand, recorded.
    reference
        Past samples, ``(m, *event)``, held fixed.
    same
        Which reference is a chain's own past, ``(n, m)``.
    kl
        The settings.
    """
    # Worth E(x_K), with its slope in x alone: the state holds energy and gradient, and both are held fixed.
    energy = state.energy.detach() + row_sum(state.grad.detach() * (state.x - state.x.detach()))
    entropy = nearest_neighbour_entropy(state.x, reference.detach(), kl.neighbours, same)
    value = energy.mean() - kl.entropy_weight * entropy if kl.entropy_weight else energy.mean()
    return kl.weight * value, entropy.detach()


def check_differentiable(kernel: Kernel, steps: int, kl: SamplerKL) -> None:
    """Refuse kernels whose steps have no derivative, and more differentiated steps than there are.

    Raises
    ------
    OptionError
        With the kernel's name and what would do.
    """
    if not getattr(kernel, "differentiable", False):
        why = "accepts or rejects, which has no derivative" if is_adjusted(kernel) else "has steps without a derivative"
        raise OptionError(
            f"The KL term differentiates the last steps of the chains, and {type(kernel).__name__} {why}; "
            "use ULA or Underdamped, or leave kl=None."
        )
    if kl.steps > steps:
        raise OptionError(f"The KL term cannot differentiate the last {kl.steps} steps of chains of {steps}.")
