"""What processes tell each other, and how lanes are shared."""

import pytest
import torch

from gibbsian.errors import OptionError
from gibbsian.processes import (
    Lanes,
    agree,
    gathered,
    lane_seed,
    told_by_main,
    world,
)
from spawned import run_in

ROWS = torch.arange(14.0, dtype=torch.float64).reshape(7, 2)


def exchange():
    here = world()
    own = ROWS[:3] if here.rank == 0 else ROWS[3:]
    flags = torch.tensor([here.rank == 0] * (1 + here.rank))
    return {
        "rows": gathered(own),
        "flags": gathered(flags),
        "told": told_by_main({"rank": here.rank}),
        "lanes": list(Lanes(4).own),
        "noise": {lane: torch.randn(3, generator=rng) for lane, rng in Lanes(4).generators(5)},
    }


def test_every_process_has_what_all_have():
    first, second = run_in(2, exchange)
    for found in (first, second):
        assert torch.equal(found["rows"], ROWS)
        assert found["flags"].tolist() == [True, False, False]
        assert found["told"] == {"rank": 0}
    assert first["lanes"] == [0, 1]
    assert second["lanes"] == [2, 3]
    alone = {lane: torch.randn(3, generator=rng) for lane, rng in Lanes(4).generators(5)}
    for lane, noise in (first["noise"] | second["noise"]).items():
        assert torch.equal(noise, alone[lane])


def test_lanes_have_seeds_of_their_own():
    seeds = {lane_seed(seed, lane) for seed in range(50) for lane in range(50)}
    assert len(seeds) == 2500


def disagree():
    agree({"version": "0.1", "data": f"#{world().rank}"}, "options or data")


def test_processes_with_other_data_are_refused_everywhere():
    for kind, message in run_in(2, disagree, errors=True):
        assert kind == "ProcessError"
        assert "data is #0 on rank 0, #1 on rank 1" in message
        assert "version" not in message


def three_lanes():
    Lanes(3)


def test_lanes_that_processes_cannot_share_are_refused():
    for kind, message in run_in(2, three_lanes, errors=True):
        assert kind == "OptionError"
        assert "lanes=4" in message


@pytest.mark.parametrize("total", [3, 9])
def test_chains_that_lanes_do_not_divide_are_refused(total):
    with pytest.raises(OptionError, match=f"{total} chains.*among 4 lanes; take {max(4, total // 4 * 4)}"):
        Lanes(4).share(total, "chains")
