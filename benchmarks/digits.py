"""Draws and out-of-distribution detection on digits, beside scikit-learn's density models, with errors over seeds.

Two thirds of the 1797 digits train each model, a third is held out; the seed decides the split and the model. Every
model gives as many draws as there are training rows, several times over (``--repeats``), all treated alike; values are
means over the repeats, errors standard errors over the seeds. Writes ``results/digits.json``, ``.md`` and ``.png``.

    python benchmarks/digits.py --threads 2
    python benchmarks/digits.py --seeds 0 --only default gmm
"""

from __future__ import annotations

import argparse
import io
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import RESULTS, Stopwatch, circumstances, generator, over_seeds, table, write
from gibbsian.building import build_objective, initial_weights
from gibbsian.data import Dataset, load
from gibbsian.diagnostics.detection import auroc
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.diagnostics.two_sample import classifier_test, energy_distance, frechet_distance, memorisation
from gibbsian.errors import DivergenceError
from gibbsian.models import Model
from gibbsian.recipes import choose
from gibbsian.training.fit import fit

GREY = 16
"""The brightest grey level; pixels are whole numbers from 0."""

Sampler = Callable[[int, torch.Generator], Tensor]


@dataclass
class Fitted:
    """A model ready to draw: ``sample(n, rng)`` gives pixels ``(n, 64)``."""

    sample: Sampler
    train: Stopwatch
    facts: dict[str, Any] = field(default_factory=dict)
    model: Model | None = None


class Judge:
    """The measures of one split; features are the last hidden layer of a classifier of the training rows."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        from sklearn.neural_network import MLPClassifier

        assert dataset.labels is not None
        assert dataset.held_out_labels is not None
        self.train, self.held_out = dataset.train.flatten(1), dataset.held_out.flatten(1)
        classifier = MLPClassifier((128, 32), max_iter=300, random_state=seed)
        classifier.fit(self.train.numpy() / GREY, dataset.labels.numpy())
        self.layers = list(zip(classifier.coefs_, classifier.intercepts_))[:2]
        self.accuracy = float(classifier.score(self.held_out.numpy() / GREY, dataset.held_out_labels.numpy()))
        self.reference = self.features(self.held_out)

    def features(self, x: Tensor) -> Tensor:
        """Activations ``(n, 32)`` of pixels ``(n, 64)``, scaled from 0..16 to [0, 1]."""
        a = x.double().numpy() / GREY
        for weight, bias in self.layers:
            a = np.maximum(a @ weight + bias, 0.0)
        return torch.from_numpy(a)

    def measure(self, x: Tensor, seed: int) -> dict[str, float]:
        """All measures of one set of draws."""
        clipped = x.clamp(0, GREY)
        rounded = clipped.round()
        near = memorisation(clipped, self.train, self.held_out)
        return {
            "fd": frechet_distance(self.features(x), self.reference).value,
            "fd_clipped": frechet_distance(self.features(clipped), self.reference).value,
            "c2st": classifier_test(rounded, self.held_out, rng=generator(seed, 7)).value,
            "nearest": near.samples.value,
            "nearest_held_out": near.held_out.value,
            "nearest_z": near.z,
            "energy_distance": energy_distance(clipped, self.held_out).value,
        }


def gibbsian(dataset: Dataset, seed: int, **overrides: Any) -> Fitted:
    """Fit a recipe of the library; a run that diverges for good is judged by its last good weights."""
    scaling = dataset.scaling()
    z = scaling.forward(dataset.train)
    recipe = choose(dataset.kind, dataset.event_shape, len(dataset.train), {"seed": seed, **overrides})
    facts: dict[str, Any] = {"recipe": recipe.to_dict()}
    with Stopwatch() as watch:
        energy = initial_weights(recipe, z)
        try:
            done = fit(energy, z, build_objective(recipe, z, energy), rng=generator(seed), settings=recipe.training)
            facts |= {"rollbacks": done.rollbacks, "events": done.events}
        except DivergenceError as error:
            facts |= {"rollbacks": recipe.training.max_rollbacks, "diverged": str(error)}
    model = Model(energy, recipe, scaling)
    return Fitted(lambda n, rng: model.draw(n, rng).flatten(1), watch, facts, model)


def default(dataset: Dataset, seed: int) -> Fitted:
    """Fit the default recipe."""
    return gibbsian(dataset, seed)


def pcd(dataset: Dataset, seed: int) -> Fitted:
    """Fit the recipe for persistent contrastive divergence."""
    return gibbsian(dataset, seed, objective="pcd")


def shuffled(make: Callable[[int, int], Any]) -> Sampler:
    """Draw from scikit-learn by a seed; its mixtures give draws component by component, so they are shuffled."""

    def sample(n: int, rng: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31 - 1, (), generator=rng))
        x = torch.as_tensor(np.asarray(make(n, seed))).float()
        return x[torch.randperm(n, generator=rng)]

    return sample


def gmm(dataset: Dataset, seed: int) -> Fitted:
    """Fit scikit-learn's Gaussian mixture, with the number and kind of components of the lowest BIC."""
    from sklearn.mixture import GaussianMixture

    x = dataset.train.flatten(1).double().numpy()
    counts = {"full": (1, 2, 3, 5, 8, 10, 15), "tied": (1, 5, 10, 20, 40, 80)}
    counts |= dict.fromkeys(("diag", "spherical"), (5, 10, 20, 30, 40, 60, 80, 100, 120, 160))
    best, lowest, failed = None, math.inf, 0
    with Stopwatch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, numbers in counts.items():
            for k in numbers:
                mixture = GaussianMixture(k, covariance_type=kind, random_state=seed)
                try:
                    score = mixture.fit(x).bic(x)
                except ValueError:
                    failed += 1  # A component has collapsed on a few rows.
                    continue
                if score < lowest:
                    best, lowest = mixture, score
    if best is None:
        raise RuntimeError("No Gaussian mixture could be fitted.")

    def make(n: int, draw_seed: int) -> Any:
        return best.set_params(random_state=draw_seed).sample(n)[0]

    facts = {"components": best.n_components, "covariance": best.covariance_type, "bic": lowest, "failed": failed}
    return Fitted(shuffled(make), watch, facts)


