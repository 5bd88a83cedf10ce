"""Times full sweeps of THRML over a square lattice of spins at its critical coupling.

As its documentation shows: an `IsingEBM` over the edges of the torus, the two colours of the checkerboard as blocks,
and its sampling program under `jit`; several chains by `vmap`. JAX is told to use one thread, and the process stays on
one core. Answers each line ``CHAINS SWEEPS`` on standard input with a line of JSON.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from thrml import Block, SamplingSchedule, SpinNode, sample_states
from thrml.models import IsingEBM, IsingSamplingProgram, hinton_init

SIDE, COUPLING = 512, 0.44068679350977147


def runner(chains: int, sweeps: int) -> Any:
    """A jitted run of so many sweeps from a fixed start, of which the last state is kept."""
    nodes = [SpinNode() for _ in range(SIDE * SIDE)]
    site = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    pairs = [np.stack((site, np.roll(site, -1, axis)), -1).reshape(-1, 2) for axis in (0, 1)]
    edges = [(nodes[a], nodes[b]) for a, b in np.concatenate(pairs)]
    model = IsingEBM(nodes, edges, jnp.zeros(len(nodes)), jnp.full((len(edges),), COUPLING), jnp.array(1.0))
    colour = np.add.outer(np.arange(SIDE), np.arange(SIDE)).ravel() % 2
    blocks = [Block([nodes[i] for i in np.flatnonzero(colour == k)]) for k in (0, 1)]
    program = IsingSamplingProgram(model, blocks, [])
    schedule = SamplingSchedule(n_warmup=sweeps, n_samples=1, steps_per_sample=0)

    def one(key: Any, start: Any) -> Any:
        return sample_states(key, program, schedule, start, [], [Block(nodes)])

    start = hinton_init(jax.random.key(0), model, blocks, () if chains == 1 else (chains,))
    run = jax.jit(one if chains == 1 else jax.vmap(one))
    split = (lambda key: key) if chains == 1 else (lambda key: jax.random.split(key, chains))
    return lambda seed: jax.block_until_ready(run(split(jax.random.key(seed)), start))


def main() -> None:
    """Answer requests until standard input closes."""
    runners: dict[str, Any] = {}
    for seed, line in enumerate(sys.stdin):
        chains, sweeps = map(int, line.split())
        if line not in runners:
            runners[line] = runner(chains, sweeps)
            runners[line](0)
        wall, cpu = time.perf_counter(), time.process_time()
        runners[line](seed)
        found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(found | {"version": version("thrml"), "jax": version("jax")}), flush=True)


if __name__ == "__main__":
    main()
