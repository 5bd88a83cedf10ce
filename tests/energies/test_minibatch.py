"""Sums over data: the full energy is the sum, estimates are right on average, and control variates are tangents."""

import copy
import itertools
import math

import pytest
import torch

import gibbsian as gb
from contracts import ExactTarget, assert_invariant, assert_one_graph, normal_cdf, seeded
from gibbsian.energies.minibatch import MinibatchEnergy, find_mode
from gibbsian.errors import ArgumentTypeError, DataError, DivergenceError, DomainError, OptionError, ShapeError

N, M = 8, 3
EVERY = [torch.tensor(rows) for rows in itertools.combinations(range(N), M)]


def logistic(theta, x, y):
    """Softplus of minus the margin: not quadratic, so that tangents are only tangents."""
    return torch.nn.functional.softplus(-y * (theta @ x.T))


def prior(dim=2):
    return gb.Gaussian(loc=torch.zeros(dim, dtype=torch.float64), scale=2.0)


def regression(rows=N, seed=0, **options):
    """Logistic regression on inputs ``(rows, 2)`` and labels of -1 and 1."""
    rng = seeded(seed)
    x = torch.randn(rows, 2, generator=rng, dtype=torch.float64)
    y = 2.0 * torch.randint(2, (rows,), generator=rng).double() - 1.0
    return MinibatchEnergy(logistic, (x, y), prior(), **options)


def points(n=5, seed=1):
    return torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64)


def hessian(energy, x):
    return torch.autograd.functional.hessian(lambda t: energy(t[None])[0], x)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_the_full_energy_is_the_sum_whatever_the_chunks(chunk):
    energy, theta = regression(chunk=chunk), points()

    def naive(t):
        x, y = energy.data
        return prior()(t) + sum(logistic(t, x[i : i + 1], y[i : i + 1])[:, 0] for i in range(N))

    for got, expected in zip(gb.evaluate(energy, theta), gb.evaluate(naive, theta)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hessian(energy, theta[0]), hessian(naive, theta[0]), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(energy(theta), naive(theta), rtol=0, atol=1e-12)


def kept_for_backward(energy, x):
    """Bytes that a full gradient keeps, besides the data themselves."""
    kept, own = {}, {part.untyped_storage().data_ptr() for part in energy.data}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gb.evaluate(energy, x)
    return sum(kept.values())


def test_what_the_full_gradient_keeps_does_not_grow_with_the_data():
    theta = torch.zeros(1, 2, dtype=torch.float64)
    small, large = (kept_for_backward(regression(rows, chunk=100), theta) for rows in (1000, 4000))
    assert small == large < 1000
    # In one piece it keeps the margins of all rows.
    assert kept_for_backward(regression(4000), theta) >= 4000 * 8


def mean_estimate(energy, theta):
    """Energies and gradients averaged over all sets of M rows."""
    values, grads = zip(*(gb.evaluate(energy.on(index), theta) for index in EVERY))
    return torch.stack(values).mean(0), torch.stack(grads).mean(0)


def assert_unbiased(energy):
    theta = points()
    for name, got, expected in zip(("energy", "gradient"), mean_estimate(energy, theta), gb.evaluate(energy, theta)):
        worst = float((got - expected).abs().max())
        assert worst < 1e-12, f"the mean estimate of the {name} is off by {worst:.3g}"


@pytest.mark.parametrize("centre", [None, torch.tensor([0.4, -0.3], dtype=torch.float64)])
def test_estimates_are_right_on_average_over_all_sets_of_rows(centre):
    energy = regression(chunk=3)
    assert_unbiased(energy if centre is None else energy.around(centre))


class WithoutWeight(MinibatchEnergy):
    """The sum over the minibatch, not blown up to the data."""

    def on(self, index):
        rows = [part[index] for part in self.data]
        return lambda x: self.prior(x) + self.term(x, *rows).sum(1)


class WithWrongSign(MinibatchEnergy):
    """Adds the rows' tangents at the centre where they should go."""

    def on(self, index):
        right, plain = super().on(index), MinibatchEnergy.on(MinibatchEnergy(self.term, self.data, self.prior), index)
        return lambda x: 2.0 * plain(x) - right(x)


class WithoutTheWholeGradient(MinibatchEnergy):
    """Takes the rows' tangents away and leaves out that of all rows."""

    def on(self, index):
        right = super().on(index)
        return lambda x: right(x) - ((x - self.centre) * self.slope).sum(1)


@pytest.mark.parametrize("twin", [WithoutWeight, WithWrongSign, WithoutTheWholeGradient])
def test_the_average_or_the_variance_exposes_broken_estimates(twin):
    energy, centre = regression(), points(1)[0]
    broken = twin(energy.term, energy.data, energy.prior, centre=centre)
    if twin is WithWrongSign:  # right on average, with four times the variance that it should take away
        assert_unbiased(broken)
        with pytest.raises(AssertionError, match="at the centre"):
            assert_exact_at_the_centre(broken)
    else:
        with pytest.raises(AssertionError, match="off by"):
            assert_unbiased(broken)


def assert_exact_at_the_centre(energy):
    centre = energy.centre[None]
    value, grad = gb.evaluate(energy, centre)
    for index in EVERY:
        v, g = gb.evaluate(energy.on(index), centre)
        worst = float(torch.maximum((v - value).abs().max(), (g - grad).abs().max()))
        assert worst < 1e-12, f"an estimate at the centre is off by {worst:.3g}"


def test_control_variates_are_exact_at_the_centre_and_give_the_gradient_of_the_formula():
    plain, centre = regression(), points(1)[0]
    energy, theta = plain.around(centre), points(4, seed=2)
    assert_exact_at_the_centre(energy)

    def gradient(rows, x):
        return gb.evaluate(lambda t: logistic(t, *(part[rows] for part in energy.data)).sum(1), x)[1]

    everywhere = torch.arange(N)
    for index in EVERY[:5]:
        expected = (
            gb.evaluate(prior(), theta)[1]
            + gradient(everywhere, centre[None])
            + N / M * (gradient(index, theta) - gradient(index, centre[None]))
        )
        torch.testing.assert_close(gb.evaluate(energy.on(index), theta)[1], expected, rtol=0, atol=1e-12)


def test_control_variates_reduce_the_variance_near_the_centre_by_the_square_of_the_distance():
    plain = regression()
    centre = find_mode(plain, torch.zeros(2, dtype=torch.float64))
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)

    def spread(energy, far):
        theta = (centre + far * direction)[None]
        return float(torch.stack([gb.evaluate(energy.on(index), theta)[1] for index in EVERY]).var(0).sum())

    near, nearer, without = spread(plain.around(centre), 0.02), spread(plain.around(centre), 0.01), spread(plain, 0.02)
    assert abs(near / nearer - 4.0) < 0.1
    assert near < 1e-3 * without


