"""Products, mixtures and negations of densities in the plane learned from samples, drawn by every way there is.

Energies at all noise levels are trained by denoising on draws from known densities. Each pair is composed three ways,
and the draws of each sampler are compared on a grid of squares with (i) the composed learned density at the lowest
noise level, by quadrature, and (ii) the composition of the true densities at that noise. The total variation of as many
exact draws from (i) to (i) is the best that any sampler can have: chance alone. Writes ``results/composition.json``,
``.md`` and ``.png``.

    python benchmarks/composition.py --threads 1
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.applications.composition import compose
from gibbsian.applications.feynman_kac import compose_scores
from gibbsian.applications.terms import SummedScore

LOW, HIGH = 0.1, 10.0
BOX, CELLS, INNER = 4.0, 32, 10
SIZES = {"width": 64, "blocks": 2, "frequencies": 1, "gain": 0.0}
WEIGHT, FLOOR, WIDE = 0.8, 0.1, 2.0
"""Of what is subtracted: its weight, below 1, or at much noise there is no density; the share of a wide Gaussian in it,
and its standard deviation. Without such a floor a negation is all about where the subtracted density is 1e-20 rather
than 1e-30, which no samples tell."""

ROWS, STEPS, BATCH = 20_000, 4000, 256
CHAINS, LEVELS, FINE, MOVES, LAST = 2048, 32, 160, 6, 20

DENSITIES: dict[str, tuple[Any, tuple[float, float], float]] = {
    "ring": (gb.Ring(1.6, 0.2), (0.0, 0.0), 1.0),
    "eight": (gb.EightGaussians(1.7, 0.3), (0.0, 0.0), 1.0),
    "moons": (gb.TwoMoons(0.12), (0.5, 0.25), 1.3),
    "pinwheel": (gb.Pinwheel(), (0.0, 0.0), 0.7),
    "two": (gb.GaussianMixture(torch.tensor([[-1.2, 0.0], [1.2, 0.3]]), torch.tensor([[0.5, 1.0], [0.6, 0.7]])),
            (0.0, 0.0), 1.0),
}  # fmt: skip
"""Each a density, and the point that goes to the origin and the factor that its draws are multiplied with."""

PAIRS = (
    ("ring", "moons"),
    ("ring", "two"),
    ("eight", "moons"),
    ("eight", "pinwheel"),
    ("pinwheel", "two"),
    ("pinwheel", "ring"),
)
KINDS = ("product", "mixture", "negation")
PLAIN = "summed scores"
WAYS = {
    PLAIN: "plain reverse diffusion along the weighted sum of the scores (of a mixture too)",
    "own score": "plain reverse diffusion along the score of the composed energy, which for a mixture is another",
    "ULA": "unadjusted Langevin chains at each level",
    "MALA": "chains with a Metropolis test at each level",
    "HMC": "the same, with trajectories",
    "FK, scores": "Feynman-Kac weights from the scores alone, without energies",
    "FK": "Feynman-Kac weights of the energies",
    "FK + MALA": "the same with moves at each level: what compose does by default",
}
RECOMMENDED = "FK + MALA"
Drawn = tuple[Tensor, Tensor]
"""Points and their weights, which add up to 1."""


@dataclass(frozen=True)
class Known:
    """A true density, moved and scaled."""

    name: str

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw points."""
        density, origin, scale = DENSITIES[self.name]
        return (density.sample(n, rng) - torch.tensor(origin)) * scale

    def log_prob(self, x: Tensor, sigma: float) -> Tensor:
        """Log-density under noise at the nodes of a square grid ``(k, k, 2)``, up to a constant: ``(k, k)``."""
        density, origin, scale = DENSITIES[self.name]
        p = (-density((x / scale + torch.tensor(origin)).flatten(0, 1))).exp().double().view(x.shape[:2])
        axis = x[:, 0, 0].double()
        blur = torch.exp(-0.5 * ((axis[:, None] - axis) / sigma) ** 2)
        return (blur @ p @ blur.T).clamp(min=1e-300).log()


