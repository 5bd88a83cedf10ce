"""Boltzmann machines on MNIST beside published likelihoods, and a neural energy on the same bits.

Three parts, each written to ``results/boltzmann_mnist.json`` and ``.md`` when it is done:

* ``784-16``: PCD-1 as in the published example, on pixels cut at a half, centred or not, on the bits as they are and
  flipped; the likelihood is exact. `How to center deep Boltzmann machines (Melchior et al., 2016)
  <https://jmlr.org/papers/v17/14-237.html>`_; the figures are of PyDeep's `RBM_MNIST_small`.
* ``784-500``: PCD on bits drawn with the grey levels as probabilities; the likelihood lies between bounds by annealing
  both ways. `On the quantitative analysis of deep belief networks (Salakhutdinov & Murray, 2008)
  <https://doi.org/10.1145/1390156.1390266>`_.
* ``neural``: a multilayer energy on pixels cut at a half, by PCD with a sampler that follows gradients over bits; an
  RBM of 500 units on the same bits, for the same processor time.

MNIST is read from the folder in GIBBSIAN_DATA. ``--runs`` keeps checkpoints: a run that was stopped goes on where it
was. Pictures go to ``--pictures``.

    GIBBSIAN_DATA=data python benchmarks/boltzmann_mnist.py --runs runs/boltzmann
    python benchmarks/boltzmann_mnist.py --parts 784-16 --budget 0.01
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
import gibbsian as gb
from boltzmann_mnist_results import LARGE, NEURAL, NOTES, SMALL, draw_machine, draw_neural
from common import Stopwatch, circumstances, generator, write
from gibbsian.data import Dataset, load
from gibbsian.energies.tractable import Tractable
from gibbsian.kernels.base import Kernel
from gibbsian.partition.paths import Path as Annealing

EPOCH, BATCH = 600, 100
"""Steps of an epoch, and rows of a step, which are also the persistent chains."""

FIXED: dict[str, Any] = {
    "batch_size": BATCH,
    "clip_norm": 0.0,
    "warmup_steps": 0,
    "log_every": 600,
    "checkpoint_every": 3000,
    "tensorboard": False,
}

PUBLISHED: dict[str, Any] = FIXED | {
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "decay": "constant",
    "ema_decay": 0.0,
}
"""Plain stochastic gradients, with the last weights as the result."""

COMPILED_FROM = 100
"""Hidden units from which rounds are compiled: below, a step is hardly any arithmetic."""

SMALL_EPOCHS, SMALL_WEIGHTS = 50, 0.2
"""The published example's epochs, and the standard deviation of its first weights."""

SMOOTHING = 0.002
"""Biases start at the pixels' means, none below a thousandth, as in the example. From the default, which takes a
twentieth, 30,000 steps at 0.01 do not reach pixels that are nearly always empty: were they independent, that would cost
0.7 nats instead of 0.1."""

BASE = 0.02
"""The same of the independent bits from which annealing starts."""

COPIES = 5
"""Drawings of bits of every training row."""

LARGE_EPOCHS = 200
LARGE_SETTINGS: dict[str, Any] = FIXED | {
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "final_learning_rate_factor": 0.0,
    "ema_decay": 0.999,
}
"""Chosen beforehand: five times the published rate of centred machines, falling to nothing, and averaged weights."""

TEMPERATURES, CHAINS, REST = 15_000, 200, 5000
"""Of the annealing of 500 units: temperatures, chains each way, and Gibbs steps before draws count as the model's."""

NEURAL_WIDTHS, NEURAL_STEPS, NEURAL_MOVES, NEURAL_BUFFER = (512, 512), 12_000, 10, 200
"""Of the neural energy: hidden layers, steps of training, steps of a chain in each of them, chains that are kept."""