def test_all_rows_are_the_full_energy():
    theta, every = points(), torch.randperm(N, generator=seeded())
    for energy in (regression(chunk=3), regression().around(points(1)[0])):
        for got, expected in zip(gb.evaluate(energy.on(every), theta), gb.evaluate(energy, theta)):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(energy.on(every.int())(theta), energy(theta), rtol=0, atol=1e-12)


def test_events_and_rows_of_any_shape():
    """A matrix of weights, and rows that are matrices."""
    rows = torch.randn(6, 3, 4, generator=seeded(), dtype=torch.float64)
    energy = MinibatchEnergy(
        lambda w, r: (w[:, None] * r[None]).sum((2, 3)).cos(),
        rows,
        lambda w: w.square().sum((1, 2)),
        event_shape=(3, 4),
    )
    w = torch.randn(2, 3, 4, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(energy(w), w.square().sum((1, 2)) + (w.flatten(1) @ rows.flatten(1).T).cos().sum(1))
    value, grad = gb.evaluate(energy.around(w[0]).on(torch.tensor([0, 4])), w)
    assert value.shape == (2,)
    assert grad.shape == w.shape


def gaussian_posterior():
    """The mean of a Gaussian, 10 rows of unit variance: the posterior is Gaussian, in closed form."""
    rows = torch.randn(10, 2, generator=seeded(), dtype=torch.float64) + 1.0
    energy = MinibatchEnergy(
        lambda t, r: 0.5 * (t[:, None] - r[None]).square().sum(2),
        rows,
        gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64)),
        chunk=4,
    )
    return energy, rows.sum(0) / 11.0, (1.0 / 11.0) ** 0.5


@pytest.mark.parametrize("kernel", [gb.MALA(0.05), gb.HMC(0.15, leapfrog=3)], ids=repr)
def test_exact_kernels_run_on_the_full_energy(kernel):
    energy, mean, spread = gaussian_posterior()
    target = ExactTarget(
        "posterior",
        energy,
        lambda n, rng: mean + spread * torch.randn(n, 2, generator=rng, dtype=torch.float64),
        {f"x{i}": (lambda x, i=i: x[:, i], lambda v, i=i: normal_cdf((v - mean[i]) / spread)) for i in range(2)},
    )
    assert_invariant(kernel, target, steps=2)


