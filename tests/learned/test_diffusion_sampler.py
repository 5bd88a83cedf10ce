"""Controlled diffusions: unbiased weights for any controls, training that evens them out, broken twins, refusals."""

import math

import pytest
import torch

from contracts import seeded
from gibbsian.energies.base import Energy
from gibbsian.energies.targets import DoubleWell, GaussianMixture
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError, ShapeError
from gibbsian.learned.diffusion_sampler import CMCD, Diffusion, fit_diffusion
from gibbsian.partition.schedule import Schedule
from oracles import Z_LIMIT, double_precision, z_score

D = torch.float64
SHIFT = 2.0


def uneven(length=5, seed=0, controlled=0.2):
    """A walk with arbitrary controls, temperatures and step sizes, in the plane."""
    with double_precision(), torch.random.fork_rng():
        torch.manual_seed(seed)
        betas = torch.linspace(0.0, 1.0, length + 1)
        base = Gaussian(loc=torch.tensor([0.3, 0.0]), scale=torch.tensor([1.2, 1.5]))
        walk = Diffusion(base, Schedule(betas, torch.full((length - 1,), 0.1)), (8, 8), 3.0, seeded())
        with torch.no_grad():
            for p in walk.parameters():
                p.add_(controlled * torch.randn_like(p))
    return walk


def target():
    energy = Gaussian(loc=torch.tensor([-0.3, 0.4], dtype=D), scale=0.9)
    return Energy.of(lambda x: energy(x) - SHIFT, (2,))


def deviation(walk, n=20_000):
    paths = walk.walk(target(), n, seeded(1))
    with torch.no_grad():
        return abs(z_score((walk.log_weights(paths) - SHIFT).exp(), 1.0))


@pytest.mark.parametrize("controlled", [0.0, 0.2])
def test_weights_are_unbiased_whatever_the_controls(controlled):
    assert deviation(uneven(controlled=controlled)) < Z_LIMIT


@pytest.mark.parametrize("slip", ["no backward term", "noise scale kept", "backward drift of the start"])
def test_broken_twins_of_the_weight_are_caught(slip, monkeypatch):
    right = Diffusion.log_weights

    def without_backward(self, paths):
        _, back = self.steer(paths.x, paths.slope, torch.linspace(0, 1, 6, dtype=D).view(-1, 1, 1), torch.ones(1))
        return right(self, paths) + 0.5 * back[1:].square().sum((0, 2))

    def wrong_end(self, paths):
        swapped = paths._replace(slope=paths.slope.roll(1, 0), base_slope=paths.base_slope.roll(1, 0))
        return right(self, swapped)

    def no_scale(self, paths):
        return right(self, paths) - self.log_steps.sum()

    twins = {
        "no backward term": without_backward,
        "backward drift of the start": wrong_end,
        "noise scale kept": no_scale,
    }
    monkeypatch.setattr(Diffusion, "log_weights", twins[slip])
    assert deviation(uneven()) > Z_LIMIT


def test_every_other_path_is_louder():
    """Odd rows take wider steps; even ones are their own law's, with unbiased weights."""
    walk = uneven()
    paths = walk.walk(target(), 20_000, seeded(1), 0.5)
    with torch.no_grad():
        log_w = walk.log_weights(paths) - SHIFT
    assert abs(z_score(log_w[::2].exp(), 1.0)) < Z_LIMIT
    assert abs(z_score(log_w[1::2], float(log_w[::2].mean()))) > 2.0 * Z_LIMIT


def test_without_controls_the_weights_are_those_of_unadjusted_annealing():
    """One step by hand, in one dimension, from the densities of both kernels."""
    with double_precision():
        base, energy = Gaussian(1, scale=1.0), Gaussian(1, loc=1.0, scale=0.5)
        walk = Diffusion(base, Schedule(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.02])), (4,), 1e6, seeded())
    paths = walk.walk(energy, 3, seeded(4))
    x0, x1, x2 = paths.x[..., 0]
    total = -energy(x2[:, None]) + base(x0[:, None])
    for beta, a, b in ((0.5, x0, x1), (1.0, x1, x2)):

        def slope(y, beta=beta):
            return (1.0 - beta) * y + beta * (y - 1.0) / 0.25

        total = total + ((b - a + 0.02 * slope(a)) ** 2 - (a - b + 0.02 * slope(b)) ** 2) / (4.0 * 0.02)
    torch.testing.assert_close(walk.log_weights(paths), total, rtol=1e-6, atol=1e-6)


