"""Conditional and controllable generation: labels, and an attribute that another energy has learned.

Two noise-conditional energies are fitted apart to the same rows: one with the digit as its label, one with the slant,
by terciles of each digit's own training rows (a 7 always leans to the right of a 6). Their sums, differences and
mixtures are asked for what neither was trained on:

* "a 3 or an 8": the mixture of two branches of the first;
* "a 7 but not slanted left": E(x | 7) - w (E(x | left) - E(x)), the attribute negated at a weight;
* every digit, slanted left and right: E(x | digit) + E(x | slant) - E(x).

Draws by plainly summing scores on the way down the levels (Heun's method), and by Metropolis chains (MALA) at every
level. An independent classifier judges the digit, image moments the slant. Writes ``results/controllable.json``,
``.md`` and ``controllable-SET.png``. MNIST is read from the folder in GIBBSIAN_DATA and is left out without it.

    GIBBSIAN_DATA=data python benchmarks/controllable.py
    python benchmarks/controllable.py --sets digits --budget 0.01
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.annealing import annealed_chains, denoised
from gibbsian.bridges.reverse import Heun, reverse
from gibbsian.data import Dataset, load
from gibbsian.energies.noise import NoiseConditionalEnergy
from gibbsian.energies.schedules import rho_levels
from gibbsian.errors import DataError, DivergenceError
from gibbsian.labelled import label_constants
from gibbsian.objectives.denoising import EDMWeight

SIGMA_MIN, SIGMA_MAX = 0.05, 8.0
LEFT, UPRIGHT, RIGHT, ANY_SLANT = 0, 1, 2, 3
DIGITS, DROPPED = 10, 0.15
WEIGHTS = (1.0, 3.0)
"""Of the negated attribute."""
SHOWN = 16
"""Draws of each request in the picture."""
WAYS = {"plain": "plain sum of scores", "chains": "chains at every level"}
SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "betas": (0.9, 0.99),
    "ema_decay": 0.998,
    "final_learning_rate_factor": 0.0,
    "tensorboard": False,
}


@dataclass(frozen=True)
class Plan:
    """What a set of images gets: rows, a network, steps of the two trainings, draws, and how finely they are walked."""

    rows: int
    network: Callable[[Sequence[int], int], NoiseConditionalEnergy]
    steps: tuple[int, int]
    batch: int
    draws: int
    levels: int
    chain_levels: int
    chain_steps: int


PLANS = {
    "digits": Plan(
        2000,
        lambda shape, labels: gb.NoiseConditional(shape, 256, 3, local=16, dropout=0.25, classes=labels),
        (2000, 1000),
        256,
        200,
        32,
        48,
        5,
    ),
    "mnist": Plan(
        10_000,
        lambda shape, labels: gb.NoiseConditionalUNet(shape, 24, classes=labels),
        (3200, 1300),
        64,
        60,
        24,
        24,
        3,
    ),
}


Parts = dict[str, Callable[[Tensor, Tensor], Tensor]]
"""Name of a part of a request to whether draws meet it, by their digits and slants ``(n,)``."""


@dataclass(frozen=True)
class Request:
    """An energy that is asked for draws, and what each draw should meet."""

    name: str
    energy: gb.Energy
    n: int
    parts: Parts


def slant(x: Tensor) -> Tensor:
    r"""Lean of images to the right, :math:`-\mu_{xy} / \mu_{yy}` with y downwards: ``(n, 1, h, w) -> (n,)``."""
    w = x[:, 0].double().clamp(min=0.0)
    w = w / w.sum((1, 2), keepdim=True).clamp(min=1e-9)
    down, across = (torch.arange(size, dtype=torch.float64) for size in w.shape[1:])
    y = down[:, None] - (w * down[:, None]).sum((1, 2))[:, None, None]
    z = across - (w * across).sum((1, 2))[:, None, None]
    return -(w * y * z).sum((1, 2)) / (w * y.square()).sum((1, 2)).clamp(min=1e-9)


class Judge:
    """The digit by a classifier that knows nothing of the energies, the slant against training rows of that digit."""

    def __init__(self, name: str, dataset: Dataset, steps: int) -> None:
        assert dataset.labels is not None
        assert dataset.value_range is not None
        self.high = dataset.value_range[1]
        x, y = self.prepared(dataset.train), dataset.labels
        lean, thirds = slant(x), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
        self.ends = torch.stack([lean[y == digit].quantile(thirds) for digit in range(DIGITS)])
        self.classify = support_vectors(x, y) if name == "digits" else convolutional(x, y, steps)

    def prepared(self, x: Tensor) -> Tensor:
        """Pixels from 0 to 1."""
        return x.clamp(0.0, self.high) / self.high

    def digits(self, x: Tensor) -> Tensor:
        """The digit of each image, ``(n,)``."""
        return self.classify(self.prepared(x))

    def slants(self, x: Tensor, digits: Tensor) -> Tensor:
        """The tercile of each image's slant among those of its digit, ``(n,)``."""
        return (slant(self.prepared(x))[:, None] > self.ends[digits]).sum(1)


