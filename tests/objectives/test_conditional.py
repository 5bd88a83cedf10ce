"""Conditional energies E(x | y): every objective fits a density for each class, and chains draw from each.

Forty-eight classes are 24 replicates of two: normal densities of different means and widths. All are fitted by one run
of `gibbsian.fit`, each row under its own label, so that a label that goes to another row shows in every estimate.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn

from gibbsian import MALA, MLP, Energy, Gaussian, fit, sample
from gibbsian.objectives.base import Batch
from gibbsian.objectives.conditional_noise import ConditionalNCE
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching, LogUniform, MultiLevelDenoising
from gibbsian.objectives.energy_discrepancy import EnergyDiscrepancy
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation, RankingNCE
from gibbsian.objectives.recovery_likelihood import RecoveryLikelihood
from gibbsian.objectives.score_matching import FiniteDifferenceScoreMatching, ScoreMatching, SlicedScoreMatching
from recovery import REPLICATES, assert_recovered, seeded

MEANS, LOGS = (-1.0, 1.5), (-0.5, 0.3)
TRUTH = (*MEANS, *LOGS)
N = 240
"""Rows of each class."""
SIGMA = 0.4
CLASSES = 2 * REPLICATES
EACH = torch.arange(CLASSES).repeat_interleave(N)


class Normals(Energy):
    """A normal density on the line for each class, under noise of a fixed level, with a constant of its own."""

    event_shape = torch.Size((1,))
    context = ("y",)

    def __init__(self, sigma=0.0):
        super().__init__()
        self.sigma = sigma
        for name in ("mean", "log", "constant"):
            self.register_parameter(name, nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64)))

    def forward(self, x, y):
        return self.at(x, y, self.sigma)

    def at(self, x, y, sigma):
        variance = (2 * self.log[y]).exp() + sigma**2
        # The constant matters to noise contrastive estimation only: all classes share its learned log Z.
        return (x[:, 0] - self.mean[y]).square() / (2 * variance) + self.constant[y]

    def found(self):
        """Means and log deviations of the two classes, ``(replicates, 4)``."""
        return torch.cat((self.mean.detach().view(-1, 2), self.log.detach().view(-1, 2)), 1)


class Levels(Normals):
    """The same under noise of every level."""

    context = ("sigma", "y")

    def forward(self, x, sigma, y):
        return self.at(x, y, sigma)


def labelled():
    """Rows of all classes, in the order of their labels, and an entry that no energy asks for."""
    z = torch.randn(len(EACH), generator=seeded(1), dtype=torch.float64)
    x = torch.tensor(MEANS, dtype=torch.float64)[EACH % 2] + z * torch.tensor(LOGS, dtype=torch.float64).exp()[EACH % 2]
    return Batch(x[:, None], {"y": EACH, "unused": EACH})


def base():
    return Gaussian(1, scale=2.0).double()


CASES = {
    "CD": (Normals, lambda: ContrastiveDivergence(MALA(0.5), steps=4)),
    "PCD": (
        Normals,
        lambda: PersistentContrastiveDivergence(MALA(0.5), base(), steps=2, buffer_size=len(EACH), restart=0.0),
    ),
    "denoising": (lambda: Normals(SIGMA), lambda: DenoisingScoreMatching(SIGMA)),
    "many levels": (Levels, lambda: MultiLevelDenoising(LogUniform(0.2, 1.0))),
    "NCE": (Normals, lambda: NoiseContrastiveEstimation(base(), ratio=2).double()),
    "recovery": (Levels, lambda: RecoveryLikelihood((0.2, 0.4, 0.8), MALA(0.3), steps=8)),
    "exact scores": (Normals, lambda: ScoreMatching()),
    "sliced": (Normals, lambda: SlicedScoreMatching(variance_reduction=True)),
    "finite differences": (Normals, lambda: FiniteDifferenceScoreMatching(0.01)),
    "ranking NCE": (Normals, lambda: RankingNCE(base(), 8)),
    "conditional NCE": (Normals, lambda: ConditionalNCE(0.8)),
    "energy discrepancy": (Normals, lambda: EnergyDiscrepancy(1.0, 4)),
}


def fitted(name):
    make, objective = CASES[name]
    energy, data = make(), labelled()
    settings = {"steps": 200, "batch_size": len(EACH), "learning_rate": 0.05, "warmup_steps": 0, "clip_norm": 0.0}
    trained = objective()
    fit(energy, data, trained, rng=seeded(2), ema_decay=0.97, log_every=200, **settings)
    return energy, trained


def check(name):
    assert_recovered(fitted(name)[0].found(), TRUTH, 0.25)


@pytest.mark.parametrize("name", CASES)
def test_a_density_for_each_class_is_recovered(name):
    check(name)


@pytest.mark.parametrize("name", CASES)
def test_labels_of_other_rows_are_caught(name, monkeypatch):
    module = importlib.import_module(type(CASES[name][1]()).__module__)
    real = module.context_of

    def rolled(energy, batch, besides=()):
        return {key: value.roll(N // 3) for key, value in real(energy, batch, besides).items()}

    monkeypatch.setattr(module, "context_of", rolled)
    with pytest.raises(AssertionError, match="missed"):
        check(name)


def test_each_class_is_drawn_from_its_own_density():
    """By chains of one label each and by the replay buffer's, within 6 standard errors of independent draws."""
    energy, objective = fitted("PCD")
    energy = energy.requires_grad_(False)
    wide = (2 * torch.arange(6)).repeat_interleave(2000) + torch.arange(12000) % 2
    x = sample(energy.given(y=wide), MALA(0.3), base().sample(len(wide), seeded(3)), steps=100, rng=seeded(4)).x
    for k in wide.unique():
        rows, deviation = x[wide == k, 0], float(energy.log[k].exp())
        assert abs(float(rows.mean() - energy.mean[k])) < 6 * deviation / math.sqrt(len(rows))
        assert abs(float(rows.var()) / deviation**2 - 1) < 6 * math.sqrt(2 / len(rows))
    labels, chains = objective.buffer.context["y"], objective.buffer.positions[:, 0]
    for kind in (0, 1):
        rows = (chains - energy.mean[labels])[labels % 2 == kind]
        assert abs(float(rows.mean())) < 6 * math.exp(LOGS[kind]) / math.sqrt(len(rows)) + 0.02


def test_a_network_learns_two_classes_and_draws_them():
    """`MLP(classes=2)`: draws under each label have the moments of that class's data, to a few per cent."""
    rng = seeded(5)
    y = torch.arange(4000) % 2
    centre = torch.tensor([[-1.5, 0.0], [1.0, 1.0]])
    width = torch.tensor([0.4, 0.8])
    x = centre[y] + width[y][:, None] * torch.randn((4000, 2), generator=rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(2, hidden=(32, 32), classes=2) + Gaussian(2, scale=2.0)
    objective = NoiseContrastiveEstimation(Gaussian(2, scale=2.0))
    fit(energy, Batch(x, {"y": y}), objective, rng=rng, steps=400, batch_size=500, learning_rate=1e-2)
    for k in (0, 1):
        start = Gaussian(2, scale=2.0).sample(2000, rng)
        draws = sample(energy.given(y=k), MALA(0.1), start, steps=200, rng=rng).x
        assert float((draws.mean(0) - centre[k]).abs().max()) < 0.15
        assert float((draws.std(0) / width[k] - 1).abs().max()) < 0.15
