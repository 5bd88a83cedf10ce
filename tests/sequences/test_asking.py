"""What is asked of a fitted family: contacts, mutations, draws, log-likelihoods, and its folder."""

import json
import math

import pytest
import torch

from gibbsian.energies.gauges import contact_scores, gauged, lattice_gas_gauge
from gibbsian.energies.pairwise import Potts
from gibbsian.errors import DataError, InputError, ModelFileError, OptionError, ShapeError
from gibbsian.sequences.contacts import Structure, precision, read_structure
from gibbsian.sequences.draws import draw_family
from gibbsian.sequences.family import Family, FamilyInfo, load_family, save_family
from gibbsian.sequences.fitting import consensus, fit_family
from gibbsian.sequences.frequencies import agreement, statistics
from gibbsian.sequences.likelihood import family_log_z, independent_log_prob
from gibbsian.sequences.machines import machine_of
from gibbsian.sequences.memory import MEGABYTE, check_memory, memory_available, memory_needed
from gibbsian.sequences.mutations import double_mutations, single_mutations, strongest
from gibbsian.sequences.settings import FamilySettings
from protein_families import ALPHABET, alignment, drawn, every, hot, law, small_potts

SITES, LETTERS = 5, 3


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def family_of(energy, by="pseudo-likelihood", hidden=0):
    info = FamilyInfo(ALPHABET, SITES, by, 10, 10.0, "ACACA", hidden=hidden)
    shares = torch.full((SITES, LETTERS), 1 / LETTERS)
    couplings = energy if isinstance(energy, Potts) else small_potts(SITES).float()
    return Family(energy, shares, couplings, info)


def trainable(energy):
    dense = Potts.dense(SITES, LETTERS)
    with torch.no_grad():
        i, _, between = energy.interaction.pairs()
        assert len(i) == SITES * (SITES - 1) // 2
        dense.interaction.pairs_above.copy_(between)
        dense.field.copy_(energy.field)
    return dense.requires_grad_(False)


def structure(columns, near):
    d = torch.full((columns, columns), 20.0)
    for i, j in near:
        d[i, j] = d[j, i] = 5.0
    return Structure(d.fill_diagonal_(math.nan))


def test_precision_counts_the_first_pairs():
    scores = torch.zeros((6, 6))
    for rank, (i, j) in enumerate([(0, 5), (0, 2), (1, 3), (0, 3)]):
        scores[i, j] = scores[j, i] = 10.0 - rank
    # Neighbours at 0 and 1 touch, and do not count.
    found = precision(scores, structure(6, [(0, 5), (1, 3), (0, 1)]), separation=2)
    assert found.curve[:4].tolist() == pytest.approx([1.0, 1 / 2, 2 / 3, 2 / 4])
    assert (len(found.curve), found.contacts, found.base_rate) == (10, 2, 0.2)
    assert found.marks == {"L/2": 3, "L": 6, "2L": 12}
    assert found.at(3) == pytest.approx(2 / 3)
    assert found.stderr(3) == pytest.approx(math.sqrt(4 / 7 * 3 / 7 / 7))
    assert found.stderr(1) > 0.1
    # More pairs than there are: all of them, whose precision is the base rate.
    assert found.at(12) == found.base_rate


def test_pairs_without_a_distance_are_left_out():
    near = structure(6, [(0, 5)])
    near.distances[0, 4] = near.distances[4, 0] = math.nan
    assert len(precision(torch.zeros((6, 6)), near, separation=4).curve) == 2
    with pytest.raises(OptionError, match="lower the separation"):
        precision(torch.zeros((6, 6)), near, separation=6)
    with pytest.raises(OptionError, match="1 or more"):
        precision(torch.zeros((6, 6)), near, separation=0)
    with pytest.raises(ShapeError, match="other columns"):
        precision(torch.zeros((5, 5)), near)


def test_a_structure_is_read(tmp_path):
    path = tmp_path / "structure.dat"
    path.write_text("# i j score distance\n1.0e0 3 0.5 7.5\n2,3,x,9\n")
    found = read_structure(path, 3).distances
    assert found[0, 2] == found[2, 0] == 7.5
    assert found[1, 2] == 9.0
    assert math.isnan(found[0, 1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 4 0 5", r"columns 1 and 4 of an alignment of 3"),
        ("0 2 0 5", "counted from 1"),
        ("1 1 0 5", "a column and itself"),
        ("1 2 0 -3", "distance of -3"),
        ("1 2 0 nan", "distances are above 0"),
        ("1.5 2 0 3", "'i j value distance'"),
        ("words", "'i j value distance'"),
        ("1 2 0 3\n2 1 0 4", "3 angstroms apart before"),
        ("# nothing", "holds no distance"),
    ],
)
def test_a_structure_that_is_wrong_is_told(tmp_path, line, message):
    path = tmp_path / "structure.dat"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_structure(path, 3)
    with pytest.raises(DataError, match="cannot be read"):
        read_structure(tmp_path / "none.dat", 3)


