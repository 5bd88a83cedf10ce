"""A small model for every objective of the package: what training in lanes and processes is tried on.

Each case makes energy, data and objective anew, from fixed seeds, in float32.
"""

import torch
from torch import nn

import gibbsian as gb
from gibbsian.energies.latents import GaussianProposal
from gibbsian.energies.layers import dropout
from gibbsian.energies.variational import lebm, vae
from gibbsian.errors import OptionError
from gibbsian.processes import gathered
from gibbsian.sequences.boltzmann import BoltzmannLearning
from gibbsian.sequences.frequencies import statistics
from gibbsian.training.checks import checked
from gibbsian.training.lanes import check_lanes
from gibbsian.training.state import TrainingState
from gibbsian.training.step import take_step


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(make, seed=0):
    """Build a module with initial weights of a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def points(n=96, dim=2):
    return 0.8 * torch.randn(n, dim, generator=seeded(1)) + torch.arange(float(dim))


def bits(n=96, dim=6):
    return (torch.rand(n, dim, generator=seeded(2)) < torch.linspace(0.2, 0.8, dim)).float()


def classed(n=96):
    x = points(n)
    return gb.Batch(x, {"y": (x[:, 0] > 0).long() + (x[:, 1] > 1).long()})


def mlp(**options):
    return weights(lambda: gb.MLP(2, hidden=(16, 16), **options))


def based(**options):
    return mlp(**options) + gb.Gaussian(2, scale=2.0)


def generator(dim=2):
    return weights(lambda: gb.GeneratorNetwork(gb.Dense(2, dim, (16,)), dim, gb.Gaussian(2)), 3)


def flow():
    return weights(lambda: gb.spline_flow(2, 1, (8,), 4), 4)


def machine():
    return gb.RBM(6, 4, weight_scale=0.3, rng=seeded(5))


def base():
    return gb.Bernoulli(torch.zeros(6))


def persistent(**options):
    return gb.PersistentContrastiveDivergence(
        gb.MALA(0.1), gb.Gaussian(2, scale=2.0), **({"steps": 3, "buffer_size": 64, "restart": 0.1} | options)
    )


def deep():
    return gb.DeepBoltzmannMachine(6, [4, 3], weight_scale=0.3, rng=seeded(6))


def mean_field(**options):
    machine = deep()
    return gb.MeanFieldEnergy(machine), bits(), gb.MeanFieldPCD(machine, buffer_size=64, **options)


def autoencoder():
    return weights(lambda: vae(2, 2, rng=seeded(7), width=8, draws=4))


def corrected():
    model = gb.VAEBM(autoencoder(), mlp())
    return model, points(), gb.CorrectionLikelihood(gb.HMC(0.1, 3), model.base, steps=2, buffer_size=64)


def latent_prior():
    energy = weights(lambda: lebm(2, 2, rng=seeded(8), width=8, hidden=(8,), draws=4))
    prior = gb.ContrastiveDivergence(gb.ULA(0.05), 3, starts=gb.Starts(noise=1.0), base=gb.Gaussian(2))
    return energy, points(), gb.LatentPriorLikelihood(prior, gb.MALA(0.05), steps=3, start=gb.Gaussian(2))


def complete():
    energy = gb.LatentEnergy(Joint(), gb.ListedLatents(2))
    negative = gb.PersistentContrastiveDivergence(
        gb.GibbsWithGradients(), gb.Bernoulli(torch.zeros(8)), steps=2, buffer_size=64, restart=0.1
    )
    return (
        energy,
        bits(),
        gb.CompleteData(negative, gb.GibbsWithGradients(), steps=2, start=gb.Bernoulli(torch.zeros(2))),
    )


class Joint(gb.Energy):
    """A machine as an energy of visible and hidden states."""

    context = ("z",)

    def __init__(self):
        super().__init__()
        self.event_shape, self.support = torch.Size((6,)), torch.distributions.constraints.boolean
        self.weight = nn.Parameter(0.3 * torch.randn(6, 2, generator=seeded(9)))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x, z):
        return -((x @ self.weight) * z).sum(1) - x @ self.bias


def sleeping():
    law = weights(lambda: GaussianProposal(nn.Linear(2, 4), 2), 11)
    own = generator()
    return based(), points(), gb.EntropyRegularised(own, 0.2, 4) + gb.SleepPhase(own, law, 0.2)


def forces():
    x = points()
    return mlp(), gb.Batch(x, {"forces": -x}), gb.ForceMatching()


def classifier():
    return gb.ClassifierEnergy(weights(lambda: nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 3))), 3, (2,))


def family():
    rows = torch.nn.functional.one_hot(torch.randint(3, (96, 4), generator=seeded(12)), 3).float()
    found = statistics(rows.argmax(2), 3, torch.ones(96))
    base = gb.Categorical(torch.zeros(4, 3))
    return gb.Potts.dense(4, 3), rows, BoltzmannLearning(found, base, chains=64, coupling_penalty=0.01)


def rebuilt():
    return weights(lambda: gb.ReconstructionEnergy(gb.Dense(2, 3, (8,)), gb.Dense(3, 2, (8,)), 2))


def tempered():
    kernel = gb.ParallelTempering(gb.MALA(0.1), torch.tensor([1.0, 0.5, 0.2]))
    return based(), points(), gb.PersistentContrastiveDivergence(kernel, gb.Gaussian(2, scale=2.0), 2, 64)


def telescope():
    return gb.Telescope(mlp(classes=3), gb.Gaussian(2, scale=2.0), 3)


def levelled(**options):
    return weights(lambda: gb.NoiseConditional(2, width=16, blocks=1, **options))


CASES = {
    "Adversarial": lambda: (mlp(), points(), gb.Adversarial(generator(), r1=0.1, r2=0.1)),
    "Adversarial, every 2": lambda: (mlp(), points(), gb.Adversarial(generator(), relativistic=True, every=2)),
    "EnergyBasedGAN": lambda: (rebuilt(), points(), gb.EnergyBasedGAN(generator(), pull_away=0.1)),
    "CooperativeLearning": lambda: (based(), points(), gb.CooperativeLearning(generator(), gb.ULA(0.05), 3, 0.2)),
    "EntropyRegularised": lambda: (based(), points(), gb.EntropyRegularised(generator(), 0.2, 4)),
    "GeneratorKL": lambda: (based(), points(), gb.GeneratorKL(generator(), 0.2, 4)),
    "SleepPhase": sleeping,
    "Augmented": lambda: (mlp(), points(), gb.Augmented(gb.DenoisingScoreMatching(0.3), gb.AdditiveNoise(0.1))),
    "WeightedSum": lambda: (based(), points(), persistent() + gb.Ramp(1.0, 0.0, 4) * gb.DenoisingScoreMatching(0.3)),
    "Phases": lambda: (based(), points(), gb.Phases([(1, gb.DenoisingScoreMatching(0.3)), (None, persistent())])),
    "OfPart": lambda: (based(), points(), gb.OfPart(persistent())),
    "Centred": lambda: (
        machine(),
        bits(),
        gb.Centred(gb.PersistentContrastiveDivergence(gb.RBMGibbs(), base(), 2, 64), rate=0.3, chains=0.5),
    ),
    "MeanFieldPCD": mean_field,
    "MeanFieldPCD, centred": lambda: mean_field(rate=0.3),
    "ContrastiveDivergence": lambda: (based(), points(), gb.ContrastiveDivergence(gb.MALA(0.1), 2)),
    "ContrastiveDivergence, all starts": lambda: (
        based(),
        points(),
        gb.ContrastiveDivergence(
            gb.ULA(0.05),
            3,
            starts=gb.Starts(0.25, 0.25, 0.5),
            base=gb.Gaussian(2, scale=2.0),
            buffer_size=64,
            data_noise=0.1,
            augment=gb.AdditiveNoise(0.1),
            kl=gb.SamplerKL(0.1, steps=2),
        ),
    ),
    "PersistentContrastiveDivergence": lambda: (based(), points(), persistent()),
    "PersistentContrastiveDivergence, spectral norms": lambda: (based(spectral_norm=True), points(), persistent()),
    "PersistentContrastiveDivergence, labels": lambda: (based(classes=3), classed(), persistent()),
    "PersistentContrastiveDivergence, fast weights": lambda: (based(), points(), persistent(fast_rate=0.01)),
    "PersistentContrastiveDivergence, tempering": tempered,
    "CorrectionLikelihood": corrected,
    "DenoisingScoreMatching": lambda: (mlp(), points(), gb.DenoisingScoreMatching(0.3)),
    "MultiLevelDenoising": lambda: (levelled(), points(), gb.MultiLevelDenoising(gb.LogUniform(0.1, 2.0))),
    "MultiLevelDenoising, dropout": lambda: (
        levelled(dropout=0.3),
        points(),
        gb.MultiLevelDenoising(gb.LogUniform(0.1, 2.0)),
    ),
    "EnergyBounded": lambda: (classifier(), classed(), gb.EnergyBounded(points() + 4.0, -5.0, -1.0)),
    "EnergyDiscrepancy": lambda: (mlp(), points(), gb.EnergyDiscrepancy(0.5, negatives=4)),
    "EquilibriumMatching": lambda: (mlp(), points(), gb.EquilibriumMatching(gb.Gaussian(2))),
    "ExactLikelihood": lambda: (machine(), bits(), gb.ExactLikelihood()),
    "FlowContrastiveEstimation": lambda: (based(), points(), gb.FlowContrastiveEstimation(flow(), likelihood=0.5)),
    "ForceMatching": forces,
    "JointEnergyModel": lambda: (classifier(), classed(), gb.JointEnergyModel(persistent())),
    "LabelDropping": lambda: (
        mlp(classes=4),
        classed(),
        gb.LabelDropping(gb.DenoisingScoreMatching(0.3), none=3, probability=0.3),
    ),
    "CompleteData": complete,
    "LatentPriorLikelihood": latent_prior,
    "MaximumLikelihood": lambda: (flow(), points(), gb.MaximumLikelihood()),
    "NoiseContrastiveEstimation": lambda: (
        based(),
        points(),
        gb.NoiseContrastiveEstimation(gb.Gaussian(2, scale=2.0), ratio=2),
    ),
    "RankingNCE": lambda: (based(), points(), gb.RankingNCE(gb.Gaussian(2, scale=2.0), draws=4)),
    "ConditionalNCE": lambda: (mlp(), points(), gb.ConditionalNCE(0.5, 3)),
    "MinimumProbabilityFlow": lambda: (machine(), bits(), gb.MinimumProbabilityFlow()),
    "PseudoLikelihood": lambda: (machine(), bits(), gb.PseudoLikelihood()),
    "RatioMatching": lambda: (machine(), bits(), gb.RatioMatching()),
    "ConcreteScoreMatching": lambda: (machine(), bits(), gb.ConcreteScoreMatching()),
    "RecoveryLikelihood": lambda: (levelled(), points(), gb.RecoveryLikelihood((0.3, 0.6, 1.2), gb.MALA(0.4), steps=2)),
    "ScoreMatching": lambda: (mlp(), points(), gb.ScoreMatching()),
    "SlicedScoreMatching": lambda: (mlp(), points(), gb.SlicedScoreMatching()),
    "FiniteDifferenceScoreMatching": lambda: (mlp(), points(), gb.FiniteDifferenceScoreMatching()),
    "TelescopingRatios": lambda: (telescope(), points(), gb.TelescopingRatios()),
    "TransportMatching": lambda: (mlp(), points(), gb.TransportMatching(gb.Gaussian(2))),
    "EnergyMatching": lambda: (mlp(), points(), gb.EnergyMatching(gb.Gaussian(2), warmup=1, steps=5, step_size=0.2)),
    "EvidenceLowerBound": lambda: (autoencoder(), points(), gb.EvidenceLowerBound(2)),
    "ImportanceWeightedBound": lambda: (autoencoder(), points(), gb.ImportanceWeightedBound(3)),
    "BoltzmannLearning": family,
}
"""Name to builder; what stands before a comma is the objective's class."""

