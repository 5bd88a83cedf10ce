"""The gradient through the sampler and the entropy in it: finite differences, closed forms, and slips that show."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gibbsian as gb
from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import row_sum
from gibbsian.objectives import entropy as entropy_module
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.entropy import nearest_neighbour_entropy
from gibbsian.objectives.sampler_gradient import SamplerKL, run_chains, sampler_kl
from gibbsian.objectives.starts import Starts
from recovery import assert_recovered, seeded

F64 = torch.float64
REPLICATES = 24


class Tiny(gb.Energy):
    """Smooth, not convex, of any event's shape: nine numbers in all."""

    def __init__(self, d: int) -> None:
        super().__init__()
        rng = seeded(3)
        self.inner = nn.Parameter(torch.randn(d, 3, generator=rng, dtype=F64))
        self.outer = nn.Parameter(torch.randn(3, generator=rng, dtype=F64))

    def forward(self, x):
        return 0.5 * row_sum(x.square()) + (x.flatten(1) @ self.inner).tanh() @ self.outer


KERNELS = [gb.ULA(0.1), gb.ULA(0.1, noise_scale=0.05, clip_grad=0.7, box=(-1.2, 1.2)), gb.Underdamped(0.3, 1.0)]
KL = SamplerKL(weight=0.7, neighbours=2, entropy_weight=0.4)


def check_slope(kernel, recorded, event, term=sampler_kl, kl=KL):
    """The term's gradient is that of finite differences with the same noise and E's parameters held fixed.

    Central differences of step 1e-5 in float64 are good to some 1e-9 of the numbers themselves.
    """
    n, energy = 12, Tiny(torch.Size(event).numel())
    start, past = (torch.randn(m, *event, generator=seeded(m), dtype=F64) for m in (n, 30))
    same = torch.zeros(n, 30, dtype=torch.bool)
    fixed = [p.detach().clone() for p in energy.parameters()]

    def stopped():
        return run_chains(energy, kernel, start, recorded, seeded(5), False, recorded).state

    def worth():
        x = stopped().x.detach()
        moved = [p.detach().clone() for p in energy.parameters()]
        with torch.no_grad():
            for p, value in zip(energy.parameters(), fixed):
                p.copy_(value)
            value = energy(x).mean() - kl.entropy_weight * nearest_neighbour_entropy(x, past, kl.neighbours, same)
            for p, back in zip(energy.parameters(), moved):
                p.copy_(back)
        return float(kl.weight * value)

    expected = worth()
    value, _ = term(stopped(), past, same, kl)
    assert float(value.detach()) == pytest.approx(expected, abs=1e-12), "missed: the value"
    found = torch.autograd.grad(value, list(energy.parameters()))
    for p, grad in zip(energy.parameters(), found):
        for i in range(p.numel()):
            sides = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[i] += step
                    sides.append(worth())
                    p.view(-1)[i] -= step
            slope = (sides[0] - sides[1]) / 2e-5
            assert abs(float(grad.flatten()[i]) - slope) < 1e-7, f"missed: {float(grad.flatten()[i])} for {slope}"
    assert max(float(g.abs().max()) for g in found) > 1e-3, "no power"


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("recorded", [1, 3])
def test_the_gradient_is_that_of_finite_differences_with_the_same_noise(kernel, recorded):
    check_slope(kernel, recorded, (2,))


def test_events_have_any_shape():
    check_slope(KERNELS[0], 2, (1, 2, 2))


def without_stop(state, reference, same, kl):
    """E's own parameters are not held fixed."""
    entropy = nearest_neighbour_entropy(state.x, reference, kl.neighbours, same)
    return kl.weight * (state.energy.mean() - kl.entropy_weight * entropy), entropy


def less_spread(state, reference, same, kl):
    """The entropy with the wrong sign, at the right value."""
    value, entropy = sampler_kl(state, reference, same, kl)
    again = nearest_neighbour_entropy(state.x, reference, kl.neighbours, same)
    return value + 2 * kl.weight * kl.entropy_weight * (again - again.detach()), entropy


def not_through_the_sampler(state, reference, same, kl):
    return sampler_kl(
        state._replace(x=state.x.detach() + 0.0 * state.energy.sum(), grad=state.grad), reference, same, kl
    )


@pytest.mark.parametrize("twin", [without_stop, less_spread, not_through_the_sampler])
def test_slips_in_the_gradient_through_the_sampler_are_caught(twin):
    with pytest.raises(AssertionError, match="missed"):
        check_slope(KERNELS[0], 2, (2,), twin)


