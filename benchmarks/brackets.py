"""Brackets of log Z on ten energies whose log Z is known.

Each energy is annealed from a plain Gaussian whose scale is the only thing chosen per case, forwards from the base and
backwards from exact draws of the energy. One effort serves all cases: ``--chains`` and ``--temperatures``. Prints a
Markdown table and writes ``results/brackets.json`` beside this file.

    python benchmarks/brackets.py --threads 1
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gibbsian.energies.targets import DoubleWell, Funnel, GaussianMixture, ManyWell
from gibbsian.energies.toys import EightGaussians, Ring, Rosenbrock
from gibbsian.energies.tractable import Gaussian
from gibbsian.kernels.hmc import HMC
from gibbsian.partition.annealed import log_weights
from gibbsian.partition.bracket import between
from gibbsian.partition.paths import geometric
from gibbsian.partition.schedule import pilot

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Row:
    """One line of the table; all but the last two in nats."""

    name: str
    base_scale: float
    true: float
    forward: float
    reverse: float
    value: float
    stderr: float
    lower: float
    upper: float
    width: float
    inside: bool
    ess: float
    seconds: float


def mixture(dim: int, components: int, separation: float, seed: int) -> GaussianMixture:
    """Place unit Gaussians of unequal weights at distances of about ``separation``."""
    rng = torch.Generator().manual_seed(seed)
    locs = torch.randn(components, dim, generator=rng) * separation / math.sqrt(2.0 * dim)
    return GaussianMixture(locs, 1.0, torch.linspace(1.0, 3.0, components))


def correlated(dim: int, seed: int) -> Gaussian:
    """Build a Gaussian whose variances run from 0.05 to 5 along random directions."""
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))
    covariance = q @ torch.diag(torch.logspace(math.log10(0.05), math.log10(5.0), dim)) @ q.T
    return Gaussian(covariance=0.5 * (covariance + covariance.T))


CASES: dict[str, tuple[Callable[[], object], float]] = {
    "mixture, 2-d, close": (lambda: mixture(2, 4, 3.0, 1), 3.0),
    "eight Gaussians, 2-d": (EightGaussians, 3.0),
    "mixture, 8-d, close": (lambda: mixture(8, 4, 4.0, 2), 2.0),
    "mixture, 8-d, apart": (lambda: mixture(8, 4, 8.0, 3), 3.0),
    "correlated Gaussian, 10-d": (lambda: correlated(10, 4), 2.0),
    "double well, 2-d": (DoubleWell, 2.0),
    "ring, 2-d": (Ring, 3.0),
    "banana, 2-d": (Rosenbrock, 3.0),
    "funnel, 10-d": (lambda: Funnel(10), 3.0),
    "many-well, 32-d": (lambda: ManyWell(32), 1.5),
}


def measure(name: str, chains: int, temperatures: int, seed: int, compile: bool) -> Row:
    """Bracket one case."""
    make, scale = CASES[name]
    energy = make()
    rng = torch.Generator().manual_seed(seed)
    base, kernel = Gaussian(energy.event_shape, scale=scale), HMC(0.1, leapfrog=5)
    draws = energy.sample(chains, rng)
    began = time.perf_counter()
    path = geometric(base, energy)
    schedule = pilot(path, base, kernel, rng=rng, temperatures=temperatures)
    # What bracket() does, taken apart to show the two one-sided estimates.
    ahead = log_weights(path, schedule, kernel, base.sample(chains, rng), rng=rng, compile=compile)
    back = log_weights(path, schedule, kernel, draws, rng=rng, compile=compile, backwards=True)
    found = between(ahead, back, CONFIDENCE)
    seconds = time.perf_counter() - began
    lower, upper = float(found.lower), float(found.upper)
    return Row(
        name=name,
        base_scale=scale,
        true=energy.log_z,
        forward=float(torch.logsumexp(ahead, 0)) - math.log(chains),
        reverse=math.log(chains) - float(torch.logsumexp(-back, 0)),
        value=float(found.value),
        stderr=float(found.stderr),
        lower=lower,
        upper=upper,
        width=upper - lower,
        inside=lower <= energy.log_z <= upper,
        ess=float(found.ess),
        seconds=seconds,
    )


def line(row: Row) -> str:
    """Write one row of the table."""
    return (
        f"| {row.name} | {row.base_scale:g} | {row.true:.4f} | {row.forward:.4f} | {row.reverse:.4f} | "
        f"{row.value:.4f} ± {row.stderr:.4f} | [{row.lower:.3f}, {row.upper:.3f}] | {row.width:.3f} | "
        f"{'yes' if row.inside else 'NO'} | {row.ess:.0f} | {row.seconds:.1f} |"
    )


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=4096)
    parser.add_argument("--temperatures", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "brackets.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print("| energy | base scale | true | forward | reverse | value | 99% bracket | width | inside | ess | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.only:
        rows.append(measure(name, options.chains, options.temperatures, options.seed, not options.eager))
        print(line(rows[-1]), flush=True)
    inside, widest = sum(r.inside for r in rows), max(r.width for r in rows)
    total = sum(r.seconds for r in rows)
    print(f"\nInside: {inside} of {len(rows)}; widest bracket {widest:.3f} nat; {total:.0f} s in all.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {options.threads} thread(s)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "chains": options.chains,
        "temperatures": options.temperatures,
        "seed": options.seed,
        "compiled": not options.eager,
        "confidence": CONFIDENCE,
        "rows": [asdict(r) for r in rows],
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
