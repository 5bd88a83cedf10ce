"""The detectors raise alarms where they should and nowhere else; rollbacks rescue what can be rescued."""

import math

import pytest
import torch
from torch import nn
from training_cases import QUIET, Bowl, Chains, ExactLikelihood, rows, same

from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.base import Energy
from gibbsian.energies.neural import MLP
from gibbsian.energies.targets import GaussianMixture
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import DivergenceError, DomainError
from gibbsian.kernels.langevin import MALA
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.training.fit import fit, take_step
from gibbsian.training.health import DataScale, Health
from gibbsian.training.metrics import read_metrics
from gibbsian.training.settings import TrainingSettings
from gibbsian.training.state import TrainingState


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def watch(records, settings=None, data=None):
    """The first alarm that a sequence of records raises, or None."""
    health = Health(settings or TrainingSettings(), data or DataScale(1.0, 1.0, coordinates=250))
    for step, record in enumerate(records, 1):
        alarm = health.check({"step": step, "loss": 0.0, "grad_norm": 1.0, **record})
        if alarm is not None:
            return alarm
    return None


def test_healthy_noise_raises_no_alarm():
    # Student's t with 5 degrees of freedom, times 100 nats: the limit of 1000 is passed with P = 1.7e-4, and thrice in
    # a row in 10,000 records with P < 1e-7.
    rng = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 10_000, generator=rng), torch.randn(2, 5, 10_000, generator=rng)
    gap, norm = (100.0 * z / w.square().mean(1).sqrt()).tolist()
    assert max(map(abs, gap)) > 1000
    records = ({"gap": g, "grad_norm": abs(n), "acceptance": 0.6, "moved": 0.1} for g, n in zip(gap, norm))
    assert watch(records) is None


def test_a_steady_slow_runaway_is_seen():
    # A limit at a multiple of the recent median would move along with it.
    alarm = watch({"gap": -0.5 * i} for i in range(10_000))
    assert alarm is not None
    assert alarm.step < 2100


def test_a_large_transient_at_the_start_is_healthy():
    # A fresh image model: energies of thousands of nats that settle.
    records = ({"gap": 0.1 - 5000 * math.exp(-i / 10), "grad_norm": 1e5 * math.exp(-i / 5)} for i in range(100))
    assert watch(records) is None


@pytest.mark.parametrize(("sign", "remedy"), [(1.0, "far deeper than the data"), (-1.0, "no longer reach")])
def test_a_runaway_gap_is_seen_with_its_sign(sign, remedy):
    alarm = watch({"gap": sign * 0.1 * math.exp(0.3 * i)} for i in range(100))
    assert alarm is not None
    assert alarm.kind == "gap"
    assert remedy in alarm.remedy
    assert 1000 < abs(alarm.value) < 3000


def test_a_runaway_needs_both_limits():
    assert watch({"gap": 0.1 if i < 50 else 900.0} for i in range(60)) is None
    assert watch({"gap": 800.0 if i < 50 else 5000.0} for i in range(60)) is None
    assert watch({"gap": 0.1 if i < 50 else 1001.0} for i in range(60)) is not None


def grown(start, rate):
    """Gaps that grow by a constant factor per record."""
    return ({"gap": -start * math.exp(rate * i)} for i in range(100))


@pytest.mark.parametrize("coordinates", [2, 64, 784])
def test_the_limit_of_a_gap_grows_with_the_coordinates(coordinates):
    data, settings = DataScale(1.0, 1.0, coordinates), TrainingSettings()
    alarm = watch(grown(0.1, 0.3), data=data)
    assert alarm.kind == "gap"
    assert settings.gap_limit * coordinates < -alarm.value < 4 * settings.gap_limit * coordinates
    assert watch(({"gap": -0.99 * settings.gap_limit * coordinates * (i > 20)} for i in range(60)), data=data) is None


@pytest.mark.parametrize("seen", [0.4, 20.0])
def test_growth_without_end_is_a_runaway_whatever_was_usual(seen):
    """From the first records on, when nothing is usual yet, and where large gaps have become so."""
    data = DataScale(1.0, 1.0, coordinates=2)
    assert watch(({"gap": -seen * 2.0**i} for i in range(8)), data=data).step <= 9
    assert watch(({"gap": -seen * 0.9**i} for i in range(99)), data=data) is None


def test_a_single_outlier_is_not_an_illness():
    assert watch({"gap": 1e6 if i % 3 == 2 else 0.1} for i in range(60)) is None
    assert watch(({"gap": 1e6 if i > 20 else 0.1} for i in range(60)), TrainingSettings(patience=1)).step == 22


