"""Mode collapse is seen in coverage and entropy, named by health, and not seen where there is none."""

import pytest
import torch
from torch import nn
from training_cases import QUIET

import gibbsian as gb
from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.networks import Dense
from gibbsian.errors import DivergenceError, OptionError
from gibbsian.objectives.amortised_divergence import EntropyRegularised
from gibbsian.objectives.base import Loss, Objective
from gibbsian.objectives.diversity import NEIGHBOURS, diversity
from gibbsian.objectives.entropy import nearest_neighbour_entropy
from gibbsian.training.health import DataScale, Health
from gibbsian.training.settings import TrainingSettings

EIGHT = gb.EightGaussians()
SPREAD = {"coverage": 0.95, "entropy_gap": -0.05}
FALLEN = {"coverage": 0.1, "entropy_gap": -1.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def on_modes(n, modes, rng):
    """Draws on the first of the eight modes."""
    x = EIGHT.sample(16 * n, rng)
    place = (torch.atan2(x[:, 1], x[:, 0]) / (torch.pi / 4)).round().long() % 8
    return x[place < modes][:n]


def expected_coverage(n, k=NEIGHBOURS):
    """Of draws of the same law: k of the 2n - 1 others are nearest, and not all of them are data."""
    none = torch.tensor([(n - 1 - i) / (2 * n - 1 - i) for i in range(k)]).prod()
    return 1.0 - float(none)


@pytest.mark.parametrize("n", [64, 256])
def test_draws_of_the_same_law_cover_as_many_as_they_should(n):
    rng = seeded(1)
    found = [diversity(EIGHT.sample(n, rng), EIGHT.sample(n, rng)) for _ in range(60)]
    coverage, gap = (torch.stack([f[name] for f in found]) for name in ("coverage", "entropy_gap"))
    assert abs(float(coverage.mean()) - expected_coverage(n)) < 6 * float(coverage.std()) / 60**0.5
    assert abs(float(gap.mean())) < 6 * float(gap.std()) / 60**0.5


@pytest.mark.parametrize("modes", [1, 2])
def test_draws_on_few_modes_cover_these_and_lie_closer(modes):
    rng = seeded(2)
    found = diversity(on_modes(256, modes, rng), EIGHT.sample(256, rng))
    assert float(found["coverage"]) == pytest.approx(modes / 8, abs=0.06)
    assert float(found["entropy_gap"]) == pytest.approx(0.5 * torch.tensor(modes / 8).log().item(), abs=0.2)


def test_the_gap_is_one_of_nearest_neighbour_entropies():
    a, b = (torch.randn(50, 3, generator=seeded(s), dtype=torch.float64) for s in (1, 2))
    same = torch.eye(50, dtype=torch.bool)
    expected = [nearest_neighbour_entropy(x, x, NEIGHBOURS, same) / 3 for x in (a, b)]
    torch.testing.assert_close(diversity(a, b)["entropy_gap"], expected[0] - expected[1])


def test_points_on_top_of_each_other_and_few_rows():
    x = EIGHT.sample(64, seeded())
    found = diversity(x[:1].expand(64, 2), x)
    assert float(found["entropy_gap"]) == -torch.inf
    assert float(found["coverage"]) < 0.2
    assert diversity(x[:5], x) == {}


def watch(records, settings=None):
    health = Health(settings or TrainingSettings(), DataScale(1.0, 1.0, 2))
    for step, record in enumerate(records, 1):
        alarm = health.check({"step": step, "loss": 0.0, "grad_norm": 1.0, **record})
        if alarm is not None:
            return alarm
    return None


def test_a_collapse_is_named():
    alarm = watch([SPREAD] * 5 + [FALLEN] * 3)
    assert (alarm.kind, alarm.metric, alarm.step) == ("collapsed", "coverage", 8)
    assert "mode collapse" in alarm.remedy
    prefixed = lambda record: {f"EntropyRegularised.{name}": value for name, value in record.items()}  # noqa: E731
    assert watch([prefixed(SPREAD)] * 5 + [prefixed(FALLEN)] * 3).metric == "EntropyRegularised.coverage"


def test_a_generator_that_has_not_learned_yet_or_is_only_off_is_none():
    assert watch([FALLEN] * 20) is None
    assert watch([SPREAD, FALLEN, FALLEN] * 9) is None
    assert watch([SPREAD] + [{"coverage": 0.1, "entropy_gap": 0.3}] * 9) is None
    assert watch([SPREAD] + [{"coverage": 0.5, "entropy_gap": -1.0}] * 9) is None
    assert watch([SPREAD] + [FALLEN] * 9, TrainingSettings(coverage_limit=0.0)) is None


def test_what_was_covered_is_remembered():
    settings, data = TrainingSettings(), DataScale(1.0, 1.0, 2)
    health, other = Health(settings, data), Health(settings, data)
    record = {"step": 1, "loss": 0.0, "grad_norm": 1.0}
    health.check(record | SPREAD)
    other.load_state_dict(health.state_dict())
    assert [other.check(record | FALLEN) for _ in range(3)][-1].kind == "collapsed"


class Falling(Objective):
    """A generator that first draws like the data, and then is pulled to one mode."""

    def __init__(self, generator, fall, steady=False):
        super().__init__()
        self.generator, self.fall, self.steady, self.calls = generator, fall, steady, 0

    def forward(self, energy, batch, rng):
        self.calls += 1
        z = self.generator.latent.sample(len(batch), rng)
        target = batch.x if self.calls < self.fall or self.steady else batch.x[:1].expand_as(batch.x)
        value = (self.generator(z) * 0.0).sum() + energy(batch.x).mean()
        return Loss(value, diversity(target + 0.01 * torch.randn(target.shape, generator=rng), batch.x))


def run(objective, **options):
    torch.manual_seed(0)
    energy = gb.MLP(2, hidden=(8,)) + gb.Gaussian(2, scale=2.0)
    data = EIGHT.sample(512, seeded(3))
    settings = {"steps": 60, "batch_size": 64, "log_every": 5, "checkpoint_every": 10} | QUIET | options
    return gb.fit(energy, data, objective, rng=seeded(4), **settings)


def network():
    torch.manual_seed(0)
    return GeneratorNetwork(Dense(2, 2, (32,)), 2, 2)


def test_a_run_that_collapses_is_rolled_back_and_stops_with_the_cause():
    with pytest.raises(DivergenceError, match=r"coverage was .*mode collapse"):
        run(Falling(network(), 25), max_rollbacks=1)
    assert run(Falling(network(), 25, steady=True)).events == []


def test_a_generator_without_entropy_collapses_and_one_with_it_does_not():
    """Real runs, short ones: the deepest minimum takes all draws where nothing spreads them."""
    kept = run(EntropyRegularised(network(), 0.1, 4, gradient_penalty=0.0), steps=120, learning_rate=1e-2)
    assert not any(e["kind"] == "collapsed" for e in kept.events)
    with pytest.warns(UserWarning, match="few points of the data"):
        fallen = run(EntropyRegularised(network(), 0.1, 4, 0.0, gradient_penalty=0.0), steps=120, learning_rate=1e-2)
    assert [e["kind"] for e in fallen.events if e["event"] == "verdict"] == ["collapsed"]
    assert "collapsed onto few points" in repr(fallen)


class FallingBuffer(Objective):
    """A replay buffer whose chains first stand on data with noise, and then nearly all on one of eight modes."""

    data_noise = 0.3

    def __init__(self, fall):
        super().__init__()
        self.buffer, self.fall, self.calls = ReplayBuffer(gb.Gaussian(2, scale=2.0), 64, 0.0), fall, 0

    def forward(self, energy, batch, rng):
        self.calls += 1
        slots = self.buffer.draw(64, rng, {}, batch.x)
        where = batch.x if self.calls < self.fall else batch.x[:1].expand_as(batch.x)
        noise = self.data_noise if self.calls < self.fall else 0.03
        self.buffer.write(slots, where + noise * torch.randn(where.shape, generator=rng), 1)
        return Loss(energy(batch.x).mean(), {})


def test_a_buffer_whose_chains_fall_onto_few_points_is_told_from_one_that_is_only_blurred_as_the_data():
    with pytest.raises(DivergenceError, match=r"buffer\.coverage was .*buffer's chains fell onto few points"):
        run(FallingBuffer(25), max_rollbacks=1)
    kept = run(FallingBuffer(1000))
    assert kept.events == []
    covered = [record["buffer.coverage"] for record in kept.history]
    assert min(covered) > 0.85
    assert min(record["buffer.entropy_gap"] for record in kept.history) > -0.25


def test_buffers_of_bits_have_no_distances():
    rbm = gb.RBM(6, 4)
    bits = (torch.rand((64, 6), generator=seeded(0)) < 0.5).float()
    objective = gb.PersistentContrastiveDivergence(gb.BlockGibbs(), gb.Bernoulli(torch.zeros(6)), buffer_size=64)
    kept = gb.fit(rbm, bits, objective, rng=seeded(1), steps=4, batch_size=32, log_every=2)
    assert not any("coverage" in name for record in kept.history for name in record)


@pytest.mark.parametrize(("name", "value"), [("coverage_limit", 1.5), ("entropy_limit", -0.1)])
def test_limits_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        TrainingSettings(**{name: value})
    assert isinstance(network(), nn.Module)
