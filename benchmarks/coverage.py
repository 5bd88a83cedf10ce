"""Whether brackets of log Z hold as often as they say, and estimates are as wrong as they say.

Three energies whose log Z is known: a restricted Boltzmann machine and an Ising lattice, by enumeration, and a mixture
of Gaussians in the plane, in closed form. Every estimator of the library runs many times on each, with few chains and
temperatures, as errors that are hard to see prove nothing. Two things are counted: how often the bounds hold, and how
far the estimates are from the truth in units of the errors that came with them (z), whose standard deviation should
be 1.

    python benchmarks/coverage.py
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.energies.grids import states
from gibbsian.partition.paths import Path, geometric
from gibbsian.partition.schedule import pilot

REPEATS, CHAINS, TEMPERATURES = 100, 256, 60
ROWS = 32
"""Held-out rows of the lower bound on their likelihood."""

KEPT = 20
"""Steps at each stop of thermodynamic integration, and draws of each chain for the multistate ratio."""


@dataclass(frozen=True)
class Model:
    """An energy with known log Z, exact draws, and how chains reach it."""

    energy: gb.Energy
    base: gb.Tractable
    kernel: gb.Kernel
    path: Path
    log_z: float
    draw: Callable[[int, Generator], Tensor]


def listed(energy: gb.Energy, shape: tuple[int, ...]) -> Callable[[int, Generator], Tensor]:
    """Exact draws from the list of all states."""
    with torch.no_grad():
        all_states = states(shape, energy.support, torch.empty((), dtype=torch.float64))
        law = (-energy(all_states)).softmax(0)
    return lambda n, rng: all_states[torch.multinomial(law, n, replacement=True, generator=rng)]


def machine() -> Model:
    """12 visible and 8 hidden units with couplings of order one."""
    energy = gb.RBM(12, 8).double()
    with torch.no_grad():
        for i, parameter in enumerate((energy.weight, energy.visible_bias, energy.hidden_bias)):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(i)).double())
    base = energy.base()
    log_z = float(gb.exact_log_z(energy).value)
    return Model(energy, base, gb.RBMGibbs(), gb.rbm_path(base, energy), log_z, listed(energy, (12,)))


def lattice() -> Model:
    """A torus of 16 spins near the coupling at which large ones order."""
    energy = gb.Ising.lattice((4, 4), torch.tensor(0.4, dtype=torch.float64), field=0.05)
    base = gb.Bernoulli(logits=torch.zeros(4, 4, dtype=torch.float64))
    path, log_z = geometric(base, energy), float(gb.enumeration(energy).value)
    return Model(energy, base, gb.BlockGibbs(), path, log_z, listed(energy, (4, 4)))


def mixture() -> Model:
    """Three Gaussians of unequal weights and widths, which chains pass between now and then."""
    locs = torch.tensor([[-2.0, 0.0], [1.5, 1.5], [1.0, -2.0]]).double()
    energy = gb.GaussianMixture(locs, torch.tensor([0.7, 1.0, 0.5]).double(), torch.tensor([0.5, 0.3, 0.2]).double())
    base = gb.Gaussian(2, scale=3.0).double()
    return Model(energy, base, gb.HMC(0.3, leapfrog=3), geometric(base, energy), 0.0, energy.sample)


MODELS = {"RBM, 12 + 8": machine, "Ising, 4 x 4": lattice, "mixture, 2-d": mixture}


@dataclass(frozen=True)
class Told:
    """One estimate of one repeat, and the truth about it."""

    found: gb.LogZ
    truth: float


def annealed(model: Model, rng: Generator) -> dict[str, Told]:
    """Estimate by what carries weights from the base, or to it."""
    common: dict[str, Any] = {"rng": rng, "kernel": model.kernel, "path": model.path}
    few: dict[str, Any] = common | {"temperatures": TEMPERATURES}
    energy, base = model.energy, model.base
    return {
        "bracket": Told(gb.bracket(energy, base, model.draw(CHAINS, rng), **few), model.log_z),
        "ais": Told(gb.ais(energy, base, chains=CHAINS, **few), model.log_z),
        "reverse_ais": Told(gb.reverse_ais(energy, base, model.draw(CHAINS, rng), **few), model.log_z),
        "smc": Told(gb.smc(energy, base, chains=1024, populations=16, **common).log_z, model.log_z),
    }


def with_draws(model: Model, rng: Generator) -> dict[str, Told]:
    """Estimate by draws of the energy, and of states between it and the base."""
    found = gb.bridge(model.energy, model.base, model.draw(CHAINS, rng), model.base.sample(CHAINS, rng))
    schedule = pilot(model.path, model.base, model.kernel, rng=rng, temperatures=4)
    betas = schedule.betas.double()
    energies, draws = [model.path(b) for b in betas], []
    x = model.base.sample(16, rng)
    for energy in energies:
        run = gb.sample(energy, model.kernel, x, steps=2 * KEPT, warmup=KEPT, thin=1, rng=rng)
        x = run.x
        draws.append(run.draws)
    return {
        "bridge": Told(found, model.log_z),
        "mbar": Told(gb.mbar(energies, draws).log_z(len(energies) - 1), model.log_z),
    }


def integrated(model: Model, rng: Generator) -> dict[str, Told]:
    """Estimate by thermodynamic integration, by both rules."""
    told = {}
    for rule, nodes in (("trapezoid", 9), ("gauss", 7)):
        path = None if rule == "trapezoid" and not isinstance(model.energy, gb.RBM) else model.path
        found = gb.thermodynamic_integration(
            model.energy,
            model.base,
            rng=rng,
            kernel=model.kernel,
            path=path,
            rule=rule,
            nodes=nodes,
            steps=KEPT,
        )
        told[f"integration, {rule}"] = Told(found.log_z, model.log_z)
    return told


def held_out(model: Model, rng: Generator) -> dict[str, Told]:
    """Bound the mean log-likelihood of rows from below."""
    rows = model.draw(ROWS, rng)
    with torch.no_grad():
        truth = float((-model.energy(rows)).mean()) - model.log_z
    found = gb.raise_lower_bound(
        model.energy,
        model.base,
        rows,
        rng=rng,
        kernel=model.kernel,
        path=model.path,
        chains=16,
        temperatures=TEMPERATURES,
    )
    none = torch.full_like(found.value, torch.inf)
    return {"raise_lower_bound": Told(gb.LogZ(found.value, found.stderr, found.lower, none, found.ess.mean()), truth)}


def once(model: Model, rng: Generator) -> dict[str, Told]:
    """Run everything once. Estimators that warn are no worse for it here: what they say is what is judged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return annealed(model, rng) | with_draws(model, rng) | integrated(model, rng) | held_out(model, rng)


