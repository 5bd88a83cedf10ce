"""Diffusion on two cores: an energy against a plain score in the same time, in draws and in likelihood.

Three parts, each written to ``results/diffusion.json``, ``.md`` and ``diffusion.png`` when it is done:

* ``draws``: a noise-conditional U-Net energy and a U-Net denoiser with the same backbone are trained on MNIST in the
  same processor time; Frechet distance of their draws, in the features of a classifier of the training rows;
* ``mnist``: their flow likelihoods of held-out rows, with random probes;
* ``digits``: the same of two small networks for 8 x 8 digits, with exact divergences, and the energy's own density.

MNIST is read from the folder in GIBBSIAN_DATA. ``--runs`` keeps checkpoints: training that was stopped goes on where it
was, and parts share the models.

    GIBBSIAN_DATA=data python benchmarks/diffusion.py --runs runs/diffusion
    python benchmarks/diffusion.py --parts digits --budget 0.01
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
from common import circumstances, generator, table, write
from diffusion_judging import ANNEALED, CHAINED, draw, gaussian_bits, likelihood, own_density, ways_of
from diffusion_training import LAW, SIGMA_MAX, SIGMA_MIN, STEPS, Options, Trained, train
from gibbsian.data import load
from gibbsian.diagnostics.estimate import Estimate
from judging import Judge, gaussian_draws
from mnist_results import save_panels, tiles

KINDS = ("energy", "score")

DRAWS = 1000
"""Draws of each way."""

ROWS = {"mnist": 100, "digits": 100}
"""Held-out rows whose likelihood is computed."""

SIGMAS = {"mnist": (0.005, 0.02), "digits": (0.03, 0.1)}
"""Lowest noise levels of the likelihood: at each it is a bound."""

OWN_SIGMA = 0.2
"""Noise level at which an energy's own density is compared with its flow's."""


def facts(trained: Trained) -> dict[str, Any]:
    """What training took."""
    return {
        "steps": trained.steps,
        "parameters": trained.parameters,
        "processor": trained.processor,
        "wall": trained.wall,
    }


def run_draws(options: Options) -> dict[str, Any]:
    """Train both models, draw in every way, judge and show."""
    dataset = load("mnist")
    judge, n = Judge(dataset, options.scaled(2000), options.seed), options.scaled(DRAWS, 16)
    found: dict[str, Any] = {"draws": n, "accuracy": judge.accuracy, "training": {}, "ways": {}}
    shown: dict[str, Tensor] = {"test rows": dataset.held_out}
    for kind in KINDS:
        trained = train("mnist", kind, dataset, options)
        found["training"][kind] = facts(trained)
        for way in ways_of(trained):
            drawn, seconds = draw(trained, way, n, options)
            shown[f"{kind}, {way}"] = drawn
            found["ways"][f"{kind}, {way}"] = {"distance": judge.distance(drawn), "seconds": seconds}
            print(f"{kind}, {way}: {found['ways'][f'{kind}, {way}']}", flush=True)
    rng = generator(options.seed, 20)
    floor = dataset.train[torch.randperm(len(dataset.train), generator=rng)[:n]]
    found["floor"] = judge.distance(floor)
    found["gaussian"] = judge.distance(gaussian_draws(dataset.train, n, rng))
    across = min(12, n)
    panels = {title: tiles(x[: 3 * across], across) for title, x in shown.items()}
    save_panels(common.RESULTS / "diffusion.png", panels, 2)
    return found


def run_likelihood(name: str, options: Options) -> dict[str, Any]:
    """Flow likelihoods of held-out rows under both models."""
    dataset = load(name)
    rows = dataset.held_out[torch.randperm(len(dataset.held_out), generator=generator(options.seed, 21))]
    rows = rows[: options.scaled(ROWS[name], 8)]
    found: dict[str, Any] = {"training": {}, "flow": {}}
    steps, probes = 2 * options.scaled(16, 4), 2 if name == "mnist" else None
    for kind in KINDS:
        trained = train(name, kind, dataset, options)
        found["training"][kind] = facts(trained)
        for sigma in SIGMAS[name]:
            told = likelihood(trained, sigma, rows, steps, probes, options.seed)
            found["flow"][f"{kind} at {sigma:g}"] = told
            print(f"{name}, {kind} at {sigma:g}: {told}", flush=True)
        if kind == "energy" and name == "digits":
            found["own"] = own_density(trained, OWN_SIGMA, rows, options)
        found["gaussian"] = gaussian_bits(trained, rows, options.seed)
    return found


def training_table(part: Mapping[str, Any]) -> str:
    """What both trainings took."""
    rows = [
        [kind, told["steps"], told["parameters"], f"{told['processor'] / 60:.1f}", f"{told['wall'] / 60:.1f}"]
        for kind, told in part["training"].items()
    ]
    return table(["model", "steps", "parameters", "processor minutes", "minutes of the clock"], rows)


def draws_section(part: Mapping[str, Any]) -> str:
    """Distances of all draws."""
    rows = [
        [name, Estimate(*told["distance"]), f"{told['seconds'] / part['draws'] * 1000:.0f}"]
        for name, told in part["ways"].items()
    ]
    rows += [["training rows (floor)", Estimate(*part["floor"]), ""], ["Gaussian", Estimate(*part["gaussian"]), ""]]
    head = ["draws", f"FD, {part['draws']} draws", "processor ms per draw"]
    told = f"The classifier is right on {part['accuracy']:.2%} of the test rows."
    return "\n\n".join(("## Draws of MNIST", training_table(part), told, table(head, rows), "![draws](diffusion.png)"))


def likelihood_section(title: str, part: Mapping[str, Any]) -> str:
    """Nats and bits of both models."""
    rows = []
    for name, told in part["flow"].items():
        probes = "exact" if told["probes"] is None else f"{told['probe_error']:.2f}"
        halved = f"{told['halved'][0]:+.3f} ({told['halved'][1]:.2f})"
        rows.append([name, told["rows"], Estimate(*told["log_prob"]), Estimate(*told["bits"]), probes, halved])
    rows.append(["Gaussian, full covariance", "", "", Estimate(*part["gaussian"]), "", ""])
    head = ["model, lowest level", "rows", "nats per image", "bits per dimension", "error by probes", "half the steps"]
    parts = [f"## Likelihood of {title}", training_table(part), table(head, rows)]
    if own := part.get("own"):
        z, stderr, lower, upper = own["log_z"]
        parts.append(
            f"The energy's own log-density of {own['rows']} held-out rows with noise of {own['sigma']:g}, in model "
            f"units: {Estimate(*own['own'])} with log Z = {z:.2f} ± {stderr:.2f}, bracket [{lower:.2f}, {upper:.2f}]; "
            f"its flow's {Estimate(*own['flow'])}; the first minus the second {Estimate(*own['difference'])}."
        )
    return "\n\n".join(parts)


NOTES = f"""Values go from -1 to 1 in model units. Both models of MNIST have the same backbone; so have those of digits,
but for the one-dimensional terms that the energy has besides. Both are trained with EDM's weight and preconditioning
(the energy of digits with gain 1 and fade 0) on rows with uniform noise of one grey step, at log-normal noise levels
of mean and standard deviation {LAW["mnist"]} (digits {LAW["digits"]}) between {SIGMA_MIN["mnist"]:g}
({SIGMA_MIN["digits"]:g}) and {SIGMA_MAX:g}. The energy is fitted with the change from level to level besides (weight
0.3). Steps at a training factor of 1: {STEPS}, chosen to take both models the same processor time. Minutes of the clock
are those of a machine with other work.

