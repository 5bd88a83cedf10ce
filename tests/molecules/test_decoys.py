"""Ranking of decoys: areas under the curve that are known, and decoys that keep bonds and angles."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gibbsian.errors import DataError, OptionError
from gibbsian.molecules.decoys import perturbed, rank_decoys


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_areas_are_those_of_normal_energies():
    native = torch.randn(4000, generator=rng())
    found = rank_decoys(native, {"near": torch.randn(4000, generator=rng(1)) + 1.0, "far": native + 50.0}, rng=rng(2))
    known = float(torch.special.ndtr(torch.tensor(1.0 / 2**0.5)))
    assert abs(found.areas["near"].value - known) < 4 * found.areas["near"].stderr
    assert found.areas["far"].value == 1.0
    assert abs(found.areas["all"].value - 0.5 * (known + 1.0)) < 0.02
    table = found.table()
    assert len(table) == 12_000
    assert table["energy_kt"].is_monotonic_increasing
    assert set(table["kind"]) == {"native", "near", "far"}
    # A broken twin: the sign of the energy.
    assert rank_decoys(-native, {"far": -found.decoys["far"]}, rng=rng(2)).areas["far"].value == 0.0


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(DataError, match="one of them is empty"):
        rank_decoys(torch.zeros(3), {"none": torch.zeros(0)}, rng=rng())
    with pytest.raises(OptionError, match="may not be called"):
        rank_decoys(torch.zeros(3), {"all": torch.zeros(2)}, rng=rng())


def test_perturbed_frames_keep_bonds_and_lose_their_torsions():
    md = pytest.importorskip("mdtraj", reason="mdtraj is not installed")
    app = pytest.importorskip("openmm.app", reason="OpenMM is not installed")
    from gibbsian.molecules.features import torsions
    from gibbsian.molecules.geometry import bond_lengths

    villin = md.load(str(Path(app.__file__).parent / "data" / "test.pdb"))
    villin = villin.atom_slice(villin.topology.select("protein"))
    found = perturbed(villin[[0] * 4], 10.0, rng=rng())
    np.testing.assert_allclose(bond_lengths(found), bond_lengths(villin).repeat(4, 0), atol=1e-4)
    gap = torch.rad2deg(torsions(found).angles - torsions(villin).angles)
    gap = torch.remainder(gap + 180.0, 360.0) - 180.0
    turned = gap[:, gap.abs().amax(0) > 1e-2]
    assert turned.shape[1] == gap.shape[1] - 1  # phi of proline stays
    assert 9.0 < float(turned.std()) < 11.0
    with pytest.raises(OptionError, match="positive"):
        perturbed(villin, 0.0, rng=rng())
