"""Noise-conditional energies: their Gaussian part is exact and normalised, and they are smooth functions of both."""

from __future__ import annotations

import pytest
import torch

from gibbsian import NoiseConditional, anneal, quadrature
from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.families.levels import build_annealing
from gibbsian.recipes import Recipe
from oracles import double_precision

SHAPES = [(1,), (3,), (1, 1, 1), (2, 3, 5)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(shape, n=200):
    return 3.0 + 0.7 * torch.randn((n, *shape), generator=generator(1), dtype=torch.float64)


def made(shape, **options) -> NoiseConditional:
    """Calibrated, in float64, with every weight moved away from its initial value."""
    with double_precision(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = NoiseConditional(shape, width=12, blocks=2, **options).calibrate(data(shape))
        for p in energy.parameters():
            p.data.add_(0.05 * torch.randn(p.shape, dtype=torch.float64))
    return energy


def silent(energy):
    """The same energy with nothing learned."""
    energy.leave.weight.data.zero_()
    energy.leave.bias.data.zero_()
    if energy.local:
        for p in energy.terms.parameters():
            p.data.zero_()
    return energy


def check_gaussian_part(energy):
    """Without the network the energy is the normalised Gaussian of data under noise, at every level."""
    x = data(energy.shape, 50)
    for sigma in (0.01, 0.7, 30.0):
        value = energy.given(sigma=torch.tensor(sigma, dtype=torch.float64))(x)
        assert torch.allclose(value, energy.base(sigma)(x), rtol=0, atol=1e-10), "not the base"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"frequencies": 2}, {"local": 3}, {"gain": 0.0}])
def test_the_gaussian_part_is_exact_and_normalised(shape, options):
    check_gaussian_part(silent(made(shape, **options)))


@pytest.mark.parametrize("wrong", ["constant", "scale"])
def test_a_gaussian_part_with_a_slip_is_caught(wrong, monkeypatch):
    energy = silent(made((3,)))
    real = NoiseConditional.forward

    def forward(self, x, sigma):
        if wrong == "constant":
            return real(self, x, sigma) - 1.5 * (self.scale.square() + sigma.square()).log()
        return real(self, x, (sigma.square() + 0.1).sqrt())

    monkeypatch.setattr(NoiseConditional, "forward", forward)
    with pytest.raises(AssertionError, match="not the base"):
        check_gaussian_part(energy)


def test_the_gaussian_part_integrates_to_one():
    energy = silent(made((2,)))
    log_z = quadrature(energy.given(sigma=torch.tensor(0.5, dtype=torch.float64)), -5.0, 11.0, 400).log_z
    assert abs(float(log_z.value)) < 1e-8


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0])
def test_the_learned_part_is_scaled_by_the_gain(gain):
    """E = Gaussian - (1 + s^2 / sigma^2)^(gain / 2) h((x - m) / sqrt(s^2 + sigma^2)): its factor tends to one."""
    energy = made((3,), gain=gain)
    with torch.no_grad():
        for sigma in (0.05, 1.0, 1e6):
            noise = torch.randn((20, 3), generator=generator(2), dtype=torch.float64)
            x = energy.mean + (energy.scale**2 + sigma**2).sqrt() * noise
            level = torch.full((20,), sigma, dtype=torch.float64)
            phase = level.log().unsqueeze(1) * energy.embedding
            u = (x - energy.mean) / (energy.scale**2 + sigma**2).sqrt()
            h = energy.network(u, torch.cat((phase.sin(), phase.cos()), 1))
            factor = (1 + (energy.scale / sigma) ** 2) ** (gain / 2)
            assert torch.allclose(energy(x, level), energy.base(sigma)(x) - factor * h, rtol=1e-9, atol=1e-9)
    if gain:
        assert abs(float(factor) - 1.0) < 1e-9


def check_normalisable(energy):
    """Far out the learned part, of whatever weights, vanishes beside the Gaussian's square, so that Z is finite."""
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(3.0)
        away = 1e6 * torch.randn((200, *energy.shape), generator=generator(3), dtype=torch.float64)
        for sigma in (0.05, 8.0):
            ratio = energy.given(sigma=torch.tensor(sigma, dtype=torch.float64))(away) / energy.base(sigma)(away)
            assert float((ratio - 1.0).abs().max()) < 0.1, "the learned part grows as fast as the Gaussian"


@pytest.mark.parametrize("options", [{}, {"frequencies": 2}, {"local": 3}, {"gain": 0.0}])
def test_the_energy_grows_like_the_gaussian_far_out(options):
    check_normalisable(made((3,), **options))


