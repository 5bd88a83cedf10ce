"""Training in several processes: whole runs are those of one process, and what differs or fails is told everywhere."""

import shutil
import time

import pytest
import torch
from lane_cases import CASES, seeded

import gibbsian as gb
from gibbsian.processes import world
from gibbsian.training.checkpoints import CheckpointFolder
from gibbsian.training.metrics import read_metrics
from spawned import run_in

RUN = {"steps": 12, "batch_size": 32, "log_every": 3, "checkpoint_every": 4, "learning_rate": 0.01, "warmup_steps": 0}
RUN |= {"unlike_limit": 1e9}
TIMES = {"seconds", "steps_per_second"}


def trained(name="PersistentContrastiveDivergence", lanes=4, wrap=lambda objective: objective, **options):
    """A run in double precision; its history without times, its weights, the chains of its buffer."""
    energy, data, objective = CASES[name]()
    energy, objective = energy.double(), wrap(objective.double())
    run = gb.fit(energy, data.double(), objective, rng=seeded(3), lanes=lanes, **RUN | options)
    history = [{k: v for k, v in record.items() if k not in TIMES} for record in run.history]
    chains = [m.positions for m in objective.modules() if isinstance(m, gb.ReplayBuffer)]
    return {"history": history, "weights": [p.detach() for p in energy.parameters()], "chains": chains, "run": run}


def close(a, b, tolerance=1e-9):
    """Whether two runs are the same but for rounding."""
    assert [r.keys() for r in a["history"]] == [r.keys() for r in b["history"]]
    for x, y in zip(a["history"], b["history"]):
        for name, value in x.items():
            assert value == y[name] or value == pytest.approx(y[name], rel=1e-7, abs=1e-9, nan_ok=True), name
    for kind in ("weights", "chains"):
        assert len(a[kind]) == len(b[kind])
        for x, y in zip(a[kind], b[kind]):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


class Misfortune(gb.Objective):
    """Another objective, whose loss is NaN or an error at one call in one lane."""

    def __init__(self, objective, call, kind):
        super().__init__()
        self.objective, self.call, self.kind = objective, call, kind
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, energy, batch, rng):
        self.calls += 1
        loss = self.objective(energy, batch, rng)
        if int(self.calls) == self.call and float(torch.rand((), generator=rng)) < 0.2:
            if self.kind == "domain":
                raise gb.errors.DomainError("a chain is off")
            if self.kind == "nan":
                return gb.Loss(loss.value * float("nan"), loss.metrics)
        if self.kind == "error" and int(self.calls) == self.call and world().rank == world().size - 1:
            raise ZeroDivisionError("only here")
        return loss


def several(folder):
    """Whole runs of several kinds, in however many processes there are."""
    found = {"plain": trained(), "centred": trained("Centred"), "health": trained(wrap=nan), "off": trained(wrap=off)}
    found["saved"] = trained(folder=folder)
    return found


def nan(objective):
    return Misfortune(objective, 7, "nan")


def off(objective):
    return Misfortune(objective, 7, "domain")


def sharded(folder):
    """Runs whose weights are shared: one with rollbacks, one that is broken off and goes on."""
    found = {"health": trained(wrap=nan, sharding="full"), "off": trained(wrap=off, sharding="full")}
    trained(folder=folder, steps=8, decay="constant", sharding="full")
    found["saved"] = trained(folder=folder, resume=True, decay="constant", sharding="full")
    energy = found["saved"]["run"].energy
    energy(torch.zeros(3, 2, dtype=torch.float64)).sum().backward()
    assert all(type(p) is torch.nn.Parameter for p in energy.parameters())
    return found


def test_shared_weights_come_back_whole(tmp_path):
    alone = {"health": trained(wrap=nan), "off": trained(wrap=off), "saved": trained(decay="constant")}
    for found in run_in(2, sharded, tmp_path):
        found["saved"]["history"] = alone["saved"]["history"]
        for kind in alone:
            close(found[kind], alone[kind])


@pytest.mark.slow
def test_whole_runs_are_those_of_one_process(tmp_path):
    alone = several(tmp_path / "1")
    assert min(alone[kind]["run"].rollbacks for kind in ("health", "off")) > 0
    assert alone["plain"]["chains"][0].shape == (64, 2)
    for size in (2, 4):
        for found in run_in(size, several, tmp_path / str(size)):
            for kind in alone:
                close(found[kind], alone[kind])
    assert len(read_metrics(tmp_path / "4" / "metrics.jsonl")) == 4


def test_runs_of_two_processes_are_those_of_one():
    close(run_in(2, trained)[1], trained())


def half(folder):
    return trained(folder=folder, steps=8, decay="constant")


def rest(folder):
    return trained(folder=folder, resume=True, decay="constant")


