"""Guidance: the algebra, windows, rescaling, and that the corrected walk draws from the guided density.

The conditional mixture in the plane has three classes of two parts each; the noisy energies are known at every level,
and the guided density by quadrature.
"""

from __future__ import annotations

import math

import pytest
import torch

from gibbsian import annealing
from gibbsian.annealing import annealed_chains
from gibbsian.applications.guidance import guided, guided_by_label, scale_from_weight
from gibbsian.bridges.reverse import reverse
from gibbsian.bridges.scores import EnergyScore, score_of
from gibbsian.energies.base import Energy
from gibbsian.energies.neural import MLP
from gibbsian.energies.schedules import VarianceExploding
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.partition.exact import quadrature

LOCS = torch.tensor(
    [[[-1.0, 0.0], [0.2, 1.0]], [[1.2, 0.0], [0.0, -1.2]], [[0.3, 1.6], [-0.8, -0.8]]], dtype=torch.float64
)
SIZES = torch.tensor([[0.8, 0.7], [0.8, 0.7], [0.7, 0.9]], dtype=torch.float64)
MASSES = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.7, 0.3]], dtype=torch.float64)
LOW, HIGH, BOX, CELLS, INNER = 0.02, 8.0, 6.0, 20, 6


def conditional(x, sigma, y):
    """Energies of each row's class, or of all where the label is 3."""
    v = SIZES**2 + sigma[:, None, None] ** 2
    parts = MASSES.log() - ((x[:, None, None] - LOCS) ** 2).sum(3) / (2 * v) - (2 * math.pi * v).log()
    classes = torch.logsumexp(parts, 2)
    everything = torch.logsumexp(classes, 1, keepdim=True) - math.log(3)
    return -torch.cat((classes, everything), 1).gather(1, y[:, None]).squeeze(1)


MODEL = Energy.of(conditional, (2,), context=("sigma", "y"))
LEVELS = VarianceExploding(LOW, HIGH, rho=4.0, sigma_data=1.0).levels(30)


def exact_masses(energy):
    """Masses of the squares of a box, from the corners of a finer grid."""
    p = quadrature(energy.given(sigma=LOW), -BOX, BOX, points=CELLS * INNER).log_prob.exp()
    p = p[1:, 1:] + p[:-1, 1:] + p[1:, :-1] + p[:-1, :-1]
    p = p.reshape(CELLS, INNER, CELLS, INNER).sum((1, 3))
    return p / p.sum()


def total_variation(x, masses):
    index = ((x + BOX) / (2 * BOX) * CELLS).floor().long()
    inside = ((index >= 0) & (index < CELLS)).all(1)
    flat = index[inside, 0] * CELLS + index[inside, 1]
    share = torch.bincount(flat, minlength=CELLS**2).double() / len(x)
    return 0.5 * float((share - masses.flatten()).abs().sum() + 1.0 - share.sum())


def start(n, seed=2):
    rng = torch.Generator().manual_seed(seed)
    return HIGH * torch.randn((n, 2), generator=rng, dtype=torch.float64), rng


def corrected(energy):
    x, rng = start(1600)
    return annealed_chains(energy, x, LEVELS, MALA(5.0), steps=6, rng=rng, last_steps=40, thin=5)


def check_corrected(scale, energy=None) -> None:
    exact = exact_masses(guided_by_label(MODEL, 0, scale, classes=3))
    run = corrected(guided_by_label(MODEL, 0, scale, classes=3) if energy is None else energy)
    assert run.samples.draws is not None
    found = total_variation(run.samples.draws.flatten(0, 1), exact)
    assert found < 0.05, f"total variation {found}"


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.0])
def test_corrected_guidance_draws_from_the_guided_density(scale):
    check_corrected(scale)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.0])
def test_plain_guidance_does_so_at_the_scales_0_and_1_only(scale):
    energy = guided_by_label(MODEL, 0, scale, classes=3)
    x, _ = start(12_000)
    found = total_variation(reverse(energy, x, LEVELS), exact_masses(energy))
    assert (found < 0.05) if scale <= 1.0 else (found > 0.1), found


