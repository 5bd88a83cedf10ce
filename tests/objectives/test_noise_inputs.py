"""Binary, ranking and conditional noise contrastive estimation: formulas, contexts, shapes, precisions and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import constraints

from gibbsian import MLP, fit
from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Bernoulli, Gaussian, Uniform
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch
from gibbsian.objectives.conditional_noise import BitFlips, ClassChanges, ConditionalNCE, GaussianPerturbation
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation, RankingNCE
from recovery import seeded

MAKE = {
    "binary": lambda noise: NoiseContrastiveEstimation(noise, 3),
    "ranking": lambda noise: RankingNCE(noise, 3),
    "conditional": lambda noise: ConditionalNCE(0.5, 3),
}
AGAINST_NOISE = ["binary", "ranking"]


def square(x):
    return 0.5 * x.flatten(1).square().sum(1)


def draw(*shape, seed=1, **options):
    return torch.randn(shape, generator=seeded(seed), **options)


def test_the_ranking_loss_is_a_cross_entropy():
    energy, q, x = Energy.of(lambda x: square(1.5 * x)), Gaussian(2, scale=2.0), draw(5, 2)
    loss = RankingNCE(q, 3)(energy, Batch(x), seeded(2))
    noise = q.sample(15, seeded(2)).view(3, 5, 2).transpose(0, 1)
    candidates = torch.cat((x[:, None], noise), 1)
    scores = torch.stack([q(c) - energy(c) for c in candidates])
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(loss.value, expected)
    assert float(loss.metrics["accuracy"]) == pytest.approx(float((scores.argmax(1) == 0).float().mean()))


def test_a_perfect_energy_of_the_noise_ranks_by_chance():
    """If the model is the noise, all scores are equal and the loss is log(K + 1)."""
    q = Gaussian(2, scale=2.0)
    value = RankingNCE(q, 7)(q, Batch(draw(5, 2)), seeded()).value
    assert float(value) == pytest.approx(math.log(8), abs=1e-5)


def test_the_conditional_loss_is_that_of_the_formula():
    energy, x = Energy.of(lambda x: square(1.5 * x)), draw(5, 2)
    loss = ConditionalNCE(0.5, 3)(energy, Batch(x), seeded(2))
    copies = GaussianPerturbation(0.5)(x.repeat(3, 1), seeded(2))
    odds = (energy(copies) - energy(x).repeat(3)).double()
    assert float(loss.value) == pytest.approx(float(2 * (1 + (-odds).exp()).log().mean()), rel=1e-5)
    assert float(loss.metrics["accuracy"]) == pytest.approx(float((odds > 0).float().mean()))


@pytest.mark.parametrize("flips", [1, 2, 6])
def test_flips_turn_over_as_many_bits_and_each_as_often(flips):
    """Six standard deviations of a share of 20000 draws."""
    x = torch.bernoulli(torch.full((20_000, 2, 3), 0.5), generator=seeded())
    y = BitFlips(flips)(x, seeded(1))
    turned = (x != y).float()
    assert torch.equal(y, y.round().clamp(0, 1))
    assert bool((turned.flatten(1).sum(1) == flips).all())
    share = flips / 6
    spread = (share * (1 - share) / 20_000) ** 0.5
    assert float((turned.mean(0) - share).abs().max()) <= 6 * spread


@pytest.mark.parametrize("changes", [1, 2, 6])
def test_changes_give_as_many_sites_another_class_and_each_as_often(changes):
    """Six standard deviations of a share of 20000 draws."""
    label = torch.randint(0, 4, (20_000, 2, 3), generator=seeded())
    x = torch.nn.functional.one_hot(label, 4).float()
    y = ClassChanges(changes)(x, seeded(1))
    assert bool((y.sum(-1) == 1).all())
    assert torch.equal(y, y.round())
    by = (y.argmax(-1) - label) % 4
    assert bool(((by > 0).flatten(1).sum(1) == changes).all())
    for step in (1, 2, 3):
        share = changes / 18
        spread = (share * (1 - share) / 20_000) ** 0.5
        assert float(((by == step).float().mean(0) - share).abs().max()) <= 6 * spread


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2, 2)])
def test_one_row_of_any_shape_in_either_precision(name, dtype, shape):
    objective = MAKE[name](Gaussian(shape, scale=2.0)).to(dtype)
    batch = Batch(draw(1, *shape, dtype=dtype))
    a, b, c = (objective(Energy.of(square), batch, seeded(s)) for s in (1, 1, 2))
    assert a.value.dtype == dtype
    assert a.value.ndim == 0
    assert bool(a.value.isfinite())
    assert torch.equal(a.value, b.value)
    assert not torch.equal(a.value, c.value)
    assert {"energy_data", "energy_noise", "accuracy"} <= a.metrics.keys()
    assert not any(m.requires_grad or m.ndim for m in a.metrics.values())


@pytest.mark.parametrize("name", MAKE)
def test_noise_in_another_precision_than_the_data(name):
    """The noise's numbers are taken over in the data's; gradients have the parameters' own."""
    torch.manual_seed(0)
    energy = MLP(2, hidden=(8,))
    MAKE[name](Gaussian(2, scale=2.0).double())(energy, Batch(draw(8, 2)), seeded()).value.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in energy.net[0].parameters())


