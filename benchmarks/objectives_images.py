"""Every objective on digits and MNIST: sample quality, held-out likelihood between bounds, strangers told, time.

Each fits the same energy, a network plus the Gaussian of the training rows, to pixels in [-1, 1] with Gaussian noise on
them, whose density all of them share as their target, for the same processor time (``--budget``). Draws come from
sequential Monte Carlo from that Gaussian, and lose the noise again by one step along the energy's own score; their
Frechet distance to held-out rows is taken in the last hidden layer of a classifier of the training rows. The
log-likelihood of held-out rows with noise lies between the bounds that forward and reverse annealing give log Z. AUROC
is that of the energy against strangers with the same noise on them: rows with their pixels shuffled, turned by 90
degrees, or mirrored, and Fashion-MNIST. Writes ``results/objectives_images.json`` and
``.md`` after every objective; MNIST and Fashion-MNIST are read from the folder in GIBBSIAN_DATA.

    GIBBSIAN_DATA=data python benchmarks/objectives_images.py
    python benchmarks/objectives_images.py --sets digits --methods NCE PCD --budget 5
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.data import Dataset, load
from gibbsian.diagnostics.detection import auroc
from gibbsian.diagnostics.two_sample import frechet_distance
from gibbsian.errors import GibbsianError
from gibbsian.evaluation import classifier_features, strangers
from gibbsian.objectives.base import Objective
from gibbsian.partition.bracket import bracket
from gibbsian.partition.smc import smc

CHAINS, REVERSED = 512, 128
"""Particles that are drawn, and how many of them go back for the upper bound."""

SPARE = 0.95
"""Effective part of the particles that each temperature leaves."""


@dataclass(frozen=True)
class Setting:
    """How a set is learned: rows to read, noise on the pixels, copies of each row with other noise, hidden units."""

    limit: int | None
    sigma: float
    copies: int
    width: int
    budget: float


SETS = {"digits": Setting(None, 0.35, 10, 256, 20.0), "mnist": Setting(12_000, 0.5, 2, 512, 40.0)}


@dataclass(frozen=True)
class Target:
    """A set as the objectives see it: rows as vectors in model units, clean and with noise, and how to judge."""

    dataset: Dataset
    setting: Setting
    clean: Tensor
    noisy: Tensor
    held_out: Tensor
    base: gb.Gaussian
    strangers: dict[str, Tensor]
    features: Callable[[Tensor], Tensor]

    @property
    def dim(self) -> int:
        """Pixels."""
        return self.clean.shape[1]

    def distance(self, points: Tensor) -> float:
        """Frechet distance of vectors in model units to the held-out rows."""
        pixels = self.dataset.scaling().backward(points.clamp(-1.0, 1.0).view(-1, *self.dataset.event_shape))
        return frechet_distance(self.features(pixels.flatten(1)), self.features(self.dataset.held_out.flatten(1))).value


def target_of(name: str) -> Target:
    """Read a set; add the noise; fit the Gaussian."""
    setting = SETS[name]
    dataset = load(name, seed=0, limit=setting.limit)
    features = classifier_features(dataset)
    assert features is not None
    scaling, rng = dataset.scaling(), generator(1)
    clean = scaling.forward(dataset.train).flatten(1)

    def with_noise(x: Tensor) -> Tensor:
        return x + setting.sigma * torch.randn(x.shape, generator=rng)

    noisy = with_noise(clean.repeat(setting.copies, 1))
    # The covariance of the rows, and exactly what the noise adds to it.
    covariance = clean.T.double().cov() + setting.sigma**2 * torch.eye(clean.shape[1], dtype=torch.float64)
    base = gb.Gaussian(loc=clean.mean(0), covariance=covariance.float())
    others = {"shuffled pixels": strangers(dataset.held_out, rng, image=True)["shuffled pixels"]}
    others |= {"turned": dataset.held_out.rot90(1, (2, 3)), "mirrored": dataset.held_out.flip(3)}
    if name == "mnist":
        others["Fashion-MNIST"] = load("fashion_mnist", seed=0, limit=12_000).held_out
    foreign = {k: with_noise(scaling.forward(v[:2000]).flatten(1)) for k, v in others.items()}
    held_out = with_noise(scaling.forward(dataset.held_out[:2000]).flatten(1))
    return Target(dataset, setting, clean, noisy, held_out, base, foreign, features)


@dataclass(frozen=True)
class Method:
    """An objective, built from a target and the number of steps, the energy that it fits, and how that is read."""

    objective: Callable[[Target, int], Objective]
    energy: Callable[[Target], gb.Energy]
    clean: bool = False
    read: Callable[[gb.Energy, Target], gb.Energy] = lambda energy, target: energy
    settings: tuple[tuple[str, Any], ...] = ()
    most: int = 10**6


def network(target: Target) -> gb.Energy:
    """The energy of most methods."""
    return gb.MLP(target.dim, (target.setting.width, target.setting.width)) + target.base


def levels(target: Target) -> gb.Energy:
    """The energy at every noise level."""
    return gb.NoiseConditional(target.dim, width=target.setting.width, blocks=2).calibrate(target.clean)


def bridged(target: Target) -> gb.Energy:
    """Four density ratios between the Gaussian and the data."""
    width = target.setting.width
    return gb.Telescope(gb.MLP(target.dim, (width, width), classes=4), target.base, 4)


def at_sigma(energy: gb.Energy, target: Target) -> gb.Energy:
    """The energy at the noise of the target."""
    return energy.given(sigma=torch.tensor(target.setting.sigma))


def rungs(target: Target) -> tuple[float, ...]:
    """Noise levels from the target's, each 1.4 times the one before, until the data are gone."""
    return tuple(target.setting.sigma * 1.4**i for i in range(12))


