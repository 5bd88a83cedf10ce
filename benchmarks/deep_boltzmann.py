"""A deep Boltzmann machine, 784-500-1000, on binarised MNIST: pretraining, joint training, the bound on test rows.

Pixels are turned into bits by chance, each one with its grey value as the probability, as in the literature on this
model (a bound of -84.62 nats, `Deep Boltzmann machines (Salakhutdinov & Hinton, 2009)
<https://proceedings.mlr.press/v5/salakhutdinov09a.html>`_): once for pretraining and for the test rows, anew for every
batch of the joint training. log Z lies between bounds of forward annealing and of reverse annealing from long Gibbs
chains of the model; with it, the variational bound of all 10,000 test rows lies between two numbers. The upper end of
log Z, and so the lower number, holds as far as those chains are draws of the model.

Writes ``results/deep_boltzmann.json`` and ``.md``, a picture of draws and filters beside them, and the trained machine
to the folder ``--runs``, from which ``--evaluate`` repeats all but the training; of a run that is not done it judges
the last checkpoint. The times given are those of the processor. Needs MNIST in the folder GIBBSIAN_DATA.

    GIBBSIAN_DATA=data python benchmarks/deep_boltzmann.py --threads 1 --runs runs/deep
    python benchmarks/deep_boltzmann.py --budget 0.05
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.distributions import constraints

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.mean_field import MeanFieldEnergy, mean_field
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.mean_field import MeanFieldPCD
from gibbsian.partition.annealed import log_weights
from gibbsian.partition.boltzmann import rbm_path
from gibbsian.partition.bracket import between
from gibbsian.partition.deep import variational_bound
from gibbsian.partition.schedule import Schedule
from gibbsian.training.checkpoints import load_weights
from gibbsian.training.greedy import pretrain

HIDDEN = (500, 1000)
PRETRAINING, JOINT = 6000, 33_000
"""Steps of each machine of the stack, and of the whole."""
BATCH, SWEEPS, ITERATIONS = 100, 2, 6
TEMPERATURES, CHAINS, BURN_IN = 10_000, 100, 5000
"""Of annealing, each way, and Gibbs steps of the chains that the way back starts from."""

SMOOTHING, BASE = 0.002, 0.02
"""Of the pixels' means, where biases start, and where annealing does."""

STACK: dict[str, Any] = {"learning_rate": 1e-3, "final_learning_rate_factor": 0.05}
WHOLE: dict[str, Any] = {"learning_rate": 1e-3, "final_learning_rate_factor": 0.0}
SHARED: dict[str, Any] = {
    "batch_size": BATCH,
    "betas": (0.9, 0.999),
    "clip_norm": 0.0,
    "log_every": 500,
    "checkpoint_every": 3000,
    "tensorboard": False,
}


class Grey(gb.Energy):
    """What `fit` sees of an energy of bits when the rows are grey: probabilities, to be drawn anew for every batch."""

    def __init__(self, energy: gb.Energy) -> None:
        super().__init__()
        self.energy = energy
        self.event_shape, self.support = energy.event_shape, constraints.unit_interval

    def forward(self, x: Tensor) -> Tensor:
        """Energy of the rows cut at one half, which only a record of its spread asks for."""
        return self.energy((x > 0.5).to(x))


class Binarised(Objective):
    """An objective on bits, of batches of probabilities."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, energy: gb.Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw the bits, and compute the objective's loss."""
        return self.objective(energy.energy, Batch(torch.bernoulli(batch.x, generator=rng)), rng)


def rows(limit: int | None) -> tuple[Tensor, Tensor]:
    """Grey values of MNIST in [0, 1], ``(60000, 784)`` and ``(10000, 784)``, as it was published."""
    with np.load(Path(os.environ["GIBBSIAN_DATA"]) / "mnist.npz") as file:
        both = [torch.from_numpy(file[name]).flatten(1).float() / 255.0 for name in ("x_train", "x_test")]
    return both[0][:limit], both[1][:limit]


