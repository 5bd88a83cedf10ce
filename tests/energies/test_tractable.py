"""Tractable energies: -log q against torch.distributions, draws against their moments, refusals."""

import math

import pytest
import torch
import torch.distributions as td

import gibbsian as gb
from contracts import ks, normal_cdf, seeded
from gibbsian.energies.tractable import require_support, require_tractable
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError

D = torch.float64
LOC = torch.tensor([0.5, -1.0, 2.0], dtype=D)
SCALE = torch.tensor([0.3, 1.0, 4.0], dtype=D)
COVARIANCE = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=D)
PICTURE = torch.randn((1, 4, 5), generator=seeded(), dtype=D)
PROBS = torch.tensor([0.1, 0.5, 0.93], dtype=D)
SITES = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]], dtype=D)


def independent(base):
    return td.Independent(base, len(base.batch_shape))


CASES = {
    "normal": (gb.Gaussian(loc=torch.zeros(3, dtype=D)), independent(td.Normal(torch.zeros(3, dtype=D), 1.0))),
    "scalar": (gb.Gaussian(loc=LOC, scale=2.5), independent(td.Normal(LOC, 2.5))),
    "diagonal": (gb.Gaussian(loc=LOC, scale=SCALE), independent(td.Normal(LOC, SCALE))),
    "full": (gb.Gaussian(loc=LOC, covariance=COVARIANCE), td.MultivariateNormal(LOC, COVARIANCE)),
    "picture": (gb.Gaussian((1, 4, 5), loc=PICTURE, scale=0.5), independent(td.Normal(PICTURE, 0.5))),
    "pictures in float32": (gb.Gaussian((1, 28, 28), scale=0.5), independent(td.Normal(torch.zeros(1, 28, 28), 0.5))),
    "box": (gb.Uniform(low=LOC, high=LOC + SCALE), independent(td.Uniform(LOC, LOC + SCALE))),
    "bits": (gb.Bernoulli(probs=PROBS), independent(td.Bernoulli(probs=PROBS))),
    "bits by logits": (gb.Bernoulli(logits=LOC), independent(td.Bernoulli(logits=LOC))),
    "bit pictures": (gb.Bernoulli(logits=PICTURE), independent(td.Bernoulli(logits=PICTURE))),
    "category": (gb.Categorical(probs=PROBS / PROBS.sum()), td.OneHotCategorical(probs=PROBS / PROBS.sum())),
    "sites": (gb.Categorical(probs=SITES), independent(td.OneHotCategorical(probs=SITES))),
    "sites by logits": (gb.Categorical(logits=5 * SITES), independent(td.OneHotCategorical(logits=5 * SITES))),
}


@pytest.mark.parametrize("name", CASES)
def test_log_densities_agree_with_torch_distributions(name):
    energy, reference = CASES[name]
    x = energy.sample(50, seeded(1))
    assert x.shape == (50, *energy.event_shape)
    assert x.dtype == reference.mean.dtype
    rtol = 1e-12 if x.dtype == D else 1e-5
    torch.testing.assert_close(energy.log_prob(x), reference.log_prob(x), rtol=rtol, atol=rtol)
    torch.testing.assert_close(energy(x), -reference.log_prob(x), rtol=rtol, atol=rtol)


def test_the_comparison_would_catch_a_missing_normaliser():
    energy, reference = CASES["full"]
    x = energy.sample(50, seeded(1))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(energy(x) - energy.log_normalizer, -reference.log_prob(x))


@pytest.mark.parametrize("name", [n for n in CASES if "28" not in n and "float32" not in n])
def test_draws_have_the_moments_of_the_density(name):
    """Means and covariances over 40,000 draws within 6 standard errors: 2 false alarms in 10^9 for each number."""
    energy, reference = CASES[name]
    n = 40_000
    x = energy.sample(n, seeded(2)).flatten(1)
    mean, variance = reference.mean.flatten(), reference.variance.flatten()
    assert bool(((x.mean(0) - mean).abs() < 6 * (variance / n).sqrt()).all())
    squares = (x - mean).square()
    assert bool(((squares.mean(0) - variance).abs() <= 6 * squares.std(0) / n**0.5).all())


