"""log Z of Boltzmann machines against sums and integrals written out, and estimates against it."""

import math

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.real_units import GaussianUnits, ReLUUnits
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.kernels.discrete_langevin import DiscreteLangevin
from gibbsian.kernels.gibbs import BlockGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.partition import boltzmann
from gibbsian.partition.boltzmann import exact_log_likelihood, exact_log_z, rbm_path
from gibbsian.partition.bracket import bracket
from gibbsian.partition.schedule import Schedule
from gibbsian.partition.smc import smc
from machines import HIDDEN, PAIRS, Products, everywhere, machine, randomised, table


@torch.no_grad()
def by_hand(energy):
    """Over all states of both layers, or a grid of real ones."""
    (v, log_v), (h, log_h) = everywhere(energy.visible), everywhere(energy.hidden)
    rows = [
        torch.logsumexp(a[:, None] + log_h - table(energy, x, h), (0, 1))
        for x, a in zip(v.split(500), log_v.split(500))
    ]
    return float(torch.logsumexp(torch.stack(rows), 0))


EXACT = [p for p in PAIRS if not (p[0] in ("gaussian", "scaled") and p[1] == "relu")]


@pytest.mark.parametrize("pair", EXACT, ids="-".join)
def test_exact_log_z_of_every_pair_of_units(pair):
    energy = machine(*pair)
    if pair[0] in ("gaussian", "scaled") and pair[1] in ("gaussian", "scaled"):
        exact = four_gaussians(energy)
    else:
        exact = by_hand(energy)
    found = exact_log_z(energy)
    assert float(found.value) == pytest.approx(exact, abs=1e-10)
    assert float(found.stderr) == 0.0
    assert found.lower == found.value == found.upper


@torch.no_grad()
def four_gaussians(energy):
    """The joint density of both layers is Gaussian: its precision, mean and constant from second differences."""
    at = torch.cat((torch.zeros(1, 4), torch.eye(4), -torch.eye(4))).double()
    value = lambda x: table(energy, x[:2][None], x[2:][None])[0, 0]  # noqa: E731
    f = torch.stack([value(x) for x in at])
    slope = 0.5 * (f[1:5] - f[5:])
    pairs = torch.stack([torch.stack([value(a + b) for b in at[1:5]]) for a in at[1:5]])
    precision = pairs - f[1:5] - f[1:5, None] + f[0]
    mean = -torch.linalg.solve(precision, slope)
    return float(-value(mean) + 2.0 * math.log(2.0 * math.pi) - 0.5 * torch.logdet(precision))


def test_the_twin_without_offsets_is_caught():
    energy = machine("bernoulli", "spin")
    exact = by_hand(energy)
    with torch.no_grad():
        energy.hidden_offset.zero_()
    assert abs(float(exact_log_z(energy).value) - exact) > 1e-3


def test_either_layer_and_any_chunks_give_the_same(monkeypatch):
    wide, tall = randomised(RBM(9, 4)), randomised(RBM(4, 9))
    for energy in (wide, tall):
        exact, done = by_hand_bits(energy), []
        for size in (1 << 26, 3000):
            monkeypatch.setattr(boltzmann, "CHUNK_BYTES", size)
            done.clear()
            found = exact_log_z(energy, progress=done.append)
            assert float(found.value) == pytest.approx(exact, abs=1e-10)
            assert sum(done) == 16
        assert len(done) == 3
        law = (-energy(everywhere(energy.visible)[0])).softmax(0).detach()
        if energy is tall:
            assert float(found.ess) == pytest.approx(float(1.0 / law.square().sum()), rel=1e-9)


@torch.no_grad()
def by_hand_bits(energy):
    v, h = everywhere(energy.visible)[0], everywhere(energy.hidden)[0]
    return float(torch.logsumexp(-table(energy, v, h), (0, 1)))


def test_float32_machines_are_summed_in_float64():
    energy = machine("bernoulli", "spin").float()
    found = exact_log_z(energy)
    assert found.value.dtype == torch.float64
    assert float(found.value) == pytest.approx(by_hand(energy.double()), abs=1e-10)


def test_log_likelihoods_are_normalised():
    for pair in (("bernoulli", "relu"), ("categorical", "spin"), ("joined", "gaussian")):
        energy = machine(*pair)
        v, _ = everywhere(energy.visible)
        log_z = exact_log_z(energy)
        found = exact_log_likelihood(energy, v, log_z)
        assert float(torch.logsumexp(found, 0)) == pytest.approx(0.0, abs=1e-10)
        torch.testing.assert_close(exact_log_likelihood(energy, v[:3]), found[:3])
    with pytest.raises(DomainError, match=r"for example 0\.3.*Binarise"):
        exact_log_likelihood(machine("bernoulli", "relu"), torch.full((2, 3), 0.3))


def test_a_condition_is_fixed_first():
    energy = randomised(RBM(3, 2, condition=2))
    v, _ = everywhere(energy.visible)
    for label in (0, 1):
        fixed = energy.given(y=label)
        exact = float(torch.logsumexp(-fixed(v), 0).detach())
        assert float(exact_log_z(fixed).value) == pytest.approx(exact, abs=1e-10)
    with pytest.raises(OptionError, match=r"depends on the context, y: fix it"):
        exact_log_z(energy)


