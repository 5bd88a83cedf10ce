"""The cost model against rings that are walked by hand, counts against what is known, and the command."""

import contextlib
import io
import json
import math

import pytest
import torch
from torch import nn

from gibbsian.cli import main
from gibbsian.errors import OptionError
from gibbsian.planning import INFINIBAND, NVLINK, Curve, Device, Link, Network, Quantity, Question, plan
from gibbsian.planning.calibration import around, counted_work, sizes_of
from gibbsian.planning.clocks import quantity, sized, time_training
from gibbsian.planning.costs import (
    BUCKET,
    Line,
    Step,
    Work,
    all_reduce,
    exposed,
    ring_all_reduce,
    ring_pass,
    shard_exchange,
    traffic,
    tree_all_reduce,
)
from gibbsian.planning.counts import counted, kept_bytes, line_through, moment_bytes
from gibbsian.planning.model import (
    Costs,
    Crew,
    Setting,
    Sizes,
    crossover,
    sampling_memory,
    sampling_step,
    scaling,
    training_memory,
    training_step,
)
from gibbsian.planning.tables import advice, best_ranks, renderables, seconds, size_of
from gibbsian.recipes import choose
from gibbsian.training.settings import TrainingSettings

SLOW = Link.of(2.0, 50.0)
"""2 GB/s and 50 us."""