class Bowl(gb.Energy):
    """A centred Gaussian of a learned precision."""

    def __init__(self, precision: float) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(precision, dtype=F64))

    def forward(self, x):
        return 0.5 * self.precision * row_sum(x.square())


def through_the_sampler(kl, p=0.5, h=0.2, steps=2, n=1200, event=(3,)):
    """Gradient of the KL term alone in the precision, for chains from N(0, 4): one for each replicate."""
    rows = []
    for seed in range(REPLICATES):
        energy, rng = Bowl(p), seeded(seed)
        x = 2.0 * torch.randn(n, *event, generator=rng, dtype=F64)
        run = run_chains(energy, gb.ULA(h), x, steps, rng, False, kl.steps)
        value, _ = sampler_kl(run.state, run.state.x, torch.eye(n, dtype=torch.bool), kl)
        rows.append(torch.stack(torch.autograd.grad(value, [energy.precision])))
    return torch.stack(rows)


def exact_slopes(p=0.5, h=0.2, steps=2, d=3):
    """Of ``d p v / 2`` and of ``d log(v) / 2``, in the p of the steps only; v is the variance after them."""
    q = torch.tensor(p, dtype=F64, requires_grad=True)
    v = torch.tensor(4.0, dtype=F64)
    for _ in range(steps):
        v = (1 - h * q) ** 2 * v + 2 * h
    return [torch.autograd.grad(f, q, retain_graph=True)[0][None] for f in (0.5 * d * p * v, 0.5 * d * v.log())]


def test_the_gradient_is_that_of_the_divergence_in_closed_form():
    """Chains of a Gaussian stay Gaussian, and the divergence of their law from the model is known."""
    of_energy, of_entropy = exact_slopes()
    kl = SamplerKL(steps=2, neighbours=3, entropy_weight=0.0)
    plain = through_the_sampler(kl)
    assert_recovered(plain, of_energy, 0.5)
    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(through_the_sampler(replace(kl, steps=1)), of_energy, 0.5)
    # Neighbours of the outermost points lie to one side, which takes a tenth off the entropy's slope.
    share = (plain - through_the_sampler(replace(kl, entropy_weight=1.0))) / of_entropy
    assert 0.8 < float(share.mean()) < 1.0
    assert float(share.std()) / math.sqrt(REPLICATES) < 0.03


def gaussian_entropies(d, k, apart, n=1000):
    """Of N(0, diag(1, 4, 9, ...)), off the truth, by points among themselves or among others."""
    scale = torch.arange(1, d + 1, dtype=F64)
    truth = 0.5 * d * (1 + math.log(2 * math.pi)) + float(scale.log().sum())
    rows = []
    for seed in range(REPLICATES):
        rng = seeded(seed)
        x, other = (scale * torch.randn(n, d, generator=rng, dtype=F64) for _ in range(2))
        same = None if apart else torch.eye(n, dtype=torch.bool)
        rows.append(nearest_neighbour_entropy(x, other if apart else x, k, same) - truth)
    return torch.stack(rows)[:, None]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("d", "k"), [(1, 1), (1, 4), (2, 3), (5, 1)])
def test_the_entropy_of_a_gaussian_is_found(d, k, apart):
    assert_recovered(gaussian_entropies(d, k, apart), (0.0,), 0.2)


@pytest.mark.parametrize("slip", ["sign", "dimension", "ball", "count"])
def test_slips_in_the_entropy_are_caught(monkeypatch, slip):
    real = nearest_neighbour_entropy
    log_radius = {}

    def twin(x, reference, k=1, same=None):
        if slip == "count":
            return real(x, reference, k, same) + math.log(k + 1)
        d, right = x[0].numel(), real(x, reference, k, same)
        ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1.0)
        if slip == "ball":
            return right - ball
        rest = ball + float(torch.digamma(torch.tensor(float(len(reference)))) - torch.digamma(torch.tensor(float(k))))
        log_radius["mean"] = (right - rest) / d
        return right - 2 * d * log_radius["mean"] if slip == "sign" else right - (d - 1) * log_radius["mean"]

    monkeypatch.setitem(globals(), "nearest_neighbour_entropy", twin)
    with pytest.raises(AssertionError, match="missed"):
        assert_recovered(gaussian_entropies(2, 1, False), (0.0,), 0.2)


