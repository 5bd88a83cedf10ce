"""Autoencoders and energies: draws of a VAE, a VAEBM and an LEBM, and what a VAE's likelihood is, from both sides.

Two parts, ``digits`` (8 x 8) and ``mnist``, each written to ``results/vae.json``, ``.md`` and ``vae-*.png`` when it is
done. Each trains models of one decoder, dense networks on z of 16 numbers:

* the VAE, by the evidence lower bound;
* the VAEBM, a correction of that VAE, frozen, by persistent chains over z and noise;
* the LEBM, a decoder with an energy of z as prior, by Langevin chains over z given x, and over z: from nothing, with
  the noise of its paper, and from the VAE's decoder, with chains that start at the VAE's encoder.

Frechet distances of draws, in the features of a classifier of the training rows (digits enlarged to 28 x 28), to the
held-out ones. Then bounds of the VAE's log-likelihood on held-out rows: the encoder's own, refined mean and scale of
each row, importance weights, annealing from the encoder and from the prior; the gains of the refinements;
and on rows that the VAE made, both sides. Bounds of the correction's normaliser.

All settings were chosen with seed 7, by draws' distances to the same held-out rows; the recorded run has seed 0. Steps
of training are what a few minutes allow, and none of the models is at its best; the LEBM from nothing is far from it on
MNIST (with seed 7, other kernels and noises gave distances of 360 and 700 there, in as many steps). The parts take
about 2 and 4 minutes of one processor. MNIST is read from the folder in GIBBSIAN_DATA.

    GIBBSIAN_DATA=data python benchmarks/vae.py --threads 1
    python benchmarks/vae.py --parts digits --budget 0.01
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import common
import gibbsian as gb
from common import circumstances, generator, table, write
from gibbsian.data import Dataset, load
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.decoders import Directed
from gibbsian.energies.latent import LatentEnergy
from gibbsian.energies.latents import GaussianProposal, ImportanceLatents
from gibbsian.energies.networks import Dense
from gibbsian.energies.reparametrised import VAEBM
from gibbsian.energies.variational import lebm, vae
from gibbsian.objectives.correction import CorrectionLikelihood
from gibbsian.objectives.variational import EvidenceLowerBound
from gibbsian.partition.latent import evidence_lower_bound, latent_log_likelihood, mean_of, simulated_bracket
from gibbsian.partition.refinement import refine_proposal
from judging import Judge, gaussian_draws
from mnist_results import save_panels, tiles

LATENT = 16


@dataclass(frozen=True)
class Plan:
    """What a set of images gets: hidden widths, steps of the three trainings, draws, rows whose likelihood is bounded.

    ``weighted`` counts the importance samples of a row, ``temperatures`` those from the encoder; from the prior there
    are four times as many.
    """

    hidden: tuple[int, int]
    steps: tuple[int, int, int]
    judge: int
    draws: int
    rows: int
    weighted: int
    temperatures: int


PLANS = {
    "digits": Plan((128, 128), (1500, 600, 300), 300, 500, 48, 2000, 50),
    "mnist": Plan((256, 256), (2000, 300, 200), 400, 1000, 24, 2000, 60),
}
WALK = gb.HMC(0.2, leapfrog=5, jitter=0.4)
"""How chains over z and noise move; the base is standard normal."""

ROUND, LONG = 2, 60
"""Steps of a chain in a round of training, and from the VAE's draws to those that are judged."""

SHOWN = ("VAE", "VAEBM", "VAEBM, without noise", "LEBM", "LEBM from the VAE")
"""Draws in the figure, beside training rows."""

