"""Times the samplers of blackjax, jitted by JAX.

Used as its documentation shows: the kernel of one chain under ``vmap``, its steps in one jitted loop whose length is an
argument, so that no length compiles anew.  The energies have the weights of the shared targets; JAX is told to use one
thread, and the process stays on one core.  Unadjusted Langevin is its ``sgld`` with the exact gradient.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"
if hasattr(os, "sched_setaffinity"):
    # Before JAX makes its threads: those that it has would keep to their cores.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import targets
import torch
from harness import Case, Runner, Worker, main
from torch import Tensor, nn

LogDensity = Callable[[Any], Any]


def manywell(net: targets.ManyWell) -> LogDensity:
    """Log-density of one point."""
    linear, quadratic, quartic = (jnp.asarray(t.numpy()) for t in (net.linear, net.quadratic, net.quartic))

    def log_density(x: Any) -> Any:
        squared = x * x
        return -jnp.sum(squared * (quartic * squared + quadratic) + linear * x)

    return log_density


def network(net: targets.MLP | targets.ConvNet) -> LogDensity:
    """Log-density of one point by the layers of a torch network."""
    layers = [_layer(module) for module in net.net]

    def log_density(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return -x[0]

    return log_density


def _layer(module: nn.Module) -> Callable[[Any], Any]:
    if isinstance(module, nn.SiLU):
        return jax.nn.silu
    if isinstance(module, nn.Flatten):
        return jnp.ravel
    weight, bias = jnp.asarray(module.weight.numpy()), jnp.asarray(module.bias.numpy())
    if isinstance(module, nn.Linear):
        return lambda x: weight @ x + bias
    stride, padding = module.stride, [(p, p) for p in module.padding]
    return lambda x: jax.lax.conv_general_dilated(x[None], weight, stride, padding)[0] + bias[:, None, None]


def stepper(case: Case, log_density: LogDensity) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    """Initial state of one chain, and its step."""
    h = targets.TARGETS[case.target].step_sizes[case.kernel]
    if case.kernel == "ULA":
        gradient = jax.grad(log_density)
        sgld = blackjax.sgld(lambda x, _: gradient(x))
        return lambda x: x, lambda key, x: sgld.step(key, x, None, h)
    if case.kernel == "MALA":
        kernel = blackjax.mala(log_density, h)
    else:
        event = targets.TARGETS[case.target].event
        kernel = blackjax.hmc(log_density, h, jnp.ones(int(torch.tensor(event).prod())), targets.LEAPFROG)
    return kernel.init, lambda key, state: kernel.step(key, state)[0]


def prepare(case: Case, compiled: bool) -> Runner:
    """Runner of a case."""
    net, event = targets.build(case.target), targets.TARGETS[case.target].event
    inner = manywell(net) if isinstance(net, targets.ManyWell) else network(net)
    # The kernels' mass matrices are for vectors: an image is a row, whose shape the density restores.
    init, step = stepper(case, lambda x: inner(x.reshape(event)))
    start = jnp.asarray(targets.start(case.target, case.chains).flatten(1).numpy())
    # A state's cached gradient is computed once, outside of the loop that is timed.
    state = jax.jit(jax.vmap(init))(start)

    @jax.jit
    def loop(key: Any, state: Any, steps: Any) -> Any:
        def body(i: Any, state: Any) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, i), case.chains)
            return jax.vmap(step)(keys, state)

        return jax.lax.fori_loop(0, steps, body, state)

    def run(steps: int) -> Tensor:
        end = jax.block_until_ready(loop(jax.random.key(0), state, steps))
        return torch.from_numpy(jnp.asarray(getattr(end, "position", end)).__array__().copy())

    return run


if __name__ == "__main__":
    main(Worker("blackjax", version("blackjax"), prepare))
