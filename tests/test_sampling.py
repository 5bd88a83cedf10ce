"""The chain loop: what it returns, what it keeps, what it refuses."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import gibbsian as gb
from contracts import seeded
from gibbsian import sampling
from gibbsian.errors import ArgumentTypeError, DomainError, InputError, OptionError, ShapeError
from gibbsian.sampling import with_tensor_settings

START = torch.zeros(4, 2)


def quadratic(x):
    return 0.5 * x.square().sum(1)


def run(energy=quadratic, kernel=None, start=START, steps=10, **options):
    options.setdefault("rng", seeded())
    return gb.sample(energy, gb.MALA(0.3) if kernel is None else kernel, start, steps=steps, **options)


def test_without_thin_only_the_final_state_is_held():
    out = run()
    assert out.draws is None
    assert torch.equal(out.x, out.state.x)
    assert (out.steps, out.x.shape, out.acceptance.shape, out.nonfinite.shape) == (10, (4, 2), (4,), (4,))


@pytest.mark.parametrize(
    ("steps", "warmup", "thin", "kept"),
    [
        (10, 0, 1, range(1, 11)),
        (10, 0, 3, (3, 6, 9)),
        (25, 5, 4, (9, 13, 17, 21, 25)),
        (25, 24, 1, (25,)),
        (23, 3, 20, (23,)),
    ],
)
def test_thin_keeps_every_position_counted_from_the_warmup(steps, warmup, thin, kept):
    every = run(steps=steps, thin=1).draws
    out = run(steps=steps, warmup=warmup, thin=thin)
    assert torch.equal(out.draws, every[[i - 1 for i in kept]])
    if kept[-1] == steps:
        assert torch.equal(out.draws[-1], out.x)


def test_the_same_seed_gives_the_same_chains_and_the_global_generator_is_not_touched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for kernel in (gb.ULA(0.1), gb.MALA(0.1), gb.HMC(0.1)):
        assert torch.equal(run(kernel=kernel).x, run(kernel=kernel).x)
        assert not torch.equal(run(kernel=kernel).x, run(kernel=kernel, rng=seeded(1)).x)
    assert torch.equal(torch.get_rng_state(), before)


def test_acceptance_is_the_mean_probability_of_each_chain():
    out = run(steps=200, kernel=gb.MALA(1.2), start=torch.zeros(64, 2), thin=1)
    path = torch.cat((torch.zeros(1, 64, 2), out.draws))
    moved = (path[1:] != path[:-1]).any(2).float().mean(0)
    # 64 x 200 coin tosses with these probabilities: their mean strays by more than 0.03 in fewer than 1 of 10^9 runs.
    assert abs(float(moved.mean() - out.acceptance.mean())) < 0.03
    assert 0.2 < float(out.acceptance.mean()) < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chains_keep_their_precision_and_long_runs_count_right(dtype):
    """Counting in bfloat16 would stop at 256 steps and report an acceptance of 0.5."""
    out = run(start=torch.zeros(2, 2, dtype=dtype), kernel=gb.MALA(1e-4), steps=512)
    assert out.x.dtype == dtype
    assert float(out.acceptance.min()) > 0.97


def test_progress_is_told_of_every_step():
    made = []
    run(steps=37, progress=made.append)
    assert sum(made) == 37
    assert max(made) == 10


def test_a_progress_bar_is_drawn_and_closed(capsys):
    run(steps=20, progress=True)
    assert "sampling" in capsys.readouterr().out


def test_an_interrupted_run_closes_its_bar():
    def stop(made):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)


def test_the_summary_leads_with_what_went_wrong():
    good = run()
    assert repr(dataclasses.replace(good, seconds=0.0, acceptance=torch.ones(4))) == (
        "Samples(4 chains of (2,), 10 steps, acceptance 1.000, 0.00 s, MALA(step_size=0.3))"
    )
    bad = dataclasses.replace(good, seconds=0.0, nonfinite=torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert repr(bad).startswith("Samples(3 non-finite proposals, 4 chains")


def test_settings_become_tensors_and_counts_stay():
    kernel = with_tensor_settings(gb.HMC(0.25, leapfrog=3), torch.zeros(1, dtype=torch.float64))
    assert isinstance(kernel.step_size, torch.Tensor)
    assert (kernel.step_size.dtype, kernel.step_size.ndim, float(kernel.step_size)) == (torch.float64, 0, 0.25)
    assert kernel.leapfrog == 3
    assert run().kernel == gb.MALA(0.3)


@pytest.mark.parametrize("step_size", [1, np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)])
def test_a_step_size_may_be_any_number(step_size):
    as_float = run(kernel=gb.MALA(float(step_size)))
    assert torch.equal(run(kernel=gb.MALA(step_size)).x, as_float.x)


class Conditional(gb.Energy):
    context = ("y",)

    def forward(self, x, y):
        return (x - y[:, None]).square().sum(1)


def normalised(training):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Flatten(0))
    return net.train(training)


REFUSED = {
    "no steps": ({"steps": 0}, OptionError, "steps is 1 or more; got 0"),
    "negative steps": ({"steps": -3}, OptionError, "got -3"),
    "steps in parts": ({"steps": 3.5}, ArgumentTypeError, "steps is a whole number of steps; got 3.5"),
    "thin as a flag": ({"thin": True}, ArgumentTypeError, "thin is a whole number of steps; got True"),
    "step sizes for other chains": (
        {"kernel": gb.MALA(torch.full((3,), 0.1))},
        ShapeError,
        r"one for each of 4 chains, \(4,\); got a tensor of shape \(3,\)",
    ),
    "too long a warm-up": ({"warmup": 11}, OptionError, "between 0 and steps=10; got 11"),
    "negative warm-up": ({"warmup": -1}, OptionError, "got -1"),
    "thin of zero": ({"thin": 0}, OptionError, "thin lies between 1"),
    "nothing kept": ({"warmup": 8, "thin": 3}, OptionError, "the steps after the warm-up, 2; got 3"),
    "no chains": ({"start": torch.zeros(0, 2)}, ShapeError, r"n of 1 or more; got shape \(0, 2\)"),
    "no event axis": ({"start": torch.zeros(4)}, ShapeError, r"got shape \(4,\)"),
    "integer start": ({"start": torch.zeros(4, 2, dtype=torch.int64)}, ArgumentTypeError, "got torch.int64"),
    "array start": ({"start": np.zeros((4, 2))}, ArgumentTypeError, "got ndarray"),
    "NaN start": ({"start": torch.tensor([[0.0, 0.0], [torch.nan, 0.0]])}, DomainError, "1 of 2 chains start"),
    "start outside": ({"energy": gb.Uniform(2), "start": START - 1}, DomainError, "4 of 4 chains start"),
    "wrong event": ({"energy": gb.Gaussian(3)}, ShapeError, r"takes points of shape \(3,\); the chains .* \(4, 2\)"),
    "column of energies": (
        {"energy": lambda x: x.square().sum(1, keepdim=True)},
        ShapeError,
        r"must have shape \(4,\); it returned \(4, 1\)",
    ),
    "one energy for all": ({"energy": lambda x: x.square().sum()}, ShapeError, r"it returned \(\)"),
    "energy per coordinate": ({"energy": lambda x: x.square()}, ShapeError, r"it returned \(4, 2\)"),
    "constant energy": ({"energy": lambda x: torch.zeros(len(x))}, ArgumentTypeError, "depends on x"),
    "integer energy": (
        {"energy": lambda x: x.long().sum(1), "kernel": gb.RandomWalk(0.1)},
        ArgumentTypeError,
        "floating-point numbers, in nats; got torch.int64",
    ),
    "energy that is a number": ({"energy": lambda x: 1.0}, ArgumentTypeError, "got 1.0"),
    "no energy": ({"energy": 3}, ArgumentTypeError, "got 3"),
    "kernel's class": ({"kernel": gb.MALA}, ArgumentTypeError, "needs init, noise and step"),
    "no kernel": ({"kernel": "mala"}, ArgumentTypeError, "got 'mala'"),
    "seed for generator": ({"rng": 0}, ArgumentTypeError, r"rng is a torch.Generator, .* got 0"),
    "other device": ({"start": torch.zeros(4, 2, device="meta")}, OptionError, "the chains are on meta"),
    "discrete energy": (
        {"energy": gb.Bernoulli(torch.zeros(2)), "kernel": gb.ULA(0.1)},
        DomainError,
        "ULA follows gradients",
    ),
    "one-hot energy": ({"energy": gb.Categorical(torch.zeros(2))}, DomainError, "MALA follows gradients"),
    "open context": ({"energy": Conditional()}, OptionError, r"energy.given\(y=...\)"),
    "batch normalisation": ({"energy": normalised(True)}, InputError, r"training mode \(1\).*energy.eval\(\)"),
    "batch normalisation inside": ({"energy": gb.Energy.of(normalised(True)) + gb.Gaussian(2)}, InputError, "eval"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_the_numbers_and_the_remedy(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(**options)


def test_what_looks_alike_but_can_run_is_not_refused():
    run(energy=normalised(False))
    run(energy=Conditional().given(y=0.5))
    run(warmup=10)
    run(start=torch.zeros(1, 2))
    run(start=torch.zeros(4, 2, requires_grad=True))
    run(energy=lambda x: x.square().flatten(1).sum(1), start=torch.zeros(2, 1, 4, 4))


def test_a_state_continues_with_the_kernel_it_belongs_to():
    moved = run(kernel=gb.MALA(0.1))
    run(kernel=gb.HMC(0.1), start=moved.state)
    run(kernel=gb.MALA(0.1), start=run(kernel=gb.ULA(0.1)).state)
    with pytest.raises(ArgumentTypeError, match="start from its positions"):
        run(kernel=gb.ULA(0.1), start=moved.state)
    run(kernel=gb.ULA(0.1), start=moved.x)


def test_a_box_holds_every_draw():
    out = run(kernel=gb.ULA(0.5, box=(-0.25, 0.5)), thin=1, steps=40)
    assert float(out.draws.min()) == -0.25
    assert float(out.draws.max()) == 0.5


def test_a_clipped_gradient_moves_no_further():
    steep = run(
        energy=lambda x: 1e6 * x.square().sum(1), start=START + 1, kernel=gb.ULA(0.1, 0.0, clip_grad=0.5), steps=1
    )
    torch.testing.assert_close(steep.x, START + 1 - 0.1 * 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": -1.0}, "step_size is a positive number; got -1.0"),
        ({"step_size": 0.1, "clip_grad": 0.0}, "clip_grad is a positive number; got 0.0"),
        ({"step_size": 0.1, "noise_scale": -0.1}, "noise_scale is a standard deviation, 0 or more; got -0.1"),
        ({"step_size": 0.1, "box": (1.0, 0.0)}, r"low < high; got \(1.0, 0.0\)"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(OptionError, match=message):
        gb.ULA(**settings)


PEAK = """
import resource, sys, torch, gibbsian as gb
energy, rng = gb.Gaussian(500), torch.Generator().manual_seed(0)
start = energy.sample(500, rng)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
gb.sample(energy, gb.MALA(0.1), start, steps=30, rng=rng)
before = peak()
gb.sample(energy, gb.MALA(0.1), start, steps=600, rng=rng)
print(peak() - before)
gb.sample(energy, gb.MALA(0.1), start, steps=600, thin=1, rng=rng)
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_flat_unless_draws_are_kept():
    """A step holds 1 MB of positions; kept, 600 of them are 600 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    flat, kept = map(float, done.stdout.split())
    assert flat < 30.0
    assert kept > 500.0


def test_blocks_of_many_chains_are_shorter_and_change_nothing(monkeypatch):
    start = torch.randn(1000, 2, generator=seeded())
    assert sampling.steps_per_block(gb.MALA(0.1)) == sampling.steps_per_block(gb.MALA(0.1), start) == 10
    whole = run(start=start, steps=23)
    monkeypatch.setattr(sampling, "NOISE_PER_BLOCK", 3 * start.numel() * 4 + 1)
    assert sampling.steps_per_block(gb.MALA(0.1), start) == 3
    made = []
    short = run(start=start, steps=23, progress=made.append)
    assert max(made) == 3
    assert torch.equal(short.x, whole.x)
    monkeypatch.setattr(sampling, "NOISE_PER_BLOCK", 1)
    assert sampling.steps_per_block(gb.MALA(0.1), start) == 1
