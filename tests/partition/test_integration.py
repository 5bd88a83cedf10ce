"""Thermodynamic integration against enumeration and closed forms, within its own two errors; broken twins."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.pairwise import Ising
from gibbsian.energies.toys import Ring
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError, ShapeError
from gibbsian.kernels.gibbs import BlockGibbs
from gibbsian.kernels.langevin import ULA
from gibbsian.partition import integration
from gibbsian.partition.enumeration import enumeration
from gibbsian.partition.integration import Integrated, thermodynamic_integration
from gibbsian.partition.paths import geometric, noise_levels
from oracles import Z_LIMIT, double_precision


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spins() -> tuple[Ising, Bernoulli, float]:
    energy = Ising.lattice((4, 2), torch.tensor(0.3, dtype=torch.float64), field=0.1)
    return energy, Bernoulli(logits=torch.zeros(4, 2, dtype=torch.float64)), float(enumeration(energy).value)


def on_spins(seed: int = 0, **options) -> Integrated:
    energy, base, _ = spins()
    return thermodynamic_integration(energy, base, rng=generator(seed), kernel=BlockGibbs(), **options)


def assert_found(found: Integrated, truth: float) -> None:
    off = float(found.log_z.value) - truth
    assert abs(off) < Z_LIMIT * float(found.log_z.stderr), (
        f"missed by {off:.3g}, stated {float(found.log_z.stderr):.2g}"
    )


@pytest.mark.parametrize(("rule", "nodes"), [("trapezoid", 9), ("trapezoid", 25), ("gauss", 7)])
def test_spins_against_enumeration(rule, nodes):
    found = on_spins(rule=rule, nodes=nodes)
    truth = spins()[2]
    assert_found(found, truth)
    assert float(found.log_z.stderr) < 0.1
    assert len(found.nodes) == nodes == len(found.slopes) == len(found.errors) == len(found.ess)
    assert float(found.log_z.stderr) == pytest.approx(math.hypot(float(found.statistical), float(found.discretisation)))
    bounded = rule == "trapezoid"
    assert math.isfinite(float(found.log_z.lower)) == bounded
    assert float(found.log_z.lower) <= truth <= float(found.log_z.upper)


@pytest.mark.parametrize(("rule", "nodes"), [("trapezoid", 17), ("gauss", 9)])
def test_the_ring_against_its_closed_form(rule, nodes):
    with double_precision():
        energy, base = Ring(), Gaussian(2, scale=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = thermodynamic_integration(energy, base, rng=generator(), rule=rule, nodes=nodes, steps=60)
    assert_found(found, energy.log_z)
    assert float(found.log_z.stderr) < 0.4
    assert float(found.log_z.lower) < energy.log_z < float(found.log_z.upper)


def test_the_statistical_error_is_the_spread_of_repeats():
    """By Gauss' rule, whose own error is nothing here. The spread of 40 values is known to 11%."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [on_spins(seed, rule="gauss", nodes=4, chains=24, steps=20, warmup=6) for seed in range(40)]
    values = torch.stack([r.log_z.value for r in runs])
    stated = torch.stack([r.statistical for r in runs]).square().mean().sqrt()
    assert float(values.std() / stated) == pytest.approx(1.0, abs=0.62)
    z = (values.mean() - spins()[2]) / (values.std() / math.sqrt(40))
    assert abs(float(z)) < Z_LIMIT


class Lazy(BlockGibbs):
    """Moves a chain on in one step of ten."""

    def step(self, energy, state, noise):
        new, info = super().step(energy, state, noise)
        keep = (noise[0].flatten(1)[:, 0] * 1e4 % 1.0 < 0.9).reshape(-1, 1, 1)
        x = torch.where(keep, state.x, new.x)
        return new._replace(x=x, energy=energy(x)), info


def test_correlation_along_the_chains_counts():
    """One sweep in ten only moves a chain on: the error is that of a tenth of the draws, and its twin's far less."""
    energy, base, truth = spins()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy, quick = (
            thermodynamic_integration(energy, base, rng=generator(3), kernel=k, nodes=4, rule="gauss", steps=250)
            for k in (Lazy(), BlockGibbs())
        )
    assert_found(lazy, truth)
    assert float(lazy.statistical / quick.statistical) == pytest.approx(math.sqrt(19.0), rel=0.35)


