"""Reading: every format gives the same atoms and coordinates, and what cannot be right is refused with its remedy."""

import sys
from pathlib import Path

import numpy as np
import pytest

md = pytest.importorskip("mdtraj", reason="mdtraj is not installed")
app = pytest.importorskip("openmm.app", reason="OpenMM is not installed")

from gibbsian.errors import DataError, MissingPackageError, OptionError  # noqa: E402
from gibbsian.molecules.frames import check_frames, chirality  # noqa: E402
from gibbsian.molecules.topologies import read_topology  # noqa: E402
from gibbsian.molecules.trajectories import read_trajectory, trajectory_chunks  # noqa: E402

PDB = Path(app.__file__).parent / "data" / "test.pdb"


@pytest.fixture(scope="module")
def piece():
    """Five residues of villin headpiece, jittered into a short trajectory."""
    whole = md.load(str(PDB))
    one = whole.atom_slice(whole.topology.select("resid 3 to 7"))
    noise = np.random.default_rng(0).normal(0.0, 0.003, (25, one.n_atoms, 3))
    return md.Trajectory((one.xyz + noise).astype(np.float32), one.topology, time=np.arange(25))


@pytest.fixture
def files(piece, tmp_path):
    """The same frames in each format, with a topology."""
    piece[0].save_pdb(str(tmp_path / "top.pdb"))
    for ending in ("dcd", "xtc", "trr", "nc"):
        getattr(piece, {"nc": "save_netcdf"}.get(ending, f"save_{ending}"))(str(tmp_path / f"traj.{ending}"))
    return tmp_path


@pytest.mark.parametrize("ending", ["dcd", "xtc", "trr", "nc"])
def test_formats_agree(files, piece, ending):
    found = read_trajectory(files / f"traj.{ending}", files / "top.pdb")
    assert found.n_atoms == piece.n_atoms
    np.testing.assert_allclose(found.xyz, piece.xyz, atol=6e-4)


@pytest.mark.parametrize("ending", ["pdb", "cif", "gro"])
def test_structures_hold_their_own_topology(files, piece, ending):
    if ending == "cif":
        with open(files / "models.cif", "w") as file:
            topology = piece.topology.to_openmm()
            app.PDBxFile.writeFile(topology, piece.openmm_positions(0), file)
    else:
        getattr(piece[:3], f"save_{ending}")(str(files / f"models.{ending}"))
    found = read_trajectory(files / f"models.{ending}")
    assert len(found) == {"pdb": 3, "gro": 3, "cif": 1}[ending]
    np.testing.assert_allclose(found.xyz[0], piece.xyz[0], atol=2e-3)
    assert found.topology.n_bonds == piece.topology.n_bonds


def test_amber_and_gromacs_topologies(tmp_path):
    """An ion of two kinds, in the least that AMBER and GROMACS ask for."""
    top = tmp_path / "ions.top"
    top.write_text(
        "[ defaults ]\n1 2 yes 0.5 0.8333\n[ atomtypes ]\nNA 11 22.99 0.0 A 0.33 0.01\nCL 17 35.45 0.0 A 0.44 0.4\n"
        "[ moleculetype ]\nNA 1\n[ atoms ]\n1 NA 1 NA NA 1 1.0\n"
        "[ moleculetype ]\nCL 1\n[ atoms ]\n1 CL 1 CL CL 1 -1.0\n"
        "[ system ]\nions\n[ molecules ]\nNA 2\nCL 1\n"
    )
    assert [a.name for a in read_topology(top).atoms] == ["NA", "NA", "CL"]
    flag = lambda name, form, body: f"%FLAG {name:<75}\n%FORMAT({form}){'':<66}\n{body}\n"  # noqa: E731
    pointers = [0] * 31
    pointers[0], pointers[1], pointers[11], pointers[27] = 2, 2, 2, 0
    rows = ["".join(f"{p:8d}" for p in pointers[i : i + 10]) for i in range(0, 31, 10)]
    prmtop = (
        "%VERSION  VERSION_STAMP = V0001.000  DATE = 01/01/00  00:00:00\n"
        + flag("TITLE", "20a4", "ions")
        + flag("POINTERS", "10I8", "\n".join(rows))
        + flag("ATOM_NAME", "20a4", "NA  CL  ")
        + flag("MASS", "5E16.8", f"{22.99:16.8E}{35.45:16.8E}")
        + flag("ATOMIC_NUMBER", "10I8", f"{11:8d}{17:8d}")
        + flag("RESIDUE_LABEL", "20a4", "NA  CL  ")
        + flag("RESIDUE_POINTER", "10I8", f"{1:8d}{2:8d}")
        + flag("BONDS_INC_HYDROGEN", "10I8", "")
        + flag("BONDS_WITHOUT_HYDROGEN", "10I8", "")
    )
    for name in ("ions.prmtop", "amber.top"):
        (tmp_path / name).write_text(prmtop)
        assert [a.name for a in read_topology(tmp_path / name).atoms] == ["NA", "CL"]


