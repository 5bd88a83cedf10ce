"""NUTS of gibbsian on one target, in the form of ``nuts_jax.py``: warm-up, a run that compiles, a run that is timed.

python nuts_gibbsian.py gibbsian gaussian100 16 1000 1000 draws.npy
"""

from __future__ import annotations

import json
import os
import sys
import time

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import numpy as np
import nuts_targets
import torch

import gibbsian as gb


def energy_of(target: str) -> gb.Energy:
    """Energy of a batch."""
    if target == "gaussian100":
        matrix = torch.from_numpy(nuts_targets.precision())
        return gb.Energy.of(lambda x: 0.5 * ((x @ matrix) * x).sum(1), (nuts_targets.DIM,))

    def funnel(x: torch.Tensor) -> torch.Tensor:
        v, rest = x[:, 0], x[:, 1:]
        return v * v / 18.0 + 0.5 * rest.square().sum(1) * (-v).exp() + 0.5 * rest.shape[1] * v

    return gb.Energy.of(funnel, (nuts_targets.FUNNEL_DIM,))


def main() -> None:
    """Read the command line, run, print."""
    _, target, chains, warmup, draws, path = sys.argv[1:]
    torch.set_num_threads(1)
    energy, start = energy_of(target), torch.from_numpy(nuts_targets.start(target, int(chains)))
    rng = torch.Generator().manual_seed(0)
    gb.warm_up(energy, gb.NUTS(0.1), start, steps=150, rng=rng, compile=True)  # compiles
    began = time.perf_counter()
    warm = gb.warm_up(energy, gb.NUTS(0.1), start, steps=int(warmup), rng=rng, compile=True)
    warming = time.perf_counter() - began
    gb.sample(energy, warm.kernel, warm.state, steps=20, rng=rng, thin=1, compile=True)
    began = time.perf_counter()
    made = gb.sample(energy, warm.kernel, warm.state, steps=int(draws), rng=rng, thin=1, compile=True)
    seconds = time.perf_counter() - began
    np.save(path, made.draws.numpy())
    told = {"library": "gibbsian", "version": gb.__version__, "warmup_seconds": warming, "seconds": seconds}
    print(json.dumps(told | {"leapfrogs": float(made.details["leapfrog_steps"].mean())}))


if __name__ == "__main__":
    main()