def test_the_other_convention_of_the_scale_is_caught():
    """S taken for the weight w."""
    with pytest.raises(AssertionError, match="total variation"):
        check_corrected(3.0, guided_by_label(MODEL, 0, scale_from_weight(3.0), classes=3))


def test_branches_the_wrong_way_round_are_caught():
    with pytest.raises(AssertionError, match="total variation"):
        check_corrected(0.0, guided(MODEL.given(y=3), MODEL.given(y=0), 0.0))


def test_the_step_size_finds_its_acceptance_on_the_way_down():
    run = corrected(guided_by_label(MODEL, 0, 3.0, classes=3))
    assert run.levels == tuple(LEVELS)
    assert run.acceptance.shape == run.step_sizes.shape == (31,)
    assert abs(float(run.acceptance[-1]) - 0.574) < 0.05
    assert float(run.step_sizes[-1]) < 0.3 * float(run.step_sizes[0])


def test_a_function_of_the_level_is_used_as_it_is():
    x, rng = start(50)
    run = annealed_chains(
        MODEL.given(y=0), x, [8.0, 2.0, 0.5], lambda sigma: HMC(0.5 * sigma, leapfrog=2), steps=1, rng=rng
    )
    assert run.step_sizes.tolist() == [4.0, 1.0, 0.25]
    assert run.samples.draws is None
    run = annealed_chains(MODEL.given(y=0), x, [8.0, 2.0], ULA(0.1), steps=1, rng=rng)
    torch.testing.assert_close(run.step_sizes, torch.tensor([0.1, 0.1]))


def points(n=12):
    rng = torch.Generator().manual_seed(0)
    return torch.randn((n, 2), generator=rng, dtype=torch.float64), torch.linspace(0.1, 4.0, n, dtype=torch.float64)


def test_the_scale_is_0_for_unconditional_and_1_for_conditional_and_linear():
    x, sigma = points()
    c, u = MODEL.given(y=1), MODEL.given(y=3)
    for scale in (0.0, 1.0, 2.5, torch.tensor(2.5, dtype=torch.float64)):
        expected = u(x, sigma=sigma) + scale * (c(x, sigma=sigma) - u(x, sigma=sigma))
        energy = guided_by_label(MODEL, 1, scale, classes=3)
        torch.testing.assert_close(energy(x, sigma=sigma), expected)
        score = guided_by_label(score_of(MODEL), 1, scale, classes=3)
        torch.testing.assert_close(score(x, sigma), EnergyScore(energy)(x, sigma))
    assert scale_from_weight(2.0) == 3.0


def test_labels_may_differ_by_row_and_stay_open():
    x, sigma = points(3)
    labels = torch.tensor([0, 1, 2])
    fixed = guided_by_label(MODEL, labels, 3.0, classes=3)
    open_label = guided(MODEL, MODEL.given(y=3), 3.0)
    assert "y" in open_label.context
    torch.testing.assert_close(fixed(x, sigma=sigma), open_label(x, sigma=sigma, y=labels))


def test_energies_without_noise_are_guided_too():
    a, b = Gaussian(2, loc=1.0), Gaussian(2, scale=2.0)
    x = points()[0].float()
    torch.testing.assert_close(guided(a, b, 3.0)(x), 3.0 * a(x) - 2.0 * b(x))


def test_outside_its_window_the_model_is_the_conditional_one():
    x, sigma = points()
    inside = (sigma >= 0.5) & (sigma <= 2.0)
    assert bool(inside.any())
    assert not bool(inside.all())
    for model in (MODEL, score_of(MODEL)):
        windowed = guided_by_label(model, 0, 4.0, classes=3, window=(0.5, 2.0))
        whole, plain = guided_by_label(model, 0, 4.0, classes=3), model.given(y=0)
        found, there, elsewhere = (f(x, sigma=sigma) for f in (windowed, whole, plain))
        torch.testing.assert_close(found[inside], there[inside])
        torch.testing.assert_close(found[~inside], elsewhere[~inside])


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaling_brings_the_clean_points_spread_back(rescale):
    x, sigma = points()
    score = score_of(MODEL)
    kept = score.given(y=0).denoised(x, sigma)
    raw = guided_by_label(score, 0, 7.0, classes=3).denoised(x, sigma)
    found = guided_by_label(score, 0, 7.0, classes=3, rescale=rescale).denoised(x, sigma)
    ratio = (kept.std(1) / raw.std(1))[:, None]
    torch.testing.assert_close(found, (rescale * ratio + 1.0 - rescale) * raw)
    if rescale == 1.0:
        torch.testing.assert_close(found.std(1), kept.std(1))