def trained(name: str, seed: int) -> tuple[gb.NoiseConditional, float]:
    """Train an energy on draws; return it with the processor seconds it took."""
    rng = generator(seed, list(DENSITIES).index(name))
    data = Known(name).sample(ROWS, rng)
    torch.manual_seed(seed)
    energy = gb.NoiseConditional(2, **SIZES).calibrate(data)
    objective = gb.MultiLevelDenoising(gb.LogUniform(0.8 * LOW, HIGH), level_weight=1.0)
    with Stopwatch() as watch:
        gb.fit(energy, data, objective, rng=rng, steps=STEPS, batch_size=BATCH, learning_rate=3e-3, health=False)
    return energy.eval().requires_grad_(False), watch.cpu


def wide(x: Tensor, sigma: Tensor) -> Tensor:
    """The floor's energy under noise."""
    v = WIDE**2 + sigma**2
    return x.square().sum(1) / (2 * v) + (2 * math.pi * v).log()


def floored(b: gb.Energy) -> gb.Energy:
    """Give a density the floor."""
    return gb.mixture(b, gb.Energy.of(wide, (2,), context=("sigma",)), weights=[1.0 - FLOOR, FLOOR])


def composed(kind: str, a: Any, b: Any) -> gb.Energy:
    """Build the composition."""
    if kind == "negation":
        return a - WEIGHT * floored(b)
    return a + b if kind == "product" else gb.mixture(a, b)


def nodes() -> Tensor:
    """Midpoints of the grid, ``(k, k, 2)``: INNER of them along each square."""
    k = CELLS * INNER
    axis = -BOX + 2.0 * BOX * (torch.arange(k) + 0.5) / k
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), 2)


def cells(log_p: Tensor) -> Tensor:
    """Masses of the squares, from log-densities at the nodes ``(k, k)``."""
    p = log_p.flatten().double().softmax(0).view(CELLS, INNER, CELLS, INNER)
    return p.sum((1, 3))


def true_log_prob(kind: str, a: str, b: str, x: Tensor) -> Tensor:
    """The composition of the true densities at the lowest level, at the nodes."""
    area = (2.0 * BOX / len(x)) ** 2
    first, second = (v - v.flatten().logsumexp(0) - math.log(area) for v in (Known(n).log_prob(x, LOW) for n in (a, b)))
    if kind == "mixture":
        return torch.logaddexp(first, second)
    if kind == "product":
        return first + second
    floor = -wide(x.flatten(0, 1).double(), torch.tensor(LOW).double()).view(x.shape[:2])
    return first - WEIGHT * torch.logaddexp(second + math.log(1.0 - FLOOR), floor + math.log(FLOOR))


def histogram(drawn: Drawn) -> Tensor:
    """Shares of the squares; what lies outside is nowhere."""
    x, w = drawn
    index = ((x + BOX) / (2 * BOX) * CELLS).floor().long()
    inside = ((index >= 0) & (index < CELLS)).all(1)
    flat = index[inside, 0] * CELLS + index[inside, 1]
    return torch.zeros(CELLS**2).double().index_add_(0, flat, w[inside].double()).view(CELLS, CELLS)


def distance(share: Tensor, masses: Tensor) -> float:
    """Total variation on the squares, what lies outside included."""
    return 0.5 * float((share - masses).abs().sum() + 1.0 - share.sum())


def equal(x: Tensor) -> Drawn:
    """Points of equal weight."""
    return x, torch.full((len(x),), 1.0 / len(x))


def best_possible(masses: Tensor, rng: torch.Generator, repeats: int = 50) -> tuple[float, float]:
    """Mean and standard deviation of the total variation of as many exact draws: it depends on the masses alone."""
    found = []
    for _ in range(repeats):
        picks = torch.multinomial(masses.flatten(), CHAINS, replacement=True, generator=rng)
        share = torch.bincount(picks, minlength=CELLS**2).double() / CHAINS
        found.append(distance(share.view(CELLS, CELLS), masses))
    values = torch.tensor(found)
    return float(values.mean()), float(values.std())


