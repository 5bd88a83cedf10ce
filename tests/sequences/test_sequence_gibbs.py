"""Sweeps over tables: they leave the model's law as it is, alone, tempered and on the way from independent columns."""

import pytest
import torch

from gibbsian.energies.pairwise import Potts
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.ladder import Tempered
from gibbsian.kernels.tempering import ParallelTempering
from gibbsian.partition.bracket import bracket
from gibbsian.sampling import sample
from gibbsian.sequences.gibbs import SequenceGibbs, sweep
from gibbsian.sequences.tables import PottsOnPath, codes_of, potts_path, profile, states_of, tables_of
from protein_families import drawn, every, hot, law, small_potts

SITES, LETTERS = 4, 3


def float_potts(**settings):
    return small_potts(SITES, LETTERS, **settings).float()


def histogram(codes):
    place = (codes * LETTERS ** torch.arange(SITES - 1, -1, -1)).sum(1)
    return torch.bincount(place, minlength=LETTERS**SITES).double() / len(codes)


def distance(codes, p):
    """Chi-squared over its degrees of freedom: about 1 when these are draws."""
    seen = histogram(codes)
    return float(len(codes) * ((seen - p).square() / p).sum() / (len(p) - 1))


@pytest.mark.parametrize("trainable", [False, True])
def test_tables_tell_energies_and_conditionals(trainable):
    energy = float_potts()
    if trainable:
        energy = Potts(energy.interaction.dense(), field=energy.field, trainable=True)
    codes = every(SITES, LETTERS)
    x = hot(codes, LETTERS, torch.float32)
    tables = tables_of(energy)
    assert torch.allclose(tables.energy(codes), energy(x), atol=1e-5)
    logits = energy.conditional_logits(x, slice(None))
    for i in range(SITES):
        assert torch.allclose(tables.logits(tables.places(codes), i), logits[:, i], atol=1e-5)


def test_couplings_between_equal_letters_become_tables():
    matrix = torch.tensor([[0.0, 0.7, 0.0], [0.7, 0.0, -0.4], [0.0, -0.4, 0.0]])
    energy = Potts(matrix, 3, field=torch.randn((3, 3), generator=torch.Generator().manual_seed(0)))
    codes = every(3, 3)
    assert torch.allclose(tables_of(energy).energy(codes), energy(hot(codes, 3, torch.float32)), atol=1e-6)


def test_tables_follow_the_parameters():
    energy = Potts.dense(3, 3)
    before = tables_of(energy)
    assert tables_of(energy) is before
    with torch.no_grad():
        energy.interaction.pairs_above.add_(1.0)
    assert float(tables_of(energy).by_site.max()) == 1.0


def test_a_tempered_model_and_one_on_its_path_have_their_tables():
    energy, codes = float_potts(), every(SITES, LETTERS)
    x = hot(codes, LETTERS, torch.float32)
    beta = torch.linspace(0.1, 1.0, len(codes))
    assert torch.allclose(tables_of(Tempered(energy, beta)).energy(codes), beta * energy(x), atol=1e-5)
    base = profile(torch.rand((SITES, LETTERS), generator=torch.Generator().manual_seed(3)) + 0.1)
    along = potts_path(base, energy)(torch.tensor(0.3))
    assert torch.allclose(along(x), 0.3 * energy(x) + 0.7 * base(x), atol=1e-5)
    tables = tables_of(along)
    logits = 0.3 * energy.conditional_logits(x, slice(None)) + 0.7 * base.conditional_logits(x, slice(None))
    assert torch.allclose(tables.logits(tables.places(codes), 2).softmax(1), logits[:, 2].softmax(1), atol=1e-5)


def test_a_sweep_leaves_the_law_as_it_is():
    energy = float_potts(strength=0.8)
    codes = drawn(energy, 60_000)
    p = law(energy)[1].double()
    assert distance(codes, p) < 1.5
    u = torch.rand((SITES, len(codes)), generator=torch.Generator().manual_seed(5))
    before = tables_of(energy).energy(codes)
    change = sweep(tables_of(energy), codes, u)
    assert distance(codes, p) < 1.5
    assert torch.allclose(before + change, tables_of(energy).energy(codes), atol=1e-4)