@pytest.mark.parametrize("name", MAKE)
def test_labels_go_with_their_rows(name):
    seen = []

    def fn(x, y):
        seen.append((x, y))
        return (x[:, 0] - y).square()

    x, y = draw(4, 1), torch.arange(4.0)
    MAKE[name](Gaussian(1, scale=2.0))(Energy.of(fn, context=("y",)), Batch(x, {"y": y}), seeded())
    points, labels = seen[0]
    assert torch.equal(points[:4], x)
    assert torch.equal(labels, y.repeat(4))
    if name == "conditional":
        assert float((points.view(4, 4) - x.T).abs().max()) < 3.0


@pytest.mark.parametrize("name", MAKE)
def test_labels_that_are_missing_are_named(name):
    with pytest.raises(OptionError, match="conditioned on y"):
        MAKE[name](Gaussian(2))(MLP(2, classes=3), Batch(draw(4, 2)), seeded())


def test_a_given_constant_stays():
    objective = NoiseContrastiveEstimation(Gaussian(1), learn_log_z=False, log_z=0.7)
    assert not any(p.requires_grad for p in objective.parameters())
    loss = objective(Energy.of(lambda x: square(x)), Batch(draw(4, 1)), seeded())
    other = NoiseContrastiveEstimation(Gaussian(1))(Energy.of(lambda x: square(x) + 0.7), Batch(draw(4, 1)), seeded())
    torch.testing.assert_close(loss.value, other.value.detach())
    assert float(loss.metrics["log_z"]) == pytest.approx(0.7)
    with pytest.raises(OptionError, match="finite number of nats"):
        NoiseContrastiveEstimation(Gaussian(1), log_z=math.inf)


@pytest.mark.parametrize("name", MAKE)
def test_the_state_goes_round(name):
    one, two = MAKE[name](Gaussian(2)), MAKE[name](Gaussian(2, scale=3.0))
    if name == "binary":
        one.log_z.data.fill_(0.3)
    two.load_state_dict(one.state_dict())
    batch = Batch(draw(4, 2))
    assert torch.equal(*(o(Energy.of(square), batch, seeded()).value for o in (one, two)))


@pytest.mark.parametrize("name", MAKE)
def test_a_broken_off_run_goes_on_exactly(name, tmp_path):
    def train(folder, **more):
        torch.manual_seed(0)
        energy, objective = MLP(2, hidden=(8,)) + Gaussian(2, scale=2.0), MAKE[name](Gaussian(2, scale=2.0))
        options = {"steps": 30, "batch_size": 16, "checkpoint_every": 10, "log_every": 5, **more}
        run = fit(energy, draw(64, 2), objective, rng=seeded(1), folder=tmp_path / folder, **options)
        assert run.events == []
        return energy, objective

    plain = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < 20)])
    for one, two in zip(plain, train("b", resume=True)):
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_fit_in_double_precision_with_a_constant_in_single():
    energy = MLP(2, hidden=(8,)).double() + Gaussian(2, scale=2.0).double()
    run = fit(energy, draw(64, 2), NoiseContrastiveEstimation(Gaussian(2, scale=2.0)), rng=seeded(), steps=5)
    assert run.events == []


# What does not fit.


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_counts_below_one_are_refused(count):
    for make in (
        lambda: NoiseContrastiveEstimation(Gaussian(1), count),
        lambda: RankingNCE(Gaussian(1), count),
        lambda: ConditionalNCE(1.0, count),
        lambda: BitFlips(count),
        lambda: ClassChanges(count),
    ):
        with pytest.raises(OptionError, match=f"1 or more; got {count}"):
            make()


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan, math.inf])
def test_perturbations_without_a_size_are_refused(epsilon):
    with pytest.raises(OptionError, match="positive standard deviation of a perturbation"):
        ConditionalNCE(epsilon)
    with pytest.raises(ArgumentTypeError, match="perturb is a standard deviation or a callable"):
        ConditionalNCE("large")