def test_chunks_strides_and_selections(files, piece):
    parts = list(trajectory_chunks(files / "traj.dcd", files / "top.pdb", chunk=4, stride=2))
    assert sum(len(p) for p in parts) == 13
    assert max(len(p) for p in parts) <= 4
    joined = np.concatenate([p.xyz for p in parts])
    np.testing.assert_allclose(joined, piece.xyz[::2], atol=1e-5)
    seen = []
    both = read_trajectory([files / "traj.dcd"] * 2, files / "top.pdb", atoms="name CA", progress=seen.append)
    assert both.xyz.shape == (50, 5, 3)
    assert sum(seen) == 50


def test_reading_prints_nothing(files, capfd):
    read_trajectory(files / "traj.dcd", files / "top.pdb")
    out, err = capfd.readouterr()
    assert out == err == ""


def changed(piece, path, xyz, **rest):
    md.Trajectory(xyz.astype(np.float32), piece.topology, time=np.arange(len(xyz)), **rest).save_trr(str(path))
    return path


def refused(words, *arguments, error=DataError, **options):
    with pytest.raises(error, match=words):
        read_trajectory(*arguments, **options)


def test_another_topology_is_refused(files, piece):
    piece.atom_slice(range(10))[0].save_pdb(str(files / "short.pdb"))
    refused(r"does not match its topology: it has \d+ atoms", files / "traj.dcd", files / "short.pdb", incomplete=True)
    refused(r"as many as the protein's", files / "part.dcd", whole_with(piece, files))


def whole_with(piece, files):
    """A topology with two waters, and a trajectory without them."""
    top = piece.topology.copy()
    chain = top.add_chain()
    for i in range(2):
        residue = top.add_residue("HOH", chain, resSeq=900 + i)
        top.add_atom("O", md.element.oxygen, residue)
    piece.save_dcd(str(files / "part.dcd"))
    return top


def test_missing_chains_are_named(files, piece):
    two = piece.topology.join(piece.topology)
    piece.save_dcd(str(files / "one.dcd"))
    refused("those of the first 1 chains: the rest is missing", files / "one.dcd", two)
    refused(
        "chainid 7.*picks none.*chain 0 of", files / "one.dcd", piece.topology, atoms="chainid 7", error=OptionError
    )
    refused("cannot be read as a selection", files / "one.dcd", piece.topology, atoms="name ~~", error=OptionError)


def test_another_order_of_the_atoms_is_refused(files, piece):
    order = np.random.default_rng(1).permutation(piece.n_atoms)
    path = changed(piece, files / "order.trr", piece.xyz[:, order])
    refused("their order does not", path, files / "top.pdb")


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_mistaken_units_are_told_by_bond_lengths(files, piece, factor):
    path = changed(piece, files / "unit.trr", factor * piece.xyz)
    refused("The unit of .* is mistaken.*angstrom" if factor > 1 else "ten times too large", path, files / "top.pdb")
    if factor > 1:
        found = read_trajectory(path, files / "top.pdb", unit="angstrom")
        np.testing.assert_allclose(found.xyz, piece.xyz, atol=1e-5)


def test_stretched_molecules_are_no_mistaken_unit(files, piece):
    path = changed(piece, files / "warm.trr", 1.15 * piece.xyz)
    assert len(read_trajectory(path, files / "top.pdb")) == 25


def test_coordinates_that_are_not_finite_are_refused_with_their_frame(files, piece):
    xyz = piece.xyz.copy()
    xyz[14, 3] = np.nan
    path = changed(piece, files / "nan.trr", xyz)
    refused("not finite in 1 of 25 frames, first in frame 14", path, files / "top.pdb")
    refused("first in frame 14", path, files / "top.pdb", stride=2)


