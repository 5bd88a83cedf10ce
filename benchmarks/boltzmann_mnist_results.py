"""How the results of `boltzmann_mnist.py` are shown: tables, and pictures of filters and draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gibbsian as gb
from common import table
from mnist_results import save_panels, tiles

PUBLISHED = {(True, False): -142.56, (False, False): -149.05, (True, True): -142.09, (False, True): -183.36}
"""Exact test likelihoods in PyDeep's documentation, by centred and flipped."""


def small_section(part: Mapping[str, Any]) -> str:
    """Exact likelihoods of the machines of 16 units."""
    rows = []
    for run in part["runs"]:
        published = PUBLISHED[run["centred"], run["flipped"]]
        names = "centred" if run["centred"] else "not centred", "flipped" if run["flipped"] else "as they are"
        figures = (run["test"], run["train"], published, run["log_z"])
        rows.append([", ".join(names), *(f"{x:.2f}" for x in figures), f"{run['cpu']:.0f}"])
    header = ["784-16, bits", "test, nats", "train", "published test", "log Z", "s"]
    told = f"PCD-1, {part['epochs']} epochs, batch 100, plain gradients at 0.01; pixels cut at a half; exact."
    return "\n\n".join(("## 784-16", told, table(header, rows), "![filters](../../docs/images/rbm-784-16.png)"))


def bounded_row(name: str, part: Mapping[str, Any]) -> list[Any]:
    """A row of likelihoods between bounds."""
    low, high = part["test_bounds"]
    z = part["log_z"]
    return [
        name,
        f"{part['test']:.2f} ± {part['test_error']:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{part['train']:.2f}",
        f"{z['value']:.2f} ± {z['stderr']:.2f}",
        f"{z['upper'] - z['lower']:.2f}",
        f"{z['ess']:.0f} of {part['chains']}",
        part["temperatures"],
        f"{part['cpu'] / 60:.1f}",
        f"{(part['bracket_cpu'] + part.get('rest_cpu', 0.0)) / 60:.1f}",
    ]


HEADER = [
    "model",
    "test, nats",
    "99% bounds",
    "train",
    "log Z",
    "width",
    "ESS",
    "temperatures",
    "minutes to train",
    "to judge",
]


def large_section(part: Mapping[str, Any]) -> str:
    """Likelihood of the machine of 500 units."""
    told = (
        f"PCD-1, {part['epochs']} epochs, on bits drawn with the grey levels as probabilities, {part['copies']} "
        "drawings of each training row; one drawing of the test rows. Published, CD-25: -86.34."
    )
    rows = [bounded_row("784-500", part)]
    return "\n\n".join(("## 784-500", told, table(HEADER, rows), "![filters](../../docs/images/rbm-784-500.png)"))


def neural_section(part: Mapping[str, Any]) -> str:
    """Likelihood of the neural energy beside the machines' on the same bits."""
    names = {"neural": "multilayer energy, 784-512-512-1", "rbm": "784-500 on the same bits"}
    rows = [bounded_row(told, part[name]) for name, told in names.items() if name in part]
    return "\n\n".join(("## A neural energy, pixels cut at a half", table(HEADER, rows)))


SMALL, LARGE, NEURAL = small_section, large_section, neural_section

NOTES = """Likelihoods are means over the 10,000 test rows, in nats per image; ± is the standard error of that mean.
Bounds are those of log Z at 99% confidence, from annealing both ways between independent bits and the model
(`gb.bracket`); the lower bound of the likelihood takes the draws to be the model's own. Times are minutes of one
processor, on a machine with other work."""


def filters(machine: gb.RBM, count: int) -> Tensor:
    """Couplings of hidden units, spread over all of them, as images: black for inhibition, white for excitation."""
    picked = torch.linspace(0, machine.weight.shape[1] - 1, count).round().long()
    columns = machine.weight.detach()[:, picked].T
    return (127.5 + 127.5 * columns / columns.abs().amax(1, keepdim=True)).view(-1, 1, 28, 28)


def draw_machine(path: Path, machine: gb.RBM, test: Tensor, draws: Tensor, count: int, columns: int) -> None:
    """Draw filters, draws and test rows side by side."""
    count = min(count, machine.weight.shape[1])
    shown = {"filters": filters(machine, count)}
    # Chains in the picture are bits, as the model has them.
    shown |= {name: 255.0 * x[:count].view(-1, 1, 28, 28) for name, x in (("draws", draws), ("test rows", test))}
    save_panels(path, {name: tiles(x, min(columns, len(x))) for name, x in shown.items()}, 3)


def draw_neural(path: Path, test: Tensor, draws: Tensor) -> None:
    """Draw chains and test rows side by side."""
    shown = {"draws": draws, "test rows": test}
    panels = {name: tiles(255.0 * x[:64].view(-1, 1, 28, 28), min(8, len(draws))) for name, x in shown.items()}
    save_panels(path, panels, 2)
