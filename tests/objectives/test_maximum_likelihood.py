"""Maximum likelihood of flows: closed forms, noise on lattices, and discrete data refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.flows import Flow, spline_flow
from gibbsian.energies.neural import MLP
from gibbsian.energies.toys import TwoMoons
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.objectives.augment import UniformNoise
from gibbsian.objectives.augmented import Augmented
from gibbsian.objectives.base import Batch
from gibbsian.objectives.flow_contrastive import FlowContrastiveEstimation
from gibbsian.objectives.maximum_likelihood import MaximumLikelihood
from gibbsian.training.fit import fit

pytest.importorskip("zuko")

D = torch.float64


class Normal(nn.Module):
    """Independent Gaussians."""

    def __init__(self, d=2):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(d, dtype=D)), nn.Parameter(torch.zeros(d, dtype=D))

    def forward(self):
        return torch.distributions.Independent(torch.distributions.Normal(self.loc, self.log_scale.exp()), 1)


def check_gradient(flip: float = 1.0) -> None:
    """At mean and standard deviation of the rows the gradient vanishes, elsewhere it is the Gaussian's."""
    law = Normal()
    x = torch.tensor([1.0, -2.0], dtype=D) + 1.7 * torch.randn((40, 2), generator=seeded(), dtype=D)
    with torch.no_grad():
        law.loc.copy_(flip * x.mean(0) - 0.3)
        law.log_scale.copy_(x.std(0, unbiased=False).log())
    loss = MaximumLikelihood()(Flow(law), Batch(x), seeded())
    slope, scale_slope = torch.autograd.grad(loss.value, [law.loc, law.log_scale])
    variance = x.var(0, unbiased=False)
    assert torch.allclose(slope, -0.3 / variance, atol=1e-12), "missed: loc"
    assert torch.allclose(scale_slope, -(0.3**2) / variance, atol=1e-12), "missed: scale"
    expected = (0.5 * math.log(2 * math.pi) + law.log_scale + 0.5 + 0.5 * 0.3**2 / variance).sum()
    assert torch.allclose(loss.value, expected, atol=1e-12)
    assert torch.equal(loss.metrics["nll"], loss.value.detach())


def test_the_gradient_is_that_of_a_gaussian():
    check_gradient()
    with pytest.raises(AssertionError, match="missed: loc"):
        check_gradient(flip=-1.0)


def check_noise() -> None:
    """The mean energy of a standard normal over cells of width w about x is x^2/2 + w^2/24, and a constant."""
    w, n = 1.2, 100_000
    x = torch.full((n, 1), 0.7, dtype=D)
    objective, flow = Augmented(MaximumLikelihood(), UniformNoise(w)), Flow(Normal(1))
    found = float(objective(flow, Batch(x), seeded()).metrics["nll"])
    expected = 0.5 * 0.7**2 + w**2 / 24 + 0.5 * math.log(2 * math.pi)
    # The energy's standard deviation over a cell is below 0.3.
    assert abs(found - expected) < 6 * 0.3 / math.sqrt(n), f"missed: {found} for {expected}"


def test_noise_fills_the_cells(monkeypatch):
    check_noise()
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: rand(*a, **k) + 0.5)
    with pytest.raises(AssertionError, match="missed"):
        check_noise()


@pytest.mark.slow
def test_noise_bounds_the_probabilities_of_values():
    """Three values of known frequencies: the flow's mass in each cell is near them, the bound below the truth."""
    p = torch.tensor([0.2, 0.5, 0.3])
    x = torch.multinomial(p, 3000, replacement=True, generator=seeded()).float().unsqueeze(1)
    torch.manual_seed(0)
    flow = spline_flow(1, transforms=2, bins=16).calibrate(x)
    fit(
        flow,
        x,
        Augmented(MaximumLikelihood(), UniformNoise(1.0)),
        rng=seeded(),
        steps=600,
        learning_rate=1e-2,
        batch_size=256,
    )
    frequencies = torch.stack([(x == k).float().mean() for k in range(3)])
    entropy = -float((frequencies * frequencies.log()).sum())
    cells = torch.linspace(-0.5, 2.5, 3001)[:-1].unsqueeze(1) + 0.0005
    mass = (-flow(cells)).exp().detach().view(3, 1000).mean(1)
    assert float((mass - frequencies).abs().max()) < 0.05
    nll = float(Augmented(MaximumLikelihood(), UniformNoise(1.0))(flow, Batch(x), seeded(1)).metrics["nll"])
    assert entropy - 0.02 < nll < entropy + 0.25