def test_the_full_energy_compiles_to_one_graph(graphs):
    assert_one_graph(gb.MALA(0.05), regression(chunk=3), points(), graphs)


def test_the_mode_is_the_mean_of_a_gaussian_posterior():
    energy, mean, _ = gaussian_posterior()
    torch.testing.assert_close(find_mode(energy, torch.full_like(mean, 5.0)), mean, rtol=0, atol=1e-6)
    top = find_mode(regression(), torch.ones(2, dtype=torch.float64))
    assert float(gb.evaluate(regression(), top[None])[1].abs().max()) < 1e-6


def test_data_follow_the_energy_and_are_not_saved():
    energy = regression().around(points(1)[0])
    single = copy.deepcopy(energy).float()
    assert {part.dtype for part in single.data} == {single.centre.dtype, single.slope.dtype} == {torch.float32}
    assert single(points().float()).dtype == torch.float32
    assert all("data" not in name and "centre" not in name for name in energy.state_dict())
    assert energy.event_shape == (2,)
    assert repr(energy) == "MinibatchEnergy(8 rows, control variates)"


def one_number(theta, rows):
    return theta[:, :1] * rows[:, 0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MinibatchEnergy(3.0, torch.zeros(4, 2)), ArgumentTypeError, "term is a function .* got 3.0"),
        (lambda: MinibatchEnergy(one_number, [[1.0]]), ArgumentTypeError, "data is a tensor, or several"),
        (lambda: MinibatchEnergy(one_number, ()), ArgumentTypeError, "data is a tensor, or several"),
        (lambda: MinibatchEnergy(one_number, torch.zeros(0, 2)), ShapeError, r"1 or more; got \[0\]"),
        (lambda: MinibatchEnergy(one_number, torch.tensor(1.0)), ShapeError, r"got \[0\]"),
        (lambda: MinibatchEnergy(one_number, (torch.zeros(4), torch.zeros(3))), ShapeError, r"got \[4, 3\]"),
        (lambda: MinibatchEnergy(one_number, torch.tensor([1.0, math.nan])), DataError, "1 values that are not finite"),
        (lambda: MinibatchEnergy(one_number, torch.zeros(4, 2), chunk=0), OptionError, "chunk counts rows, .* got 0"),
        (lambda: regression().around(torch.zeros(1, 2)), ShapeError, r"one point, of shape \(2,\); got \(1, 2\)"),
        (lambda: regression().around(torch.tensor([1, 2])), ArgumentTypeError, "A centre is a floating-point tensor"),
        (lambda: regression().around(torch.tensor([math.nan, 0.0]).double()), DomainError, "not finite at the centre"),
        (lambda: find_mode(regression(), torch.zeros(2).double(), steps=0), OptionError, "steps is 1 or more; got 0"),
        (lambda: find_mode(lambda x: x.log().sum(1), torch.ones(2)), DivergenceError, "came to an energy of"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("term", [lambda t, x, y: t.sum(1), lambda t, x, y: t @ x.T.sum(1), lambda t, x, y: x @ t.T])
def test_terms_of_a_wrong_shape_are_refused(term):
    wrong = MinibatchEnergy(term, regression().data)
    message = r"each of 5 chains and 8 rows, shape \(5, 8\); it returned"
    with pytest.raises(ShapeError, match=message):
        wrong(points())
    with pytest.raises(ShapeError, match=message):
        gb.sample(wrong, gb.MALA(0.1), points(), steps=1, rng=seeded())
    with pytest.raises(ShapeError, match=r"5 chains and 2 rows, shape \(5, 2\); it returned"):
        wrong.on(torch.tensor([0, 1]))(points())


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), ArgumentTypeError, "tensor of int64 .* got torch.float32"),
        (torch.tensor([True, False]), ArgumentTypeError, "got torch.bool"),
        ([0, 1], ArgumentTypeError, "got list"),
        (torch.tensor([[0, 1]]), ShapeError, r"1 to 8 rows of the data; got shape \(1, 2\)"),
        (torch.arange(0), ShapeError, r"got shape \(0,\)"),
        (torch.arange(9), ShapeError, r"got shape \(9,\)"),
    ],
)
def test_bad_indices_are_refused(index, error, message):
    with pytest.raises(error, match=message):
        regression().on(index)
