"""The algebra of energies: identities to the bit or to rounding, contexts, formulas, refusals."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.base import Combination
from gibbsian.energies.domains import common_support, same_support
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError

X = torch.randn((7, 2), generator=seeded(), dtype=torch.float64)


def gaussian(*loc, scale=1.0):
    return gb.Gaussian(loc=torch.tensor(loc, dtype=torch.float64), scale=scale)


A, B, C = gaussian(0.0, 0.0), gaussian(1.0, -1.0, scale=0.5), gaussian(-2.0, 0.5, scale=2.0)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


class Shifted(gb.Energy):
    """A conditional energy: the square of the distance to y, in units of t."""

    context = ("y", "t")

    def forward(self, x, y, t):
        return ((x - y[:, None]) / t[:, None]).square().sum(1)


HALVES = torch.tensor([0.5, 0.5], dtype=torch.float64)

IDENTITIES = {
    "sum": (A + B, lambda: A(X) + B(X)),
    "built-in sum": (sum([A, B, C]), lambda: A(X) + B(X) + C(X)),
    "function from the left": ((lambda x: x.sum(1)) + A, lambda: X.sum(1) + A(X)),
    "difference": (A - B, lambda: A(X) - B(X)),
    "difference of sums": (A - (B + C), lambda: A(X) - B(X) - C(X)),
    "scale": (0.3 * A, lambda: 0.3 * A(X)),
    "scale from the right": (A * 0.3, lambda: 0.3 * A(X)),
    "tensor scale": (scalar(0.3) * A, lambda: 0.3 * A(X)),
    "tensor scale from the right": (A * scalar(0.3), lambda: 0.3 * A(X)),
    "temperature": (A / 4.0, lambda: A(X) / 4.0),
    "tensor temperature": (A / scalar(4.0), lambda: A(X) / 4.0),
    "negation": (-A, lambda: -A(X)),
    "scaled sum": (2.0 * (A + 0.5 * B), lambda: 2.0 * A(X) + B(X)),
    "tensor on a scaled sum": (scalar(2.0) * (A + scalar(0.5) * B), lambda: 2.0 * A(X) + B(X)),
    "path": ((1 - scalar(0.25)) * A + scalar(0.25) * (B - C), lambda: 0.75 * A(X) + 0.25 * (B(X) - C(X))),
    "self": (A + A - 2.0 * A, lambda: 0.0 * A(X)),
    "function": (A + (lambda x: x.sum(1)), lambda: A(X) + X.sum(1)),
    "function on the left": ((lambda x: x.sum(1)) + A, lambda: A(X) + X.sum(1)),
    "function taken off": (A - (lambda x: x.sum(1)), lambda: A(X) - X.sum(1)),
    "mixture": (
        gb.mixture(A, B, weights=torch.tensor([0.25, 0.5], dtype=torch.float64)),
        lambda: -(0.25 * torch.exp(-A(X)) + 0.5 * torch.exp(-B(X))).log(),
    ),
    "equal mixture": (
        gb.mixture(A, B, weights=HALVES),
        lambda: -(0.5 * torch.exp(-A(X)) + 0.5 * torch.exp(-B(X))).log(),
    ),
    "mixture of one": (gb.mixture(A, weights=HALVES[:1]), lambda: A(X) + math.log(2.0)),
    "mixture of a mixture": (
        gb.mixture(gb.mixture(A, B), C, weights=[2.0, 1.0]),
        lambda: -(torch.exp(-A(X)) + torch.exp(-B(X)) + torch.exp(-C(X))).log(),
    ),
    "mixture of a product": (
        gb.mixture(A + B, C, weights=HALVES) + A,
        lambda: A(X) - (0.5 * torch.exp(-A(X) - B(X)) + 0.5 * torch.exp(-C(X))).log(),
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    energy, expected = IDENTITIES[name]
    torch.testing.assert_close(energy(X), expected(), rtol=0, atol=1e-12)
    assert energy.event_shape == (2,)
    assert energy.context == ()


def test_the_identities_would_catch_a_flipped_sign():
    torch.testing.assert_close((A - B)(X), A(X) - B(X))
    with pytest.raises(AssertionError):
        torch.testing.assert_close((A + B)(X), A(X) - B(X), rtol=0, atol=1e-12)


def test_nested_combinations_are_one_flat_sum():
    energy = 2.0 * (A + 0.5 * (B - C)) - (C - A)
    assert [weight for weight, _ in energy.terms] == [2.0, 1.0, -1.0, -1.0, 1.0]
    assert [e for _, e in energy.terms] == [A, B, C, C, A]
    assert not any(isinstance(e, Combination) for _, e in energy.terms)


def test_a_mixture_is_exact_far_from_every_part():
    far = torch.full((1, 2), 60.0, dtype=torch.float64)
    energy = gb.mixture(A, B, weights=HALVES)
    torch.testing.assert_close(energy(far), A(far) + math.log(2.0))
    _, grad = gb.evaluate(energy, far)
    torch.testing.assert_close(grad, far)


def test_a_mixture_of_energies_with_their_log_z_has_the_shares_that_were_asked():
    # The same two densities, one of them told with a constant added, which its log Z takes back.
    x = X.double()
    shifted = gb.Energy.of(lambda y: B(y) - 700.0, (2,))
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = gb.mixture(A, shifted, weights=shares, log_z=[0.0, 700.0])
    expected = gb.mixture(A, B, weights=shares)
    torch.testing.assert_close(found(x), expected(x), atol=1e-10, rtol=0)
    assert not torch.allclose(gb.mixture(A, shifted, weights=[0.3, 0.7])(x), expected(x), atol=1.0)


@pytest.mark.parametrize("log_z", [[0.0], [0.0, 1.0, 2.0], [0.0, math.nan]])
def test_a_mixture_takes_one_finite_log_z_each(log_z):
    with pytest.raises(OptionError, match="finite log Z"):
        gb.mixture(A, B, log_z=log_z)


def test_a_mixture_of_boxes_is_finite_in_either():
    boxes = gb.mixture(gb.Uniform(1, 0.0, 1.0), gb.Uniform(1, 2.0, 4.0))
    value, grad = gb.evaluate(boxes, torch.tensor([[0.5], [1.5], [3.0]]))
    torch.testing.assert_close(value, torch.tensor([math.log(2.0), torch.inf, math.log(4.0)]))
    assert grad[0] == 0.0
    assert grad[2] == 0.0


FORMULAS = {
    "Gaussian(2, scale=1) + Gaussian(2, scale=0.5)": A + B,
    "Gaussian(2, scale=1) - Gaussian(2, scale=0.5)": A - B,
    "0.5*Gaussian(2, scale=1) + Gaussian(2, scale=2)": 0.5 * A + C,
    "-0.5*Gaussian(2, scale=1) - 0.25*Gaussian(2, scale=2)": -0.5 * A - C / 4.0,
    "-Gaussian(2, scale=1)": -A,
    "0.3*Gaussian(2, scale=1)": scalar(0.3) * A,
    "2*Gaussian(2, scale=1) + 2*Gaussian(2, scale=0.5)": 2.0 * (A + B),
    "mixture(Gaussian(2, scale=1), Gaussian(2, scale=0.5), weights=[0.5, 0.5])": gb.mixture(A, B),
    "2*mixture(Gaussian(2, scale=1) + Gaussian(2, scale=2), Gaussian(2, scale=0.5), weights=[3, 0.1]) - Gaussian(2, "
    "scale=1)": 2.0 * gb.mixture(A + C, B, weights=[3.0, 0.1]) - A,
    "Shifted().given(y=0.5)": Shifted().given(y=0.5),
    "Shifted().given(y=<(7,)>).given(t=2)": Shifted().given(y=torch.zeros(7)).given(t=2),
    "(Shifted() + Gaussian(2, scale=1)).given(y=0, t=1)": (Shifted() + A).given(y=0, t=1),
    "softplus": gb.Energy.of(nn.functional.softplus),
    "Linear + Gaussian(2, scale=1)": gb.Energy.of(nn.Linear(2, 1)) + A,
    "Gaussian(2)": gb.Gaussian(covariance=torch.eye(2)),
    "Gaussian((1, 2, 3), scale=2)": gb.Gaussian((1, 2, 3), scale=2.0),
    "Uniform((2,), -1, 3)": gb.Uniform(2, -1.0, 3.0),
    "Bernoulli((3,))": gb.Bernoulli(torch.zeros(3)),
    "Categorical((4, 3))": gb.Categorical(torch.zeros(4, 3)),
}


@pytest.mark.parametrize("text", FORMULAS)
def test_energies_print_as_their_formula(text):
    assert repr(FORMULAS[text]) == text


def test_a_tensor_weight_can_change_and_stays_the_callers_tensor():
    beta = scalar(0.25)
    for energy, rest in ((beta * A + B, B(X)), (B + beta * A, B(X)), (beta * A, 0.0)):
        beta.fill_(0.25)
        torch.testing.assert_close(energy(X), 0.25 * A(X) + rest)
        beta.fill_(3.0)
        torch.testing.assert_close(energy(X), 3.0 * A(X) + rest)


def test_a_tensor_weight_follows_to_and_is_saved():
    energy = torch.tensor(0.25) * gb.Gaussian(2) + gb.Gaussian(2)
    assert energy.double().terms[0][0].dtype == torch.float64
    assert energy(X).dtype == torch.float64
    state = energy.state_dict()
    assert float(state["weight_0"]) == 0.25
    other = torch.tensor(0.5) * gb.Gaussian(2) + gb.Gaussian(2)
    other.load_state_dict(state)
    torch.testing.assert_close(other.double()(X), energy(X))


def test_a_parameter_as_weight_is_learned():
    beta = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    energy = A + beta * B
    assert list(energy.parameters()) == [beta]
    for _ in range(2):
        (grad,) = torch.autograd.grad(energy(X).sum(), beta)
        torch.testing.assert_close(grad, B(X).sum())
    assert repr(energy) == "Gaussian(2, scale=1) + 0.5*Gaussian(2, scale=0.5)"


def test_the_parts_of_a_sum_are_shared_not_copied():
    net = gb.Energy.of(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)))
    energy = (0.5 * net + gb.Gaussian(2)).given()
    assert list(energy.parameters()) == list(net.parameters())
    assert energy.energy.terms[0][1] is net


def test_of_adopts_functions_and_modules_and_leaves_energies():
    assert gb.Energy.of(A) is A
    linear = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    energy = gb.Energy.of(linear, (2,), constraints.real_vector)
    torch.testing.assert_close(energy(X), linear(X))
    assert len(list(energy.parameters())) == 2
    assert energy.event_shape == (2,)
    labelled = gb.Energy.of(lambda x, y: x.sum(1) * y, context=["y"])
    torch.testing.assert_close(labelled.given(y=2.0)(X), 2.0 * X.sum(1))
    with pytest.raises(ArgumentTypeError, match="got 3"):
        gb.Energy.of(3)
    with pytest.raises(ArgumentTypeError, match="got 3"):
        A + 3


def test_a_context_is_one_value_for_all_or_one_per_row():
    rows = torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = ((X - rows[:, None]) / 2.0).square().sum(1)
    energy = Shifted()
    torch.testing.assert_close(energy.given(y=rows, t=2.0)(X), expected)
    torch.testing.assert_close(energy.given(t=2.0).given(y=rows)(X), expected)
    torch.testing.assert_close(energy.given(y=rows)(X, t=torch.full((7,), 2.0)), expected)
    torch.testing.assert_close(energy(X, y=rows, t=torch.full((7,), 2.0)), expected)
    torch.testing.assert_close(energy.given(y=scalar(0.5), t=1)(X), (X - 0.5).square().sum(1))


def test_context_reaches_only_the_terms_that_ask_for_it():
    level = gb.Energy.of(lambda x, t: x.sum(1) * t, context=("t",))
    energy = A + 0.5 * Shifted() - gb.mixture(level, B)
    assert energy.context == ("y", "t")
    got = energy.given(y=0.0, t=2.0)
    assert got.context == ()
    expected = A(X) + 0.5 * (X / 2).square().sum(1)
    expected = expected + (0.5 * torch.exp(-2.0 * X.sum(1)) + 0.5 * torch.exp(-B(X))).log()
    torch.testing.assert_close(got(X), expected)


def test_labels_stay_whole_numbers():
    table = nn.Embedding(3, 1)
    energy = gb.Energy.of(lambda x, y: table(y)[:, 0] + x.sum(1), context=("y",))
    torch.testing.assert_close(energy.given(y=2)(X.float()), table.weight[2] + X.float().sum(1))


def test_a_fixed_context_follows_to_but_is_not_saved():
    energy = (Shifted() + gb.Gaussian(2)).given(y=torch.zeros(7), t=1.0)
    assert energy.double().fixed_y.dtype == torch.float64
    assert not any("fixed" in name for name in energy.state_dict())


def test_a_context_that_does_not_fit_is_refused():
    with pytest.raises(OptionError, match=r"Gaussian\(2, scale=1\) takes no context named 'y'; it takes: none"):
        A.given(y=1)
    with pytest.raises(OptionError, match="takes no context named 'z'; it takes: y, t"):
        Shifted().given(z=1)
    with pytest.raises(OptionError, match="takes no context named 'y'; it takes: t"):
        Shifted().given(y=1).given(y=2)
    for rows in (1, 3):
        with pytest.raises(ShapeError, match=f"The fixed y has {rows} rows and x has 7"):
            Shifted().given(y=torch.zeros(rows), t=1.0)(X)
    with pytest.raises(TypeError, match="'y'"):
        (A + Shifted())(X, t=torch.ones(7))


def test_energies_over_different_spaces_do_not_combine():
    for build in (lambda a, b: a + b, lambda a, b: gb.mixture(a, b), lambda a, b: a - 0.5 * b):
        with pytest.raises(ShapeError, match=r"different shapes, \(2,\) and \(3,\)"):
            build(A, gb.Gaussian(3))
    with pytest.raises(DomainError, match="different domains: Boolean"):
        gb.Bernoulli(torch.zeros(3)) + gb.Categorical(torch.zeros(3))


def test_a_sum_lives_on_the_narrowest_domain():
    bits, free = gb.Bernoulli(torch.zeros(3)), gb.Energy.of(lambda x: x.sum(1))
    assert (free + bits).support is constraints.boolean
    assert (bits + free).support is constraints.boolean
    assert gb.mixture(bits, bits).support is constraints.boolean
    assert (free + bits).event_shape == (3,)
    assert (0.5 * bits).given().support is constraints.boolean
    assert common_support([free, free]) is constraints.real
    assert same_support(constraints.real, constraints.real_vector)
    assert same_support(constraints.independent(constraints.boolean, 1), constraints.boolean)
    assert not same_support(constraints.interval(0.0, 1.0), constraints.interval(0.0, 2.0))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [[0.5, 0.5]]])
def test_a_mixture_needs_one_positive_weight_each(weights):
    with pytest.raises(OptionError, match="A mixture of 2 energies needs 2 positive weights"):
        gb.mixture(A, B, weights=weights)


def test_a_mixture_needs_a_part():
    with pytest.raises(OptionError, match="A mixture of 0 energies"):
        gb.mixture()


@pytest.mark.parametrize("weight", ["0.5", [0.5], torch.ones(2), None])
def test_only_numbers_scale(weight):
    with pytest.raises(TypeError):
        A * weight
    with pytest.raises(TypeError):
        A / weight


def test_a_mixture_keeps_the_precision_of_its_weights():
    thirds = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(gb.mixture(A, A, weights=thirds)(X), A(X), rtol=0, atol=1e-14)
