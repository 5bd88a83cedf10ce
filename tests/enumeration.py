"""Discrete systems small enough to list: their states, laws, and the transition matrices of kernels in closed form.

The formulas here are written over pairs of states, from the energies and gradients of all of them, and share no code
with the kernels. ``matrix_of`` finds a kernel's own matrix by integrating one step over its noise: a deterministic,
low-discrepancy rule in the place of random numbers, and the acceptance as the kernel reports it. It is good to four
digits where a step draws one or two numbers, and to two or three where it draws many.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import gibbsian as gb
from contracts import seeded
from gibbsian.kernels.base import Kernel, evaluate


@dataclass(frozen=True)
class System:
    """An energy with all of its states, ``(m, *event)``."""

    name: str
    energy: gb.Energy
    states: Tensor
    hot: bool

    @property
    def law(self) -> Tensor:
        return (-self.energy(self.states)).softmax(0)

    @property
    def sites(self) -> int:
        return (self.states.shape[1:-1] if self.hot else self.states.shape[1:]).numel()

    def by_site(self) -> Tensor:
        """Every state as ``(m, sites, K)``, K = 1 when binary."""
        return self.states.reshape(len(self.states), self.sites, -1)

    def index(self, x: Tensor) -> Tensor:
        """Number of each state, ``(n,)``."""
        code = x.reshape(len(x), self.sites, -1)
        digit, base = (code.argmax(2), code.shape[2]) if self.hot else (code.squeeze(2).long(), 2)
        return (digit * base ** torch.arange(self.sites).flip(0)).sum(1)

    def __repr__(self) -> str:
        return self.name


def binary_system(shape: tuple[int, ...] = (2, 2), seed: int = 0) -> System:
    """Random fields, pairs, one triple, and a bounded nonlinear part, so that gradients mislead a little."""
    d, rng = torch.Size(shape).numel(), seeded(seed)
    field, pairs, inner = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((d,), (d, d), (d, 3)))

    def energy(x: Tensor) -> Tensor:
        v = x.flatten(1)
        return (
            v @ field + 0.5 * ((v @ pairs) * v).sum(1) - 1.2 * v[:, 0] * v[:, 1] * v[:, 2] + (v @ inner).tanh().sum(1)
        )

    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)), dtype=torch.float64).view(-1, *shape)
    return System(f"binary{d}", gb.Energy.of(energy, shape, constraints.boolean), states, False)


def one_hot_system(sites: int = 3, classes: int = 3, seed: int = 0) -> System:
    """Random fields and pairs, and a cubic part."""
    d, rng = sites * classes, seeded(seed)
    field, pairs, inner = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((d,), (d, d), (d,)))

    def energy(x: Tensor) -> Tensor:
        v = x.flatten(1)
        return v @ field + 0.25 * ((v @ pairs) * v).sum(1) + 0.1 * (v @ inner) ** 3

    labels = torch.tensor(list(itertools.product(range(classes), repeat=sites)))
    states = torch.nn.functional.one_hot(labels, classes).double()
    return System(
        f"one_hot{sites}x{classes}", gb.Energy.of(energy, (sites, classes), constraints.one_hot), states, True
    )


def differing(system: System) -> Tensor:
    """Which sites differ between two states, ``(m, m, sites)``."""
    x = system.by_site()
    return (x.unsqueeze(1) != x.unsqueeze(0)).any(3)


def first_order(system: System) -> Tensor:
    """Change of the log-density from state i to state j by the gradient at i, ``(m, m)``."""
    _, grad = evaluate(system.energy, system.states)
    x, g = system.states.flatten(1), grad.flatten(1)
    return (g * x).sum(1, keepdim=True) - g @ x.T


def acceptance(proposal: Tensor, law: Tensor) -> Tensor:
    """Metropolis-Hastings probabilities of acceptance, ``(m, m)``."""
    flux = law.unsqueeze(1) * proposal
    return torch.where(flux > 0, (flux.T / flux).clamp(max=1.0), 0.0)


def adjusted(proposal: Tensor, law: Tensor) -> Tensor:
    """Transition matrix of a proposal with accept/reject."""
    return _closed(proposal * acceptance(proposal, law))


def _closed(moves: Tensor) -> Tensor:
    moves = moves - moves.diagonal().diag()
    return moves + (1.0 - moves.sum(1)).diag()


def gradient_proposal(system: System) -> Tensor:
    """Neighbours, weighed by half their first-order change."""
    near = differing(system).sum(2) == 1
    return torch.where(near, 0.5 * first_order(system), -torch.inf).softmax(1)


def langevin_proposal(system: System, alpha: float) -> Tensor:
    """A softmax over all states, which is the product of those over the sites."""
    x = system.states.flatten(1)
    return (0.5 * first_order(system) - torch.cdist(x, x).square() / (2.0 * alpha)).softmax(1)


def path_auxiliary(system: System, length: int) -> Tensor:
    """Sum over all orders of the sites in which two states differ."""
    apart, law, d = differing(system), system.law, first_order(system)
    weight = torch.where(apart.sum(2) == 1, (0.5 * d).exp(), 0.0)
    # Weight of all changes of one site, and of the change of one site from i towards j.
    whole = torch.einsum("ij,ijs->is", weight, apart.double())
    x, m = system.by_site(), len(law)
    moves = torch.zeros(m, m, dtype=torch.float64)

    def change(i: int, j: int, s: int) -> float:
        y = x[i].clone()
        y[s] = x[j, s]
        return float(weight[i, int((x == y).all((1, 2)).nonzero())])

    def probability(i: int, j: int, order: tuple[int, ...]) -> float:
        left, out = float(whole[i].sum()), 1.0
        for s in order:
            out *= change(i, j, s) / left
            left -= float(whole[i, s])
        return out

    for i, j in itertools.product(range(m), repeat=2):
        sites = apart[i, j].nonzero().flatten().tolist()
        if not 1 <= len(sites) <= 2 * length - 1:
            continue
        for order in itertools.permutations(sites):
            there, back = probability(i, j, order), probability(j, i, order[::-1])
            accept = min(1.0, float(law[j]) * back / (float(law[i]) * there))
            moves[i, j] += there * accept / (2 * length - 1)
    return _closed(moves)


def block_update(system: System, sites: list[int]) -> Tensor:
    """Draw some sites jointly from their law given the rest."""
    rest = [s for s in range(system.sites) if s not in sites]
    same = ~differing(system)[:, :, rest].any(2)
    joint = torch.where(same, system.law, 0.0)
    return joint / joint.sum(1, keepdim=True)


def single_site(system: System) -> Tensor:
    """Draw one site, chosen at random, from its law given the rest."""
    return torch.stack([block_update(system, [s]) for s in range(system.sites)]).mean(0)


def matrix_of(kernel: Kernel, system: System, points: int = 2**13, decides: bool = True) -> Tensor:
    """Transition matrix of one step, by integration over the noise; ``decides`` if the last noise is for accepting."""
    m, rng = len(system.states), seeded()
    start = kernel.init(system.energy, system.states)
    shapes = [tuple(z.shape[2:]) for z in kernel.noise(start, 1, rng)]
    drawn = shapes[:-1] if decides else shapes
    sizes = [torch.Size(s).numel() for s in drawn]
    u = torch.quasirandom.SobolEngine(sum(sizes), scramble=True, seed=0).draw(points, dtype=torch.float64)
    noise = [part.reshape(points, *shape).repeat(m, *[1] * len(shape)) for part, shape in zip(u.split(sizes, 1), drawn)]
    if decides:
        noise.append(torch.zeros(points * m, *shapes[-1], dtype=torch.float64))
    x = system.states.repeat_interleave(points, 0)
    new, info = kernel.step(system.energy, kernel.init(system.energy, x), tuple(noise))
    p = info.acceptance if decides else torch.ones(len(x), dtype=torch.float64)
    here = torch.arange(m).repeat_interleave(points)
    moves = torch.zeros(m, m, dtype=torch.float64)
    moves.index_put_((here, system.index(new.x)), p, accumulate=True)
    moves.index_put_((here, here), 1.0 - p, accumulate=True)
    return moves / points


def imbalance(matrix: Tensor, law: Tensor) -> float:
    """Largest difference between the flux from i to j and that from j to i."""
    flux = law.unsqueeze(1) * matrix
    return float((flux - flux.T).abs().max())


def fit_p_value(counts: Tensor, law: Tensor) -> float:
    """Chi-square p-value of counts of states; those of probability 0 must not occur, rare ones are put together."""
    if bool((counts[law < 1e-15] > 0).any()):
        return 0.0
    due = law * counts.sum()
    large = due >= 10.0
    seen = torch.cat((counts[large], counts[~large].sum().reshape(1)))
    expected = torch.cat((due[large], due[~large].sum().reshape(1)))
    if float(expected[-1]) < 10.0:
        seen[0], expected[0] = seen[0] + seen[-1], expected[0] + expected[-1]
        seen, expected = seen[:-1], expected[:-1]
    if len(seen) < 2:
        return 1.0
    return float(stats.chi2.sf(float(((seen - expected) ** 2 / expected).sum()), len(seen) - 1))


def counts_of(system: System, x: Tensor) -> Tensor:
    """How often each state occurs, ``(m,)``."""
    return torch.bincount(system.index(x), minlength=len(system.states)).double()


def assert_transitions(
    kernel: Kernel, system: System, matrix: Tensor, chains: int = 2**13, limit: float = 1e-8
) -> None:
    """Chains of `sample` leave every state as the matrix says; a false alarm in one of 1e8 rows."""
    m = len(system.states)
    out = gb.sample(system.energy, kernel, system.states.repeat_interleave(chains, 0), steps=1, rng=seeded(1))
    for i, x in enumerate(out.x.split(chains)):
        p = fit_p_value(counts_of(system, x), matrix[i])
        assert p > limit, f"{kernel} on {system}: p = {p:.1e} from state {i} of {m}"


def assert_keeps_law(
    kernel: Kernel, system: System, chains: int = 200_000, steps: int = 3, limit: float = 1e-8
) -> None:
    """Exact draws are exact draws after some steps, and have moved."""
    rng, law = seeded(2), system.law
    start = system.states[torch.multinomial(law, chains, replacement=True, generator=rng)]
    out = gb.sample(system.energy, kernel, start, steps=steps, rng=rng)
    assert float((out.x != start).flatten(1).any(1).double().mean()) > 0.1, "most chains stayed: nothing would be seen"
    p = fit_p_value(counts_of(system, out.x), law)
    assert p > limit, f"{kernel} on {system}: p = {p:.1e}"
