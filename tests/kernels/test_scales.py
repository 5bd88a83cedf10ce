"""Scales, jitter and step sizes of one chain each: exact, compiled, the same as in round coordinates."""

import math

import pytest
import torch

import gibbsian as gb
from contracts import TARGETS, assert_continues, assert_invariant, assert_one_graph, assert_reversible, seeded
from gibbsian.errors import OptionError, ShapeError

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
PLANAR = TARGETS[:2]


@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
@pytest.mark.parametrize("target", PLANAR, ids=repr)
@pytest.mark.parametrize("kind", [gb.MALA, gb.HMC])
def test_a_scale_keeps_kernels_exact(kind, target, scale):
    kernel = kind(0.4, scale=scale)
    assert_invariant(kernel, target)
    assert_reversible(kernel, target)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_jitter_keeps_hmc_exact(target):
    kernel = gb.HMC(0.5, leapfrog=3, jitter=0.9)
    assert_invariant(kernel, target)
    assert_reversible(kernel, target)


@pytest.mark.parametrize("kernel", [gb.ULA(0.05), gb.MALA(0.3), gb.HMC(0.4, leapfrog=3)], ids=repr)
@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
def test_a_scale_is_a_change_of_coordinates(kernel, scale):
    """Chains in x with scale L are L times the chains in y = x / L of the energy seen from there."""
    factor = scale if scale.ndim == 2 else scale.diag()
    target = PLANAR[1].energy
    start = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    kind = type(kernel)
    options = {"leapfrog": 3} if kind is gb.HMC else {}
    scaled = gb.sample(target, kind(kernel.step_size, scale=scale, **options), start @ factor.T, steps=9, rng=seeded(1))
    plain = gb.sample(gb.Energy.of(lambda y: target(y @ factor.T)), kernel, start, steps=9, rng=seeded(1))
    torch.testing.assert_close(scaled.x, plain.x @ factor.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", [gb.ULA, gb.MALA, gb.HMC])
def test_chains_may_have_step_sizes_of_their_own(kernel):
    energy = PLANAR[1].energy
    start = torch.randn(6, 2, generator=seeded(), dtype=torch.float64)
    sizes = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.3], dtype=torch.float64)
    each = gb.sample(energy, kernel(sizes), start, steps=5, rng=seeded(1))
    one = gb.sample(energy, kernel(0.2), start, steps=5, rng=seeded(1))
    assert torch.equal(each.x[sizes == 0.2], one.x[sizes == 0.2])
    assert not torch.equal(each.x[sizes == 0.1], one.x[sizes == 0.1])


@pytest.mark.parametrize(
    "kernel",
    [gb.ULA(0.1, scale=FACTOR), gb.MALA(0.1, scale=DIAGONAL), gb.HMC(0.3, 2, scale=FACTOR, jitter=0.5)],
    ids=repr,
)
def test_scaled_and_jittered_kernels_compile_to_one_graph_and_continue(kernel, graphs):
    energy, start = PLANAR[0].energy, PLANAR[0].draw(5, seeded())
    assert_one_graph(kernel, energy, start, graphs)
    assert_continues(kernel, energy, start)


def test_a_scale_pays_where_the_target_is_thin():
    spread = torch.tensor([1.0, 0.01], dtype=torch.float64)
    energy = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=spread)
    start = energy.sample(200, seeded())
    plain = gb.sample(energy, gb.MALA(0.3), start, steps=50, rng=seeded(1))
    fitted = gb.sample(energy, gb.MALA(0.3, scale=spread), start, steps=50, rng=seeded(1))
    assert float(plain.acceptance.mean()) < 0.05
    assert float(fitted.acceptance.mean()) > 0.8


def test_half_precision_gradients_stay_near_the_full_ones():
    torch.manual_seed(0)
    energy = gb.MLP(2, hidden=(32, 32)) + gb.Gaussian(2)
    start = torch.randn(64, 2, generator=seeded())
    full = gb.sample(energy, gb.ULA(0.01), start, steps=20, rng=seeded(1))
    half = gb.sample(energy, gb.ULA(0.01, autocast=torch.bfloat16), start, steps=20, rng=seeded(1))
    assert half.x.dtype == torch.float32
    assert 0.0 < float((half.x - full.x).abs().max()) < 0.02


def test_details_are_kept_with_draws_and_averaged():
    energy = gb.Gaussian(3)
    out = gb.sample(energy, gb.HMC(0.3, 3), torch.zeros(4, 3), steps=12, thin=2, rng=seeded())
    assert set(out.kept) == {"energy", "acceptance", "hamiltonian"}
    assert out.kept["energy"].shape == (6, 4)
    torch.testing.assert_close(out.kept["energy"], energy(out.draws.flatten(0, 1)).view(6, 4))
    every = gb.sample(energy, gb.HMC(0.3, 3), torch.zeros(4, 3), steps=12, thin=1, rng=seeded())
    torch.testing.assert_close(every.kept["hamiltonian"].mean(0), every.details["hamiltonian"])
    torch.testing.assert_close(every.kept["acceptance"].mean(0), every.acceptance)


def test_kernels_print_what_is_set():
    assert repr(gb.ULA(0.05)) == "ULA(step_size=0.05)"
    assert repr(gb.MALA(torch.tensor(0.25), scale=DIAGONAL)) == "MALA(step_size=0.25, scale=<(2,)>)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gb.MALA(0.1, scale=torch.tensor([1.0, 0.0])), OptionError, "positive finite standard deviations"),
        (lambda: gb.MALA(0.1, scale=torch.tensor([[1.0, 0.5], [0.5, 1.0]]) - 1.0), OptionError, "lower triangular"),
        (lambda: gb.HMC(0.1, scale=2.0), OptionError, "scale is a tensor"),
        (lambda: gb.HMC(0.1, jitter=1.5), OptionError, "jitter is a fraction .* got 1.5"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_scale_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"points of shape \(3,\) .* a factor \(3, 3\); got \(2,\)"):
        gb.sample(gb.Gaussian(3), gb.MALA(0.1, scale=torch.ones(2)), torch.zeros(4, 3), steps=1, rng=seeded())


def test_an_energy_may_bring_its_own_gradient(graphs):
    """Also in compositions, and where nothing can be differentiated."""
    calls = []

    def outside(x):
        calls.append(len(x))
        with torch.no_grad():
            return 0.5 * x.square().sum(1), x.clone()

    own = gb.Energy.of(outside, (2,), with_gradient=True)
    plain = gb.Energy.of(lambda x: 0.5 * x.square().sum(1), (2,))
    start = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    for make in (lambda e: e, lambda e: 0.3 * e + PLANAR[0].energy):
        a, b = (gb.sample(make(e), gb.HMC(0.3, 3), start, steps=6, rng=seeded(1)) for e in (own, plain))
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)
    assert calls
    traced = gb.Energy.of(lambda x: (0.5 * x.square().sum(1), 1.0 * x), (2,), with_gradient=True)
    assert_one_graph(gb.MALA(0.2), traced, start, graphs)
    value, grad = gb.evaluate(own, start)
    torch.testing.assert_close(value, 0.5 * start.square().sum(1))
    torch.testing.assert_close(grad, start)
    assert math.isfinite(float(own(start).sum()))
