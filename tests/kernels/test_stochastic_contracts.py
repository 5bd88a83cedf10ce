"""What stochastic-gradient kernels share with all kernels, the drawing of rows, and what they refuse."""

import dataclasses
import itertools
import os
import shutil

import pytest
import torch
from scipy.stats import chi2
from stochastic_cases import CENTRE, M, N, inputs, least_squares, normal_start, regression, round_gaussian, rows_of

import gibbsian as gb
from contracts import (
    assert_continues,
    assert_flat_memory,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_state_is_current,
    seeded,
    tensors_of,
)
from gibbsian.energies.minibatch import MinibatchEnergy
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.preconditioned import PSGLD
from gibbsian.kernels.stochastic import SGHMC, SGLD, CyclicalSGLD, draw_rows

KERNELS = (
    SGLD(0.02, N, M),
    SGLD(0.02, N, M, scale=torch.tensor([0.5, 1.5], dtype=torch.float64)),
    SGHMC(0.1, 2.0, N, M),
    SGHMC(0.1, 2.0, N, M, gradient_noise=0.2, scale=torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)),
    SGHMC(0.1, 2.0),
    CyclicalSGLD(0.02, 5, N, M),
    CyclicalSGLD(0.02, 5, exploration=0.5),
    PSGLD(0.02, N, M),
    PSGLD(0.02, decay=0.9, eps=0.1),
)


@pytest.mark.parametrize("centre", [None, CENTRE], ids=["plain", "control variates"])
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_every_kernel_keeps_the_contracts(kernel, centre):
    energy, start = regression(centre), normal_start()[:6]
    assert_continues(kernel, energy, start)
    assert_leaves_inputs_alone(kernel, energy, start)
    assert_flat_memory(kernel, energy, start)
    every = dataclasses.replace(kernel, batch_size=None if kernel.batch_size is None else N)
    assert_state_is_current(every, energy, start)


@pytest.mark.parametrize("kernel", [KERNELS[i] for i in (1, 3, 4, 5, 7)], ids=repr)
@pytest.mark.parametrize("centre", [None, CENTRE], ids=["plain", "control variates"])
def test_every_kernel_compiles_to_one_graph(kernel, centre, graphs):
    assert_one_graph(kernel, regression(centre), normal_start()[:5], graphs)


def test_the_state_holds_the_estimates_of_the_last_rows():
    kernel, energy, start = SGLD(0.02, N, M), regression(CENTRE), normal_start()[:6]
    state = gb.sample(energy, kernel, start, steps=7, rng=seeded(1)).state
    value, grad = gb.evaluate(energy.on(rows_of(kernel, energy, start, 7, 1)[-1]), state.x)
    torch.testing.assert_close(state.energy, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.grad, grad, rtol=0, atol=1e-12)


def test_one_estimate_a_step():
    calls = []

    def term(theta, a, y):
        calls.append((len(theta), len(a)))
        return least_squares(theta, a, y)

    energy, start = MinibatchEnergy(term, inputs()), normal_start()[:6]
    gb.sample(energy, SGLD(0.02, N, M), start, steps=4, rng=seeded(1))
    assert calls == [(6, N)] + 4 * [(6, M)]
    near = energy.around(CENTRE)
    calls.clear()
    gb.sample(near, SGLD(0.02, N, M), start, steps=4, rng=seeded(1))
    assert sorted(calls) == sorted([(6, N)] + 4 * [(1, M), (6, M)])


def test_rows_are_not_taken_for_noise_of_chains(monkeypatch):
    """As many chains as rows in a minibatch, in groups: the rows tie chains together, whatever their number."""
    rows = torch.randn(N, 2, 2, generator=seeded(), dtype=torch.float64)
    energy = MinibatchEnergy(lambda t, r: (t[:, None] - r).square().sum((2, 3)), rows)
    start = torch.randn(M, 2, 2, generator=seeded(1), dtype=torch.float64)
    whole = gb.sample(energy, SGLD(0.01, N, M), start, steps=12, rng=seeded(2))
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(i, i + 1) for i in range(M)])
    parted = gb.sample(energy, SGLD(0.01, N, M), start, steps=12, rng=seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(whole.state), tensors_of(parted.state)))


@pytest.mark.parametrize("few", [4096, 0], ids=["permutation", "rejection"])
def test_all_sets_of_rows_are_equally_likely(few, monkeypatch):
    monkeypatch.setattr("gibbsian.kernels.stochastic.FEW", few)
    rng, draws, sets = seeded(3), 20_000, {}
    for _ in range(draws):
        index = draw_rows(24, 2, rng, torch.device("cpu"))
        assert index.dtype == torch.int64
        assert index.shape == (2,)
        key = tuple(sorted(index.tolist()))
        sets[key] = sets.get(key, 0) + 1
    assert all(a != b for a, b in sets)
    expected = draws / 276
    statistic = sum((sets.get(pair, 0) - expected) ** 2 / expected for pair in itertools.combinations(range(24), 2))
    assert 1e-7 < chi2.sf(statistic, 275) < 1.0 - 1e-7


