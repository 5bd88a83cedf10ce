"""Sweeps by bits: the Markov chain of BlockGibbs, to the bit whether compiled or not; random bits that are right."""

import itertools
import math

import pytest
import torch
from scipy import stats

import gibbsian as gb
from contracts import seeded
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels import checkerboard
from gibbsian.kernels.checkerboard import CheckerboardGibbs, pack, sweep_once, thresholds, unpack, word_bits
from kernels.test_compiled import needs_compiler


def spins(*shape, seed=0, dtype=torch.float32):
    return torch.randint(2, shape, generator=seeded(seed)).to(dtype)


def sweep_site_by_site(x, seeds, increment, table, bits):
    """Draw each colour in words of one site, from the same random words as the packed sweep, in plain Python."""
    x, (height, width) = x.clone(), x.shape
    rows, planes = height // bits, len(table)
    for colour in (0, 1):
        old = x.clone()
        for r, c in itertools.product(range(height), range(width)):
            if (r + c) % 2 != colour:
                continue
            b, i = divmod(r, rows)
            count = sum(int(old[p % height, q % width]) for p, q in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)))
            u = t = 0
            for j in range(planes):
                place = ((colour * planes + j) * rows + i) * (width // 2) + c // 2
                word = checkerboard.splitmix(seeds + place * increment)
                u, t = 2 * u + (int(word) >> b & 1), 2 * t + (int(table[j, count]) & 1)
            x[r, c] = float(u < t)
    return x


def sweep_args(n=1, coupling=0.3, field=0.1, planes=24):
    seeds = torch.randint(-(2**62), 2**62, (n,), generator=seeded(3))
    increment = checkerboard.varied(torch.tensor(0x1234567890ABCDEF))
    return seeds, increment, thresholds(torch.tensor(coupling), torch.tensor(field), planes)


@pytest.mark.parametrize(("height", "bits"), [(4, 2), (12, 2), (16, 8), (96, 16), (128, 64), (256, 64)])
def test_packing_is_undone(height, bits):
    x = spins(2, height, 6)
    assert word_bits(height) == bits
    assert torch.equal(unpack(pack(x), bits).to(x.dtype), x)


@pytest.mark.parametrize(("height", "width"), [(4, 2), (8, 6), (128, 4)])
def test_a_sweep_draws_each_site_given_its_own_neighbours(height, width):
    x, bits = spins(1, height, width), word_bits(height)
    seeds, increment, table = sweep_args()
    swept = unpack(sweep_once(pack(x), seeds, increment, table, bits), bits)[0].to(x.dtype)
    assert torch.equal(swept, sweep_site_by_site(x[0], seeds[0], increment, table, bits))


@pytest.mark.parametrize("planes", [24, 48])
def test_thresholds_are_the_conditional_probabilities(planes):
    model = gb.Ising.lattice((4, 4), 0.37, 0.21).double()
    table = thresholds(*model.coupling_and_field(), planes)
    places = 2.0 ** -torch.arange(1, planes + 1, dtype=torch.float64)
    for count in range(5):
        x = torch.zeros(1, 4, 4, dtype=torch.float64)
        for r, c in [(0, 1), (1, 0), (1, 2), (2, 1)][:count]:
            x[0, r, c] = 1.0
        p = model.conditional_logits(x, slice(None))[0, 1, 1].sigmoid()
        assert abs(float(((-table[:, count]).double() * places).sum() - p)) < 2.0**-planes


def visits(kernel, model, steps, chains):
    """States of a 4 x 2 lattice by number, ``(steps, chains)``, after exact starts; and their law."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=torch.float64).view(-1, 4, 2)
    law = (-model.double()(states)).softmax(0)
    model.float()
    start = torch.multinomial(law, chains, replacement=True, generator=seeded(5))
    out = gb.sample(model, kernel, states[start].float(), steps=steps, rng=seeded(6), thin=1)
    index = (out.draws.flatten(2) @ 2.0 ** torch.arange(7, -1, -1.0)).long()
    return law, index


def assert_invariant(kernel):
    """Chi-square of the states after one and six steps from exact draws; false alarms 1 in 500."""
    law, index = visits(kernel, gb.Ising.lattice((4, 2), 0.25, 0.1), 6, chains=4000)
    for i in (0, 5):
        counts = torch.bincount(index[i], minlength=256).double()
        rare = law * 4000 < 5
        seen = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = 4000 * torch.cat((law[~rare], law[rare].sum()[None]))
        assert stats.chisquare(seen.numpy(), expected.numpy(), sum_check=False).pvalue > 1e-3


def test_the_boltzmann_law_is_left_as_it_is():
    assert_invariant(CheckerboardGibbs())


def test_wrong_thresholds_and_wrong_neighbours_are_caught(monkeypatch):
    right, neighbours = checkerboard.thresholds, checkerboard._neighbours
    monkeypatch.setattr(checkerboard, "thresholds", lambda j, h, planes: right(2.0 * j, h, planes))
    with pytest.raises(AssertionError):
        assert_invariant(CheckerboardGibbs())
    monkeypatch.setattr(checkerboard, "thresholds", right)
    monkeypatch.setattr(checkerboard, "_neighbours", lambda o, bits, colour: 2 * neighbours(o, bits, colour)[1:3])
    with pytest.raises(AssertionError):
        assert_invariant(CheckerboardGibbs())


def test_magnetisation_and_energy_are_those_of_block_gibbs():
    model, start = gb.Ising.lattice((16, 16), 0.3, 0.05), spins(400, 16, 16)
    out = [
        gb.sample(model, kernel, start, steps=steps, rng=seeded(1))
        for kernel, steps in ((CheckerboardGibbs(30), 1), (gb.BlockGibbs(), 30))
    ]
    for f in (lambda s: s.energy, lambda s: s.x.flatten(1).mean(1)):
        one, other = f(out[0].state).double(), f(out[1].state).double()
        error = math.sqrt(float(one.var() + other.var()) / 400)
        assert abs(float(one.mean() - other.mean())) < 4 * error
    torch.testing.assert_close(out[0].state.energy, model(out[0].x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_runs_are_one_and_steps_only_say_when_to_look(dtype):
    model, start = gb.Ising.lattice((8, 4), 0.4).to(dtype), spins(3, 8, 4, dtype=dtype)
    whole = gb.sample(model, CheckerboardGibbs(4), start, steps=5, rng=seeded(2))
    rng = seeded(2)
    first = gb.sample(model, CheckerboardGibbs(4), start, steps=2, rng=rng)
    assert torch.equal(gb.sample(model, CheckerboardGibbs(4), first.state, steps=3, rng=rng).x, whole.x)
    assert whole.x.dtype == dtype
    assert float(whole.acceptance.min()) == 1.0
    assert int(whole.nonfinite.sum()) == 0


@needs_compiler
def test_compiled_sweeps_are_eager_ones_to_the_bit():
    model, start = gb.Ising.lattice((128, 20), 0.4, 0.1), spins(2, 128, 20)
    runs = [
        gb.sample(model, CheckerboardGibbs(3), start, steps=2, rng=seeded(4), compile=compile)
        for compile in (False, True)
    ]
    assert torch.equal(runs[0].x, runs[1].x)
    torch.testing.assert_close(runs[0].state.energy, runs[1].state.energy, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    "model",
    [
        gb.Ising.lattice((4, 4), (0.1, 0.2)),
        gb.Ising.lattice((4, 4), 0.1, torch.arange(16.0).view(4, 4)),
        gb.Ising.lattice((4, 4), 0.1, periodic=False),
        gb.Ising.lattice((6, 4), 0.1),
        gb.Ising.lattice((4, 4, 4), 0.1),
    ],
)
def test_other_lattices_are_refused(model):
    with pytest.raises(OptionError, match="BlockGibbs"):
        gb.sample(model, CheckerboardGibbs(), spins(2, *model.event_shape), steps=1, rng=seeded())


def test_other_energies_other_states_and_no_sweeps_are_refused():
    with pytest.raises(OptionError, match="sweeps counts"):
        CheckerboardGibbs(0)
    with pytest.raises(ArgumentTypeError, match="BlockGibbs serves"):
        gb.sample(0.5 * gb.Ising.lattice((4, 4)), CheckerboardGibbs(), spins(2, 4, 4), steps=1, rng=seeded())
    model = gb.Ising.lattice((4, 4))
    stranger = gb.sample(model, gb.BlockGibbs(), spins(2, 4, 4), steps=1, rng=seeded()).state
    with pytest.raises(ArgumentTypeError, match="another kernel"):
        gb.sample(model, CheckerboardGibbs(), stranger, steps=1, rng=seeded())