Every way but the last makes about 64 evaluations of the network (an energy's is a gradient) per draw, and ends by
taking out the noise of the lowest level: Heun 32 levels, Multistep and Ancestral 64, the correctors one Langevin step
of 0.1 of the variance at each of 32 or 22 levels; anneal {ANNEALED} levels of a Heun step and a Langevin step; MALA
chains four steps at each of {CHAINED["MALA chains"]} or {CHAINED["MALA chains, longer"]} levels, with a Metropolis
test and nothing else that leads from level to level. FD: squared Frechet distance to the 10,000 test rows in the 64
rectified units of the last hidden layer of a small convolutional classifier of the training rows, with its delta-method
error; it is biased upwards at few draws, as much as for the training rows beside it.

Likelihood: rows in grey values with uniform noise of one step added, so that the density's bits per dimension bound
those of the grey values from above; the flow runs from the lowest level to {SIGMA_MAX:g}, where the law is the
Gaussian with the data's mean and overall spread. At any lowest level it is the likelihood of a density and so a bound.
Errors are standard errors over rows, the same rows for all models; they contain those by the probes. Half the steps:
mean change (largest of a row), nats, when the steps of the Runge-Kutta method are doubled to those of the table."""

PARTS = {
    "draws": (run_draws, draws_section),
    "mnist": (lambda options: run_likelihood("mnist", options), lambda part: likelihood_section("MNIST", part)),
    "digits": (lambda options: run_likelihood("digits", options), lambda part: likelihood_section("digits", part)),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for; those of an earlier run with the same settings stay in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--budget", type=float, default=1.0, help="factor on steps, draws and rows, up to 1")
    parser.add_argument("--training", type=float, default=1.0, help="factor on the steps of training alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=None, help="where checkpoints are kept; nowhere when left out")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        options = Options(given.budget, given.seed, given.threads, given.runs or Path(folder), given.training)
        return run(given.parts, options)


def run(names: Sequence[str], options: Options) -> dict[str, Any]:
    """Run parts and write the results after each."""
    torch.set_num_threads(options.threads)
    own = {"budget": options.budget, "training": options.training, "seeds": [options.seed]}
    file = common.RESULTS / "diffusion.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    parts = before.get("parts", {}) if all(before.get(k) == v for k, v in own.items()) else {}
    for name in names:
        parts[name] = PARTS[name][0](options)
        record = circumstances([options.seed], options.threads) | own | {"parts": parts}
        sections = [tell(parts[k]) for k, (_, tell) in PARTS.items() if k in parts]
        scale = f"Budget {options.budget:g}, training factor {options.training:g}."
        write("diffusion", "Diffusion: an energy and a plain score", record, [scale, *sections, NOTES])
        print("\n" + PARTS[name][1](parts[name]), flush=True)
    return parts


if __name__ == "__main__":
    main()