def entropy_slopes(d, k, shift, n=600):
    """Derivatives of the entropy when all points are stretched, and shifted, with the reference held fixed."""
    rows = []
    for seed in range(REPLICATES):
        rng = seeded(seed)
        x, other = (torch.randn(n, d, generator=rng, dtype=F64) for _ in range(2))
        a = torch.ones((), dtype=F64, requires_grad=True)
        moved = x + (a - 1.0) if shift else a * x
        rows.append(torch.autograd.grad(nearest_neighbour_entropy(moved, other, k), a)[0])
    return torch.stack(rows)[:, None]


def test_the_entropys_gradient_is_minus_the_score():
    """The mean of -x . score(x) is d, up to what the outermost points' neighbours miss; that of the score is 0."""
    few, many = (entropy_slopes(3, 3, False, n) for n in (300, 1500))
    assert 0.8 * 3 < float(few.mean()) < float(many.mean()) < 3
    assert float(many.mean()) > 0.87 * 3
    assert float(many.std()) / math.sqrt(REPLICATES) < 0.06
    assert_recovered(entropy_slopes(3, 3, True), (0.0,), 0.8)


def test_a_points_own_past_is_no_neighbour():
    x = torch.randn(40, 3, generator=seeded(), dtype=F64)
    same = torch.eye(40, dtype=torch.bool)
    assert bool(torch.isfinite(nearest_neighbour_entropy(x, x, 1, same)))
    assert not bool(torch.isfinite(nearest_neighbour_entropy(x, x, 1)))
    # Leaving it out by hand, for one point.
    one = nearest_neighbour_entropy(x[:1], x[1:], 2)
    assert torch.equal(one, nearest_neighbour_entropy(x[:1], x, 2, same[:1]))
    single = nearest_neighbour_entropy(x.float(), x.float(), 1, same)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, nearest_neighbour_entropy(x, x, 1, same).float(), rtol=1e-4, atol=1e-4)


BASE = gb.Gaussian(2).double()
DATA = torch.randn(32, 2, generator=seeded(1), dtype=F64)


def pcd(kl, **options):
    return PersistentContrastiveDivergence(gb.ULA(0.1), BASE, steps=4, buffer_size=64, kl=kl, **options)


def test_the_objective_adds_the_term_and_leaves_the_rest():
    kl = SamplerKL(weight=0.5, steps=2, references=64)
    energy, plain, full = Tiny(2), pcd(None), pcd(kl)
    a = plain(energy, Batch.of(DATA), seeded(4))
    b = full(energy, Batch.of(DATA), seeded(4))
    # The last steps are made outside of `sample`, with the same numbers.
    torch.testing.assert_close(plain.buffer.positions, full.buffer.positions, rtol=0, atol=1e-12)
    assert not full.buffer.positions.requires_grad
    torch.testing.assert_close(b.value, a.value + b.metrics["sampler_kl"])
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name])
    assert set(b.metrics) - set(a.metrics) == {"sampler_kl", "entropy"}
    assert all(m.ndim == 0 and not m.requires_grad for m in b.metrics.values())
    grads = [torch.autograd.grad(loss.value, list(energy.parameters())) for loss in (a, b)]
    assert all(not torch.allclose(x, y) for x, y in zip(*grads))
    none = pcd(SamplerKL(weight=0.0))(energy, Batch.of(DATA), seeded(4))
    for x, y in zip(grads[0], torch.autograd.grad(none.value, list(energy.parameters()))):
        torch.testing.assert_close(x, y)
    assert not any(p.grad is not None for p in energy.parameters())


def test_past_samples_are_those_before_the_round(monkeypatch):
    """References are the buffer's chains as they stood, each chain's own slot left out; the twin takes the new ones."""
    seen = []

    def spy(x, reference, k=1, same=None):
        seen.append((reference.clone(), same))
        return nearest_neighbour_entropy(x, reference, k, same)

    monkeypatch.setattr("gibbsian.objectives.sampler_gradient.nearest_neighbour_entropy", spy)
    objective, rng = pcd(SamplerKL(references=50), restart=0.0), seeded(2)
    objective.buffer.fill(rng)
    before = {tuple(row) for row in objective.buffer.positions.tolist()}
    objective(Tiny(2), Batch.of(DATA), rng)
    reference, same = seen[0]
    assert reference.shape == (50, 2)
    assert {tuple(row) for row in reference.tolist()} <= before
    # 32 of 64 slots are drawn, and 50 referred to: at least 18 are both, each once.
    assert int(same.sum()) >= 18
    assert int(same.sum(0).max()) == int(same.sum(1).max()) == 1


