"""Torsions against mdtraj's, coordinates from torsions and back, superposition, fluctuations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

md = pytest.importorskip("mdtraj", reason="mdtraj is not installed")
app = pytest.importorskip("openmm.app", reason="OpenMM is not installed")

from gibbsian.energies.periodic import TURN  # noqa: E402
from gibbsian.errors import DataError, OptionError, ShapeError  # noqa: E402
from gibbsian.molecules.backmapping import build_conformations, nearest_frames, turnable, with_torsions  # noqa: E402
from gibbsian.molecules.features import (  # noqa: E402
    aligned,
    distances,
    fluctuations,
    residue_pairs,
    superposed,
    torsion_angles,
    torsions,
)
from gibbsian.molecules.frames import check_frames  # noqa: E402

PDB = Path(app.__file__).parent / "data" / "test.pdb"


@pytest.fixture(scope="module")
def villin():
    whole = md.load(str(PDB))
    one = whole.atom_slice(whole.topology.select("protein"))
    noise = np.random.default_rng(0).normal(0.0, 0.01, (6, one.n_atoms, 3))
    return md.Trajectory((one.xyz + noise).astype(np.float32), one.topology)


def gap(a, b):
    return float(TURN.wrap(a - b).abs().max())


def test_torsions_are_mdtraj_s_with_names(villin):
    found = torsions(villin, ("phi", "psi", "chi1"))
    for kind in ("phi", "psi", "chi1"):
        _, want = getattr(md, f"compute_{kind}")(villin)
        mine = found.angles[:, [n.startswith(kind) for n in found.names]]
        assert gap(mine, torch.as_tensor(want)) < 1e-4
    assert bool(TURN.check(found.angles).all())
    assert found.names[:4] == ("psi LEU1", "chi1 LEU1", "phi SER2", "psi SER2")
    assert found.pairs()["SER2"] == (2, 3)
    assert "LEU1" not in found.pairs()
    two = torsions(villin, residues=(10, 11))
    assert two.names == ("phi PHE10", "psi PHE10", "phi GLY11", "psi GLY11")


def test_a_mirror_image_has_torsions_of_the_other_sign(villin):
    found = torsions(villin)
    assert gap(torsion_angles(villin.xyz * np.float32([-1, 1, 1]), found.atoms), -found.angles) < 1e-5


def test_torsions_that_are_not_there_are_refused(villin):
    with pytest.raises(DataError, match=r"no torsion phi, psi in residues 99, of a molecule of the residues LEU1"):
        torsions(villin, residues=(99,))
    with pytest.raises(OptionError, match="kind of torsion named 'chi'"):
        torsions(villin, ("chi",))
    with pytest.raises(ShapeError, match=r"\(k, 2\)"):
        distances(villin, [[1, 2, 3]])


def test_torsions_turn_to_what_is_asked_and_nothing_else_changes(villin):
    found = torsions(villin, ("phi", "psi", "omega", "chi1", "chi2"))
    good = turnable(villin.topology, found.atoms)
    assert [n for n, fine in zip(found.names, good) if not fine] == ["phi PRO21", "chi1 PRO21", "chi2 PRO21"]
    atoms = found.atoms[good]
    wanted = TURN.wrap(7.0 * torch.rand(6, len(atoms), generator=torch.Generator().manual_seed(0)))
    built = with_torsions(villin, atoms, wanted)
    assert gap(torsion_angles(built.xyz, atoms), wanted) < 1e-4
    bonds = np.array([(a.index, b.index) for a, b in villin.topology.bonds])
    np.testing.assert_allclose(distances(built, bonds), distances(villin, bonds), atol=1e-5)
    before, after = check_frames(villin), check_frames(built)
    np.testing.assert_array_equal(after.inverted, before.inverted)
    # A broken twin: turned by the wrong hand, the angles are missed.
    here = torsion_angles(villin.xyz, atoms[:1])
    twin = with_torsions(villin, atoms[:1], TURN.wrap(2 * here - wanted[:, :1]))
    assert gap(torsion_angles(twin.xyz, atoms[:1]), wanted[:, :1]) > 0.1


def test_bonds_in_rings_and_wrong_shapes_are_refused(villin):
    found = torsions(villin, ("phi",), residues=(21,))
    with pytest.raises(DataError, match=r"bond PRO21-N-PRO21-CA is in a ring"):
        with_torsions(villin, found.atoms, found.angles)
    with pytest.raises(ShapeError, match="as many angles"):
        with_torsions(villin, found.atoms, found.angles[:2])


def test_conformations_are_built_upon_the_nearest_frame(villin):
    found = torsions(villin, residues=(10,))
    assert nearest_frames(found.angles + 2 * math.pi, found.angles).tolist() == list(range(6))
    built = build_conformations(villin, found.atoms, found.angles[[3, 1]])
    np.testing.assert_allclose(built.xyz, villin.xyz[[3, 1]], atol=1e-5)


def test_superposition_undoes_rigid_motions_and_never_reflects():
    g = torch.Generator().manual_seed(0)
    y = torch.randn(12, 3, generator=g, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(5, 3, 3, generator=g, dtype=torch.float64))
    q = q * torch.linalg.det(q).sign()[:, None, None]
    moved = y @ q + torch.randn(5, 1, 3, generator=g, dtype=torch.float64)
    torch.testing.assert_close(superposed(moved, y), y.expand(5, -1, -1), rtol=0, atol=1e-10)
    mirror = y * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert float((superposed(mirror[None], y)[0] - y).square().mean().sqrt()) > 0.1


def test_aligned_coordinates_and_fluctuations(villin):
    ca = villin.topology.select("name CA")
    x = aligned(villin, atoms=ca)
    assert x.shape == (6, 35, 3)
    np.testing.assert_allclose(x[0], villin.xyz[0, ca], atol=1e-5)
    rms = md.rmsd(villin, villin, 0, atom_indices=ca)
    np.testing.assert_allclose((x - x[0]).square().sum(2).mean(1).sqrt(), rms, atol=1e-4)
    # Jitter of 0.01 nm along each axis, of which superposition and the mean take a little out.
    assert 0.8 < float(fluctuations(villin).mean()) / (0.01 * math.sqrt(3) * math.sqrt(5 / 6)) < 1.02
    assert len(residue_pairs(villin.topology, 3)) == 35 * 34 // 2 - 34 - 33
    with pytest.raises(DataError, match="No atom is named 'CX'"):
        fluctuations(villin, "CX")
