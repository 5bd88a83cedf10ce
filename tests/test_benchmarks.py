"""The benchmarks of training run, judge and go on; their numbers are none of the tests'."""

import dataclasses
import importlib
import json
import math
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from gibbsian.data import load
from gibbsian.errors import DivergenceError
from gibbsian.training.fit import Fit

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a benchmark; what it writes goes to a folder of the test's."""
    pytest.importorskip("sklearn")
    if not FOLDER.is_dir():
        pytest.skip("the benchmarks are not here")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("GIBBSIAN_DATA", raising=False)
    before = set(sys.modules)

    def imported(name):
        common, found = importlib.import_module("common"), importlib.import_module(name)
        monkeypatch.setattr(common, "RESULTS", tmp_path)
        return found

    yield imported
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            sys.modules.pop(name)


@pytest.fixture
def dependable(script):
    return script("dependable")


def test_objectives_are_compared_on_images(script, tmp_path, monkeypatch):
    images = script("objectives_images")
    monkeypatch.setattr(images, "CHAINS", 64)
    monkeypatch.setattr(images, "REVERSED", 32)
    monkeypatch.setattr(images, "SPARE", 0.5)
    rows = images.main(["--sets", "digits", "--budget", "0.001", "--methods", "NCE", "PCD"])
    assert [row["method"] for row in rows] == ["the Gaussian alone", "training rows", "NCE", "PCD"]
    gaussian, floor, *fitted = rows
    # Its log Z is known, so that its bounds are one.
    assert gaussian["ll_lower"] == gaussian["ll_upper"]
    assert floor["FD"] < gaussian["FD"]
    assert all(math.isfinite(row["FD"]) and row["auroc"]["shuffled pixels"] > 0.9 for row in fitted)
    assert "| NCE |" in (tmp_path / "objectives_images.md").read_text()