def support_vectors(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit scikit-learn's classifier by support vectors, the best on these digits."""
    from sklearn.svm import SVC

    settings: dict[str, Any] = {"gamma": 0.16, "C": 10.0}
    machine = SVC(**settings).fit(x.flatten(1).numpy(), y.numpy())
    return lambda rows: torch.as_tensor(machine.predict(rows.flatten(1).numpy()))


def convolutional(x: Tensor, y: Tensor, steps: int) -> Callable[[Tensor], Tensor]:
    """Fit a small convolutional network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = 32 * (x.shape[2] // 4) * (x.shape[3] // 4)
        layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, DIGITS))
    rng, optimizer = generator(3), torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        picked = torch.randint(len(x), (128,), generator=rng)
        loss = nn.functional.cross_entropy(net(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def classify(rows: Tensor) -> Tensor:
        return torch.cat([net(part).argmax(1) for part in rows.split(1000)])

    return classify


def train(plan: Plan, z: Tensor, labels: Tensor, classes: int, steps: int, seed: int) -> NoiseConditionalEnergy:
    """Fit an energy with labels, of which some are dropped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        energy = plan.network(tuple(z.shape[1:]), classes + 1).calibrate(z)
    levels = gb.LogNormal(-0.8, 1.3, SIGMA_MIN, SIGMA_MAX)
    denoising = gb.MultiLevelDenoising(levels, EDMWeight(float(energy.scale)), level_weight=0.3)
    objective = gb.LabelDropping(denoising, none=classes, probability=DROPPED)
    settings: dict[str, Any] = SETTINGS | {
        "steps": steps,
        "batch_size": plan.batch,
        "warmup_steps": min(200, steps // 4),
    }
    done = gb.fit(energy, gb.Batch(z, {"y": labels}), objective, rng=generator(seed), **settings)
    print(f"{classes} labels: {done}", flush=True)
    return energy.eval()


def requests(label: NoiseConditionalEnergy, attribute: NoiseConditionalEnergy, draws: int) -> list[Request]:
    """All that is asked for; the first three are of single energies, to compare with."""
    constants = label_constants(label, label.base(SIGMA_MAX), SIGMA_MAX, DIGITS)
    either = gb.mixture(label.given(y=3), label.given(y=8), weights=(constants.min() - constants[[3, 8]]).exp())
    left = attribute.given(y=LEFT) - attribute.given(y=ANY_SLANT)
    wanted = torch.arange(DIGITS).repeat(-(-draws // DIGITS))[:draws]
    seven: Parts = {
        "is a 7": lambda digit, lean: digit == 7,
        "is not slanted left": lambda digit, lean: lean != LEFT,
    }

    def slanted(side: int, name: str) -> Parts:
        return {
            "is the digit": lambda digit, lean: digit == wanted,
            f"is slanted {name}": lambda digit, lean: lean == side,
        }

    threes = {
        "is a 3 or an 8": lambda digit, lean: (digit == 3) | (digit == 8),
        "is a 3": lambda digit, lean: digit == 3,
    }
    made = [
        Request("each digit", label.given(y=wanted), draws, {"is the digit": lambda digit, lean: digit == wanted}),
        Request("a 7", label.given(y=7), draws, seven),
        Request("a 3 or an 8", either, draws, threes),
        *(
            Request(f"a 7 but not slanted left, weight {w:g}", label.given(y=7) - w * left, draws, seven)
            for w in WEIGHTS
        ),
    ]
    for side, name in ((LEFT, "left"), (RIGHT, "right")):
        lean = attribute.given(y=side) - attribute.given(y=ANY_SLANT)
        made.append(Request(f"each digit, slanted {name}", label.given(y=wanted) + lean, draws, slanted(side, name)))
    return made


def draw(
    way: str, request: Request, base: gb.Gaussian, plan: Plan, rng: torch.Generator
) -> tuple[Tensor, float | None]:
    """Draw a request in model units, and tell the chains' acceptance at the lowest level."""
    start = base.sample(request.n, rng)
    if way == "plain":
        levels = rho_levels(SIGMA_MAX, SIGMA_MIN, plan.levels, 5.0)
        return reverse(request.energy, start, [*levels, 0.0], Heun()), None
    levels = rho_levels(SIGMA_MAX, SIGMA_MIN, plan.chain_levels, 5.0)
    kernel = gb.MALA(SIGMA_MAX**2 * start[0].numel() ** (-1 / 3))
    run = annealed_chains(request.energy, start, levels, kernel, steps=plan.chain_steps, rng=rng)
    clean = denoised(request.energy.given(sigma=SIGMA_MIN), run.samples.x, SIGMA_MIN)
    return clean, float(run.acceptance[-1])


def met(request: Request, digits: Tensor, slants: Tensor) -> dict[str, tuple[float, float]]:
    """Part of the draws that meets each part of a request, and all of them, with standard errors."""
    parts = {name: test(digits, slants) for name, test in request.parts.items()}
    if len(parts) > 1 and request.name != "a 3 or an 8":
        parts["all"] = torch.stack(list(parts.values())).all(0)
    return {name: share(hits) for name, hits in parts.items()}


def share(hits: Tensor) -> tuple[float, float]:
    """Part that is true, and its standard error with half a hit and half a miss added."""
    p, n = float(hits.double().mean()), len(hits)
    q = (p * n + 0.5) / (n + 1)
    return p, (q * (1 - q) / n) ** 0.5


def run_set(name: str, dataset: Dataset, budget: float, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train both energies, draw every request both ways, and judge."""
    plan = PLANS[name]
    scaled = lambda count, least=2: max(least, round(count * min(1.0, budget)))  # noqa: E731
    assert dataset.labels is not None
    assert dataset.held_out_labels is not None
    judge = Judge(name, dataset, scaled(1500))
    rows, labels = dataset.train[: plan.rows], dataset.labels[: plan.rows]
    z, back = dataset.scaling().forward(rows), dataset.scaling().backward
    with Stopwatch() as watch:
        label = train(plan, z, labels, DIGITS, scaled(plan.steps[0]), seed)
        attribute = train(plan, z, judge.slants(rows, labels), ANY_SLANT, scaled(plan.steps[1]), seed + 1)
    sevens = dataset.held_out[dataset.held_out_labels == 7]
    found: dict[str, Any] = {
        "training_rows": len(rows),
        "judge_accuracy": share(judge.digits(dataset.held_out) == dataset.held_out_labels),
        "held_out_sevens_not_left": share(judge.slants(sevens, torch.full((len(sevens),), 7)) != LEFT),
        "training_cpu_seconds": watch.cpu,
        "requests": [],
    }
    pictures: dict[str, Tensor] = {}
    draws = scaled(plan.draws, 4)
    for place, request in enumerate(requests(label, attribute, draws)):
        for way in WAYS:
            told: dict[str, Any] = {"request": request.name, "way": way, "draws": request.n}
            with Stopwatch() as watch:
                try:
                    x, acceptance = draw(way, request, label.base(SIGMA_MAX), plan, generator(seed, place))
                except DivergenceError as error:
                    found["requests"].append(told | {"diverged": str(error)})
                    continue
            x = back(x)
            digits = judge.digits(x)
            told |= {"met": met(request, digits, judge.slants(x, digits)), "acceptance": acceptance}
            found["requests"].append(told | {"cpu_seconds": watch.cpu})
            pictures[f"{request.name}\n{WAYS[way]}"] = judge.prepared(x[:SHOWN])
            print(f"{name}: {request.name}, {way}: {told['met']}", flush=True)
    return found, pictures


def paint(name: str, pictures: dict[str, Tensor]) -> None:
    """A row of draws for each request and way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(12.0, 0.68 * len(pictures)))
    FigureCanvasAgg(figure)
    for axes, (title, x) in zip(figure.subplots(len(pictures), 1, squeeze=False)[:, 0], pictures.items()):
        axes.imshow(
            nn.functional.pad(x, (1, 1, 1, 1), value=0.5)[:, 0].transpose(0, 1).flatten(1).numpy(),
            cmap="gray",
            vmin=0,
            vmax=1,
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(left=0.22, right=0.995, top=0.995, bottom=0.005, hspace=0.06)
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    figure.savefig(held, dpi=90)
    # Sixteen greys are a fifth of the bytes.
    Image.open(held).convert("L").quantize(16).save(common.RESULTS / f"controllable-{name}.png", optimize=True)


def section(name: str, found: dict[str, Any]) -> str:
    """One set's results as Markdown."""
    lines = []
    for row in found["requests"]:
        if "diverged" in row:
            lines.append([row["request"], WAYS[row["way"]], "left the numbers", "", ""])
            continue
        parts = "; ".join(f"{part} {gb.Estimate(*value)}" for part, value in row["met"].items())
        rate = "" if row["acceptance"] is None else f"{row['acceptance']:.2f}"
        lines.append([row["request"], WAYS[row["way"]], parts, rate, f"{row['cpu_seconds']:.0f}"])
    head = (
        f"Trained on {found['training_rows']} rows in {found['training_cpu_seconds']:.0f} core-seconds, both energies. "
        f"The judge is right on {gb.Estimate(*found['judge_accuracy'])} of the held-out rows; of their sevens "
        f"{gb.Estimate(*found['held_out_sevens_not_left'])} are not slanted left."
    )
    columns = ("request", "way", "part of the draws that meets it", "acceptance", "core-seconds")
    return f"## {name}\n\n{head}\n\n{table(columns, lines)}"


def save(record: dict[str, Any]) -> None:
    """Write the record and its tables."""
    words = (
        "Fractions of draws that meet each part of a request, ± one standard error over draws, of one pair of "
        "energies. Acceptance is that of the chains at the lowest noise level."
    )
    write(
        "controllable", "Controllable generation", record, [words, *(section(*part) for part in record["sets"].items())]
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the sets, and keep what was found before of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--budget", type=float, default=1.0, help="of steps and draws, up to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    record = circumstances([options.seed], options.threads) | {"budget": options.budget, "sets": {}}
    path = common.RESULTS / "controllable.json"
    if path.exists() and (before := json.loads(path.read_text()))["budget"] == options.budget:
        record["sets"] = before["sets"]
    for name in options.sets:
        try:
            dataset = load(name)
        except DataError as error:
            print(f"{name} is left out: {error}")
            continue
        found, pictures = run_set(name, dataset, options.budget, options.seed)
        record["sets"][name] = found
        record["sets"] = {each: record["sets"][each] for each in PLANS if each in record["sets"]}
        paint(name, pictures)
        save(record)
    return record["sets"]


if __name__ == "__main__":
    main()
