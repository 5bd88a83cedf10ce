"""The settings, their ranges, and the learning rate's curve."""

import dataclasses
import math

import pytest

from gibbsian.errors import OptionError
from gibbsian.training.settings import TrainingSettings, with_overrides


def test_every_setting_explains_itself_in_one_line():
    for f in dataclasses.fields(TrainingSettings):
        assert f.metadata["help"].endswith("."), f.name
        assert "\n" not in f.metadata["help"]


def test_the_learning_rate_warms_up_decays_and_halves():
    s = TrainingSettings(steps=1000, learning_rate=2.0, warmup_steps=10, final_learning_rate_factor=0.1)
    assert s.learning_rate_at(0) == pytest.approx(0.2)
    assert s.learning_rate_at(500) == pytest.approx(2.0 * 0.55)
    assert s.learning_rate_at(1000) == pytest.approx(0.2)
    assert s.learning_rate_at(250) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert s.learning_rate_at(250, rollbacks=3) == pytest.approx(s.learning_rate_at(250) / 8)
    constant = dataclasses.replace(s, decay="constant", warmup_steps=0)
    assert {constant.learning_rate_at(t) for t in (0, 3, 999)} == {2.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 10.0),
        ("batch_size", True),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", "0.1"),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("decay", "linear"),
        ("optimizer", "adam"),
        ("momentum", 1.0),
        ("momentum", 0.5),
        ("ema_decay", 1.0),
        ("keep_checkpoints", 1),
        ("clip_norm", -1.0),
        ("rollback_learning_rate_factor", 0.0),
        ("acceptance_limit", 1.5),
        ("edge_limit", 1.5),
        ("flat_limit", -1.0),
        ("unlike_limit", math.nan),
        ("health", 1),
    ],
)
def test_values_out_of_range_are_refused_with_their_name(name, value):
    with pytest.raises(OptionError, match=name):
        TrainingSettings(**{name: value})


def test_overrides_go_by_name():
    assert with_overrides(TrainingSettings(), {"steps": 7}).steps == 7
    with pytest.raises(OptionError, match="'clip_norm'"):
        with_overrides(TrainingSettings(), {"clipnorm": 1.0})
