"""Products in compiled graphs, written out or oneDNN's: the same numbers, only where they pay."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

import gibbsian as gb
from contracts import seeded
from gibbsian import matmul
from kernels.test_compiled import needs_compiler

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def counted(monkeypatch, name):
    """Count what a part of the pass replaces, with all parts in use on any machine."""
    counts = []
    real = getattr(matmul, name)
    monkeypatch.setattr(matmul, name, lambda graph: counts.append(real(graph)))
    monkeypatch.setattr(matmul, "options", lambda: {"post_grad_custom_post_pass": matmul.products_pass(True)})
    return counts


@pytest.fixture
def replaced(monkeypatch):
    counts = counted(monkeypatch, "replace_products")
    # A graph from the compiler's cache on disk would not pass by here.
    with inductor.patch(fx_graph_cache=False):
        yield counts


@pytest.fixture
def written_out(monkeypatch):
    counts = counted(monkeypatch, "write_out_thin_products")
    with inductor.patch(fx_graph_cache=False):
        yield counts


def network(width):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    return gb.Energy.of(nn.Sequential(layers, nn.Flatten(0)), (3,))


@needs_compiler
@pytest.mark.parametrize(
    ("chains", "width", "used"), [(300, 32, True), (20, 32, False), (300, 8, False), (40, 256, True)]
)
def test_chains_are_the_same_and_only_large_products_are_replaced(chains, width, used, replaced, monkeypatch):
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 2)
    energy, start = network(width), torch.randn(chains, 3, generator=seeded())
    eager, compiled = (
        gb.sample(energy, gb.ULA(0.01), start, steps=2, rng=seeded(1), compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.x, eager.x, rtol=1e-5, atol=1e-5)
    assert replaced
    assert any(replaced) is used


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thin_products_are_written_out_and_give_the_same_numbers(dtype, written_out, monkeypatch):
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 1)
    energy, start = network(8).to(dtype), torch.randn(20, 3, generator=seeded()).to(dtype)
    eager, compiled = (
        gb.sample(energy, gb.ULA(0.01), start, steps=1, rng=seeded(1), compile=compile) for compile in (False, True)
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(compiled.state.grad, eager.state.grad, rtol=tolerance, atol=tolerance)
    # Forward 3 -> 8 and 8 -> 1, and one or both back (torch writes out a product with one term itself, at times).
    assert written_out[0] in (3, 4)


@needs_compiler
@pytest.mark.parametrize("extreme", [1.0, 1e3])
def test_an_activation_and_its_derivative_share_an_exponential(extreme, monkeypatch):
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 1)
    counts = counted(monkeypatch, "share_exponentials")
    energy, start = network(8), extreme * torch.randn(20, 3, generator=seeded())
    with inductor.patch(fx_graph_cache=False):
        eager, compiled = (
            gb.sample(energy, gb.ULA(1e-6), start, steps=1, rng=seeded(1), compile=compile) for compile in (False, True)
        )
    torch.testing.assert_close(compiled.state.grad, eager.state.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.state.energy, eager.state.energy, rtol=1e-5, atol=1e-5)
    assert counts[0] == 2


def test_a_sigmoid_may_stand_anywhere_and_serve_several():
    def traced(x, w):
        early = x.sigmoid()
        both = x / (1 + (-x).exp()), (x @ w) / (1 + (-(x @ w)).exp())
        return early, *both, x / ((-x).exp() + 1), (x @ w).sigmoid()

    x, w = torch.randn(4, 4, generator=seeded()), torch.randn(4, 4, generator=seeded(1))
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    graph = make_fx(lambda x, w: [t + 0.0 for t in traced(x, w)])(x, w)
    FakeTensorProp(graph).propagate(x, w)
    with inductor_context(graph):
        count = matmul.share_exponentials(graph.graph)
    graph.graph.lint()
    graph.recompile()
    assert count >= 1
    for found, true in zip(graph(x, w), traced(x, w)):
        torch.testing.assert_close(found, true)


@contextmanager
def inductor_context(graph):
    """Give a pass what it has within the compiler."""
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode

    with V.set_fake_mode(FakeTensorMode(allow_non_fake_inputs=True)):
        for node in graph.graph.nodes:
            if isinstance(value := node.meta.get("val"), torch.Tensor):
                node.meta["val"] = V.fake_mode.from_tensor(torch.empty_strided(value.shape, value.stride()))
        yield


@needs_compiler
def test_convolutions_compile(recwarn):
    energy, start = gb.ConvEnergy((1, 8, 8), (4, 4)), torch.randn(3, 1, 8, 8, generator=seeded())
    eager, compiled = (
        gb.sample(energy, gb.ULA(1e-3), start, steps=3, rng=seeded(1), compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.x, eager.x, rtol=1e-5, atol=1e-5)
    assert not [w for w in recwarn if "Compilation failed" in str(w.message)]


@needs_compiler
def test_weights_that_a_block_uses_often_are_turned_once(monkeypatch):
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 6)
    counts = counted(monkeypatch, "lay_out_often_used")
    energy, start = network(32), torch.randn(20, 3, generator=seeded())
    with inductor.patch(fx_graph_cache=False):
        eager, compiled = (
            gb.sample(energy, gb.ULA(0.01), start, steps=6, rng=seeded(1), compile=compile) for compile in (False, True)
        )
    torch.testing.assert_close(compiled.x, eager.x, rtol=1e-5, atol=1e-5)
    assert counts[0] == 1


@needs_compiler
def test_a_compiled_loss_has_the_gradients_of_an_eager_one():
    rows, found = torch.randn(20, 3, generator=seeded()), []
    for compile in (False, True):
        energy = network(8)
        loss = gb.ContrastiveDivergence(gb.ULA(0.01), 1, compile=compile)(energy, gb.Batch(rows), seeded(1))
        loss.value.backward()
        found.append([loss.value.detach(), *(p.grad for p in energy.parameters())])
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_the_product_is_the_layers():
    product = matmul.operators()[0].linear.default
    x, weight, bias = (torch.randn(shape, generator=seeded(i)) for i, shape in enumerate(((300, 32), (16, 32), (16,))))
    torch.testing.assert_close(product(x, weight, bias), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(x, weight.T.contiguous().T, None), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_other_machines_keep_torchs_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    (chosen,) = matmul.options.__wrapped__().values()
    assert "onednn" not in chosen.uuid()


@needs_compiler
@pytest.mark.slow
def test_a_graph_from_the_cache_of_another_process_runs(tmp_path):
    program = """
import torch, gibbsian as gb
from gibbsian import matmul
matmul.options = lambda: {"post_grad_custom_post_pass": matmul.products_pass(True)}
energy = lambda x: (x @ torch.ones(3, 32)).sin() @ torch.ones(32, 32) @ torch.ones(32)
gb.sample(energy, gb.HMC(0.01, leapfrog=2), torch.zeros(300, 3), steps=1, rng=torch.Generator(), compile=True)
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
