"""The yardstick of objectives: its constants are right, exact likelihood passes it, and slips do not."""

import math

import pytest
import torch

import recovery
from gibbsian.objectives.base import Loss, Objective
from recovery import CASES, GAUSSIAN, QUARTIC, Smoothed, assert_recovered, estimates, seeded, slope


def log_mass(energy, dim):
    t = torch.linspace(-12.0, 12.0, 1201 if dim == 2 else 20_001, dtype=torch.float64)
    points = torch.cartesian_prod(t, t) if dim == 2 else t[:, None]
    return torch.logsumexp(-energy(points), 0) + dim * math.log(24.0 / (len(t) - 1))


class Likelihood(Objective):
    """The exact one, by quadrature."""

    def __init__(self, sign=1.0) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, energy, batch, rng):
        return Loss(energy(batch.x).mean() + self.sign * log_mass(energy, 1))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_constants_are_those_of_quadrature(case):
    with torch.no_grad():
        found = log_mass(case.at_truth(), case.rows(1, seeded()).shape[1])
    assert float(found) == pytest.approx(case.log_z, abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_draws_have_the_scores_mean_zero(case):
    """The gradient of the log-likelihood vanishes at the truth, within 6 standard errors."""
    energy, x = case.at_truth(), case.rows(100_000, seeded(3))
    halves = torch.linspace(-12.0, 12.0, 601 if x.shape[1] == 2 else 20_001, dtype=torch.float64)
    grid = torch.cartesian_prod(halves, halves) if x.shape[1] == 2 else halves[:, None]
    each = torch.func.jacfwd(lambda p: torch.func.functional_call(energy, p, (x[:20_000],)))(
        dict(energy.named_parameters())
    )
    total = torch.logsumexp(-energy(grid), 0)
    expected = torch.autograd.grad(-total, list(energy.parameters()))
    for name, want in zip(each, expected):
        g = each[name].flatten(1)
        z = (g.mean(0) - want.flatten()) / (g.std(0) / len(g) ** 0.5)
        assert float(z.detach().abs().max()) < 6, name


def test_exact_likelihood_recovers_at_the_square_root_rate():
    def scatter(n):
        return estimates(Likelihood, QUARTIC, n, replicates=16)

    assert_recovered(estimates(Likelihood, QUARTIC, 2000), QUARTIC.truth, 0.2)
    assert slope(scatter, QUARTIC.truth) == pytest.approx(-0.5, abs=0.2)


def test_slips_are_caught(monkeypatch):
    found = estimates(lambda: Likelihood(), QUARTIC, 2000)
    for wrong in (torch.tensor(QUARTIC.truth) + torch.tensor([0.1, 0.0, 0.0]), -torch.tensor(QUARTIC.truth)):
        with pytest.raises(AssertionError, match="missed"):
            assert_recovered(found, wrong, 0.2)
    with pytest.raises(AssertionError, match="no power"):
        assert_recovered(found, QUARTIC.truth, 1e-3)
    monkeypatch.setattr(recovery, "_QUARTIC", (0.5, -0.3, -1.2))
    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(estimates(Likelihood, QUARTIC, 2000), QUARTIC.truth, 0.2)


def test_smoothed_energies_are_those_of_noised_rows():
    """A Gaussian of variance v becomes one of v + sigma^2."""

    def gauss(x):
        return 0.5 * x[:, 0].square() / 0.5

    from gibbsian import Energy

    smooth = Smoothed(Energy.of(gauss), 0.4)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    got = smooth(x) - smooth(torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(got, 0.5 * x[:, 0].square() / (0.5 + 0.16), rtol=1e-6, atol=1e-8)
    assert GAUSSIAN.rows(5, seeded()).shape == (5, 2)