@pytest.fixture
def enlarged():
    """Digits of 8 x 8 pixels, as large as MNIST's."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    digits = load("digits")
    grown = {
        name: torch.nn.functional.interpolate(getattr(digits, name)[:400] * (255 / 16), size=(28, 28))
        for name in ("train", "held_out")
    }
    labels = {"labels": digits.labels[:400], "held_out_labels": digits.held_out_labels[:400]}
    return dataclasses.replace(digits, **grown, **labels, value_range=(0.0, 255.0))


@pytest.fixture
def mnist(script, monkeypatch, enlarged):
    """With enlarged digits in place of both sets."""
    found = script("mnist")
    monkeypatch.setattr(found, "load", lambda name: enlarged)
    return found


def test_a_tiny_run_writes_after_every_model_and_goes_on(dependable, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dependable, "FEWEST_DRAWS", 32)
    monkeypatch.setitem(dependable.SETS, "digits", {"steps": 1500, "width": 4, "sample_steps": 20, "chain_steps": 2})
    tiny = ["--runs", "2", "--budget", "0.003"]
    watched = dependable.main([*tiny, "--sets", "digits"])
    first = [run for run in watched if run.health]
    assert [run.learning_rate for run in first] == pytest.approx([dependable.LOWEST, dependable.HIGHEST])
    assert {run.outcome for run in first} <= set(dependable.OUTCOMES) - {"useless", "broken"}
    (tmp_path / "dependable.json").unlink()
    trained = dependable.main([*tiny, "--sets", "digits", "--again"])
    assert all(dependable.left_alone(run) for run in first)
    # What was not trained again would have been the same.
    for told, made in zip(watched, trained):
        assert (told.quality, told.outcome, told.cause) == (made.quality, made.outcome, made.cause)
    record = json.loads((tmp_path / "dependable.json").read_text())
    record["runs"] = [run for run in record["runs"] if run["health"]]
    (tmp_path / "dependable.json").write_text(json.dumps(record))
    runs = dependable.main([*tiny, "--resume"])
    assert "mnist is left out" in capsys.readouterr().out
    assert [(run.seed, run.health) for run in runs] == [(0, True), (1, True), (0, False), (1, False)]
    assert [run.quality for run in runs[:2]] == [run.quality for run in first]
    assert all(math.isfinite(run.quality) and run.bar == first[0].bar for run in runs)
    record = json.loads((tmp_path / "dependable.json").read_text())
    assert len(record["runs"]) == 4
    assert "| digits, health off | 2 |" in (tmp_path / "dependable.md").read_text()
    with pytest.raises(SystemExit, match="another budget"):
        dependable.main(["--runs", "3", "--resume"])


def test_flows_are_tilted_and_walked_in(script, tmp_path, monkeypatch):
    pytest.importorskip("zuko")
    pytest.importorskip("matplotlib")
    flows = script("flow_tilt")
    monkeypatch.setattr(flows, "RESULTS", tmp_path)
    moons, banana = flows.main(["--parts", "two-moons", "banana", "--budget", "0.01"])
    assert math.isfinite(moons["lower"])
    assert moons["lower"] <= moons["upper"] or moons["warnings"]
    assert moons["flow"] < moons["truth"]
    assert banana["transport"]["training"] > 0 == banana["HMC"]["training"]
    assert banana["transport"]["gradients"] == 32 * 20 * 4
    assert banana["HMC"]["gradients"] == 32 * 20 * 10
    assert "| banana | transport |" in (tmp_path / "flow_tilt.md").read_text()
    assert (tmp_path / "flow_tilt.png").exists()


def test_outcomes(dependable):
    silent, told = Fit(None, [], 1, 0.0, None), Fit(None, [{"event": "verdict", "kind": "unlike"}], 1, 0.0, None)
    assert dependable.outcome(1.0, 2.0, True, silent, None) == "good"
    assert dependable.outcome(3.0, 2.0, True, silent, None) == "useless"
    assert dependable.outcome(math.inf, 2.0, True, told, None) == "told"
    assert dependable.outcome(1.0, 2.0, True, None, DivergenceError("gap")) == "stopped"
    assert dependable.outcome(math.inf, 2.0, False, silent, None) == "broken"
    assert dependable.rates(3) == pytest.approx([3e-5, 3e-4, 3e-3])


def test_mnist_writes_after_every_part_and_takes_up_its_runs(mnist, tmp_path, capsys):
    tiny = ["--budget", "0.0003", "--threads", "1", "--runs", str(tmp_path / "runs")]
    first = mnist.main([*tiny, "--parts", "main"])
    assert set(first["main"]["quality"]) == {
        *("short-run", "annealed", "long-run at 0.5", "long-run at 1", "training rows (floor)", "Gaussian")
    }
    assert (tmp_path / "mnist-draws.png").stat().st_size < 200_000
    assert (tmp_path / "mnist-ages.png").stat().st_size < 200_000
    parts = mnist.main([*tiny, "--parts", "ood", "heldout"])
    assert parts["main"] == json.loads(json.dumps(first["main"])), "the first part is gone, or was run again"
    assert set(parts["ood"]["pairs"]) == {"MNIST, against Fashion-MNIST", "Fashion-MNIST, against MNIST"}
    assert list(parts["heldout"]["digits"]) == ["1", "4", "5", "7", "9"]
    scores = [*parts["ood"]["pairs"].values(), *parts["heldout"]["digits"].values()]
    assert all(math.isfinite(v) for each in scores for v in torch.tensor(list(each.values())).flatten().tolist())
    told = (tmp_path / "mnist.md").read_text()
    assert "## Draws" in told
    assert "## A digit left out" in told
    other = mnist.main(["--budget", "0.0004", "--threads", "1", "--parts", "heldout"])
    assert set(other) == {"heldout"}, "parts of another budget were mixed in"


def test_an_energy_and_a_score_are_compared(script, tmp_path, monkeypatch, enlarged, capsys):
    diffusion, digits = script("diffusion"), load("digits")
    monkeypatch.setattr(diffusion, "load", {"mnist": dataclasses.replace(enlarged, name="mnist"), "digits": digits}.get)
    monkeypatch.setattr(diffusion, "ROWS", {"mnist": 8, "digits": 8})
    judging = sys.modules["diffusion_judging"]
    monkeypatch.setattr(judging, "REVERSE", {k: (way, 2) for k, (way, _) in judging.REVERSE.items()})
    monkeypatch.setattr(judging, "ANNEALED", 2)
    monkeypatch.setattr(judging, "CHAINED", dict.fromkeys(judging.CHAINED, 2))
    tiny = ["--budget", "0.001", "--runs", str(tmp_path / "runs")]
    first = diffusion.main([*tiny, "--parts", "draws"])
    assert len(first["draws"]["ways"]) == 13
    assert (tmp_path / "diffusion.png").stat().st_size < 200_000
    parts = diffusion.main([*tiny, "--parts", "mnist", "digits"])
    assert parts["draws"] == json.loads(json.dumps(first["draws"])), "the first part is gone, or was run again"
    told = [*parts["mnist"]["flow"].values(), *parts["digits"]["flow"].values()]
    assert all(math.isfinite(v) for each in told for v in (*each["log_prob"], *each["bits"], *each["halved"]))
    assert parts["mnist"]["flow"]["score at 0.02"]["probe_error"] > 0.0
    assert parts["digits"]["flow"]["score at 0.03"]["probe_error"] == 0.0
    assert all(math.isfinite(v) for v in parts["digits"]["own"]["difference"])
    page = (tmp_path / "diffusion.md").read_text()
    assert "## Draws of MNIST" in page
    assert "## Likelihood of digits" in page


def test_a_deep_machine_is_trained_saved_and_judged_again(script, tmp_path, monkeypatch):
    deep = script("deep_boltzmann")
    digits = load("digits").train[:300] / 16.0
    grey = torch.nn.functional.interpolate(digits, size=(28, 28)).flatten(1)
    monkeypatch.setattr(deep, "rows", lambda limit: (grey[:200], grey[200:]))
    monkeypatch.setattr(deep, "HIDDEN", (12, 8))
    found = deep.main(["--budget", "0.001", "--runs", str(tmp_path / "run")])
    bound = found["judged"]["test"]
    assert bound["lower"] <= bound["value"] <= bound["upper"]
    assert "| test |" in (tmp_path / "deep_boltzmann.md").read_text()
    again = deep.main(["--budget", "0.001", "--runs", str(tmp_path / "run"), "--evaluate"])
    assert again["judged"]["test"] == bound
    (tmp_path / "run" / "deep_boltzmann.pt").unlink()
    half = deep.main(["--budget", "0.001", "--runs", str(tmp_path / "run"), "--evaluate"])
    assert half["steps"]["joint"] == again["steps"]["joint"]
    assert "not done" in (tmp_path / "deep_boltzmann.md").read_text()
    with pytest.raises(SystemExit):
        deep.main(["--evaluate"])


def test_lattices_are_bracketed(script, tmp_path, monkeypatch):
    lattices = script("lattices")
    monkeypatch.setattr(lattices, "ASKED", {4: 3.0})
    monkeypatch.setattr(lattices, "CHAINS", {4: 64})
    monkeypatch.setattr(lattices, "TEMPERATURES", {False: 1000, True: 1000})
    monkeypatch.setattr(lattices, "CLUSTER_STEPS", 20)
    rows = lattices.main(["--sizes", "4", "--couplings", "0.2", "0.6", "--budget", "0.05", "--eager"])
    assert [row["coupling"] for row in rows] == [0.2, 0.6]
    assert all(row["inside"] and row["temperatures"] == 50 and abs(row["energy_off"]) < 5.0 for row in rows)
    assert "| 4 x 4, 0.6 |" in (tmp_path / "lattices.md").read_text()
    again = lattices.main(["--sizes", "4", "--couplings", "0.2", "--budget", "0.05", "--eager", "--keep"])
    assert {row["coupling"]: row["value"] for row in again} == {row["coupling"]: row["value"] for row in rows}
    with pytest.raises(SystemExit, match="own --budget"):
        lattices.main(["--sizes", "4", "--budget", "0.1", "--keep"])


def test_clusters_draw_the_lattice(script):
    """The number of ones, against all states of 4 x 4 sites. A twin that joins too few neighbours is seen."""
    lattices = script("lattices")
    energy = lattices.torus(4, 0.5)
    every = (torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1).double().reshape(-1, 4, 4)
    law = (-energy(every)).softmax(0)
    exact = torch.zeros(17, dtype=torch.float64).index_add_(0, every.sum((1, 2)).long(), law)

    def distance(coupling):
        draws = lattices.swendsen_wang(4, coupling, 4000, 20, torch.Generator().manual_seed(0))
        return float((draws.sum((1, 2)).long().bincount(minlength=17) / 4000 - exact).abs().sum() / 2)

    # Exact draws are off by 0.02 on average.
    assert distance(0.5) < 0.04
    assert distance(0.45) > 0.08


def test_coverage_counts(script, tmp_path, monkeypatch):
    coverage = script("coverage")
    for name, value in {"CHAINS": 32, "TEMPERATURES": 10, "ROWS": 4, "KEPT": 4}.items():
        monkeypatch.setattr(coverage, name, value)
    rows = coverage.main(["--budget", "0.02"])
    assert len(rows) == 3 * 9
    assert all(row["repeats"] == 2 and math.isfinite(row["z_mean"]) for row in rows)
    assert "RBM, 12 + 8: bracket" in (tmp_path / "coverage.md").read_text()
    told = [coverage.Told(coverage.gb.LogZ(*torch.tensor([v, 0.5, v - 1.0, v + 1.0, 9.0])), 0.0) for v in (-2.0, 0.5)]
    found = coverage.summary("a", "b", told)
    assert (found["held"], found["z_mean"], found["within_two"]) == (1, -1.5, 0.5)


def test_binary_data_are_judged(script, tmp_path, monkeypatch, capsys):
    binary = script("binary_density")
    rng = torch.Generator().manual_seed(0)
    rows = (torch.rand(900, 18, generator=rng) < 0.3).numpy().astype("uint8")
    for name, columns in (("nltcs", 6), ("plants", 18)):
        parts = dict(zip(("train", "valid", "test"), (rows[:600, :columns], rows[600:700, :columns], rows[700:])))
        parts["test"] = parts["test"][:, :columns]
        numpy.savez(tmp_path / f"{name}.npz", **parts)
    assert binary.main(["--budget", "0.002"]) == {}
    assert "plants is left out" in capsys.readouterr().out
    monkeypatch.setenv("GIBBSIAN_DATA", str(tmp_path))
    for name, value in {"CHAINS": 16, "NLTCS_HIDDEN": (2, 3), "PLANTS_HIDDEN": (2, 3)}.items():
        monkeypatch.setattr(binary, name, value)
    found = binary.main(["--budget", "0.01"])
    assert all(row["test_lower"] == row["test_upper"] for row in found["nltcs"])
    *others, bracketed = found["plants"]
    assert bracketed["test_lower"] < bracketed["test"] < bracketed["test_upper"]
    assert sum(row.get("chosen", False) for row in others) == 1
    # Independent columns are the truth here, and the others know little better.
    assert all(abs(row["test"] - found["nltcs"][0]["test"]) < 0.5 for row in found["nltcs"])
    text = (tmp_path / "binary_density.md").read_text()
    assert "fully visible, exact likelihood" in text
    assert "R-hat" in text
    again = binary.main(["--budget", "0.01", "--sets", "plants", "--keep"])
    assert again["nltcs"] == found["nltcs"]
    assert again["plants"][-1]["test"] == found["plants"][-1]["test"]
    with pytest.raises(SystemExit, match="own --budget"):
        binary.main(["--budget", "0.02", "--keep"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_boltzmann_machines_are_judged_and_their_runs_taken_up(script, tmp_path, monkeypatch, enlarged, capsys):
    """A few steps leave likelihoods far off; those of machines of 16 units are exact even so, and bounds in order."""
    bench = script("boltzmann_mnist")
    monkeypatch.setattr(bench, "load", lambda name: enlarged)
    monkeypatch.setattr(bench, "COMPILED_FROM", 10**6)
    tiny = ["--budget", "0.001", "--runs", str(tmp_path / "runs"), "--pictures", str(tmp_path)]
    first = bench.main([*tiny, "--parts", "784-16"])["784-16"]["runs"]
    assert [(run["centred"], run["flipped"]) for run in first] == [(c, f) for f in (False, True) for c in (True, False)]
    assert all(-1000.0 < run["test"] < -50.0 for run in first)
    parts = bench.main([*tiny, "--parts", "784-500", "neural"])
    assert parts["784-16"]["runs"] == first, "the first part is gone, or was run again"
    for judged in (parts["784-500"], *(parts["neural"][k] for k in parts["neural"] if k != "budget")):
        assert all(math.isfinite(v) for v in (judged["test"], judged["train"], *judged["log_z"].values()))
    for picture in ("rbm-784-16", "rbm-784-500", "neural-bits"):
        assert (tmp_path / f"{picture}.png").stat().st_size < 200_000
    told = (tmp_path / "boltzmann_mnist.md").read_text()
    assert all(f"## {title}" in told for title in ("784-16", "784-500", "A neural energy"))
    capsys.readouterr()
    again = bench.main([*tiny, "--parts", "784-16"])["784-16"]["runs"]
    assert [run["test"] for run in again] == [run["test"] for run in first], "a run that was done is not taken up"


def test_requests_are_drawn_both_ways(script, tmp_path, monkeypatch, enlarged):
    controllable = script("controllable")
    for name, rows in (("digits", 300), ("mnist", 200)):
        small = {"rows": rows, "levels": 4, "chain_levels": 3, "chain_steps": 1}
        monkeypatch.setitem(controllable.PLANS, name, dataclasses.replace(controllable.PLANS[name], **small))
    found = controllable.main(["--sets", "digits", "--budget", "0.02"])
    assert list(found) == ["digits"]
    assert found["digits"]["judge_accuracy"][0] > 0.95
    rows = found["digits"]["requests"]
    assert [row["way"] for row in rows] == ["plain", "chains"] * 7
    assert all(0.0 <= value <= 1.0 and error > 0.0 for row in rows for value, error in row["met"].values())
    monkeypatch.setattr(controllable, "load", lambda name: enlarged)
    again = controllable.main(["--sets", "mnist", "--budget", "0.02"])
    assert list(again) == ["digits", "mnist"]
    assert again["digits"]["requests"][3]["met"].keys() == rows[3]["met"].keys()
    text = (tmp_path / "controllable.md").read_text()
    assert "a 7 but not slanted left, weight 1" in text
    assert 10_000 < (tmp_path / "controllable-mnist.png").stat().st_size < 400_000


def test_slants_are_measured(script):
    """A bar that leans by one pixel to the right per pixel up, its mirror image, and an upright one."""
    slant = script("controllable").slant
    bar = torch.eye(9).flip(1)[None, None]
    upright = torch.zeros(1, 1, 9, 9)
    upright[..., 4] = 5.0
    assert float(slant(bar)) == pytest.approx(1.0)
    assert float(slant(3.0 * bar.flip(3))) == pytest.approx(-1.0)
    assert float(slant(upright)) == pytest.approx(0.0)


@pytest.fixture
def ood(script, monkeypatch, enlarged):
    """With enlarged digits in place of both sets, and those of scikit-learn as they are."""
    found, sets = script("ood"), script("ood_sets")
    monkeypatch.setattr(sets, "load", lambda name: enlarged if name in sets.NAMES.values() else load(name))
    monkeypatch.setattr(found, "RESAMPLES", 5)
    return found


@pytest.mark.slow
def test_foreign_images_are_told_by_every_score(ood, tmp_path):
    found = ood.main(["--budget", "0.003", "--runs", str(tmp_path / "runs")])
    assert set(found["sets"]) == {"MNIST", "Fashion-MNIST"}
    for part in found["sets"].values():
        assert ood.DEFAULT in part["scores"]
        for pairs in part["scores"].values():
            assert {"rotated by 90", "inverted", "constant", "rotated by 180"} < set(pairs)
            for metrics in pairs.values():
                assert set(metrics) == {"auroc", "average_precision", "false_positive_rate"}
                assert all(0.0 <= low <= high <= 1.0 and 0.0 <= v <= 1.0 for v, low, high in metrics.values())
        assert [each["rate"] for each in part["conformal"]] == [0.05, 0.1, 0.05, 0.1]
        assert all(80 <= each["detector"]["inside"] <= 100 for each in part["conformal"])
    told = (tmp_path / "ood.md").read_text()
    assert "## Fashion-MNIST in distribution" in told
    assert json.loads((tmp_path / "ood.json").read_text())["sets"]
    assert (tmp_path / "ood-mnist.png").stat().st_size < 200_000
    assert (tmp_path / "ood-fashion-mnist.png").stat().st_size < 200_000
    again = ood.main(["--budget", "0.003", "--runs", str(tmp_path / "runs")])
    first, second = (found["sets"]["MNIST"]["scores"] for found in (found, again))
    assert first == second, "a run that was kept gives other numbers"


def test_foreign_rows_of_the_benchmark(ood, script):
    sets = script("ood_sets")
    rows, rng = torch.rand((7, 1, 28, 28), generator=torch.Generator().manual_seed(0)) * 255, torch.Generator()
    judged = sets.foreign(rows, {"other": rows}, rng)
    chosen_by = sets.strangers(rows, rng)
    assert not set(judged) & set(chosen_by)
    for x in (*judged.values(), *chosen_by.values()):
        assert x.shape == rows.shape
        assert -1e-3 <= float(x.min()) <= float(x.max()) <= 255.001
    # The same pixels in another order.
    for name in ("quarters exchanged", "sixteenths exchanged"):
        assert torch.equal(chosen_by[name].flatten(1).sort().values, rows.flatten(1).sort().values)
        assert not torch.equal(chosen_by[name], rows)
    torch.testing.assert_close(sets.rotated(rows, 90.0), judged["rotated by 90"], rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_guided_densities_are_drawn_every_way(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    bench = script("guidance")
    for name, value in {"DRAWS": 640, "LEVELS": 6, "STEPS": 2, "LAST": 2, "INNER": 2}.items():
        monkeypatch.setattr(bench, name, value)
    rows = bench.main([])["rows"]
    assert [(row["case"], row["scale"]) for row in rows] == [(case, s) for case in bench.CASES for s in bench.SCALES]
    assert all(0.0 < way["distance"] <= 1.0 for row in rows for way in row["ways"].values())
    assert "| apart | 7 |" in (tmp_path / "guidance.md").read_text()
    assert (tmp_path / "guidance.png").stat().st_size < 300_000


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_compositions_are_drawn_every_way(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    bench = script("composition")
    tiny = {"ROWS": 1000, "STEPS": 200, "CHAINS": 64, "LEVELS": 4, "FINE": 8, "MOVES": 3, "LAST": 3, "INNER": 4}
    for name, value in tiny.items():
        monkeypatch.setattr(bench, name, value)
    rows = bench.main(["--pairs", "1"])
    assert [row["kind"] for row in rows] == ["product", "mixture", "negation"]
    for row in rows:
        # No energies, no mixture; and a mixture alone has a score that is not the sum of the scores.
        missing = {"FK, scores"} if row["kind"] == "mixture" else {"own score"}
        assert set(row["ways"]) == set(bench.WAYS) - missing
        assert all(0.0 <= way[to] <= 1.0 for way in row["ways"].values() for to in ("learned", "truth"))
    told = (tmp_path / "composition.md").read_text()
    assert "| ring and moons | product |" in told
    assert "* FK + MALA: closer than plain summing in" in told
    assert (tmp_path / "composition.png").stat().st_size < 300_000


def test_true_compositions_and_their_distances(script):
    """Of a density with itself: a product narrows it, a mixture leaves it, and exact draws are at the best possible."""
    bench = script("composition")
    x = bench.nodes()
    alone = bench.cells(bench.Known("two").log_prob(x, bench.LOW))
    assert bench.distance(bench.cells(bench.true_log_prob("mixture", "two", "two", x)), alone) < 1e-6
    product = bench.cells(bench.true_log_prob("product", "two", "two", x))
    assert float(product.max()) > 1.3 * float(alone.max())
    rng = torch.Generator().manual_seed(0)
    draws = bench.Known("two").sample(bench.CHAINS, rng)
    draws = draws + bench.LOW * torch.randn(draws.shape, generator=rng)
    best, spread = bench.best_possible(alone, rng)
    assert abs(bench.distance(bench.histogram(bench.equal(draws)), alone) - best) < 5.0 * spread
    assert bench.distance(bench.histogram(bench.equal(draws + 0.5)), alone) > 2.0 * best


def test_the_default_score_is_chosen(script, monkeypatch, enlarged, tmp_path):
    choice, sets = script("ood_choice"), script("ood_sets")
    monkeypatch.setattr(sets, "load", lambda name: enlarged)
    found = choice.main(["--budget", "0.003", "--runs", str(tmp_path / "runs")])
    # Every kind but the maps, for which there are too few rows, and the default.
    assert {len(each) for each in found.values()} == {(len(choice.KINDS) - 1) * len(choice.MODELS) + 1}
    assert all(0.0 <= v <= 1.0 for each in found.values() for kinds in each.values() for v in kinds.values())
    assert "| energies, Mahalanobis |" in (tmp_path / "ood_choice.md").read_text()


def test_amortised_samplers_are_compared_with_chains(script, tmp_path):
    pytest.importorskip("matplotlib")
    amortised = script("amortised")
    with pytest.warns(UserWarning, match="few points of the data"):
        found = amortised.main(["--parts", "pinwheel", "digits", "--budget", "0.01"])
    assert list(found) == ["pinwheel", "digits"]
    for part in found.values():
        assert [run["seed"] for run in part["runs"]] == [0]
        distances = [value for run in part["runs"] for row in run["rows"] for value, _ in row["distances"].values()]
        assert all(math.isfinite(value) for value in distances)
    text = (tmp_path / "amortised.md").read_text()
    assert "## pinwheel" in text
    assert "met" in text
    assert (tmp_path / "amortised.png").stat().st_size > 10_000


def test_what_is_asked_of_an_amortised_sampler(script):
    amortised = script("amortised")

    def row(way, steps, distance):
        return {"way": way, "steps": steps, "distances": {"truth": (distance, 0.0)}}

    rows = [row("refined", 5, 0.1), row("chains", 5, 0.5), row("chains", 25, 0.05)]
    rows += [row("refined", 20, 0.1), row("chains", 20, 0.3), row("chains", 100, 0.2)]
    rows += [row("refined", 100, 0.1), row("chains", 500, 0.09)]
    assert [told["met"] for told in amortised.verdicts(rows, "truth")] == [True, True, False]


@pytest.mark.filterwarnings("ignore")
def test_corrected_generators_are_judged(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    bench = script("gan")
    rows = bench.main(["--budget", "0.02", "--seeds", "3"])
    assert [row["part"] for row in rows] == ["grid", "digits"]
    for row in rows:
        assert list(row["ways"]) == list(bench.WAYS)
        assert all(math.isfinite(way[key]) for way in row["ways"].values() for key in bench.MEASURES)
        assert all(0.0 < way["acceptance"] <= 1.0 for way in row["ways"].values())
        assert row["floor"]["energy"] < row["ways"]["generator"]["energy"]
    told = (tmp_path / "gan.md").read_text()
    assert "| MH-GAN |" in told
    assert "* rejection: better in" in told
    assert (tmp_path / "gan.png").stat().st_size < 300_000


def test_measures_of_generators(script):
    """Draws of the truth are of high quality and cover the grid; one mode alone is one of 25, log 25 away."""
    bench = script("gan")
    judge = bench.grid(0, 0.01).judge
    truth = bench.gb.GaussianMixture(bench.modes(), bench.SPREAD).sample(4000, torch.Generator().manual_seed(0))
    good, one = judge(truth / bench.SPACING), judge(0.01 * torch.randn(500, 2))
    # Two spreads in each direction: 1 - exp(-8) lie within four.
    assert good["quality"] == pytest.approx(1.0 - math.exp(-8.0), abs=0.003)
    assert (good["covered"], one["covered"]) == (25, 1)
    assert good["shares"] < 0.02
    assert one["shares"] == pytest.approx(math.log(25.0))
    assert one["frechet"] > 100 * good["frechet"]
    assert one["energy"] > 100 * abs(good["energy"])


def test_what_is_asked_of_corrected_generators(script):
    """Equal is enough for modes where none was missed, and worse on one seed is not, however much better on others."""
    bench = script("gan")

    def row(seed, covered, after, frechet):
        before = {"quality": 0.5, "covered": covered, "shares": 0.1, "frechet": 2.0, "energy": 0.2}
        better = {"quality": 0.9, "covered": after, "shares": 0.05, "frechet": frechet, "energy": 0.1}
        ways = dict.fromkeys(bench.WAYS, better) | {"generator": before}
        return {"seed": seed, "ways": ways, "floor": {"covered": 10}}

    fine = bench.verdict([row(0, 10, 10, 1.0), row(1, 8, 9, 1.0)])
    assert "* DDLS: better in 9 of 10; equal in modes or classes (1).\n" in fine
    assert "missed: met.\n* The generator covers 10 on seed 0, 8 on seed 1, of 10." in fine
    assert "not met by DDLS, rejection, MH-GAN" in bench.verdict([row(0, 8, 8, 1.0)])
    worse = bench.verdict([row(0, 10, 10, 1.0), row(1, 8, 9, 2.1)])
    assert "worse in Frechet distance (1)" in worse
    assert "not met by DDLS" in worse


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_autoencoders_are_drawn_and_bounded(script, tmp_path, monkeypatch, enlarged):
    bench = script("vae")
    monkeypatch.setattr(bench, "load", {"mnist": enlarged, "digits": load("digits")}.get)
    first = bench.main(["--budget", "0.004", "--parts", "digits"])
    parts = bench.main(["--budget", "0.004", "--parts", "mnist"])
    assert parts["digits"] == json.loads(json.dumps(first["digits"])), "the first part is gone, or was run again"
    for part in parts.values():
        assert {"VAE", "VAEBM", "LEBM", "LEBM, without noise"} <= set(part["quality"])
        told = [*part["quality"].values(), *part["likelihood"]["bounds"].values(), part["simulated"]["gap"]]
        assert all(math.isfinite(v) for each in told for v in each)
        assert part["normaliser"]["bracket"][2] < part["normaliser"]["bracket"][0]
    assert "| VAEBM, without noise |" in (tmp_path / "vae.md").read_text()
    assert (tmp_path / "vae-mnist.png").stat().st_size < 300_000
    other = bench.main(["--budget", "0.003", "--parts", "digits"])
    assert set(other) == {"digits"}, "parts of another budget were mixed in"


@pytest.mark.slow
def test_samplers_learned_from_an_energy_are_compared(script, tmp_path):
    pytest.importorskip("zuko")
    rows = script("from_energy").main(["--parts", "funnel", "--budget", "0.01"])
    assert [row["method"] for row in rows] == ["FAB", "CMCD", "tempering", "SMC"]
    assert all(math.isfinite(row["error"]) and row["energies"] > 0 for row in rows)
    assert "Funnel, 10-d: SMC" in (tmp_path / "from_energy.md").read_text()
    assert (tmp_path / "from_energy-funnel.png").stat().st_size < 200_000


def test_a_family_is_fitted_judged_and_told(script, tmp_path):
    family = script("family")
    record = family.main(["--quick", "--draws", "400", "--sweeps", "20"])
    assert set(record["methods"]) == {"mean field", *family.METHODS}
    for name, row in record["methods"].items():
        # Six contacts of known pairs among 28: far above those at random.
        assert row["contacts"]["base rate"] == record["base_rate"] < 0.25
        assert name == "mean field" or math.isfinite(row["agreement"]["connected"])
    assert record["methods"]["pseudo-likelihood"]["contacts"]["L/2"] > 2 * record["base_rate"]
    assert "| boltzmann |" in (tmp_path / "family.md").read_text()
    assert set(record["met"].values()) <= {True, False}


def test_molecules_are_sampled_and_compared(script, tmp_path, capsys):
    pytest.importorskip("openmm")
    molecular = script("molecular")
    molecular.main(["--quick", "--keep", str(tmp_path / "kept")])
    record = json.loads((tmp_path / "molecular.json").read_text())
    assert record["agreement"]["energy"] < 1e-10
    assert record["agreement"]["force"] < 1e-10
    assert set(record["cost"]) == {"1", "8", "64"}
    for name in ("langevin", "hmc", "tempering"):
        assert math.isfinite(record["methods"][name]["energy_kj_mol"][0])
        assert (tmp_path / "kept" / f"{name}.npz").exists()
    assert (tmp_path / "molecular.png").exists()
    # A second run takes the draws up, and sets metadynamics beside them.
    lines = ["phi_deg,weight", *(f"{60 if i % 4 == 0 else -60},{i % 2 + 1}" for i in range(400))]
    (tmp_path / "frames.csv").write_text("\n".join(lines))
    (tmp_path / "simulation.json").write_text('{"picoseconds": 200.0, "constraints": 12}')
    molecular.main(["--quick", "--keep", str(tmp_path / "kept"), "--reference", str(tmp_path)])
    again = json.loads((tmp_path / "molecular.json").read_text())
    assert again["methods"] == record["methods"]
    assert again["reference"]["left_handed"][0] == pytest.approx(1 / 6)
    assert "bridge (us)" in capsys.readouterr().out


def test_differences_from_langevin_dynamics_are_seen(script):
    pytest.importorskip("openmm")
    molecular = script("molecular")
    rng = numpy.random.default_rng(0)

    def draws(shift):
        phi = -80 + shift + 25 * rng.standard_normal((400, 24))
        return molecular.Draws(phi, phi + 60, 30 + shift + rng.standard_normal((400, 24)), 1, 1.0, {})

    reference, same, other = draws(0.0), draws(0.0), draws(6.0)
    assert molecular.compared(same, reference)["largest"] < 4.5
    assert abs(molecular.compared(same, reference)["energy_z"]) < 4.5
    assert molecular.compared(other, reference)["largest"] > 5
    assert molecular.compared(other, reference)["energy_z"] > 5


def test_alanine_dipeptide_is_simulated_learned_and_compared(script, tmp_path):
    pytest.importorskip("openmm")
    pytest.importorskip("mdtraj")
    alanine = script("alanine")
    record = alanine.main(["--quick", "--work", str(tmp_path / "runs")])
    (run,) = record["runs"]
    assert run["run_ps"] == 16.0
    assert record["reference_ps"] == 24.0
    assert run["kl_above_floor"] == pytest.approx(run["kl"] - record["floor"])
    assert math.isfinite(run["kl"])
    assert "| noise floor: between halves" in (tmp_path / "alanine.md").read_text()


def test_alanine_s_figure_is_drawn(script, tmp_path):
    pytest.importorskip("openmm")
    pytest.importorskip("mdtraj")
    from gibbsian.molecules.conformations import landscape_of
    from gibbsian.molecules.sources import read_frames

    alanine = script("alanine")
    run = alanine.simulated(tmp_path / "run", 16.0, 2, quick=True)
    landscape = landscape_of(read_frames([run]), alanine.QUICK, rng=torch.Generator().manual_seed(0))
    reference = alanine.reference_of(run, landscape.model.kt)
    alanine.draw_figure(tmp_path / "alanine.png", landscape, reference, (16.0, 16.0))
    assert (tmp_path / "alanine.png").stat().st_size > 10_000


def test_villin_s_native_frames_are_ranked(script, tmp_path):
    """Frames of simulations stand ready, made up: the structure, trembling, and more so when hot."""
    pytest.importorskip("openmm")
    md = pytest.importorskip("mdtraj")
    villin = script("villin")
    whole = md.load(str(villin.structure()))
    one = whole.atom_slice(whole.topology.select("protein"))
    for name, (kelvin, _, seed) in villin.RUNS.items():
        folder = tmp_path / name
        folder.mkdir()
        one.save_pdb(str(folder / "topology.pdb"))
        rng = numpy.random.default_rng(seed)
        noise = rng.normal(0.0, 0.004 if kelvin < 400 else 0.02, (60, one.n_atoms, 3))
        md.Trajectory((one.xyz + noise).astype(numpy.float32), one.topology).save_dcd(str(folder / "trajectory.dcd"))
        rows = "".join("1.0\n" for _ in range(60))
        (folder / "frames.csv").write_text("weight\n" + rows)
        told = {"temperature_k": kelvin, "picoseconds": 12.0, "seconds": 1.0, "settings": {"frame_ps": 0.2}}
        (folder / "simulation.json").write_text(json.dumps(told))
    record = villin.main(["--quick", "--work", str(tmp_path)])
    assert record["auroc"]["both"]["500 K"][0] > 0.9
    assert record["mean_fluctuation_nm"]["500 K"] > 3 * record["mean_fluctuation_nm"]["300 K"]
    assert "| both |" in (tmp_path / "villin.md").read_text()


def test_a_proposal_for_alanine_dipeptide_is_learned_and_weighed(script, tmp_path):
    pytest.importorskip("openmm")
    pytest.importorskip("mdtraj")
    pytest.importorskip("zuko")
    proposal = script("proposal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of weights that few dominate: what a proposal of a moment is like.
        record = proposal.main(["--quick", "--work", str(tmp_path / "runs")])
    assert record["run"]["evaluations"] == 8500
    assert 0 < record["methods"]["importance weights"]["ess_fraction"] <= 1
    assert record["learning_evaluations"] == 8500 + 150 * 56
    assert record["methods"]["HMC with jumps"]["evaluations"] == 4 * 4 * 7
    assert "| HMC with jumps |" in (tmp_path / "proposal.md").read_text()
    assert (tmp_path / "proposal.png").stat().st_size > 10_000
