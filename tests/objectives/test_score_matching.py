"""Score matching: known models are recovered, losses have their exact values, and slips are caught."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

from gibbsian import MLP, Bernoulli, ConvEnergy, Energy, Gaussian
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives import score_matching
from gibbsian.objectives.base import Batch, Loss
from gibbsian.objectives.curvature import goes_by_taylor, require_curvature
from gibbsian.objectives.score_matching import (
    LAWS,
    FiniteDifferenceScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
    draw_directions,
)
from gibbsian.training.fit import fit
from recovery import CASES, GAUSSIAN, assert_recovered, estimates, minimise, seeded, slope

METHODS = {
    "exact": ScoreMatching,
    "sliced": lambda: SlicedScoreMatching(2),
    "sliced, gaussian": lambda: SlicedScoreMatching(1, law="gaussian"),
    "reduced": lambda: SlicedScoreMatching(1, law="gaussian", variance_reduction=True),
    "differences": lambda: FiniteDifferenceScoreMatching(0.01, 2),
}
POWER = {"gaussian": 0.15, "laplaces": 0.4, "quartic": 0.4}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("method", METHODS)
def test_known_models_are_recovered(case, method):
    assert_recovered(estimates(METHODS[method], case, 2000), case.truth, POWER[case.name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("method", METHODS)
def test_errors_fall_with_the_square_root_of_rows(case, method):
    # The logarithm of a root mean square over 16 fits of k parameters scatters by 0.1, so the slope by 0.05.
    found = slope(lambda n: estimates(METHODS[method], case, n, replicates=16), case.truth, (500, 2000, 8000))
    assert found == pytest.approx(-0.5, abs=0.25)


def test_on_a_gaussian_the_minimum_is_that_of_the_likelihood():
    x = GAUSSIAN.rows(300, seeded(1))
    energy = GAUSSIAN.model()
    minimise(ScoreMatching(), energy, x)
    # On from there, as `minimise` stops where the loss no longer changes in its last digits.
    optimiser = torch.optim.LBFGS(energy.parameters(), max_iter=50, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure():
        optimiser.zero_grad()
        value = ScoreMatching()(energy, Batch(x), seeded()).value
        value.backward()
        return value

    optimiser.step(closure)
    scale = energy.log_diagonal.exp()
    factor = torch.stack(
        (torch.stack((scale[0], energy.below[0])), torch.stack((torch.zeros_like(scale[1]), scale[1])))
    )
    torch.testing.assert_close(energy.mean.detach(), x.mean(0), atol=1e-6, rtol=0)
    precision = torch.linalg.inv(torch.cov(x.T, correction=0))
    torch.testing.assert_close((factor.T @ factor).detach(), precision, atol=1e-6, rtol=1e-6)


def check_value(objective=None) -> None:
    """At the truth of a Gaussian of precision P the loss is -tr P / 2, within 6 standard errors (1 in 1e9)."""
    energy, x = GAUSSIAN.at_truth(), GAUSSIAN.rows(50_000, seeded(2))
    a, b = math.exp(0.3), math.exp(-0.2)
    trace = a * a + 0.5 * 0.5 + b * b
    objective = objective or ScoreMatching()
    loss = float(objective(energy, Batch.of(x), seeded(3)).value.detach())
    with torch.enable_grad():
        y = x.requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(y).sum(), y)
    scatter = float((0.5 * grad.square().sum(1)).std()) * (1 if isinstance(objective, ScoreMatching) else 3)
    assert abs(loss + 0.5 * trace) < 6 * scatter / len(x) ** 0.5, f"missed: {loss} for {-0.5 * trace}"


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_has_its_exact_value(method):
    check_value(METHODS[method]())


def twin(combine):
    def loss(value, square, trace):
        return Loss(combine(square, trace).mean(), {})

    return loss


TWINS = {
    "sign of the trace": twin(lambda square, trace: 0.5 * square + trace),
    "sign of all": twin(lambda square, trace: trace - 0.5 * square),
    "half forgotten": twin(lambda square, trace: square - trace),
    "trace divided by the dimension": twin(lambda square, trace: 0.5 * square - trace / 2),
    "divided by the dimension": twin(lambda square, trace: (0.5 * square - trace) / 2),
}


@pytest.mark.parametrize("name", TWINS)
def test_slips_are_caught(name, monkeypatch):
    monkeypatch.setattr(score_matching, "_loss", TWINS[name])
    for method in METHODS.values():
        with pytest.raises(AssertionError, match="missed"):
            check_value(method())
    # A loss as a whole over the dimension has the same minimum, so that only its value gives it away.
    if name != "divided by the dimension":
        with pytest.raises(AssertionError, match=r"missed|no power"):
            assert_recovered(estimates(ScoreMatching, GAUSSIAN, 1000, replicates=8), GAUSSIAN.truth, 0.4)


@pytest.mark.parametrize("law", LAWS)
def test_directions_have_unit_covariance(law):
    x = torch.zeros(4000, 2, 2, dtype=torch.float64)
    v = draw_directions(law, 5, x, seeded(1)).flatten(0, 1).flatten(1)
    assert v.shape == (20_000, 4)
    # The largest fourth moment of a coordinate is 3, of a Gaussian.
    assert float((v.T @ v / len(v) - torch.eye(4)).abs().max()) < 6 * (3 / len(v)) ** 0.5
    if law == "sphere":
        torch.testing.assert_close(v.square().sum(1), torch.full((len(v),), 4.0, dtype=torch.float64))


def small_image_energy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvEnergy((1, 4, 4), widths=(3, 5)).double()


class Normed(Energy):
    """An energy that Taylor mode has no rules for."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 1)
            ).double()

    def forward(self, x):
        return self.net(x).squeeze(1)


