"""Where training chains start, and what moves them between rounds: fractions, labels, slots, and short runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import gibbsian as gb
from gibbsian.buffers import ReplayBuffer, Slots
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, row_sum
from gibbsian.objectives.augment import AdditiveNoise, HorizontalFlip, InTurn, Shift
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.starts import Starts, fresh_starts
from recovery import seeded

F64 = torch.float64
FAR = gb.Gaussian(loc=torch.full((2,), 1000.0, dtype=F64), scale=0.1)


@dataclass(frozen=True)
class Still:
    """A kernel that never moves."""

    gradients = 1
    domain = "real"

    def init(self, energy, x):
        return State(x, torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x))

    def noise(self, state, steps, rng):
        return (torch.zeros((steps, 1)),)

    def step(self, energy, state, noise):
        return state, Info(torch.ones_like(state.energy), torch.zeros_like(state.energy))


class Labelled(gb.Energy):
    """Constant in all but name; asks for a label."""

    context = ("y",)

    def forward(self, x, y):
        return 0.0 * row_sum(x) + 0.0 * y


def rows(n):
    """Row i stands at i, under the label i."""
    x = torch.arange(n, dtype=F64)[:, None].expand(n, 2).clone()
    return Batch(x, {"y": torch.arange(n)})


def kinds_without_buffer(starts, n, seed):
    batch = rows(n)
    slots = fresh_starts(starts, FAR, batch.x, batch.context, seeded(seed))
    at_data = slots.x[:, 0] < 900
    # Chain i is under row i's label, and if at data, at row i.
    assert torch.equal(slots.context["y"], batch.context["y"])
    assert torch.equal(slots.x[at_data], batch.x[at_data])
    return int(at_data.sum()), n - int(at_data.sum()), 0


def kinds_in_buffer(starts, n, seed, cls=ReplayBuffer):
    """Of a buffer whose chains stand at minus their label."""
    buffer = cls(FAR, 3 * n, restart=starts.noise)
    buffer.fill(seeded(seed), {"y": torch.arange(n)})
    buffer.positions = -buffer.context["y"][:, None].expand(3 * n, 2).double() - 1.0
    buffer.ages.fill_(7)
    batch = rows(n)
    slots = buffer.draw(n, seeded(seed), batch.context, batch.x, starts.data)
    x, y, anew = slots.x[:, 0], slots.context["y"], slots.age == 0
    at_data, at_noise, on = (x >= 0) & (x < 900), x > 900, x < 0
    assert torch.equal(anew, ~on)
    assert torch.equal(x[at_data], y[at_data].double()), "missed: labels of chains at data"
    assert torch.equal(x[on], -y[on].double() - 1.0), "missed: labels of chains that go on"
    return int(at_data.sum()), int(at_noise.sum()), int(on.sum())


TRIANGLE = [Starts(0.3, 0.25, 0.45), Starts(0.5, 0.0, 0.5), Starts(0.0, 0.1, 0.9), Starts(0.49, 0.5, 0.01)]


@pytest.mark.parametrize("n", [1, 5, 32])
@pytest.mark.parametrize(
    "starts", [*TRIANGLE, Starts(1.0), Starts(noise=1.0), Starts(0.35, 0.65), Starts(buffer=1.0)], ids=repr
)
def test_fractions_are_right_on_average_and_never_off_by_a_chain(starts, n):
    count, rounds = kinds_in_buffer if starts.buffer else kinds_without_buffer, 300
    shares = (starts.data, starts.noise, starts.buffer)
    total = [0, 0, 0]
    for seed in range(rounds):
        for i, found in enumerate(count(starts, n, seed)):
            # One uniform number sets all of them: each is a whole number next to its share.
            assert math.floor(shares[i] * n + 1e-6) <= found <= math.ceil(shares[i] * n - 1e-6)
            total[i] += found
    for found, share in zip(total, shares):
        # A number between two neighbours has a variance of a quarter at most: six standard errors, once in 5e8.
        assert abs(found / rounds - share * n) <= 6 * math.sqrt(0.25 / rounds) + 1e-9


class Unlabelled(ReplayBuffer):
    """The broken twin: chains that start at a row keep the label of the chain whose slot they take."""

    def draw(self, n, rng, context=None, data=None, from_data=0.0):
        state = rng.get_state()
        kept = super().draw(n, rng, context)
        rng.set_state(state)
        slots = super().draw(n, rng, context, data, from_data)
        return Slots(slots.index, slots.x, slots.age, {"y": self.context["y"][kept.index]})


def test_labels_that_stay_behind_are_caught():
    with pytest.raises(AssertionError, match="missed: labels"):
        kinds_in_buffer(TRIANGLE[0], 32, 0, Unlabelled)


@dataclass(frozen=True)
class Up:
    """A move that is seen: a thousandth up."""

    def __call__(self, x, rng):
        return x + 1e-3


class Elsewhere(ReplayBuffer):
    """The broken twin: ages go to other slots than positions."""

    def write(self, slots, x, steps, hot=None):
        super().write(Slots(slots.index, slots.x, slots.age.flip(0), slots.context), x, steps, hot)


class Permuted(ReplayBuffer):
    """The broken twin: chains go to one another's slots."""

    def write(self, slots, x, steps, hot=None):
        super().write(Slots(slots.index.sort().values, slots.x, slots.age, slots.context), x, steps, hot)


