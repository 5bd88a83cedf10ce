"""The prioritised buffer: draws that are unbiased under a moved density, weights that follow it, and refusals."""

import pytest
import torch

from contracts import seeded
from gibbsian.errors import DivergenceError, OptionError, ShapeError
from gibbsian.learned.prioritised import Drawn, PrioritisedBuffer
from oracles import Z_LIMIT, z_score

D = torch.float64
STATES = torch.arange(6, dtype=D).unsqueeze(1)
LOG_W = torch.tensor([0.3, -1.0, 1.2, -2.5, 0.0, 0.7], dtype=D)
OLD = torch.tensor([0.1, 0.3, 0.1, 0.2, 0.2, 0.1], dtype=D).log()
NEW = torch.tensor([0.2, 0.1, 0.3, 0.1, 0.2, 0.1], dtype=D).log()
VALUES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0], dtype=D)


def filled():
    buffer = PrioritisedBuffer((1,), 8, D)
    buffer.add(STATES, LOG_W, OLD)
    return buffer


def deviation(corrections):
    """Of means over six drawn states, from the exact average under the moved density, in standard errors."""
    buffer, rng, told = filled(), seeded(3), []
    for _ in range(4000):
        drawn = buffer.draw(6, rng)
        told.append((corrections(drawn, NEW[drawn.index]) * VALUES[drawn.index]).mean())
    w = LOG_W.exp()
    exact = (w * (OLD - NEW).exp() * VALUES).sum() / w.sum()
    return abs(z_score(torch.stack(told), float(exact)))


def test_corrected_draws_are_unbiased_under_the_moved_density():
    assert deviation(Drawn.corrections) < Z_LIMIT


@pytest.mark.parametrize("slip", ["left out", "upside down"])
def test_broken_twins_of_the_correction_are_caught(slip):
    wrong = {"left out": lambda drawn, q: torch.ones_like(q), "upside down": lambda d, q: 1.0 / d.corrections(q)}
    assert deviation(wrong[slip]) > Z_LIMIT


def test_an_update_carries_the_weights_over_exactly():
    buffer = filled()
    # Six states that carry all the weight, some of them drawn more than once.
    drawn = Drawn(torch.tensor([0, 1, 1, 2, 3, 4, 5]), STATES[[0, 1, 1, 2, 3, 4, 5]], OLD[[0, 1, 1, 2, 3, 4, 5]])
    buffer.update(drawn, NEW[drawn.index])
    torch.testing.assert_close(buffer.log_weights[:6], LOG_W + OLD - NEW, rtol=0, atol=1e-14)
    torch.testing.assert_close(buffer.log_q[:6], NEW)
    # Again from the same draw, which is out of date by now: weights follow the slots.
    buffer.update(drawn, OLD[drawn.index])
    torch.testing.assert_close(buffer.log_weights[:6], LOG_W, rtol=0, atol=1e-14)
    buffer.update(drawn, torch.full((7,), torch.nan, dtype=D))
    torch.testing.assert_close(buffer.log_weights[:6], LOG_W, rtol=0, atol=1e-14)


def test_points_that_are_not_finite_are_counted_and_never_drawn():
    buffer = PrioritisedBuffer((1,), 8, D)
    weights = LOG_W.clone()
    weights[:2] = torch.tensor([torch.nan, torch.inf])
    assert int(buffer.add(STATES, weights, OLD)) == 2
    assert int(buffer.draw(1000, seeded()).index.min()) == 2


def test_the_newest_points_take_the_place_of_the_oldest():
    buffer = filled()
    buffer.add(STATES[:4] + 10.0, LOG_W[:4], OLD[:4])
    assert buffer.x.flatten().tolist() == [12.0, 13.0, 2.0, 3.0, 4.0, 5.0, 10.0, 11.0]
    assert int(buffer.cursor) == 2


def test_the_state_goes_round():
    one, two = filled(), PrioritisedBuffer((1,), 8, D)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.draw(5, seeded(1)).x, two.draw(5, seeded(1)).x)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="holds 1 point or more; got size=0"):
        PrioritisedBuffer((1,), 0)
    buffer = PrioritisedBuffer((1,), 4, D)
    with pytest.raises(DivergenceError, match="No point of the prioritised buffer has a finite weight"):
        buffer.draw(2, seeded())
    with pytest.raises(ShapeError, match=r"4 slots .* shape \(1,\).*got shapes \(6, 1\)"):
        buffer.add(STATES, LOG_W, OLD)
    with pytest.raises(ShapeError, match="one weight and one log-density"):
        buffer.add(STATES[:2], LOG_W[:3], OLD[:2])