def test_exploding_gradients_are_seen():
    alarm = watch({"grad_norm": 1.0 if i < 20 else 2000.0} for i in range(40))
    assert (alarm.kind, alarm.metric, alarm.step) == ("gradient", "grad_norm", 23)


@pytest.mark.parametrize(
    ("record", "metric", "remedy"),
    [
        ({"acceptance": 0.001, "moved": 0.5}, "acceptance", "smaller step_size"),
        ({"acceptance": 1.0, "moved": 1e-6}, "moved", "larger step_size"),
    ],
)
def test_dead_chains_are_seen(record, metric, remedy):
    alarm = watch([record] * 3)
    assert (alarm.kind, alarm.metric, alarm.step) == ("dead", metric, 3)
    assert remedy in alarm.remedy
    assert watch([record, record, {"acceptance": 0.5, "moved": 0.1}] * 5) is None


def test_movement_is_measured_on_the_scale_of_the_data():
    assert watch([{"moved": 1e-6}] * 9, data=DataScale(1e-3, 1.0, 250)) is None
    assert DataScale.of(3.0 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == DataScale(3.0, 0.0, 2)


def test_saturation_is_measured_against_the_data():
    plain, images = DataScale(1.0, 1.0, 250), DataScale(1.0, 0.2, 250)
    assert watch([{"saturated": 0.95}] * 3, data=plain).kind == "saturated"
    assert watch([{"saturated": 0.95}] * 9, data=images) is None
    assert watch([{"saturated": 0.99}] * 3, data=images).kind == "saturated"
    assert watch([{"saturated": 1.0}] * 9, data=DataScale(1.0, 0.0, 250)) is None


@pytest.mark.parametrize("metric", ["loss", "grad_norm", "energy_data", "energy_samples", "gap"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_seen_at_once(metric, value):
    alarm = watch([{metric: value}])
    assert (alarm.kind, alarm.metric, alarm.step) == ("nonfinite", metric, 1)


@pytest.mark.parametrize("name", ["gap", "ContrastiveDivergence.gap", "Phases.ContrastiveDivergence2.gap"])
def test_every_part_of_a_sum_is_watched(name):
    alarm = watch({"gap": 0.1, name: 0.1 if i < 20 else 2000.0} for i in range(40))
    assert (alarm.kind, alarm.metric, alarm.step) == ("gap", name, 23)
    assert watch([{"acceptance": 0.5, f"A.{'acceptance'}": 0.0}] * 3).metric == "A.acceptance"
    assert watch([{"A.loss": math.nan}]).metric == "A.loss"


def test_an_energy_that_tells_nothing_apart_is_seen():
    assert watch([{"energy_std": 1e-7}] * 3).kind == "flat"
    assert watch([{"energy_std": 1e-3}] * 9) is None
    assert watch([{"energy_std": 1e-7}] * 9, TrainingSettings(flat_limit=0.0)) is None


def test_gradients_that_never_came_are_seen_and_those_that_went_are_not():
    alarm = watch([{"grad_norm": 0.0}] * 9)
    assert (alarm.kind, alarm.step) == ("stalled", 3)
    assert "second derivative" in alarm.remedy
    assert watch([{"grad_norm": 0.0}] * 2 + [{"grad_norm": 1e-6}] + [{"grad_norm": 0.0}] * 50) is None


def test_mass_at_the_edge_of_a_box_is_seen():
    assert watch([{"edge_mass": 0.01}] * 3).kind == "edge"
    assert watch([{"edge_mass": 1e-4}] * 9) is None


def test_another_phase_has_another_usual_size():
    norms = [1.0] * 20 + [5000.0] * 20
    assert watch({"grad_norm": g, "phase": float(i >= 20)} for i, g in enumerate(norms)) is None
    assert watch({"grad_norm": g, "phase": 0.0} for g in norms).kind == "gradient"
    # A record across the change has a phase in between.
    assert watch({"grad_norm": g, "A.phase": min(1.0, max(0.0, i - 19.5))} for i, g in enumerate(norms)) is None


def test_the_memory_is_restored():
    records = [{"step": i, "loss": 0.0, "grad_norm": 1.0, "gap": 0.1 if i < 30 else 2000.0} for i in range(40)]
    first = Health(TrainingSettings(), DataScale(1.0, 1.0, 250))
    assert not any(first.check(r) for r in records[:31])
    second = Health(TrainingSettings(), DataScale(1.0, 1.0, 250))
    second.load_state_dict(first.state_dict())
    assert [second.check(r) for r in records[31:33]] == [first.check(r) for r in records[31:33]]
    assert first.streaks["gap"] == 3


class Unlucky(Chains):
    """A NaN in the loss (or only in the gradient), or chains that stand where there is no energy, at given calls.

    The count of calls is no part of the saved state.
    """

    def __init__(self, calls, where="loss"):
        super().__init__()
        self._calls, self._count, self._where = set(calls), 0, where

    def forward(self, energy, batch, rng):
        loss = super().forward(energy, batch, rng)
        self._count += 1
        if self._count not in self._calls:
            return loss
        if self._where == "chains":
            raise DomainError("3 of 4 chains start where the energy or its gradient is not finite.")
        if self._where == "loss":
            return Loss(loss.value * math.nan, loss.metrics)
        # The square root's slope at zero is infinite, times zero.
        return Loss(loss.value + 0.0 * (self.shift - self.shift.detach()).sqrt(), loss.metrics)


@pytest.mark.parametrize("where", ["loss", "grad_norm", "chains"])
def test_one_misfortune_is_one_rollback(where):
    result = fit(
        Bowl(), rows(), Unlucky([33], where), rng=seeded(), steps=60, log_every=10, checkpoint_every=20, warmup_steps=1
    )
    (event,) = result.events
    assert (event["kind"], event["metric"], event["step"], event["to_step"]) == (
        "nonfinite",
        where.replace("chains", "loss"),
        33,
        20,
    )
    assert not math.isfinite(event["value"])
    assert result.steps == 60
    records = [r for r in result.history if "loss" in r]
    assert [r["step"] for r in records] == [10, 20, 30, 30, 40, 50, 60]
    # The second time over the same steps the learning rate is half and the noise is new.
    assert records[3]["learning_rate"] == 0.5 * records[2]["learning_rate"]
    assert records[3]["gap"] != records[2]["gap"]
    assert all(math.isfinite(r["loss"]) for r in records)
    assert torch.isfinite(result.energy.mean).all()


@pytest.mark.parametrize("where", ["loss", "grad_norm", "chains"])
def test_a_misfortune_moves_neither_weights_nor_optimiser(where):
    batch = Batch(rows())
    state = TrainingState(Bowl(), Unlucky([3], where), batch, TrainingSettings(), seeded())
    take_step(state, batch)
    take_step(state, batch)
    before = state.capture()
    take_step(state, batch)
    after = state.capture()
    assert state.step == 3
    assert bool(state.broken)
    assert same(before["energy"], after["energy"])
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])


def test_chains_off_the_domain_at_the_first_step_are_a_mistake():
    with pytest.raises(DomainError, match="3 of 4 chains"):
        fit(Bowl(), rows(), Unlucky([1], "chains"), rng=seeded(), steps=60)


def test_lasting_misfortune_ends_the_run_at_the_last_good_state(tmp_path):
    energy = Bowl()
    with pytest.raises(
        DivergenceError, match=r"loss was nan at step 21, after 2 rollbacks.*Lower learning_rate.*weights of step 20"
    ):
        fit(
            energy,
            rows(),
            Unlucky(range(33, 99)),
            rng=seeded(),
            steps=60,
            checkpoint_every=10,
            max_rollbacks=2,
            folder=tmp_path,
            **QUIET,
        )
    events = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "event" in r]
    assert [(e["event"], e["step"], e["to_step"]) for e in events] == [
        ("rollback", 33, 30),
        ("rollback", 31, 20),
        ("divergence", 21, 20),
    ]
    assert torch.isfinite(energy.mean).all()


