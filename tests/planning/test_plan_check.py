"""What the benchmark of plans counts and writes; its numbers are none of the tests'."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    if not FOLDER.is_dir():
        pytest.skip("the benchmarks are not here")
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("plan_check", FOLDER / "plan_check.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    yield found
    sys.modules.pop("common", None)


def test_nine_in_twelve_are_asked(bench):
    def rows(*ratios):
        return [{"ratio": ratio} for ratio in ratios]

    assert bench.verdict(rows(*[1.0] * 9, 1.3, 0.7, 2.0))["met"]
    assert not bench.verdict(rows(*[1.0] * 8, 1.21, 0.79, 2.0, 0.5))["met"]
    assert bench.verdict(rows(1.19, 0.81, 1.2, 0.5))["within"] == 3


def test_configurations_are_as_many_and_as_different_as_asked(bench):
    jobs = bench.CONFIGURATIONS
    assert len(jobs) >= 12
    assert {job["ranks"] for job in jobs} == {1, 2}
    assert {job["what"] for job in jobs} == {"training", "sampling"}
    for job in jobs:
        recipe = bench.recipe_of(bench.RECIPES[job["recipe"]], job["size"])
        assert job["size"] % job["ranks"] == 0
        assert recipe.training.batch_size == job["size"]


def test_what_is_found_is_written(bench, monkeypatch, tmp_path):
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    job = bench.CONFIGURATIONS[0]
    told = {"seconds": 0.01, "spread": 0.001, "bytes": 3e8, "calibrated_at": [21, 85]}
    rows = [job | {"predicted": told, "measured": {"seconds": 0.011, "peak": 3.1e8}, "ratio": 0.91}]
    line = {"what": "training", "strong": True, "gpus": 64, "size": 8192, "seconds": 0.02, "talk": 0.001}
    carried = {
        "net": {
            "rows": [line | {"efficiency": 0.9, "bound": "compute"}],
            "gradient_bytes": 4e6,
            "flops_per_row": 1e9,
            "operations": 500.0,
            "memory": {"weights": 4e6},
            "assumptions": ["Nothing else."],
        }
    }
    record = common.circumstances((0,), 1) | {"rows": rows}
    assert "| two moons, mlp, NCE | training | 512 | 1 | 10.00 ± 1.00 | 11.00 | 0.91 |" in bench.report(
        rows, carried, record
    )
    text = (tmp_path / "plan_check.md").read_text()
    assert "Within 20%: 1 of 1; asked: 9 of 12: met." in text
    assert "## net, on GPUs that nobody measured" in text
    assert "| training | total | 64 | 8,192 | 20 | 1 | 90% | compute |" in text