def test_correlated_draws_have_their_covariance():
    energy, _ = CASES["full"]
    x = energy.sample(40_000, seeded(3)) - LOC
    products = x[:, :, None] * x[:, None, :]
    z = (products.mean(0) - COVARIANCE) / (products.std(0) / 200.0)
    assert float(z.abs().max()) < 6
    direction = torch.tensor([1.0, 2.0, -3.0], dtype=D)
    spread = float((direction @ COVARIANCE @ direction).sqrt())
    assert ks(x @ direction, lambda v: normal_cdf(v / spread)) < 3.1
    # The transposed factor, a fault that no diagonal test sees, has another covariance.
    factor = torch.linalg.cholesky(COVARIANCE)
    twin = torch.randn((40_000, 3), generator=seeded(3), dtype=D) @ factor
    assert ks(twin @ direction, lambda v: normal_cdf(v / spread)) > 3.1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (gb.Gaussian(3), gb.Gaussian(loc=LOC.float(), scale=SCALE.float())),
        (gb.Gaussian(covariance=torch.eye(3)), gb.Gaussian(loc=LOC.float(), covariance=COVARIANCE.float())),
        (gb.Uniform(3), gb.Uniform(low=LOC.float(), high=LOC.float() + 2)),
        (gb.Bernoulli(torch.zeros(3)), gb.Bernoulli(probs=PROBS.float())),
        (gb.Categorical(torch.zeros(2, 3)), gb.Categorical(probs=SITES.float())),
    ],
    ids=["diagonal", "full", "box", "bits", "sites"],
)
def test_a_state_dict_carries_the_whole_density(first, second):
    x = second.sample(6, seeded(5))
    assert not torch.equal(first(x), second(x))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    assert torch.equal(first.sample(4, seeded(6)), second.sample(4, seeded(6)))


@pytest.mark.parametrize("name", CASES)
def test_draws_come_from_the_given_generator_alone(name):
    energy, _ = CASES[name]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(energy.sample(3, seeded(7)), energy.sample(3, seeded(7)))
    assert not torch.equal(energy.sample(30, seeded(7)), energy.sample(30, seeded(8)))
    assert torch.equal(torch.get_rng_state(), before)


def test_outside_a_box_the_energy_is_infinite_and_the_edge_belongs_to_it():
    box = gb.Uniform(2, -1.0, 3.0)
    x = torch.tensor([[0.0, 0.0], [-1.0, 3.0], [-1.01, 0.0], [0.0, 3.01], [torch.nan, 0.0]])
    value, grad = gb.evaluate(box, x)
    assert value[:4].tolist() == pytest.approx([math.log(16.0)] * 2 + [math.inf] * 2)
    assert not bool(value[4].isfinite())
    assert bool((grad[:4] == 0).all())


def test_mala_keeps_to_a_box():
    box = gb.Uniform(1, -1.0, 3.0)
    out = gb.sample(box, gb.MALA(0.5), box.sample(20_000, seeded()), steps=5, rng=seeded(1))
    assert ks(out.x[:, 0].double(), lambda v: (v + 1.0) / 4.0) < 3.1


def test_the_shape_comes_from_any_argument_that_tells_it():
    assert gb.Gaussian(2).event_shape == (2,)
    assert gb.Gaussian((1, 28, 28)).event_shape == (1, 28, 28)
    assert gb.Gaussian(loc=LOC).event_shape == (3,)
    assert gb.Gaussian(scale=PICTURE.abs()).event_shape == (1, 4, 5)
    assert gb.Gaussian(covariance=COVARIANCE).event_shape == (3,)
    assert gb.Gaussian((4, 3), loc=LOC).event_shape == (4, 3)
    assert gb.Uniform(high=SCALE).event_shape == (3,)
    assert gb.Uniform(3, low=-SCALE, high=SCALE).low.dtype == D
    assert gb.Gaussian(loc=torch.tensor([1, 2])).loc.dtype == torch.float32


