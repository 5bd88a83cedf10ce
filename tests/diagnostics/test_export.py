"""What ArviZ gets: axes, names, types; and what is said when it is absent."""

import sys
import types
import warnings

import numpy as np
import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.diagnostics.export import sample_stats, to_arviz
from gibbsian.errors import MissingPackageError

KEPT = {
    "energy": torch.arange(6.0).reshape(3, 2),
    "acceptance": torch.full((3, 2), 0.5),
    "hamiltonian": torch.arange(6.0).reshape(3, 2) + 10,
    "diverging": torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
    "depth": torch.full((3, 2), 4.0),
    "leapfrog_steps": torch.full((3, 2), 15.0),
    "step_size": torch.full((3, 2), 0.25),
}


def test_statistics_go_by_arviz_s_names_with_chains_in_front():
    stats = sample_stats(KEPT)
    assert set(stats) == {"lp", "acceptance_rate", "energy", "diverging", "tree_depth", "n_steps", "step_size"}
    assert stats["lp"].tolist() == [[0, -2, -4], [-1, -3, -5]]
    assert stats["energy"].tolist() == [[10, 12, 14], [11, 13, 15]]
    assert stats["diverging"].dtype == np.bool_
    assert stats["diverging"].tolist() == [[False, False, True], [True, False, False]]
    assert stats["tree_depth"].dtype == stats["n_steps"].dtype == np.int64


@pytest.fixture
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("arviz", minversion="0.20", reason="ArviZ is not installed: pip install arviz")


@pytest.mark.filterwarnings("ignore")
def test_a_run_exported_gives_arviz_the_same_diagnostics(arviz):
    energy = gb.Gaussian(3)
    out = gb.sample(energy, gb.HMC(0.3, 5), energy.sample(4, seeded()), steps=200, thin=1, rng=seeded(1))
    data = out.to_arviz(name="theta")
    assert data["posterior"]["theta"].dims[:2] == ("chain", "draw")
    assert data["posterior"]["theta"].shape == (4, 200, 3)
    np.testing.assert_array_equal(data["posterior"]["theta"].values[1, 7], out.draws[7, 1].numpy())
    np.testing.assert_array_equal(data["sample_stats"]["lp"].values.T, -out.kept["energy"].numpy())
    assert data["posterior"].attrs["sampler"] == "HMC(step_size=0.3, leapfrog=5)"
    summary = out.summary()
    np.testing.assert_allclose(summary.coordinates.bulk_ess.numpy(), arviz.ess(data)["theta"].values, rtol=1e-6)
    np.testing.assert_allclose(summary.coordinates.r_hat.numpy(), arviz.rhat(data)["theta"].values, rtol=1e-6)
    if hasattr(arviz, "bfmi"):  # ArviZ stays in the chains' single precision here.
        np.testing.assert_allclose(summary.bfmi.numpy(), np.asarray(arviz.bfmi(data)), rtol=1e-4)
    acceptance = data["sample_stats"]["acceptance_rate"].values.mean(1)
    np.testing.assert_allclose(acceptance, out.acceptance.numpy(), rtol=1e-5)


@pytest.mark.parametrize("version", ["0.23.4", "1.2.0"])
def test_both_families_of_arviz_get_what_they_ask_for(monkeypatch, version):
    asked = []

    def from_dict(*args, **named):
        asked.append((args, named))
        return {"posterior": types.SimpleNamespace(attrs={})}

    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(__version__=version, from_dict=from_dict))
    to_arviz(torch.zeros(3, 2, 5, dtype=torch.bfloat16), KEPT, kernel="MALA")
    ((args, named),) = asked
    groups = named if version.startswith("0") else args[0]
    assert (set(groups), len(args)) == ({"posterior", "sample_stats"}, int(version[0]))
    assert groups["posterior"]["x"].shape == (2, 3, 5)
    assert groups["posterior"]["x"].dtype == np.float32


def test_without_arviz_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(MissingPackageError, match=r'pip install "gibbsian\[arviz\]"') as caught:
        to_arviz(torch.zeros(3, 2, 5), KEPT)
    assert isinstance(caught.value, ImportError)
