"""Short runs: the start, k steps of the kernel, and nothing else; buffers are drawn from and never written."""

import copy
import math

import pytest
import torch
from torch import nn

import gibbsian as gb
from contracts import KS_LIMIT, ks, normal_cdf, seeded
from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.short_run import ShortRun, continue_chains

F64 = torch.float64
ENERGY = gb.Gaussian(loc=torch.zeros(2, dtype=F64))
WIDE = gb.Gaussian(loc=torch.full((2,), 4.0, dtype=F64), scale=2.0)


def spread(x, steps, k):
    """Law of Langevin on a unit normal from N(4, 2^2): it stays normal, mean and variance follow a recursion."""
    h, mean, variance = 0.05, 4.0, 4.0
    for _ in range(k):
        mean, variance = (1 - h) * mean, (1 - h) ** 2 * variance + 2 * h
    return ks(x[:, 0], lambda v: normal_cdf((v - mean) / math.sqrt(variance)))


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_a_short_run_is_k_steps_from_the_start_and_not_the_density(steps):
    run = ShortRun(gb.ULA(0.05), steps, WIDE)
    out = run.sample(ENERGY, 50_000, seeded())
    assert out.steps == steps
    assert spread(out.x, steps, steps) < KS_LIMIT
    # The twins: one step too many or too few, and the density itself.
    assert spread(out.x, steps, steps + 1) > KS_LIMIT
    assert spread(out.x, steps, steps - 1) > KS_LIMIT
    assert ks(out.x[:, 0], normal_cdf) > KS_LIMIT


def test_it_is_sample_from_a_draw_of_the_start_and_compiles(graphs):
    run = ShortRun(gb.MALA(0.3), 12, WIDE)
    energy, rng = copy.deepcopy(ENERGY), seeded(3)
    by_hand = gb.sample(energy, run.kernel, WIDE.sample(20, rng), steps=12, rng=rng)
    assert torch.equal(run.sample(energy, 20, seeded(3)).x, by_hand.x)
    made = []
    out = run.sample(energy, 20, seeded(3), compile=True, progress=made.append)
    torch.testing.assert_close(out.x, by_hand.x, rtol=0, atol=1e-12)
    assert graphs() == 1
    assert sum(made) == 12


def test_any_start_that_draws_will_do():
    class Rows:
        def sample(self, n, rng):
            return torch.zeros(n, 2)

    assert ShortRun(gb.ULA(0.1), 3, Rows()).sample(lambda x: x.square().sum(1), 5, seeded()).x.shape == (5, 2)
    run = ShortRun(gb.ULA(0.1), 3, gb.Gaussian(2))
    assert repr(run) == "ShortRun(kernel=ULA(step_size=0.1), steps=3, start=Gaussian(2, scale=1))"


def trained(size=64):
    """A buffer whose chains have moved, with labels."""
    buffer = ReplayBuffer(gb.Gaussian(2).double(), size, restart=0.5)
    rng = seeded()
    for _ in range(3):
        slots = buffer.draw(32, rng, {"y": torch.arange(4)})
        buffer.write(slots, slots.x + 1.0, steps=5)
    return buffer


def assert_untouched(buffer, act):
    before = {k: v.clone() for k, v in buffer.state_dict().items()}
    result = act()
    after = buffer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    return result


def test_a_buffer_is_drawn_from_as_it_stands():
    buffer = trained()
    slots = assert_untouched(buffer, lambda: buffer.peek(64, seeded(1)))
    order = slots.index.argsort()
    assert torch.equal(slots.index[order], torch.arange(64))
    assert torch.equal(slots.x[order], buffer.positions)
    assert torch.equal(slots.age[order], buffer.ages)
    assert torch.equal(slots.context["y"][order], buffer.context["y"])
    x = assert_untouched(buffer, lambda: buffer.sample(10, seeded(1)))
    assert torch.equal(x, buffer.peek(10, seeded(1)).x)
    x += 1.0
    assert not torch.equal(x, buffer.sample(10, seeded(1)))


