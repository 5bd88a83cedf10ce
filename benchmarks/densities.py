"""Total variation between fitted and true densities in the plane, with the default recipe.

For each set the default recipe is fitted to draws from a known density, and the fitted density, normalised by
quadrature, is compared with the truth on the same grid. The sampler is tested apart from the fit: the energy distance
of the model's draws to draws of the truth stands beside that of other draws of the truth (the floor, which is zero but
for chance). Writes ``results/densities.json``, ``.md`` and ``.png``.

    python benchmarks/densities.py --threads 1
"""

from __future__ import annotations

import argparse
import io
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from common import RESULTS, Stopwatch, circumstances, generator, over_seeds, table, write
from gibbsian.building import build_objective, initial_weights
from gibbsian.data import Dataset, load
from gibbsian.diagnostics.two_sample import energy_distance
from gibbsian.models import Model
from gibbsian.recipes import choose
from gibbsian.training.fit import fit

SETS = ("two-moons", "eight-gaussians", "checkerboard", "pinwheel", "ring", "banana", "double-well")
REQUIRED = ("two-moons", "eight-gaussians")
SHOWN = ("two-moons", "eight-gaussians", "checkerboard", "pinwheel")
LIMIT, DRAWS = 0.10, 10_000


@dataclass(frozen=True)
class Row:
    """One fit; distances are squared energy distances in standardised units."""

    name: str
    seed: int
    objective: str
    total_variation: float
    mass_on_grid: float
    distance: float
    distance_error: float
    floor: float
    train_cpu: float
    train_wall: float
    draw_cpu: float
    draw_wall: float
    rollbacks: int


def fitted(dataset: Dataset, seed: int) -> tuple[Model, Stopwatch, int]:
    """Fit the default recipe."""
    scaling = dataset.scaling()
    z = scaling.forward(dataset.train)
    recipe = choose(dataset.kind, dataset.event_shape, len(dataset.train), {"seed": seed})
    with Stopwatch() as watch:
        energy = initial_weights(recipe, z)
        done = fit(energy, z, build_objective(recipe, z, energy), rng=generator(seed), settings=recipe.training)
    return Model(energy, recipe, scaling), watch, done.rollbacks


def on_grid(model: Model, dataset: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Fitted and true density in model units at the quadrature's nodes, ``(k, k)`` each, and the ends of both axes."""
    assert dataset.truth is not None
    grid = model.grid()
    first, second = (axis.double() for axis in grid.axes)
    x = model.scaling.backward(torch.cartesian_prod(first, second).float())
    energy = torch.cat([dataset.truth(part) for part in x.split(20_000)]).double()
    log_z = float(getattr(dataset.truth, "log_z", 0.0))
    truth = (-energy - log_z - model.scaling.log_det).exp().view(len(first), len(second))
    return grid.log_prob.double().exp(), truth, torch.stack([first[[0, -1]], second[[0, -1]]])


def measure(name: str, seed: int) -> tuple[Row, tuple[Tensor, Tensor, Tensor]]:
    """Fit one set and compare."""
    dataset = load(name, seed=seed)
    assert dataset.truth is not None
    model, train, rollbacks = fitted(dataset, seed)
    found, truth, ends = on_grid(model, dataset)
    cell = float((ends[:, 1] - ends[:, 0]).prod()) / ((found.shape[0] - 1) * (found.shape[1] - 1))
    with Stopwatch() as draw:
        draws = model.draw(DRAWS, generator(seed, 1))
    fresh, other = (dataset.truth.sample(DRAWS, generator(seed, i)) for i in (2, 3))
    fresh, other, draws = (dataset.scaling().forward(x.float()) for x in (fresh, other, draws))
    distance = energy_distance(draws, fresh)
    row = Row(
        name=name,
        seed=seed,
        objective=model.recipe.objective,
        total_variation=0.5 * float((found - truth).abs().sum()) * cell,
        mass_on_grid=float(truth.sum()) * cell,
        distance=distance.value,
        distance_error=distance.stderr,
        floor=energy_distance(other, fresh).value,
        train_cpu=train.cpu,
        train_wall=train.wall,
        draw_cpu=draw.cpu,
        draw_wall=draw.wall,
        rollbacks=rollbacks,
    )
    return row, (found, truth, ends)


def picture(maps: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Draw true densities above fitted ones, on one colour scale per set."""
    from matplotlib.figure import Figure
    from PIL import Image

    names = [name for name in SHOWN if name in maps]
    if not names:
        return
    figure = Figure(figsize=(2.4 * len(names), 5.0), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        found, truth, ends = maps[name]
        top = float(torch.quantile(truth[truth > truth.max() * 1e-3], 0.98)) * 1.1
        for row, (label, values) in enumerate((("true", truth), ("fitted", found))):
            panel = axes[row][column]
            extent = (*ends[0].tolist(), *ends[1].tolist())
            panel.imshow(values.T.numpy(), origin="lower", extent=extent, cmap="magma", vmin=0.0, vmax=top)
            panel.set(xticks=[], yticks=[], xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), facecolor="black")
            panel.set_title(f"{name}: {label}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    RESULTS.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(RESULTS / "densities.png", optimize=True)


def summary(rows: list[Row]) -> str:
    """Write the table of means over seeds."""
    header = ["density", "total variation", "worst", "energy distance of draws", "floor", "training, s CPU (wall)"]
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        mean = {k: over_seeds(getattr(r, k) for r in own) for k in asdict(own[0]) if k not in ("name", "objective")}
        worst = max(r.total_variation for r in own)
        verdict = "" if name not in REQUIRED else " (met)" if worst < LIMIT else f" (NOT below {LIMIT})"
        lines.append(
            [
                name,
                mean["total_variation"],
                f"{worst:.3f}{verdict}",
                mean["distance"],
                mean["floor"],
                f"{mean['train_cpu'].value:.0f} ({mean['train_wall'].value:.0f})",
                f"{mean['draw_cpu'].value:.1f} ({mean['draw_wall'].value:.1f})",
            ]
        )
    return table([*header, f"{DRAWS} draws, s CPU (wall)"], lines)


NOTES = f"""Total variation is half the integral of |fitted - true|, on a 400 x 400 grid: 0 is equal, 1 disjoint.
Errors are standard errors over seeds, each with its own data and weights. Energy distances are squared and in
standardised units; those of the draws contain the misfit of the model and the error of the sampler together, the
floor's are those of fresh exact draws and scatter around zero. Required: every seed below {LIMIT} for
{" and ".join(REQUIRED)}, in under a minute."""


def main() -> None:
    """Run all sets and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(SETS), choices=list(SETS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    maps = {}
    for name in options.only:
        for seed in options.seeds:
            row, found = measure(name, seed)
            rows.append(row)
            maps.setdefault(name, found)
            print(f"{name}, seed {seed}: total variation {row.total_variation:.3f}, {row.train_cpu:.0f} s", flush=True)
    print(summary(rows))
    record = circumstances(options.seeds, options.threads) | {
        "means": {
            name: list(over_seeds(row.total_variation for row in rows if row.name == name)) for name in options.only
        },
        "rows": [asdict(row) for row in rows],
    }
    write("densities", "Densities in the plane", record, [summary(rows), NOTES, "![densities](densities.png)"])
    picture(maps)


if __name__ == "__main__":
    main()