def test_a_run_of_two_processes_goes_on_in_one_and_in_four(tmp_path):
    whole = trained(decay="constant")
    run_in(2, half, tmp_path / "two")
    (state, *_) = CheckpointFolder(tmp_path / "two", 4, 3).read()
    assert sorted(state["lanes"]) == [0, 1, 2, 3]
    for size in (1, 4):
        shutil.copytree(tmp_path / "two", tmp_path / str(size))
        for found in run_in(size, rest, tmp_path / str(size)):
            # The shorter run's last record stands between, and cuts the means of the one after it short.
            found["history"] = [record for record in found["history"] if record["step"] not in (8, 9)]
            close(found, whole | {"history": [record for record in whole["history"] if record["step"] != 9]})
    with pytest.raises(gb.errors.OptionError, match="lanes was 4, now 2"):
        trained(folder=tmp_path / "two", lanes=2, resume=True, decay="constant")


def alone_failing():
    began = time.monotonic()
    try:
        trained(wrap=lambda objective: Misfortune(objective, 5, "error"))
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began


def test_an_error_in_one_process_ends_all():
    (kind, message, seconds), (other, own, _) = run_in(2, alone_failing)
    assert (other, own) == ("ZeroDivisionError", "only here")
    assert kind == "ProcessError"
    assert "Process 1 of 2 stopped" in message
    assert "only here" in message
    assert seconds < 20


def differing(what):
    here = world().rank
    energy, data, objective = CASES["DenoisingScoreMatching"]()
    options = {"learning_rate": 0.01 + 0.01 * (here if what == "learning_rate" else 0)}
    if what == "data":
        data = data + here
    if what == "objective":
        objective = gb.DenoisingScoreMatching(0.3 + 0.1 * here)
    if what == "code":
        from gibbsian.training import votes

        votes.code_version = lambda: f"source #{here}"
    gb.fit(energy, data, objective, rng=seeded(here if what == "rng" else 0), batch_size=32, steps=2, **options)


def refused(whats):
    found = {}
    for what in whats:
        try:
            differing(what)
        except gb.errors.ProcessError as error:
            found[what] = str(error)
    return found


def unfit():
    found = {}
    tries = {
        "lanes": {"lanes": 3},
        "batch": {"batch_size": 33},
        "buffer": {"lanes": 6, "batch_size": 36},
        "small": {"batch_size": 96},
    }
    for name, options in tries.items():
        energy, data, objective = CASES["PersistentContrastiveDivergence"]()
        try:
            gb.fit(energy, data, objective, rng=seeded(), steps=2, **options)
        except gb.errors.OptionError as error:
            found[name] = str(error)
    energy, data, objective = CASES["Centred"]()
    try:
        moved = gb.Augmented(objective, gb.HorizontalFlip())
        gb.fit(energy, data, moved, rng=seeded(), batch_size=32, steps=2)
    except gb.errors.OptionError as error:
        found["centred"] = str(error)
    return found


def bad_input():
    return refused(["learning_rate", "data", "objective", "rng", "code"]), unfit()


def test_what_differs_or_does_not_fit_is_refused_everywhere():
    for told, found in run_in(2, bad_input):
        assert "learning_rate is 0.01 on rank 0, 0.02 on rank 1" in told["learning_rate"]
        assert "data is float32[96, 2] #" in told["data"]
        assert "objective.sigma is 0.3 on rank 0, 0.4 on rank 1" in told["objective"]
        assert "rng is #" in told["rng"]
        assert "versions of the code" in told["code"]
        assert "gibbsian is source #0 on rank 0" in told["code"]
        assert "3 lanes cannot be shared equally by 2 processes" in found["lanes"]
        assert "batch_size=32" in found["batch"]
        assert "64 chains of a replay buffer cannot be divided equally among 6 lanes" in found["buffer"]
        assert "fewer than the 48 rows of its batch; take buffer_size=96" in found["small"]
        assert "Centred moves the energy by means over whole batches" in found["centred"]


def unequal_starts():
    torch.manual_seed(world().rank)
    energy = gb.MLP(2, hidden=(8,))
    gb.fit(energy, CASES["ScoreMatching"]()[1], gb.ScoreMatching(), rng=seeded(), batch_size=32, steps=2)
    return [p.detach() for p in energy.parameters()]


def test_initial_weights_are_those_of_the_first_process():
    first, second = run_in(2, unequal_starts)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_lanes_of_one_process_leave_the_objective_whole():
    energy, data, objective = CASES["PersistentContrastiveDivergence"]()
    gb.fit(energy, data, objective, rng=seeded(), lanes=4, batch_size=32, steps=3)
    assert objective.buffer.positions.shape == (64, 2)
    assert objective.buffer.size == 64
    before = objective.buffer.positions.clone()
    gb.fit(energy, data, objective, rng=seeded(1), lanes=2, batch_size=32, steps=1)
    moved = (objective.buffer.positions != before).any(1)
    assert 16 <= int(moved.sum()) <= 32
    assert gb.fit(energy, data, objective, rng=seeded(1), batch_size=32, steps=1).steps == 1
