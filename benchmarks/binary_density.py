"""Log-likelihoods of binary data in nats per row: exact on NLTCS (16 columns), bracketed on Plants (69 columns).

On NLTCS every state can be listed, so that each model's test log-likelihood is exact: a fully visible Boltzmann
machine and a neural energy by exact likelihood; restricted Boltzmann machines by persistent contrastive divergence, the
size chosen on the validation rows, and the chosen one taken on by exact likelihood; a neural energy by the same
divergence, its chains moved by Gibbs steps that follow the gradient. On Plants restricted machines are chosen by
annealing on the validation rows, and the test log-likelihood comes with a bracket of log Z, whose upper bound assumes
that long chains are draws of the model.

    GIBBSIAN_DATA=folder python benchmarks/binary_density.py

The folder holds ``nltcs.npz`` and ``plants.npz``, each with arrays ``train``, ``valid`` and ``test`` of zeros and ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import common
import gibbsian as gb
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.diagnostics.chains import split_r_hat
from gibbsian.objectives.base import Objective
from gibbsian.partition.schedule import Schedule

NLTCS_HIDDEN, PLANTS_HIDDEN = (8, 16, 32), (100, 200)
BATCH = 256
PCD_STEPS = {"nltcs": 5000, "plants": 8000}
PCD_RATE = {"nltcs": 0.02, "plants": 0.01}
EXACT_STEPS = 300
"""Steps by exact likelihood, each over all 65536 states."""

CHAINS = 256
ANNEALING = {"valid": 300, "test": 3000}
"""Temperatures: to choose by, and of the bracket."""

DRAWN = 3000
"""Sweeps of the chains that the upper bound starts from."""

DAMPED = {"clip_norm": 0.0, "final_learning_rate_factor": 0.01, "log_every": 500, "checkpoint_every": 10**6}


@dataclass(frozen=True)
class Rows:
    """A data set's three parts, ``(n, columns)`` of zeros and ones."""

    train: Tensor
    valid: Tensor
    test: Tensor


