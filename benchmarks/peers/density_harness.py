"""What the workers of the comparison of densities share: data in, energies on a grid out.

A worker is called with a file of data, ``rows`` and ``grid``, ``(n, 2)`` each, and a folder; for each of its methods it
trains, writes the energies of the grid's points, and prints one JSON line with the time of training.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROWS, STEPS_README = 256, 3000
Method = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Trains on rows ``(n, 2)``; returns the energy, batched."""


def network() -> nn.Sequential:
    """The network of every peer: 2-128-128-1 with SiLU, as in ebmkit's README."""
    return nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))


def batches(rows: Tensor, steps: int) -> list[Tensor]:
    """Random batches, as both READMEs draw them."""
    return [rows[torch.randint(len(rows), (ROWS,))] for _ in range(steps)]


def descend(parameters: list[nn.Parameter], loss: Callable[[Tensor], Tensor], rows: Tensor, steps: int) -> None:
    """Follow Adam with a rate of 1e-3, the rate of both READMEs."""
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    for x in batches(rows, steps):
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()


def main(library: str, version: str, methods: dict[str, Method]) -> None:
    """Train every method on the file's rows."""
    source, folder, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    data = np.load(source)
    rows, grid = (torch.as_tensor(data[name], dtype=torch.float32) for name in ("rows", "grid"))
    for name, train in methods.items():
        torch.manual_seed(seed)
        told: dict[str, object] = {"library": library, "version": version, "method": name, "torch": torch.__version__}
        began, cpu = time.perf_counter(), time.process_time()
        try:
            energy = train(rows)
            told |= {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
            with torch.no_grad():
                values = torch.cat([energy(part) for part in grid.split(20_000)])
            file = folder / f"{library}-{name}.npy"
            np.save(file, values.double().numpy())
            told["file"] = str(file)
        except Exception as error:  # what one method cannot do must not end the comparison
            told["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(told), flush=True)