def test_a_state_that_is_ill_itself_gives_way_to_the_one_before():
    # The call after 33, from step 30 anew, is step 31; so call 36 is step 33 again, and now 20 has to do.
    result = fit(
        Bowl(), rows(), Unlucky([33, 36]), rng=seeded(), steps=60, checkpoint_every=10, log_every=10, max_rollbacks=3
    )
    assert [(e["step"], e["to_step"]) for e in result.events] == [(33, 30), (33, 20)]
    assert result.steps == 60


class Cubic(Energy):
    """A density that has no integral: chains that fall over the edge fall for ever."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.w * x.sum(1)


class Runaway(Objective):
    """Data and samples that are far apart under an energy without a bound: the gap grows with every step."""

    def forward(self, energy, batch, rng):
        data, samples = energy(batch.x).mean(), energy(batch.x - 1000.0).mean()
        return Loss(data - samples, {"gap": (data - samples).detach()})


def test_a_runaway_gap_ends_a_run_that_nothing_saves():
    with pytest.raises(DivergenceError, match=r"gap was -.*after 2 rollbacks.*no longer reach"):
        fit(
            Cubic(),
            rows(),
            Runaway(),
            rng=seeded(),
            steps=2000,
            log_every=2,
            learning_rate=0.05,
            decay="constant",
            checkpoint_every=20,
            max_rollbacks=2,
        )


class Shrinking(Objective):
    """Drives all energies to zero."""

    def forward(self, energy, batch, rng):
        return Loss(energy(batch.x).square().mean())


def test_an_energy_that_becomes_flat_ends_the_run():
    energy = Cubic()
    with torch.no_grad():
        energy.w.fill_(1.0)
    with pytest.raises(DivergenceError, match=r"energy_std was .*after 1 rollbacks.*tells no points apart"):
        fit(
            energy,
            rows(),
            Shrinking(),
            rng=seeded(),
            steps=3000,
            log_every=2,
            learning_rate=0.05,
            max_rollbacks=1,
            flat_limit=0.05,
        )


def test_a_run_without_gradients_stops_at_once_with_its_name():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)).double()
    with torch.no_grad():
        net[0].bias.fill_(-1000.0)
        net[2].bias.zero_()
    with pytest.raises(DivergenceError, match=r"Training stalled: grad_norm was 0 at step 6.*after 0 rollbacks"):
        fit(net, rows(), Shrinking(), rng=seeded(), steps=500, log_every=2)


def test_the_look_at_the_energy_changes_nothing_in_it():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 1).double())
    energy = Energy.of(nn.Sequential(layer, nn.Flatten(0)), (2,))
    state = TrainingState(energy, Shrinking(), Batch(rows()), TrainingSettings(), seeded())
    before = state.capture()
    assert state.energy_spread() == pytest.approx(float(energy.eval()(rows()).std().detach()))
    energy.train()
    assert same(before["energy"], state.capture()["energy"])
    assert all(module.training for module in energy.modules())
    classes = Energy.of(lambda x, y: x.sum(1) * y, (2,), context=("y",))
    state.energy = classes
    assert state.energy_spread() is None


@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_without_health_a_misfortune_takes_its_course(where):
    energy = Bowl()
    run = fit(energy, rows(), Unlucky([33], where), rng=seeded(), steps=60, log_every=10, health=False)
    assert run.events == []
    assert run.steps == 60
    assert [math.isfinite(r["loss"]) for r in run.history] == [True] * 3 + [False] * 3
    assert bool(energy.mean.isnan().all())


def test_without_health_chains_that_cannot_go_on_are_recorded():
    run = fit(Bowl(), rows(), Unlucky([33], "chains"), rng=seeded(), steps=60, log_every=10, health=False)
    assert [math.isfinite(r["loss"]) for r in run.history] == [True] * 3 + [False] + [True] * 2


def test_rollbacks_are_counted_and_printed():
    run = fit(Bowl(), rows(), Unlucky([33]), rng=seeded(), steps=60, checkpoint_every=20)
    assert run.rollbacks == 1
    assert repr(run).startswith("Fit(1 rollback, 60 steps")


class Held(Objective):
    """Exact likelihood beside a buffer whose chains are where they were put."""

    def __init__(self, chains, base):
        super().__init__()
        self.buffer, self.exact = ReplayBuffer(base, 128), ExactLikelihood()
        self.buffer.fill(seeded(9))
        self.buffer.positions.copy_(chains)

    def forward(self, energy, batch, rng):
        return self.exact(energy, batch, rng)


def verdict(chains, base):
    return fit(Bowl(), rows(300), Held(chains, base), rng=seeded(), steps=4, **QUIET)


def far():
    return Gaussian(loc=torch.full((2,), -3.0, dtype=torch.float64))


def test_chains_that_came_no_nearer_are_told():
    with pytest.warns(UserWarning, match="farther from the data than a Gaussian would be.*Train for more steps"):
        run = verdict(far().sample(128, seeded(3)), far())
    (event,) = run.events
    assert (event["event"], event["kind"], event["step"]) == ("verdict", "unlike", 4)
    # Four units of distance along both axes: D = 2 E|x - y| - E|x - x'| - E|y - y'| is about 8.
    assert event["value"] == pytest.approx(8.0 / (0.01 * 0.5 * math.pi**0.5), rel=0.25)
    assert run.rollbacks == 0
    assert repr(run).startswith("Fit(chains unlike the data, 4 steps")
    assert run.history[-1]["chain_distance"] == event["value"]
    with pytest.warns(UserWarning, match="was inf"):
        verdict(torch.full((128, 2), math.inf, dtype=torch.float64), far())


@pytest.mark.filterwarnings("error::UserWarning")
def test_chains_that_are_like_the_data_are_not():
    assert verdict(rows(128, seed=7), far()).events == []
    assert verdict(rows(128, seed=7) + 0.05, far()).events == []
    bad = Held(far().sample(128, seeded(3)), far())
    run = fit(Bowl(), rows(300), bad, rng=seeded(), steps=4, health=False)
    assert run.events == []
    assert run.history[-1]["chain_distance"] > 100


def distance(x, chains, noise=0.0):
    objective = Held(chains, Gaussian(x.shape[1], scale=torch.ones(x.shape[1], dtype=torch.float64)))
    objective.exact, objective.data_noise = Shrinking(), noise
    return fit(Bowl(x.shape[1]), x, objective, rng=seeded(), steps=2, **QUIET).history[-1]["chain_distance"]


def two_humps(n, seed):
    return rows(n, dim=8, seed=seed) * 0.1 + torch.randint(0, 2, (n, 1), generator=seeded(seed)).double() * 2.0


def test_the_unit_of_the_chains_distance_is_that_of_a_gaussian():
    """Where the data have two humps, draws with their mean and covariance are at a distance of one, and no model's."""
    x = two_humps(600, 3)
    noise = rows(128, dim=8, seed=12)
    gaussian = x.mean(0) + ((noise - noise.mean()) / noise.std()) @ torch.linalg.cholesky(x.T.cov()).T
    assert abs(distance(x, two_humps(128, 11))) < 0.2
    assert distance(x, gaussian) == pytest.approx(1.0, abs=0.4)


