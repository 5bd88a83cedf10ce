"""HMC's trajectory: reversible, volume-preserving, of second order; and the faults that these properties expose."""

import pytest
import torch

import gibbsian as gb
from contracts import log_exponential, seeded
from gibbsian.errors import OptionError
from gibbsian.kernels.base import State, evaluate, row_sum
from gibbsian.kernels.hmc import leapfrog

TARGET = log_exponential()


def at(x):
    return State(x, *evaluate(TARGET.energy, x))


def flow(xv, h=0.2, steps=7):
    """The trajectory as a map of (x, v) to (x', v')."""
    d = xv.shape[1] // 2
    end, v = leapfrog(TARGET.energy, at(xv[:, :d]), xv[:, d:], h, steps)
    return torch.cat((end.x, v), 1)


def jacobian(f, y, eps=1e-5):
    """Central differences, every direction a chain of its own."""
    d = y.shape[1]
    shifts = eps * torch.eye(d, dtype=y.dtype)
    return ((f(y + shifts) - f(y - shifts)) / (2 * eps)).T


def test_trajectories_run_back():
    x, v = TARGET.draw(50, seeded()), torch.randn((50, 2), generator=seeded(1), dtype=torch.float64)
    end, v_end = leapfrog(TARGET.energy, at(x), v, 0.2, 7)
    assert float((end.x - x).abs().min()) > 1e-4
    back, v_back = leapfrog(TARGET.energy, end, -v_end, 0.2, 7)
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(-v_back, v, rtol=0, atol=1e-12)


def test_trajectories_preserve_volume():
    for seed in range(5):
        y = torch.cat(
            (TARGET.draw(1, seeded(seed)), torch.randn((1, 2), generator=seeded(seed), dtype=torch.float64)), 1
        )
        assert abs(float(torch.linalg.det(jacobian(flow, y))) - 1.0) < 1e-7
    # An Euler step, position and momentum at once, does not: the determinant is 1 + h^2 E''.
    euler = jacobian(lambda y: torch.cat((y[:, :2] + 0.2 * y[:, 2:], y[:, 2:] - 0.2 * at(y[:, :2]).grad), 1), y)
    assert abs(float(torch.linalg.det(euler)) - 1.0) > 1e-3


def energy_errors(force=1.0, opening=0.5):
    """Root mean square error of the Hamiltonian after unit time, at four step sizes that halve."""
    x, v0 = TARGET.draw(200, seeded(2)), torch.randn((200, 2), generator=seeded(3), dtype=torch.float64)
    errors = []
    for steps in (16, 32, 64, 128):
        h = 1.0 / steps
        state, v = at(x), v0 - (opening - 0.5) * h * at(x).grad
        if force == 1.0:
            end, v = leapfrog(TARGET.energy, state, v, h, steps)
        else:
            weaker = gb.Energy.of(lambda y: force * TARGET.energy(y))
            end, v = leapfrog(weaker, State(x, *evaluate(weaker, x)), v, h, steps)
            end = at(end.x)
        change = end.energy + 0.5 * row_sum(v * v) - state.energy - 0.5 * row_sum(v0 * v0)
        errors.append(float(change.square().mean().sqrt()))
    return torch.tensor(errors)


def order(errors):
    return (errors[:-1] / errors[1:]).log2()


def test_the_energy_error_is_of_second_order():
    assert bool(((order(energy_errors()) - 2.0).abs() < 0.1).all())


def test_the_order_exposes_a_lopsided_kick_and_a_force_with_a_wrong_factor():
    # Opening with a whole kick is of first order only; a force too weak conserves another energy altogether.
    assert bool((order(energy_errors(opening=1.0)) < 1.3).all())
    assert bool((order(energy_errors(force=0.9)).abs() < 0.3).all())


@pytest.mark.parametrize("h", [0.1, 0.7])
def test_one_leapfrog_step_is_mala(h):
    x = TARGET.draw(400, seeded(4))
    hmc = gb.sample(TARGET.energy, gb.HMC(h, leapfrog=1), x, steps=10, rng=seeded(5))
    mala = gb.sample(TARGET.energy, gb.MALA(h * h / 2), x, steps=10, rng=seeded(5))
    torch.testing.assert_close(hmc.x, mala.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(hmc.acceptance, mala.acceptance, rtol=0, atol=1e-10)


def test_one_gradient_per_leapfrog_step():
    calls = []

    def energy(x):
        calls.append(len(x))
        return (x**2).sum(1)

    gb.sample(energy, gb.HMC(0.1, leapfrog=4), torch.zeros(3, 2), steps=5, rng=seeded())
    assert len(calls) == 1 + 4 * 5


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_step_sizes_are_refused(bad):
    with pytest.raises(OptionError, match=f"step_size is a positive number; got {bad}"):
        gb.HMC(bad)


def test_a_trajectory_has_a_step():
    with pytest.raises(OptionError, match="leapfrog counts the steps"):
        gb.HMC(0.1, leapfrog=0)


@pytest.mark.parametrize(("leapfrog_steps", "jitter"), [(2, None), (3, None), (4, 1.0)])
@pytest.mark.parametrize("kind", [gb.HMC, gb.AdjustedMCLMC])
def test_trajectories_of_images_are_compiled_in_parts_and_go_the_same_way(kind, leapfrog_steps, jitter, graphs):
    torch.manual_seed(0)
    energy = gb.ConvEnergy((1, 6, 6), (4,)).double()
    start = torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=seeded())
    kernel = kind(0.1, leapfrog_steps, jitter=jitter)
    eager, compiled = (
        gb.sample(energy, kernel, start, steps=4, thin=1, rng=seeded(1), compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-10)
    torch.testing.assert_close(compiled.kept["acceptance"], eager.kept["acceptance"], rtol=0, atol=1e-10)
    assert graphs() <= 2
    longer = kind(0.05, leapfrog_steps + 2, jitter=jitter)
    gb.sample(energy, longer, compiled.state, steps=2, rng=seeded(2), compile=True)
    assert graphs() == 0
