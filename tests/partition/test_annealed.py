"""Annealed importance sampling against closed forms, within its own error; unbiased weights; broken twins."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from gibbsian.energies.base import Energy
from gibbsian.energies.targets import DoubleWell, Funnel, GaussianMixture
from gibbsian.energies.toys import EightGaussians, Ring, Rosenbrock
from gibbsian.energies.tractable import Bernoulli, Gaussian, Tractable, Uniform
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.kernels.nuts import NUTS
from gibbsian.partition.annealed import ais, log_weights, reverse_ais
from gibbsian.partition.base import from_log_weights
from gibbsian.partition.paths import geometric, noise_levels
from gibbsian.partition.schedule import Schedule, pilot
from oracles import Z_LIMIT, double_precision, z_score


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class NoisyGaussian(Energy):
    """A standard Gaussian under noise, without its constant: log Z is log(2 pi (1 + sigma^2)) in the plane."""

    event_shape = torch.Size((2,))
    context = ("sigma",)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x.square().sum(1) / (1.0 + sigma**2)


TARGETS = {
    "eight gaussians": (EightGaussians, 3.0),
    "double well": (DoubleWell, 2.0),
    "ring": (Ring, 3.0),
    "rosenbrock": (lambda: Rosenbrock(a=0.5, b=5.0, temperature=1.0), 3.0),
    "funnel": (lambda: Funnel(4, scale=1.5), 3.0),
    "mixture": (lambda: GaussianMixture(torch.tensor([[-1.0] * 6, [1.0] * 6]), 0.4), 1.5),
}


@pytest.mark.parametrize("name", TARGETS)
def test_defaults_find_log_z_within_the_stated_error(name):
    make, scale = TARGETS[name]
    energy = make()
    base = Gaussian(energy.event_shape, scale=scale)
    found = ais(energy, base, rng=generator(1))
    assert abs(float(found.value) - energy.log_z) < Z_LIMIT * float(found.stderr)
    assert float(found.stderr) < 0.12
    assert float(found.lower) < energy.log_z < float(found.upper) == math.inf
    assert energy.log_z - float(found.lower) < 0.5
    assert found.chains == 512
    assert found.nonfinite == 0


@pytest.mark.parametrize("name", ["double well", "rosenbrock"])
def test_reverse_from_exact_draws_bounds_from_above(name):
    make, scale = TARGETS[name]
    energy = make()
    base = Gaussian(energy.event_shape, scale=scale)
    draws = energy.sample(512, generator(2))
    found = reverse_ais(energy, base, draws, rng=generator(3), temperatures=150)
    assert abs(float(found.value) - energy.log_z) < Z_LIMIT * float(found.stderr)
    assert float(found.lower) == -math.inf < energy.log_z < float(found.upper)
    assert float(found.upper) - energy.log_z < 0.5


def test_one_increment_is_importance_sampling():
    base, energy = Gaussian(2, scale=2.0), DoubleWell()
    x = base.sample(300, generator())
    log_w = log_weights(geometric(base, energy), Schedule.linear(1), HMC(0.1), x, rng=generator())
    torch.testing.assert_close(log_w, (base(x) - energy(x)).double())


def badly_mixing_weights(backwards: bool) -> tuple[Tensor, float]:
    """Few temperatures and steps far too large: many proposals are rejected, and the weights must still be unbiased."""
    with double_precision():
        base, energy = Gaussian(2, scale=1.5), Ring(1.0, 0.4)
    start = energy.sample(100_000, generator(4)) if backwards else base.sample(100_000, generator(4))
    path, schedule = geometric(base, energy), Schedule.linear(6)
    kernel = HMC(0.9, leapfrog=2)
    log_w = log_weights(path, schedule, kernel, start, rng=generator(5), backwards=backwards)
    return log_w, energy.log_z


def test_weights_are_unbiased_however_badly_chains_mix():
    log_w, truth = badly_mixing_weights(backwards=False)
    assert abs(z_score((log_w - truth).exp(), 1.0)) < Z_LIMIT
    assert float(log_w.mean()) < truth


def test_reverse_weights_are_unbiased_however_badly_chains_mix():
    log_w, truth = badly_mixing_weights(backwards=True)
    assert abs(z_score((truth - log_w).exp(), 1.0)) < Z_LIMIT
    assert float(log_w.mean()) > truth


def test_broken_twin_weights_of_the_wrong_sign_are_caught():
    base, energy = Gaussian(2, scale=3.0), Ring()
    path = geometric(base, energy)
    schedule = pilot(path, base, HMC(0.1, 5), rng=generator(), temperatures=100)
    log_w = log_weights(path, schedule, HMC(0.1, 5), base.sample(256, generator()), rng=generator())
    right, wrong = from_log_weights(log_w), from_log_weights(-log_w)
    assert abs(float(right.value) - energy.log_z) < Z_LIMIT * float(right.stderr)
    assert abs(float(wrong.value) - energy.log_z) > Z_LIMIT * float(wrong.stderr)


def test_broken_twin_base_without_its_normaliser_is_caught():
    class Careless(Tractable):
        event_shape = torch.Size((2,))

        def __init__(self):
            super().__init__()
            self.inner = Gaussian(2, scale=3.0)

        def forward(self, x):
            return 0.5 * x.square().sum(1) / 9.0

        def sample(self, n, rng):
            return self.inner.sample(n, rng)

    found = ais(Ring(), Careless(), rng=generator())
    assert abs(float(found.value) - Ring().log_z) > Z_LIMIT * float(found.stderr)


def test_broken_twin_unadjusted_kernel_is_biased():
    @dataclass(frozen=True)
    class Unadjusted(HMC):
        def step(self, energy, state, noise):
            z, _ = noise
            moved = state.x - self.step_size * state.grad + (2 * self.step_size) ** 0.5 * z
            return self.init(energy, moved), Info(torch.ones_like(state.energy), torch.zeros_like(state.energy))

    with double_precision():
        base, energy = Gaussian(2, scale=1.5), Gaussian(2, scale=0.5)
    start = base.sample(20_000, generator())
    log_w = log_weights(geometric(base, energy), Schedule.linear(20), Unadjusted(0.3), start, rng=generator())
    assert abs(z_score(log_w.exp(), 1.0)) > Z_LIMIT


@pytest.mark.parametrize("kernel", [MALA(0.01), HMC(0.05, leapfrog=3)])
def test_kernels_of_the_user(kernel):
    energy = DoubleWell()
    found = ais(energy, Gaussian(2, scale=2.0), rng=generator(), kernel=kernel, temperatures=200, steps=2)
    assert abs(float(found.value) - energy.log_z) < Z_LIMIT * float(found.stderr)


def test_path_down_the_noise_levels():
    base, energy = Gaussian(2, scale=5.0), NoisyGaussian()
    path = noise_levels(energy, (4.0, 1.0, 0.1), base)
    found = ais(energy, base, rng=generator(), path=path)
    truth = math.log(2 * math.pi * 1.01)
    assert abs(float(found.value) - truth) < Z_LIMIT * float(found.stderr)
    assert float(found.stderr) < 0.1


@dataclass(frozen=True)
class Flips:
    """Metropolis over bits, one proposed flip per bit and step: a kernel known only by its protocol."""

    gradients = 0
    domain = "boolean"

    def init(self, energy, x):
        return State(x, energy(x), torch.zeros_like(x))

    def noise(self, state, steps, rng):
        return (torch.rand((steps, *state.x.shape), generator=rng),)

    def step(self, energy, state, noise):
        (u,) = noise
        x, value = state.x, state.energy
        for i in range(x.shape[1]):
            y = x.clone()
            y[:, i] = 1.0 - y[:, i]
            proposed = energy(y)
            accept = u[:, i] < (value - proposed).exp()
            x, value = torch.where(accept.unsqueeze(1), y, x), torch.where(accept, proposed, value)
        return State(x, value, state.grad), Info(torch.ones_like(value), torch.zeros_like(value))


def test_bits_against_enumeration():
    j = torch.randn(6, 6, generator=generator(9))
    energy = Energy.of(lambda x: -((x @ j) * x).sum(1), event_shape=(6,), support=constraints.boolean)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    truth = float(torch.logsumexp(-energy(states), 0))
    found = ais(energy, Bernoulli(logits=torch.zeros(6)), rng=generator(), kernel=Flips(), temperatures=50)
    assert abs(float(found.value) - truth) < Z_LIMIT * float(found.stderr)
    assert float(found.lower) < truth


def test_base_partly_outside_the_domain():
    half = Energy.of(lambda x: torch.where(x[:, 0] > 0, 0.5 * x.square().sum(1), torch.inf), event_shape=(2,))
    found = ais(half, Uniform(2, low=-5.0, high=5.0), rng=generator())
    assert found.nonfinite > 200
    assert abs(float(found.value) - math.log(math.pi)) < Z_LIMIT * float(found.stderr)
    assert float(found.lower) < math.log(math.pi)


def test_a_base_too_narrow_warns_and_keeps_its_bound():
    energy = GaussianMixture(torch.tensor([[0.0] * 20]), 3.0)
    with pytest.warns(RuntimeWarning, match="dominated by a few"):
        found = ais(energy, Gaussian(20, scale=0.2), rng=generator(), schedule=Schedule.linear(4), kernel=HMC(0.05, 1))
    assert float(found.lower) < 0.0


def test_a_schedule_can_be_used_again():
    base, energy = Gaussian(2, scale=2.0), DoubleWell()
    schedule = pilot(geometric(base, energy), base, HMC(0.1, 5), rng=generator(), temperatures=100)
    first, second = (ais(energy, base, rng=generator(1), schedule=schedule) for _ in range(2))
    assert float(first.value) == float(second.value)


@pytest.mark.slow
def test_compiled_equals_eager():
    base, energy = Gaussian(2, scale=2.0), DoubleWell()
    schedule = pilot(geometric(base, energy), base, HMC(0.1, 5), rng=generator(), temperatures=50)
    eager, fast = (ais(energy, base, rng=generator(1), schedule=schedule, compile=c) for c in (False, True))
    assert float(fast.value) == pytest.approx(float(eager.value), abs=1e-3)


def test_refusals():
    base, energy, rng = Gaussian(2), DoubleWell(), generator()
    with pytest.raises(ArgumentTypeError, match="tractable"):
        ais(energy, energy, rng=rng)
    with pytest.raises(OptionError, match="unadjusted"):
        ais(energy, base, rng=rng, kernel=ULA(0.1))
    with pytest.raises(ArgumentTypeError, match="kernel"):
        ais(energy, base, rng=rng, kernel=3)
    with pytest.raises(OptionError, match="given"):
        ais(NoisyGaussian(), base, rng=rng)
    with pytest.raises(OptionError, match="chains"):
        ais(energy, base, rng=rng, chains=1)
    with pytest.raises(OptionError, match="steps"):
        ais(energy, base, rng=rng, steps=0)
    with pytest.raises(ShapeError):
        ais(energy, Gaussian(3), rng=rng)
    with pytest.raises(ShapeError, match="two or more"):
        reverse_ais(energy, base, torch.zeros(1, 2), rng=rng)
    bits = Energy.of(lambda x: x.sum(1), event_shape=(2,), support=constraints.boolean)
    with pytest.raises(DomainError, match="base of the same kind"):
        ais(bits, base, rng=rng)
    with pytest.raises(OptionError, match="discrete kernel"):
        ais(bits, Bernoulli(logits=torch.zeros(2)), rng=rng)


def test_kernels_of_changing_length_anneal_compiled_too(graphs, recwarn):
    """They compile their own inner part: the block around them is left as it is, without a warning."""
    energy, base = Gaussian(2, scale=0.5), Gaussian(2)
    found = ais(energy, base, kernel=NUTS(0.5), chains=64, temperatures=20, rng=generator(), compile=True)
    assert abs(float(found.value)) < 5.0 * float(found.stderr)
    assert not [w for w in recwarn if "eagerly" in str(w.message)]