def test_contacts_and_mutations_are_the_same_in_every_gauge():
    energy = small_potts(SITES)
    sequence = torch.tensor([0, 2, 1, 1, 0])
    weights = torch.rand(energy.field.shape, generator=rng(), dtype=torch.float64)
    for other in (lattice_gas_gauge(energy), gauged(energy, weights / weights.sum(-1, keepdim=True))):
        assert float((other.field - energy.field).abs().max()) > 0.1
        assert torch.allclose(contact_scores(other), contact_scores(energy), atol=1e-10)
        assert torch.allclose(
            single_mutations(other, sequence, LETTERS), single_mutations(energy, sequence, LETTERS), atol=1e-10
        )
        a, b = (double_mutations(e, sequence, LETTERS) for e in (other, energy))
        assert torch.allclose(a.effects, b.effects, atol=1e-10)
        assert torch.allclose(a.epistasis, b.epistasis, atol=1e-10)


def test_norms_without_a_gauge_are_not_invariant():
    """A broken twin of contacts: the norm of couplings as they are."""
    energy = small_potts(SITES)
    norm = lambda e: e.interaction.dense().square().sum((1, 3)).sqrt()  # noqa: E731
    assert float((norm(lattice_gas_gauge(energy)) - norm(energy)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["potts", "machine"])
def test_mutations_are_ratios_of_probabilities(kind):
    energy = small_potts(SITES).float()
    if kind == "machine":
        energy = machine_of(SITES, LETTERS, 4, rng()).requires_grad_(False)
        energy.weight.mul_(50.0)
    codes = every(SITES, LETTERS)
    logs = -energy(hot(codes, LETTERS, torch.float32)).double().view((LETTERS,) * SITES)
    own = (0, 2, 1, 1, 0)
    sequence = torch.tensor(own)
    single = single_mutations(energy, sequence, LETTERS)
    double = double_mutations(energy, sequence, LETTERS)

    def log_p(changes):
        return float(logs[tuple(changes.get(i, a) for i, a in enumerate(own))])

    for i in range(SITES):
        for a in range(LETTERS):
            assert float(single[i, a]) == pytest.approx(log_p({i: a}) - log_p({}), abs=1e-5)
    pairs = torch.triu_indices(SITES, SITES, 1).T.tolist()
    for k, (i, j) in enumerate(pairs):
        for a in range(LETTERS):
            for b in range(LETTERS):
                effect = log_p({i: a, j: b}) - log_p({})
                assert float(double.effects[k, a, b]) == pytest.approx(effect, abs=1e-5)
                expected = effect - float(single[i, a]) - float(single[j, b])
                assert float(double.epistasis[k, a, b]) == pytest.approx(expected, abs=2e-5)


def test_the_strongest_double_mutations_change_both_letters():
    sequence = torch.tensor([0, 2, 1, 1, 0])
    found = double_mutations(small_potts(SITES).float(), sequence, LETTERS)
    i, j, a, b = strongest(found, sequence, 1000)
    assert len(i) == 10 * 4
    assert bool((a != sequence[i]).all() and (b != sequence[j]).all() and (i < j).all())
    pair = {tuple(p): k for k, p in enumerate(torch.triu_indices(SITES, SITES, 1).T.tolist())}
    size = [abs(float(found.epistasis[pair[int(x), int(y)], p, q])) for x, y, p, q in zip(i, j, a, b)]
    assert size == sorted(size, reverse=True)


def test_mutations_of_another_length_are_refused():
    with pytest.raises(ShapeError, match="columns and letters"):
        single_mutations(small_potts(SITES), torch.zeros(4, dtype=torch.int64), LETTERS)


@pytest.mark.parametrize("kind", ["potts", "machine"])
def test_draws_are_those_of_the_model_and_say_that_they_have_mixed(kind):
    energy = trainable(small_potts(SITES).float())
    family = family_of(energy)
    if kind == "machine":
        energy = machine_of(SITES, LETTERS, 4, rng()).requires_grad_(False)
        energy.weight.mul_(50.0)
        family = family_of(energy, "rbm", 4)
    codes = every(SITES, LETTERS)
    p = (-family.energies(codes)).double().softmax(0)
    steps = []
    start = torch.zeros((3, SITES), dtype=torch.int64)
    found = draw_family(family, 9000, rng(), sweeps=40, start=start, progress=steps.append)
    assert sum(steps) == 3 * 40
    assert found.codes.shape == (9000, SITES)
    assert torch.allclose(found.energies, family.energies(found.codes), atol=1e-4)
    assert found.r_hat < 1.01
    assert found.mixed
    assert found.autocorrelation < 4.0
    assert found.trace.shape == (40, 2)
    assert agreement(statistics(codes, LETTERS, p), statistics(found.codes, LETTERS)).connected > 0.97


def test_chains_that_stay_where_they_start_are_seen():
    # One letter everywhere or another: nothing in between.
    strong = 3.0 * torch.eye(LETTERS)[None, :, None, :].expand(SITES, LETTERS, SITES, LETTERS).clone()
    own = torch.arange(SITES)
    strong[own, :, own, :] = 0.0
    tilted = Potts(strong, field=torch.tensor([1.0, 0.0, 0.0]).expand(SITES, LETTERS))
    shares = torch.tensor([0.01, 0.98, 0.01]).expand(SITES, LETTERS)
    family = Family(tilted, shares, tilted, family_of(tilted).info)
    found = draw_family(family, 100, rng(), sweeps=20, start=torch.zeros((1, SITES), dtype=torch.int64))
    assert found.r_hat > 1.5
    assert not found.mixed


def test_few_chains_are_called_mixed_as_often_as_they_are():
    family = family_of(trainable(small_potts(SITES).float()))
    start = torch.zeros((1, SITES), dtype=torch.int64)
    found = [draw_family(family, 60, rng(seed), sweeps=30, start=start).mixed for seed in range(40)]
    assert sum(found) > 32


def test_too_few_draws_are_refused():
    with pytest.raises(OptionError, match="8 or more each"):
        draw_family(family_of(small_potts(SITES).float()), 2, rng())


@pytest.mark.parametrize("kind", ["potts", "machine"])
def test_log_likelihoods_are_those_of_enumeration(kind):
    energy, by = trainable(small_potts(SITES).float()), "pseudo-likelihood"
    if kind == "machine":
        energy, by = machine_of(SITES, LETTERS, 4, rng()).requires_grad_(False), "rbm"
        energy.weight.mul_(50.0)
    family = family_of(energy, by, 4)
    codes = every(SITES, LETTERS)
    exact = float((-family.energies(codes)).double().logsumexp(0))
    draws = codes[torch.multinomial((-family.energies(codes)).softmax(0), 400, True, generator=rng())]
    found = family_log_z(family, draws, rng(), temperatures=100)
    assert float(found.lower) <= exact <= float(found.upper)
    assert abs(float(found.value) - exact) < 4 * float(found.stderr)
    assert float(independent_log_prob(family, codes).double().logsumexp(0)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("by", ["pseudo-likelihood", "rbm"])
def test_a_saved_family_is_the_same(tmp_path, by):
    found = alignment(small_potts(SITES), 200)
    family = fit_family(found, FamilySettings(by, steps=5, chains=100, hidden=3), rng=rng(), reference="s3")
    again = load_family(save_family(tmp_path / "family", family))
    codes = every(SITES, LETTERS)
    assert torch.equal(again.energies(codes), family.energies(codes))
    assert torch.equal(again.contacts(), family.contacts())
    assert again.info == family.info
    assert again.info.reference == found.text(3)
    assert torch.equal(again.mutations(), family.mutations())
    assert again.decode(again.encode(["ACACA"])) == ["ACACA"]
    with pytest.raises(DataError, match="5 aligned columns; these sequences have 2"):
        again.encode(["AC"])


def test_a_damaged_folder_is_told(tmp_path):
    with pytest.raises(ModelFileError, match="gibbsian protein family ALIGNMENT"):
        load_family(tmp_path)
    family = family_of(trainable(small_potts(SITES).float()))
    save_family(tmp_path, family)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-20])
    with pytest.raises(ModelFileError, match="is damaged"):
        load_family(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    told = json.loads((tmp_path / "family.json").read_text())
    (tmp_path / "family.json").write_text(json.dumps(told | {"version": 99}))
    with pytest.raises(ModelFileError, match="another version"):
        load_family(tmp_path)
    (tmp_path / "family.json").write_text(json.dumps(told | {"columns": 4}))
    with pytest.raises(ModelFileError, match="is damaged"):
        load_family(tmp_path)


def test_the_consensus_has_no_gaps():
    codes = drawn(small_potts(SITES), 20)
    codes[:, 0] = 0
    codes[3, 0] = 2
    found = alignment(small_potts(SITES), 20)
    found = type(found)(found.alphabet, found.names, codes, found.weights)
    assert int(consensus(found)[0]) == 2


@pytest.mark.parametrize("by", ["pseudo-likelihood", "boltzmann", "rbm"])
def test_memory_grows_with_columns_and_is_checked(by):
    small, large = (memory_needed(by, 1000, columns, 21) for columns in (50, 400))
    assert small < large
    assert small > 300 * MEGABYTE
    check_memory(small, small)
    with pytest.raises(InputError, match=r"takes about .* MB, and 1 MB are free.*--focus"):
        check_memory(small, MEGABYTE)
    assert memory_available() is None or memory_available() > 0


def test_the_law_of_small_families_is_normalised():
    assert float(law(small_potts(SITES))[1].sum()) == pytest.approx(1.0)
