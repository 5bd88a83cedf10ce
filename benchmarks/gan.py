"""Generators corrected by their discriminators, on a grid of 25 Gaussians and on digits, before and after.

A small GAN is trained; then its discriminator alone, while the generator stands still; then the discriminator is
calibrated on rows that trained neither. Digits come in sixteen grey levels, many of them 0, which give them away from
whatever a generator makes; so the generator ends in a tanh, and data and draws get normal noise for the discriminator,
part of the latents of the generator, which is left out of the draws that are judged. Draws of the generator, and those
of DDLS, discriminator rejection and Metropolis-Hastings GAN, are judged by the same measures. The settings were chosen
on other seeds than those recorded, for digits on 11.
Writes ``results/gan.json``, ``.md`` and ``.png``.

    python benchmarks/gan.py --threads 1
    python benchmarks/gan.py --parts digits --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, over_seeds, table, write
from gibbsian.bridges.discriminators import calibrate_discriminator
from gibbsian.bridges.gans import ddls, metropolis_hastings, rejection
from gibbsian.data import load
from gibbsian.diagnostics.two_sample import energy_distance, frechet_distance
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.networks import Dense, NoisyNetwork
from gibbsian.errors import DataError
from gibbsian.objectives.adversarial import Adversarial
from gibbsian.report.canvas import colour

SPACING, SPREAD, NEAR = 2.0, 0.05, 4.0
"""Of the grid: between modes, of one, and how many spreads off a mode a draw of high quality may lie."""

GREY, SURE, VALIDATION = 16, 0.95, 300
"""Of digits: the brightest level, the classifier's probability of a draw of high quality, and rows to calibrate on."""

R1_DIGITS, NOISE = ((0.2, 0.2), 0.02, True), (0.3, 0.4)
"""Penalties of the game and of the discriminator alone; and the noise in both, of pixels from -1 to 1."""

WAYS = {
    "generator": "the generator's own draws",
    "DDLS": "MALA with a tuned step size on the latent energy, from the generator's draws; on the grid with replicas "
    "at 12 temperatures between the energy and the latents' own law",
    "rejection": "discriminator rejection with the shift of the paper, a quantile of the pilot draws",
    "MH-GAN": "independence chains from rows of the data",
}
MEASURES = {
    "quality": ("high quality", +1),
    "covered": ("modes or classes", +1),
    "shares": ("KL of their shares", -1),
    "frechet": ("Frechet distance", -1),
    "energy": ("energy distance", -1),
}
"""What is measured, in words, and whether more (+1) or less is better."""


@dataclass(frozen=True)
class Case:
    """A data set, the networks for it, and how they are trained and used."""

    train: Tensor
    validation: Tensor
    latent: int
    widths: tuple[int, ...]
    frequencies: int
    penalties: tuple[float, float]
    r1_alone: float
    relativistic: bool
    steps: int
    steps_alone: int
    batch: int
    rate: float
    draws: int
    chain: int
    ladder: int
    quantile: float
    noise: tuple[float, float]
    bounded: bool
    judge: Callable[[Tensor], dict[str, float]]


def blurred(x: Tensor, scale: float, rng: torch.Generator) -> Tensor:
    """Add normal noise, if any."""
    return gb.AdditiveNoise(scale)(x, rng) if scale else x


def game(network: GeneratorNetwork, penalties: tuple[float, float], relativistic: bool, scale: float) -> gb.Objective:
    """Adversarial training, on data with fresh noise."""
    plain = Adversarial(network, *penalties, relativistic=relativistic)
    return gb.Augmented(plain, gb.AdditiveNoise(scale)) if scale else plain


def modes() -> Tensor:
    """Centres of the grid, ``(25, 2)``."""
    axis = SPACING * torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(axis, axis)


def measured(quality: Tensor, group: Tensor, due: Tensor, features: tuple[Tensor, Tensor], points: tuple) -> dict:
    """Compute the measures: who is of high quality ``(n,)``, in which group ``(n,)``, and the groups' due shares."""
    counts = torch.bincount(group[quality], minlength=len(due)).double()
    shares = counts / counts.sum().clamp(min=1.0)
    return {
        "quality": float(quality.double().mean()),
        "covered": int((counts > 0).sum()),
        "shares": float(torch.where(shares > 0, shares * (shares / due).log(), 0.0).sum()),
        "frechet": frechet_distance(*features).value,
        "energy": energy_distance(*points).value,
    }