def summary(model: str, name: str, runs: list[Told]) -> dict[str, Any]:
    """Count the bounds that hold, and take the moments of z."""
    told = [[float(v) for v in (r.found.value, r.found.stderr, r.found.lower, r.found.upper, r.truth)] for r in runs]
    value, stderr, lower, upper, truth = torch.tensor(told, dtype=torch.float64).T
    off = value - truth
    z = off / stderr
    held = (lower <= truth) & (truth <= upper)
    bounded = bool(torch.isfinite(lower).any() or torch.isfinite(upper).any())
    return {
        "model": model,
        "estimator": name,
        "repeats": len(runs),
        "rms_error": float(off.square().mean().sqrt()),
        "stated": float(stderr.square().mean().sqrt()),
        "z_mean": float(z.mean()),
        "z_sd": float(z.std()) if len(runs) > 1 else math.nan,
        "within_two": float((z.abs() < 2.0).double().mean()),
        "held": int(held.sum()) if bounded else None,
        "width": float((upper - lower).median()) if bool(torch.isfinite(upper - lower).all()) else None,
    }


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        f"{row['model']}: {row['estimator']}",
        f"{row['rms_error']:.4f}",
        f"{row['stated']:.4f}",
        f"{row['z_mean']:+.2f}",
        f"{row['z_sd']:.2f}",
        f"{row['within_two']:.0%}",
        "" if row["held"] is None else f"{row['held']} of {row['repeats']}",
        "" if row["width"] is None else f"{row['width']:.2f}",
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all models, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--budget", type=float, default=1.0, help=f"share of the {REPEATS} repeats")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    repeats = max(2, round(options.budget * REPEATS))
    rows: list[dict[str, Any]] = []
    spent = 0.0
    for name in options.models:
        model, i = MODELS[name](), list(MODELS).index(name)
        with Stopwatch() as watch:
            runs = [once(model, generator(options.seed, i, k)) for k in range(repeats)]
        spent += watch.cpu
        rows += [summary(name, key, [run[key] for run in runs]) for key in runs[0]]
        report(rows, repeats, spent, options)
    return rows


def report(rows: list[dict[str, Any]], repeats: int, spent: float, options: argparse.Namespace) -> None:
    """Write what there is so far."""
    record = circumstances([options.seed], 1) | {"repeats": repeats, "cpu": spent, "rows": rows}
    header = ["energy, estimator", "rms error", "stated", "mean z", "sd of z", "z within 2", "bounds held", "width"]
    spread = 1.0 / math.sqrt(2.0 * max(repeats - 1, 1))
    note = (
        f"{repeats} repeats, {CHAINS} chains and {TEMPERATURES} temperatures where they count; errors in nats, bounds "
        f"at 99%, the width of brackets a median. z is the error by the stated error; its standard deviation is known "
        f"to {spread:.0%} and its mean to {1 / math.sqrt(repeats):.2f}. Integration keeps {KEPT} steps at a stop, and "
        "mbar as many draws of a chain. raise_lower_bound, of the mean log-likelihood of rows, is below on average by "
        "what annealing falls short of the model: its error is stated without that. "
        f"{spent:.0f} s of processor time in all."
    )
    write("coverage", "Coverage of estimates of log Z", record, [note, table(header, map(line, rows))])


if __name__ == "__main__":
    for told in main():
        print(" | ".join(line(told)))
