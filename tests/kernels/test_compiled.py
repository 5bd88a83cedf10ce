"""Compiled blocks: the same chains, one graph, and no recompilation while numbers change.

The first tests trace with Dynamo but run the trace with PyTorch, which takes a fraction of a second and is where
recompilation is decided; those marked slow compile with Inductor.
"""

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

import gibbsian as gb
from contracts import seeded
from gibbsian import compilation
from gibbsian.adaptation import tune

KERNELS = (gb.ULA(0.02), gb.ULA(0.02, noise_scale=0.1, clip_grad=0.5, box=(-2.0, 2.0)), gb.MALA(0.3), gb.HMC(0.3, 2))
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")


def network(dim=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(dim, 16), nn.SiLU(), nn.Linear(16, 1), nn.Flatten(0)).double()
    return gb.Energy.of(net, (dim,))


def gaussian(dim=3):
    return gb.Gaussian(loc=torch.zeros(dim, dtype=torch.float64))


def both(energy, kernel, start, steps=8):
    return [
        gb.sample(energy, kernel, start, steps=steps, rng=seeded(1), thin=1, compile=compile)
        for compile in (False, True)
    ]


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_one_graph_serves_every_step_size_and_weight_and_gives_the_same_chains(kernel, graphs):
    beta = torch.tensor(1.0, dtype=torch.float64)
    energy = beta * network() + gaussian()
    start = torch.randn((5, 3), generator=seeded(), dtype=torch.float64)
    eager, compiled = both(energy, kernel, start)
    assert graphs() == 1
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled.acceptance, eager.acceptance, rtol=0, atol=1e-12)

    beta.fill_(0.3)
    smaller = dataclasses.replace(kernel, step_size=0.01)
    eager, again = both(energy, smaller, start)
    torch.testing.assert_close(again.draws, eager.draws, rtol=0, atol=1e-12)
    assert not torch.allclose(again.x, compiled.x)
    gb.sample(energy, smaller, again.state, steps=16, rng=seeded(1), thin=1, compile=True)
    assert graphs() == 0


def test_energies_built_anew_share_the_graph(graphs):
    """A temperature or a context that changes from call to call makes new wrappers, not new graphs."""
    net = network(4)
    labelled = gb.Energy.of(lambda x, y: net(torch.cat((x, y[:, None].to(x)), 1)), (3,), context=("y",))
    base, start = gaussian(), torch.randn((5, 3), generator=seeded(), dtype=torch.float64)
    for y in (torch.arange(5), torch.arange(5) + 1):
        for b in (0.2, 0.9):
            weight = torch.tensor(b, dtype=torch.float64)
            path = weight * labelled.given(y=y) + (1 - weight) * base
            gb.sample(path, gb.MALA(b), start, steps=4, rng=seeded(), compile=True)
    assert graphs() == 1
    gb.sample(0.5 * labelled.given(y=torch.arange(5)), gb.MALA(0.1), start, steps=4, rng=seeded(), compile=True)
    assert graphs() == 1, "another formula is another graph"


def test_a_float_weight_is_part_of_the_graph_and_a_tensor_weight_is_not(graphs):
    """The broken twin of a 0-d tensor: every new float is a new graph."""
    base, start = gaussian(), torch.zeros((2, 3), dtype=torch.float64)
    for b in (0.2, 0.4, 0.6):
        gb.sample(b * base, gb.MALA(0.1), start, steps=4, rng=seeded(), compile=True)
    assert graphs() == 3
    for b in (0.2, 0.4, 0.6):
        gb.sample(torch.tensor(b) * base, gb.MALA(0.1), start, steps=4, rng=seeded(), compile=True)
    assert graphs() == 1