def test_missing_atoms_and_gaps_are_refused(files, piece):
    lacks = piece.atom_slice([a.index for a in piece.topology.atoms if not (a.residue.index == 2 and a.name == "CA")])
    lacks[0].save_pdb(str(files / "lacks.pdb"))
    refused("missing atoms: .* lacks CA", files / "lacks.pdb")
    assert read_trajectory(files / "lacks.pdb", incomplete=True).n_atoms == piece.n_atoms - 1
    gap = piece.atom_slice([a.index for a in piece.topology.atoms if a.residue.index not in (1, 2)])
    gap[0].save_pdb(str(files / "gap.pdb"))
    refused("chains with gaps, of residues: 2 between GLU4 and LYS7", files / "gap.pdb")
    assert read_trajectory(files / "gap.pdb", incomplete=True).topology.n_bonds == gap.topology.n_bonds


def split(piece, box):
    """Wrap atoms into a box whose wall goes through the molecule."""
    xyz = piece.xyz - piece.xyz[0].mean(0)
    return xyz - box * np.floor(xyz / box)


def test_molecules_split_by_a_box_are_made_whole_or_refused(files, piece):
    box = 3.0
    sizes = {"unitcell_lengths": np.full((25, 3), box), "unitcell_angles": np.full((25, 3), 90.0)}
    path = changed(piece, files / "boxed.trr", split(piece, box), **sizes)
    found = read_trajectory(path, files / "top.pdb")
    want = md.compute_distances(piece, [[0, piece.n_atoms - 1]])
    np.testing.assert_allclose(md.compute_distances(found, [[0, piece.n_atoms - 1]], periodic=False), want, atol=1e-4)
    path = changed(piece, files / "split.trr", split(piece, box))
    refused("split.*holds no box to make them whole by.*-pbc whole", path, files / "top.pdb")


def test_files_that_are_not_there_cut_off_or_of_no_kind(files):
    refused("There is no file", files / "none.dcd", files / "top.pdb")
    content = (files / "traj.trr").read_bytes()
    (files / "cut.trr").write_bytes(content[: len(content) // 2 + 7])
    refused("cannot be read", files / "cut.trr", files / "top.pdb")
    content = (files / "traj.dcd").read_bytes()
    (files / "cut.dcd").write_bytes(content[: len(content) // 2])
    with pytest.warns(RuntimeWarning, match="cut off: its head tells of 25 frames, and 12 are there"):
        assert len(read_trajectory(files / "cut.dcd", files / "top.pdb")) == 12
    (files / "junk.dcd").write_bytes(b"no trajectory at all")
    refused("cannot be read", files / "junk.dcd", files / "top.pdb")
    refused("holds coordinates alone", files / "traj.dcd", error=OptionError)
    refused("is no topology", files / "traj.dcd", files / "traj.dcd", error=OptionError)
    (files / "junk.pdb").write_text("nothing\n")
    refused("(holds no atoms|cannot be read)", files / "junk.pdb")
    refused("unit is", files / "traj.dcd", files / "top.pdb", unit="inch", error=OptionError)
    refused("stride", files / "traj.dcd", files / "top.pdb", stride=0, error=OptionError)


def test_without_mdtraj_the_line_that_installs_it_is_told(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "mdtraj", None)
    refused("pip install 'gibbsian\\[protein\\]'", files / "traj.dcd", files / "top.pdb", error=MissingPackageError)


def test_unphysical_frames_are_found_one_by_one(piece):
    assert check_frames(piece).physical.all()
    assert "All 25 frames" in str(check_frames(piece))
    xyz = piece.xyz.copy()
    sites = [a.index for a in piece.topology.atoms if a.name == "CA"]
    xyz[3, sites[0]] += 0.2  # a bond out of its length
    last = [a.index for a in piece.topology.residue(4).atoms]
    xyz[5, last] += xyz[5, sites[0]] - xyz[5, sites[4]] + 0.05  # a residue in another one's place
    xyz[7] *= [1, 1, -1]  # the mirror image
    found = check_frames(md.Trajectory(xyz, piece.topology))
    assert np.flatnonzero(~found.physical).tolist() == [3, 5, 7]
    assert found.bond_error[3] > 0.35
    assert found.clashes[5] > 0
    assert found.inverted[7] == 5
    assert found.bond_error[7] < 0.35
    assert list(found.table().columns) == ["bond_error", "clashes", "inverted", "physical"]
    assert "3 of 25 frames are unphysical" in str(found)
    with pytest.raises(OptionError, match="positive"):
        check_frames(piece, clash_distance=0.0)


def test_chirality_changes_sign_in_a_mirror():
    xyz = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]], dtype=float)
    site = np.array([[0, 1, 2, 3]])
    assert chirality(xyz, site)[0, 0] == -chirality(xyz * [1, 1, -1], site)[0, 0] == 1.0
