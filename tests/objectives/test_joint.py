"""Joint energy models: the gradient is that of the likelihood of pairs, and known classes are recovered."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gibbsian import MALA, MLP, Bernoulli, Gaussian, fit, sample
from gibbsian.energies.classifier import ClassifierEnergy
from gibbsian.errors import ArgumentTypeError, DataError, OptionError, ShapeError
from gibbsian.objectives import joint as module
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.objectives.joint import JointEnergyModel
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from recovery import assert_recovered, descend, flat, minimise, seeded, slope


class Quadratics(nn.Module):
    """Two quadratic logits on the line: two normal densities and their odds, the constant of the first fixed."""

    def __init__(self, *values):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(values[:2] or (-0.5, 0.5), dtype=torch.float64))
        self.log_precision = nn.Parameter(torch.tensor(values[2:4] or (0.0, 0.0), dtype=torch.float64))
        self.odds = nn.Parameter(torch.tensor(values[4:] or (0.0,), dtype=torch.float64))

    def forward(self, x):
        constant = torch.cat((torch.zeros(1, dtype=torch.float64), self.odds))
        return constant - 0.5 * self.log_precision.exp() * (x - self.mean).square()


TRUTH = (-0.6, 1.3, 0.8, -0.3, 0.4)


def model(*values):
    return ClassifierEnergy(Quadratics(*values), 2, 1)


def rows(n, rng):
    """Pairs at the truth: class k has the mass of its unnormalised normal density."""
    precision = torch.tensor(TRUTH[2:4], dtype=torch.float64).exp()
    mass = torch.tensor([1.0, math.exp(TRUTH[4])], dtype=torch.float64) * precision.rsqrt()
    y = (torch.rand(n, generator=rng, dtype=torch.float64) < mass[1] / mass.sum()).long()
    z = torch.randn(n, generator=rng, dtype=torch.float64)
    x = torch.tensor(TRUTH[:2], dtype=torch.float64)[y] + z * precision.rsqrt()[y]
    return Batch(x[:, None], {"y": y})


GRID = torch.linspace(-9.0, 9.0, 1201, dtype=torch.float64)[:, None]


class Likelihood(Objective):
    """The exact one of an energy on the line, by quadrature."""

    def forward(self, energy, batch, rng):
        log_z = torch.logsumexp(-energy(GRID), 0) + math.log(float(GRID[1] - GRID[0]))
        value = energy(batch.x).mean() + log_z
        return Loss(value, {"energy_data": value.detach()})


def gradient(value, energy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(energy.parameters()))])


def pairs(energy, batch):
    """The mean of -log p(x, y) with the class summed and the point integrated by hand, from the logits alone."""
    step = math.log(float(GRID[1] - GRID[0]))
    log_z = torch.logsumexp(energy.net(GRID).flatten(), 0) + step
    return (log_z - energy.net(batch.x)[torch.arange(len(batch)), batch.context["y"]]).mean()


def check_pairs():
    energy, batch = model(-0.2, 0.9, 0.3, 0.1, -0.5), rows(300, seeded(1))
    loss, exact = JointEnergyModel(Likelihood())(energy, batch, seeded()), pairs(energy, batch)
    found, wanted = gradient(loss.value, energy), gradient(exact, energy)
    assert float(wanted.abs().min()) > 1e-3, "no power"
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10), f"missed: {found} for {wanted}"
    assert abs(float(loss.value.detach() - exact.detach())) < 1e-10, "missed"


def test_with_the_likelihood_of_points_it_is_the_likelihood_of_pairs():
    check_pairs()


def test_an_energy_without_the_sum_over_classes_is_caught(monkeypatch):
    for twin in (lambda self, x: -self.logits(x).amax(1), lambda self, x: -self.logits(x).sum(1)):
        monkeypatch.setattr(ClassifierEnergy, "forward", twin)
        with pytest.raises(AssertionError, match="missed"):
            check_pairs()


ENTROPY = module.cross_entropy


@pytest.mark.parametrize(
    "twin",
    [
        lambda logits, y, **options: ENTROPY(-logits, y, **options),
        lambda logits, y, **options: ENTROPY(logits, 1 - y, **options),
        lambda logits, y, **options: ENTROPY(logits, y, **options) / 2,
    ],
    ids=["sign", "other class", "divided by classes"],
)
def test_a_broken_cross_entropy_is_caught(monkeypatch, twin):
    monkeypatch.setattr(module, "cross_entropy", twin)
    with pytest.raises(AssertionError, match="missed"):
        check_pairs()


@pytest.mark.parametrize("share", [0.3, 0.0])
def test_rows_without_a_label_count_as_points_only(share):
    energy, batch = model(-0.2, 0.9, 0.3, 0.1, -0.5), rows(300, seeded(1))
    known = torch.arange(300) < share * 300
    some = Batch(batch.x, {"y": torch.where(known, batch.context["y"], -1)})
    loss = JointEnergyModel(Likelihood(), weight=0.7)(energy, some, seeded())
    wanted = 0.7 * Likelihood()(energy, batch, seeded()).value
    if share:
        logits = energy.logits(batch.x[known])
        wanted = wanted + nn.functional.cross_entropy(logits, batch.context["y"][known])
        accuracy = (logits.argmax(1) == batch.context["y"][known]).double().mean()
        assert float(loss.metrics["class_accuracy"]) == pytest.approx(float(accuracy))
    else:
        assert float(loss.metrics["cross_entropy"]) == 0
        assert math.isnan(loss.metrics["class_accuracy"])
    torch.testing.assert_close(gradient(loss.value, energy), gradient(wanted, energy), rtol=0, atol=1e-12)


def estimates(n, objective, replicates=24, solve=minimise, share=1.0):
    found = []
    for seed in range(replicates):
        energy, data = model(), rows(n, seeded(seed))
        if share < 1.0:
            known = torch.rand(n, generator=seeded(100 + seed)) < share
            data = Batch(data.x, {"y": torch.where(known, data.context["y"], -1)})
        solve(objective().double(), energy, data, seed)
        found.append(flat(energy))
    return torch.stack(found)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_classes_are_recovered(share):
    assert_recovered(estimates(1000, lambda: JointEnergyModel(Likelihood()), share=share), TRUTH, 0.35)


def test_errors_fall_as_the_square_root_of_the_rows():
    found = slope(lambda n: estimates(n, lambda: JointEnergyModel(Likelihood()), 12), TRUTH, (400, 1600, 6400))
    assert found == pytest.approx(-0.5, abs=0.2)


def persistent(size=400):
    # No restarts: three steps after one, a chain is still the base's, which shifts the estimates.
    base = Gaussian(1, scale=2.0).double()
    return PersistentContrastiveDivergence(MALA(0.6), base, steps=3, buffer_size=size, restart=0.0)


def test_classes_are_recovered_with_chains():
    def solve(objective, energy, data, seed):
        descend(objective, energy, data, seed, steps=120, rate=0.1)

    assert_recovered(estimates(400, lambda: JointEnergyModel(persistent()), solve=solve), TRUTH, 0.5)


def test_what_the_parts_tell_is_passed_on():
    energy, batch = model(*TRUTH), rows(400, seeded(1))
    loss = JointEnergyModel(persistent(), weight=0.5)(energy, batch, seeded())
    points = persistent()(energy, Batch(batch.x), seeded())
    names = {"energy_data", "energy_samples", "gap", "acceptance", "nonfinite", "moved", "buffer_age"}
    assert set(loss.metrics) == names | {"cross_entropy", "class_accuracy"}
    assert all(m.ndim == 0 and not m.requires_grad for m in loss.metrics.values())
    torch.testing.assert_close(loss.value, loss.metrics["cross_entropy"] + 0.5 * points.value)
    assert loss.metrics["gap"] == points.metrics["gap"]
    again = JointEnergyModel(persistent(), weight=0.5)(energy, batch, seeded())
    assert torch.equal(again.value, loss.value)


def test_a_sum_with_points_alone_has_the_classifiers_probabilities():
    energy, batch = model(*TRUTH), rows(100, seeded(1))
    wall = Gaussian(1, scale=3.0).double()
    loss = JointEnergyModel(Likelihood())(energy + wall, batch, seeded())
    alone = JointEnergyModel(Likelihood())(energy, batch, seeded())
    assert torch.equal(loss.metrics["cross_entropy"], alone.metrics["cross_entropy"])
    torch.testing.assert_close(
        loss.value - alone.value,
        Likelihood()(energy + wall, batch, seeded()).value - Likelihood()(energy, batch, seeded()).value,
    )


@pytest.mark.parametrize(
    "generative",
    [
        lambda: persistent(64),
        lambda: DenoisingScoreMatching(0.3),
        lambda: NoiseContrastiveEstimation(Gaussian(1, scale=2.0).double()),
    ],
    ids=["PCD", "denoising", "NCE"],
)
def test_a_run_is_resumed_exactly(tmp_path, generative):
    def train(folder, weight=0.5, **options):
        energy, objective = model(), JointEnergyModel(generative(), weight)
        settings = {"steps": 20, "batch_size": 16, "checkpoint_every": 5, "log_every": 5, "tensorboard": False}
        return fit(
            energy, rows(64, seeded(1)), objective, rng=seeded(), folder=tmp_path / folder, **settings, **options
        )

    plain = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < 14)])
    again = train("b", resume=True)
    assert torch.equal(flat(plain.energy), flat(again.energy))
    assert 0 <= plain.history[-1]["class_accuracy"] <= 1
    with pytest.raises(OptionError, match=r"objective\.weight was 0\.5, now 0\.6"):
        train("a", weight=0.6, resume=True)


def test_digits_are_told_apart_and_drawn():
    """Over 90 per cent of held-out digits are named after seconds, and draws of a class are taken for that class."""
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    x = torch.as_tensor(bunch.data, dtype=torch.float32) / 16
    y = torch.as_tensor(bunch.target)
    order = torch.randperm(len(x), generator=seeded(1))
    train, test = order[:1300], order[1300:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = ClassifierEnergy(MLP(64, hidden=(64,), classes=10), 10)
    energy = classifier + Gaussian(64, loc=x.mean(0), scale=1.0)
    objective = JointEnergyModel(DenoisingScoreMatching(0.3), weight=0.1)
    run = fit(energy, Batch(x[train], {"y": y[train]}), objective, rng=seeded(), steps=300, learning_rate=5e-3)
    with torch.no_grad():
        right = (classifier.logits(x[test]).argmax(1) == y[test]).double().mean()
    assert float(right) > 0.9
    assert run.history[-1]["class_accuracy"] > 0.9
    wanted = torch.arange(10).repeat(5)
    joint = classifier.joint + Gaussian(64, loc=x.mean(0), scale=1.0)
    draws = sample(joint.given(y=wanted), MALA(0.02), x.mean(0).expand(50, 64).clone(), steps=300, rng=seeded(2)).x
    with torch.no_grad():
        assert float((classifier.logits(draws).argmax(1) == wanted).double().mean()) > 0.9


def test_bad_options_are_refused():
    with pytest.raises(ArgumentTypeError, match="generative is an objective"):
        JointEnergyModel(MALA(0.1))  # type: ignore[arg-type]
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(OptionError, match=f"weight.*{weight}"):
            JointEnergyModel(Likelihood(), weight)


def test_labels_that_do_not_fit_are_refused():
    objective, energy, rng = JointEnergyModel(Likelihood()), model(), seeded()
    x = torch.arange(4.0).double()[:, None]
    with pytest.raises(OptionError, match=r"labels, y.*context: none.*-1"):
        objective(energy, Batch(x), rng)
    with pytest.raises(OptionError, match=r"context: label"):
        objective(energy, Batch(x, {"label": torch.zeros(4)}), rng)
    for y, error, match in (
        (torch.zeros(4), ArgumentTypeError, r"whole numbers from 0 to 1; got torch\.float32"),
        (torch.tensor([0, 1, 2, 0]), DataError, r"between 0 and 1.*got 0 to 2"),
        (torch.tensor([0, 1, -2, 0]), DataError, r"got -2 to 1"),
        (torch.zeros(4, 2, dtype=torch.int64), ShapeError, r"\(4,\); got \(4, 2\).*argmax"),
    ):
        with pytest.raises(error, match=match):
            objective(energy, Batch(x, {"y": y}), rng)
    with pytest.raises(DataError, match="got 0 to 2"):
        fit(energy, Batch(x, {"y": torch.tensor([0, 1, 2, 0])}), objective, rng=rng, steps=5)
    with pytest.raises(ArgumentTypeError, match="one ClassifierEnergy"):
        objective(MLP(1, classes=2).double(), Batch(x, {"y": torch.zeros(4, dtype=torch.int64)}), rng)
    with pytest.raises(ArgumentTypeError, match="one ClassifierEnergy"):
        objective(Bernoulli(probs=torch.full((1,), 0.5)), Batch(x, {"y": torch.zeros(4, dtype=torch.int64)}), rng)
    wrong = ClassifierEnergy(Quadratics(), 3)
    with pytest.raises(ShapeError, match=r"returned \(4, 2\)"):
        JointEnergyModel(DenoisingScoreMatching(0.1))(wrong, Batch(x, {"y": torch.zeros(4, dtype=torch.int64)}), rng)