class FullyVisible(gb.Energy):
    """Spins that are all coupled: minus the sum over pairs of J_ij s_i s_j, less the fields, with s = 2 x - 1."""

    support = constraints.boolean

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.event_shape = torch.Size((columns,))
        self.field = nn.Parameter(torch.zeros(columns))
        self.couplings = nn.Parameter(torch.zeros(columns, columns))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, ``(n, columns) -> (n,)``; each pair counts once."""
        s = 2.0 * x - 1.0
        return -(s * (s @ self.couplings.triu(1) + self.field)).sum(1)


def load(name: str) -> Rows | None:
    """Read a data set, if it is there."""
    file = Path(os.environ.get("GIBBSIAN_DATA", ".")) / f"{name}.npz"
    if not file.is_file():
        return None
    with np.load(file) as arrays:
        return Rows(*(torch.from_numpy(arrays[part]).float() for part in ("train", "valid", "test")))


def frequencies(rows: Rows) -> Tensor:
    """How often each column is one, drawn a little towards a half."""
    return (rows.train.sum(0) + 0.5) / (len(rows.train) + 1.0)


def independent(rows: Rows) -> gb.Energy:
    """Columns that do not know of each other."""
    return gb.Bernoulli(logits=torch.logit(frequencies(rows)))


def machine(rows: Rows, hidden: int, seed: int) -> gb.RBM:
    """An RBM at the frequencies of the columns."""
    rbm = gb.RBM(rows.train.shape[1], hidden, weight_scale=0.1, rng=generator(seed, hidden))
    rbm.start_at(rows.train)
    return rbm


def neural(rows: Rows, seed: int) -> gb.Energy:
    """Two hidden layers over the independent columns."""
    torch.manual_seed(seed)
    return gb.MLP(rows.train.shape[1], (64, 64)) + gb.Bernoulli(logits=torch.logit(frequencies(rows)))


def persistent(rbm: gb.RBM, rows: Rows) -> Objective:
    """PCD-1 with a chain per row of the batch, all of which move at every step, and centred units."""
    base = rbm.base(rows.train)
    pcd = gb.PersistentContrastiveDivergence(gb.RBMGibbs(), base, steps=1, buffer_size=BATCH, restart=0.0)
    return gb.Centred(pcd)


def by_gradient(rows: Rows) -> Objective:
    """PCD whose chains change bits where the gradient promises most."""
    base = gb.Bernoulli(logits=torch.logit(frequencies(rows)))
    kernel = gb.GibbsWithGradients(flips=2)
    return gb.PersistentContrastiveDivergence(kernel, base, steps=2, buffer_size=BATCH, restart=0.0)


def train(energy: nn.Module, rows: Rows, objective: Objective, seed: int, **settings: Any) -> float:
    """Fit, and return the processor time."""
    with Stopwatch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gb.fit(energy, rows.train, objective, rng=generator(seed, 7), **(DAMPED | settings))
    return watch.cpu


@torch.no_grad()
def mean_energies(energy: gb.Energy, rows: Rows) -> dict[str, float]:
    """Mean energy of each part of the data."""
    parts = {"train": rows.train, "valid": rows.valid, "test": rows.test}
    return {name: float(energy(x).double().mean()) for name, x in parts.items()}


def told(energy: gb.Energy, rows: Rows, name: str, cpu: float, log_z: gb.LogZ) -> dict[str, Any]:
    """Log-likelihoods of the three parts, and of the test rows between the bounds of log Z."""
    z, lower, upper = float(log_z.value), float(log_z.lower), float(log_z.upper)
    found = {part: -mean - z for part, mean in mean_energies(energy, rows).items()}
    with torch.no_grad():
        spread = float(energy(rows.test).double().std()) / len(rows.test) ** 0.5
    parameters = sum(p.numel() for p in energy.parameters())
    bounds = {"test_lower": found["test"] + z - upper, "test_upper": found["test"] + z - lower}
    errors = {"rows_stderr": spread, "log_z_stderr": float(log_z.stderr), "ess": float(log_z.ess)}
    return {"model": name, "parameters": parameters, "cpu": cpu} | found | bounds | errors


def on_nltcs(rows: Rows, budget: float, seed: int) -> list[dict[str, Any]]:
    """Fit and judge the models of few columns; log Z over all states in float64."""

    def exactly(energy: gb.Energy, name: str, cpu: float) -> dict[str, Any]:
        double = copy.deepcopy(energy).double()
        as_double = Rows(*(x.double() for x in (rows.train, rows.valid, rows.test)))
        return told(double, as_double, name, cpu, gb.enumeration(double))

    few = {"steps": scaled(EXACT_STEPS, budget), "batch_size": 4096, "warmup_steps": 10, "ema_decay": 0.9}
    many = {"steps": scaled(PCD_STEPS["nltcs"], budget), "batch_size": BATCH, "learning_rate": PCD_RATE["nltcs"]}
    found = [exactly(independent(rows), "independent columns", 0.0)]
    visible = FullyVisible(rows.train.shape[1])
    cpu = train(visible, rows, gb.ExactLikelihood(), seed, learning_rate=0.05, **few)
    found.append(exactly(visible, "fully visible, exact likelihood", cpu))
    machines = []
    for hidden in NLTCS_HIDDEN:
        rbm = machine(rows, hidden, seed)
        cpu = train(rbm, rows, persistent(rbm, rows), seed, **many)
        machines.append((rbm, exactly(rbm, f"RBM, {hidden} hidden, PCD", cpu)))
    found += marked([row for _, row in machines])
    best, row = max(machines, key=lambda each: each[1]["valid"])
    cpu = train(best, rows, gb.ExactLikelihood(), seed, learning_rate=0.02, **few)
    found.append(exactly(best, f"{row['model']}, then exact likelihood", row["cpu"] + cpu))
    energy = neural(rows, seed)
    cpu = train(energy, rows, by_gradient(rows), seed, **(many | {"learning_rate": 2e-3, "betas": (0.5, 0.99)}))
    found.append(exactly(energy, "neural, PCD by Gibbs with gradients", cpu))
    energy = neural(rows, seed)
    more = few | {"steps": scaled(2 * EXACT_STEPS, budget), "learning_rate": 0.01}
    cpu = train(energy, rows, gb.ExactLikelihood(), seed, **more)
    found.append(exactly(energy, "neural, exact likelihood", cpu))
    return found


def on_plants(rows: Rows, budget: float, seed: int) -> list[dict[str, Any]]:
    """Fit machines, choose by annealing, and bracket the chosen one."""
    many = {"steps": scaled(PCD_STEPS["plants"], budget), "batch_size": BATCH, "learning_rate": PCD_RATE["plants"]}
    base = independent(rows)
    found, machines = [told(base, rows, "independent columns", 0.0, known(0.0))], []
    for hidden in PLANTS_HIDDEN:
        rbm = machine(rows, hidden, seed)
        cpu = train(rbm, rows, persistent(rbm, rows), seed, **many)
        few = annealing(rbm, rows, scaled(ANNEALING["valid"], budget))
        log_z = quietly(lambda: gb.ais(rbm, rng=generator(seed, 1), chains=CHAINS, **few))  # noqa: B023
        machines.append((rbm, told(rbm, rows, f"RBM, {hidden} hidden, PCD", cpu, log_z)))
    found += marked([row for _, row in machines])
    best, row = max(machines, key=lambda each: each[1]["valid"])
    return [*found, bracketed(best, rows, row, budget, seed)]


def bracketed(rbm: gb.RBM, rows: Rows, row: dict[str, Any], budget: float, seed: int) -> dict[str, Any]:
    """Judge a machine by forward annealing, and backward annealing from long chains, half of them from data."""
    rng, sweeps = generator(seed, 2), scaled(DRAWN, budget)
    some = annealing(rbm, rows, scaled(ANNEALING["test"], budget))
    start = rows.train[torch.randperm(len(rows.train), generator=rng)[: CHAINS // 2]]
    start = torch.cat((start, some["base"].sample(CHAINS - len(start), rng)))
    with Stopwatch() as watch:
        run = gb.sample(
            rbm, gb.RBMGibbs(), start, steps=sweeps, warmup=sweeps // 2, thin=max(1, sweeps // 200), rng=rng
        )
        assert run.draws is not None
        with torch.no_grad():
            energies = torch.stack([rbm(x) for x in run.draws])
        log_z = quietly(lambda: gb.bracket(rbm, draws=run.x, rng=rng, **some))
    judged = told(rbm, rows, f"{row['model']}, bracketed", row["cpu"] + watch.cpu, log_z)
    return judged | {"r_hat": float(split_r_hat(energies)), "temperatures": len(some["schedule"].betas) - 1}


def annealing(rbm: gb.RBM, rows: Rows, temperatures: int) -> dict[str, Any]:
    """Along machines from independent columns, at evenly spaced couplings."""
    base = rbm.base(rows.train)
    schedule = Schedule.linear(temperatures)
    return {"base": base, "path": gb.rbm_path(base, rbm), "kernel": gb.RBMGibbs(), "schedule": schedule}


def quietly(estimate: Callable[[], gb.LogZ]) -> gb.LogZ:
    """Leave out warnings of small ess, which the table shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return estimate()