def test_many_rows_of_a_large_set():
    index = draw_rows(1_000_000, 20_000, seeded(), torch.device("cpu"))
    assert len(index.unique()) == 20_000
    assert abs(float(index.double().mean()) / 5e5 - 1.0) < 6.0 / (3 * 20_000) ** 0.5


@pytest.mark.parametrize(
    "kernel", [SGLD(0.3, 4, 2), SGHMC(0.8, 0.5, 4, 2), CyclicalSGLD(0.3, 5, 4, 2), PSGLD(0.3, 4, 2)]
)
def test_chains_that_leave_the_numbers_restart_and_are_counted(kernel):
    """A wall at 1 in the first coordinate."""

    def term(theta, rows):
        value = 0.125 * (theta[:, None] - rows).square().sum(2)
        return torch.where(theta[:, :1] > 1.0, torch.nan, value)

    start = torch.linspace(-0.4, 0.4, 128, dtype=torch.float64).reshape(64, 2)
    energy = MinibatchEnergy(term, torch.zeros(4, 2, dtype=torch.float64))
    out = gb.sample(energy, kernel, start, steps=50, rng=seeded(), thin=1)
    back = (out.draws == start).all(2)
    if isinstance(kernel, SGHMC):
        # At rest, hence where it started, in the first step and in the one after a restart.
        resting = torch.ones(64, dtype=torch.bool)
        for here in back:
            here &= ~resting
            resting = here
    assert torch.equal(back.double().sum(0), out.nonfinite)
    assert int(out.nonfinite.sum()) > 50
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert all(bool(torch.isfinite(t).all()) for t in tensors_of(out.state))
    assert bool((out.acceptance == 1.0).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGLD(0.1, 10, 11), "batch_size lies between 1 and the rows of the data, 10; got 11"),
        (lambda: SGLD(0.1, 10, 0), "got 0"),
        (lambda: SGLD(-0.1, 10, 5), "step_size is a positive number; got -0.1"),
        (lambda: SGHMC(0.1, 1.0, rows=10), "got rows=10 and batch_size=None"),
        (lambda: SGHMC(0.1, 0.0), "friction is a positive number; got 0.0"),
        (lambda: SGHMC(0.5, 3.0), "1 at most; got 0.5 times 3"),
        (lambda: SGHMC(0.1, 1.0, gradient_noise=1.5), "between 0 and 1; got 1.5"),
        (lambda: CyclicalSGLD(0.1, 0), "cycle counts the steps of a cycle, 1 or more; got 0"),
        (lambda: CyclicalSGLD(0.1, 10, exploration=1.0), "from 0 to below 1; got 1.0"),
        (lambda: CyclicalSGLD(0.1, 10, batch_size=3), "got rows=None and batch_size=3"),
        (lambda: SGLD(0.1, 10, 5, scale=torch.tensor([1.0, 0.0])), "positive finite standard deviations"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    "kernel", [SGLD(0.1, N, M), SGHMC(0.1, 1.0, N, M), CyclicalSGLD(0.1, 5, N, M), PSGLD(0.1, N, M)]
)
def test_energies_that_do_not_fit_are_refused(kernel):
    start, name = normal_start()[:4], type(kernel).__name__
    for energy in (round_gaussian(), 0.5 * regression(), lambda x: x.square().sum(1)):
        with pytest.raises(ArgumentTypeError, match=rf"{name} with minibatches needs .* as MinibatchEnergy; got"):
            gb.sample(energy, kernel, start, steps=1, rng=seeded())
    a, y = inputs()
    smaller = MinibatchEnergy(least_squares, (a[:8], y[:8]))
    message = f"{name} draws from rows=12 rows, and the energy has 8; pass energy.rows"
    with pytest.raises(ShapeError, match=message):
        gb.sample(smaller, kernel, start, steps=1, rng=seeded())
    state = gb.sample(regression(), kernel, start, steps=1, rng=seeded()).state
    with pytest.raises(ShapeError, match=message):
        gb.sample(smaller, kernel, state, steps=1, rng=seeded())


def test_states_of_other_kernels_are_refused():
    energy, start = regression(), normal_start()[:4]
    state = gb.sample(energy, gb.MALA(0.01), start, steps=1, rng=seeded()).state
    for kernel, lacks in (
        (SGLD(0.1, N, M), "origin"),
        (SGHMC(0.1, 1.0, N, M), "momentum"),
        (CyclicalSGLD(0.1, 5, N, M), "memory"),
        (PSGLD(0.1, N, M), "memory"),
    ):
        with pytest.raises(ArgumentTypeError, match=f"another kernel, and {type(kernel).__name__} needs .*{lacks}"):
            gb.sample(energy, kernel, state, steps=1, rng=seeded())


def test_kernels_print_what_is_set():
    assert repr(SGLD(0.05, 100, 10)) == "SGLD(step_size=0.05, rows=100, batch_size=10)"
    assert repr(SGHMC(0.1, 2.0)) == "SGHMC(step_size=0.1, friction=2.0)"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("kernel", [KERNELS[i] for i in (0, 3, 5, 7)], ids=repr)
def test_inductor_gives_the_eager_chains(kernel):
    energy, start = regression(CENTRE), normal_start()[:7]
    eager, compiled = (
        gb.sample(energy, kernel, start, steps=20, thin=1, rng=seeded(1), compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-10)