@pytest.mark.parametrize("name", AGAINST_NOISE)
def test_noise_that_does_not_cover_the_data_is_refused(name):
    x = torch.cat((draw(20, 2).clamp(-1, 1), torch.full((3, 2), 1.5)))
    objective = MAKE[name](Uniform(2, low=-1.0, high=1.0))
    with pytest.raises(OptionError, match=r"Uniform.*not finite at 3 of 23 rows.*wider"):
        objective(Energy.of(square), Batch(x), seeded())
    objective(Energy.of(square), Batch(x[:20]), seeded())
    with pytest.raises(OptionError, match="3 of 23"):
        objective(Energy.of(square), Batch(x), seeded())
    for scale, shift in ((0.01, 0.0), (1.0, 30.0)):
        with pytest.raises(OptionError, match=r"half of the 64 rows lie .* nats or more above the highest of 192"):
            MAKE[name](Gaussian(2, loc=shift, scale=scale))(Energy.of(square), Batch(draw(64, 2)), seeded())
    MAKE[name](Gaussian(2, scale=0.5))(Energy.of(square), Batch(draw(64, 2)), seeded())


@pytest.mark.parametrize("name", AGAINST_NOISE)
def test_fit_names_noise_that_does_not_cover_the_data_at_any_step(name):
    x = torch.cat((draw(200, 2).clamp(-1, 1), torch.full((1, 2), 1.5)))
    with pytest.raises(OptionError, match="1 of 8 rows"):
        fit(MLP(2, hidden=(8,)), x, MAKE[name](Uniform(2, low=-1.0, high=1.0)), rng=seeded(3), steps=50, batch_size=8)


@pytest.mark.parametrize("name", AGAINST_NOISE)
def test_noise_on_another_space_is_refused(name):
    batch = Batch(draw(4, 3))
    with pytest.raises(ShapeError, match=r"noise draws points of shape \(2,\) and the data's have \(3,\)"):
        MAKE[name](Gaussian(2))(Energy.of(square), batch, seeded())
    bits = Bernoulli(probs=torch.full((3,), 0.5))
    with pytest.raises(DomainError, match=r"Boolean.*one domain only"):
        MAKE[name](bits)(Energy.of(square), batch, seeded())
    with pytest.raises(DomainError, match="one domain only"):
        MAKE[name](Gaussian(3))(Energy.of(square, support=constraints.boolean), batch, seeded())
    with pytest.raises(OptionError, match=r"noise is on meta and the data on cpu; move the objective"):
        MAKE[name](Gaussian(3).to("meta"))(Energy.of(square), batch, seeded())
    with pytest.raises(ShapeError, match="one row or more"):
        MAKE[name](Gaussian(3))(Energy.of(square), Batch(torch.zeros(0, 3)), seeded())
    with pytest.raises(ArgumentTypeError, match="tractable"):
        MAKE[name](MLP(3))


@pytest.mark.parametrize("name", MAKE)
def test_integers_are_refused(name):
    with pytest.raises(ArgumentTypeError, match=r"needs floating-point data; got torch.int64"):
        MAKE[name](Gaussian(2))(Energy.of(square), Batch(torch.ones(4, 2, dtype=torch.long)), seeded())


def test_perturbations_that_leave_the_domain_or_the_shape_are_refused():
    bits, batch = Energy.of(square, support=constraints.boolean), Batch(torch.ones(4, 3))
    with pytest.raises(DomainError, match=r"GaussianPerturbation\(epsilon=1.0\).*BitFlips\(\) for bits"):
        ConditionalNCE(1.0)(bits, batch, seeded())
    with pytest.raises(DomainError, match="turns over bits"):
        ConditionalNCE(BitFlips())(Energy.of(square), batch, seeded())
    with pytest.raises(OptionError, match="more than the 3 bits"):
        ConditionalNCE(BitFlips(4))(bits, batch, seeded())
    with pytest.raises(DomainError, match=r"changes classes of one-hot sites.*BitFlips\(\) for bits"):
        ConditionalNCE(ClassChanges())(bits, batch, seeded())
    hot, rows = Energy.of(square, support=constraints.one_hot), Batch(torch.eye(3)[:, None])
    for changes, wrong in ((2, rows), (1, Batch(torch.ones(4, 3, 1)))):
        with pytest.raises(OptionError, match=f"changes={changes} sites of another class are more than"):
            ConditionalNCE(ClassChanges(changes))(hot, wrong, seeded())
    for wrong in (lambda x, rng: x[:1], lambda x, rng: x.double(), lambda x, rng: x.flatten()):
        with pytest.raises(ShapeError, match=r"16 rows of shape \(3,\).*must keep shape and type"):
            ConditionalNCE(wrong)(Energy.of(square), batch, seeded())