def check_rounds(cls=ReplayBuffer, fraction=1.0):
    """Chains that never move, but are moved between rounds: each slot's story is known."""
    size, n, steps = 120, 32, 3
    objective = ContrastiveDivergence(
        Still(),
        steps,
        starts=Starts(buffer=1.0),
        base=FAR,
        buffer_size=size,
        augment=Up(),
        augment_fraction=fraction,
    )
    objective.buffer = buffer = cls(FAR, size, restart=0.0)
    rng, batch = seeded(1), rows(n)
    buffer.fill(rng, batch.context)
    buffer.positions = torch.arange(size, dtype=F64)[:, None].expand(size, 2) * -1.0 - 1.0
    buffer.context_y = torch.arange(size)
    buffer.ages.fill_(1)
    for _ in range(40):
        objective(Labelled(), batch, rng)
    assert torch.equal(buffer.context["y"], torch.arange(size)), "missed: labels"
    assert torch.equal(-buffer.positions[:, 0].round() - 1.0, torch.arange(size, dtype=F64)), "missed: chains"
    made = (buffer.ages - 1) // steps
    moved = (buffer.positions[:, 0] - buffer.positions[:, 0].round()) * 1e3
    return made, moved


def test_chains_are_moved_and_return_to_their_slots():
    made, moved = check_rounds()
    # 40 rounds of 32 of 120 chains: each was moved as often as it was drawn.
    assert int(made.sum()) == 40 * 32
    torch.testing.assert_close(moved, made.double(), rtol=0, atol=1e-6)


def test_a_fraction_is_moved():
    made, moved = check_rounds(fraction=0.25)
    # Binomial with 1280 trials, to six standard errors.
    assert abs(float(moved.sum()) / 1280 - 0.25) < 6 * math.sqrt(0.25 * 0.75 / 1280)
    assert bool((moved <= made + 1e-6).all())


@pytest.mark.parametrize("twin", [Permuted, Elsewhere])
def test_wrong_slots_are_caught(twin):
    with pytest.raises(AssertionError, match=r"missed|not close"):  # noqa: PT012
        made, moved = check_rounds(twin)
        torch.testing.assert_close(moved, made.double(), rtol=0, atol=1e-6)


def test_chains_that_start_anew_are_not_moved():
    objective = ContrastiveDivergence(
        Still(), starts=Starts(data=0.5, buffer=0.5), base=FAR, buffer_size=40, augment=Up()
    )
    objective.buffer.fill(seeded(), {"y": torch.arange(20)})
    objective.buffer.positions = torch.full((40, 2), -3.0, dtype=F64)
    objective.buffer.ages.fill_(1)
    objective(Labelled(), rows(20), seeded(1))
    x = objective.buffer.positions[:, 0]
    assert int((x == -3.0 + 1e-3).sum()) == 10
    assert int((x == -3.0).sum()) == 20
    assert int((x >= 0).sum()) == int((x == x.round()).sum()) - 20 == 10