NEURAL_KERNEL = gb.PathAuxiliary(6)
NEURAL_SETTINGS: dict[str, Any] = FIXED | {
    "learning_rate": 5e-4,
    "betas": (0.0, 0.99),
    "ema_decay": 0.998,
    "clip_norm": 1.0,
    "warmup_steps": 100,
}
NEURAL_TEMPERATURES, NEURAL_CHAINS = 15_000, 100
RIVAL_EPOCHS = 100
"""Of the machine on the same bits, which take about as long as the neural energy."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    budget: float
    seed: int
    threads: int
    runs: Path
    pictures: Path

    def scaled(self, count: int, least: int = 2) -> int:
        """So many, times the budget where it is below 1."""
        return max(least, round(count * min(1.0, self.budget)))


@dataclass(frozen=True)
class Bits:
    """Training and test rows as zeros and ones, ``(n, 784)``."""

    train: Tensor
    test: Tensor

    def flipped(self) -> Bits:
        """Zeros for ones."""
        return Bits(1.0 - self.train, 1.0 - self.test)


def cut(dataset: Dataset) -> Bits:
    """Cut the pixels at a half."""
    return Bits(*((rows.flatten(1) > 127.5).float() for rows in (dataset.train, dataset.held_out)))


def drawn(dataset: Dataset, copies: int, seed: int) -> Bits:
    """Draw bits with the grey levels as probabilities, of each training row several times."""
    rng = generator(seed, 1)
    rows = [torch.bernoulli(dataset.held_out.flatten(1) / 255.0, generator=rng)]
    rows += [torch.bernoulli(dataset.train.flatten(1) / 255.0, generator=rng) for _ in range(copies)]
    return Bits(torch.cat(rows[1:]), rows[0])


@dataclass(frozen=True)
class Trained:
    """A machine with its persistent chains; seconds are processor time of this process, earlier sessions left out."""

    machine: gb.RBM
    chains: Tensor
    seconds: float
    steps: int


def train(
    name: str, rows: Tensor, hidden: int, epochs: float, settings: Mapping[str, Any], options: Options, **how: Any
) -> Trained:
    """Fit a machine by PCD-1, or take up a run that was stopped.

    ``how`` may say ``centred`` and ``weight_scale``.
    """
    rng, centred = generator(options.seed, 2), how.get("centred", True)
    machine = gb.RBM(784, hidden, weight_scale=how.get("weight_scale", 0.01), rng=rng)
    machine.start_at(rows, SMOOTHING, centred)
    persistent = gb.PCD(
        gb.RBMGibbs(), machine.base(rows), steps=1, buffer_size=BATCH, restart=0.0, compile=hidden >= COMPILED_FROM
    )
    objective = gb.Centred(persistent, rate=0.01) if centred else persistent
    steps = options.scaled(round(EPOCH * epochs))
    with Stopwatch() as watch:
        done = gb.fit(
            machine, rows, objective, rng=rng, steps=steps, folder=options.runs / name, resume=True, **settings
        )
    print(f"{name}: {done}, {watch.cpu:.0f} s of processor time", flush=True)
    return Trained(machine, persistent.buffer.positions, watch.cpu, steps)


def run_small(options: Options) -> dict[str, Any]:
    """Centred or not, on bits as they are and flipped."""
    bits = cut(load("mnist"))
    found: dict[str, Any] = {"epochs": SMALL_EPOCHS, "budget": options.budget, "runs": []}
    for flipped in (False, True):
        data = bits.flipped() if flipped else bits
        for centred in (True, False):
            name = f"16-{'centred' if centred else 'plain'}-{'flipped' if flipped else 'straight'}"
            own = {"centred": centred, "weight_scale": SMALL_WEIGHTS}
            done = train(name, data.train, 16, SMALL_EPOCHS, PUBLISHED, options, **own)
            log_z = gb.exact_log_z(done.machine)
            likelihoods = {
                k: float(gb.exact_log_likelihood(done.machine, x, log_z).mean())
                for k, x in (("train", data.train), ("test", data.test))
            }
            row = {"centred": centred, "flipped": flipped, "log_z": float(log_z.value), "cpu": done.seconds}
            found["runs"].append(row | likelihoods)
            print(found["runs"][-1], flush=True)
            if centred and not flipped:
                draws = rested(done, options.scaled(REST, 5), generator(options.seed, 3))
                draw_machine(options.pictures / "rbm-784-16.png", done.machine, data.test, draws, 16, 4)
    return found


def rested(done: Trained, steps: int, rng: torch.Generator) -> Tensor:
    """Let the chains of training go on under the weights that came out of it."""
    return gb.sample(done.machine, gb.RBMGibbs(), done.chains, steps=steps, rng=rng).x


def run_large(options: Options) -> dict[str, Any]:
    """500 hidden units, between bounds."""
    bits = drawn(load("mnist"), COPIES, options.seed)
    done = train("500-drawn", bits.train, 500, LARGE_EPOCHS, LARGE_SETTINGS, options)
    judged = judge_machine(done, bits, options)
    draw_machine(options.pictures / "rbm-784-500.png", done.machine, bits.test, judged.pop("draws"), 100, 10)
    return {"epochs": LARGE_EPOCHS, "budget": options.budget, "copies": COPIES, "cpu": done.seconds} | judged


def judge_machine(done: Trained, bits: Bits, options: Options) -> dict[str, Any]:
    """Bracket log Z with draws of two origins: the chains of training, and chains that start at training rows."""
    rng, base = generator(options.seed, 4), done.machine.base(bits.train, BASE)
    path = gb.rbm_path(base, done.machine)
    chains, rest = options.scaled(CHAINS, 4), options.scaled(REST, 5)
    with Stopwatch() as watch:
        persistent = rested(done, rest, rng)
        picked = torch.randint(0, len(bits.train), (chains,), generator=rng)
        start = torch.cat((persistent[: chains // 2], bits.train[picked[chains // 2 :]]))
        draws = gb.sample(done.machine, gb.RBMGibbs(), start, steps=rest, rng=rng).x
    told = between_bounds(done.machine, base, draws, gb.RBMGibbs(), path, TEMPERATURES, bits, options)
    return told | {"rest_cpu": watch.cpu, "draws": draws}


@torch.no_grad()
def between_bounds(
    energy: gb.Energy,
    base: Tractable,
    draws: Tensor,
    kernel: Kernel,
    path: Annealing | None,
    temperatures: int,
    bits: Bits,
    options: Options,
) -> dict[str, Any]:
    """Bound log Z by annealing both ways; likelihoods of test and of as many training rows."""
    rng, stops = generator(options.seed, 5), options.scaled(temperatures, 20)
    with Stopwatch() as watch:
        z = gb.bracket(energy, base, draws, rng=rng, temperatures=stops, kernel=kernel, path=path)
    shape = (-1, *draws.shape[1:])
    rows = {"test": bits.test, "train": bits.train[: len(bits.test)]}
    energies = {k: torch.cat([energy(part.view(shape)) for part in x.split(1000)]).double() for k, x in rows.items()}
    error = float(energies["test"].std()) / len(bits.test) ** 0.5
    numbers = {k: float(getattr(z, k)) for k in ("value", "stderr", "lower", "upper", "ess")}
    told = {"log_z": numbers, "temperatures": stops, "chains": len(draws), "bracket_cpu": watch.cpu}
    likelihoods = {k: -float(e.mean()) - numbers["value"] for k, e in energies.items()}
    bounds = [-float(energies["test"].mean()) - numbers[k] for k in ("upper", "lower")]
    found = told | likelihoods | {"test_error": error, "test_bounds": bounds}
    print(found, flush=True)
    return found


def neural_energy(rows: Tensor, options: Options) -> tuple[gb.Energy, Tractable]:
    """A network, plus independent bits with the rows' means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = gb.MLP(784, NEURAL_WIDTHS)
    base = gb.Bernoulli(probs=(1.0 - BASE) * rows.mean(0) + 0.5 * BASE)
    return net + base, base


