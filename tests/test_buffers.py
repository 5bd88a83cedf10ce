"""The replay buffer: every chain, age and label goes back to its own slot."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gibbsian import Bernoulli, Gaussian
from gibbsian.buffers import ReplayBuffer, Slots
from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

SIZE = 200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(restart: float = 0.0, cls: type[ReplayBuffer] = ReplayBuffer) -> ReplayBuffer:
    """A buffer whose chain in slot i stands at i, so that a chain in another slot shows."""
    buffer = cls(Gaussian(3).double(), SIZE, restart)
    buffer.fill(generator(), {"y": torch.zeros(1, dtype=torch.int64)})
    buffer.positions = torch.arange(SIZE, dtype=torch.float64)[:, None].expand(SIZE, 3).clone()
    buffer.context_y = torch.arange(SIZE)
    return buffer


class Permuted(ReplayBuffer):
    """The broken twin: right chains, right slots, wrong order."""

    def write(self, slots, x, steps, hot=None):
        super().write(Slots(slots.index.sort().values, slots.x, slots.age, slots.context), x, steps, hot)


class Forgetful(ReplayBuffer):
    """A broken twin that leaves the labels of restarted chains behind."""

    def write(self, slots, x, steps, hot=None):
        kept = {name: value[slots.index] for name, value in self.context.items()}
        super().write(Slots(slots.index, slots.x, slots.age, kept), x, steps, hot)


def check_slots(buffer: ReplayBuffer) -> None:
    """Move every drawn chain by a thousandth a round, and count the rounds of each slot."""
    rng = generator(1)
    rounds = torch.zeros(SIZE, dtype=torch.int64)
    for _ in range(20):
        slots = buffer.draw(64, rng, {"y": torch.arange(5)})
        assert slots.index.unique().numel() == 64
        rounds[slots.index] += 1
        buffer.write(slots, slots.x + 1e-3, steps=7)
    expected = torch.arange(SIZE) + 1e-3 * rounds.double()
    torch.testing.assert_close(buffer.positions, expected[:, None].expand(SIZE, 3), rtol=0, atol=1e-9)
    assert torch.equal(buffer.ages, 7 * rounds)
    assert torch.equal(buffer.context["y"], torch.arange(SIZE))


def test_chains_return_to_their_slots():
    check_slots(numbered())


def test_a_buffer_that_permutes_is_caught():
    with pytest.raises(AssertionError, match="not close"):
        check_slots(numbered(cls=Permuted))


@pytest.mark.parametrize(("restart", "n"), [(0.05, 8), (0.3, 64), (1.0, 64)])
def test_restarted_fraction_is_exact_in_expectation(restart, n):
    buffer = numbered(restart)
    buffer.ages.fill_(1)
    rng = generator(2)
    rounds = 400
    restarted = 0
    for _ in range(rounds):
        slots = buffer.draw(n, rng, {"y": torch.arange(5)})
        anew = slots.age == 0
        # Slot i stands at exactly i, where the base draws with probability 0.
        assert torch.equal(anew, slots.x[:, 0] != slots.index)
        restarted += int(anew.sum())
    # Binomial at most; 5 standard errors are missed once in 1.7 million.
    assert abs(restarted / (n * rounds) - restart) <= 5 * math.sqrt(restart * (1 - restart) / (n * rounds))


def check_labels(cls: type[ReplayBuffer]) -> None:
    """Chains are moved to their own label, restarts included, so that each must stand at the label it carries."""
    buffer = cls(Gaussian(2), size=50, restart=0.2)
    rng = generator(3)
    buffer.fill(rng, {"y": torch.arange(10), "t": 10.0 * torch.arange(10)})
    buffer.positions = buffer.context["y"][:, None].repeat(1, 2).float()
    buffer.ages.fill_(1)
    for _ in range(60):
        batch = torch.randint(0, 10, (16,), generator=rng)
        slots = buffer.draw(16, rng, {"y": batch, "t": 10.0 * batch})
        y, anew = slots.context["y"], slots.age == 0
        assert bool(torch.isin(y[anew], batch).all())
        assert torch.equal(slots.context["t"], 10.0 * y)
        assert torch.equal(slots.x[~anew], y[~anew, None].repeat(1, 2).float())
        buffer.write(slots, y[:, None].repeat(1, 2).float(), steps=1)
    assert torch.equal(buffer.positions[:, 0], buffer.context["y"].float())


def test_labels_stay_with_their_chains():
    check_labels(ReplayBuffer)


def test_a_buffer_that_loses_labels_is_caught():
    with pytest.raises(AssertionError):
        check_labels(Forgetful)


def test_restarted_chains_come_from_the_base_at_age_zero():
    base = Gaussian(loc=torch.tensor([100.0]), scale=0.5)
    buffer = ReplayBuffer(base, size=1000, restart=0.25)
    rng = generator(4)
    buffer.fill(rng)
    buffer.positions.zero_()
    buffer.ages.fill_(9)
    slots = buffer.draw(400, rng)
    anew = slots.age == 0
    assert int(anew.sum()) == 100
    assert torch.equal(slots.x[~anew], torch.zeros(300, 1))
    z = (slots.x[anew] - 100.0) / 0.5
    assert abs(float(z.mean())) < 5 / math.sqrt(100)
    buffer.write(slots, slots.x, steps=3)
    assert sorted(buffer.ages[slots.index].unique().tolist()) == [3, 12]
    assert float(buffer.mean_age) == pytest.approx((600 * 9 + 300 * 12 + 100 * 3) / 1000)


def test_slots_are_drawn_uniformly():
    buffer = ReplayBuffer(Gaussian(1), size=40, restart=0.0)
    rng = generator(5)
    counts = torch.zeros(40)
    for _ in range(2000):
        counts[buffer.draw(10, rng).index] += 1
    # Each count has mean 500 and variance 2000 * (1/4) * (3/4); 6 sigma over 40 slots: below 1e-7.
    assert float((counts - 500).abs().max()) < 6 * math.sqrt(2000 * 3 / 16)


def test_a_fresh_buffer_takes_over_a_saved_one_whole():
    saved, rng = numbered(restart=0.1), generator(6)
    saved.write(slots := saved.draw(50, rng, {"y": torch.arange(5)}), slots.x + 0.5, steps=4)
    state = {k: v.clone() for k, v in saved.state_dict().items()}
    fresh = ReplayBuffer(Gaussian(3).double(), SIZE, 0.1)
    fresh.load_state_dict(state)
    assert fresh.filled
    for name, value in saved.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
        assert fresh.state_dict()[name].dtype == value.dtype
    a, b = (buffer.draw(20, generator(7), {"y": torch.arange(5)}) for buffer in (saved, fresh))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.context["y"], b.context["y"])
    assert torch.equal(a.age, b.age)


def test_an_unfilled_state_empties_a_filled_buffer():
    unfilled, filled = ReplayBuffer(Gaussian(3).double(), SIZE), numbered()
    filled.load_state_dict(unfilled.state_dict())
    assert not filled.filled
    assert filled.context == {}
    assert filled.draw(5, generator()).x.shape == (5, 3)


def test_another_size_is_a_mismatch():
    with pytest.raises(RuntimeError, match="size mismatch"):
        ReplayBuffer(Gaussian(3).double(), SIZE + 1).load_state_dict(numbered().state_dict())


@pytest.mark.parametrize("before", [True, False])
def test_everything_follows_to(before):
    buffer = ReplayBuffer(Gaussian(2), size=8)
    context = {"y": torch.arange(8), "t": torch.linspace(0, 1, 8)}
    if not before:
        buffer.fill(generator(), context)
    buffer.to(torch.float64)
    slots = buffer.draw(4, generator(), context)
    assert slots.x.dtype == torch.float64
    assert buffer.positions.dtype == torch.float64
    assert slots.age.dtype == slots.context["y"].dtype == torch.int64
    meta = ReplayBuffer(Gaussian(2), size=8).to("meta")
    assert meta.positions.device.type == meta.ages.device.type == "meta"


def test_equal_generators_draw_equal_chains():
    a, b = (ReplayBuffer(Bernoulli(probs=torch.full((4,), 0.3)), 30).draw(10, generator(8)) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.index, b.index)


def test_nothing_waits_for_the_device():
    # Fake tensors have shapes and no values, so that reading one back to the host raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        buffer, rng = ReplayBuffer(Gaussian(2), size=32, restart=0.3), generator()
        for _ in range(2):
            slots = buffer.draw(8, rng, {"y": torch.arange(8)})
            buffer.write(slots, slots.x + 1.0, steps=1)
        assert buffer.mean_age.shape == ()
        with pytest.raises(DataDependentOutputException):
            slots.age.sum().item()


def test_bad_input_is_refused():
    base = Gaussian(2)
    with pytest.raises(OptionError, match=r"33 .* size 32"):
        ReplayBuffer(base, size=32).draw(33, generator())
    with pytest.raises(OptionError, match="size=0"):
        ReplayBuffer(base, size=0)
    with pytest.raises(OptionError, match=r"1\.5"):
        ReplayBuffer(base, restart=1.5)
    with pytest.raises(ArgumentTypeError, match="base of a replay buffer"):
        ReplayBuffer(Energy.of(lambda x: x.sum(1)))  # type: ignore[arg-type]
    buffer = ReplayBuffer(base, size=8)
    slots = buffer.draw(4, generator(), {"y": torch.arange(4)})
    with pytest.raises(ShapeError, match=r"\(4, 2\).*\(3, 2\)"):
        buffer.write(slots, slots.x[:3], 1)
    with pytest.raises(OptionError, match=r"labels: y; the batch has: none"):
        buffer.draw(4, generator())