def test_sums_that_would_not_fit_are_refused_with_their_size():
    with pytest.raises(
        OptionError, match=r"BernoulliUnits\(500\), has 2\^500\.0 states, more than 2\^25\..*rbm_path.*RBMGibbs"
    ):
        exact_log_z(RBM(784, 500))
    with pytest.raises(OptionError, match=r"CategoricalUnits\(20, classes=4\), has 2\^40\.0 states"):
        exact_log_z(RBM(CategoricalUnits(20, classes=4), ReLUUnits(3)))
    with pytest.raises(OptionError, match="has states to list, and ReLU has no closed form"):
        exact_log_z(RBM(GaussianUnits(2), ReLUUnits(2)))
    energy = RBM(3, 2)
    with pytest.raises(OptionError, match="at a temperature or beside other energies"):
        exact_log_z(0.5 * energy)
    with pytest.raises(ArgumentTypeError, match="needs an energy of two layers"):
        exact_log_z(gb.Bernoulli(logits=torch.zeros(3)))
    strong = RBM(GaussianUnits(2), GaussianUnits(2), weight_scale=0.0)
    with torch.no_grad():
        strong.weight.copy_(1.01 * torch.eye(2))
    with pytest.raises(DomainError, match="largest singular value"):
        exact_log_z(strong)


@pytest.mark.parametrize(
    "pair",
    [("bernoulli", "bernoulli"), ("spin", "relu"), ("categorical", "spin"), ("scaled", "bernoulli")],
    ids="-".join,
)
def test_annealing_agrees_on_either_path(pair):
    """Within 5 of the estimates' own standard errors, a false alarm in 2e6, with valid lower bounds."""
    energy = machine(*pair, scale=1.0)
    base, exact = energy.base(), float(exact_log_z(energy).value)
    for path in (rbm_path(base, energy), None):
        found = gb.ais(energy, base, kernel=RBMGibbs(), rng=seeded(), chains=400, path=path, temperatures=30)
        assert abs(float(found.value) - exact) < 5.0 * float(found.stderr) + 1e-9, (pair, path, found)
        assert float(found.lower) < exact


def test_compiled_annealing_is_the_eager_one(graphs):
    energy = machine("bernoulli", "bernoulli")
    base, told = energy.base(), []
    for compile in (False, True):
        graphs()
        options = {"chains": 20, "temperatures": 30, "compile": compile}
        told.append(gb.ais(energy, base, kernel=RBMGibbs(), rng=seeded(), path=rbm_path(base, energy), **options))
    assert 1 <= graphs() <= 2, "blocks of temperatures, and what is left over"
    torch.testing.assert_close(told[0].value, told[1].value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("along", ["machines", "geometric"])
def test_hidden_fields_are_carried_from_temperature_to_temperature(along, monkeypatch):
    """In blocks of five temperatures one field is computed anew, at the first; the weights are the same to the bit."""
    energy = machine("spin", "bernoulli", scale=1.0)
    base = energy.base()
    path = rbm_path(base, energy) if along == "machines" else None
    schedule = Schedule(torch.linspace(0.0, 1.0, 52, dtype=torch.float64))
    told = []
    for carried in (True, False):
        if not carried:
            monkeypatch.delattr(RBMGibbs, "arrive")
        with Products() as products:
            found = gb.ais(energy, base, kernel=RBMGibbs(), rng=seeded(), path=path, schedule=schedule, chains=50)
        told.append((found.value, products.count))
    assert torch.equal(told[0][0], told[1][0])
    assert told[0][1] == 2 * 50 + 10 + 2
    assert told[1][1] == 3 * 50 + 2


def test_other_estimators_and_kernels_agree():
    energy = machine("bernoulli", "bernoulli", scale=1.0)
    base, exact = energy.base(), float(exact_log_z(energy).value)
    path = rbm_path(base, energy)
    found = [
        smc(energy, base, kernel=RBMGibbs(), rng=seeded(), path=path).log_z,
        *(
            gb.ais(energy, base, kernel=k, rng=seeded(), chains=400, temperatures=30)
            for k in (BlockGibbs(), GibbsWithGradients(), DiscreteLangevin(0.3))
        ),
    ]
    for estimate in found:
        assert abs(float(estimate.value) - exact) < 5.0 * float(estimate.stderr), estimate
    v, _ = everywhere(energy.visible)
    draws = v[torch.multinomial((-energy(v)).softmax(0), 400, replacement=True, generator=seeded(1))]
    both = bracket(energy, base, draws, kernel=RBMGibbs(), rng=seeded(2), path=path, temperatures=30)
    assert float(both.lower) <= exact <= float(both.upper)


def test_a_path_that_does_not_start_at_independent_units_is_refused():
    energy = RBM(GaussianUnits(2), 2)
    base = gb.Gaussian(covariance=torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    with pytest.raises(OptionError, match="starts at independent units"):
        rbm_path(base, energy)
    rbm_path(gb.Gaussian(2), energy)
    with pytest.raises(OptionError, match="leads to an RBM without a context"):
        rbm_path(energy.base(), RBM(GaussianUnits(2), 2, condition=3))
    assert set(HIDDEN) >= {"relu"}
    assert BernoulliUnits(3).count == 8


@pytest.mark.slow
def test_a_million_states():
    energy = randomised(RBM(40, 20), scale=0.3)
    found = exact_log_z(energy)
    estimate = gb.ais(
        energy, energy.base(), kernel=RBMGibbs(), rng=seeded(), path=rbm_path(energy.base(), energy), temperatures=300
    )
    assert abs(float(found.value - estimate.value)) < 5.0 * float(estimate.stderr)