CHAINS = 8
"""Annealed chains of a row."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    budget: float
    seed: int
    threads: int

    def scaled(self, count: int, least: int = 2) -> int:
        """So many, times the budget where it is below 1."""
        return max(least, round(count * min(1.0, self.budget)))


class Images:
    """Pixels in the model's units, from -1 to 1, and as they are judged: from 0 to 255, 28 x 28."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.scaling = dataset, dataset.scaling()
        self.train, self.held_out = (self.scaling.forward(x) for x in (dataset.train, dataset.held_out))

    def shown(self, x: Tensor) -> Tensor:
        """As judged."""
        low, high = self.dataset.value_range or (0.0, 255.0)
        pixels = (self.scaling.backward(x).clamp(low, high) - low) * (255.0 / (high - low))
        return nn.functional.interpolate(pixels, size=(28, 28))

    def judge(self, steps: int, seed: int) -> Judge:
        """Fit the classifier."""
        sets = {"train": self.shown(self.train), "held_out": self.shown(self.held_out)}
        return Judge(dataclasses.replace(self.dataset, **sets), steps, seed)


@contextmanager
def spent(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Keep the processor time of a block."""
    began = time.process_time()
    yield
    seconds[name] = time.process_time() - began
    print(f"{name}: {seconds[name]:.0f} processor seconds", flush=True)


def decoder(shape: Sequence[int], plan: Plan) -> gb.GaussianDecoder:
    """The likelihood that VAE and LEBM have."""
    return gb.GaussianDecoder(Dense(LATENT, shape, plan.hidden), shape, 0.5, learn_scale=True, latent=LATENT)


def train_vae(images: Images, plan: Plan, options: Options) -> LatentEnergy:
    """Fit the VAE by the evidence lower bound."""
    shape, rng = images.dataset.event_shape, generator(options.seed, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        # Records of training evaluate the energy, which needs few draws then.
        encoder = Dense(shape, 2 * LATENT, plan.hidden)
        model = vae(shape, LATENT, rng=rng, decoder=decoder(shape, plan), encoder=encoder, draws=2)
    steps = options.scaled(plan.steps[0])
    gb.fit(model, images.train, EvidenceLowerBound(), rng=rng, steps=steps, learning_rate=2e-3, log_every=200)
    return model


def train_vaebm(model: LatentEnergy, images: Images, plan: Plan, options: Options) -> VAEBM:
    """Fit a correction of the VAE."""
    rng = generator(options.seed, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed + 1)
        corrected = VAEBM(model, gb.MLP(images.dataset.event_shape, plan.hidden))
    objective = CorrectionLikelihood(WALK, corrected.base, steps=ROUND, buffer_size=1000)
    settings = {"batch_size": 64, "learning_rate": 1e-3, "ema_decay": 0.99, "log_every": 100}
    gb.fit(corrected, images.train, objective, rng=rng, steps=options.scaled(plan.steps[1]), **settings)
    return corrected


def train_lebm(images: Images, plan: Plan, options: Options, model: LatentEnergy | None = None) -> LatentEnergy:
    """Fit a decoder and an energy of its z together: from nothing, or from a VAE's decoder, chains from its encoder."""
    shape, rng, normal = images.dataset.event_shape, generator(options.seed, 3), gb.Gaussian(LATENT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if model is None:
            net = gb.GaussianDecoder(Dense(LATENT, shape, plan.hidden), shape, 0.3, latent=LATENT)
            prior = lebm(shape, LATENT, rng=rng, decoder=net, draws=2)
        else:
            own = cast(Directed, model.energy).likelihood
            net = copy.deepcopy(own).requires_grad_(True)
            encoder = cast(GaussianProposal, cast(ImportanceLatents, model.latents).proposal).net
            prior = lebm(shape, LATENT, rng=rng, decoder=net, encoder=encoder, draws=2)
    chains = gb.PersistentContrastiveDivergence(gb.MALA(0.1), normal, steps=10, buffer_size=1000)
    if model is None:
        objective = gb.LatentPriorLikelihood(chains, gb.ULA(0.005), steps=20, start=normal)
    else:
        objective = gb.LatentPriorLikelihood(chains, gb.MALA(0.01), steps=10)
    settings = {"learning_rate": 2e-3 if model is None else 1e-3, "ema_decay": 0.99, "log_every": 100}
    gb.fit(prior, images.train, objective, rng=rng, steps=options.scaled(plan.steps[2]), **settings)
    return prior


@torch.no_grad()
def draw(
    corrected: VAEBM, priors: Mapping[str, LatentEnergy], n: int, options: Options
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draws of all models, as their densities have them and without the noise of x; and acceptances."""
    rng, walked = generator(options.seed, 4), corrected.reparametrised
    steps = options.scaled(LONG, 4)
    u = walked.base.sample(n, rng)
    run = gb.sample(walked, WALK, u, steps=steps, rng=rng)
    found = {
        "VAE": walked.points(u),
        "VAE, without noise": walked.means(u),
        "VAEBM": walked.points(run.x),
        "VAEBM, without noise": walked.means(run.x),
    }
    acceptance = {"VAEBM": float(run.acceptance.mean())}
    for name, model in priors.items():
        joint = cast(Directed, model.energy)
        chains = gb.sample(joint.prior, gb.MALA(0.1), gb.Gaussian(LATENT).sample(n, rng), steps=5 * steps, rng=rng)
        found[name] = joint.likelihood.sample(chains.x, rng)
        found[f"{name}, without noise"] = joint.likelihood.mean(chains.x)
        acceptance[name] = float(chains.acceptance.mean())
    return found, acceptance


def bound(model: LatentEnergy, x: Tensor, plan: Plan, options: Options) -> dict[str, Any]:
    """Bounds of the log-likelihood of rows, and how far they are above the encoder's own."""
    seed, draws = options.seed, options.scaled(plan.weighted, 8)
    few, many = options.scaled(plan.temperatures, 4), options.scaled(4 * plan.temperatures, 8)
    refined = refine_proposal(model, x, rng=generator(seed, 5), steps=options.scaled(200, 4))
    first, better = (
        evidence_lower_bound(m, x, rng=generator(seed, 6, i), draws=200) for i, m in enumerate((model, refined))
    )
    found: dict[str, tuple[Tensor, Estimate]] = {
        "encoder: evidence lower bound": (first.values, first.mean),
        "refined means and scales: evidence lower bound": (better.values, better.mean),
    }
    for i, (name, each) in enumerate({"encoder": model, "refined means and scales": refined}.items()):
        told = each.estimate(x, generator(seed, 7, i), draws)
        error = float(told.stderr.square().sum().sqrt()) / len(x)
        found[f"{name}: {draws} importance weights"] = (-told.value, Estimate(-float(told.value.mean()), error))
        up = latent_log_likelihood(each, x, rng=generator(seed, 8, i), chains=CHAINS, temperatures=few)
        found[f"{name}: annealed, {few} temperatures"] = (up.log_prob, Estimate(float(up.value), float(up.stderr)))
    up = latent_log_likelihood(model, x, rng=generator(seed, 9), chains=CHAINS, temperatures=many, start="prior")
    found[f"prior: annealed, {many} temperatures"] = (up.log_prob, Estimate(float(up.value), float(up.stderr)))
    return {
        "rows": len(x),
        "bounds": {name: list(mean) for name, (_, mean) in found.items()},
        "gains": {name: list(mean_of(values - first.values)) for name, (values, _) in found.items()},
    }


def sandwich(model: LatentEnergy, plan: Plan, options: Options) -> dict[str, Any]:
    """Log-likelihoods of rows that the VAE made, from both sides, and by importance weights."""
    made = simulated_bracket(
        model,
        options.scaled(plan.rows, 4),
        rng=generator(options.seed, 10),
        chains=CHAINS,
        temperatures=options.scaled(4 * plan.temperatures, 8),
        start="prior",
    )
    refined = refine_proposal(model, made.x, rng=generator(options.seed, 11), steps=options.scaled(200, 4))
    draws = options.scaled(plan.weighted, 8)
    weighted = -refined.estimate(made.x, generator(options.seed, 12), draws).value
    return {
        "rows": len(made.x),
        "below": list(mean_of(made.below.log_prob)),
        "above": list(mean_of(made.above)),
        "gap": list(made.gap),
        "bounds": [float(made.below.lower), float(made.upper)],
        "weighted": list(mean_of(weighted)),
        "weighted less below": list(mean_of(weighted - made.below.log_prob)),
    }


def normaliser(corrected: VAEBM, options: Options) -> dict[str, Any]:
    """Log Z of the correction: by draws of the VAE, and by annealing over z and noise, from both sides."""
    walked, rng = corrected.reparametrised, generator(options.seed, 13)
    draws = gb.sample(walked, WALK, walked.base.sample(128, rng), steps=options.scaled(LONG, 4), rng=rng).x
    with torch.no_grad():
        plain = torch.cat(
            [-walked.correction(walked.points(walked.base.sample(1000, rng))) for _ in range(options.scaled(20))]
        )
    found = gb.bracket(walked, walked.base, draws, rng=rng, temperatures=options.scaled(200, 4))
    once, twice = (torch.logsumexp(k * plain.double(), 0) for k in (1.0, 2.0))
    return {
        "bracket": [float(t) for t in found[:4]],
        "annealed ess": float(found.ess),
        "plain": float(once) - float(torch.tensor(float(len(plain))).log()),
        "plain ess": float((2.0 * once - twice).exp()),
        "plain draws": len(plain),
    }


def run(name: str, options: Options) -> dict[str, Any]:
    """Train the models on a set, judge their draws, and bound what the VAE is worth."""
    plan, images, seconds = PLANS[name], Images(load(name)), {}
    with spent(seconds, "VAE"):
        model = train_vae(images, plan, options)
    with spent(seconds, "VAEBM"):
        corrected = train_vaebm(model, images, plan, options)
    priors = {}
    for kind, begin in {"LEBM": None, "LEBM from the VAE": model}.items():
        with spent(seconds, kind):
            priors[kind] = train_lebm(images, plan, options, begin)
    n, rng = options.scaled(plan.draws, 70), generator(options.seed, 14)
    with spent(seconds, "draws"):
        draws, acceptance = draw(corrected, priors, n, options)
    with spent(seconds, "judge"):
        judge = images.judge(options.scaled(plan.judge, 4), options.seed)
        shown = {kind: images.shown(x) for kind, x in draws.items()}
        picked = torch.randperm(len(images.train), generator=rng)[:n]
        floor = images.shown(images.train[picked])
        sets = shown | {"training rows (floor)": floor, "Gaussian": gaussian_draws(floor, n, rng)}
        quality = {kind: judge.distance(x) for kind, x in sets.items()}
    print({kind: f"{Estimate(*distance)}" for kind, distance in quality.items()}, flush=True)
    rows = images.held_out[torch.randperm(len(images.held_out), generator=rng)[: options.scaled(plan.rows, 4)]]
    with spent(seconds, "bounds"):
        bounds = bound(model, rows, plan, options)
    with spent(seconds, "simulated rows"):
        both = sandwich(model, plan, options)
    with spent(seconds, "normaliser"):
        constant = normaliser(corrected, options)
    pictures = {"training rows": images.shown(images.train[picked[:40]])} | {kind: shown[kind][:40] for kind in SHOWN}
    # A margin, for digits of 8 x 8 fill their squares.
    panels = {kind: tiles(nn.functional.pad(x, (4, 4, 4, 4)), 10) for kind, x in pictures.items()}
    save_panels(common.RESULTS / f"vae-{name}.png", panels, 2)
    scale = float(cast(gb.GaussianDecoder, cast(Directed, model.energy).likelihood).log_scale.detach().exp())
    steps = [options.scaled(count) for count in plan.steps]
    return {
        "plan": dataclasses.asdict(plan) | {"steps": steps},
        "scale": scale,
        "draws": n,
        "accuracy": judge.accuracy,
        "quality": quality,
        "acceptance": acceptance,
        "likelihood": bounds,
        "simulated": both,
        "normaliser": constant,
        "seconds": seconds,
        "budget": options.budget,
    }


def section(name: str, part: Mapping[str, Any]) -> str:
    """Tables of a set."""
    seconds, low, both, constant = part["seconds"], part["likelihood"], part["simulated"], part["normaliser"]
    quality = [
        [kind, Estimate(*distance), f"{seconds[kind]:.0f}" if kind in seconds else ""]
        for kind, distance in part["quality"].items()
    ]
    bounds = [[kind, Estimate(*mean), Estimate(*low["gains"][kind])] for kind, mean in low["bounds"].items()]
    value, error, lower, upper = constant["bracket"]
    steps = ", ".join(map(str, part["plan"]["steps"]))
    accepted = ", ".join(f"{kind} {share:.2f}" for kind, share in part["acceptance"].items())
    return "\n\n".join(
        (
            f"## {name}",
            f"Steps of training: {steps} (VAE, VAEBM, LEBM). Standard deviation of the VAE's decoder: "
            f"{part['scale']:.3f}, of pixels from -1 to 1. Frechet distances (FD) of {part['draws']} draws to the "
            f"held-out rows, with their error; the classifier is right on {100 * part['accuracy']:.1f}% of these. "
            f"Acceptance of the chains behind the draws: {accepted}. Processor seconds of training; those of the VAEBM "
            "and of the LEBM from the VAE come on top of the VAE's.",
            table(["draws", "FD", "seconds"], quality),
            f"Log-likelihood of {low['rows']} held-out rows under the VAE, nats per row, from below: mean with its "
            "error by the draws or chains, and by how much it is above the first line, with the error over rows.",
            table(["start: bound", "mean", "gain"], bounds),
            f"Of {both['rows']} rows that the VAE made, annealed from the prior and back: between "
            f"{Estimate(*both['below'])} and {Estimate(*both['above'])} on average (errors over rows), gap "
            f"{Estimate(*both['gap'])}; bounds at 99% [{both['bounds'][0]:.2f}, {both['bounds'][1]:.2f}]. By "
            f"importance weights of refined laws: {Estimate(*both['weighted'])}, which is "
            f"{Estimate(*both['weighted less below'])} above the lower side.",
            f"log Z of the correction under the VAE: {Estimate(value, error)} by annealing over z and noise, bounds "
            f"[{lower:.2f}, {upper:.2f}] (effective size {constant['annealed ess']:.0f}; the upper one is as good as "
            f"the chains it started from). By {constant['plain draws']} draws of the VAE: {constant['plain']:.2f}, of "
            f"effective size {constant['plain ess']:.1f}.",
            "Processor seconds: " + ", ".join(f"{what} {s:.0f}" for what, s in seconds.items()) + ".",
        )
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--budget", type=float, default=1.0, help="fraction of the steps and draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    told = parser.parse_args(arguments)
    torch.set_num_threads(told.threads)
    options = Options(told.budget, told.seed, told.threads)
    path: Path = common.RESULTS / "vae.json"
    before = json.loads(path.read_text()).get("parts", {}) if path.exists() else {}
    # What another budget gave is not mixed in.
    parts = {name: part for name, part in before.items() if part["budget"] == told.budget}
    for name in told.parts:
        parts[name] = run(name, options)
        parts = {key: parts[key] for key in PLANS if key in parts}
        record = circumstances([told.seed], told.threads) | {"parts": parts}
        sections = [section(key, part) for key, part in parts.items()]
        write("vae", "Autoencoders, with and without energies", record, sections)
    return parts


if __name__ == "__main__":
    main()
