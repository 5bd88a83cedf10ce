"""Brackets of log Z on the two-dimensional Ising torus, whose log Z is known in closed form.

Lattices of 16 x 16 and 32 x 32 sites below, at and above the coupling at which they order, annealed by checkerboard
sweeps from free spins (beta = 0) with temperatures that a pilot run spaces, and back from draws of the model. Those are
independent: each comes from free spins by a hundred steps of Swendsen and Wang's, which turn clusters over and pass
between both magnetisations at every coupling; their mean energy is held against the exact one.

    python benchmarks/lattices.py
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Generator, Tensor

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.energies.pairwise import CRITICAL_COUPLING
from gibbsian.partition.lattices import kaufman

COUPLINGS = (0.2, CRITICAL_COUPLING, 0.6)
ASKED = {16: 0.2, 32: 1.0}
"""Nats that a bracket may be wide, by the sites along a side."""

CHAINS = {16: 1024, 32: 256}
TEMPERATURES = {False: 5000, True: 10_000}
"""By whether the coupling is past the critical one, near which chains fall behind."""

CLUSTER_STEPS = 100
"""Some twenty times what the energy of 32 x 32 critical sites takes to decorrelate."""


def exact(size: int, coupling: float) -> float:
    """Kaufman's log Z, in float64."""
    return float(kaufman(torus(size, coupling)).value)


def torus(size: int, coupling: float) -> gb.Ising:
    """Build a square torus with its couplings in float64."""
    return gb.Ising.lattice((size, size), torch.tensor(coupling, dtype=torch.float64))


def swendsen_wang(size: int, coupling: float, chains: int, steps: int, rng: Generator) -> Tensor:
    """Draw states ``(chains, size, size)`` of 0 and 1 by steps from free spins.

    `Nonuniversal critical dynamics in Monte Carlo simulations (Swendsen & Wang, 1987)
    <https://doi.org/10.1103/PhysRevLett.58.86>`_: neighbours that agree are joined with probability 1 - exp(-2 J), and
    each cluster that results is given one value, 0 or 1 alike.
    """
    x = torch.rand(chains, size, size, generator=rng) < 0.5
    sites = torch.arange(x.numel()).view(x.shape)
    for _ in range(steps):
        ends: list[list[Tensor]] = [[], []]
        for axis in (1, 2):
            drawn = torch.rand(x.shape, generator=rng) < -math.expm1(-2.0 * coupling)
            joined = (x == x.roll(-1, axis)) & drawn
            ends[0].append(sites[joined])
            ends[1].append(sites.roll(-1, axis)[joined])
        rows, columns = (torch.cat(e).numpy() for e in ends)
        graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(x.numel(), x.numel()))
        count, cluster = connected_components(graph, directed=False)
        values = torch.rand(int(count), generator=rng) < 0.5
        x = values[torch.from_numpy(cluster).long()].view(x.shape)
    return x.float()


def energy_off(size: int, coupling: float, draws: Tensor) -> float:
    """How many standard errors the draws' mean energy is from the exact one, a derivative of log Z."""
    step = 1e-5
    slope = (exact(size, coupling + step) - exact(size, coupling - step)) / (2.0 * step)
    found = -torus(size, 1.0)(draws.double())
    return float((found.mean() - slope) / found.std() * math.sqrt(len(found)))


def measure(size: int, coupling: float, chains: int, temperatures: int, compile: bool, seed: int) -> dict[str, Any]:
    """Bracket one lattice."""
    rng = generator(seed, size, int(1e6 * coupling))
    truth = exact(size, coupling)
    with Stopwatch() as drawing:
        draws = swendsen_wang(size, coupling, chains, CLUSTER_STEPS, rng)
    energy, base = gb.Ising.lattice((size, size), coupling), gb.Bernoulli(logits=torch.zeros(size, size))
    with Stopwatch() as annealing:
        found = gb.bracket(
            energy, base, draws, rng=rng, temperatures=temperatures, kernel=gb.BlockGibbs(), compile=compile
        )
    value, stderr, lower, upper, ess = (float(v) for v in found[:5])
    return {
        "size": size,
        "coupling": coupling,
        "exact": truth,
        "value": value,
        "stderr": stderr,
        "lower": lower,
        "upper": upper,
        "width": upper - lower,
        "inside": lower <= truth <= upper,
        "narrow": upper - lower < ASKED[size],
        "ess": ess,
        "chains": chains,
        "temperatures": temperatures,
        "energy_off": energy_off(size, coupling, draws),
        "drawing": {"wall": drawing.wall, "cpu": drawing.cpu},
        "annealing": {"wall": annealing.wall, "cpu": annealing.cpu},
        "seed": seed,
    }


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        f"{row['size']} x {row['size']}, {row['coupling']:.8g}",
        f"{row['exact']:.8f}",
        f"{row['value']:.4f} ± {row['stderr']:.4f}",
        f"[{row['lower']:.3f}, {row['upper']:.3f}]",
        "yes" if row["inside"] else "NO",
        f"{row['width']:.3f}" + ("" if row["narrow"] else " (too wide)"),
        f"{row['ess']:.0f} of {row['chains']}",
        f"{row['temperatures']}",
        f"{row['energy_off']:+.1f}",
        f"{row['drawing']['cpu']:.0f} + {row['annealing']['cpu']:.0f}",
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all lattices, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(ASKED), choices=list(ASKED))
    parser.add_argument("--couplings", type=float, nargs="+", default=list(COUPLINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=float, default=1.0, help="share of the temperatures")
    parser.add_argument("--keep", action="store_true", help="keep from results/lattices.json what is not run anew")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = kept(options) if options.keep else []
    for seed in options.seeds:
        for size in options.sizes:
            for coupling in options.couplings:
                temperatures = max(2, round(options.budget * TEMPERATURES[coupling > CRITICAL_COUPLING]))
                rows.append(measure(size, coupling, CHAINS[size], temperatures, not options.eager, seed))
                report(rows, options)
    return rows


def kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the rows of an earlier run that this one does not replace."""
    record = json.loads((common.RESULTS / "lattices.json").read_text())
    if record["budget"] != options.budget or record["seeds"] != options.seeds:
        raise SystemExit("--keep needs the record's own --budget and --seeds.")
    anew = {(size, coupling) for size in options.sizes for coupling in options.couplings}
    return [row for row in record["rows"] if (row["size"], row["coupling"]) not in anew]


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what there is so far."""
    record = circumstances(options.seeds, 1) | {"budget": options.budget, "compiled": not options.eager, "rows": rows}
    rows = sorted(rows, key=lambda row: (row["seed"], row["size"], row["coupling"]))
    header = ["sites, coupling", "exact log Z", "value", "99% bracket", "inside", "width", "ess", "temperatures"]
    header += ["energy of the draws, in its standard errors", "s CPU, draws + annealing"]
    note = (
        "Two-dimensional Ising models on a torus, without field; log Z in nats. Annealed forwards from free spins and "
        f"backwards from as many independent draws ({CLUSTER_STEPS} Swendsen-Wang steps from free spins each), one "
        "checkerboard sweep at each temperature. The bounds hold for sweeps in a fixed order; value and error take "
        "them for reversible, which they are not quite. Asked: brackets narrower than "
        + " and ".join(f"{width:g} ({size} x {size})" for size, width in ASKED.items())
        + " nats with the truth inside."
    )
    write("lattices", "Brackets of log Z on Ising lattices", record, [note, table(header, map(line, rows))])


if __name__ == "__main__":
    for told in main():
        print(" | ".join(line(told)))