def test_a_start_at_data_is_at_data_with_its_noise():
    objective = ContrastiveDivergence(Still(), data_noise=0.5)
    loss = objective(gb.Energy.of(lambda x: row_sum(x)), Batch.of(torch.zeros(500, 2)), seeded())
    assert loss.metrics["gap"] == 0
    assert loss.metrics["energy_data"] != 0


def images(n=400, *shape):
    return torch.rand(n, *shape, generator=seeded(1), dtype=F64)


def test_a_flip_is_a_mirror_image_as_often_as_said():
    x = images(2000, 1, 4, 6)
    y = HorizontalFlip(0.3)(x, seeded())
    same = (y == x).flatten(1).all(1)
    assert torch.equal(y[~same], x[~same].flip(-1))
    assert abs(float((~same).double().mean()) - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 2000)
    assert torch.equal(HorizontalFlip(1.0)(x, seeded()), x.flip(3))
    assert torch.equal(HorizontalFlip(0.0)(x[:, 0], seeded()), x[:, 0])


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_a_shift_moves_every_channel_and_repeats_the_border(shape):
    x = images(3000, *shape)
    y = Shift(2)(x, seeded())
    seen = torch.zeros(5, 5)
    padded = nn.functional.pad(x.reshape(3000, -1, 5, 7), (2, 2, 2, 2), mode="replicate").reshape(
        3000, *shape[:-2], 9, 11
    )
    for down in range(5):
        for right in range(5):
            candidate = padded[..., 4 - down : 9 - down, 4 - right : 11 - right]
            seen[down, right] = (candidate == y).flatten(1).all(1).sum()
    assert int(seen.sum()) == 3000
    # All 25 shifts equally often: each within six standard errors.
    assert float((seen / 3000 - 0.04).abs().max()) < 6 * math.sqrt(0.04 / 3000)


def test_noise_is_added_and_moves_are_made_in_turn():
    x = torch.zeros(5000, 2, 3, dtype=F64)
    y = AdditiveNoise(0.2)(x, seeded())
    assert abs(float(y.std()) - 0.2) < 6 * 0.2 / math.sqrt(2 * 30_000)
    both = InTurn((AdditiveNoise(0.2), HorizontalFlip(1.0)))
    assert torch.equal(both(x, seeded()), y.flip(-1))
    assert AdditiveNoise(0.1)(x.float(), seeded()).dtype == torch.float32


BASE = gb.Gaussian(2).double()


class Bowl(gb.Energy):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0, dtype=F64))

    def forward(self, x):
        return 0.5 * self.a * row_sum(x.square())


def test_a_short_run_model_is_sampled_as_it_was_trained():
    """The chains of a step are the draws of the run, to the bit."""
    objective = ContrastiveDivergence(gb.ULA(0.1), steps=7, starts=Starts(noise=1.0), base=BASE)
    energy, data = Bowl(), torch.randn(50, 2, generator=seeded(2), dtype=F64)
    loss = objective(energy, Batch.of(data), seeded(3))
    x = objective.short_run.sample(energy, 50, seeded(3)).x
    torch.testing.assert_close(loss.metrics["energy_samples"], energy(x).mean().detach(), rtol=0, atol=1e-14)
    assert objective.buffer is None
    assert "buffer_age" not in loss.metrics


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (
            lambda: PersistentContrastiveDivergence(gb.MALA(0.1), BASE, steps=2, buffer_size=40, restart=0.25),
            lambda: ContrastiveDivergence(
                gb.MALA(0.1), 2, starts=Starts(noise=0.25, buffer=0.75), base=BASE, buffer_size=40
            ),
        ),
        (
            lambda: ContrastiveDivergence(gb.MALA(0.1), 2),
            lambda: ContrastiveDivergence(gb.MALA(0.1), 2, starts=Starts(data=1.0), base=BASE),
        ),
    ],
    ids=["pcd", "cd"],
)
def test_the_known_methods_are_points_of_one_design(special, general):
    data = Batch.of(torch.randn(20, 2, generator=seeded(2), dtype=F64))
    values = []
    for objective in (special(), general()):
        rng = seeded(4)
        values.append(torch.stack([objective(Bowl(), data, rng).value for _ in range(3)]))
    assert torch.equal(*values)
    assert special().state_dict().keys() == general().state_dict().keys()