def test_chains_too_short_for_their_correlation_still_tell_their_error(monkeypatch):
    """They move on once or twice at a stop, and stand at the next where they stood at the last.

    The spread of 30 repeats is known to 13%. The twin takes errors from effective sample sizes, stop by stop.
    """
    energy, base, _ = spins()
    options = {"kernel": Lazy(), "rule": "gauss", "nodes": 6, "chains": 64, "steps": 12, "warmup": 0}

    def ratio() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs = [thermodynamic_integration(energy, base, rng=generator(seed), **options) for seed in range(30)]
        stated = torch.stack([r.statistical for r in runs]).square().mean().sqrt()
        return float(torch.stack([r.log_z.value for r in runs]).std() / stated)

    assert ratio() == pytest.approx(1.0, abs=0.5)
    monkeypatch.setattr(integration, "SPREAD", 10**6)
    assert ratio() > 1.6


def test_few_chains_take_their_error_from_effective_sample_sizes():
    few = on_spins(chains=4, steps=200, nodes=9)
    assert_found(few, spins()[2])
    by_stop = (integration._weights(few.nodes, "trapezoid") * few.errors).square().sum().sqrt()
    assert float(few.statistical) == pytest.approx(float(by_stop))
    assert float(few.log_z.lower) < spins()[2] < float(few.log_z.upper)


@pytest.mark.parametrize("nodes", [3, 5, 9, 17])
def test_the_discretisation_is_seen(nodes):
    """With exact slopes, so that nothing is random: the error of the rule, and its estimate from half the stops."""
    betas = torch.linspace(0.0, 1.0, nodes, dtype=torch.float64)
    # E is x^2 / 2 times 1 + 99 beta, from the standard normal: the mean slope is 49.5 / (1 + 99 beta).
    slopes = 49.5 / (1.0 + 99.0 * betas)
    truth = -0.5 * math.log(100.0)
    full = -float((integration._weights(betas, "trapezoid") * slopes).sum())
    half = -float((integration._weights_of_half(betas, "trapezoid") * slopes).sum())
    assert abs(full - truth) < abs(full - half)
    low, high = -float((betas.diff() * slopes[:-1]).sum()), -float((betas.diff() * slopes[1:]).sum())
    assert low < truth < high


