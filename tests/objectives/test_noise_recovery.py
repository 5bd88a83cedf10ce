"""Binary, ranking and conditional noise contrastive estimation: known models are recovered, and slips are caught.

Unless stated otherwise a test compares a mean over independent batches or data sets with its expectation in units of
its standard error, and raises a false alarm less than once in 1e6.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.objectives import noise_contrastive
from gibbsian.objectives.base import Batch, Loss
from gibbsian.objectives.conditional_noise import BitFlips, ClassChanges, ConditionalNCE
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation, RankingNCE, energies, evaluated
from recovery import CASES, GAUSSIAN, QUARTIC, assert_recovered, estimates, flat, minimise, seeded, slope

D = torch.float64
BATCHES, T = 60, 6.5
"""A t statistic with 59 degrees of freedom exceeds 6.5 once in 5e7."""


def noise_for(case):
    """A Gaussian half again as wide as the data."""
    x = case.rows(4000, seeded(99))
    return Gaussian(loc=x.mean(0), scale=1.5 * x.std(0))


METHODS = {
    "binary": lambda case: NoiseContrastiveEstimation(noise_for(case), 2),
    "ranking": lambda case: RankingNCE(noise_for(case), 4),
    "conditional": lambda case: ConditionalNCE(1.0, 4),
}


def drop_log_q(objective):
    """The twin that forgets the density of the noise."""
    objective.noise.register_forward_hook(lambda module, inputs, value: torch.zeros_like(value))
    return objective


def drift(x, rng):
    """A perturbation that goes one way more than the other."""
    return x + 0.3 + torch.randn(x.shape, generator=rng, dtype=x.dtype)


class LeftOut(RankingNCE):
    """The twin that leaves the datum out of the softmax's sum."""

    def forward(self, energy, batch, rng):
        values, costs = evaluated(self, energy, batch, self.draws, rng)
        scores = (costs - values).view(self.draws + 1, -1)
        return Loss((torch.logsumexp(scores[1:], 0) - scores[0]).mean(), energies(values, len(batch)))


TWINS = {
    "binary without log q": lambda case: drop_log_q(NoiseContrastiveEstimation(noise_for(case), 2)),
    "ranking without log q": lambda case: drop_log_q(RankingNCE(noise_for(case), 4)),
    "ranking without the datum": lambda case: LeftOut(noise_for(case), 4),
    "conditional, not symmetric": lambda case: ConditionalNCE(drift, 4),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_known_models_are_recovered(case, method):
    kept = []

    def make():
        kept.append(METHODS[method](case))
        return kept[-1]

    assert_recovered(estimates(make, case, 2000), case.truth, 0.2)
    if method == "binary":
        assert_recovered(torch.stack([o.log_z.detach().view(1) for o in kept]), (case.log_z,), 0.1)


@pytest.mark.parametrize("twin", TWINS)
def test_a_slip_misses_the_parameters(twin):
    with pytest.raises(AssertionError, match=r"missed|no power"):
        assert_recovered(estimates(lambda: TWINS[twin](GAUSSIAN), GAUSSIAN, 2000, 12), GAUSSIAN.truth, 0.2)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_as_the_square_root_of_the_rows(method):
    """The slope's own standard error, with 24 replicates of five parameters, is about 0.03."""
    sizes = (250, 1000, 4000)
    found = slope(lambda n: estimates(lambda: METHODS[method](GAUSSIAN), GAUSSIAN, n), GAUSSIAN.truth, sizes)
    assert found == pytest.approx(-0.5, abs=0.2)


def gradients(objective, energy, rows, n=500, batches=BATCHES):
    """The gradient of independent batches, ``(batches, k)``."""
    params = [p for p in (*energy.parameters(), *objective.parameters()) if p.requires_grad]
    rng, found = seeded(5), []
    for seed in range(batches):
        value = objective(energy, Batch(rows(n, seeded(100 + seed))), rng).value
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, params)]))
    return torch.stack(found)


def check_mean(found, expected, power=None) -> None:
    error = found.std(0) / len(found) ** 0.5
    gap = found.mean(0) - expected
    assert bool((gap.abs() < T * error + 1e-12).all()), f"missed: z = {(gap / error).tolist()}"
    if power is not None:
        assert float((expected / error).abs().max()) > power, "no power"