REFUSED = {
    "no shape": (lambda: gb.Gaussian(), OptionError, "Say the shape of a Gaussian"),
    "no shape, box": (lambda: gb.Uniform(), OptionError, "Say the shape of a Uniform"),
    "zero size": (lambda: gb.Gaussian(0), OptionError, "positive whole sizes; got 0"),
    "fractional size": (lambda: gb.Gaussian((2, 1.5)), OptionError, r"got \(2, 1.5\)"),
    "negative scale": (lambda: gb.Gaussian(2, scale=-1.0), OptionError, "positive finite standard deviation; got -1.0"),
    "one scale of zero": (lambda: gb.Gaussian(scale=torch.tensor([1.0, 0.0])), OptionError, "positive finite"),
    "NaN scale": (lambda: gb.Gaussian(2, scale=math.nan), OptionError, "got nan"),
    "infinite scale": (lambda: gb.Gaussian(2, scale=math.inf), OptionError, "got inf"),
    "NaN mean": (lambda: gb.Gaussian(2, loc=math.nan), OptionError, "mean is finite; got nan"),
    "misfit mean": (lambda: gb.Gaussian(2, loc=LOC), ShapeError, r"loc of shape \(3,\) does not fit .* \(2,\)"),
    "misfit scale": (lambda: gb.Gaussian(loc=LOC, scale=torch.ones(2)), ShapeError, r"scale of shape \(2,\)"),
    "both scales": (lambda: gb.Gaussian(scale=2.0, covariance=COVARIANCE), OptionError, "one of scale and covariance"),
    "indefinite": (lambda: gb.Gaussian(covariance=COVARIANCE - 3), OptionError, "positive definite"),
    "asymmetric": (
        lambda: gb.Gaussian(covariance=COVARIANCE.tril()),
        OptionError,
        "differs from its transpose by up to 0.6",
    ),
    "NaN covariance": (lambda: gb.Gaussian(covariance=COVARIANCE * math.nan), OptionError, "symmetric"),
    "oblong covariance": (lambda: gb.Gaussian(covariance=COVARIANCE[:2]), OptionError, r"got shape \(2, 3\)"),
    "flat covariance": (lambda: gb.Gaussian(covariance=SCALE), OptionError, r"got shape \(3,\)"),
    "covariance of pictures": (lambda: gb.Gaussian((1, 3), covariance=COVARIANCE), OptionError, r"of shape \(1, 3\)"),
    "empty box": (lambda: gb.Uniform(2, 1.0, 1.0), OptionError, "finite low < high"),
    "endless box": (lambda: gb.Uniform(2, 0.0, math.inf), OptionError, "finite low < high"),
    "misfit box": (lambda: gb.Uniform(2, low=LOC), ShapeError, r"low of shape \(3,\)"),
    "neither": (lambda: gb.Bernoulli(), OptionError, "exactly one of logits and probs"),
    "both": (lambda: gb.Categorical(LOC, PROBS), OptionError, "exactly one of logits and probs"),
    "certain bit": (lambda: gb.Bernoulli(probs=torch.tensor([0.5, 1.0])), OptionError, "0.5 to 1. A certain outcome"),
    "impossible category": (
        lambda: gb.Categorical(probs=torch.tensor([1.0, 0.0])),
        OptionError,
        "smooth the frequencies",
    ),
    "NaN probability": (lambda: gb.Bernoulli(probs=torch.tensor([math.nan])), OptionError, "strictly between 0 and 1"),
    "wrong points": (lambda: gb.Gaussian(3)(torch.zeros(4, 2)), ShapeError, r"Expected .* \(n, 3\); got \(4, 2\)"),
    "one point": (lambda: gb.Uniform(3)(torch.zeros(3)), ShapeError, r"got \(3,\)"),
    "flattened pictures": (
        lambda: gb.Gaussian((1, 2, 2))(torch.zeros(5, 4)),
        ShapeError,
        r"\(n, 1, 2, 2\); got \(5, 4\)",
    ),
    "wrong bits": (lambda: gb.Bernoulli(torch.zeros(3))(torch.zeros(4, 2)), ShapeError, r"\(n, 3\)"),
    "wrong sites": (lambda: gb.Categorical(torch.zeros(2, 3))(torch.zeros(4, 3)), ShapeError, r"\(n, 2, 3\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case):
    build, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        build()


def test_what_a_place_requires_is_said():
    assert require_tractable(gb.Gaussian(2), "base").event_shape == (2,)
    with pytest.raises(ArgumentTypeError, match=r"base must be a tractable energy .* got <lambda>"):
        require_tractable(gb.Energy.of(lambda x: x), "base")
    bits = gb.Bernoulli(torch.zeros(3))
    require_support(torch.ones(2, 3), bits, "the data")
    with pytest.raises(DomainError, match="2 of 4 rows of the data lie outside the energy's domain, Boolean"):
        require_support(
            torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), bits, "the data"
        )


def test_a_size_in_the_place_of_logits_is_named():
    with pytest.raises(ArgumentTypeError, match=r"are tensors of the event's shape; got 8\..*torch\.zeros\(n\)"):
        gb.Bernoulli(8)