SETTINGS = {
    "batch_size": 32,
    "steps": 3,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "clip_norm": 0.0,
    "warmup_steps": 0,
}
"""Plain descent: how far runs are apart is not magnified by the optimiser."""


def run_of(name, sharding="none", steps=3, lanes=4, **options):
    """Gradients of each step, whole, by the parameter's name; and where the run stands."""
    energy, data, objective = CASES[name]()
    settings = gb.TrainingSettings(**(SETTINGS | {"lanes": lanes, "sharding": sharding} | options))
    rng = seeded(20)
    model, feed = checked(energy, data, objective, rng, settings)
    check_lanes(objective, settings.lanes, feed)
    state = TrainingState(model, objective, feed, settings, rng)
    found = []
    with dropout(model):
        for _ in range(steps):
            take_step(state, *state.batches())
            found.append({n: whole(state, o, p) for n, o, p in zip(state.names, state.originals, state.params)})
    return found, state


def whole(state, original, p):
    """A gradient, put together where processes hold a shard of it each."""
    shared = state.engine.sharded and state.engine.local(original) is not original
    grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return gathered(grad) if shared else grad


def gradients_of(names, sharding="none", steps=3, **options):
    """Gradients of cases by name, or what was said where one is refused."""
    found = {}
    for name in names:
        try:
            found[name] = run_of(name, sharding, steps, **options)[0]
        except OptionError as error:
            found[name] = str(error)
    return found


def apart(found, expected):
    """Largest relative error of the gradient, over steps: the length of the difference over that of the gradient."""
    worst = 0.0
    for a, b in zip(found, expected):
        assert a.keys() == b.keys()
        x, y = (torch.cat([g.double().flatten() for g in grads.values()]) for grads in (a, b))
        assert torch.isfinite(x).all()
        assert float(y.norm()) > 0
        worst = max(worst, float((x - y).norm() / y.norm()))
    return worst