def check_truth(objective, case) -> None:
    if isinstance(objective, NoiseContrastiveEstimation):
        objective.log_z.data.fill_(case.log_z)
    check_mean(gradients(objective.double(), case.at_truth(), case.rows), 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_gradient_vanishes_at_the_truth(case, method):
    check_truth(METHODS[method](case), case)


@pytest.mark.parametrize("twin", TWINS)
def test_a_slip_moves_the_gradient_at_the_truth(twin):
    with pytest.raises(AssertionError, match="missed"):
        check_truth(TWINS[twin](GAUSSIAN), GAUSSIAN)


@pytest.mark.parametrize("make", [NoiseContrastiveEstimation, RankingNCE])
def test_with_much_noise_the_estimate_is_as_good_as_maximum_likelihoods(make):
    """The excess over maximum likelihood on the same data falls as the noise grows, to a tenth and below it."""
    mle = []
    for seed in range(24):
        x = GAUSSIAN.rows(500, seeded(seed))
        factor = torch.linalg.cholesky(torch.linalg.inv(x.T.cov(correction=0)))
        # The model's precision is L L' with L = (a0, 0; b, a1).
        mle.append(torch.stack((*x.mean(0), factor[0, 0].log(), factor[1, 1].log(), factor[1, 0])))
    mle = torch.stack(mle)
    excess = []
    for count in (1, 40):
        found = estimates(lambda: make(noise_for(GAUSSIAN), count), GAUSSIAN, 500)  # noqa: B023
        excess.append(float((found - mle).square().sum() / (mle - torch.tensor(GAUSSIAN.truth)).square().sum()))
    assert excess[1] < 0.1 * excess[0], excess
    assert excess[1] < 0.1


class Bits(Energy):
    """Fields and pairs of three bits."""

    support = constraints.boolean
    event_shape = torch.Size([3])

    def __init__(self, seed=1) -> None:
        super().__init__()
        self.coupling = nn.Parameter(torch.randn(3, 3, generator=seeded(seed), dtype=D))

    def forward(self, x):
        return -torch.einsum("ni,ij,nj->n", x, self.coupling, x)


STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=D)
LAW = (-Bits(4)(STATES)).softmax(0).detach()
BIT_NOISE = Bernoulli(probs=torch.tensor([0.4, 0.6, 0.5], dtype=D))


def bit_rows(n, rng):
    return STATES[torch.multinomial(LAW, n, replacement=True, generator=rng)]


def exact_binary(energy):
    q = (-BIT_NOISE(STATES)).exp()
    odds = -energy(STATES) - q.log() - 0.0 - math.log(3)
    return (LAW * softplus(-odds)).sum() + 3 * (q * softplus(odds)).sum()


def exact_ranking(energy):
    q, score = (-BIT_NOISE(STATES)).exp(), -energy(STATES) + BIT_NOISE(STATES)
    total = torch.logsumexp(torch.stack(torch.broadcast_tensors(score[:, None, None], score[:, None], score)), 0)
    return (LAW[:, None, None] * q[:, None] * q * (total - score[:, None, None])).sum()


def exact_conditional(energy):
    return sum(
        2 / 3 * (LAW * softplus(energy(STATES) - energy((STATES - turn).abs()))).sum() for turn in torch.eye(3, dtype=D)
    )


DISCRETE = {
    "binary": (lambda: NoiseContrastiveEstimation(BIT_NOISE, 3, learn_log_z=False), exact_binary),
    "ranking": (lambda: RankingNCE(BIT_NOISE, 2), exact_ranking),
    "conditional": (lambda: ConditionalNCE(BitFlips(), 2), exact_conditional),
}


def check_bits(make, exact) -> None:
    energy = Bits()
    expected = torch.autograd.grad(exact(energy), energy.coupling)[0].flatten()
    check_mean(gradients(make().double(), energy, bit_rows), expected, power=30)


@pytest.mark.parametrize("method", DISCRETE)
def test_on_bits_the_gradient_is_that_of_the_enumerated_loss(method):
    check_bits(*DISCRETE[method])


@pytest.mark.parametrize("method", DISCRETE)
def test_on_bits_the_expected_gradient_vanishes_at_the_data_law(method):
    """Consistency without Monte-Carlo error: at the law the loss is stationary, exactly."""
    energy = Bits(4)
    if method == "binary":
        shift = torch.logsumexp(-energy(STATES), 0).detach()
        grad = torch.autograd.grad(exact_binary(lambda x: energy(x) + shift), energy.coupling)[0]
    else:
        grad = torch.autograd.grad(DISCRETE[method][1](energy), energy.coupling)[0]
    assert float(grad.abs().max()) < 1e-12


def lopsided(x, rng):
    """Turns bits over, and zeros more often than ones: not symmetric."""
    return torch.where(torch.rand(x.shape, generator=rng, dtype=x.dtype) < 0.2 + 0.4 * (1 - x), 1 - x, x)


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        pytest.param(lambda: NoiseContrastiveEstimation(BIT_NOISE, 2, learn_log_z=False), exact_binary, id="ratio"),
        pytest.param(lambda: RankingNCE(BIT_NOISE, 3), exact_ranking, id="draws"),
        pytest.param(lambda: ConditionalNCE(BitFlips(2), 2), exact_conditional, id="flips"),
        pytest.param(lambda: ConditionalNCE(lopsided, 2), exact_conditional, id="lopsided"),
    ],
)
def test_on_bits_a_slip_is_caught(make, exact):
    with pytest.raises(AssertionError, match="missed"):
        check_bits(make, exact)