@pytest.mark.parametrize("n", [3, 6, 11])
def test_gauss_weights_and_those_of_half(n):
    betas = integration._stops(n, "gauss", None)  # type: ignore[arg-type]
    for power in range(2 * n):
        assert float((integration._weights(betas, "gauss") * betas**power).sum()) == pytest.approx(1 / (power + 1))
    for power in range((n + 1) // 2):
        half = float((integration._weights_of_half(betas, "gauss") * betas**power).sum())
        assert half == pytest.approx(1 / (power + 1), abs=1e-10)


def test_given_nodes_and_another_path():
    """The geometric path by differences, as any path: the same stops and draws, and slopes equal to rounding."""
    energy, base, truth = spins()
    nodes = torch.linspace(0.0, 1.0, 8) ** 1.5
    by_path = on_spins(nodes=nodes, path=geometric(base, energy))
    by_energies = on_spins(nodes=nodes)
    torch.testing.assert_close(by_path.slopes, by_energies.slopes, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_path.nodes, nodes.double())
    assert_found(by_path, truth)
    assert float(by_path.log_z.upper) == math.inf


def test_a_path_down_noise_levels():
    class Noisy(Energy):
        event_shape = torch.Size((2,))
        context = ("sigma",)

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return 0.5 * x.square().sum(1) / (1.0 + sigma**2)

    energy = Noisy()
    with double_precision():
        base = Gaussian(2, scale=4.0)
    path = noise_levels(energy, (3.0, 0.5), base)
    # The slope jumps where the stretch from the base ends, from -8 to 6, and a stop lies on either side.
    nodes = torch.cat((torch.linspace(0.0, 0.4999, 7), torch.linspace(0.5001, 1.0, 14)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = thermodynamic_integration(energy, base, rng=generator(), path=path, nodes=nodes, steps=60)
    truth = math.log(2.0 * math.pi * 1.25)
    assert_found(found, truth)
    assert abs(float(found.log_z.value) - truth) < Z_LIMIT * float(found.statistical) + 0.05


def twin_without_sign(betas, values, rule, geometric, confidence):
    return RIGHT(betas, [-v for v in values], rule, geometric, confidence)


def twin_halved(betas, values, rule, geometric, confidence):
    return RIGHT(betas, [0.5 * v for v in values], rule, geometric, confidence)


def twin_shifted(betas, values, rule, geometric, confidence):
    """Each stop's draws taken for those of the stop before."""
    return RIGHT(betas, [values[0], *values[:-1]], rule, geometric, confidence)


RIGHT = integration._integrated


@pytest.mark.parametrize("twin", [twin_without_sign, twin_halved, twin_shifted])
def test_broken_twins_are_caught(twin, monkeypatch):
    truth = spins()[2]
    assert_found(on_spins(nodes=9, rule="gauss"), truth)
    monkeypatch.setattr(integration, "_integrated", twin)
    found = on_spins(nodes=9, rule="gauss")
    with pytest.raises(AssertionError, match="missed"):
        assert_found(found, truth)


def test_too_few_nodes_warn():
    energy = Ising.lattice((4, 4), torch.tensor(1.0, dtype=torch.float64), field=2.0)
    base = Bernoulli(logits=torch.zeros(4, 4, dtype=torch.float64))
    nodes = torch.tensor([0.0, 0.5, 1.0])
    with pytest.warns(RuntimeWarning, match=r"The 3 nodes are too few"):
        found = thermodynamic_integration(energy, base, rng=generator(), kernel=BlockGibbs(), nodes=nodes)
    truth = float(enumeration(energy).value)
    assert float(found.log_z.lower) < truth < float(found.log_z.upper)
    assert abs(float(found.log_z.value) - truth) < 2.0 * float(found.discretisation)


def test_chains_that_do_not_move_warn():
    energy = Ising.lattice((4, 4), torch.tensor(1.5, dtype=torch.float64))
    base = Bernoulli(logits=torch.full((4, 4), 0.0, dtype=torch.float64))
    with pytest.warns(RuntimeWarning) as seen:
        thermodynamic_integration(energy + energy, base, rng=generator(), kernel=BlockGibbs(), nodes=3, steps=4)
    assert any("Chains have not told their means" in str(w.message) for w in seen)


def test_refusals():
    with pytest.raises(OptionError, match=r"from 0 to 1; these run from -0.1 to 1"):
        on_spins(nodes=torch.tensor([-0.1, 0.5, 1.0]))
    with pytest.raises(OptionError, match=r"these run from 0 to 1.2"):
        on_spins(nodes=torch.tensor([0.0, 0.5, 1.2]))
    with pytest.raises(OptionError, match="increasing"):
        on_spins(nodes=torch.tensor([0.0, 0.5, 0.5, 1.0]))
    with pytest.raises(OptionError, match="increasing"):
        on_spins(nodes=torch.tensor([0.0, 1.0]))
    with pytest.raises(OptionError, match="odd"):
        on_spins(nodes=8)
    with pytest.raises(OptionError, match="stops of its own"):
        on_spins(nodes=torch.tensor([0.0, 0.5, 1.0]), rule="gauss")
    with pytest.raises(OptionError, match="got 'simpson'"):
        on_spins(rule="simpson")
    with pytest.raises(OptionError, match="steps 4 or more"):
        on_spins(steps=3)
    with pytest.raises(OptionError, match="chains is 2 or more"):
        on_spins(chains=1)
    energy, rng = Ring(), generator()
    with pytest.raises(ArgumentTypeError, match="tractable"):
        thermodynamic_integration(energy, energy, rng=rng)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unadjusted"):
        thermodynamic_integration(energy, Gaussian(2), rng=rng, kernel=ULA(0.1))
    with pytest.raises(ShapeError):
        thermodynamic_integration(energy, Gaussian(3), rng=rng)
    half = Energy.of(lambda x: torch.where(x[:, 0] > 0, 0.5 * x.square().sum(1), torch.inf), event_shape=(2,))
    with pytest.raises(DivergenceError, match=r"at beta=0: the base reaches"):
        thermodynamic_integration(half, Gaussian(2), rng=rng, nodes=3)
