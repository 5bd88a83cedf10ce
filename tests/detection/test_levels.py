"""The recommended score of a noise-conditional energy, on a density that is known at every level."""

import dataclasses
import math

import pytest
import torch

from gibbsian.detection.levels import COMPONENTS, MAP_WEIGHT, ROWS_PER_FEATURE, LevelFeatures, level_ladder, level_score
from gibbsian.detection.scores import EnergyScore
from gibbsian.diagnostics.detection import auroc
from gibbsian.energies.base import Energy
from gibbsian.errors import InputError, OptionError, ShapeError

DIM = 30
SPREADS = torch.linspace(0.2, 2.0, DIM, dtype=torch.float64)
LADDER = level_ladder(0.1, 3.0, 5)


def noisy(x, sigma):
    """A Gaussian with unlike spreads, under noise."""
    variance = SPREADS**2 + (sigma**2)[:, None]
    return 0.5 * (x.square() / variance + variance.log() + math.log(2 * math.pi)).sum(1)


ENERGY = Energy.of(noisy, (DIM,), context=("sigma",))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def usual(n, seed):
    return SPREADS * torch.randn((n, DIM), generator=seeded(seed), dtype=torch.float64)


FOREIGN = {
    "too near the middle": lambda x: 0.5 * x,
    "other axes": lambda x: x.flip(1),
    "alike spreads": lambda x: x / SPREADS,
    "too far": lambda x: 2.0 * x,
}


@pytest.fixture(scope="module")
def score():
    return level_score(ENERGY, usual(2000, 0), LADDER, rng=seeded())


@pytest.mark.parametrize("kind", FOREIGN)
def test_rows_too_probable_or_too_improbable_are_found(score, kind):
    inside, outside = usual(500, 1), FOREIGN[kind](usual(500, 2))
    assert auroc(score(inside), score(outside), rng=seeded(), resamples=2).value > 0.95


def test_the_energy_alone_is_fooled():
    plain = EnergyScore(ENERGY.given(sigma=LADDER[0]))
    inside, outside = usual(500, 1), FOREIGN["too near the middle"](usual(500, 2))
    assert auroc(plain(inside), plain(outside), rng=seeded(), resamples=2).value < 0.05


def test_new_rows_of_the_usual_kind_score_as_usual(score):
    area = auroc(score(usual(2000, 3)), score(usual(2000, 4)), rng=seeded())
    assert abs(area.value - 0.5) < 5.0 * area.stderr


def test_it_is_the_density_of_energies_and_logarithms_of_lengths(score):
    x = usual(20, 5)
    features = torch.cat(
        [LevelFeatures(ENERGY, LADDER, "energy")(x), LevelFeatures(ENERGY, LADDER, "score")(x).log()], 1
    )
    torch.testing.assert_close(score.features(x), features)
    (part,) = score.parts
    expected = -part.model.score_samples(part.columns(features).numpy())
    torch.testing.assert_close(score(x), torch.as_tensor(expected))


def test_few_rows_get_few_components():
    fewest = ROWS_PER_FEATURE * 2 * len(LADDER)
    for rows, expected in ((fewest // 2, 1), (2 * fewest, 2), (12 * fewest, COMPONENTS)):
        (part,) = level_score(ENERGY, usual(rows, 6), LADDER, rng=seeded()).parts
        assert part.model.n_components == expected


def alike(x, sigma):
    """An energy of images that sees their length alone."""
    return 0.5 * x.square().sum((1, 2, 3)) / (1.0 + sigma**2)


ALIKE = Energy.of(alike, (1, 8, 8), context=("sigma",))


def images(n, seed, side=0):
    """Images whose left or right half varies."""
    spread = torch.full((8, 8), 0.1, dtype=torch.float64)
    spread[:, 4 * side : 4 * side + 4] = 1.0
    return spread * torch.randn((n, 1, 8, 8), generator=seeded(seed), dtype=torch.float64)


def test_maps_see_where_images_are_odd():
    score = level_score(ALIKE, images(400, 0), LADDER, rng=seeded())
    assert len(score.parts) == 4
    inside, outside = images(300, 1), images(300, 2, side=1)
    assert auroc(score(inside), score(outside), rng=seeded(), resamples=2).value > 0.99
    # A twin without maps sees nothing.
    blind = dataclasses.replace(score, parts=score.parts[:1])
    assert abs(auroc(blind(inside), blind(outside), rng=seeded(), resamples=2).value - 0.5) < 0.1


def test_a_map_is_the_mean_slope_of_each_cell_and_its_density_counts_a_tenth():
    score, x = level_score(ALIKE, images(400, 0), LADDER, rng=seeded()), images(5, 3)
    table = score.features(x)
    cells = x.reshape(5, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    for i, level in enumerate((1, 2, 3)):
        sigma = LADDER[level]
        first = 2 * len(LADDER) + 16 * i
        torch.testing.assert_close(table[:, first : first + 16], sigma * cells / (1.0 + sigma**2))
    each = [part(table) for part in score.parts]
    torch.testing.assert_close(score(x), each[0] + MAP_WEIGHT * (each[1] + each[2] + each[3]))


def test_maps_are_left_out_where_rows_are_few():
    assert len(level_score(ALIKE, images(159, 0), LADDER, rng=seeded()).parts) == 1
    assert len(level_score(ALIKE, images(160, 0), LADDER, rng=seeded()).parts) == 4
    assert len(level_score(ALIKE, images(160, 0), LADDER[:2], rng=seeded()).parts) == 3


def test_the_same_seed_gives_the_same_score(score):
    again = level_score(ENERGY, usual(2000, 0), LADDER, rng=seeded())
    assert torch.equal(again(usual(9, 7)), score(usual(9, 7)))


def test_a_point_without_slope_has_a_finite_feature():
    table = level_score(ENERGY, usual(100, 0), LADDER, rng=seeded()).features
    assert table(torch.zeros((1, DIM), dtype=torch.float64)).isfinite().all()


def test_levels_are_evenly_apart():
    found = torch.tensor(level_ladder(0.05, 8.0), dtype=torch.float64)
    assert len(found) == 10
    torch.testing.assert_close(found[[0, -1]], torch.tensor([0.05, 8.0], dtype=torch.float64))
    torch.testing.assert_close(found.log().diff(), found.log().diff().mean().expand(9))


def test_bad_input():
    for low, high, levels in ((0.0, 1.0, 5), (1.0, 1.0, 5), (2.0, 1.0, 5), (0.1, math.inf, 5), (0.1, 1.0, 1)):
        with pytest.raises(OptionError, match="from a low to a higher noise"):
            level_ladder(low, high, levels)
    with pytest.raises(ShapeError, match="2 or more reference rows"):
        level_score(ENERGY, usual(1, 0), LADDER, rng=seeded())
    with pytest.raises(OptionError, match="positive noise levels"):
        level_score(ENERGY, usual(9, 0), (), rng=seeded())
    with pytest.raises(InputError, match="not finite at 1 of 9"):
        level_score(ENERGY, torch.cat((usual(8, 0), torch.full((1, DIM), math.nan))), LADDER, rng=seeded())