def trained(train: Tensor, options: argparse.Namespace, facts: dict[str, Any]) -> tuple[DeepBoltzmannMachine, Tensor]:
    """Train the whole; also return the chains it was trained with."""
    machine = DeepBoltzmannMachine(784, list(HIDDEN), rng=generator(options.seed, 0))
    bits, rng = torch.bernoulli(train, generator=generator(options.seed, 1)), generator(options.seed, 2)
    steps = {
        "pretraining": max(20, round(options.budget * PRETRAINING)),
        "joint": max(20, round(options.budget * JOINT)),
    }
    warm = {"warmup_steps": min(200, steps["joint"] // 10), "ema_decay": 0.999}
    with Stopwatch() as watch:
        settings = SHARED | STACK | warm | {"steps": steps["pretraining"]}
        pretrain(machine, bits, rng=rng, smoothing=SMOOTHING, **settings)
    facts |= {"steps": steps, "cpu": {"pretraining": watch.cpu}}
    recentre(machine, bits[:5000])
    print(facts, flush=True)
    objective = MeanFieldPCD(machine, bits, steps=SWEEPS, buffer_size=BATCH, iterations=ITERATIONS)
    energy = Grey(MeanFieldEnergy(machine, ITERATIONS))
    with Stopwatch() as watch:
        settings = SHARED | WHOLE | warm | {"ema_decay": options.average}
        callbacks = (lambda record: print(brief(record), flush=True),)
        folder = None if options.runs is None else options.runs / "joint"
        how = {"rng": rng, "callbacks": callbacks, "folder": folder, "steps": steps["joint"]}
        gb.fit(energy, train, Binarised(objective), **how, **settings)
    facts["cpu"]["joint"] = watch.cpu
    return machine, objective.chains.positions


def loaded(folder: Path) -> tuple[DeepBoltzmannMachine, Tensor, dict[str, Any]]:
    """Read a run that is done; of one that is not, the averaged weights of its last checkpoint, without its chains."""
    machine, file = DeepBoltzmannMachine(784, list(HIDDEN)), folder / "deep_boltzmann.pt"
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        machine.load_state_dict(saved["machine"])
        return machine, saved["chains"], saved["facts"]
    step = load_weights(Grey(MeanFieldEnergy(machine)), folder / "joint")
    steps = {"pretraining": PRETRAINING, "joint": step}
    return machine, torch.zeros(0, machine.even.size), {"steps": steps, "cpu": {}, "done": False}


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """What a line on the terminal says of a record."""
    return {k: round(v, 4) for k, v in record.items() if k in ("step", "gap", "moved", "grad_norm", "seconds")}


@torch.no_grad()
def recentre(machine: DeepBoltzmannMachine, bits: Tensor) -> None:
    """Offsets at the means of data and mean field; they stay there."""
    q = mean_field(machine, bits, iterations=20)
    machine.recentre(torch.cat((bits, q.even), 1).mean(0), q.odd.mean(0))


def judged(
    machine: DeepBoltzmannMachine, train: Tensor, test: Tensor, chains: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Any], Tensor]:
    """Log Z between bounds, the test rows' bound, and draws."""
    rng, share = generator(options.seed, 3), min(1.0, options.budget)
    temperatures, steps = (max(50, round(share * each)) for each in (TEMPERATURES, BURN_IN))
    base = machine.base(train, BASE)
    path, kernel = rbm_path(base, machine), RBMGibbs()
    with Stopwatch() as watch:
        started = torch.cat((chains, base.sample(max(2, CHAINS - len(chains)), rng)))[:CHAINS]
        draws = gb.sample(machine, kernel, started, steps=steps, rng=rng).x
        schedule = Schedule.linear(temperatures)
        ahead = log_weights(path, schedule, kernel, base.sample(CHAINS, rng), rng=rng)
        back = log_weights(path, schedule, kernel, draws, rng=rng, backwards=True)
        log_z = between(ahead, back)
        told = {"log_z": str(log_z), "ess": float(log_z.ess), "temperatures": temperatures, "burn_in": steps}
        for name, grey in (("test", test), ("train", train[: len(test) // 5])):
            bits = torch.bernoulli(grey, generator=generator(options.seed, 4))
            bound = variational_bound(machine, bits, log_z, iterations=100, tolerance=1e-3)
            mean = {end: float(value.mean()) for end, value in zip(("value", "lower", "upper"), bound)}
            told[name] = mean | {"rows": len(bits), "stderr": float(bound.value.std()) / len(bits) ** 0.5}
    return told | {"cpu": watch.cpu}, machine.visible_given(machine_odd(machine, draws, rng)).detach()


def machine_odd(machine: DeepBoltzmannMachine, draws: Tensor, rng: Generator) -> Tensor:
    """Draw the odd layers given the even ones."""
    layers = machine.two_layers(draws)
    u = torch.rand((len(draws), machine.odd.size), generator=rng)
    return layers.draw_hidden(layers.hidden_field(draws), u)


def picture(machine: DeepBoltzmannMachine, draws: Tensor) -> None:
    """Mean pixels of draws, and the couplings of some units of the first hidden layer."""
    from matplotlib.figure import Figure
    from PIL import Image

    weight = machine.weights[0].detach().T
    strongest = weight[weight.norm(dim=1).argsort(descending=True)[:: max(1, len(weight) // 100)]][:100]
    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    panels = {"draws (mean pixels)": grid(draws), "couplings of units of layer 1": grid(strongest)}
    for space, (title, image), limits in zip(figure.subplots(1, 2), panels.items(), ((0, 1), (-1.0, 1.0))):
        space.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        space.set_title(title, fontsize=9)
        space.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("L").quantize(32).save(common.RESULTS / "deep_boltzmann.png", optimize=True)


def grid(x: Tensor) -> np.ndarray:
    """Images ``(n, 784)`` ten in a row."""
    n = len(x) // 10 * 10
    return x[:n].view(n // 10, 10, 28, 28).permute(0, 2, 1, 3).reshape(n // 10 * 28, 280).detach().numpy()


def report(facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what was found."""
    found = facts["judged"]
    lines = [
        [
            name,
            f"{each['value']:.2f}",
            f"{each['lower']:.2f} to {each['upper']:.2f}",
            f"{each['stderr']:.2f}",
            each["rows"],
        ]
        for name, each in ((name, found[name]) for name in ("test", "train"))
    ]
    spent = ", ".join(
        f"{name} {seconds / 60:.1f}" for name, seconds in (facts["cpu"] | {"judging": found["cpu"]}).items()
    )
    sections = [] if facts.get("done", True) else ["Of a run that is not done."]
    sections += [
        f"784-{'-'.join(map(str, HIDDEN))}; {facts['steps']['pretraining']} steps of each machine of the stack, "
        f"{facts['steps']['joint']} of the whole, batches of {BATCH}, {SWEEPS} sweeps and {ITERATIONS} iterations of "
        f"mean field a step. Processor minutes: {spent}.",
        f"log Z {found['log_z']}; {found['temperatures']} temperatures and {CHAINS} chains each way, the way back "
        f"after {found['burn_in']} Gibbs steps. The bracket is at 99 percent, given that those are draws of the model.",
        table(["rows", "variational bound, nats", "by the ends of log Z", "standard error over rows", "rows"], lines),
        "The literature's bound for this model is -84.62 nats on test rows. Bits are drawn once from the grey values.",
    ]
    record = circumstances([options.seed], options.threads) | {"budget": options.budget} | facts
    write("deep_boltzmann", "A deep Boltzmann machine on binarised MNIST", record, sections)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--average", type=float, default=0.9995, help="decay of the averaged weights")
    parser.add_argument("--limit", type=int, help="rows of each set")
    parser.add_argument("--runs", type=Path, help="folder for the trained machine")
    parser.add_argument("--evaluate", action="store_true", help="judge the machine saved in --runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    train, test = rows(options.limit)
    file = None if options.runs is None else options.runs / "deep_boltzmann.pt"
    if options.evaluate:
        if options.runs is None or not options.runs.is_dir():
            parser.error("--evaluate needs --runs, the folder of a run")
        machine, chains, facts = loaded(options.runs)
    else:
        facts: dict[str, Any] = {}
        machine, chains = trained(train, options, facts)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"machine": machine.state_dict(), "chains": chains, "facts": facts}, file)
    facts["judged"], draws = judged(machine, train, test, chains, options)
    picture(machine, draws)
    report(facts, options)
    print(dict(facts["judged"].items()), flush=True)
    return facts


if __name__ == "__main__":
    main()