def ways(kind: str, a: Any, b: Any, seed: int) -> dict[str, Callable[[], Drawn]]:
    """Return the samplers, by name; all start where the composition at the highest level nearly is."""
    energy = composed(kind, a, b)
    schedule = gb.VarianceExploding(LOW, HIGH, rho=4.0)
    levels, fine = schedule.levels(LEVELS), schedule.levels(FINE)
    weights = {"product": (1.0, 1.0), "mixture": (0.5, 0.5), "negation": (1.0, -WEIGHT)}[kind]
    second = floored(b) if kind == "negation" else b
    summed = SummedScore((gb.score_of(a), gb.score_of(second)), weights)

    def weighed(out: Any) -> Drawn:
        return out.x, out.log_weights.softmax(0)

    def rng() -> torch.Generator:
        return generator(seed, 7)

    def along(score: Any) -> Drawn:
        # The sum's own Gaussian at the highest level, so that what is wrong is the walk's doing.
        start = compose_scores(summed, fine[:2], rng=rng(), shape=(2,), chains=CHAINS, weights=False).start
        assert start is not None
        return equal(gb.reverse(score, start.sample(CHAINS, rng()), fine, gb.Ancestral(), rng=rng()))

    def chains(kernel: Any, steps: int, last: int) -> Drawn:
        out = compose(energy, levels, rng=rng(), kernel=kernel, steps=steps, last_steps=last, chains=CHAINS,
                      weights=False, predict=False)  # fmt: skip
        return equal(out.x)

    def smc(steps: int, last: int) -> Drawn:
        return weighed(compose(energy, levels, rng=rng(), steps=steps, last_steps=last, chains=CHAINS))

    found = {
        PLAIN: lambda: along(summed),
        "own score": lambda: along(gb.score_of(energy)),
        "ULA": lambda: chains(lambda s: gb.ULA(0.2 * s**2 / (1.0 + s**2 / 4.0)), MOVES, LAST),
        "MALA": lambda: chains(gb.MALA(5.0), MOVES, LAST),
        "HMC": lambda: chains(gb.HMC(1.0, leapfrog=3), MOVES // 3, LAST // 3),
        "FK, scores": lambda: weighed(compose_scores(summed, fine, rng=rng(), shape=(2,), chains=CHAINS)),
        "FK": lambda: smc(0, 0),
        "FK + MALA": lambda: smc(MOVES, LAST),
    }
    if kind != "mixture":
        found.pop("own score")
    else:
        # Scores alone cannot tell where which part of a mixture is.
        found.pop("FK, scores")
    return found


def measure(pair: Sequence[str], kind: str, energies: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict]:
    """Draw one composition every way."""
    a, b = (energies[name] for name in pair)
    x = nodes()
    at = composed(kind, a, b).given(sigma=LOW)
    learned = cells(-torch.cat([at(part) for part in x.flatten(0, 1).split(20_000)]).view(x.shape[:2]))
    truth = cells(true_log_prob(kind, *pair, x))
    best, spread = best_possible(learned, generator(seed, 8))
    row: dict[str, Any] = {
        "pair": " and ".join(pair),
        "kind": kind,
        "fit": distance(learned, truth),
        "best": best,
        "best_spread": spread,
        "best_to_truth": best_possible(truth, generator(seed, 9))[0],
        "ways": {},
    }
    shares = {"learned": learned, "exact": truth}
    for name, way in ways(kind, a, b, seed).items():
        with Stopwatch() as watch:
            share = histogram(way())
        shares[name] = share
        row["ways"][name] = {"learned": distance(share, learned), "truth": distance(share, truth), "cpu": watch.cpu}
    return row, shares


def picture(maps: dict[tuple[str, str], dict[str, Tensor]]) -> None:
    """Draw a row for each pair; for each kind the exact density, and histograms of three ways."""
    from matplotlib.figure import Figure
    from PIL import Image

    columns = ("exact", PLAIN, "MALA", RECOMMENDED)
    pairs = list(dict.fromkeys(pair for pair, _ in maps))
    figure = Figure(figsize=(0.95 * len(columns) * len(KINDS) + 0.4, 1.0 * len(pairs) + 0.6), layout="constrained")
    axes = figure.subplots(len(pairs), len(columns) * len(KINDS), squeeze=False)
    for i, pair in enumerate(pairs):
        for k, kind in enumerate(KINDS):
            for j, column in enumerate(columns):
                panel = axes[i][k * len(columns) + j]
                panel.set(xticks=[], yticks=[])
                if (shares := maps.get((pair, kind))) is None:
                    continue
                top = float(shares["exact"].max()) * 0.9
                panel.imshow(shares[column].T.numpy(), origin="lower", cmap="magma", vmin=0.0, vmax=top)
                if i == 0:
                    panel.set_title(f"{kind}:\n{column}" if j == 0 else f"\n{column}", fontsize=7)
                if k == j == 0:
                    panel.set_ylabel(pair, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(common.RESULTS / "composition.png", optimize=True)


def told(rows: list[dict[str, Any]], to: str) -> str:
    """Write the table of total variations to the learned or the true composition."""
    header = ["pair", "composition", *(["best possible"] if to == "learned" else ["learned density", "exact draws"])]
    lines = []
    for row in rows:
        known = [f"{row['best']:.3f}"] if to == "learned" else [f"{row['fit']:.3f}", f"{row['best_to_truth']:.3f}"]
        values = [f"{row['ways'][w][to]:.3f}" if w in row["ways"] else "" for w in WAYS]
        lines.append([row["pair"], row["kind"], *known, *values])
    return table([*header, *WAYS], lines)


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Say in how many cases the demands are met, and where they are not."""
    lines = []
    for way in ("MALA", "HMC", "FK, scores", "FK", RECOMMENDED):
        own = [row for row in rows if way in row["ways"]]
        better = [r for r in own if r["ways"][way]["learned"] < r["ways"][PLAIN]["learned"]]
        ratios = {(r["pair"], r["kind"]): r["ways"][way]["learned"] / r["best"] for r in own}
        within = [k for k, v in ratios.items() if v <= 2.0]
        worst = max(ratios, key=lambda k: ratios[k])
        failing = ", ".join(f"{k[1]} of {k[0]}" for k in ratios if k not in within)
        lines.append(
            f"* {way}: closer than plain summing in {len(better)} of {len(own)} cases; within twice the best possible "
            f"in {len(within)} of {len(own)}, at worst {ratios[worst]:.2f} times ({worst[1]} of {worst[0]})."
            + (f" Not within: {failing}." if failing else "")
        )
    return lines


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, draw, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many of the pairs")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    began = time.process_time()
    pairs = PAIRS[: options.pairs]
    energies, training = {}, {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        energies[name], training[name] = trained(name, options.seed)
        print(f"{name}: trained in {training[name]:.0f} s CPU", flush=True)
    rows, maps = [], {}
    for pair in pairs:
        for kind in KINDS:
            row, shares = measure(pair, kind, energies, options.seed)
            rows.append(row)
            maps[(row["pair"], kind)] = shares
            values = ", ".join(f"{k} {v['learned']:.3f}" for k, v in row["ways"].items())
            print(f"{row['pair']}, {kind}: fit {row['fit']:.3f}, best {row['best']:.3f}; {values}", flush=True)
    total = time.process_time() - began
    record = circumstances([options.seed], options.threads) | {"cpu": total, "training": training, "rows": rows}
    seconds = [sum(r["ways"][w]["cpu"] for r in rows if w in r["ways"]) for w in WAYS]
    notes = [f"* {w}: {text}; {s:.0f} s CPU in all." for (w, text), s in zip(WAYS.items(), seconds)]
    intro = (
        f"Energies of width {SIZES['width']} trained by denoising on {ROWS} draws each, {STEPS} steps. {CHAINS} draws "
        f"of every way; total variation on {CELLS} x {CELLS} squares of [-{BOX:.0f}, {BOX:.0f}]^2, at noise {LOW}. "
        f"Chains make {MOVES} steps at each of {LEVELS} levels (HMC a third as many trajectories of 3) and {LAST} at "
        f"the last, scores go down {FINE} levels. A negation subtracts {WEIGHT} of the energy of the second density "
        f"with {FLOOR:.0%} of a Gaussian of standard deviation {WIDE} mixed in: without, it is all about where the "
        f"second density is 1e-20 rather than 1e-30, which no samples tell. "
        f"{total / 60:.0f} minutes of one core."
    )
    sections = [
        intro,
        "\n".join(notes),
        "## To the composition of the learned densities\n\n" + told(rows, "learned"),
        "\n".join(verdict(rows)),
        "## To the composition of the true densities at the same noise\n\nThe column learned density is the error of "
        "the fit alone, without any draws; exact draws that of as many draws of the truth.\n\n" + told(rows, "truth"),
        "![compositions](composition.png)",
    ]
    write("composition", "Compositions in the plane", record, sections)
    picture(maps)
    return rows


if __name__ == "__main__":
    main()
