"""Alanine dipeptide from its geometry; structures from files, and what is wrong with them."""

import math
import sys

import numpy as np
import pytest

from gibbsian.errors import DataError, MissingPackageError, OptionError
from gibbsian.molecules.backbone import backbone_torsions, torsion_of
from gibbsian.molecules.dipeptide import ATOMS, PHI, PSI, dipeptide_bonds, dipeptide_coordinates
from gibbsian.molecules.extras import require_mdtraj, require_openmm
from gibbsian.molecules.platforms import platform_for
from gibbsian.molecules.systems import alanine_dipeptide, system_from_pdb

pytest.importorskip("openmm")
openmm = require_openmm()


@pytest.fixture(scope="module")
def lines():
    """The dipeptide as the lines of a PDB file."""
    import io

    molecule, text = alanine_dipeptide(), io.StringIO()
    openmm.app.PDBFile.writeFile(molecule.topology, molecule.positions * openmm.unit.nanometer, text)
    return text.getvalue().splitlines()


def written(tmp_path, lines, name="peptide.pdb"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("phi", [-2.9, -1.4, 0.3, 2.1])
@pytest.mark.parametrize("psi", [-1.0, 0.4, 3.0])
def test_geometry_has_the_torsions_asked_for(phi, psi):
    x = dipeptide_coordinates(phi, psi)
    assert torsion_of(x, PHI) == pytest.approx(phi)
    assert torsion_of(x, PSI) == pytest.approx(psi)
    for omega in ((1, 4, 6, 8), (8, 14, 16, 18)):
        assert abs(torsion_of(x, omega)) == pytest.approx(math.pi)
    lengths = [np.linalg.norm(x[a] - x[b]) for a, b in dipeptide_bonds()]
    assert len(lengths) == 21
    assert 0.1 < min(lengths) < max(lengths) < 0.153


def test_it_is_left_handed_alanine():
    x = dipeptide_coordinates(-1.4, 1.4)
    nitrogen, alpha, carbon, beta = (x[i] for i in (6, 8, 14, 10))
    assert np.dot(np.cross(nitrogen - alpha, carbon - alpha), beta - alpha) > 0.002


def test_the_system_is_relaxed_with_its_torsions_held():
    molecule = alanine_dipeptide(phi=60.0, psi=-60.0)
    (name, phi, psi), *_ = molecule.backbone_torsions()
    assert (name, phi, psi) == ("ALA2", PHI, PSI)
    assert np.degrees(torsion_of(molecule.positions, PHI)) == pytest.approx(60.0, abs=3)
    assert np.degrees(torsion_of(molecule.positions, PSI)) == pytest.approx(-60.0, abs=3)
    assert molecule.atoms == len(ATOMS) == 22
    assert molecule.constraints == 0
    assert alanine_dipeptide(constrain_hydrogens=True).constraints == 12
    assert molecule.masses.sum() == pytest.approx(144.17, abs=0.1)


def test_mdtraj_and_openmm_read_the_same_molecule(tmp_path, lines):
    mdtraj = pytest.importorskip("mdtraj")
    path = written(tmp_path, lines)
    trajectory = mdtraj.load(str(path))
    _, phi = mdtraj.compute_phi(trajectory)
    assert phi[0, 0] == pytest.approx(math.radians(-80), abs=0.03)
    molecule = system_from_pdb(path, 350.0)
    assert (molecule.atoms, molecule.temperature, molecule.name) == (22, 350.0, "peptide")


def test_hydrogens_are_missed_and_added(tmp_path, lines):
    heavy = [line for line in lines if not (line.startswith(("ATOM", "HETATM")) and line[76:78].strip() == "H")]
    path = written(tmp_path, heavy)
    with pytest.raises(DataError, match=r"Hydrogens are missing.*--add-hydrogens"):
        system_from_pdb(path)
    assert system_from_pdb(path, add_hydrogens=True).atoms == 22


def test_missing_atoms_are_named(tmp_path, lines):
    path = written(tmp_path, [line for line in lines if line[12:16].strip() != "CB"])
    for add in (False, True):
        with pytest.raises(DataError, match=r"ALA2 of chain A lacks CB.*PDBFixer"):
            system_from_pdb(path, add_hydrogens=add)


def test_unknown_residues_waters_and_ions_are_named_and_left_out(tmp_path, lines):
    end = next(i for i, line in enumerate(lines) if line.startswith("TER"))
    foreign = "HETATM   24  C1  XYZ B   1      10.000  10.000  10.000  1.00  0.00           C"
    water = "HETATM   25  O   HOH C   1      20.000  10.000  10.000  1.00  0.00           O"
    ion = "HETATM   26 CL   CL  D   1      20.000  20.000  10.000  1.00  0.00          CL"
    for extra, words in ((foreign, "XYZ1 of chain B"), (water, "1 waters"), (ion, "peptide")):
        path = written(tmp_path, [*lines[: end + 1], extra, "TER", "END"])
        with pytest.raises(DataError, match=rf"{words}.*--protein-only"):
            system_from_pdb(path)
        assert system_from_pdb(path, protein_only=True).atoms == 22
    path = written(tmp_path, [water, "END"])
    with pytest.raises(DataError, match="no amino acid"):
        system_from_pdb(path, protein_only=True)


def shifted(line, change):
    """A line of a PDB file with other coordinates."""
    if not line.startswith(("ATOM", "HETATM")):
        return line
    return line[:30] + "".join(f"{change(float(line[i : i + 8])):8.3f}" for i in (30, 38, 46)) + line[54:]


def test_mistaken_units_and_lost_coordinates_are_seen(tmp_path, lines):
    small = written(tmp_path, [shifted(line, lambda v: v / 10) for line in lines])
    with pytest.raises(DataError, match=r"median length of 0\.1.* angstroms"):
        system_from_pdb(small)
    lost = written(tmp_path, [line.replace(line[30:38], "     nan") if " CA " in line else line for line in lines])
    with pytest.raises(DataError, match=r"1 of 22 atoms.*not finite"):
        system_from_pdb(lost)


def test_a_molecule_split_by_its_box_is_seen(tmp_path, lines):
    split = [shifted(line, lambda v: v + 30) if " NME " in line and line[:3] != "TER" else line for line in lines]
    with pytest.raises(DataError, match=r"1 bonds.*5.* between ALA2 C and NME3 N.*periodic box"):
        system_from_pdb(written(tmp_path, split))


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="no file"):
        system_from_pdb(tmp_path / "nothing.pdb")
    (tmp_path / "a.xyz").write_text("1\n")
    with pytest.raises(DataError, match=r"\.pdb, \.cif"):
        system_from_pdb(tmp_path / "a.xyz")
    (tmp_path / "a.pdb").write_text("ATOM  what is this\n")
    with pytest.raises(DataError, match="cannot be read"):
        system_from_pdb(tmp_path / "a.pdb")
    (tmp_path / "b.pdb").write_text("REMARK nothing here\nEND\n")
    with pytest.raises(DataError, match=r"no atoms|cannot be read"):
        system_from_pdb(tmp_path / "b.pdb")


