"""Local moves with jumps: exact on a target with two wells, as the local moves alone are not, nor a broken twin."""

import dataclasses

import pytest
import torch

from gibbsian.energies.base import mixture
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import evaluate
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.independent import IndependentMH
from gibbsian.kernels.jumps import Jumps
from gibbsian.kernels.langevin import ULA
from gibbsian.sampling import sample

WELLS = mixture(
    Gaussian(2, loc=torch.tensor([-6.0, 0.0]), scale=0.6), Gaussian(2, loc=torch.tensor([6.0, 0.0]), scale=0.6),
    weights=[0.8, 0.2],
)  # fmt: skip
PROPOSAL = Gaussian(2, scale=torch.tensor([7.0, 1.0]))
LOCAL = HMC(0.3, 5, jitter=0.3)


def share(kernel, steps=400, seed=0):
    start = torch.tensor([-6.0, 0.0]).expand(500, 2).clone()
    out = sample(WELLS, kernel, start, steps=steps, warmup=steps // 2, thin=5, rng=torch.Generator().manual_seed(seed))
    right = (out.draws[..., 0] > 0).double().mean(0)
    return float(right.mean()), float(right.std() / len(right) ** 0.5), out


def test_both_wells_have_their_weights_from_one_side():
    value, error, out = share(Jumps(LOCAL, PROPOSAL, tries=3))
    assert abs(value - 0.2) < 4 * error < 0.05
    assert 0.02 < float(out.details["jump_acceptance"].mean()) < 0.5
    assert float(out.acceptance.mean()) > 0.8
    assert share(LOCAL, 50)[0] == 0.0


@dataclasses.dataclass(frozen=True)
class Forgetful(Jumps):
    """A twin that leaves the density of the proposal out of the ratio."""

    def step(self, energy, state, noise):
        points, costs, *rest = noise
        blind = dataclasses.replace(self, proposal=Flat())
        return Jumps.step(blind, energy, state, (points, torch.zeros_like(costs), *rest))


class Flat:
    def sample(self, n, rng):
        raise NotImplementedError

    def __call__(self, x):
        return torch.zeros(len(x))


def test_a_twin_without_the_proposal_s_density_is_caught():
    lopsided = Gaussian(2, loc=torch.tensor([4.0, 0.0]), scale=torch.tensor([6.0, 1.0]))
    value, error, _ = share(Jumps(LOCAL, lopsided, tries=3))
    assert abs(value - 0.2) < 4 * error
    twin, error, _ = share(Forgetful(LOCAL, lopsided, tries=3))
    assert abs(twin - 0.2) > 8 * error


def test_states_hold_what_stands_there():
    """Energies and gradients after jumps are those of the positions."""
    kernel, rng = Jumps(LOCAL, PROPOSAL, tries=2), torch.Generator().manual_seed(1)
    state = kernel.init(WELLS, torch.zeros(50, 2))
    noise = kernel.noise(state, 3, rng)
    assert noise[0].shape == (3, 2, 50, 2)
    for i in range(3):
        state, info = kernel.step(WELLS, state, tuple(t[i] for t in noise))
    value, grad = evaluate(WELLS, state.x)
    assert torch.allclose(state.energy, value)
    assert torch.allclose(state.grad, grad)
    assert set(info.details) == {"jump_acceptance"}
    assert kernel.gradients == 5 + 2


def test_a_run_goes_on_exactly():
    kernel = Jumps(LOCAL, PROPOSAL, tries=2)
    whole = sample(WELLS, kernel, torch.zeros(8, 2), steps=6, rng=torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(2)
    half = sample(WELLS, kernel, torch.zeros(8, 2), steps=3, rng=rng)
    assert torch.equal(whole.x, sample(WELLS, kernel, half.state, steps=3, rng=rng).x)


def test_bad_input():
    with pytest.raises(ArgumentTypeError, match="leaves the target as it is"):
        Jumps(ULA(0.1), PROPOSAL)
    with pytest.raises(ArgumentTypeError, match="leaves the target as it is"):
        Jumps("hmc", PROPOSAL)
    with pytest.raises(ArgumentTypeError, match="draws points"):
        Jumps(LOCAL, torch.zeros(2))
    with pytest.raises(OptionError, match="tries counts"):
        Jumps(LOCAL, PROPOSAL, tries=0)
    with pytest.raises(ArgumentTypeError, match="would leave that behind"):
        Jumps(IndependentMH(PROPOSAL), PROPOSAL).init(WELLS, torch.zeros(3, 2))
