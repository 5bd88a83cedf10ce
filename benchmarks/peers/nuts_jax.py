"""NUTS of blackjax and of numpyro on one target: warm-up, a run that compiles, a run that is timed.

    python nuts_jax.py blackjax gaussian100 16 1000 1000 draws.npy

takes library, target, chains, warm-up steps, draws and the file for them; prints one line of JSON.  Both adapt step
size and a diagonal mass matrix in their own windowed warm-up, chain by chain, aim at an acceptance of 0.8, and move the
chains together on one core.
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
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import nuts_targets

Run = Callable[[], tuple[Any, float, float]]
"""Makes the draws: ``(draws, chains, d)``, the mean number of leapfrog steps of a draw, and the seconds it took."""


def potential(target: str) -> Callable[[Any], Any]:
    """Energy of one point."""
    if target == "gaussian100":
        matrix = jnp.asarray(nuts_targets.precision())
        return lambda x: 0.5 * x @ (matrix @ x)

    def funnel(x: Any) -> Any:
        v, rest = x[0], x[1:]
        return v * v / 18.0 + 0.5 * jnp.sum(rest * rest) * jnp.exp(-v) + 0.5 * rest.size * v

    return funnel


def blackjax_run(energy: Callable[[Any], Any], x0: Any, warmup: int, draws: int) -> tuple[Run, float]:
    """Adapt with Stan's windows, and return what draws."""
    import blackjax

    def log_density(x: Any) -> Any:
        return -energy(x)

    windows = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=0.8)
    adapt = jax.jit(jax.vmap(lambda key, x: windows.run(key, x, warmup)[0]))
    keys = jax.random.split(jax.random.key(0), len(x0))
    jax.block_until_ready(adapt(keys, x0))
    began = time.perf_counter()
    found = jax.block_until_ready(adapt(keys, x0))
    seconds = time.perf_counter() - began
    kernel = blackjax.nuts.build_kernel()

    def step(key: Any, state: Any, parameters: Any) -> Any:
        return kernel(key, state, log_density, **parameters)

    @jax.jit
    def loop(keys: Any, state: Any, parameters: Any) -> Any:
        def body(state: Any, key: Any) -> Any:
            state, info = jax.vmap(step)(jax.random.split(key, len(x0)), state, parameters)
            return state, (state.position, info.num_integration_steps)

        return jax.lax.scan(body, state, keys)[1]

    def run() -> tuple[Any, float, float]:
        keys = jax.random.split(jax.random.key(1), draws)
        began = time.perf_counter()
        positions, leaps = jax.block_until_ready(loop(keys, found.state, found.parameters))
        return positions, float(leaps.mean()), time.perf_counter() - began

    return run, seconds


def numpyro_run(energy: Callable[[Any], Any], x0: Any, warmup: int, draws: int) -> tuple[Run, float]:
    """Adapt with Stan's windows, and return what draws."""
    import numpyro
    from numpyro.distributions import ImproperUniform, constraints
    from numpyro.infer import MCMC, NUTS

    def model() -> None:
        x = numpyro.sample("x", ImproperUniform(constraints.real_vector, (), (x0.shape[1],)))
        numpyro.factor("energy", -energy(x))

    def sampler(draws: int) -> MCMC:
        options: dict[str, Any] = {"num_chains": len(x0), "chain_method": "vectorized", "progress_bar": False}
        return MCMC(NUTS(model, target_accept_prob=0.8), num_warmup=warmup, num_samples=draws, **options)

    def timed(mcmc: MCMC) -> float:
        began = time.perf_counter()
        mcmc.run(jax.random.PRNGKey(0), extra_fields=("num_steps",), init_params={"x": x0})
        jax.block_until_ready(mcmc.get_samples())
        return time.perf_counter() - began

    # Its kernel cannot be run from a vectorised warm-up's state: what a run takes beyond a warm-up is the sampling.
    short, long = sampler(1), sampler(draws)
    timed(short)
    warming = timed(short)

    def run() -> tuple[Any, float, float]:
        seconds = timed(long) - warming
        positions = jnp.swapaxes(long.get_samples(group_by_chain=True)["x"], 0, 1)
        return positions, float(long.get_extra_fields()["num_steps"].mean()), seconds

    return run, warming


def main() -> None:
    """Read the command line, run, print."""
    library, target, chains, warmup, draws, path = sys.argv[1:]
    x0 = jnp.asarray(nuts_targets.start(target, int(chains)))
    make = {"blackjax": blackjax_run, "numpyro": numpyro_run}[library]
    run, warming = make(potential(target), x0, int(warmup), int(draws))
    run()  # compiles
    positions, leapfrogs, seconds = run()
    np.save(path, np.asarray(positions))
    told = {"library": library, "version": version(library), "warmup_seconds": warming, "seconds": seconds}
    print(json.dumps(told | {"leapfrogs": leapfrogs}))


if __name__ == "__main__":
    main()