def grid(seed: int, budget: float) -> Case:
    """The 25 Gaussians of the literature, in units in which they are 1 apart."""
    truth, rng = gb.GaussianMixture(modes(), SPREAD), generator(seed, 1)
    rows, held = (truth.sample(n, rng) / SPACING for n in (22_000, 5000))

    def judge(x: Tensor) -> dict[str, float]:
        distance, group = torch.cdist(x * SPACING, modes()).min(1)
        due = torch.full((25,), 1 / 25).double()
        n = min(len(x), 2000)
        return measured(distance < NEAR * SPREAD, group, due, (x, held), (x[:n], held[:n]))

    steps = [max(2, round(budget * n)) for n in (3000, 3000)]
    draws = max(100, round(min(1.0, budget) * 5000))
    return Case(rows[:20_000], rows[20_000:], 8, (128, 128, 128), 3, (0.02, 0.02), 0.001, True, *steps, 256, 1e-3,
                draws, 200, 12, 0.99, (0.0, 0.0), False, judge)  # fmt: skip


def digits(seed: int, budget: float) -> Case:
    """Digits of 8 x 8 pixels, standardised; the judge's classifier has seen the training rows."""
    from sklearn.neural_network import MLPClassifier

    data = load("digits", seed=seed)
    assert data.labels is not None
    scaling, held = data.scaling(), data.held_out.flatten(1)
    z = scaling.forward(data.train).flatten(1)
    rounds = max(5, round(min(1.0, budget) * 300))
    classifier: Any = MLPClassifier((128, 32), max_iter=rounds, random_state=seed)
    classifier.fit(data.train.flatten(1).numpy() / GREY, data.labels.numpy())

    def features(pixels: Tensor) -> Tensor:
        a = pixels.float() / GREY
        for weight, bias in list(zip(classifier.coefs_, classifier.intercepts_))[:2]:
            a = (a @ torch.from_numpy(weight).float() + torch.from_numpy(bias).float()).relu()
        return a

    def probabilities(pixels: Tensor) -> Tensor:
        return torch.from_numpy(classifier.predict_proba(pixels.numpy() / GREY))

    due = torch.bincount(probabilities(held).argmax(1), minlength=10).double() / len(held)

    def judge(x: Tensor) -> dict[str, float]:
        pixels = scaling.backward(x.view(-1, *data.event_shape)).flatten(1).clamp(0, GREY)
        sure, group = probabilities(pixels).max(1)
        return measured(sure > SURE, group, due, (features(pixels), features(held)), (pixels, held))

    steps = [max(2, round(budget * n)) for n in (5000, 700)]
    draws = max(60, round(min(1.0, budget) * 2000))
    return Case(z[VALIDATION:], z[:VALIDATION], 16, (256, 256), 0, *R1_DIGITS, *steps, 64, 1e-3, draws, 60, 1, 0.9,
                NOISE, True, judge)  # fmt: skip


PARTS: dict[str, Callable[[int, float], Case]] = {"grid": grid, "digits": digits}


def trained(case: Case, seed: int) -> tuple[gb.Energy, GeneratorNetwork, dict[str, float]]:
    """Train both, then the discriminator alone; return them with the processor seconds."""
    rng, size = generator(seed, 2), case.train.shape[1]
    torch.manual_seed(seed)
    net = Dense(case.latent, size, case.widths)
    made = nn.Sequential(net, nn.Tanh()) if case.bounded else net
    if case.noise[0]:
        made = NoisyNetwork(made, case.latent, case.noise[0])
    network = GeneratorNetwork(made, size, latent=case.latent + (size if case.noise[0] else 0))
    energy = gb.MLP(size, case.widths, frequencies=case.frequencies)
    common_settings = {"batch_size": case.batch, "betas": (0.5, 0.99), "learning_rate": case.rate, "health": False}
    with Stopwatch() as both:
        gb.fit(
            energy,
            case.train,
            game(network, case.penalties, case.relativistic, case.noise[0]),
            rng=rng,
            steps=case.steps,
            **common_settings,
        )
    network.requires_grad_(False)
    if isinstance(made, NoisyNetwork):
        made.scale = case.noise[1]
    with Stopwatch() as alone:
        gb.fit(
            energy,
            case.train,
            game(network, (case.r1_alone, 0.0), False, case.noise[1]),
            rng=rng,
            steps=case.steps_alone,
            **common_settings,
        )
    return energy.requires_grad_(False), network, {"game": both.cpu, "alone": alone.cpu}