def rbm(dataset: Dataset, seed: int) -> Fitted:
    """Fit scikit-learn's RBM to pixels / 16; learning rate and iterations are chosen on the held-out rows themselves.

    Chains start from coin flips. Draws are, times 16, the bits of the last sweep or the pixels' means given its hidden
    units: whichever is nearer to the held-out rows.
    """
    from sklearn.neural_network import BernoulliRBM

    x, held_out = dataset.train.flatten(1).double().numpy() / GREY, dataset.held_out.flatten(1)

    def draws(machine: Any, n: int, draw_seed: int, sweeps: int, binary: bool = False) -> Any:
        rng = np.random.RandomState(draw_seed)
        v = rng.uniform(size=(n, x.shape[1])) < 0.5
        machine.random_state_ = rng
        for _ in range(sweeps):
            v = machine.gibbs(v)
        if binary:
            return v * float(GREY)
        h = machine._sample_hiddens(v, rng)
        return GREY / (1.0 + np.exp(-(h @ machine.components_ + machine.intercept_visible_)))

    tried: list[tuple[float, Any, dict[str, Any]]] = []
    with Stopwatch() as watch:
        for rate in (0.01, 0.03, 0.1):
            for iterations in (50, 200):
                machine = BernoulliRBM(256, learning_rate=rate, n_iter=iterations, random_state=seed).fit(x)
                for binary in (False, True):
                    found = torch.as_tensor(draws(machine, len(held_out), seed, 300, binary))
                    told = {"learning_rate": rate, "iterations": iterations, "binary": binary}
                    tried.append((energy_distance(found, held_out).value, machine, told))
    distance, machine, told = min(tried, key=lambda t: t[0])
    facts = told | {"energy_distance": distance}
    return Fitted(shuffled(lambda n, s: draws(machine, n, s, 2000, told["binary"])), watch, facts)


def kde(dataset: Dataset, seed: int) -> Fitted:
    """Fit a kernel density, its bandwidth by five-fold cross-validation: training rows with noise on them."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KernelDensity

    x = dataset.train.flatten(1).double().numpy()
    with Stopwatch() as watch:
        search = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.5, 5.0, 12)}, cv=5).fit(x)
    best: Any = search.best_estimator_
    facts = {"bandwidth": float(best.bandwidth)}
    return Fitted(shuffled(lambda n, s: best.sample(n, random_state=s)), watch, facts)


def training_rows(dataset: Dataset, seed: int) -> Fitted:
    """The floor: the training rows themselves."""
    return Fitted(lambda n, rng: dataset.train.flatten(1), Stopwatch())


def resampled_rows(dataset: Dataset, seed: int) -> Fitted:
    """The floor of independent draws: training rows with replacement, unlike a split by classes."""
    x = dataset.train.flatten(1)
    return Fitted(lambda n, rng: x[torch.randint(len(x), (n,), generator=rng)], Stopwatch())


MODELS: dict[str, tuple[str, Callable[[Dataset, int], Fitted]]] = {
    "default": ("Gibbsian, default recipe", default),
    "pcd": ("Gibbsian, PCD recipe", pcd),
    "gmm": ("GaussianMixture (BIC)", gmm),
    "rbm": ("BernoulliRBM, 256 units", rbm),
    "kde": ("KernelDensity (copies training rows)", kde),
    "resampled": ("floor: training rows, resampled", resampled_rows),
    "train": ("floor: training rows", training_rows),
}


def foreign(held_out: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """Make rows that are no digits, on the same grey levels as the digits."""
    order = torch.rand(held_out.flatten(1).shape, generator=rng).argsort(1)
    return {
        "uniform noise": torch.randint(GREY + 1, held_out.shape, generator=rng).float(),
        "shuffled pixels": held_out.flatten(1).gather(1, order).view(held_out.shape),
        "inverted": GREY - held_out,
    }


def detection(model: Model, dataset: Dataset, seed: int) -> dict[str, Estimate]:
    """AUROC of the model's energy, held-out digits against each kind of foreign rows, with bootstrap errors."""
    inside = model.energies(dataset.held_out)
    sets = foreign(dataset.held_out, generator(seed, 11))
    return {name: auroc(inside, model.energies(x), rng=generator(seed, 12)) for name, x in sets.items()}