def walked_ring(size, ranks, link):
    """Sum numbers around a ring, chunk by chunk, and count the seconds: every process ends with every sum."""
    held = [[r + 1] * ranks for r in range(ranks)]
    clock = 0.0
    for round_ in range(ranks - 1):
        sent = [((r - round_) % ranks, held[r][(r - round_) % ranks]) for r in range(ranks)]
        for r, (chunk, value) in enumerate(sent):
            held[(r + 1) % ranks][chunk] += value
        clock += link.latency.value + size / ranks * link.per_byte.value
    for round_ in range(ranks - 1):
        sent = [((r + 1 - round_) % ranks, held[r][(r + 1 - round_) % ranks]) for r in range(ranks)]
        for r, (chunk, value) in enumerate(sent):
            held[(r + 1) % ranks][chunk] = value
        clock += link.latency.value + size / ranks * link.per_byte.value
    assert all(value == ranks * (ranks + 1) // 2 for mine in held for value in mine)
    return clock


def agrees(formula):
    cases = [(1e6, 2), (1e6, 5), (3e8, 8)]
    return all(
        math.isclose(formula(size, n, SLOW).value, walked_ring(size, n, SLOW), rel_tol=1e-9) for size, n in cases
    )


def test_a_ring_takes_what_walking_it_takes():
    assert agrees(ring_all_reduce)
    # By hand: 1 MB among 4 at 2 GB/s and 50 us is 6 messages of 50 us + 125 us.
    assert ring_all_reduce(1e6, 4, SLOW).value == pytest.approx(6 * (50e-6 + 125e-6))
    assert traffic(1e6, 4) == pytest.approx(1.5e6)
    assert ring_all_reduce(1e6, 1, SLOW).value == traffic(1e6, 1) == 0.0


def test_bytes_counted_once_are_noticed():
    def once(size, ranks, link):
        return link.latency * (2 * (ranks - 1)) + link.per_byte * (size * (ranks - 1) / ranks)

    def one_way(size, ranks, link):
        return ring_pass(size, ranks, link)

    assert not agrees(once)
    assert not agrees(one_way)


def test_nodes_are_summed_inside_first():
    network = Network(NVLINK, INFINIBAND, 8)
    size = 4e9
    # Inside: there and back among 8 at 450 GB/s; between 2 nodes an eighth of the bytes at 50 GB/s.
    inner = 14 * (5e-6 + size / 8 / 450e9)
    between = 2 * (10e-6 + size / 8 / 2 / 50e9)
    assert all_reduce(size, 16, network).value == pytest.approx(inner + between)
    assert all_reduce(size, 8, network).value == pytest.approx(inner)
    assert shard_exchange(size, 16, network).value == pytest.approx(30 * (10e-6 + size / 16 / 50e9))
    # Small messages between many nodes go by trees, whose messages are as many as a logarithm.
    assert all_reduce(1e3, 1024, network).value < ring_all_reduce(1e3, 8, NVLINK).value + 15 * 10e-6
    assert tree_all_reduce(0.0, 1024, SLOW).value == pytest.approx(20 * 50e-6)


def test_exchanges_grow_with_bytes_processes_and_latency():
    network = Network(NVLINK, INFINIBAND, 8)
    for grow in (
        [all_reduce(size, 64, network).value for size in (0.0, 1e3, 1e6, 1e9)],
        [all_reduce(1e8, 8 * nodes, network).value for nodes in (1, 2, 4, 8, 16, 128)],
        [ring_all_reduce(1e8, n, SLOW).value for n in (1, 2, 3, 8, 100)],
        [ring_all_reduce(1e8, 4, Link.of(1.0, us)).value for us in (0.0, 1.0, 100.0)],
    ):
        assert grow == sorted(grow)
        assert grow[0] < grow[-1]
    slow, fast = (ring_all_reduce(1e8, 4, Link.of(speed, 1.0)).value for speed in (1.0, 10.0))
    assert fast < slow


def test_all_but_the_last_bucket_hides_behind_the_backward_pass():
    long, short = Quantity(10.0), Quantity(0.1)
    assert exposed(Quantity(1.0), BUCKET, long).value == 1.0
    assert exposed(Quantity(1.0), 4 * BUCKET, long).value == pytest.approx(0.25)
    assert exposed(Quantity(1.0), 4 * BUCKET, short).value == pytest.approx(1.0 - 0.075)
    assert exposed(Quantity(1.0), 0.0, long).value == 1.0


def test_a_curve_goes_through_what_was_measured_and_straight_on():
    curve = Curve((10, 30), (Quantity(2.0, 0.1), Quantity(4.0, 0.3)))
    assert curve.at(10) == Quantity(2.0, 0.1)
    assert curve.at(20).value == pytest.approx(3.0)
    assert curve.at(20).spread == pytest.approx(math.hypot(0.05, 0.15))
    assert curve.at(60).value == pytest.approx(7.0)
    assert curve.at(5).value == pytest.approx(1.5)
    # Noise that turns a slope round makes nothing cheaper than nothing, nor more chains cheaper than fewer.
    noisy = Curve((10, 30), (Quantity(4.0), Quantity(3.0)))
    assert noisy.at(1).value == 4.0
    assert noisy.at(100).value == 3.0
    steep = Curve((10, 30), (Quantity(1.0), Quantity(9.0)))
    assert steep.at(5).value == pytest.approx(0.5)
    with pytest.raises(OptionError, match="increasing"):
        Curve((3, 2), (Quantity(1.0), Quantity(1.0)))


def test_sizes_to_measure_never_are_the_one_planned():
    for size in (1, 2, 3, 5, 17, 128, 1000, 12.5):
        found = around(size, 1)
        assert round(size) not in found
        assert len(found) >= 2
        assert found == sorted(set(found))
        assert found[-1] > size
    assert min(around(2, 2)) >= 2


def flat(seconds, *more):
    return Curve((1, 1001), (Quantity(seconds, 0.01 * seconds), Quantity(seconds + 1000 * (more[0] if more else 0.0))))


COSTS = Costs(
    training={"loss": flat(1.0, 0.01), "backward": flat(0.5, 0.02), "update": flat(0.1), "between": flat(0.05)},
    record=Quantity(5.0),
    log_every=50,
    chain_step=flat(0.04),
    chain_steps=10,
    sampling=flat(0.2, 0.001),
    sizes=Sizes(4e6, 4e6, 8e6, 4e6, 1e6, 40.0, Line(1e5, 100.0), 3e8),
    chains=Line(1e4, 80.0),
    work=Work(1e6, 400.0),
    chain_work=Work(2e5, 60.0),
)
ALONE = Setting(Network(SLOW))


def test_a_training_step_is_the_sum_of_its_parts():
    step = training_step(COSTS, ALONE, 101, 1, 1)
    # Loss 1 + 100 rows of 0.01, backward 0.5 + 2, optimiser, the rest with a fiftieth of a record.
    assert step.seconds.value == pytest.approx(2.0 + 2.5 + 0.1 + 0.05 + 0.1)
    assert step.compute["chains"].value == pytest.approx(0.4)
    assert step.compute["forward"].value == pytest.approx(1.6)
    assert not step.talk
    assert step.bound == "compute"
    assert step.seconds.spread > 0.0
    lanes = training_step(COSTS, ALONE, 102, 1, 2)
    assert lanes.seconds.value == pytest.approx(2 * (1.5 + 1.5) + 0.1 + 0.05 + 0.1)
    two = training_step(COSTS, Setting(Network(SLOW), local=False), 102, 2, 2)
    assert two.computing.value == pytest.approx(1.5 + 1.5 + 0.25)
    assert two.talking.value == pytest.approx(2 * (50e-6 + 1e-3))


def test_processes_that_share_a_machine_slow_each_other_down():
    crew = Crew(2, Quantity(1.2), Quantity(1.1), Quantity(0.001), cores=2, threads=1)
    setting = Setting(Network(SLOW), crew)
    step = training_step(COSTS, setting, 102, 2, 2)
    assert step.computing.value == pytest.approx(1.2 * (1.5 + 1.5 + 0.25))
    assert step.talk["checks"].value == 0.001
    assert sampling_step(COSTS, setting, 202, 2, 2).seconds.value == pytest.approx(1.1 * 0.3)
    assert sampling_step(COSTS, setting, 404, 4, 4).seconds.value == pytest.approx(1.1 * 0.3 * 2)
    assert sampling_step(COSTS, setting, 101, 1, 1).seconds.value == pytest.approx(0.3)
    elsewhere = Setting(Network(SLOW), crew, local=False)
    assert sampling_step(COSTS, elsewhere, 404, 4, 4).seconds.value == pytest.approx(0.3)


def test_other_processors_take_the_longer_of_computing_and_launching():
    setting = Setting(Network(NVLINK), local=False, device=Device(1e12, 1e-5))
    assert training_step(COSTS, setting, 10, 1, 1).seconds.value == pytest.approx(4e-3)
    assert training_step(COSTS, setting, 10**6, 1, 1).seconds.value == pytest.approx(1.0)
    assert counted_work(RECIPE, None).backward < 0.5  # most of it is in the chains
    assert counted_work(choose("table", (3,), 1000, {}), None).backward > 0.5
    assert sampling_step(COSTS, setting, 100, 1, 1).seconds.value == pytest.approx(6e-4)


def test_memory_is_shared_as_it_is_sharded():
    copied, sharded = ALONE, Setting(Network(SLOW), sharded=True)
    four, whole = (training_memory(COSTS, setting, 400, 4, 4, 1000) for setting in (sharded, copied))
    assert four["weights"] == whole["weights"] / 4 == 1e6
    assert four["optimiser"] == 2e6
    assert four["gathered weights and gradients"] == 8e6
    assert whole["replay buffer"] == 2.5e5
    assert whole["data"] == 40e3
    assert training_memory(COSTS, copied, 400, 4, 4, None)["data"] == 40.0 * 2 * 100
    assert whole["activations"] == 1e5 + 100 * 100.0
    assert training_memory(COSTS, copied, 400, 4, 8, 1000)["activations"] < whole["activations"]
    assert sampling_memory(COSTS, 1000, 2, 2)["chains"] == 1e4 + 80 * 500.0


def test_scaling_keeps_the_batch_or_the_share():
    costs, setting = COSTS, Setting(Network(SLOW), local=False)
    strong, weak = (scaling(costs, setting, 64, 1, "training", kind) for kind in (True, False))
    assert [row.ranks for row in strong] == [1, 2, 4, 8, 16, 64]
    assert {row.size for row in strong} == {64}
    assert [row.size for row in weak] == [64 * row.ranks for row in weak]
    assert strong[0].efficiency == weak[0].efficiency == 1.0
    for rows in (strong, weak):
        assert [row.efficiency for row in rows] == sorted((row.efficiency for row in rows), reverse=True)
    chains = scaling(costs, setting, 1024, 1, "sampling", False)
    assert {row.efficiency for row in chains} == {1.0}
    assert best_ranks(chains) == 1024
    with pytest.raises(OptionError, match="training or sampling"):
        scaling(costs, setting, 64, 1, "dreaming", True)


def test_talk_overtakes_computing_later_where_links_are_faster():
    found = [
        crossover(COSTS, Setting(Network(Link.of(speed, delay)), local=False), 4096, 1)
        for speed, delay in ((0.001, 1e4), (0.01, 1e3), (100.0, 1.0))
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] < found[1]
    assert found[2] is None
    assert Step({"a": Quantity(1.0)}, {"b": Quantity(2.0)}).bound == "communication"


def test_what_a_backward_pass_keeps_is_counted_to_the_byte():
    layer, x = nn.Linear(20, 30), torch.zeros(7, 20)
    kept, largest = kept_bytes(lambda: torch.tanh(layer(x)).sum(), (layer,))
    # The input for the weight's gradient, and tanh's result; weights are there anyway.
    assert kept == 7 * (20 + 30) * 4
    assert largest == 7 * 30 * 4

    def in_turn():
        for _ in range(3):
            torch.tanh(layer(x)).sum().backward()

    assert kept_bytes(in_turn, (layer,))[0] == kept
    assert line_through({2: 120.0, 4: 220.0}) == Line(20.0, 50.0)


def test_products_are_counted():
    w, x = torch.zeros(20, 30, requires_grad=True), torch.zeros(7, 20, requires_grad=True)
    flops, calls = counted(lambda: torch.autograd.grad((x @ w).sum(), (x, w)))
    assert flops == 3 * 2 * 7 * 20 * 30
    assert 4 <= calls <= 12


def test_moments_are_those_of_the_optimiser_and_weights_stay():
    class Still(nn.Module):
        pass

    net = nn.Linear(100, 10)
    before = net.weight.detach().clone()
    size = 4.0 * (100 * 10 + 10)
    assert moment_bytes(net, Still(), TrainingSettings()) == pytest.approx(2 * size, abs=16)
    assert moment_bytes(net, Still(), TrainingSettings(optimizer="sgd", momentum=0.9)) == pytest.approx(size, abs=16)
    assert moment_bytes(net, Still(), TrainingSettings(optimizer="sgd")) <= 16
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None


TINY = {"energy": "mlp", "width": 8, "depth": 1, "chain_steps": 3, "batch_size": 32, "buffer_size": 40, "steps": 500}
RECIPE = choose("table", (3,), 1000, TINY)


def test_parts_of_a_step_are_told_apart():
    timed = time_training(RECIPE, 16, 0.2)
    assert timed.steps >= 7
    assert all(part.value > 0.0 for part in timed.parts.values())
    # Three steps of chains and more are in the loss, and the optimiser has some dozen weights.
    assert timed.parts["loss"].value > timed.parts["backward"].value > 0.0
    assert timed.record.value >= 0.0
    assert quantity([3.0]).spread == 0.0
    assert quantity([1.0, 2.0, 3.0, 4.0, 100.0]) == Quantity(3.0, 1.0)
    assert sized(RECIPE, 100).buffer_size == 100


def test_sizes_are_those_of_the_model():
    sizes = sizes_of(RECIPE, None, 7.0)
    weights = 4.0 * (3 * 8 + 8 + 8 + 1)
    assert sizes.trained == pytest.approx(weights, abs=8)
    assert sizes.average == sizes.trained
    assert sizes.buffer >= 40 * 3 * 4
    assert sizes.row == 12.0
    assert sizes.activations.per_row > 4 * 8
    assert sizes.program == 7.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ranks": 0}, "ranks counts processes"),
        ({"ranks": 3}, "32 rows of a batch cannot be divided equally among 3 lanes; take --batch-size 33"),
        ({"ranks": 2, "chains": 1}, "2 processes cannot share 1 chains"),
        ({"ranks": 2, "chains": 7}, "7 chains cannot be divided"),
        ({"ranks": 2, "lanes": 3}, "3 lanes cannot be shared equally by 2 processes"),
        ({"rows": 1}, "rows counts"),
        ({"per_node": 0}, "per_node counts"),
        ({"training": False}, "nothing to plan"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message):
    with pytest.raises(OptionError, match=message):
        Question(RECIPE, **words)


def test_links_and_times_that_are_none_are_refused():
    for speed, delay in ((0.0, 1.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, math.nan)):
        with pytest.raises(OptionError, match=r"bandwidth|latency"):
            Link.of(speed, delay)
    with pytest.raises(OptionError, match="seconds is the time"):
        plan(Question(RECIPE), 0.0)
    gan = choose("table", (3,), 1000, {"energy": "gan"})
    with pytest.raises(OptionError, match="no density over rows"):
        plan(Question(gan, chains=10, training=False), 0.1)


def test_numbers_are_written_in_units_one_reads():
    assert seconds(Quantity(0.00342, 0.00011)) == "3.42 ± 0.11 ms"
    assert seconds(Quantity(5e-5)) == "50.0 ± 0.0 us"
    assert seconds(Quantity(36000.0, 3600.0)) == "10.0 ± 1.0 h"
    assert [size_of(n) for n in (0, 999, 1500, 2.5e8, 3e12, 5e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "250 MB",
        "3.0 TB",
        "5000 TB",
    ]


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, " ".join(out.getvalue().split()), " ".join(err.getvalue().split())


SMALL = ("--energy", "mlp", "--width", "8", "--depth", "1", "--chain-steps", "2", "--batch-size", "32")
STATED = ("--bandwidth", "10", "--latency", "20")


def test_the_command_plans_with_a_stated_link(tmp_path):
    file = tmp_path / "deep" / "plan.json"
    words = ("--dim", 3, *SMALL, "--ranks", 2, "--chains", 64, "--seconds", 0.4, *STATED, "--json", file)
    code, out, err = call("plan", *words)
    assert code == 0, err
    assert "A step of training: 32 rows, 2 processes" in out
    assert "A step of sampling: 64 chains, 2 processes" in out
    assert "as stated, by 10 GB/s one way and 20 us" in out
    found = json.loads(file.read_text())
    training = found["training"]
    assert training["seconds"]["value"] > 0.0
    assert training["seconds"]["spread"] > 0.0
    assert training["communication"]["all-reduce"]["value"] == pytest.approx(2 * 20e-6, rel=0.1)
    assert sum(part["value"] for part in training["compute"].values()) < training["seconds"]["value"]
    assert training["memory"]["Python and torch"] > 5e7
    assert [row["ranks"] for row in training["strong"]] == [1, 2, 4, 8, 16]
    assert training["weak"][-1]["size"] == 16 * 1024
    assert found["sampling"]["bound"] == "compute"


@pytest.mark.slow
def test_the_command_measures_among_processes():
    code, out, err = call("plan", "--dim", 3, *SMALL, "--ranks", 2, "--chains", 64, "--seconds", 1, "--threads", 1)
    assert code == 0, err
    assert "measured among 2 processes of 1 thread(s)" in out
    assert "all-reduce" in out


def test_a_saved_recipe_is_planned(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"recipe": RECIPE.to_dict(), "scaling": {}}))
    more = ("--seconds", 0.2, "--dim", 5, "--batch-size", 24)
    code, out, err = call("plan", run, *more)
    assert code == 0, err
    assert "mlp energy of rows (5,) by pcd" in out
    assert "24 rows, 1 process" in out
    bare = tmp_path / "mine.json"
    bare.write_text(json.dumps(RECIPE.to_dict()))
    assert call("plan", bare, "--seconds", 0.2)[0] == 0
    bare.write_text(json.dumps(RECIPE.to_dict() | {"wings": 2}))
    assert "wings" in call("plan", bare)[2]
    bare.write_text("{")
    assert "cannot be read as a recipe" in call("plan", bare)[2]
    assert "cannot be read as a recipe" in call("plan", tmp_path / "none.json")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dim", 3, "--ranks", 0), "ranks counts processes, 1 or more; got 0"),
        (("--dim", 3, "--energy", "mlp", "--kernel", "nuts"), "no kernel named 'nuts'"),
        (("--dim", 3, "--ranks", 4, "--chains", 3), "4 processes cannot share 3 chains"),
        (("--dim", 3, "--ranks", 3), "cannot be divided equally among 3 lanes"),
        (("--dim", 0), "dim counts the columns"),
        ((), "say how many columns rows have: --dim INT"),
        (("nowhere",), "no data set named 'nowhere'"),
        (("two-moons", "--dim", 3), "--dim 3 contradicts the data"),
        (("--dim", 3, "--latency", 3), "add --bandwidth"),
        (("--dim", 3, "--node-latency", 3), "asks for --node-bandwidth"),
        (("--dim", 3, "--node-bandwidth", 3), "say also how fast one is inside"),
        (("--dim", 3, "--launch", 3), "add --teraflops"),
        (("--dim", 3, "--teraflops", -3), "positive number of TFLOP/s"),
        (("--dim", 3, "--threads", 0), "threads counts"),
        (("--dim", 3, "--seconds", 0), "seconds is the time"),
        (("--dim", 3, "--chains", "many"), "expected a whole number"),
    ],
)
def test_bad_words_end_with_one_message(words, message):
    code, _, err = call("plan", *words)
    assert code in (1, 2)
    assert message in err.replace("│ ", "").replace(" │", "")
    assert "Traceback" not in err


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    code, _, err = call("plan", tmp_path)
    assert code == 1
    assert "is no run's folder, as it has no recipe.json" in err


def test_a_plan_is_told_with_advice():
    found = plan(Question(RECIPE, ranks=4, rows=1000, link=Link.of(0.01, 1e6)), 0.2)
    assert found.bound == "communication"
    assert found.training is not None
    assert "a step talks longer than it computes: divide this batch among 1" in advice(found)
    assert found.hours is not None
    assert found.hours.value == pytest.approx(found.training.seconds.value * 500 / 3600)
    assert len(list(renderables(found))) > 5
    alone = plan(Question(RECIPE, chains=10, training=False), 0.2)
    assert "do not talk" in advice(alone)
    assert alone.sampling_memory["chains"] > 0.0
    flow = plan(Question(choose("table", (3,), 1000, {"energy": "gan", "width": 8, "batch_size": 16})), 0.2)
    assert any("first phase" in sentence for sentence in flow.assumptions)
    stated = plan(Question(RECIPE, 4, 64, device=Device(1e12, 1e-5), outer=INFINIBAND, link=NVLINK), 0.2)
    assert stated.training is not None
    assert stated.training.compute.keys() == {"forward and backward"}
    assert any("1 TFLOP/s" in sentence for sentence in stated.assumptions)
    assert json.dumps(stated.to_dict())