def test_options_are_checked():
    with pytest.raises(OptionError, match="kelvin"):
        alanine_dipeptide(-1.0)
    with pytest.raises(OptionError, match="degrees"):
        alanine_dipeptide(phi=math.nan)
    with pytest.raises(OptionError, match=r"no force field.*nothing\.xml"):
        alanine_dipeptide(forcefield=("nothing.xml",))
    with pytest.raises(OptionError, match="platform 'Abacus'"):
        platform_for(alanine_dipeptide().system, "Abacus")


def test_torsions_need_bonded_neighbours():
    app = openmm.app
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(3):
        residue = topology.addResidue("GLY", chain)
        for name in ("N", "CA", "C"):
            topology.addAtom(name, app.Element.getBySymbol(name[0]), residue)
    assert backbone_torsions(topology) == []
    atoms = list(topology.atoms())
    for i in range(8):
        topology.addBond(atoms[i], atoms[i + 1])
    assert [(phi, psi) for _, phi, psi in backbone_torsions(topology)] == [((2, 3, 4, 5), (3, 4, 5, 6))]


@pytest.mark.parametrize(("require", "module"), [(require_openmm, "openmm"), (require_mdtraj, "mdtraj")])
def test_what_is_not_installed_says_what_installs_it(monkeypatch, require, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"not installed: pip install 'gibbsian\[protein\]'"):
        require()
