"""Proposals over internal coordinates: normalised, exact after weights, and from one side to the other."""

import dataclasses
import math

import pytest
import torch

from gibbsian.energies.base import Energy
from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.kernels.hmc import HMC
from gibbsian.kernels.jumps import Jumps
from gibbsian.molecules.boltzmann_draws import learn_proposal, weighted_draws
from gibbsian.molecules.internal_energy import InternalEnergy
from gibbsian.molecules.proposal import CartesianProposal
from gibbsian.molecules.proposal_training import ProposalTraining, fit_proposal
from gibbsian.molecules.rotors import free_rotors, relabelled
from gibbsian.molecules.zmatrix import coordinates_of_bonds
from gibbsian.partition.importance import importance_sampling
from gibbsian.sampling import sample

pytest.importorskip("zuko")

# A chain of five with a methyl group at its end: H3C-C-C-C.
BONDS = [(0, 1), (1, 2), (2, 3), (3, 4), (3, 5), (3, 6)]
INTERNAL = coordinates_of_bonds(7, BONDS, [False] * 4 + [True] * 3)
TORSION, ROTOR = (0, 1, 2, 3), next(row for row in INTERNAL.torsion_atoms if row[3] == 4)
AT, TURNS = INTERNAL.torsion(TORSION), INTERNAL.torsion(ROTOR)
DEPTH, TILT = 3.0, 0.8


def laws(z):
    """Energy in internal coordinates whose law is known: lengths and angles Gaussian, a torsion of two wells."""
    lengths, angles, torsions = INTERNAL.split(z)
    stiff = 0.5 * ((lengths - 0.15) / 0.004).square().sum(1) + 0.5 * ((angles - 1.9) / 0.06).square().sum(1)
    others = [i for i in range(torsions.shape[1]) if i not in (AT - 11, TURNS - 11)]
    means = torch.tensor([2.1, -2.1], dtype=z.dtype)
    stiff = stiff + 0.5 * ((torsions[:, others] - means) / 0.08).square().sum(1)
    t = z[:, AT]
    return stiff + DEPTH * (2 * t).cos() - TILT * t.sin() + 0.7 * (3 * z[:, TURNS]).cos()


ENERGY = Energy.of(laws, (15,))
GRID = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:-1]
WELLS = -DEPTH * (2 * GRID).cos() + TILT * GRID.sin()
RIGHT = float(WELLS.exp()[GRID > 0].sum() / WELLS.exp().sum())
ROOT = 0.5 * math.log(2 * math.pi)
LOG_Z = (
    6 * (ROOT + math.log(0.004))
    + 5 * (ROOT + math.log(0.06))
    + 2 * (ROOT + math.log(0.08))
    + float(WELLS.logsumexp(0) + (-0.7 * (3 * GRID).cos()).logsumexp(0)) + 2 * math.log(2 * math.pi / 4000)
)  # fmt: skip


def frames(n, seed=0):
    """Draws of the law with the torsion uniform instead: those of a perfect bias along it; and their weights."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.empty((n, 15), dtype=torch.float64)
    z[:, :6] = 0.15 + 0.004 * torch.randn((n, 6), generator=rng, dtype=z.dtype)
    z[:, 6:11] = 1.9 + 0.06 * torch.randn((n, 5), generator=rng, dtype=z.dtype)
    means = iter((2.1, -2.1))
    for i in range(11, 15):
        if i not in (AT, TURNS):
            z[:, i] = next(means) + 0.08 * torch.randn(n, generator=rng, dtype=z.dtype)
    z[:, AT] = math.pi * (2 * torch.rand(n, generator=rng, dtype=z.dtype) - 1)
    cell = torch.multinomial((-0.7 * (3 * GRID).cos()).exp(), n, replacement=True, generator=rng)
    z[:, TURNS] = GRID[cell]
    return z, (-DEPTH * (2 * z[:, AT]).cos() + TILT * z[:, AT].sin()).softmax(0)


@pytest.fixture(scope="module")
def fit():
    z, w = frames(3000)
    settings = ProposalTraining(components=4, transforms=2, hidden=(24,), steps=150, batch_size=256)
    return fit_proposal(INTERNAL, z, [TORSION], settings, weights=w, rng=torch.Generator().manual_seed(1))


def test_the_law_is_learned(fit):
    assert fit.proposal.rotors == [TURNS]
    assert fit.proposal.folds == [3]
    assert fit.validation <= fit.gaussian
    draws = weighted_draws(ENERGY, fit.proposal, 4000, rng=torch.Generator().manual_seed(2))
    assert draws.ess > 0.4
    # Both wells are drawn, and weights make them right; so they make log Z.
    found = draws.average(draws.z[:, AT] > 0)
    assert 0.05 < float((draws.z[:, AT] < 0).double().mean()) < 0.6
    assert abs(found.value - RIGHT) < 4 * found.stderr < 0.1
    assert abs(float(draws.log_z.value) - LOG_Z) < 4 * float(draws.log_z.stderr) < 0.3


def test_free_torsions_are_found_and_equal_hydrogens_change_names():
    z, _ = frames(500)
    assert dict(zip(*free_rotors(INTERNAL, z, []))) == {AT: 1, TURNS: 3}
    again = relabelled(INTERNAL, z, [TURNS], [3], torch.Generator().manual_seed(9))
    before, after = INTERNAL.cartesian(z), INTERNAL.cartesian(again)
    distances = [x[:, [4, 5, 6]].sub(x[:, :1]).norm(dim=2).sort(1).values for x in (before, after)]
    assert torch.allclose(*distances)
    changed = (INTERNAL.wrap(again - z)[:, TURNS].abs() > 1.0).double().mean()
    assert 0.5 < float(changed) < 0.8


def test_the_other_estimator_agrees(fit):
    found = importance_sampling(ENERGY, fit.proposal, draws=2000, rng=torch.Generator().manual_seed(3))
    assert abs(float(found.value) - LOG_Z) < 4 * float(found.stderr)


def test_a_twin_with_a_wrong_density_is_caught(fit):
    """One that counts the methyl group's symmetry twice has a log Z off by log 3."""

    class Twin(type(fit.proposal)):
        def forward(self, z):
            return super().forward(z) + math.log(3.0)

    twin = fit.proposal.__class__.__new__(Twin)
    twin.__dict__.update(fit.proposal.__dict__)
    found = importance_sampling(ENERGY, twin, draws=2000, rng=torch.Generator().manual_seed(3))
    assert abs(float(found.value) - LOG_Z) > 8 * float(found.stderr)


