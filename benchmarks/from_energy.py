"""Samplers learned from an energy alone, beside tempering and SMC with as many energies.

Three targets whose log Z is known: 16 double wells in 32 dimensions, a mixture of forty Gaussians in the plane, and
Neal's funnel in 10 dimensions. A flow is trained by annealed importance sampling bootstrap (`FAB`), with its final
weighted draws; what it spent on energies is what the others get: a controlled diffusion (`CMCD`), parallel tempering
whose log Z comes from all its levels by MBAR, and sequential Monte Carlo. An energy is counted once per point at which
it was evaluated, whether its gradient was taken or not, in tuning, training and drawing alike.

    python benchmarks/from_energy.py
    python benchmarks/from_energy.py --parts funnel --budget 0.1
"""

from __future__ import annotations

import argparse
import io
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.energies.flows import Flow, spline_flow
from gibbsian.energies.targets import Funnel, GaussianMixture, ManyWell
from gibbsian.kernels.tempering import ParallelTempering, replicas_of
from gibbsian.ladders import tune_ladder
from gibbsian.learned.diffusion_sampler import CMCD, fit_diffusion
from gibbsian.learned.fab import FAB
from gibbsian.learned.flow_sampler import fit_flow
from gibbsian.partition.base import LogZ, effective_size
from gibbsian.report.canvas import colour

METHODS = ("FAB", "CMCD", "tempering", "SMC")
DRAWS = 20_000
"""Weighted draws of a trained flow; of a diffusion a tenth, whose paths are long."""

SHOWN = 600
"""Points of each method in the figure."""


class Counted(gb.Energy):
    """An energy that counts the points at which it was evaluated."""

    def __init__(self, energy: gb.Energy) -> None:
        super().__init__()
        self.energy, self.event_shape, self.count = energy, energy.event_shape, 0

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate, and count the rows."""
        self.count += len(x)
        return self.energy(x)


@dataclass(frozen=True)
class Problem:
    """A target, the settings of each method on it, and what its masses are.

    ``shares`` tells, of points ``(n, d)``, in which of the parts that are weighed each lies, ``(n, parts)``, and
    ``exact`` their true masses; ``modes`` are told as found where the target has modes.
    """

    energy: Any
    scale: float
    flow: Callable[[], Flow]
    fab: FAB
    cmcd: CMCD
    shares: Callable[[Tensor], Tensor]
    exact: Tensor
    modes: bool = True


def wells() -> Problem:
    """Both modes of each of 16 wells; the flow couples halves of the coordinates and knows of no symmetry."""
    energy = ManyWell(32)
    knots, cumulative = energy.wells.knots, energy.wells.cumulative
    left = float(cumulative[torch.searchsorted(knots, 0.0)])
    return Problem(
        energy,
        1.5,
        lambda: spline_flow(32, transforms=2, hidden=(64,), passes=2),
        FAB(rounds=300, learning_rate=3e-3),
        CMCD(rounds=40, length=32, hidden=(64, 64), learning_rate=5e-3, updates=6),
        lambda x: torch.cat((x[:, ::2] < 0, x[:, ::2] >= 0), 1).double(),
        torch.tensor([left] * 16 + [1.0 - left] * 16, dtype=torch.float64),
    )


def forty() -> Problem:
    """Forty Gaussians of scale softplus(1) in a square of side 80; parts are nearest centres."""
    locs = ((torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 80.0).float()
    energy = GaussianMixture(locs, math.log1p(math.e))

    def nearest(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.cdist(x, locs).argmin(1), 40).double()

    exact = nearest(energy.sample(400_000, torch.Generator().manual_seed(5))).mean(0)
    return Problem(
        energy,
        30.0,
        lambda: scaled(spline_flow(2, transforms=4, hidden=(64, 64), bins=16), 20.0),
        FAB(rounds=250, batch=256, learning_rate=2e-3),
        CMCD(rounds=60, length=64, hidden=(64, 64), learning_rate=3e-3, updates=4),
        nearest,
        exact,
    )


def funnel() -> Problem:
    """Neal's funnel; parts are eighths of the law of its first coordinate. The flow is affine and autoregressive."""
    import zuko

    law = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 3.0)
    edges = law.icdf(torch.arange(1, 8, dtype=torch.float64) / 8)

    def eighths(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.bucketize(x[:, 0].double(), edges), 8).double()

    return Problem(
        Funnel(10),
        3.0,
        lambda: Flow(zuko.flows.MAF(10, transforms=2, hidden_features=(64, 64))),
        FAB(rounds=400, batch=256),
        CMCD(rounds=80, length=64, hidden=(64, 64), learning_rate=3e-3, updates=2),
        eighths,
        torch.full((8,), 1 / 8, dtype=torch.float64),
        modes=False,
    )


