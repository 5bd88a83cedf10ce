"""Force matching recovers potentials, also from forces that scatter around their mean, whatever law the rows follow."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

from gibbsian.energies.base import Energy
from gibbsian.energies.invariant import InvariantNetwork
from gibbsian.energies.periodic import PeriodicMLP, VonMisesMixture
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch
from gibbsian.objectives.force_matching import ForceMatching
from gibbsian.training.fit import fit

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Quadratic(Energy):
    """x' A x / 2 - b x with free A and b."""

    event_shape = torch.Size((2,))

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.eye(2, dtype=F64))
        self.b = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x):
        return 0.5 * ((x @ (self.a + self.a.T)) * x).sum(1) * 0.5 - x @ self.b


TRUE_A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=F64)
TRUE_B = torch.tensor([0.5, -1.0], dtype=F64)


def noisy(n, seed, spread=1.0):
    """Rows of no particular law with instantaneous forces around the mean force."""
    x = 4.0 * torch.rand(n, 2, generator=rng(seed), dtype=F64) - 2.0
    mean = TRUE_B - x @ TRUE_A
    return Batch(x, {"forces": mean + spread * torch.randn(n, 2, generator=rng(seed + 1), dtype=F64)})


def solved(batch, objective=None):
    energy = Quadratic()
    optimizer = torch.optim.LBFGS(energy.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (objective or ForceMatching())(energy, batch, rng()).value
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.cat(((0.5 * (energy.a + energy.a.T) - TRUE_A).flatten(), energy.b - TRUE_B)).detach()


def test_parameters_are_recovered_and_their_errors_fall_as_the_root_of_the_rows():
    few = torch.stack([solved(noisy(200, 10 * s)) for s in range(16)])
    many = torch.stack([solved(noisy(3200, 10 * s)) for s in range(16)])
    z = many.mean(0) / (many.std(0) / 4.0)
    assert float(z.abs().max()) < 5
    assert 2.5 < float(few.square().mean().sqrt() / many.square().mean().sqrt()) < 6.5


def test_forces_of_the_wrong_sign_are_caught():
    batch = noisy(800, 0)
    twin = Batch(batch.x, {"forces": -batch.context["forces"]})
    assert float(solved(twin).abs().max()) > 1.0


def test_value_and_metrics():
    batch = noisy(500, 3, spread=0.0)
    energy = Quadratic()
    loss = ForceMatching()(energy, batch, rng())
    error = batch.x @ torch.eye(2, dtype=F64) + batch.context["forces"]
    assert float(loss.value) == pytest.approx(float(0.5 * error.square().sum(1).mean()))
    assert float(loss.metrics["force_rms"]) == pytest.approx(float(error.square().mean().sqrt()))
    with torch.no_grad():
        assert float(ForceMatching()(energy, batch, rng()).value) == pytest.approx(float(loss.value))


def test_a_network_learns_a_density_of_torsions_from_forces_of_uniform_rows():
    truth = VonMisesMixture(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), 3.0, torch.tensor([0.7, 0.3]))
    x = (2 * math.pi * torch.rand(4000, 2, generator=rng()) - math.pi).requires_grad_()
    (slope,) = torch.autograd.grad(truth(x).sum(), x)
    torch.manual_seed(0)
    net = PeriodicMLP(2, (48, 48), harmonics=3)
    fit(net, Batch(x.detach(), {"forces": -slope}), ForceMatching(), rng=rng(1), steps=500, learning_rate=6e-3)
    with torch.no_grad():
        y = truth.sample(4000, rng(5))
        gap = net(y) - truth(y)
    # The masses of both modes are right, for uniform rows lead from one to the other.
    assert float(gap.std()) < 0.1


def test_an_invariant_network_learns_the_forces_of_a_cluster():
    """Four atoms with Morse potentials, two of another kind."""

    def cluster(x):
        total = 0.0
        for i in range(4):
            for j in range(i):
                r = torch.linalg.vector_norm(x[:, i] - x[:, j], dim=1)
                rest = 0.35 if (i < 2) == (j < 2) else 0.25
                total = total + 4.0 * (1.0 - torch.exp(-6.0 * (r - rest))).square()
        return total

    corners = 0.21 * torch.tensor([[0.0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    x = (corners + 0.03 * torch.randn(1200, 4, 3, generator=rng())).requires_grad_()
    (slope,) = torch.autograd.grad(cluster(x).sum(), x)
    x, f = x.detach(), -slope
    torch.manual_seed(0)
    net = InvariantNetwork([0, 0, 1, 1], features=24, layers=1, basis=16, cutoff=0.7)
    fit(
        net,
        Batch(x[:1000], {"forces": f[:1000]}),
        ForceMatching(),
        rng=rng(1),
        steps=500,
        batch_size=64,
        learning_rate=5e-3,
    )
    held = Batch(x[1000:], {"forces": f[1000:]})
    told = ForceMatching()(net, held, rng()).metrics
    assert float(told["force_rms"]) < 0.2 * float(told["force_scale"])


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        (Batch(torch.zeros(4, 2, dtype=F64)), OptionError, 'needs the forces.*"forces": forces / kT'),
        (Batch(torch.zeros(4, 2, dtype=F64), {"forces": torch.zeros(4, 3)}), ShapeError, r"\(4, 2\); got \(4, 3\)"),
        (Batch(torch.zeros(4, 2, dtype=torch.int64), {"forces": torch.zeros(4, 2)}), ArgumentTypeError, "floating"),
    ],
)
def test_what_does_not_fit_is_refused(batch, error, words):
    with pytest.raises(error, match=words):
        ForceMatching()(Quadratic(), batch, rng())


def test_discrete_states_have_no_forces():
    energy = Energy.of(lambda x: x.sum(1), support=constraints.boolean)
    with pytest.raises(DomainError, match="follows gradients"):
        ForceMatching()(energy, Batch(torch.zeros(4, 2), {"forces": torch.zeros(4, 2)}), rng())
