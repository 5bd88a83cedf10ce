"""From a trajectory to a folder with a landscape, by the command line and from Python, and what is refused."""

import contextlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

md = pytest.importorskip("mdtraj", reason="mdtraj is not installed")
pytest.importorskip("openmm", reason="OpenMM is not installed")

from gibbsian.cli import main  # noqa: E402
from gibbsian.energies.periodic import PeriodicMLP, VonMisesMixture  # noqa: E402
from gibbsian.errors import DataError, ModelFileError, OptionError  # noqa: E402
from gibbsian.molecules.backmapping import with_torsions  # noqa: E402
from gibbsian.molecules.conformations import landscape_of, lowest_frames  # noqa: E402
from gibbsian.molecules.features import torsion_angles, torsions  # noqa: E402
from gibbsian.molecules.frames import check_frames  # noqa: E402
from gibbsian.molecules.landscape import divergence, histogram, learned_masses  # noqa: E402
from gibbsian.molecules.sources import read_frames, read_weights  # noqa: E402
from gibbsian.molecules.systems import alanine_dipeptide  # noqa: E402
from gibbsian.molecules.thermal import thermal_energy  # noqa: E402
from gibbsian.molecules.torsion_model import TorsionModel, load_torsion_model, save_torsion_model  # noqa: E402
from gibbsian.molecules.torsion_settings import TorsionTraining  # noqa: E402
from gibbsian.molecules.torsion_training import mean_energy  # noqa: E402

FAST = TorsionTraining(steps=(150,), members=1, replicates=1, hidden=(32, 32), batch_size=256, learning_rate=8e-3)
QUICK = ("--steps", "80", "--replicates", "1", "--samples", "12", "--structures", "3")
N = 1200


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def truth():
    locs = torch.deg2rad(torch.tensor([[-80.0, 140.0], [-70.0, -30.0], [60.0, 40.0]]))
    return VonMisesMixture(locs, torch.tensor([[8.0, 8.0], [9.0, 7.0], [10.0, 9.0]]), torch.tensor([0.5, 0.4, 0.1]))


@pytest.fixture(scope="session")
def molecule():
    built = alanine_dipeptide()
    return md.Trajectory(np.asarray(built.positions, dtype=np.float32)[None], md.Topology.from_openmm(built.topology))


@pytest.fixture(scope="session")
def toy(molecule):
    """Alanine dipeptide with torsions drawn from a known density."""
    atoms, more = torsions(molecule).atoms, N + 60
    made = with_torsions(molecule[np.zeros(more, dtype=int)], atoms, truth().sample(more, rng(1)))
    # Turned in one frame that is otherwise stiff, some conformations clash.
    made = made[np.flatnonzero(check_frames(made).physical)[:N]]
    made.time = 0.5 * np.arange(N)
    return made


@pytest.fixture
def simulation(toy, tmp_path):
    """A folder as gibbsian protein simulate leaves it."""
    folder = tmp_path / "sim"
    folder.mkdir()
    toy[0].save_pdb(str(folder / "topology.pdb"))
    toy.save_dcd(str(folder / "trajectory.dcd"))
    x = np.degrees(torsions(toy).angles.numpy())
    columns = {"time_ps": toy.time, "phi_deg": x[:, 0], "psi_deg": x[:, 1], "bias_kj_mol": 0.0, "weight": 1.0}
    pd.DataFrame(columns).to_csv(folder / "frames.csv", index=False)
    (folder / "simulation.json").write_text(json.dumps({"molecule": "ala2", "temperature_k": 310.0}))
    return folder


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, " ".join(out.getvalue().split()), " ".join(err.getvalue().replace("│", " ").split())


def refused(*words):
    code, out, err = call(*words)
    assert code == 1, out + err
    assert "Traceback" not in err
    return err