def known(log_z: float) -> gb.LogZ:
    """A log Z without error."""
    value = torch.tensor(log_z, dtype=torch.float64)
    return gb.LogZ(value, torch.zeros_like(value), value, value, torch.full_like(value, torch.inf))


def scaled(steps: int, budget: float) -> int:
    """That share of the steps, two or more."""
    return max(2, round(steps * budget))


def marked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark the one that the validation rows choose."""
    best = max(rows, key=lambda row: row["valid"])
    return [row | {"chosen": row is best} for row in rows]


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    wide = row["test_upper"] - row["test_lower"]
    bounds = "exact" if wide < 1e-6 else f"[{row['test_lower']:.3f}, {row['test_upper']:.3f}]"
    return [
        f"{row['model']}{' (chosen)' if row.get('chosen') else ''}",
        str(row["parameters"]),
        *(f"{row[part]:.3f}" for part in ("train", "valid")),
        f"{row['test']:.3f} ± {row['rows_stderr']:.3f}",
        bounds,
        f"{row['cpu']:.0f}",
    ]


JUDGES: dict[str, Callable[[Rows, float, int], list[dict[str, Any]]]] = {"nltcs": on_nltcs, "plants": on_plants}


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Run both data sets, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(JUDGES), choices=list(JUDGES))
    parser.add_argument("--budget", type=float, default=1.0, help="share of all steps and temperatures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep what is not in --sets from the last record")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = kept(options) if options.keep else {}
    for name in options.sets:
        rows = load(name)
        if rows is None:
            print(f"{name} is left out: GIBBSIAN_DATA names no folder with {name}.npz.")
            continue
        found[name] = JUDGES[name](rows, options.budget, options.seed)
        report(found, options)
    return found


def kept(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Read the record of an earlier run."""
    record = json.loads((common.RESULTS / "binary_density.json").read_text())
    if record["budget"] != options.budget or record["seeds"] != [options.seed]:
        raise SystemExit("--keep needs the record's own --budget and --seed.")
    return {name: record["sets"][name] for name in JUDGES if name in record["sets"]}


def report(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Write what there is so far."""
    record = circumstances([options.seed], 1) | {"budget": options.budget, "sets": found}
    note = (
        "Mean log-likelihood in nats per row, with the standard error by the test rows. The bounds are those of log Z "
        f"at 99%, {CHAINS} chains each way: the model's log-likelihood is at most the upper one, whatever the chains "
        "do, and at least the lower one as far as long chains are draws of the model."
    )
    sections = [note]
    header = ["model", "parameters", "train", "valid", "test", "test, bounds of log Z", "s CPU"]
    for name, rows in found.items():
        sections += [f"## {name}", table(header, map(line, rows))]
        for row in rows:
            if "r_hat" in row:
                sections.append(
                    f"Bracket: {row['temperatures']} temperatures, ess {row['ess']:.0f} of {CHAINS}; R-hat of the "
                    f"energy over the chains that are annealed back: {row['r_hat']:.3f}."
                )
    write("binary_density", "Log-likelihood of binary data", record, sections)


if __name__ == "__main__":
    for key, rows_of in main().items():
        for told_row in rows_of:
            print(key, *line(told_row), sep=" | ")
