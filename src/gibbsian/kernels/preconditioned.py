r"""Langevin steps whose length follows each coordinate's gradients, as RMSprop's do.

.. math:: V' = \alpha V + (1 - \alpha)\, g^2, \qquad G = \frac{1}{\epsilon + \sqrt{V}}, \qquad
   x' = x - h\, G g + \sqrt{2 h G}\, z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import (
    Info,
    State,
    check_carried,
    choose,
    evaluate,
    is_finite,
    per_chain,
    settings_repr,
    with_origin,
)
from gibbsian.kernels.langevin import check_positive
from gibbsian.kernels.scales import over_chains
from gibbsian.kernels.stochastic import check_energy, check_rows, estimated, normals_and_rows, unadjusted
from gibbsian.typing import EnergyFn, Scalar


@dataclass(frozen=True)
class PSGLD:
    r"""Langevin dynamics preconditioned as RMSprop is, by a running average of squared gradients.

    A diffusion whose preconditioner depends on x has the target for its law only with one more term in the drift,
    :math:`\Gamma_i = \partial G_{ii} / \partial x_i`, which needs second derivatives. Like the paper's algorithm in
    practice, this kernel leaves it out, and its law is wrong by more than the bias of a finite step. With a fixed
    ``decay`` smaller steps make it worse: the average then follows the gradient, chains dwell where it is steep, and in
    one dimension their law tends to :math:`e^{-E} (\epsilon + |E'|)`. It is right, up to the finite step, when the
    average runs over many times what a chain takes to forget where it was, :math:`1 / (1 - \alpha)` steps: then G is a
    constant in effect, as in ``ULA(scale=...)``. On a standard normal the variance came out as 1.12 with the default
    decay at h = 0.05 and 1.33 at h = 0.01, and as 1.035 with a decay of 0.999 at h = 0.05, where a constant G gives
    1.026.

    G is a root's inverse, so it evens scales out by half: a coordinate of standard deviation s forgets in about s / h
    steps, where without preconditioning it takes :math:`s^2 / h`.

    V starts from the squared gradient at the start, plus that of its change over a displacement by h, which tells the
    curvature where the gradient vanishes: chains may start at a mode. It is the mean over the chains, and each chain's
    own from there.

    `Preconditioned stochastic gradient Langevin dynamics for deep neural networks (Li, Chen, Carlson & Carin, 2016)
    <https://arxiv.org/abs/1512.07666>`_. There V averages the squares of the mean gradient over N rows, here those of
    the energy's own: h is N times the paper's half step, and ``eps`` N times its lambda.

    Parameters
    ----------
    step_size
        h, in units of x, well below the smallest standard deviation.
    rows, batch_size
        As for `SGLD`; ``None`` both for whole gradients, of any energy.
    decay
        alpha, the share of V that a step keeps; from 0 to below 1.
    eps
        Added to the root of V, in nats per unit of x: bounds the steps where gradients vanish.

    Raises
    ------
    OptionError
        If a setting is out of its range.
    """

    step_size: Scalar
    rows: int | None = None
    batch_size: int | None = None
    decay: Scalar = 0.99
    eps: Scalar = 1e-5

    gradients = 1
    domain = "real"
    adjusted = False
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        check_positive("eps", self.eps)
        check_rows(self.rows, self.batch_size)
        if isinstance(self.decay, (int, float)) and not 0.0 <= self.decay < 1.0:
            raise OptionError(
                f"decay is the share of an average that a step keeps, from 0 to below 1; got {self.decay}."
            )

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate the full energy at the start, and next to it; all chains share the first average."""
        check_energy(self, energy)
        value, grad = evaluate(energy, x)
        change = evaluate(energy, x + over_chains(self.step_size, x))[1] - grad
        # Next to a chain there may be a wall; the others' change is enough.
        squared = grad.square() + torch.where(torch.isfinite(change), change, 0.0).square()
        shared = squared.mean(0, keepdim=True).expand_as(grad).clone()
        return with_origin(State(x, value, grad, memory=(shared,)))

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Standard normals of the shape of x, and with minibatches the numbers of rows, ``(steps, 1, batch_size)``."""
        check_carried(self, state, origin=3, memory=1)
        return normals_and_rows(self, state, steps, rng)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One Euler step, and the gradient where it leads taken into the average."""
        (squared,), h = state.memory, over_chains(self.step_size, state.x)
        length = h / (self.eps + squared.sqrt())
        x = state.x - length * state.grad + (2.0 * length).sqrt() * noise[0]
        value, grad = evaluate(estimated(self, energy, noise), x)
        after = self.decay * squared + (1.0 - self.decay) * grad * grad
        # A square that overflows has left the numbers too: the chain could never move again.
        finite = is_finite(value, after)
        start, there, slope = state.origin
        kept = choose(finite, State(x, value, grad), State(start, there, slope, state.origin))
        after = torch.where(per_chain(finite, after), after, squared)
        return kept._replace(memory=(after,)), unadjusted(kept, ~finite)