def run_neural(options: Options) -> dict[str, Any]:
    """A neural energy, and a machine on the same bits."""
    bits = cut(load("mnist"))
    energy, base = neural_energy(bits.train, options)
    rng, steps = generator(options.seed, 6), options.scaled(NEURAL_STEPS)
    persistent = gb.PCD(NEURAL_KERNEL, base, steps=NEURAL_MOVES, buffer_size=NEURAL_BUFFER, restart=0.0)
    with Stopwatch() as watch:
        where = options.runs / "neural"
        done = gb.fit(
            energy, bits.train, persistent, rng=rng, steps=steps, folder=where, resume=True, **NEURAL_SETTINGS
        )
    print(f"neural: {done}, {watch.cpu:.0f} s of processor time", flush=True)
    with Stopwatch() as rest:
        start = persistent.buffer.sample(options.scaled(NEURAL_CHAINS, 4), rng)
        draws = gb.sample(energy, NEURAL_KERNEL, start, steps=options.scaled(REST, 5), rng=rng).x
    judged = between_bounds(energy, base, draws, NEURAL_KERNEL, None, NEURAL_TEMPERATURES, bits, options)
    draw_neural(options.pictures / "neural-bits.png", bits.test, draws)
    found = {"neural": judged | {"cpu": watch.cpu, "rest_cpu": rest.cpu, "steps": steps}, "budget": options.budget}
    rival = train("500-cut", bits.train, 500, RIVAL_EPOCHS, LARGE_SETTINGS, options)
    judged = judge_machine(rival, bits, options)
    del judged["draws"]
    return found | {"rbm": judged | {"cpu": rival.seconds, "steps": rival.steps}}


PARTS: dict[str, tuple[Callable[[Options], dict[str, Any]], Callable[[Mapping[str, Any]], str]]] = {
    "784-16": (run_small, SMALL),
    "784-500": (run_large, LARGE),
    "neural": (run_neural, NEURAL),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for; those of an earlier run at the same budget and seed stay in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--budget", type=float, default=1.0, help="factor on steps, chains and temperatures, up to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=None, help="where checkpoints are kept; nowhere when left out")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = given.runs or Path(folder)
        return run(given.parts, Options(given.budget, given.seed, given.threads, runs, given.pictures))


def run(names: Sequence[str], options: Options) -> dict[str, Any]:
    """Run parts and write the results after each."""
    torch.set_num_threads(options.threads)
    own = {"budget": options.budget, "seeds": [options.seed]}
    file = common.RESULTS / "boltzmann_mnist.json"
    for name in names:
        part = PARTS[name][0](options)
        # Read late: parts may run side by side.
        before = json.loads(file.read_text()) if file.exists() else {}
        parts = before.get("parts", {}) if all(before.get(k) == v for k, v in own.items()) else {}
        parts[name] = part
        record = circumstances([options.seed], options.threads) | own | {"parts": parts}
        sections = [tell(parts[k]) for k, (_, tell) in PARTS.items() if k in parts]
        write("boltzmann_mnist", "Boltzmann machines on MNIST", record, [*sections, NOTES])
        print("\n" + PARTS[name][1](part), flush=True)
    return parts


if __name__ == "__main__":
    main()