def test_a_buffer_with_all_starts_is_saved_and_goes_on():
    def make():
        return ContrastiveDivergence(
            gb.ULA(0.1), 2, starts=Starts(0.2, 0.2, 0.6), base=BASE, buffer_size=50, augment=AdditiveNoise(0.1)
        )

    class Conditional(Bowl):
        context = ("y",)

        def forward(self, x, y):
            return super().forward(x - y[:, None])

    data = Batch(torch.randn(20, 2, generator=seeded(2), dtype=F64), {"y": torch.arange(20) % 2})
    energy, first, rng = Conditional(), make(), seeded(1)
    first(energy, data, rng)
    second = make()
    second.load_state_dict(first.state_dict())
    other = torch.Generator()
    other.set_state(rng.get_state())
    assert torch.equal(first(energy, data, rng).value, second(energy, data, other).value)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_the_settings_are_told():
    told = repr(
        ContrastiveDivergence(gb.ULA(0.1), starts=Starts(buffer=1.0), base=BASE, augment=Shift(1), data_noise=0.1)
    )
    for part in ("Starts(data=0.0, noise=0.0, buffer=1.0)", "augment=Shift(pixels=1)", "data_noise=0.1"):
        assert part in told
    assert "kl" not in told
    assert "augment" not in repr(ContrastiveDivergence(gb.ULA(0.1)))


def test_drawing_starts_does_not_wait_for_the_device():
    with FakeTensorMode():
        buffer, rng = ReplayBuffer(gb.Gaussian(2), size=32, restart=0.3), seeded()
        data = torch.zeros(8, 2)
        slots = buffer.draw(8, rng, {}, data, 0.4)
        assert slots.x.shape == (8, 2)
        assert fresh_starts(Starts(0.5, 0.5), gb.Gaussian(2), data, {}, rng).x.shape == (8, 2)
        with pytest.raises(DataDependentOutputException):
            slots.age.sum().item()


def cd(**options):
    return ContrastiveDivergence(gb.ULA(0.1), **options)


DATA = torch.randn(8, 2, generator=seeded(2), dtype=F64)
MIXED = Starts(0.5, 0.25, 0.25)