@pytest.mark.parametrize("make", [small_image_energy, Normed])
def test_the_trace_is_that_of_the_hessian(make):
    energy, x = make(), torch.randn((6, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    expected = []
    for row in x:
        y = row.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(y[None]).sum(), y)
        hessian = torch.autograd.functional.hessian(lambda y: energy(y[None]).sum(), row)
        expected.append(0.5 * grad.square().sum() - hessian.reshape(16, 16).trace())
    loss = ScoreMatching()(energy, Batch(x), seeded()).value
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [small_image_energy, Normed])
def test_chunks_of_any_size_agree(make):
    energy, x = make(), torch.randn((6, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    params = list(energy.parameters())
    found = []
    for chunk in (100, 16, 5, 1):
        loss = ScoreMatching(chunk)(energy, Batch(x), seeded())
        grads = torch.autograd.grad(loss.value, params, allow_unused=True)
        with torch.no_grad():
            plain = ScoreMatching(chunk)(energy, Batch(x), seeded())
        torch.testing.assert_close(plain.value, loss.value.detach(), rtol=1e-12, atol=1e-14)
        assert not plain.value.requires_grad
        found.append([loss.value.detach(), *loss.metrics.values(), *(g for g in grads if g is not None)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


def losses(objective, energy, x, times=400):
    rng = seeded(5)
    with torch.no_grad():
        return torch.stack([objective(energy, Batch(x), rng).value for _ in range(times)])


@pytest.mark.parametrize("law", LAWS)
def test_sliced_losses_have_the_exact_one_as_their_mean_and_vary_less_when_reduced(law):
    energy, x = small_image_energy(), torch.randn((6, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    # So that the gradient is not small beside the curvature.
    energy = energy + Energy.of(lambda x: x.flatten(1).sum(1) + 0.1 * x.flatten(1).pow(4).sum(1))
    exact = float(ScoreMatching()(energy, Batch(x), seeded()).value.detach())
    spread = {}
    for reduced in (False, True):
        found = losses(SlicedScoreMatching(2, law, reduced), energy, x)
        spread[reduced] = float(found.std())
        # 400 means over 12 directions each: within 6 standard errors but once in 1e8.
        assert abs(float(found.mean()) - exact) < 6 * spread[reduced] / len(found) ** 0.5
    assert spread[True] < 0.7 * spread[False]


def test_reduced_losses_agree_whichever_way_the_curvature_is_taken():
    """One direction goes along the gradient's graph, several go by Taylor mode."""
    energy, x = small_image_energy(), torch.randn((6, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    one = losses(SlicedScoreMatching(1, "gaussian", True), energy, x, 4)
    with torch.no_grad():
        rng, four = seeded(5), []
        for _ in range(4):
            v = draw_directions("gaussian", 1, x, rng)
            _, square, curve = score_matching._square_and_curvature(energy, x, v.expand(2, *x.shape), {})
            four.append((0.5 * square - curve / 2).mean())
    torch.testing.assert_close(torch.stack(four), one)


def test_differences_approach_derivatives_with_the_square_of_eps():
    energy, x = small_image_energy(), torch.randn((6, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    sliced = SlicedScoreMatching(3)(energy, Batch(x), seeded(4)).value.item()
    gaps = [
        abs(FiniteDifferenceScoreMatching(eps, 3)(energy, Batch(x), seeded(4)).value.item() - sliced)
        for eps in (0.1, 0.05, 0.025)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.1)


def test_differences_over_eps_instead_of_its_square_are_caught(monkeypatch):
    class Slipped(float):
        def __pow__(self, power):
            return float(self)

    objective = FiniteDifferenceScoreMatching(0.05)
    objective.eps = Slipped(0.05)
    with pytest.raises(AssertionError, match="missed"):
        check_value(objective)


@pytest.mark.parametrize("method", METHODS)
def test_labels_reach_their_rows(method):
    def fn(x, y):
        return 0.5 * y * x.square().sum((1, 2))

    energy = Energy.of(fn, context=("y",))
    x = torch.randn((5, 2, 3), generator=seeded(1), dtype=torch.float64)
    y = torch.arange(1.0, 6.0, dtype=torch.float64)
    loss = METHODS[method]()(energy, Batch(x, {"y": y}), seeded())
    known = METHODS[method]()(Energy.of(lambda x: fn(x, y.repeat(len(x) // 5))), Batch(x), seeded())
    torch.testing.assert_close(loss.value, known.value)
    assert float(loss.metrics["energy_data"]) == pytest.approx(float(fn(x, y).mean()))
    with pytest.raises(OptionError, match="y"):
        METHODS[method]()(energy, Batch(x), seeded())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_seed_decides_and_the_precision_is_kept(method, dtype):
    energy, x = small_image_energy().to(dtype), torch.randn((4, 1, 4, 4), generator=seeded(1)).to(dtype)
    a, b, c = (METHODS[method]()(energy, Batch(x), seeded(s)) for s in (1, 1, 2))
    assert a.value.dtype == dtype
    assert torch.equal(a.value, b.value)
    assert torch.equal(a.value, c.value) == (method == "exact")
    assert all(m.ndim == 0 and not m.requires_grad for m in a.metrics.values())
    a.value.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in energy.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_one_row_and_equal_rows_are_fitted_like_any(method):
    energy, x = small_image_energy(), torch.randn((1, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    one = METHODS[method]()(energy, Batch(x), seeded(1)).value
    assert bool(one.isfinite())
    if method == "exact":
        many = ScoreMatching()(energy, Batch(x.expand(3, 1, 4, 4)), seeded(1)).value
        torch.testing.assert_close(one, many)


def test_rows_do_not_see_each_other():
    energy, x = small_image_energy(), torch.randn((4, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    each = [ScoreMatching()(energy, Batch(row[None]), seeded()).value for row in x]
    torch.testing.assert_close(torch.stack(each).mean(), ScoreMatching()(energy, Batch(x), seeded()).value)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_to_the_bit(method, tmp_path):
    def train(folder, steps, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            energy = MLP(2, hidden=(8,)) + Gaussian(2, scale=3.0)
        x = GAUSSIAN.rows(64, seeded(1)).float()
        run = fit(
            energy, x, METHODS[method](), rng=seeded(2), steps=steps, folder=tmp_path / folder, batch_size=16,
            checkpoint_every=5, log_every=5, warmup_steps=1, decay="constant", tensorboard=False, **options,
        )  # fmt: skip
        return energy, run

    whole, run = train("a", 20)
    train("b", 10)
    resumed, _ = train("b", 20, resume=True)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_dropout_is_on_in_training_only():
    """Taylor mode has no rule for it, and the other road takes over; the looks at an energy are without it."""

    class Dropped(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Dropout(0.5).eval(), nn.Linear(64, 1))

        def forward(self, x):
            return self.net(x).squeeze(1)

    energy, x = Dropped(), torch.randn((8, 2), generator=seeded())
    plain = [ScoreMatching()(energy, Batch(x), seeded()).value for _ in range(2)]
    assert goes_by_taylor(energy, x, {})
    assert torch.equal(*plain)
    energy.net[2].train()
    with torch.random.fork_rng():
        a, b = (ScoreMatching()(energy, Batch(x), seeded()).value for _ in range(2))
        assert not torch.equal(a, b)
        fresh = Dropped()
        fresh.net[2].train()
        torch.manual_seed(3)
        require_curvature(fresh, x, {})
        goes_by_taylor(fresh, x, {})
        after = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(after, torch.rand(1))


def peak(chunk):
    """The most bytes that a loss keeps for its gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(256, hidden=(64, 64))
    x, kept = torch.randn((64, 256), generator=seeded()), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel() * t.element_size()), t)[1], lambda t: t
    ):
        ScoreMatching(chunk)(energy, Batch(x), seeded())
    return sum(kept)


def test_chunks_bound_what_is_kept_for_the_gradient():
    assert peak(16) < 0.2 * peak(256)


# What does not fit.

STRAIGHT = {
    "relu in ReLU, net.1": lambda: nn.ReLU(),
    "leaky_relu in LeakyReLU, net.1": lambda: nn.LeakyReLU(0.2),
    "hardtanh in Hardtanh, net.1": lambda: nn.Hardtanh(),
    "hardtanh in ReLU6, net.1": lambda: nn.ReLU6(),
    "prelu in PReLU, net.1": lambda: nn.PReLU(),
    "max_pool1d in MaxPool1d, net.1": lambda: nn.MaxPool1d(3, 1, 1),
}


class Net(Energy):
    def __init__(self, layer) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(2, 8), layer, nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x).squeeze(1)


@pytest.mark.parametrize("name", STRAIGHT)
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("objective", [ScoreMatching, SlicedScoreMatching])
def test_piecewise_linear_layers_are_refused_by_name(name, base, objective):
    net = Net(STRAIGHT[name]())
    energy = net + Gaussian(2) if base else net
    told = name.replace("net.1", "energies.0.net.1") if base else name
    with pytest.raises(ArgumentTypeError, match=r"second derivative vanishes.*DenoisingScoreMatching") as caught:
        objective()(energy, Batch(torch.randn((5, 2), generator=seeded())), seeded())
    assert told in str(caught.value)


def test_a_network_of_straight_pieces_is_seen_by_its_hessian():
    class Folded(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return (self.a * x).clamp(min=0.0).sum(1)

    with pytest.raises(ArgumentTypeError, match=r"vanishes wherever it is defined \(in no layer of a known kind\)"):
        ScoreMatching()(Folded(), Batch(torch.ones(3, 2)), seeded())


def test_what_only_looks_straight_is_let_through():
    class Embedded(Energy):
        """A kink that x does not run through, and a parabola that is flat as yet."""

        context = ("t",)

        def __init__(self) -> None:
            super().__init__()
            self.level, self.square = nn.Linear(1, 1), nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return x.sum(1) * torch.relu(self.level(t[:, None]))[:, 0].add(1.0) + self.square * x.square().sum(1)

    energy = Embedded()
    loss = ScoreMatching()(energy, Batch(2 * torch.ones(3, 2), {"t": torch.ones(3)}), seeded())
    loss.value.backward()
    assert float(energy.square.grad) != 0.0
    cubed = Energy.of(lambda x: torch.relu(x).pow(3).sum(1))
    with pytest.raises(ArgumentTypeError, match="relu"):
        SlicedScoreMatching()(cubed, Batch(torch.ones(3, 2)), seeded())
    value = SlicedScoreMatching(check=False)(cubed, Batch(torch.ones(3, 1)), seeded()).value
    assert value.item() == pytest.approx(0.5 * 9 - 6)


def test_kinks_are_looked_for_once():
    calls = []
    energy = Energy.of(lambda x: (calls.append(None), x.square().sum(1))[1])
    for _ in range(5):
        ScoreMatching()(energy, Batch(torch.ones(3, 2)), seeded())
    first = len(calls)
    for _ in range(5):
        ScoreMatching()(energy, Batch(torch.ones(3, 2)), seeded())
    assert len(calls) - first == 5
    assert first <= 5 + 5


@pytest.mark.parametrize("method", METHODS)
def test_what_has_no_score_is_refused(method):
    x, objective = torch.randn((4, 2), generator=seeded()), METHODS[method]()
    with pytest.raises(DomainError, match=r"lives on Boolean.*PersistentContrastiveDivergence"):
        objective(Bernoulli(torch.zeros(2)), Batch(x.sign().relu()), seeded())
    box = Energy.of(lambda x: x.square().sum(1), support=constraints.interval(0.0, 1.0))
    with pytest.raises(DomainError, match=r"does not vanish at its edge.*NoiseContrastiveEstimation"):
        objective(box, Batch(x), seeded())
    with pytest.raises(ArgumentTypeError, match=r"floating-point data; got torch\.int64"):
        objective(MLP(2), Batch(torch.ones(4, 2, dtype=torch.long)), seeded())
    wide = Energy.of(nn.Linear(2, 1))
    with pytest.raises(ShapeError, match=r"must have shape \((4|20|12),\); it returned \((4|20|12), 1\)"):
        objective(wide, Batch(x), seeded())
    scale = nn.Parameter(torch.ones(()))
    for flat in (lambda x: scale * torch.ones(len(x)), lambda x: scale * x.detach().square().sum(1)):
        with pytest.raises(ArgumentTypeError, match="does not depend on x"):
            objective(Energy.of(flat), Batch(x), seeded())


def test_options_out_of_range_are_refused():
    for bad in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match="chunk counts"):
            ScoreMatching(bad)
        for sliced in (SlicedScoreMatching, lambda k: FiniteDifferenceScoreMatching(projections=k)):
            with pytest.raises(OptionError, match="projections counts"):
                sliced(bad)
    for bad in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(OptionError, match="eps is a positive distance"):
            FiniteDifferenceScoreMatching(bad)
    for make in (SlicedScoreMatching, FiniteDifferenceScoreMatching):
        with pytest.raises(OptionError, match="Did you mean 'gaussian'"):
            make(law="gausian")


def test_a_torus_has_no_edge():
    from gibbsian.energies.domains import Torus

    energy = Energy.of(lambda x: -x.cos().sum(1), support=Torus(2 * math.pi))
    x = torch.zeros((1, 3), dtype=torch.float64)
    assert float(ScoreMatching()(energy, Batch(x), seeded()).value) == pytest.approx(-3.0)


def test_numbers_that_are_not_finite_stay_so():
    energy, x = small_image_energy(), torch.randn((4, 1, 4, 4), generator=seeded(1), dtype=torch.float64)
    x[0, 0, 0, 0] = math.nan
    for method in METHODS.values():
        assert bool(method()(energy, Batch(x), seeded()).value.isnan())