A, S = Gaussian(2), score_of(MODEL)
BOX_ENERGY = Energy.of(lambda x: x.sum(1), (2,), torch.distributions.constraints.interval(0.0, 1.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: guided(A, None, 2.0), OptionError, "unconditional branch"),
        (lambda: guided(A, A, -1.0), OptionError, "guidance scale"),
        (lambda: guided(A, A, math.nan), OptionError, "guidance scale"),
        (lambda: guided(A, A, 2.0, rescale=0.5), OptionError, "for scores"),
        (lambda: guided(A, A, 2.0, window=(0.1, 1.0)), OptionError, "context sigma"),
        (lambda: guided(S, S, 2.0, window=(1.0, 0.1)), OptionError, "low < high"),
        (lambda: guided(S, S, 2.0, rescale=2.0), OptionError, "rescale"),
        (lambda: guided(A, S, 2.0), ArgumentTypeError, "two energies or two scores"),
        (lambda: guided(A, Gaussian(3), 2.0), ShapeError, "different shapes"),
        (lambda: guided(BOX_ENERGY, Bernoulli(torch.zeros(2)), 2.0), DomainError, "different domains"),
        (lambda: guided_by_label(A, 0, 2.0, classes=3), OptionError, "takes no label"),
        (lambda: guided_by_label(3, 0, 2.0, classes=3), ArgumentTypeError, "energy or a score"),
        (lambda: guided_by_label(MLP(2, classes=3), 0, 2.0, classes=3), OptionError, "classes=4"),
        (lambda: guided_by_label(MODEL, 4, 2.0, classes=3), OptionError, "got 4"),
        (lambda: guided_by_label(MODEL, torch.tensor([0, -1]), 2.0, classes=3), OptionError, "got -1"),
        (lambda: guided_by_label(MODEL, 0.5, 2.0, classes=3), ArgumentTypeError, "whole numbers"),
        (lambda: annealed_chains(A, torch.zeros(2, 2), [2.0, 1.0], MALA(1.0), steps=1, rng=torch.Generator()),
         OptionError, "context sigma"),
        (lambda: annealed_chains(MODEL.given(y=0), start(2)[0], [1.0, 2.0], MALA(1.0), steps=1, rng=torch.Generator()),
         OptionError, "falling"),
        (lambda: annealed_chains(MODEL.given(y=0), start(2)[0], [2.0, 1.0], MALA(1.0), steps=0, rng=torch.Generator()),
         OptionError, "1 or more"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_coordinate_has_no_spread_to_rescale():
    flat = EnergyScore(Energy.of(lambda x, sigma: x.square().sum(1), (1,), context=("sigma",)))
    with pytest.raises(ShapeError, match="only one"):
        guided(flat, flat, 2.0, rescale=1.0)(torch.zeros(2, 1), torch.ones(2))


def test_a_slip_in_the_chains_is_caught(monkeypatch):
    """Chains that stay on the level above."""
    real = annealing.sample
    low = Energy.of(lambda x, sigma: conditional(x, torch.full_like(sigma, 1.5), torch.zeros(len(x)).long()), (2,),
                    context=("sigma",))  # fmt: skip
    monkeypatch.setattr(annealing, "sample", lambda energy, *a, **k: real(low.given(sigma=1.0), *a, **k))
    with pytest.raises(AssertionError, match="total variation"):
        check_corrected(1.0)