def test_the_moons_are_learned_by_fit():
    moons = TwoMoons()
    x, held = moons.sample(2000, seeded()), moons.sample(2000, seeded(1))
    torch.manual_seed(0)
    flow = spline_flow(2, transforms=2, hidden=(32, 32)).calibrate(x)
    before = float((flow(held) - moons(held)).mean().detach())
    run = fit(flow, x, MaximumLikelihood(), rng=seeded(), steps=150, learning_rate=1e-2, batch_size=256)
    assert run.events == []
    after = float((flow(held) - moons(held)).mean().detach())
    assert 0.0 < after < 0.35 * before, f"{before} to {after}"
    assert run.history[-1]["nll"] == run.history[-1]["loss"]


class Coins(Tractable):
    """Tractable, on bits, and learns."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size((2,))
        self.support = gb.Bernoulli(torch.zeros(2)).support
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return (torch.nn.functional.softplus(self.logits) - self.logits * x).sum(1)

    def sample(self, n, rng):
        return torch.bernoulli(self.logits.detach().sigmoid().expand(n, 2), generator=rng)


def test_bits_with_an_energy_on_bits_are_welcome():
    x = torch.bernoulli(torch.tensor([0.2, 0.7]).expand(400, 2), generator=seeded())
    coins = Coins()
    fit(coins, x, MaximumLikelihood(), rng=seeded(), steps=300, learning_rate=5e-2, batch_size=400, ema_decay=0.0)
    torch.testing.assert_close(coins.logits.detach().sigmoid(), x.mean(0), rtol=0, atol=0.01)
    with pytest.raises(DomainError, match="lie outside the energy's domain"):
        Augmented(MaximumLikelihood(), UniformNoise(1.0))(coins, Batch(x), seeded())


def greys(levels, n=400, d=3):
    return torch.randint(levels, (n, d), generator=seeded()).float() / (levels - 1)


DISCRETE = {
    "bits": torch.bernoulli(torch.full((64, 3), 0.5), generator=seeded()),
    "a few bits": torch.bernoulli(torch.full((4, 3), 0.5), generator=seeded()),
    "sixteen greys": greys(17),
    "one class column": torch.cat((torch.randn((64, 2), generator=seeded()), greys(2, 64, 1)), 1),
    "whole numbers": torch.randint(10**6, (10, 3), generator=seeded()).float(),
}


@pytest.mark.parametrize("case", DISCRETE)
def test_a_flow_on_discrete_data_is_refused(case):
    torch.manual_seed(0)
    flow, x = spline_flow(3, transforms=1, hidden=(8,)), DISCRETE[case]
    with pytest.raises(DomainError, match=r"of 3 coordinates of the data are discrete.*UniformNoise\(step\)"):
        fit(flow, x, MaximumLikelihood(), rng=seeded(), steps=2)
    if float(x.std(0).min()) > 0:
        flow.calibrate(x)
        with pytest.raises(DomainError, match="are discrete"):
            fit(MLP(3, hidden=(8,)) + gb.Gaussian(3), x, FlowContrastiveEstimation(flow), rng=seeded(), steps=2)
        fit(flow, x, Augmented(MaximumLikelihood(), UniformNoise(0.1)), rng=seeded(), steps=2)


def test_rounded_measurements_are_not_discrete():
    x = torch.randn((128, 3), generator=seeded()).mul(100).round() / 100
    flow = spline_flow(3, transforms=1, hidden=(8,))
    assert torch.equal(MaximumLikelihood()(flow, Batch(x), seeded()).value, flow(x).mean())


def test_what_does_not_fit_is_refused():
    x = torch.randn((8, 2), generator=seeded())
    with pytest.raises(ArgumentTypeError, match="tractable energy"):
        MaximumLikelihood()(MLP(2), Batch(x), seeded())
    with pytest.raises(ArgumentTypeError, match="floating-point"):
        MaximumLikelihood()(spline_flow(2), Batch(x.long()), seeded())
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(OptionError, match="positive step"):
            UniformNoise(step)
    assert "width=0.5" in repr(Augmented(MaximumLikelihood(), UniformNoise(0.5)))
    with pytest.raises(ArgumentTypeError, match="before an objective sees them"):
        Augmented(MLP(2), UniformNoise(0.5))
    with pytest.raises(ArgumentTypeError, match="function"):
        Augmented(MaximumLikelihood(), UniformNoise)