def test_a_landscape_from_the_command_line(simulation, toy, tmp_path):
    folder = tmp_path / "land"
    code, out, err = call("protein", "landscape", simulation, "--out", folder, *QUICK)
    assert code == 0, err
    assert "ala2: 1200 frames worth 1200, 2 torsions at 310 K, exact" in out
    frames = pd.read_csv(folder / "frames.csv")
    assert len(frames) == N
    assert frames["energy_kt"].min() == 0.0
    np.testing.assert_allclose(
        frames["energy_kj_mol"], thermal_energy(310.0) * frames["energy_kt"], rtol=1e-5, atol=1e-6
    )
    assert frames["physical"].all()
    np.testing.assert_allclose(frames["time_ps"], 0.5 * np.arange(N))
    surface = pd.read_csv(folder / "surface.csv")
    assert len(surface) == 36 * 36
    assert surface["learned_probability"].sum() == pytest.approx(1.0, abs=1e-4)
    basins = pd.read_csv(folder / "basins.csv").set_index("basin")
    assert basins.loc["left-handed", "frames_population"] == pytest.approx(0.1, abs=0.04)
    low = md.load(str(folder / "low_energy.pdb"))
    assert 1 <= len(low) <= 3
    drawn, coordinates = pd.read_csv(folder / "samples.csv"), md.load(str(folder / "samples.pdb"))
    assert len(drawn) == len(coordinates) == 12
    other = md.load(str(folder / "samples.xtc"), top=str(folder / "topology.pdb"))
    angles = np.radians(drawn[["phi_ALA2_deg", "psi_ALA2_deg"]].to_numpy())
    for found in (coordinates, other):
        gap = torsions(found).angles.numpy() - angles
        assert np.abs(np.sin(0.5 * gap)).max() < 0.02
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "left-handed of ALA2" in page
    record = json.loads((folder / "landscape.json").read_text())
    assert record["frames"] == N
    assert record["maps"][0]["residue"] == "ALA2"
    # Once more into the same place: only when asked for.
    assert "holds a landscape already" in refused("protein", "landscape", simulation, "--out", folder, *QUICK)
    decoys = tmp_path / "decoys.pdb"
    barrier = torch.deg2rad(torch.tensor([0.0, -120.0])) + 0.2 * torch.randn(30, 2, generator=rng())
    with_torsions(toy[:30], torsions(toy).atoms, barrier).save_pdb(str(decoys))
    again = ("--overwrite", "--stride", "2", "--decoys", decoys)
    code, out, err = call("protein", "landscape", simulation, "--out", folder, *again, *QUICK)
    assert code == 0, err
    ranked = pd.read_csv(folder / "decoys.csv")
    assert ranked["kind"].value_counts().to_dict() == {"native": N // 2, "decoys": 30}
    assert ranked["rank"].is_monotonic_increasing
    assert ranked["kind"].iloc[-20:].eq("decoys").mean() > 0.7
    assert "decoys above frames with probability 0.9" in out
    assert json.loads((folder / "landscape.json").read_text())["frames"] == N // 2
    for ending in ("pdb", "xtc", "dcd", "csv"):
        code, out, err = call("protein", "sample", folder, "--n", "5", "--out", tmp_path / f"draws.{ending}")
        assert code == 0, err
        assert "5 draws of 2 torsions at 310 K" in out
        again = refused("protein", "sample", folder, "--n", "5", "--out", tmp_path / f"draws.{ending}")
        assert "is there already. Add --overwrite" in again
    found = md.load(str(tmp_path / "draws.xtc"), top=str(folder / "topology.pdb"))
    table = pd.read_csv(tmp_path / "draws.csv")
    assert np.abs(np.sin(0.5 * (torsions(found).angles[:, 0].numpy() - np.radians(table["phi_ALA2_deg"])))).max() < 0.02
    assert "this command writes" in refused("protein", "sample", folder, "--out", tmp_path / "draws.txt")
    assert "holds no model of torsions" in refused("protein", "sample", tmp_path / "sim")


def test_one_command_simulates_and_learns(tmp_path):
    folder = tmp_path / "ala2"
    code, out, err = call("protein", "landscape", "ala2", "--out", folder, "--picoseconds", "60", *QUICK)
    assert code == 0, err
    assert (folder / "simulation" / "trajectory.dcd").exists()
    assert (folder / "report.html").exists()
    assert "at 300 K, exact" in out
    # The simulation is taken up when the landscape is made anew.
    before = (folder / "simulation" / "trajectory.dcd").stat().st_mtime_ns
    code, _, err = call("protein", "landscape", "ala2", "--out", folder, "--overwrite", *QUICK)
    assert code == 0, err
    assert (folder / "simulation" / "trajectory.dcd").stat().st_mtime_ns == before


def test_a_landscape_that_cannot_be_replaced_stays(simulation, tmp_path):
    folder = tmp_path / "land"
    code, _, err = call("protein", "landscape", simulation, "--out", folder, *QUICK)
    assert code == 0, err
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "There is no file" in refused(
        "protein", "landscape", simulation / "topology.pdb", tmp_path / "none.dcd", "--out", folder, "--overwrite"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_what_commands_refuse(simulation, tmp_path):
    land = ("protein", "landscape")
    assert "holds a simulation, whose frames must stay" in refused(*land, simulation, "--out", simulation)
    assert "Give a simulation's folder" in refused(*land, "--out", tmp_path / "x")
    assert "stands alone" in refused(*land, simulation, simulation / "trajectory.dcd", "--out", tmp_path / "x")
    (simulation / "simulation.json").unlink()
    assert "lacks simulation.json" in refused(*land, simulation, "--out", tmp_path / "y")
    (simulation / "partial").mkdir()
    assert "It was interrupted: go on with it" in refused(*land, simulation, "--out", tmp_path / "z")
    top, traj = simulation / "topology.pdb", simulation / "trajectory.dcd"
    assert "no torsion chi1" in refused(*land, top, traj, "--torsions", "chi1", "--out", tmp_path / "c")


def test_weights_come_from_tables(simulation, toy, tmp_path):
    top, traj = simulation / "topology.pdb", simulation / "trajectory.dcd"
    table = tmp_path / "w.csv"
    left = (torsions(toy).angles[:, 0] > 0).numpy()
    w = np.where(left, 4.0, 1.0)
    kt = thermal_energy(300.0)
    for columns in ({"weight": w}, {"log_weight": np.log(w) + 5.0}, {"bias_kj_mol": kt * np.log(w) - 3.0}):
        pd.DataFrame(columns).to_csv(table, index=False)
        found = read_frames([top, traj], table)
        assert found.weighted
        np.testing.assert_allclose(found.weights, w / w.sum(), rtol=1e-6)
        half = read_frames([top, traj], table, stride=2)
        np.testing.assert_allclose(half.weights, w[::2] / w[::2].sum(), rtol=1e-6)
    with pytest.raises(DataError, match="has 1200 lines and there are 1199 frames"):
        read_weights(table, N - 1, 300.0)
    pd.DataFrame({"energy": w}).to_csv(table, index=False)
    with pytest.raises(DataError, match="no column weight, log_weight or bias_kj_mol; its columns are energy"):
        read_weights(table, N, 300.0)
    with pytest.raises(DataError, match="cannot be read"):
        read_weights(tmp_path / "none.csv", N, 300.0)
    pd.DataFrame({"weight": [-1.0] * N}).to_csv(table, index=False)
    with pytest.raises(DataError, match="not negative"):
        read_weights(table, N, 300.0)


def test_frames_are_weighed_to_another_temperature(simulation, toy, tmp_path):
    top, traj, table = simulation / "topology.pdb", simulation / "trajectory.dcd", tmp_path / "w.csv"
    potential = 5.0 * np.random.default_rng(0).standard_normal(N)
    pd.DataFrame({"weight": np.ones(N), "potential_kj_mol": potential}).to_csv(table, index=False)
    found = read_frames([top, traj], table, 330.0, to=300.0)
    assert found.temperature == 300.0
    want = np.exp(potential / thermal_energy(330.0) - potential / thermal_energy(300.0))
    np.testing.assert_allclose(found.weights, want / want.sum(), rtol=1e-6)
    with pytest.raises(DataError, match=r"worth .* fewer than 50"):
        read_frames([top, traj], table, 3000.0, to=30.0)
    with pytest.raises(OptionError, match="takes a table of potential_kj_mol"):
        read_frames([top, traj], None, 330.0, to=300.0)
    with pytest.raises(DataError, match="no column potential_kj_mol"):
        read_frames([simulation], None, None, to=300.0)


def test_a_bias_that_is_known_is_taken_out_as_a_function(simulation, toy):
    """Frames as if drawn under a bias: its table leads to the law without it, and so do its weights."""
    grid = np.radians(np.linspace(-180, 180, 25))
    phi, psi = np.meshgrid(grid, grid, indexing="ij")
    kt = thermal_energy(310.0)
    bias = lambda a, b: kt * (1.2 * np.cos(b - 2.4) + 0.8 * np.cos(a))  # noqa: E731
    np.savez(simulation / "bias.npz", bias_kj_mol=bias(phi, psi))
    x = torsions(toy).angles.double().numpy()
    v = bias(x[:, 0], x[:, 1])
    pd.DataFrame({"bias_kj_mol": v, "weight": np.exp(v / kt)}).to_csv(simulation / "frames.csv", index=False)
    atoms = torsions(toy).atoms.tolist()
    told = {"molecule": "ala2", "temperature_k": 310.0, "torsions": {"phi": atoms[0], "psi": atoms[1]}}
    (simulation / "simulation.json").write_text(json.dumps(told))
    frames = read_frames([simulation])
    assert frames.bias is not None
    found = landscape_of(frames, replace(FAST, steps=(300,)), rng=rng())
    energy = lambda y: truth()(y) - 1.2 * torch.cos(y[:, 1] - 2.4) - 0.8 * torch.cos(y[:, 0])  # noqa: E731
    assert divergence(learned_masses(energy), learned_masses(found.fit.energy)) < 0.08
    assert divergence(learned_masses(truth()), learned_masses(found.fit.energy)) > 0.15
    (simulation / "bias.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match="is damaged"):
        read_frames([simulation])


def test_unphysical_frames_weigh_nothing_and_are_told(simulation, toy):
    frames = read_frames([simulation])
    broken = frames.trajectory[:]
    broken.xyz[7, 3] += 0.3
    found = landscape_of(type(frames)(broken, frames.weights, 300.0, False, "broken"), FAST, rng=rng())
    assert found.frames.weights[7] == 0.0
    assert "1 of 1200 frames are unphysical" in found.notes[0]
    assert 7 not in lowest_frames(found, 50).tolist()
    chosen = lowest_frames(found, 5)
    x = found.torsions.angles[torch.as_tensor(chosen)]
    apart = (x[:, None] - x[None]).abs()
    apart = torch.minimum(apart, 2 * math.pi - apart).amax(2) + 10 * torch.eye(len(x))
    assert float(apart.min()) > math.radians(20.0)
    assert bool((found.energies[torch.as_tensor(chosen)].diff() >= 0).all())
    with pytest.raises(OptionError, match="1 or more"):
        lowest_frames(found, 0)
    broken.xyz[:, 3] += 0.3
    with pytest.raises(DataError, match="Nothing can be learned"):
        landscape_of(type(frames)(broken, frames.weights, 300.0, False, "broken"), FAST, rng=rng())


def model_of(toy, dim=2):
    torch.manual_seed(0)
    atoms = torsions(toy).atoms
    if dim == 3:
        at = {(a.residue.name, a.name): a.index for a in toy.topology.atoms}
        four = [at[k] for k in (("ACE", "CH3"), ("ACE", "C"), ("ALA", "N"), ("ALA", "CA"))]
        atoms = np.concatenate((atoms, [four]))
    names = tuple(f"angle {i}" for i in range(len(atoms)))
    nets = [PeriodicMLP(len(atoms), (16,), 2) for _ in range(2)]
    noise = VonMisesMixture(torch.zeros(2, len(atoms)), 0.3)
    return TorsionModel(mean_energy(nets), noise, names, atoms, 300.0, toy[:50])


def test_models_are_saved_and_rebuilt(toy, tmp_path):
    model = model_of(toy)
    save_torsion_model(tmp_path / "m", model)
    found = load_torsion_model(tmp_path / "m")
    x = truth().sample(20, rng())
    torch.testing.assert_close(found.energy(x), model.energy(x))
    torch.testing.assert_close(found.noise(x), model.noise(x))
    assert found.names == model.names
    torch.testing.assert_close(found.draw(9, rng(3)), model.draw(9, rng(3)))
    for name in ("model.safetensors", "torsions.json", "templates.dcd"):
        kept = (tmp_path / "m" / name).read_bytes()
        (tmp_path / "m" / name).write_bytes(kept[: len(kept) // 2])
        with pytest.raises(ModelFileError, match="damaged"):
            load_torsion_model(tmp_path / "m")
        (tmp_path / "m" / name).unlink()
        with pytest.raises(ModelFileError, match="is not there"):
            load_torsion_model(tmp_path / "m")
        (tmp_path / "m" / name).write_bytes(kept)


def test_draws_of_two_torsions_follow_the_energy(toy):
    model = model_of(toy)
    scaled = TorsionModel(truth(), model.noise, model.names, model.atoms, 300.0, toy[:50])
    x = scaled.draw(50_000, rng(2))
    assert divergence(histogram(x), learned_masses(truth())) < 1.6 * 1296 / 2 / len(x)
    with pytest.raises(OptionError, match="1 or more"):
        scaled.draw(0, rng())


def test_draws_of_more_torsions_follow_the_energy_by_chains(toy):
    model = model_of(toy, 3)
    dim = len(model.names)
    locs = torch.tensor([[1.0] * dim, [-1.0] * dim])
    known = VonMisesMixture(locs, 3.0, torch.tensor([0.3, 0.7]))
    x = TorsionModel(known, model.noise, model.names, model.atoms, 300.0, toy[:50]).draw(400, rng(2))
    share = float((x.sum(1) > 0).double().mean())
    exact = float((known.sample(20_000, rng(5)).sum(1) > 0).double().mean())
    assert abs(share - exact) < 0.12


def test_drawn_conformations_have_the_torsions_and_are_physical(toy):
    model = model_of(toy)
    angles = truth().sample(40, rng(6))
    built = model.conformations(angles)
    gap = torsion_angles(built.xyz, model.atoms) - angles
    assert float(torch.sin(0.5 * gap).abs().max()) < 1e-3
    assert check_frames(built).physical.mean() > 0.9


def test_a_landscape_of_several_residues(tmp_path):
    """Four torsions of a piece of a protein, by noise contrastive estimation and chains."""
    from pathlib import Path

    import openmm.app

    whole = md.load(str(Path(openmm.app.__file__).parent / "data" / "test.pdb"))
    one = whole.atom_slice(whole.topology.select("resid 3 to 7"))
    found = torsions(one, residues=(5, 6))
    turned = found.angles + 0.2 * torch.randn(400, 4, generator=rng())
    made = with_torsions(one[np.zeros(400, dtype=int)], found.atoms, turned)
    made[0].save_pdb(str(tmp_path / "top.pdb"))
    made.save_xtc(str(tmp_path / "traj.xtc"))
    frames = read_frames([tmp_path / "top.pdb", tmp_path / "traj.xtc"])
    landscape = landscape_of(frames, replace(FAST, steps=(60,)), rng=rng(), residues=(5, 6))
    assert landscape.fit.objective == "nce"
    assert [m.residue for m in landscape.maps] == ["ASP5", "PHE6"]
    assert landscape.fit.replicates == ()
    drawn = landscape.model.draw(500, rng(1))
    spread = (drawn - found.angles).remainder(2 * math.pi)
    spread = torch.minimum(spread, 2 * math.pi - spread)
    assert 0.1 < float(spread.square().mean().sqrt()) < 0.4
    assert landscape.maps[0].frames_resampled.shape == (200, 36, 36)
    save_torsion_model(tmp_path / "m", landscape.model)
    again = load_torsion_model(tmp_path / "m")
    torch.testing.assert_close(again.energy(drawn), landscape.model.energy(drawn), rtol=1e-4, atol=1e-4)
