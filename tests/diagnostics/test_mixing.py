"""E-BFMI and round trips against closed forms and a count by hand."""

import itertools
import math

import pytest
import torch
from chain_cases import ar1

from gibbsian.diagnostics.mixing import energy_bfmi, round_trips
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

DOWN_UP = [0, 1, 2, 1, 2, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_energy_bfmi_of_an_autoregression_is_twice_what_it_forgets(rho):
    # Var(H_t - H_{t-1}) / Var(H) = 2 (1 - rho); 20,000 draws leave 5 per cent at rho = 0.9.
    assert float(energy_bfmi(ar1(rho, 20_000, 1))) == pytest.approx(2 * (1 - rho), rel=0.2)


def test_energy_bfmi_of_an_energy_that_never_changes_or_is_infinite_is_unknown():
    h = torch.stack([torch.ones(10), torch.arange(10.0), torch.full((10,), math.inf)], dim=1)
    assert energy_bfmi(h).isnan().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("path", "trips"),
    [
        (DOWN_UP, 1),
        (DOWN_UP[::-1], 1),
        ([0, 2, 0, 2, 0], 2),
        ([1, 1, 1], 0),
        ([0, 1, 0, 1, 0], 0),
        ([1, 0, 0, 2, 2, 2, 1, 0, 1], 1),
        ([2, 0], 0),
        ([1, 2, 1, 0, 1, 2, 1, 0, 1, 2], 2),
    ],
)
def test_round_trips_are_counted_whole(path, trips):
    assert round_trips(torch.tensor(path)[:, None], rungs=3).tolist() == [trips]


def trips_by_hand(path, top):
    first = aim = None
    count = 0
    for level in path:
        if level not in (0, top):
            continue
        if first is None:
            first, aim = level, top - level
        elif level == aim:
            count += level == first
            aim = top - aim
    return count


def half_trips(levels, top):  # the broken twin: every crossing counts
    ends = [[level for level in column if level in (0, top)] for column in levels.T.tolist()]
    return [sum(a != b for a, b in itertools.pairwise(column)) for column in ends]


def test_round_trips_of_walking_replicas_are_those_counted_by_hand():
    rng = torch.Generator().manual_seed(0)
    order = torch.arange(5)
    levels = []
    for _ in range(3000):
        i = int(torch.randint(4, (), generator=rng))
        order = torch.where(order == i, i + 1, torch.where(order == i + 1, i, order))
        levels.append(order)
    levels = torch.stack(levels)
    expected = [trips_by_hand(column, 4) for column in levels.T.tolist()]
    assert min(expected) > 10
    assert round_trips(levels).tolist() == expected
    assert half_trips(levels, 4) != expected


@pytest.mark.parametrize(
    ("levels", "rungs", "error", "message"),
    [
        (torch.zeros(5), None, ShapeError, r"\(draws, replicas\); got \(5,\)"),
        (torch.zeros(5, 3), None, ArgumentTypeError, "torch.float32"),
        (torch.tensor([[0, 3]]), None, OptionError, "levels 0 to 1; got 0 to 3"),
        (torch.tensor([[-1, 1]]), None, OptionError, "got -1 to 1"),
        (torch.tensor([[0]]), None, OptionError, "ladder of 1 rungs"),
    ],
)
def test_what_is_no_ladder_is_refused(levels, rungs, error, message):
    with pytest.raises(error, match=message):
        round_trips(levels, rungs)


def test_hamiltonians_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match=r"two draws or more; got \(1, 3\)"):
        energy_bfmi(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match=r"got \(7,\)"):
        energy_bfmi(torch.zeros(7))