def test_the_noise_of_the_data_is_taken_out_of_the_chains_first():
    """The noise is a quarter of the variance; minus the energy's slope at mean zero is that of the noisy data."""
    x = rows(600, dim=8)
    spread = float(x.std())
    noisy = rows(128, dim=8, seed=5) + 0.6 * spread * rows(128, dim=8, seed=6) / spread
    assert distance(x, noisy, noise=0.0) > distance(x, noisy, noise=0.3) + 0.1


def three_humps(n):
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [1.0, -2.5]])
    x = GaussianMixture(means, torch.full((3,), 0.35), torch.tensor([0.6, 0.3, 0.1])).sample(n, seeded(5))
    return (x - x.mean(0)) / x.std(0)


def in_the_plane(learning_rate, **overrides):
    """Neural PCD in two dimensions, momentum and all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = MLP(2, (64, 64, 64), frequencies=3) + Gaussian(2, scale=1.3)
    objective = PersistentContrastiveDivergence(MALA(0.02), Gaussian(2, scale=1.3), 10, buffer_size=1024)
    more = {"learning_rate": learning_rate, "batch_size": 128, "log_every": 10, "checkpoint_every": 50} | overrides
    return fit(energy, three_humps(2000), objective, rng=seeded(), steps=300, **more)


def test_a_runaway_in_the_plane_is_caught():
    """A gap of 20 nats is a wreck in two dimensions; a limit made for images let it pass."""
    wild = in_the_plane(4e-3, health=False)
    assert max(abs(r["gap"]) for r in wild.history if "gap" in r) > 20.0
    with pytest.raises(DivergenceError, match="gap was"):
        in_the_plane(4e-3, max_rollbacks=0)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_healthy_run_in_the_plane_is_left_alone():
    assert in_the_plane(3e-4, betas=(0.0, 0.99)).events == []


def test_a_runaway_that_the_end_of_a_run_cuts_short_is_told():
    class Running(Chains):
        def forward(self, energy, batch, rng):
            loss = super().forward(energy, batch, rng)
            self.calls = getattr(self, "calls", 0) + 1
            return Loss(loss.value, {**loss.metrics, "gap": torch.tensor(-0.1 * 2.0 ** (self.calls / 10))})

    with pytest.warns(UserWarning, match="running away: gap was"):
        run = fit(Bowl(), rows(), Running(), rng=seeded(), steps=80, log_every=10)
    assert [(e["event"], e["kind"]) for e in run.events] == [("verdict", "gap")]
    assert repr(run).startswith("Fit(a runaway at its end")


def test_healthy_training_has_no_events():
    for objective in (Chains(), ExactLikelihood()):
        assert fit(Bowl(), rows(), objective, rng=seeded(), steps=200, log_every=2, learning_rate=0.05).events == []


def test_rollbacks_repeat_exactly():
    first, second = (
        fit(Bowl(), rows(), Chains(misfortune=0.06), rng=seeded(), steps=80, checkpoint_every=10, max_rollbacks=50)
        for _ in range(2)
    )
    assert first.events
    assert same(first.history, second.history)
    assert same(first.energy.state_dict(), second.energy.state_dict())
