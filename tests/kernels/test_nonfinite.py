"""Steps that leave the numbers: rejected by adjusted kernels, restarted by ULA, counted by both."""

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.kernels.base import is_finite


def wall(kind):
    """A Gaussian whose energy, or gradient alone, leaves the numbers where the first coordinate exceeds one."""

    def energy(x):
        value = 0.5 * x.square().sum(1)
        over = x[:, 0] - 1.0
        if kind == "gradient":
            # Flat, with an infinite slope: the square root's derivative at zero.
            return value + torch.where(over > 0, over - over.detach(), 1.0).sqrt()
        return torch.where(over > 0, float(kind), value)

    return energy


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
@pytest.mark.parametrize("kernel", [gb.MALA(0.5), gb.HMC(0.7, leapfrog=3)], ids=repr)
def test_adjusted_kernels_reject_and_count(kernel, kind):
    start = torch.zeros(64, 2, dtype=torch.float64)
    out = gb.sample(wall(kind), kernel, start, steps=50, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert bool(is_finite(out.state.energy, out.state.grad).all())
    stayed = (torch.cat((start[None], out.draws))[1:] == torch.cat((start[None], out.draws))[:-1]).all(2).sum(0)
    assert bool((out.nonfinite >= 1).any())
    assert bool((stayed >= out.nonfinite).all())
    assert bool((out.acceptance <= 1.0 - out.nonfinite / 50).all())


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
def test_ula_restarts_from_the_origin_and_counts(kind):
    start = torch.linspace(-0.4, 0.4, 128, dtype=torch.float64).reshape(64, 2)
    out = gb.sample(wall(kind), gb.ULA(0.3), start, steps=50, rng=seeded(), thin=1)
    back = (out.draws == start).all(2).sum(0)
    assert torch.equal(back.double(), out.nonfinite)
    assert int(out.nonfinite.sum()) > 50
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert bool((out.acceptance == 1.0).all())


def test_ula_goes_on_from_a_returned_state_with_its_first_origin():
    start = torch.full((4, 2), 0.25, dtype=torch.float64)
    rng = seeded()
    first = gb.sample(wall("nan"), gb.ULA(0.1), start, steps=3, rng=rng)
    far = gb.sample(
        lambda x: torch.where(x[:, 0] == 0.25, x.sum(1), torch.nan), gb.ULA(0.1), first.state, steps=1, rng=rng
    )
    assert torch.equal(far.x, start)


def test_other_chains_do_not_feel_a_restart():
    start = torch.zeros(8, 2, dtype=torch.float64)
    clean = gb.sample(lambda x: 0.5 * x.square().sum(1), gb.ULA(0.3), start, steps=6, rng=seeded())
    walled = gb.sample(wall("nan"), gb.ULA(0.3), start, steps=6, rng=seeded())
    same = walled.nonfinite == 0
    assert 0 < int(same.sum()) < 8
    assert torch.equal(clean.x[same], walled.x[same])


def test_finiteness_needs_every_coordinate_of_the_gradient():
    grad = torch.zeros(5, 3, 2)
    grad[1, 2, 1] = torch.nan
    grad[2, 0, 0] = torch.inf
    grad[3, 0, 0], grad[3, 0, 1] = torch.inf, -torch.inf
    energy = torch.tensor([0.0, 0.0, 0.0, 0.0, torch.inf])
    assert is_finite(energy, grad).tolist() == [True, False, False, False, False]
    # Values whose sum overflows are finite all the same.
    huge = torch.full((1, 4), 3e38)
    assert is_finite(torch.zeros(1), huge).tolist() == [True]
