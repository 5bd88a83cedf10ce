"""OneDNN's products in compiled graphs: the same numbers, only where they pay, on machines that profit."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

import gibbsian as gb
from contracts import seeded
from gibbsian import matmul
from kernels.test_compiled import needs_compiler

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def replaced(monkeypatch):
    """Use the pass on any machine; return the counts of what it replaced."""
    counts = []
    real = matmul.replace_products
    monkeypatch.setattr(matmul, "replace_products", lambda graph: counts.append(real(graph)))
    monkeypatch.setattr(matmul, "options", lambda: {"post_grad_custom_post_pass": matmul.onednn_products()})
    # A graph from the compiler's cache on disk would not pass by here.
    with inductor.patch(fx_graph_cache=False):
        yield counts


def network(width):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    return gb.Energy.of(nn.Sequential(layers, nn.Flatten(0)), (3,))


@needs_compiler
@pytest.mark.parametrize(("chains", "width", "used"), [(300, 32, True), (20, 32, False), (300, 8, False)])
def test_chains_are_the_same_and_only_large_products_are_replaced(chains, width, used, replaced, monkeypatch):
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 2)
    energy, start = network(width), torch.randn(chains, 3, generator=seeded())
    eager, compiled = (
        gb.sample(energy, gb.ULA(0.01), start, steps=2, rng=seeded(1), compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.x, eager.x, rtol=1e-5, atol=1e-5)
    assert replaced
    assert any(replaced) is used


def test_the_product_is_the_layers():
    product, _ = matmul.linear()
    x, weight, bias = (torch.randn(shape, generator=seeded(i)) for i, shape in enumerate(((300, 32), (16, 32), (16,))))
    torch.testing.assert_close(product(x, weight, bias), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(x, weight.T.contiguous().T, None), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_other_machines_keep_torchs_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert matmul.options.__wrapped__() == {}


@needs_compiler
@pytest.mark.slow
def test_a_graph_from_the_cache_of_another_process_runs(tmp_path):
    program = """
import torch, gibbsian as gb
from gibbsian import matmul
matmul.options = lambda: {"post_grad_custom_post_pass": matmul.onednn_products()}
energy = lambda x: (x @ torch.ones(3, 32)).sin() @ torch.ones(32, 32) @ torch.ones(32)
gb.sample(energy, gb.HMC(0.01, leapfrog=2), torch.zeros(300, 3), steps=1, rng=torch.Generator(), compile=True)
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