def test_the_twin_that_restarts_is_caught():
    """Draws through `draw` restart chains: what the buffer holds is then not what is drawn."""
    buffer = trained()
    x = buffer.draw(64, seeded(1), {"y": torch.arange(4)}).x
    held = {tuple(row) for row in buffer.positions.tolist()}
    assert not all(tuple(row) in held for row in x.tolist())
    assert all(tuple(row) in held for row in buffer.sample(64, seeded(1)).tolist())


class Labelled(Energy):
    """A unit normal around twice the label."""

    context = ("y",)

    def forward(self, x, y):
        return 0.5 * (x - 2.0 * y[:, None]).square().sum(1)


def test_chains_go_on_under_their_labels_without_being_written_back():
    buffer, steps = trained(2000), 200
    (out, slots) = assert_untouched(
        buffer, lambda: continue_chains(Labelled(), gb.MALA(0.5), buffer, 2000, steps=steps, rng=seeded(2))
    )
    residual = out.x - 2.0 * slots.context["y"][:, None]
    assert ks(residual.flatten(), normal_cdf) < KS_LIMIT
    # The twin that forgets which label belongs to which chain.
    mixed = out.x - 2.0 * slots.context["y"].roll(1)[:, None]
    assert ks(mixed.flatten(), normal_cdf) > KS_LIMIT
    again, _ = continue_chains(Labelled(), gb.MALA(0.5), buffer, 2000, steps=steps, rng=seeded(2))
    assert torch.equal(out.x, again.x)


def test_a_buffer_without_labels_is_a_start():
    buffer = ReplayBuffer(gb.Gaussian(2).double(), 50)
    buffer.fill(seeded())
    run = ShortRun(gb.MALA(0.2), 10, buffer)
    out = assert_untouched(buffer, lambda: run.sample(ENERGY, 20, seeded(1)))
    rng = seeded(1)
    taken, _ = continue_chains(ENERGY, gb.MALA(0.2), buffer, 20, steps=10, rng=rng)
    assert torch.equal(out.x, taken.x)


def test_a_persistent_model_is_sampled_from_its_buffer():
    torch.manual_seed(0)
    energy = gb.Energy.of(nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))) + gb.Gaussian(2)
    pcd = gb.PCD(gb.MALA(0.1), gb.Gaussian(2), steps=2, buffer_size=32)
    pcd(energy, gb.Batch(torch.randn(16, 2, generator=seeded())), seeded(1))
    assert pcd.buffer.sample(32, seeded()).shape == (32, 2)
    out, _ = continue_chains(energy, pcd.kernel, pcd.buffer, 8, steps=3, rng=seeded())
    assert out.x.shape == (8, 2)


RUN = ShortRun(gb.ULA(0.1), 2, gb.Gaussian(2))
REFUSED = {
    "no steps": (lambda: ShortRun(gb.ULA(0.1), 0, gb.Gaussian(2)), OptionError, "1 or more; got 0"),
    "half a step": (lambda: ShortRun(gb.ULA(0.1), 0.5, gb.Gaussian(2)), OptionError, "got 0.5"),
    "kernel's class": (lambda: ShortRun(gb.ULA, 2, gb.Gaussian(2)), ArgumentTypeError, "needs a kernel"),
    "points for a start": (lambda: ShortRun(gb.ULA(0.1), 2, torch.zeros(3, 2)), ArgumentTypeError, r"sample\(n, rng\)"),
    "no chains": (lambda: RUN.sample(gb.Gaussian(2), 0, seeded()), OptionError, "1 or more; got 0"),
    "another space": (lambda: RUN.sample(gb.Gaussian(3), 4, seeded()), ShapeError, r"shape \(3,\); the chains"),
    "open label": (lambda: RUN.sample(Labelled(), 4, seeded()), OptionError, r"energy.given\(y=...\)"),
    "empty buffer": (
        lambda: ReplayBuffer(gb.Gaussian(2), 5).sample(2, seeded()),
        OptionError,
        r"holds no chains yet: .* fill\(rng\)",
    ),
    "more than there are": (lambda: trained().sample(65, seeded()), OptionError, "65 different chains .* size 64"),
    "no such label": (
        lambda: continue_chains(
            Energy.of(lambda x, c: x[:, 0], context=("c",)), gb.ULA(0.1), trained(), 2, steps=1, rng=seeded()
        ),
        OptionError,
        r"energy.given\(c=...\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()