def test_labels_and_precision_pass_through():
    class Labelled(gb.Energy):
        context = ("y",)

        def __init__(self) -> None:
            super().__init__()
            self.mu = nn.Parameter(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]))

        def forward(self, x, y):
            return 0.5 * row_sum((x - self.mu[y]) ** 2)

    energy, base = Labelled(), gb.Gaussian(2)
    objective = PersistentContrastiveDivergence(gb.ULA(0.1), base, steps=3, buffer_size=64, kl=SamplerKL(steps=2))
    batch = Batch(DATA.float(), {"y": torch.arange(32) % 2})
    losses = [objective(energy, batch, seeded(3)) for objective in (objective,)]
    losses[0].value.backward()
    assert losses[0].value.dtype == torch.float32
    assert bool(torch.isfinite(energy.mu.grad).all())


def test_one_seed_is_one_loss_and_global_numbers_are_left_alone():
    state = torch.get_rng_state()
    a, b = (pcd(SamplerKL(steps=2))(Tiny(2), Batch.of(DATA), seeded(8)).value for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("recorded", [1, 3])
def test_a_chain_that_leaves_the_numbers_makes_the_gradient_not_finite(recorded):
    """It is told as such, and not replaced by a number; but in the last step the chain just returns to its origin."""

    class Cliff(gb.Energy):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0, dtype=F64))

        def forward(self, x):
            return row_sum(self.a * (1.0 - x).sqrt())

    energy = Cliff()
    objective = ContrastiveDivergence(gb.ULA(0.3), steps=recorded, kl=SamplerKL(steps=recorded))
    loss = objective(energy, Batch.of(torch.linspace(-3, 0, 128, dtype=F64).view(64, 2)), seeded())
    assert loss.metrics["nonfinite"] > 0
    loss.value.backward()
    assert bool(torch.isfinite(energy.a.grad)) == (recorded == 1)


def outside(x):
    return 0.5 * row_sum(x.square()), x


REFUSED = {
    "accept or reject": (
        lambda: ContrastiveDivergence(gb.MALA(0.1), kl=SamplerKL()),
        OptionError,
        r"MALA accepts or rejects.*use ULA or Underdamped",
    ),
    "discrete": (lambda: ContrastiveDivergence(gb.GibbsWithGradients(), kl=SamplerKL()), OptionError, "no derivative"),
    "estimated": (
        lambda: ContrastiveDivergence(gb.SGLD(0.1, 10, 2), kl=SamplerKL()),
        OptionError,
        "SGLD has steps without a derivative",
    ),
    "more steps than there are": (
        lambda: ContrastiveDivergence(gb.ULA(0.1), steps=2, kl=SamplerKL(steps=3)),
        OptionError,
        "last 3 steps of chains of 2",
    ),
    "gradient from outside": (
        lambda: ContrastiveDivergence(gb.ULA(0.1), kl=SamplerKL())(
            gb.Energy.of(outside, with_gradient=True), Batch.of(DATA), seeded()
        ),
        OptionError,
        "from outside of torch cannot be differentiated",
    ),
    "batch of one": (
        lambda: ContrastiveDivergence(gb.ULA(0.1), kl=SamplerKL())(Tiny(2), Batch.of(DATA[:1]), seeded()),
        OptionError,
        "1. nearest neighbour was asked for among 0 points",
    ),
    "negative weight": (lambda: SamplerKL(weight=-1.0), OptionError, r"weight of the KL term is 0 or more; got -1\.0"),
    "no number": (lambda: SamplerKL(entropy_weight=math.nan), OptionError, "entropy_weight .* got nan"),
    "no step": (lambda: SamplerKL(steps=0), OptionError, "steps of the KL term counts from 1; got 0"),
    "half a neighbour": (lambda: SamplerKL(neighbours=0.5), OptionError, r"neighbours .* got 0\.5"),
    "few references": (
        lambda: SamplerKL(neighbours=5, references=5),
        OptionError,
        r"5\. neighbour among 5 references",
    ),
    "other shapes": (lambda: nearest_neighbour_entropy(DATA, DATA[:, :1]), ShapeError, r"\(2,\).*\(1,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_differentiated_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def test_a_batch_of_one_will_do_with_a_buffer_and_a_short_run_without():
    assert bool(torch.isfinite(pcd(SamplerKL())(Tiny(2), Batch.of(DATA[:1]), seeded()).value))
    run = ContrastiveDivergence(gb.ULA(0.1), steps=3, starts=Starts(noise=1.0), base=BASE, kl=SamplerKL(steps=3))
    assert bool(torch.isfinite(run(Tiny(2), Batch.of(DATA), seeded()).value))
    assert entropy_module.__doc__ is not None