def test_local_terms_that_are_not_bounded_are_caught(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tanh", torch.nn.functional.silu)
    with pytest.raises(AssertionError, match="grows as fast"):
        check_normalisable(made((3,), local=3))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 5)])
@pytest.mark.parametrize("options", [{"frequencies": 2}, {"local": 3}])
def test_both_derivatives_are_autograds(shape, options):
    energy = made(shape, **options)
    x = data(shape, 4).requires_grad_(True)
    sigma = torch.tensor([0.05, 0.3, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: energy(x, s), (x, sigma), atol=1e-5)
    score = torch.autograd.grad(energy(x, sigma).sum(), x, create_graph=True)[0]
    (again,) = torch.autograd.grad(score.square().sum(), energy.enter.weight)
    assert bool(torch.isfinite(again).all())


def test_rows_do_not_see_each_other():
    energy = made((2, 3, 5), local=2)
    x, sigma = data((2, 3, 5), 6), torch.tensor([0.05, 0.1, 0.3, 1.0, 3.0, 8.0], dtype=torch.float64)
    together = energy(x, sigma)
    for i in range(6):
        assert torch.allclose(together[i], energy(x[i : i + 1], sigma[i : i + 1])[0], rtol=0, atol=1e-10)
    assert torch.allclose(together[4], energy.given(sigma=sigma[4])(x)[4], rtol=0, atol=1e-10)


def test_calibration_reads_mean_and_overall_scale():
    x = data((2, 3, 5), 500)
    energy = NoiseConditional((2, 3, 5)).calibrate(x.float())
    assert torch.allclose(energy.mean.double(), x.mean(0), atol=1e-6)
    assert float(energy.scale) == pytest.approx(float((x - x.mean(0)).square().mean().sqrt()), rel=1e-5)
    again = NoiseConditional((2, 3, 5))
    again.load_state_dict(energy.state_dict())
    assert torch.equal(again.mean, energy.mean)
    with pytest.raises(DataError, match="equal"):
        energy.calibrate(x[:1].expand(9, -1, -1, -1).float())
    with pytest.raises(ShapeError):
        energy.calibrate(x[:, 0].float())


def test_dropout_is_off_unless_training():
    energy = NoiseConditional((3,), width=16, dropout=0.5)
    x, sigma = data((3,), 10).float(), torch.ones(10)
    assert torch.equal(energy(x, sigma), energy(x, sigma))


@pytest.mark.parametrize("options", [{"width": 0}, {"blocks": 0}, {"frequencies": -1}, {"local": -1}, {"gain": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError):
        NoiseConditional((2,), **options)


def test_a_point_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"\(n, 3\)|\(3,\)|3"):
        NoiseConditional((3,))(torch.zeros(5, 2), torch.ones(5))


def test_it_is_one_graph():
    """No break in the graph of energy and score, in x and in sigma (the tracer alone; see below for the compiler)."""
    energy = made((2, 3, 5), local=2, frequencies=1)
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    x, sigma = data((2, 3, 5), 6), torch.full((6,), 0.3, dtype=torch.float64)
    assert torch.allclose(compiled(x, sigma), energy(x, sigma), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_compiled_energy_and_score_are_the_eager_ones():
    energy = made((2, 3, 5), local=2, frequencies=1)
    compiled = torch.compile(energy, fullgraph=True)
    x = data((2, 3, 5), 6).requires_grad_(True)
    sigma = torch.full((6,), 0.3, dtype=torch.float64)
    scores = [torch.autograd.grad(e(x, sigma).sum(), x)[0] for e in (compiled, energy)]
    assert torch.allclose(*scores, rtol=1e-9, atol=1e-9)


def test_walking_down_from_the_base_keeps_an_untaught_energys_gaussian():
    """With nothing learned, draws at the lowest level are the Gaussian of the data under that noise."""
    energy = silent(made((2,)))
    annealing = build_annealing(Recipe(sigma_max=5.0, sigma_min=0.1, sigma_density=0.1, levels=20))
    rng = generator(4)
    start = energy.base(5.0).sample(20_000, rng)
    x = anneal(energy, start, annealing, rng=rng)
    spread = float((energy.scale**2 + 0.1**2).sqrt())
    assert float((x.mean(0) - energy.mean).abs().max()) < 5.5 * spread / 20_000**0.5
    # The tail of 5.5 standard errors, and one part in a hundred for the step size.
    assert float((x.std(0) / spread - 1).abs().max()) < 5.5 / 40_000**0.5 + 0.01