def ways(case: Case, energy: gb.Energy, network: GeneratorNetwork, seed: int) -> dict[str, Callable[[], Any]]:
    """Return the corrections, by name."""

    def rng() -> torch.Generator:
        return generator(seed, 3)

    n, chain = case.draws, case.chain
    # Where modes lie apart, chains pass between them by way of the generator's own law.
    betas = torch.linspace(1.0, 0.0, case.ladder).square()
    kernel = gb.ParallelTempering(gb.MALA(0.05), betas, base=network.latent) if case.ladder > 1 else None
    real = blurred(case.validation, case.noise[1], generator(seed, 5))
    return {
        "DDLS": lambda: ddls(energy, network, n, rng=rng(), steps=chain, kernel=kernel),
        "rejection": lambda: rejection(energy, network, n, rng=rng(), quantile=case.quantile),
        "MH-GAN": lambda: metropolis_hastings(energy, network, n, rng=rng(), steps=chain, start=real),
    }


def run(part: str, seed: int, budget: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train, calibrate, draw every way and judge."""
    case = PARTS[part](seed, budget)
    energy, network, seconds = trained(case, seed)
    calibration = None
    with contextlib.suppress(DataError):  # Rows and draws that do not overlap: a generator that has not learned.
        calibration = calibrate_discriminator(
            energy, network, blurred(case.validation, case.noise[1], generator(seed, 5)), rng=generator(seed, 4)
        )
    clean = network.net.clean if isinstance(network.net, NoisyNetwork) else network.net
    with Stopwatch() as watch, torch.no_grad():
        plain = clean(network.latent.sample(case.draws, generator(seed, 3)))
    points = {"data": case.train[: case.draws], "generator": plain}
    found: dict[str, Any] = {
        "part": part,
        "seed": seed,
        "training_cpu": seconds,
        "slope": list(calibration.slope) if calibration else [math.nan, math.nan],
        "cross_entropy": [calibration.loss_before, calibration.loss_after] if calibration else None,
        "floor": case.judge(case.train[: case.draws]),
        "ways": {"generator": case.judge(plain) | {"acceptance": 1.0, "cpu": watch.cpu}},
    }
    used = calibration.energy if calibration else energy
    for name, way in ways(case, used, network, seed).items():
        with Stopwatch() as watch:
            draws = way()
        points[name] = clean(draws.z)
        found["ways"][name] = case.judge(points[name]) | {
            "acceptance": draws.acceptance.value,
            "cpu": watch.cpu,
            "evaluations": draws.evaluations,
        }
    for name, values in found["ways"].items():
        told = ", ".join(f"{k} {v:.3f}" for k, v in values.items())
        print(f"{part}, seed {seed}, {name}: {told}", flush=True)
    print(f"floor {found['floor']}, training {seconds}, slope {found['slope']}", flush=True)
    return found, points


def told(rows: list[dict[str, Any]]) -> str:
    """Write the table of one part, means over seeds."""
    header = ["draws", *(words for words, _ in MEASURES.values()), "acceptance", "s CPU"]
    lines = []
    for name in rows[0]["ways"]:
        own = [row["ways"][name] for row in rows]
        values = [shown([v[key] for v in own]) for key in (*MEASURES, "acceptance", "cpu")]
        lines.append([name, *values])
    lines.append(["training rows (floor)", *(shown([row["floor"][key] for row in rows]) for key in MEASURES), "", ""])
    return table(header, lines)


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard error over seeds of every measure, by way."""
    if len(rows) < 2:
        return {}
    own = {name: [row["ways"][name] for row in rows] for name in rows[0]["ways"]} | {
        "floor": [r["floor"] for r in rows]
    }
    return {name: {key: list(over_seeds([v[key] for v in found])) for key in MEASURES} for name, found in own.items()}


def shown(values: Sequence[float]) -> str:
    """Print a mean over seeds with its error, or one value."""
    if len(values) > 1:
        return str(over_seeds(values))
    return str(values[0]) if isinstance(values[0], int) else f"{values[0]:.3g}"


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say of each correction in how many measures it is better, equal and worse than the generator, over all seeds.

    What is asked is that every measure is better on every seed; where the generator misses no mode or class, equal.
    """
    lines, most = [], max(row["floor"]["covered"] for row in rows)
    short = []
    for name in list(WAYS)[1:]:
        found: dict[str, list[str]] = {"better": [], "equal": [], "worse": []}
        for row in rows:
            before, after = row["ways"]["generator"], row["ways"][name]
            for key, (words, sign) in MEASURES.items():
                change = sign * (after[key] - before[key])
                found["better" if change > 0 else "equal" if change == 0 else "worse"].append(words)
                if change < 0 or (change == 0 and before["covered"] < most):
                    short.append(name)
        beyond = [
            f"{kind} in {', '.join(f'{words} ({found[kind].count(words)})' for words in sorted(set(found[kind])))}"
            for kind in ("equal", "worse")
            if found[kind]
        ]
        total = len(rows) * len(MEASURES)
        rest = f"; {'; '.join(beyond)}" if beyond else ""
        lines.append(f"* {name}: better in {len(found['better'])} of {total}{rest}.")
    covered = ", ".join(f"{row['ways']['generator']['covered']} on seed {row['seed']}" for row in rows)
    fail = f"not met by {', '.join(dict.fromkeys(short))}" if short else "met"
    lines.append(f"* Asked, every measure better on every seed, or equal where no mode or class was missed: {fail}.")
    return "\n".join([*lines, f"* The generator covers {covered}, of {most}."])


def tiles(x: Tensor, side: int = 6) -> Tensor:
    """Put standardised digits side by side, with a gap between them."""
    framed = torch.nn.functional.pad(x[: side * side].view(side, side, 8, 8), (1, 1, 1, 1), value=1.6)
    return framed.permute(0, 2, 1, 3).reshape(10 * side, 10 * side)


def picture(points: dict[str, dict[str, Tensor]]) -> None:
    """Draw a row for each part: the data, the generator's draws, and those of each correction."""
    from matplotlib.figure import Figure
    from PIL import Image

    columns = ("data", *WAYS)
    figure = Figure(figsize=(2.0 * len(columns), 2.2 * len(points)), layout="constrained")
    axes = figure.subplots(len(points), len(columns), squeeze=False)
    for row, (part, found) in zip(axes, points.items()):
        for panel, name in zip(row, columns):
            panel.set(xticks=[], yticks=[])
            panel.set_title(name, fontsize=9)
            if part == "grid":
                x = found[name][:2500] * SPACING
                panel.scatter(*x.T.tolist(), s=1.0, linewidth=0, color=colour("data" if name == "data" else "samples"))
                panel.set(xlim=(-5.2, 5.2), ylim=(-5.2, 5.2), aspect="equal")
            else:
                panel.imshow(tiles(found[name]).numpy(), cmap="gray", vmin=-1.0, vmax=1.6)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(64).save(common.RESULTS / "gan.png", optimize=True)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run all parts, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0, help="multiplies steps and draws")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    began = time.process_time()
    rows, points = [], {}
    for part in options.parts:
        for seed in options.seeds:
            row, drawn = run(part, seed, options.budget)
            rows.append(row)
            points.setdefault(part, drawn)
    total = time.process_time() - began
    record = circumstances(options.seeds, options.threads) | {"budget": options.budget, "cpu": total, "rows": rows}
    record["means"] = {part: means([row for row in rows if row["part"] == part]) for part in options.parts}
    sections = [
        f"Grid: 25 Gaussians {SPACING:g} apart with standard deviation {SPREAD}; high quality is within {NEAR:g} of "
        "these of a mode. Digits: 8 x 8 pixels; high quality is a probability of one class above "
        f"{SURE}, by a classifier of the training rows, whose last hidden layer gives the features of the Frechet "
        "distance. Modes or classes are covered by one draw of high quality; their shares among these are compared "
        "with those of the data by the Kullback-Leibler divergence. A generator that covers all leaves none to gain. "
        f"{total / 60:.1f} processor minutes in all.",
        "\n".join(f"* {name}: {text}." for name, text in WAYS.items()),
    ]
    for part in options.parts:
        slopes = shown([row["slope"][0] for row in rows if row["part"] == part])
        own = [row for row in rows if row["part"] == part]
        training = sum(sum(row["training_cpu"].values()) for row in own) / len(own)
        sections += [
            f"## {part.capitalize()}\n\nTraining took {training:.0f} s CPU. Slope of the calibration: {slopes}.",
            told(own),
            verdict(own),
        ]
    sections.append("![draws before and after](gan.png)")
    write("gan", "Generators corrected by their discriminators", record, sections)
    picture(points)
    return rows


if __name__ == "__main__":
    main()
