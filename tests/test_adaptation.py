"""Tuned step sizes: the acceptance they give, where they come from, and when there is none."""

import dataclasses
import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.adaptation import DualAveraging, Tuned, tune
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError

TARGETS = {
    "narrow": gb.Gaussian(scale=torch.logspace(-2, 0, 10, dtype=torch.float64)),
    "wide": gb.Gaussian(scale=torch.linspace(0.5, 1.5, 50, dtype=torch.float64)),
}


def realised(energy, kernel, seed=9):
    """Acceptance from fresh exact draws, to 0.005 or better."""
    start = energy.sample(500, seeded(seed))
    return float(gb.sample(energy, kernel, start, steps=20, rng=seeded(seed)).acceptance.mean())


@pytest.mark.parametrize("first", [1e-6, 0.1, 30.0])
@pytest.mark.parametrize("kernel", [gb.MALA(1.0), gb.HMC(1.0, leapfrog=5)], ids=["MALA", "HMC"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_target_is_reached_from_any_first_step_size(name, kernel, first):
    energy = TARGETS[name]
    steps = 300 if kernel.gradients == 1 else 100
    tuned = tune(
        energy, dataclasses.replace(kernel, step_size=first), energy.sample(64, seeded()), rng=seeded(), steps=steps
    )
    assert isinstance(tuned, Tuned)
    assert type(tuned.kernel.step_size) is float
    assert abs(realised(energy, tuned.kernel) - kernel.target_acceptance) < 0.05
    assert tuned.stderr < 0.02
    assert abs(tuned.acceptance - kernel.target_acceptance) < 0.05 + 5 * tuned.stderr


@pytest.mark.parametrize("target", [0.3, 0.9])
def test_another_target_and_other_settings_are_kept(target):
    energy = TARGETS["wide"]
    tuned = tune(energy, gb.HMC(0.1, leapfrog=3), energy.sample(64, seeded()), rng=seeded(), steps=120, target=target)
    assert tuned.kernel.leapfrog == 3
    assert abs(realised(energy, tuned.kernel) - target) < 0.05


def test_chains_far_out_are_warmed_up_on_the_way():
    energy = TARGETS["wide"]
    kernel, state, *_ = tune(energy, gb.MALA(1.0), 30.0 + energy.sample(64, seeded()), rng=seeded(), steps=600)
    assert abs(realised(energy, kernel) - 0.574) < 0.05
    # 64 chains of 50 coordinates: within 6 standard errors of the mean energy at equilibrium, 25 nats above the floor.
    excess = float((state.energy - energy.log_normalizer).mean())
    assert abs(excess - 25.0) < 6 * 5.0 / 64**0.5


def test_the_result_goes_on_where_the_tuning_stopped():
    energy = TARGETS["wide"]
    tuned = tune(energy, gb.MALA(0.1), energy.sample(8, seeded()), rng=seeded(), steps=50)
    again = tune(energy, gb.MALA(0.1), energy.sample(8, seeded()), rng=seeded(), steps=50)
    assert torch.equal(tuned.state.x, again.state.x)
    assert tuned.kernel == again.kernel
    assert len(tuned.step_sizes) == 5
    assert gb.sample(energy, tuned.kernel, tuned.state, steps=5, rng=seeded()).x.shape == (8, 50)
    assert tune(energy, gb.MALA(0.1), tuned.state, rng=seeded(), steps=50).stderr > 0
    assert math.isnan(tune(energy, gb.MALA(0.1), energy.sample(1, seeded()), rng=seeded(), steps=20).stderr)


def averaged(gamma_sign=1.0, start=5.0):
    """Run the recursion on a smooth acceptance curve without noise, exp(-h), whose answer is known."""
    search = DualAveraging(math.log(start), 0.6)
    for _ in range(200):
        error = 0.6 - math.exp(-math.exp(search.log_h))
        search.update(0.6 - gamma_sign * error)
    return math.exp(search.log_average)


@pytest.mark.parametrize("start", [0.05, 0.5, 5.0])
def test_the_recursion_finds_the_root_of_a_known_curve(start):
    assert abs(math.exp(-averaged(start=start)) - 0.6) < 0.02


def test_a_recursion_of_the_wrong_sign_does_not():
    assert not abs(math.exp(-averaged(gamma_sign=-1.0)) - 0.6) < 0.2


def test_the_average_weighs_rounds_as_the_paper_does():
    search = DualAveraging(0.0, 0.5)
    logs, average = [], 0.0
    for t in range(1, 6):
        search.update(0.9)
        logs.append(search.log_h)
        average = t**-0.75 * search.log_h + (1 - t**-0.75) * average
    assert search.log_average == pytest.approx(average, abs=1e-14)
    assert logs[0] == pytest.approx(math.sqrt(1) / 0.2 * 0.4 / 11)


def test_a_chain_that_never_gets_a_number_counts_as_rejecting():
    """A quarter of the chains sit where every proposal is NaN; the others make up for them."""
    stuck = torch.arange(64) % 4 == 0
    start = torch.where(stuck[:, None], 50.0, 0.0) * torch.ones(64, 2, dtype=torch.float64)

    def energy(x):
        return torch.where((x[:, 0] > 25) & (x != 50).any(1), torch.nan, 0.5 * (x - start).square().sum(1))

    tuned = tune(energy, gb.MALA(0.1), start, rng=seeded(), steps=300)
    assert abs(tuned.acceptance - 0.574) < 0.05
    assert float(gb.sample(energy, tuned.kernel, tuned.state, steps=50, rng=seeded()).acceptance[~stuck].mean()) > 0.7


def finite_only_at(start):
    return lambda x: torch.where((x == start).all(1), x.square().sum(1), torch.nan)


@pytest.mark.parametrize("kernel", [gb.MALA(0.1), gb.HMC(0.1)], ids=["MALA", "HMC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_energy_without_numbers_around_the_start_diverges(kernel, dtype):
    start = torch.randn((8, 2), generator=seeded()).to(dtype)
    with pytest.raises(
        DivergenceError, match=r"No step size gives acceptance: even .* of .* proposals were not finite"
    ):
        tune(finite_only_at(start), kernel, start, rng=seeded())


def test_a_gradient_that_does_not_fit_the_energy_diverges():
    class Uphill(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 1e12 * x.abs().sum(1)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 1e24 * torch.ones_like(x)

    with pytest.raises(DivergenceError, match="gradient that does not fit"):
        tune(Uphill.apply, gb.HMC(0.1), torch.ones(8, 2), rng=seeded())


def test_a_flat_energy_has_no_step_size():
    with pytest.raises(DivergenceError, match=r"Every step size is accepted: .* still gave 1 .* add a tractable base"):
        tune(lambda x: 0.0 * x.sum(1), gb.HMC(0.1), torch.zeros(8, 2), rng=seeded())


def test_a_start_without_numbers_is_refused_as_in_sample():
    with pytest.raises(DomainError, match="8 of 8 chains start"):
        tune(lambda x: torch.nan * x.sum(1), gb.MALA(0.1), torch.zeros(8, 2), rng=seeded())


@pytest.mark.parametrize(
    ("kernel", "options", "error", "message"),
    [
        (gb.ULA(0.1), {}, ArgumentTypeError, "ULA accepts every step.*Tune MALA"),
        (gb.ULA(0.1), {"target": 0.5}, ArgumentTypeError, "ULA accepts every step"),
        (gb.MALA, {}, ArgumentTypeError, "sets the step_size of a kernel"),
        ("mala", {}, ArgumentTypeError, "got 'mala'"),
        (gb.MALA(0.1), {"target": 1.0}, OptionError, "strictly between 0 and 1; got 1.0"),
        (gb.MALA(0.1), {"target": 0.0}, OptionError, "got 0.0"),
        (gb.MALA(0.1), {"steps": 0}, OptionError, "steps is 1 or more; got 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(kernel, options, error, message):
    with pytest.raises(error, match=message):
        tune(lambda x: x.square().sum(1), kernel, torch.zeros(4, 2), rng=seeded(), **options)


def test_progress_counts_the_rounds():
    made = []
    tune(
        TARGETS["wide"], gb.MALA(0.1), TARGETS["wide"].sample(4, seeded()), rng=seeded(), steps=42, progress=made.append
    )
    assert made == [10] * 5


def test_a_flat_energy_on_a_bounded_domain_takes_any_step():
    """There is no far away on bits, so that accepting every step size is no sign of a density that cannot be."""
    energy = gb.Bernoulli(torch.zeros(6))
    tuned = gb.tune(energy, gb.DiscreteLangevin(0.2), energy.sample(32, seeded()), steps=20, rng=seeded())
    assert tuned.acceptance > 0.99