def test_torsions_count_modulo_a_turn(fit):
    z = fit.proposal.sample(50, torch.Generator().manual_seed(4))
    turned = z.clone()
    turned[:, 11:] += 2 * math.pi * torch.tensor([1.0, -1.0, 2.0, 0.0])
    assert torch.allclose(fit.proposal(turned), fit.proposal(z), atol=1e-6)


def test_cartesian_chains_jump_to_the_other_side(fit):
    """From one well, in which local moves stay; the energy of Cartesian coordinates has the same law."""

    class Physical(Energy):
        event_shape = torch.Size((7, 3))

        def forward(self, x):
            z = INTERNAL.of(x)
            return laws(z) + INTERNAL.log_det(z)

    energy, rng = Physical(), torch.Generator().manual_seed(5)
    z = fit.proposal.sample(3000, rng)
    start = INTERNAL.cartesian(z[z[:, AT] < 0][:100])
    kernel = Jumps(HMC(0.002, 3, jitter=0.3), CartesianProposal(fit.proposal), tries=2)
    out = sample(energy, kernel, start, steps=60, warmup=20, thin=2, rng=rng)
    right = (INTERNAL.of(out.draws.flatten(0, 1))[:, AT] > 0).double().reshape(20, -1).mean(0)
    assert abs(float(right.mean()) - RIGHT) < 4 * float(right.std()) / 10 < 0.2
    assert float(out.details["jump_acceptance"].mean()) > 0.4


def test_the_energy_and_the_proposal_name_the_same_volume(fit):
    """Importance over internal coordinates of the Cartesian energy: the two volume elements cancel."""
    cartesian = Energy.of(lambda x: laws(INTERNAL.of(x)) + INTERNAL.log_det(INTERNAL.of(x)), (7, 3))
    z = fit.proposal.sample(20, torch.Generator().manual_seed(6))
    assert torch.allclose(InternalEnergy(cartesian, INTERNAL)(z), laws(INTERNAL.wrap(z)), atol=1e-6)


def test_alanine_dipeptide_is_learned_from_a_few_frames():
    pytest.importorskip("openmm")
    from gibbsian.molecules.dipeptide import PHI, PSI
    from gibbsian.molecules.physical import MolecularEnergy
    from gibbsian.molecules.systems import alanine_dipeptide
    from gibbsian.molecules.zmatrix import internal_coordinates

    molecule, rng = alanine_dipeptide(), torch.Generator().manual_seed(7)
    energy, internal = MolecularEnergy(molecule), internal_coordinates(molecule)
    x = energy.start(150)
    settings = ProposalTraining(components=2, transforms=2, hidden=(16,), steps=20)
    learned = learn_proposal(energy, internal, x, [PHI, PSI], settings, rng=rng, trajectories=6, leapfrog=6)
    assert learned.evaluations == 150 * 36
    z = learned.fit.proposal.sample(20, rng)
    assert bool(internal.valid(z).all())
    # L-alanine stays L: the improper torsion of CB keeps its sign.
    beta = next(i for i, row in enumerate(internal.torsion_atoms) if row[3] == 10)
    sign = internal.split(internal.of(x[:1]))[2][0, beta].sign()
    assert bool((internal.split(z)[2][:, beta].sign() == sign).all())
    with pytest.raises(ShapeError, match="as many weights"):
        learn_proposal(energy, internal, x, [PHI, PSI], settings, rng=rng, weights=torch.ones(3))


def test_bad_input(fit):
    rng, (z, _) = torch.Generator().manual_seed(8), frames(400)
    with pytest.raises(DataError, match="too few"):
        fit_proposal(INTERNAL, z[:20], [TORSION], rng=rng)
    with pytest.raises(DataError, match="not finite"):
        fit_proposal(INTERNAL, z.masked_fill(z > 3, torch.nan), [TORSION], rng=rng)
    held = z.clone()
    held[:, 3] = 0.1
    with pytest.raises(DataError, match="1 bond lengths do not vary"):
        fit_proposal(INTERNAL, held, [TORSION], rng=rng)
    with pytest.raises(OptionError, match="none of the internal"):
        fit_proposal(INTERNAL, z, [(0, 3, 1, 2)], rng=rng)
    with pytest.raises(OptionError, match="2 or more"):
        weighted_draws(ENERGY, fit.proposal, 1, rng=rng)
    for wrong in ({"components": 0}, {"steps": -1}, {"validation": 1.0}, {"learning_rate": 0.0}, {"bins": 1}):
        with pytest.raises(OptionError, match=r"or more|between"):
            dataclasses.replace(ProposalTraining(), **wrong)