def walker(target: Target) -> gb.Kernel:
    """How chains of training move: a step in units of the noise, which is the narrowest direction."""
    return gb.MALA((0.25 if target.dim < 100 else 0.15) * target.setting.sigma**2)


def persistent(target: Target) -> Objective:
    """PCD from the Gaussian."""
    return gb.PCD(walker(target), target.base, 10, buffer_size=2048)


CALM = (("betas", (0.0, 0.99)),)
"""For objectives with chains, whose gradients are noisy."""

METHODS: dict[str, Method] = {
    "NCE": Method(lambda t, n: gb.NoiseContrastiveEstimation(t.base), network),
    "ranking NCE": Method(lambda t, n: gb.RankingNCE(t.base, 8), network),
    "conditional NCE": Method(lambda t, n: gb.ConditionalNCE(0.5 * t.setting.sigma, 4), network),
    "flow contrastive": Method(
        lambda t, n: gb.FlowContrastiveEstimation(gb.spline_flow(t.dim, passes=2).calibrate(t.noisy)), network
    ),
    "telescoping": Method(lambda t, n: gb.TelescopingRatios(), bridged),
    "exact score matching": Method(lambda t, n: gb.ScoreMatching(), network, most=100),
    "sliced": Method(lambda t, n: gb.SlicedScoreMatching(), network),
    "sliced, reduced variance": Method(lambda t, n: gb.SlicedScoreMatching(variance_reduction=True), network),
    "finite differences": Method(lambda t, n: gb.FiniteDifferenceScoreMatching(), network),
    "denoising": Method(lambda t, n: gb.DenoisingScoreMatching(t.setting.sigma), network, clean=True),
    "denoising, many levels": Method(
        lambda t, n: gb.MultiLevelDenoising(gb.LogNormal(-0.3, 1.0, t.setting.sigma, 8.0)), levels, True, at_sigma
    ),
    "recovery likelihood": Method(
        lambda t, n: gb.RecoveryLikelihood(rungs(t), gb.MALA(0.2), 10), levels, True, at_sigma, CALM
    ),
    "CD-10": Method(lambda t, n: gb.CD(walker(t), 10), network, settings=CALM),
    "PCD": Method(lambda t, n: persistent(t), network, settings=CALM),
    "short runs": Method(
        lambda t, n: gb.CD(walker(t), 20, starts=gb.Starts(noise=1.0), base=t.base), network, settings=CALM
    ),
    "energy discrepancy": Method(lambda t, n: gb.EnergyDiscrepancy(0.5 * t.setting.sigma**2, 16), network),
    "energy matching": Method(
        lambda t, n: gb.EnergyMatching(gb.Gaussian(t.dim), t.setting.sigma**2, warmup=n // 2), network, settings=CALM
    ),
}
"""``most`` is the most pixels that a method is tried on: exact score matching takes a pass for each of them."""


def trained(method: Method, target: Target, seconds: float, seed: int) -> tuple[gb.Energy, dict[str, float]]:
    """Fit for about so many seconds of this process: a few steps tell how many there is time for."""
    rows = target.clean if method.clean else target.noisy
    settings = {"batch_size": 256, "learning_rate": 1e-3, "ema_decay": 0.995} | dict(method.settings)

    def run(energy: gb.Energy, steps: int, tag: int) -> Stopwatch:
        own = settings | {"warmup_steps": min(100, steps // 10)}
        with Stopwatch() as watch:
            gb.fit(energy, rows, method.objective(target, steps), steps=steps, rng=generator(seed, tag), **own)
        return watch

    run(method.energy(target), 3, 0)
    steps = max(20, round(seconds / (run(method.energy(target), 10, 0).cpu / 10)))
    torch.manual_seed(seed)
    energy = method.energy(target)
    watch = run(energy, steps, 1)
    return energy, {"steps": steps, "train_cpu": watch.cpu}


def without_noise(energy: gb.Energy, points: Tensor, sigma: float) -> Tensor:
    """Take the noise off by one step along the score (Tweedie's formula)."""
    x = points.requires_grad_(True)
    (slope,) = torch.autograd.grad(energy(x).sum(), x)
    return (points - sigma**2 * slope).detach()


def judged(energy: gb.Energy, target: Target, seed: int) -> dict[str, Any]:
    """Draw, and measure."""
    rng = generator(seed, 2)
    with Stopwatch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = smc(energy, target.base, rng=rng, chains=CHAINS, populations=8, moves=3, spare=SPARE)
        draws = found.draw(CHAINS, rng)
        log_z = bracket(energy, target.base, draws[:REVERSED], rng=rng, schedule=found.schedule, steps=2)
    told = {"FD": target.distance(without_noise(energy, draws, target.setting.sigma)), "judge_cpu": watch.cpu}
    return told | {"temperatures": len(found.schedule.betas)} | scores(energy, target, log_z.lower, log_z.upper, seed)


@torch.no_grad()
def scores(energy: gb.Energy, target: Target, lower: Any, upper: Any, seed: int) -> dict[str, Any]:
    """Bounds of the mean log-likelihood of held-out rows, its standard error, and AUROC by stranger."""
    inside = energy(target.held_out)
    mean, error = float(-inside.double().mean()), float(inside.double().std()) / len(inside) ** 0.5
    rng = generator(seed, 3)
    told = {name: auroc(inside, energy(rows), rng=rng, resamples=2).value for name, rows in target.strangers.items()}
    return {"ll_lower": mean - float(upper), "ll_upper": mean - float(lower), "ll_error": error, "auroc": told}


def ours(name: str, target: Target, seconds: float, seed: int) -> dict[str, Any]:
    """Fit one method and judge it; a run that is given up is a result too."""
    method = METHODS[name]
    told: dict[str, Any] = {"set": target.dataset.name, "method": name, "seed": seed}
    try:
        energy, facts = trained(method, target, seconds, seed)
        told |= facts
        return told | judged(method.read(energy, target).eval(), target, seed)
    except GibbsianError as error:
        return told | {"error": str(error)}


def yardsticks(target: Target, seed: int) -> list[dict[str, Any]]:
    """The Gaussian itself, whose log Z is 0, and training rows as draws."""
    draws = target.base.sample(CHAINS, generator(seed, 2))
    gaussian = {"FD": target.distance(without_noise(target.base, draws, target.setting.sigma))}
    rows = target.clean[torch.randperm(len(target.clean), generator=generator(seed, 4))[:CHAINS]]
    named = {"set": target.dataset.name, "seed": seed}
    gaussian |= scores(target.base, target, 0.0, 0.0, seed)
    return [
        named | {"method": "the Gaussian alone"} | gaussian,
        named | {"method": "training rows", "FD": target.distance(rows)},
    ]


def best(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], float]) -> str:
    """The method with the highest value, among those that have one."""
    sound = [row for row in rows if row["method"] in METHODS and "ll_lower" in row and math.isfinite(key(row))]
    return max(sound, key=key)["method"] if sound else ""


def set_table(rows: Sequence[dict[str, Any]]) -> str:
    """One set's table; the best of a column in bold."""
    foreign = next((list(row["auroc"]) for row in rows if "auroc" in row), [])
    winners = [
        best(rows, lambda row: -row["FD"]),
        best(rows, lambda row: row["ll_lower"]),
        *(best(rows, lambda row, name=name: row["auroc"][name]) for name in foreign),
    ]
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["method"], "stopped", "", *[""] * len(foreign), "", ""])
            continue
        crossed = "ll_lower" in row and row["ll_lower"] > row["ll_upper"]
        bounds = f"{row['ll_lower']:.1f} to {row['ll_upper']:.1f}{' (cross)' * crossed}" if "ll_lower" in row else ""
        cells = [f"{row['FD']:.1f}", bounds, *(f"{row['auroc'][n]:.3f}" if "auroc" in row else "" for n in foreign)]
        cells = [f"**{c}**" if row["method"] == w else c for c, w in zip(cells, winners)]
        lines.append([row["method"], *cells, row.get("steps", ""), f"{row['train_cpu']:.0f}" if "steps" in row else ""])
    head = ["objective", "FD of draws", "held-out log-likelihood, nats", *(f"AUROC, {n}" for n in foreign)]
    return table([*head, "steps", "s CPU"], lines)