def test_a_forgotten_ratio_is_caught_on_bits(monkeypatch):
    monkeypatch.setattr(noise_contrastive, "math", type("Twin", (), {"log": staticmethod(lambda ratio: 0.0)}))
    with pytest.raises(AssertionError, match="missed"):
        check_bits(*DISCRETE["binary"])


def test_a_perturbation_that_is_not_symmetric_biases_the_law_of_bits():
    """At the data's law a symmetric change of bits leaves no gradient, a lopsided one does."""
    energy = Bits(4)
    check_mean(gradients(ConditionalNCE(BitFlips(), 2), energy, bit_rows), 0.0)
    with pytest.raises(AssertionError, match="missed"):
        check_mean(gradients(ConditionalNCE(lopsided, 2), energy, bit_rows), 0.0)


class Classes(Energy):
    """Two sites of three classes, with a coupling for each pair of them."""

    support = constraints.one_hot

    def __init__(self) -> None:
        super().__init__()
        self.coupling = torch.nn.Parameter(torch.randn(3, 3, generator=seeded(5), dtype=D))

    def forward(self, x):
        return torch.einsum("na,ab,nb->n", x[:, 0], self.coupling, x[:, 1])


def class_rows(n, rng):
    law = (-Classes().coupling.detach()).flatten().softmax(0)
    label = torch.multinomial(law, n, replacement=True, generator=rng)
    return torch.nn.functional.one_hot(torch.stack((label // 3, label % 3), 1), 3).to(D)


def cyclic(x, rng):
    """The class after goes to one site of each row: not symmetric, as there are three."""
    site = torch.randint(0, 2, (len(x), 1, 1), generator=rng)
    return torch.where(torch.arange(2)[:, None] == site, x.roll(1, -1), x)


def test_at_the_law_of_classes_symmetric_changes_leave_no_gradient():
    check_mean(gradients(ConditionalNCE(ClassChanges(), 2), Classes(), class_rows), 0.0)
    with pytest.raises(AssertionError, match="missed"):
        check_mean(gradients(ConditionalNCE(cyclic, 2), Classes(), class_rows), 0.0)


def test_ranked_among_many_the_gradient_is_maximum_likelihoods():
    """The bias is of order 1/K, well below the Monte-Carlo error of these batches."""
    energy = Bits()
    exact = (LAW * energy(STATES)).sum() + torch.logsumexp(-energy(STATES), 0)
    expected = torch.autograd.grad(exact, energy.coupling)[0].flatten()
    check_mean(gradients(RankingNCE(BIT_NOISE, 2000), energy, bit_rows, n=100), expected, power=30)


def test_small_perturbations_give_exact_score_matching():
    """In one dimension with steps of plus and minus epsilon: no randomness, an error of order epsilon^2."""
    energy, x, eps = QUARTIC.model(), QUARTIC.rows(200, seeded(1)), 1e-3

    def steps(rows, rng):
        return rows + eps * torch.tensor([1.0, -1.0], dtype=D).repeat_interleave(len(rows) // 2)[:, None]

    value = ConditionalNCE(steps, 2)(energy, Batch(x), seeded()).value
    y = x.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    (curvature,) = torch.autograd.grad(score.sum(), y, create_graph=True)
    matching = (0.5 * score.square() - curvature).mean()
    assert (float(value.detach()) - 2 * math.log(2)) / (0.5 * eps**2) == pytest.approx(
        float(matching.detach()), rel=1e-4
    )
    found, expected = (torch.autograd.grad(v, list(energy.parameters())) for v in (value, matching))
    torch.testing.assert_close(
        torch.stack(found).flatten() * 2 / eps**2, torch.stack(expected).flatten(), rtol=1e-4, atol=1e-4
    )


class TwoWidths(Energy):
    """Normal densities of another width for each label, without constants: centre, log width, and its change with y."""

    context = ("y",)
    event_shape = torch.Size([1])

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, dtype=D))

    def forward(self, x, y):
        width = (self.theta[1] + self.theta[2] * y).exp()
        return 0.5 * ((x[:, 0] - self.theta[0]) / width).square()


WIDTHS = (0.3, -0.5, 0.8)


def widths(make):
    found = []
    for seed in range(24):
        rng = seeded(seed)
        y = torch.randint(2, (2000,), generator=rng).double()
        z = torch.randn((2000,), generator=rng, dtype=D)
        x = (WIDTHS[0] + (WIDTHS[1] + WIDTHS[2] * y).exp() * z)[:, None]
        energy = TwoWidths()
        minimise(make().double(), energy, Batch(x, {"y": y}), seed)
        found.append(flat(energy))
    return torch.stack(found)


def test_conditional_energies_without_constants_need_ranking_or_perturbations():
    """One constant for all labels biases the binary method; the others see no constant."""
    q = Gaussian(1, scale=2.0).double()
    for make in (lambda: RankingNCE(q, 4), lambda: ConditionalNCE(0.7, 4)):
        assert_recovered(widths(make), WIDTHS, 0.2)
    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(widths(lambda: NoiseContrastiveEstimation(q, 4)), WIDTHS, 0.2)