PROBLEMS = {"wells": wells, "forty": forty, "funnel": funnel}
TITLES = {"wells": "Many-well, 32-d", "forty": "Forty modes, 2-d", "funnel": "Funnel, 10-d"}


def scaled(flow: Flow, scale: float) -> Flow:
    """Widen a flow."""
    flow.scale.fill_(scale)
    return flow


@dataclass(frozen=True)
class Found:
    """What a method found: log Z, weighted points, and their effective number."""

    log_z: LogZ
    x: Tensor
    log_weights: Tensor
    ess: float
    told: str = ""


def by_fab(problem: Problem, energy: Counted, budget: float, spend: int, seed: int) -> Found:
    """Train a flow, whatever it costs: the others are given as much."""
    rng = generator(seed, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = problem.flow()
    rounds = max(problem.fab.warm + 2, round(budget * problem.fab.rounds))
    sampler = fit_flow(energy, flow, replace(problem.fab, rounds=rounds), rng=rng)
    drawn = sampler.weighted(max(200, round(budget * DRAWS)), rng)
    return Found(drawn.log_z, drawn.x, drawn.log_weights, float(drawn.log_z.ess), f"misses {sampler.missed:.1%}")


def by_cmcd(problem: Problem, energy: Counted, budget: float, spend: int, seed: int) -> Found:
    """Train a diffusion, with rounds and draws such that the energies are spent."""
    rng, method = generator(seed, 2), problem.cmcd
    path = method.length + 1
    draws = max(64, round(0.3 * spend / path))
    rounds = max(2, min(round(0.65 * spend / (path * method.batch)), round(budget * method.rounds)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = gb.Gaussian(energy.event_shape, scale=problem.scale)
        sampler = fit_diffusion(energy, base, replace(method, rounds=rounds), rng=rng)
    drawn = sampler.weighted(draws, rng)
    return Found(drawn.log_z, drawn.x, drawn.log_weights, float(drawn.log_z.ess), f"{rounds} rounds")


def by_tempering(problem: Problem, energy: Counted, budget: float, spend: int, seed: int) -> Found:
    """Parallel tempering of 32 chains from the base, whose energies at all levels tell log Z."""
    rng = generator(seed, 3)
    base = gb.Gaussian(energy.event_shape, scale=problem.scale)
    start = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0]
    chains = 32
    kernel = ParallelTempering(gb.MALA(0.1 * problem.scale), start, base=base)
    ladder = tune_ladder(energy, kernel, base.sample(chains, rng), rng=rng, rounds=3, steps=16, resize=True)
    state, levels = ladder.state, len(torch.as_tensor(ladder.kernel.betas))
    cost = levels * chains + chains
    steps = max(40, (spend - energy.count) // cost)
    thin = max(1, steps // 200)
    pairs, points = [], []
    for _ in range(steps // thin):
        state = gb.sample(energy, ladder.kernel, state, steps=thin, rng=rng).state
        r = replicas_of(state)
        pairs.append(torch.stack((r.energy, r.base[0]), -1).double())
        points.append(state.x)
    # A level's energy is a function of E and B alone: pairs of them stand for the points, and none is evaluated again.
    told, x = torch.stack(pairs), torch.stack(points)
    betas = torch.as_tensor(ladder.kernel.betas).double().flip(0)
    energies = [gb.Energy.of(lambda y, b=b: b * y[:, 0] + (1.0 - b) * y[:, 1], (2,)) for b in betas]
    draws = [told[:, :, k] for k in reversed(range(levels))]
    log_z = gb.mbar(energies, draws).log_z(levels - 1)
    # Correlated draws are worth what the worst of the parts' shares is worth.
    parts = problem.shares(x.flatten(0, 1)).view(*x.shape[:2], -1)
    varied = [parts[..., k] for k in range(parts.shape[-1]) if float(parts[..., k].std()) > 0]
    ess = min((float(gb.effective_sample_size(v, ranked=False)) for v in varied), default=1.0)
    flat = x.flatten(0, 1)
    return Found(log_z, flat, torch.zeros(len(flat), dtype=torch.float64), ess, f"{levels} levels, {steps} steps")


def by_smc(problem: Problem, energy: Counted, budget: float, spend: int, seed: int) -> Found:
    """Particles as many as the energies allow, by what a small run costs, which is counted too."""
    rng = generator(seed, 4)
    base = gb.Gaussian(energy.event_shape, scale=problem.scale)
    few = 16 * 16
    gb.smc(energy, base, rng=rng, chains=few, moves=2)
    chains = max(16 * 16, (spend - energy.count) * few // energy.count // 16 * 16)
    out = gb.smc(energy, base, rng=rng, chains=chains, moves=2)
    told = f"{chains} particles, {len(out.ess)} stages"
    return Found(out.log_z, out.x, out.log_weights, float(effective_size(out.log_weights)), told)


RUN = {"FAB": by_fab, "CMCD": by_cmcd, "tempering": by_tempering, "SMC": by_smc}


def judged(name: str, method: str, problem: Problem, found: Found, energies: int, cpu: float) -> dict[str, Any]:
    """Compare with the truth."""
    weights = found.log_weights.softmax(0)
    shares = (weights[:, None] * problem.shares(found.x)).sum(0)
    held = int((shares > 0.5 * problem.exact).sum())
    return {
        "target": name,
        "method": method,
        "error": float(found.log_z.value) - truth(problem),
        "stderr": float(found.log_z.stderr),
        "lower": float(found.log_z.lower) - truth(problem),
        "ess": found.ess,
        "draws": len(found.x),
        "modes": held if problem.modes else None,
        "of": len(shares) if problem.modes else None,
        "weights": float((shares - problem.exact).abs().max()),
        "shares": shares.tolist(),
        "energies": energies,
        "cpu": cpu,
        "told": found.told,
    }


def truth(problem: Problem) -> float:
    """The target's log Z."""
    return float(getattr(problem.energy, "log_z", 0.0))


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        f"{TITLES[row['target']]}: {row['method']}",
        f"{row['error']:+.4f}",
        f"{row['stderr']:.4f}",
        f"{row['ess']:.0f} of {row['draws']}",
        "" if row["modes"] is None else f"{row['modes']} of {row['of']}",
        f"{row['weights']:.4f}",
        f"{row['energies'] / 1e6:.2f}",
        f"{row['cpu']:.0f}",
        row["told"],
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all targets, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--budget", type=float, default=1.0, help="share of the rounds and draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = kept_rows(options)
    pictures: dict[str, dict[str, Tensor]] = {}
    for name in options.parts:
        rows = [row for row in rows if row["target"] != name]
        problem, spend = PROBLEMS[name](), 0
        pictures[name] = {"truth": problem.energy.sample(SHOWN, generator(9))}
        for method in METHODS:
            energy = Counted(problem.energy)
            with Stopwatch() as watch, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # What they say stands in the table.
                found = RUN[method](problem, energy, options.budget, spend, options.seed)
            spend = spend or energy.count
            rows.append(judged(name, method, problem, found, energy.count, watch.cpu))
            print(" | ".join(line(rows[-1])), flush=True)
            pick = torch.multinomial(found.log_weights.softmax(0), SHOWN, True, generator=generator(8))
            pictures[name][method] = found.x[pick]
        draw(name, problem, pictures[name], [row for row in rows if row["target"] == name])
        report(rows, options)
    return rows


def kept_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of targets that this run leaves out, of an earlier one with the same budget and seed."""
    place = common.RESULTS / "from_energy.json"
    if not place.is_file():
        return []
    record = json.loads(place.read_text())
    same = record["budget"] == options.budget and record["seeds"] == [options.seed]
    return [row for row in record["rows"] if same and row["target"] not in options.parts]


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what there is so far."""
    rows = sorted(rows, key=lambda row: list(PROBLEMS).index(row["target"]))
    record = circumstances([options.seed], options.threads) | {"budget": options.budget, "rows": rows}
    header = [
        "target: method",
        "error of log Z",
        "stderr",
        "ess",
        "modes",
        "worst weight",
        "energies / 1e6",
        "cpu s",
        "",
    ]
    note = (
        "Energies are points at which the target was evaluated, with or without its gradient, tuning and training "
        "included; FAB sets how many, and the others come as near as their steps allow, CMCD within the rounds that "
        "its processor time allows. ess is of the weighted draws; of tempering, of the share that mixes worst. A mode "
        "is found when it has at least half its weight, and the worst weight is the largest error of a mode's weight "
        "(of an eighth of the first coordinate's law, for the funnel). FAB's share of missed mass is that of "
        "`FlowSampler.missed`. One seed; settings were chosen on others. The flow of the wells couples halves of all "
        "32 coordinates; that of the funnel is affine and autoregressive from the first coordinate on, as it is."
    )
    pictures = [
        f"![{TITLES[name]}](from_energy-{name}.png)" for name in PROBLEMS if any(r["target"] == name for r in rows)
    ]
    write("from_energy", "Samplers learned from an energy", record, [note, table(header, map(line, rows)), *pictures])


def draw(name: str, problem: Problem, points: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    """Draw points of the truth and of every method, or, of the wells, the weight of each left mode."""
    from matplotlib.figure import Figure

    told = {row["method"]: row for row in rows}
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    panels = figure.subplots(1, len(points), sharex=True, sharey=True)
    for axes, (method, x) in zip(panels, points.items()):
        title = "exact"
        if method in told:
            title = f"{method}\nlog Z off by {told[method]['error']:+.3f} ± {told[method]['stderr']:.3f}"
        axes.set_title(title, fontsize=8.5)
        axes.tick_params(labelsize=7)
        if name == "wells":
            shares = problem.exact[:16] if method == "truth" else torch.tensor(told[method]["shares"][:16])
            axes.bar(range(1, 17), shares.tolist(), color=colour("data" if method == "truth" else "samples"))
            axes.axhline(float(problem.exact[0]), color=colour("ink"), linewidth=0.8)
            axes.set_xlabel("well", fontsize=8)
        else:
            shade = colour("data" if method == "truth" else "samples")
            first, second = (1, 0) if name == "funnel" else (0, 1)
            axes.scatter(x[:, first].tolist(), x[:, second].tolist(), s=3, alpha=0.6, color=shade, linewidth=0)
            if name == "forty":
                axes.scatter(*problem.energy.locs.T.tolist(), s=14, marker="+", color=colour("ink"), linewidth=0.5)
    lead = {"wells": "weight of the left mode", "forty": "$x_2$", "funnel": "$x_1$"}[name]
    panels[0].set_ylabel(lead, fontsize=8)
    if name == "funnel":
        panels[0].set(xlim=(-30, 30), ylim=(-10, 10))
        for axes in panels:
            axes.set_xlabel("$x_2$", fontsize=8)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110, facecolor="white")
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    (common.RESULTS / f"from_energy-{name}.png").write_bytes(held.getvalue())


if __name__ == "__main__":
    main()