REFUSED = {
    "more than one": (lambda: Starts(data=0.5, noise=0.6), OptionError, r"add to 1; data=0\.5, noise=0\.6 .* 1\.1"),
    "nothing": (lambda: Starts(), OptionError, "add to 0"),
    "negative": (lambda: Starts(data=1.5, noise=-0.5), OptionError, r"data lies between 0 and 1; got 1\.5"),
    "no number": (lambda: Starts(data=math.nan), OptionError, "got nan"),
    "no base": (lambda: cd(starts=MIXED), OptionError, r"Starts\(.*needs a base"),
    "another base": (lambda: cd(starts=MIXED, base=Bowl()), ArgumentTypeError, "base of the chains"),
    "small buffer": (
        lambda: cd(starts=MIXED, base=BASE, buffer_size=7)(Bowl(), Batch.of(DATA), seeded()),
        OptionError,
        "Cannot draw 8 different chains from a replay buffer of size 7; make the buffer larger or the batch smaller",
    ),
    "another space": (
        lambda: cd(starts=Starts(noise=1.0), base=gb.Gaussian(3).double())(Bowl(), Batch.of(DATA), seeded()),
        ShapeError,
        r"shape \(3,\) and the data's have \(2,\)",
    ),
    "base of another dtype": (
        lambda: cd(starts=Starts(noise=1.0), base=gb.Gaussian(2))(Bowl(), Batch.of(DATA), seeded()),
        OptionError,
        r"The base is torch\.float32 on cpu and the data torch\.float64 on cpu; move the objective",
    ),
    "base on another device": (
        lambda: cd(starts=Starts(noise=1.0), base=gb.Gaussian(2).double().to("meta"))(Bowl(), Batch.of(DATA), seeded()),
        OptionError,
        "The base is .* on meta and the data .* on cpu",
    ),
    "energy of another dtype": (
        lambda: cd()(Bowl(), Batch.of(DATA.float()), seeded()),
        OptionError,
        r"parameters are torch\.float64 on cpu and the data torch\.float32 on cpu",
    ),
    "energy on another device": (
        lambda: cd()(Bowl().to("meta"), Batch.of(DATA), seeded()),
        OptionError,
        "parameters are torch.float64 on meta and the data torch.float64 on cpu",
    ),
    "data on another device": (
        lambda: PersistentContrastiveDivergence(gb.ULA(0.1), BASE)(Bowl(), Batch.of(DATA.to("meta")), seeded()),
        OptionError,
        "replay buffer is torch.float64 on cpu and the data torch.float64 on meta",
    ),
    "whole numbers": (
        lambda: cd()(gb.Energy.of(lambda x: x.sum(1)), Batch.of(torch.ones(4, 2).long()), seeded()),
        ArgumentTypeError,
        "floating-point",
    ),
    "no rows": (lambda: cd()(Bowl(), Batch.of(DATA[:0]), seeded()), ShapeError, "n of 1 or more"),
    "data missing": (
        lambda: ReplayBuffer(BASE, 8).draw(4, seeded(), from_data=0.5),
        OptionError,
        r"from_data=0\.5 .* none were given",
    ),
    "no buffer to move in": (lambda: cd(augment=Up()), OptionError, r"augment=Up\(\) moves chains between two rounds"),
    "too many moved": (
        lambda: cd(starts=MIXED, base=BASE, augment_fraction=1.5),
        OptionError,
        r"augment_fraction lies between 0 and 1; got 1\.5",
    ),
    "a move that changes shapes": (
        lambda: cd(starts=MIXED, base=BASE, augment=lambda x, rng: x[:, :1])(Bowl(), Batch.of(DATA), seeded()),
        ShapeError,
        r"chains of shape \(8, 2\) .* returned \(8, 1\)",
    ),
    "no images": (
        lambda: cd(starts=MIXED, base=BASE, augment=HorizontalFlip())(Bowl(), Batch.of(DATA), seeded()),
        ShapeError,
        r"HorizontalFlip moves images.*\(8, 2\)",
    ),
    "flips": (lambda: HorizontalFlip(2.0), OptionError, r"between 0 and 1; got 2\.0"),
    "half a pixel": (lambda: Shift(0.5), OptionError, r"whole number, 1 or more; got 0\.5"),
    "still noise": (lambda: AdditiveNoise(0.0), OptionError, "positive number; got 0"),
    "no move": (lambda: InTurn(()), OptionError, "one move or more"),
    "no short run": (lambda: cd().short_run, OptionError, r"starts at noise.*Starts\(noise=1\.0\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("starts", [Starts(1.0), Starts(noise=1.0), *TRIANGLE], ids=repr)
def test_a_batch_of_one_is_a_batch(starts):
    objective = cd(starts=starts, base=BASE, buffer_size=1)
    for seed in range(4):
        assert bool(torch.isfinite(objective(Bowl(), Batch.of(DATA[:1]), seeded(seed)).value))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("event", [(3,), (1, 4, 4)])
def test_events_of_any_shape_and_precision(dtype, event):
    data = torch.randn(6, *event, generator=seeded(), dtype=dtype)
    base = gb.Gaussian(event, scale=torch.ones(event, dtype=dtype))
    objective = cd(starts=MIXED, base=base, buffer_size=6, augment=AdditiveNoise(0.1), data_noise=0.1)
    a, b = (
        cd(starts=MIXED, base=base, buffer_size=6, data_noise=0.1)(Bowl().to(dtype), Batch.of(data), seeded(1)).value
        for _ in range(2)
    )
    assert torch.equal(a, b)
    assert objective(Bowl().to(dtype), Batch.of(data), seeded()).value.dtype == dtype