def test_couplings_that_are_not_symmetric_are_caught():
    """A broken twin: tables in which a pair is coupled one way only."""
    energy = float_potts(strength=0.8)
    tables = tables_of(energy)
    one_way = tables.by_site.clone()
    for i in range(SITES):
        one_way[i, : i * LETTERS] = 0.0
    codes = drawn(energy, 60_000)
    sweep(type(tables)(one_way, tables.field), codes, torch.rand((SITES, len(codes))))
    assert distance(codes, law(energy)[1].double()) > 5.0


@pytest.mark.parametrize("reversible", [False, True])
def test_chains_from_one_sequence_come_to_the_law(reversible):
    energy = float_potts()
    start = states_of(torch.zeros((20_000, SITES), dtype=torch.int64), LETTERS)
    kernel = SequenceGibbs(2, reversible)
    found = sample(energy, kernel, start, steps=15, rng=torch.Generator().manual_seed(1))
    assert distance(codes_of(found.x), law(energy)[1].double()) < 1.5
    assert torch.allclose(found.state.energy, energy(found.x), atol=1e-4)


def test_a_reversible_step_is_in_detailed_balance():
    energy = float_potts(strength=1.0)
    n = 400_000

    def flow(reversible):
        start = drawn(energy, n)
        kernel = SequenceGibbs(1, reversible)
        end = sample(energy, kernel, states_of(start, LETTERS), steps=1, rng=torch.Generator().manual_seed(2)).x
        first, last = (c[:, 0] * LETTERS + c[:, -1] for c in (start, codes_of(end)))
        joint = torch.bincount(first * 9 + last, minlength=81).view(9, 9).double()
        gap = (joint - joint.T).square() / (joint + joint.T).clamp(min=1.0)
        return float(gap.triu(1).sum() / 36)

    assert flow(True) < 2.0
    # One way through the columns is not: the test would tell.
    assert flow(False) > 4.0


def test_replicas_at_several_temperatures_each_have_their_law():
    energy = float_potts()
    kernel = ParallelTempering(SequenceGibbs(), [1.0, 0.5])
    start = states_of(torch.zeros((20_000, SITES), dtype=torch.int64), LETTERS)
    found = sample(energy, kernel, start, steps=20, rng=torch.Generator().manual_seed(1))
    points = kernel.points(found.state)
    codes = every(SITES, LETTERS)
    for level, beta in enumerate((1.0, 0.5)):
        p = (-beta * energy(hot(codes, LETTERS, torch.float32))).double().softmax(0)
        assert distance(codes_of(points[:, level]), p) < 1.5


def test_log_z_is_that_of_enumeration():
    energy = float_potts(strength=0.8)
    codes = every(SITES, LETTERS)
    exact = (-energy(hot(codes, LETTERS, torch.float32))).double().logsumexp(0)
    base = profile(torch.ones((SITES, LETTERS)))
    rng = torch.Generator().manual_seed(0)
    draws = states_of(drawn(energy, 400), LETTERS)
    path, kernel = potts_path(base, energy), SequenceGibbs(reversible=True)
    found = bracket(energy, base, draws, rng=rng, kernel=kernel, path=path, temperatures=60)
    assert float(found.lower) <= float(exact) <= float(found.upper)
    assert abs(float(found.value - exact)) < 4 * float(found.stderr)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="passes through all columns"):
        SequenceGibbs(0)
    with pytest.raises(ArgumentTypeError, match=r"Potts.dense"):
        tables_of(Potts.dense(3, 3) * 2.0)
    with pytest.raises(ArgumentTypeError, match="tempered twice"):
        tables_of(Tempered(Tempered(Potts.dense(3, 3), torch.tensor(0.5)), torch.tensor(0.5)))
    with pytest.raises(ShapeError, match="points of one shape"):
        PottsOnPath(profile(torch.ones((2, 3))), Potts.dense(3, 3), torch.tensor(0.5))