def fitted(energy, base, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method = CMCD(**{"rounds": 40, "batch": 64, "length": 12, "hidden": (16,), "learning_rate": 1e-2} | settings)
        return fit_diffusion(energy, base, method, rng=seeded(seed))


def test_log_z_of_a_gaussian_is_within_its_error_and_training_helps():
    energy = Energy.of(lambda x: 0.5 * ((x - 1.0) / 0.5).square().sum(1), (2,))
    truth = math.log(2.0 * math.pi * 0.25)
    sampler = fitted(energy, Gaussian(2, scale=2.0))
    found = sampler.log_z(4000, seeded(2))
    assert abs(float(found.value - truth) / float(found.stderr)) < Z_LIMIT
    assert float(found.lower) < truth
    assert sampler.history[-1]["loss"] < 0.6 * sampler.history[0]["loss"]
    drawn = sampler.weighted(4000, seeded(3))
    assert (drawn.mean(drawn.x) - 1.0).abs().max() < 0.1
    assert sampler.sample(10, seeded(4)).shape == (10, 2)


def test_both_modes_of_an_uneven_pair_have_their_weights():
    energy = GaussianMixture(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.6, torch.tensor([0.8, 0.2]))
    sampler = fitted(energy, Gaussian(2, scale=3.0), rounds=60, length=16)
    drawn = sampler.weighted(4000, seeded(2))
    error = (drawn.log_weights.softmax(0).square().sum() * 0.16).sqrt()
    assert abs(float(drawn.mean((drawn.x[:, 0] < 0).double()) - 0.8)) < Z_LIMIT * float(error)
    assert float(drawn.log_z.ess) > 400


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    calls, before = [], torch.get_rng_state()
    one, two = (fitted(DoubleWell(), Gaussian(2, scale=1.5), rounds=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.diffusion.log_steps, two.diffusion.log_steps)
    fit_diffusion(DoubleWell(), Gaussian(2), CMCD(rounds=2, batch=8, length=4), rng=seeded(), progress=calls.append)
    assert calls == [1, 1]


def test_paths_without_a_finite_energy_are_left_out_and_told():
    inside = Energy.of(lambda x: torch.where(x[:, 0] > 0, Gaussian(2)(x), torch.inf), (2,))
    with pytest.warns(RuntimeWarning, match=r"At \d+ of \d+ points met in training"):
        sampler = fitted(inside, Gaussian(2), rounds=5, length=4)
    assert sampler.nonfinite > 0
    assert sampler.log_z(2000, seeded(2)).nonfinite > 0
    nowhere = Energy.of(lambda x: torch.full_like(x[:, 0], torch.inf) + 0.0 * x[:, 0], (2,))
    with pytest.raises(DivergenceError, match="infinite or NaN at all 64 points of the base"):
        fitted(nowhere, Gaussian(2))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ArgumentTypeError, match="base must be a tractable energy"):
        fitted(DoubleWell(), DoubleWell())
    with pytest.raises(DomainError, match="the energy lives on"):
        fitted(Bernoulli(logits=torch.zeros(2)), Gaussian(2))
    with pytest.raises(DomainError, match="the base lives on"):
        fitted(DoubleWell(), Bernoulli(logits=torch.zeros(2)))
    with pytest.raises(ShapeError, match=r"shape \(2,\), and the base draws points of shape \(3,\)"):
        fitted(DoubleWell(), Gaussian(3))
    with pytest.raises(ArgumentTypeError, match=r"The method is CMCD\(...\)"):
        fit_diffusion(DoubleWell(), Gaussian(2), CMCD, rng=seeded())
    with pytest.raises(OptionError, match="record_every is 1 or more; got 0"):
        fit_diffusion(DoubleWell(), Gaussian(2), CMCD(), rng=seeded(), record_every=0)
    with pytest.raises(OptionError, match="length is a whole number from 2; got 1"):
        CMCD(length=1)
    with pytest.raises(OptionError, match="louder is what noise is raised by, 0 or more; got -1"):
        CMCD(louder=-1.0)
    with pytest.raises(OptionError, match="a step size for each temperature"):
        Diffusion(Gaussian(2), Schedule.linear(4), (4,), 3.0, seeded())
