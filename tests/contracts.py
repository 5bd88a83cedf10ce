r"""What every kernel must satisfy, as functions that raise ``AssertionError`` with the number that went wrong.

**Invariance.** Chains that start as exact draws must still be exact draws after a few steps. The Kolmogorov-Smirnov
distance D of n independent values from their exact law obeys :math:`P(\sqrt{n} D > t) \le 2 e^{-2 t^2}` at every n
(`The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality (Massart, 1990)
<https://doi.org/10.1214/aop/1176990746>`_), so ``KS_LIMIT = 3.1`` gives a false alarm in 1 of 10^8 comparisons; and a
kernel that shifts some probability by more than :math:`(3.1 + 1.4) / \sqrt{n}`, 0.02 with the 50,000 chains used here,
is caught with probability 0.96 or more.

**Reversibility.** For a kernel in detailed balance (x_0, x_1) and (x_1, x_0) have one law. With u and w the exact
cumulative probabilities of a projection of the two, :math:`w^2 u - u^2 w` has mean zero; being bounded, its mean over
chains is normal to all purposes, and ``Z_LIMIT = 6`` gives a false alarm in 2 of 10^9.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

import gibbsian as gb
from gibbsian.kernels.base import Kernel, State, map_state, with_step_size

CHAINS = 50_000
KS_LIMIT = 3.1
Z_LIMIT = 6.0


@dataclass(frozen=True)
class ExactTarget:
    """An energy with exact draws, and real functions of a point whose law under it is known exactly."""

    name: str
    energy: gb.Energy
    draw: Callable[[int, Generator], Tensor]
    projections: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]

    def __repr__(self) -> str:
        return self.name


def seeded(seed: int = 0) -> Generator:
    """Make a generator."""
    return torch.Generator().manual_seed(seed)


def normal_cdf(x: Tensor) -> Tensor:
    """Standard normal distribution function."""
    return torch.special.ndtr(x)


def correlated_gaussian() -> ExactTarget:
    """Symmetric, two-dimensional, correlation 0.5 and scales 1 and 0.8; the energy has an exponential law."""
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.64]], dtype=torch.float64)
    energy = gb.Gaussian(covariance=covariance)
    projections: dict = {}
    for direction in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -2.0)):
        a = torch.tensor(direction, dtype=torch.float64)
        spread = float((a @ covariance @ a).sqrt())
        projections[f"x.{direction}"] = (lambda x, a=a: x @ a, lambda v, s=spread: normal_cdf(v / s))
    projections["energy"] = (energy, lambda v, c=energy.log_normalizer: 1.0 - torch.exp(-(v - c)))
    return ExactTarget("correlated_gaussian", energy, energy.sample, projections)


def log_exponential() -> ExactTarget:
    """Asymmetric: logarithms of exponential variables, E(x) = exp(x) - x, steep on one side and flat on the other."""

    def energy(x: Tensor) -> Tensor:
        return (x.exp() - x).sum(1)

    def draw(n: int, rng: Generator) -> Tensor:
        u = torch.rand((n, 2), generator=rng, dtype=torch.float64)
        return (-torch.log1p(-u)).clamp(min=1e-300).log()

    projections: dict = {f"x{i}": (lambda x, i=i: x[:, i], lambda v: -torch.expm1(-v.exp())) for i in range(2)}
    # A ratio of two exponentials: the difference of the coordinates is logistic.
    projections["x0-x1"] = (lambda x: x[:, 0] - x[:, 1], torch.sigmoid)
    return ExactTarget("log_exponential", gb.Energy.of(energy, (2,)), draw, projections)


def two_modes() -> ExactTarget:
    """Asymmetric and multimodal: 0.3 N(-2, 0.5^2) + 0.7 N(1, 1)."""
    parts = [gb.Gaussian(loc=torch.tensor([m], dtype=torch.float64), scale=s) for m, s in ((-2.0, 0.5), (1.0, 1.0))]
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def draw(n: int, rng: Generator) -> Tensor:
        second = torch.rand((n, 1), generator=rng, dtype=torch.float64) >= 0.3
        return torch.where(second, parts[1].sample(n, rng), parts[0].sample(n, rng))

    def cdf(v: Tensor) -> Tensor:
        return 0.3 * normal_cdf((v + 2.0) / 0.5) + 0.7 * normal_cdf(v - 1.0)

    return ExactTarget("two_modes", gb.mixture(*parts, weights=weights), draw, {"x": (lambda x: x[:, 0], cdf)})


TARGETS = (correlated_gaussian(), log_exponential(), two_modes())


def ks(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    r"""Kolmogorov-Smirnov distance from an exact law, times :math:`\sqrt n`."""
    n = len(values)
    exact = cdf(values.sort().values)
    above = torch.arange(1, n + 1, dtype=exact.dtype) / n
    return float(torch.maximum(above - exact, exact - above + 1.0 / n).max()) * math.sqrt(n)


def assert_invariant(kernel: Kernel, target: ExactTarget, steps: int = 4, seed: int = 1) -> None:
    """Exact draws are exact draws after some steps, and the chains have moved."""
    rng = seeded(seed)
    start = target.draw(CHAINS, rng)
    out = gb.sample(target.energy, kernel, start, steps=steps, rng=rng)
    assert float((out.x != start).any(1).double().mean()) > 0.5, "most chains stayed: the test would see nothing"
    for name, (project, cdf) in target.projections.items():
        distance = ks(project(out.x), cdf)
        assert distance < KS_LIMIT, f"{kernel} on {target}: sqrt(n) D = {distance:.2f} for {name}"


def assert_reversible(kernel: Kernel, target: ExactTarget, seed: int = 2) -> None:
    """One step from exact draws looks the same backwards."""
    rng = seeded(seed)
    start = target.draw(CHAINS, rng)
    out = gb.sample(target.energy, kernel, start, steps=1, rng=rng)
    for name, (project, cdf) in target.projections.items():
        u, w = cdf(project(start)), cdf(project(out.x))
        odd = w * w * u - u * u * w
        z = float(odd.mean() / (odd.std() / math.sqrt(CHAINS)))
        assert abs(z) < Z_LIMIT, f"{kernel} on {target}: z = {z:.1f} for {name}"


def assert_continues(kernel: Kernel, energy: gb.Energy, start: Tensor) -> None:
    """Thirty-seven steps are thirteen and twenty-four, to the bit, wherever the blocks end."""
    whole = gb.sample(energy, kernel, start, steps=37, rng=seeded(3), thin=1)
    rng = seeded(3)
    first = gb.sample(energy, kernel, start, steps=13, rng=rng, thin=1)
    second = gb.sample(energy, kernel, first.state, steps=24, rng=rng, thin=1)
    for a, b in zip(tensors_of(whole.state), tensors_of(second.state)):
        assert torch.equal(a, b)
    assert torch.equal(whole.draws, torch.cat((first.draws, second.draws)))
    assert torch.equal(whole.nonfinite, first.nonfinite + second.nonfinite)
    torch.testing.assert_close(whole.acceptance * 37, first.acceptance * 13 + second.acceptance * 24)


def assert_state_is_current(kernel: Kernel, energy: gb.Energy, start: Tensor) -> None:
    """The cached energy and gradient belong to the positions, for chains that moved and chains that did not."""
    state = gb.sample(energy, kernel, start, steps=7, rng=seeded(4)).state
    value, grad = gb.evaluate(energy, state.x)
    torch.testing.assert_close(state.energy, value, rtol=0, atol=1e-12)
    if state.grad.numel():
        torch.testing.assert_close(state.grad, grad, rtol=0, atol=1e-12)


def assert_leaves_inputs_alone(kernel: Kernel, energy: gb.Energy, start: Tensor) -> None:
    """Neither the start nor a state that is passed back is written to; no graph is left behind."""
    kept = start.clone()
    first = gb.sample(energy, kernel, start, steps=3, rng=seeded(5))
    before = map_state(torch.clone, first.state)
    out = gb.sample(energy, kernel, first.state, steps=3, rng=seeded(6))
    assert torch.equal(start, kept)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(before), tensors_of(first.state)))
    assert not any(t.requires_grad for t in tensors_of(out.state))
    assert all(p.grad is None for p in energy.parameters())


def tensors_of(state: State) -> list[Tensor]:
    """Every tensor of a state."""
    return [*state[:3], *state.origin, *state.momentum, *state.memory]


def assert_one_graph(kernel: Kernel, energy: gb.Energy, start: Tensor, graphs: Callable[[], int]) -> None:
    """Compiled steps are the eager ones, in one graph, which serves other step sizes and longer runs too.

    ``graphs`` is the fixture of that name, which traces with Dynamo and runs the trace as it is.
    """
    energy = copy.deepcopy(energy)  # Graphs live as long as their energy, and others may have used this one.
    graphs()
    eager, compiled = (
        gb.sample(energy, kernel, start, steps=20, rng=seeded(1), thin=1, compile=compile) for compile in (False, True)
    )
    assert graphs() == 1
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled.acceptance, eager.acceptance, rtol=0, atol=1e-12)
    if hasattr(kernel, "step_size"):
        kernel = with_step_size(kernel, 0.9 * kernel.step_size)
    gb.sample(energy, kernel, compiled.state, steps=16, rng=seeded(2), thin=1, compile=True)
    assert graphs() == 0


def assert_flat_memory(kernel: Kernel, energy: gb.Energy, start: Tensor) -> None:
    """The number of tensors alive does not grow with the steps made."""
    alive: list[int] = []

    def count(made: int) -> None:
        alive.append(sum(type(o) is Tensor for o in gc.get_objects()))

    gb.sample(energy, kernel, start, steps=60, rng=seeded(7), progress=count)
    assert len(alive) >= 6
    # Noise is drawn for some blocks at once, so that it goes up and down.
    half = len(alive) // 2
    assert max(alive[half:]) <= max(alive[:half]), f"tensors alive after each block: {alive}"
    assert min(alive[half:]) <= min(alive[:half]), f"tensors alive after each block: {alive}"