def test_images_do_not_recompile_between_blocks(graphs):
    """Memory layouts settle in the first block: positions in channels_last, gradients as the energy gives them."""
    torch.manual_seed(0)
    body = (nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    net, start = gb.Energy.of(nn.Sequential(*body)), torch.randn((3, 2, 8, 8), generator=seeded())
    for kernel in (gb.ULA(0.01), gb.MALA(0.01)):
        out = gb.sample(net, kernel, start, steps=16, rng=seeded(), compile=True)
        assert graphs() == 1
        assert out.x.is_contiguous(memory_format=torch.channels_last)


def test_tuning_compiles_once_and_sampling_goes_on_with_its_graph(graphs):
    energy = gaussian()
    tuned = tune(energy, gb.HMC(1e-3, leapfrog=2), torch.zeros((8, 3)).double(), rng=seeded(), steps=40, compile=True)
    assert graphs() == 1
    gb.sample(energy, tuned.kernel, tuned.state, steps=20, rng=seeded(), compile=True)
    assert graphs() == 0


def test_the_time_of_compiling_is_told_and_counted_once(graphs):
    energy, start = network(), torch.zeros((2, 3)).double()
    eager = gb.sample(energy, gb.MALA(0.1), start, steps=4, rng=seeded())
    first, again = (gb.sample(energy, gb.MALA(0.1), start, steps=4, rng=seeded(), compile=True) for _ in range(2))
    assert 0.0 < first.compilation <= first.seconds
    assert "s of it compiling" in repr(first)
    assert again.compilation == eager.compilation == 0.0
    assert "compiling" not in repr(again)


def test_a_graph_goes_with_its_energy(graphs):
    energy = network()
    gb.sample(energy, gb.MALA(0.1), torch.zeros((2, 3)).double(), steps=4, rng=seeded(), compile=True)
    gc.collect()
    kept, gone = len(compilation._cache), weakref.ref(energy)
    graphs()
    del energy
    gc.collect()
    assert gone() is None
    assert len(compilation._cache) == kept - 1


def test_after_too_many_shapes_chains_run_eagerly_and_say_so(graphs, monkeypatch):
    monkeypatch.setattr(compilation, "_RECOMPILES", 2)
    monkeypatch.setattr(compilation, "_said", set())
    energy = gb.Energy.of(lambda x: x.square().sum(1))
    few = torch._dynamo.config.patch(recompile_limit=1)
    with few, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for n in range(2, 8):
            a, b = both(energy, gb.MALA(0.1), torch.ones((n, 2), dtype=torch.float64), steps=4)
            assert torch.equal(a.x, b.x)
    said = [w for w in caught if "running eagerly" in str(w.message)]
    assert len(said) == 1


def test_an_energy_that_cannot_be_traced_runs_eagerly(graphs, monkeypatch):
    monkeypatch.setattr(compilation, "_said", {"eager"})

    def energy(x):
        if torch.compiler.is_compiling():
            raise KeyError("only in the block")
        return x.square().sum(1)

    out = gb.sample(energy, gb.MALA(0.1), torch.ones((2, 2)), steps=4, rng=seeded(), compile=True)
    assert bool(torch.isfinite(out.x).all())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("kind", ["gaussian", "network", "wall"])
def test_inductor_gives_the_eager_chains(kernel, kind):
    start = 0.3 * torch.randn((7, 3), generator=seeded(), dtype=torch.float64)
    energy = {
        "gaussian": lambda: gb.Gaussian(covariance=torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))),
        "network": lambda: network() + gaussian(),
        "wall": lambda: gb.Energy.of(lambda x: torch.where(x[:, 0] > 0.5, torch.nan, x.square().sum(1))),
    }[kind]()
    eager, compiled = both(energy, kernel, start, steps=20)
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-10)
    torch.testing.assert_close(compiled.acceptance, eager.acceptance, rtol=0, atol=1e-10)
    assert torch.equal(compiled.nonfinite, eager.nonfinite)
    assert int(eager.nonfinite.sum()) > 0 or kind != "wall"


WITHOUT_COMPILER = """
import warnings, torch, gibbsian as gb
rng = torch.Generator().manual_seed(0)
energies = [gb.Gaussian(2), gb.Gaussian(3)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for energy in energies * 2:
        out = gb.sample(energy, gb.MALA(0.1), energy.sample(4, rng), steps=20, rng=rng, compile=True)
        assert torch.isfinite(out.x).all()
said = [str(w.message) for w in caught if w.category is RuntimeWarning and "eager" in str(w.message)]
assert len(said) == 1, said
assert "C++ compiler" in said[0], said
print("fell back")
"""


@pytest.mark.slow
@pytest.mark.parametrize("cxx", ["/nowhere/g++", "false"])
def test_without_a_compiler_chains_run_eagerly_with_one_warning(cxx, tmp_path):
    env = os.environ | {"CXX": cxx, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "fell back", done.stderr


WITH_AN_OLD_COMPILER = """
import warnings
import torch
import gibbsian as gb
from gibbsian import compilation
warnings.simplefilter("error", RuntimeWarning)
rng, energy = torch.Generator().manual_seed(0), gb.Gaussian(32)
out = gb.sample(energy, gb.ULA(0.1), energy.sample(40, rng), steps=2, rng=rng, compile=True)
assert torch.isfinite(out.x).all() and out.compilation > 0
print(compilation._trusts[0])
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="no AVX-512 to be ignorant of")
@pytest.mark.parametrize(("ignorant", "trusts"), [("-mavx512", False), ("-mnothing", True)])
def test_a_compiler_that_lacks_instructions_is_found_out(ignorant, trusts, tmp_path):
    script = tmp_path / "g++"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{ignorant}*) echo "unknown option {ignorant}" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    env = os.environ | {"CXX": str(script), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", WITH_AN_OLD_COMPILER], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(trusts), done.stderr


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_groups_of_images_share_one_graph(kernel, graphs, monkeypatch):
    monkeypatch.setattr("gibbsian.sampling.row_groups", lambda *_: [slice(i, i + 2) for i in range(0, 6, 2)])
    torch.manual_seed(0)
    energy = gb.ConvEnergy((2, 6, 6), (3, 3)).double()
    start = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=seeded())
    eager, compiled = both(energy, kernel, start, steps=12)
    torch.testing.assert_close(compiled.x, eager.x)
    assert graphs() <= 2