NOTES = """FD: Frechet distance of 512 draws to held-out rows in the last hidden layer of a classifier; lower is better.
Log-likelihood: mean over held-out rows with noise on them, from the upper to the lower bound of log Z (together at
99 percent, given exact draws); of bounds that cross the draws are not the model's. Bold: the best of a column, of
likelihoods that with the highest lower end."""


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what there is so far."""
    record = circumstances([options.seed], torch.get_num_threads()) | {"budget": options.budget, "rows": list(rows)}
    sections = [NOTES]
    for name in options.sets:
        own, setting = [row for row in rows if row["set"] == name], SETS[name]
        if own:
            seconds = options.budget * setting.budget
            told = f"Noise of {setting.sigma} on pixels in [-1, 1]; {seconds:g} s of training each."
            sections.append(f"## {name}\n\n{told}\n\n{set_table(own)}")
    write("objectives_images", "Objectives on images", record, sections)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the seconds of training")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.sets:
        try:
            target = target_of(name)
        except GibbsianError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        rows += yardsticks(target, options.seed)
        for method in options.methods:
            if target.dim > METHODS[method].most:
                continue
            rows.append(ours(method, target, options.budget * SETS[name].budget, options.seed))
            print({k: v for k, v in rows[-1].items() if k != "seed"}, file=sys.stderr, flush=True)
            report(rows, options)
    return rows


if __name__ == "__main__":
    main()