def run_seed(seed: int, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Fit and judge every model on one split."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module="sklearn")
    dataset = load("digits", seed=seed)
    judge = Judge(dataset, seed)
    found: dict[str, Any] = {"seed": seed, "classifier_accuracy": judge.accuracy, "models": {}, "pictures": {}}
    for name in names:
        fitted = MODELS[name][1](dataset, seed)
        n = len(dataset.train)
        with Stopwatch() as watch:
            draws = [fitted.sample(n, generator(seed, 100))]
        draws += [fitted.sample(n, generator(seed, 100 + i)) for i in range(1, 1 if name == "train" else repeats)]
        each = [judge.measure(x, seed) for x in draws]
        values = {key: sum(m[key] for m in each) / len(each) for key in each[0]}
        values["c2st_raw"] = classifier_test(draws[0], judge.held_out, rng=generator(seed, 7)).value
        values |= {"train_cpu": fitted.train.cpu, "train_wall": fitted.train.wall}
        values |= {"sample_cpu": watch.cpu, "sample_wall": watch.wall}
        found["models"][name] = values | {"each": each, "facts": fitted.facts}
        found["pictures"][name] = draws[0][:64]
        if name == "default" and fitted.model is not None:
            found["detection"] = {k: list(v) for k, v in detection(fitted.model, dataset, seed).items()}
        told = ", ".join(f"{k} {values[k]:.3f}" for k in ("fd", "fd_clipped", "c2st", "nearest"))
        print(f"seed {seed}, {name}: {told}; {values['train_cpu']:.0f} s CPU", flush=True)
    found["pictures"]["real"] = judge.held_out[:64]
    return found


def quality_table(seeds: list[dict[str, Any]], names: list[str]) -> str:
    """Means over seeds of every measure and model."""
    keys = ["fd", "fd_clipped", "c2st", "c2st_raw", "nearest", "energy_distance"]
    header = ["draws", "FD, raw", "FD, clipped", "C2ST", "C2ST, unrounded", "nearest", "energy distance"]
    rows = []
    for name in names:
        own = [s["models"][name] for s in seeds]
        seconds = [
            f"{over_seeds(v[k + '_cpu'] for v in own).value:.1f} ({over_seeds(v[k + '_wall'] for v in own).value:.1f})"
            for k in ("train", "sample")
        ]
        rows.append([MODELS[name][0], *(over_seeds(v[k] for v in own) for k in keys), *seconds])
    held_out = over_seeds(next(iter(s["models"].values()))["nearest_held_out"] for s in seeds)
    rows.append(["held-out rows", 0, 0, 0.5, 0.5, held_out, 0, "", ""])
    return table([*header, "training, s CPU (wall)", "sampling, s CPU (wall)"], rows)


def difference_table(seeds: list[dict[str, Any]], names: list[str]) -> str:
    """How much better the default recipe is than each peer, seed by seed, which takes the split's chance out."""
    keys = {"fd": "FD, raw", "fd_clipped": "FD, clipped", "c2st": "C2ST", "energy_distance": "energy distance"}
    rows = []
    for name in names:
        if name in ("gmm", "rbm", "pcd") and "default" in names:
            pairs = [(s["models"][name], s["models"]["default"]) for s in seeds]
            rows.append([MODELS[name][0], *(over_seeds(a[k] - b[k] for a, b in pairs) for k in keys)])
    return table(["worse than the default recipe by", *keys.values()], rows)


def means(seeds: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Means and standard errors over seeds, as the tables print them."""
    found: dict[str, Any] = {}
    for name in names:
        own = [s["models"][name] for s in seeds]
        found[name] = {k: list(over_seeds(v[k] for v in own)) for k, v in own[0].items() if isinstance(v, float)}
        if "default" in names:
            better = [(s["models"][name], s["models"]["default"]) for s in seeds]
            found[name] |= {f"{k}_worse_by": list(over_seeds(a[k] - b[k] for a, b in better)) for k in ("fd", "c2st")}
    return found


def detection_table(seeds: list[dict[str, Any]]) -> str:
    """AUROC by seed, with bootstrap errors, and the mean."""
    kinds = list(seeds[0]["detection"])
    rows = [
        [kind, over_seeds(s["detection"][kind][0] for s in seeds), *(Estimate(*s["detection"][kind]) for s in seeds)]
        for kind in kinds
    ]
    return table(["foreign rows", "AUROC", *(f"seed {s['seed']}" for s in seeds)], rows)


def facts(seeds: list[dict[str, Any]], names: list[str]) -> str:
    """What was chosen, and what went wrong."""
    lines = []
    for s in seeds:
        for name in names:
            own = {k: v for k, v in s["models"][name]["facts"].items() if k not in ("recipe", "events")}
            if own:
                told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in own.items())
                lines.append(f"* seed {s['seed']}, {MODELS[name][0]}: {told}")
    return "\n".join(lines)


def picture(shown: dict[str, Tensor]) -> None:
    """Draw eight by eight digits of each kind side by side."""
    from matplotlib.figure import Figure
    from PIL import Image

    labels = {"real": "held-out digits", "default": "Gibbsian, default", "pcd": "Gibbsian, PCD"}
    labels |= {"gmm": "GaussianMixture", "rbm": "BernoulliRBM"}
    kept = {labels[name]: shown[name] for name in labels if name in shown}
    figure = Figure(figsize=(2.6 * len(kept), 2.9), layout="constrained")
    panels = figure.subplots(1, len(kept), squeeze=False)[0]
    for panel, (label, x) in zip(panels, kept.items()):
        tiles = torch.nn.functional.pad(x.clamp(0, GREY).view(8, 8, 8, 8), (0, 1, 0, 1), value=GREY / 2)
        panel.imshow(tiles.permute(0, 2, 1, 3).reshape(72, 72).numpy(), cmap="gray", vmin=0, vmax=GREY)
        panel.set_title(label, fontsize=10)
        panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    RESULTS.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("L").quantize(32).save(RESULTS / "digits.png", optimize=True)


NOTES = """FD: squared Fréchet distance to the held-out rows in the last hidden layer (32 rectified units) of
`MLPClassifier((128, 32), max_iter=300)`, trained on the training rows and their labels with pixels divided by 16; of
the draws as they come, and clipped to the pixels' range 0..16. C2ST: cross-validated accuracy of gradient-boosted trees
at telling draws from held-out rows, 0.5 being indistinguishable; draws are clipped and rounded to the data's whole grey
levels, since on unrounded draws of any continuous model the trees see the digits behind the point, and nothing else.
Nearest: mean distance to the nearest training row, in grey levels over 64 pixels, of clipped draws; well below that of
held-out rows is copying. Energy distance: squared, in grey levels, of clipped draws. Seconds are of this machine's
processor and, in brackets, of its clock, other work included; training includes choosing components, bandwidth and
learning rates.

The classifier has seen the training rows, so that their features differ from held-out ones' and even the floor is not
zero; resampled training rows show what independent draws of the same number can reach. The mixture and the kernel
density have their usual settings apart from what is chosen; the RBM's learning rate and iterations are chosen by the
energy distance to the held-out rows themselves, to its advantage, and so is whether its draws, after 2000 sweeps from
coin flips, are bits or means of pixels. Copies among resampled rows fall into different folds of the C2ST and give
themselves away there."""


def main() -> None:
    """Run all seeds and models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=4, help="sets of draws per model and seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    names = [name for name in MODELS if name in options.only]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        running = [pool.submit(run_seed, s, names, options.repeats, options.threads) for s in options.seeds]
        seeds = [job.result() for job in running]
    sections = [quality_table(seeds, names), difference_table(seeds, names)]
    if "default" in names:
        sections.append("Out-of-distribution detection by the default model's energy:\n\n" + detection_table(seeds))
    sections.append(NOTES)
    sections.append("What was chosen:\n\n" + facts(seeds, names))
    print("\n" + "\n\n".join(sections))
    picture(seeds[0]["pictures"])
    kept = [{k: v for k, v in s.items() if k != "pictures"} for s in seeds]
    record = circumstances(options.seeds, options.threads) | {
        "repeats": options.repeats,
        "means": means(seeds, names),
        "runs": kept,
    }
    write("digits", "Digits", record, [*sections, "![digits](digits.png)"])


if __name__ == "__main__":
    main()
