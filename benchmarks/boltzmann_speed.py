"""Boltzmann machines on one thread: beside their own matrix products, scikit-learn's RBM and THRML's Ising lattice.

Three comparisons, each in alternating rounds and in processor seconds, as machines have other work:

* **pcd**: batches of PCD-1 on a machine of 784 and 500 units with plain SGD, batch 100, beside the six products that
  such a batch consists of, and beside `BernoulliRBM`;
* **ising**: full sweeps of a 512 x 512 lattice at its critical coupling, one chain and several, beside THRML in an
  environment of its own (made once, in ``--env-dir``);
* **ais**: temperatures of annealed importance sampling with 100 chains on that machine, beside the two products each.

Products are measured twice: as torch multiplies (``@``), and by the quicker of torch and oneDNN, which is the library's
own choice on some processors. The second is the stricter measure.

    python benchmarks/boltzmann_speed.py                        # all
    python benchmarks/boltzmann_speed.py ising --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gibbsian as gb
from chains import default_folder, interpreter
from common import circumstances, generator, table, write
from gibbsian import matmul
from gibbsian.kernels.checkerboard import CheckerboardGibbs
from gibbsian.partition.annealed import log_weights
from gibbsian.partition.schedule import Schedule

VISIBLE, HIDDEN, BATCH, BATCHES, TEMPERATURES = 784, 500, 100, 600, 14_500
SIDE, SWEEPS = 512, 500
THRML = ("thrml==0.1.4",)
LIMITS = {
    "pcd / products": 1.15,
    "BernoulliRBM / pcd": 1.3,
    "ising / THRML, 1 chain": 20.0,
    "ising / THRML, 8 chains": 20.0,
    "ais / products": 1.3,
}

Lane = Callable[[], float]
"""Runs once and returns processor seconds per unit (a batch, a sweep, a temperature)."""


def timed(run: Callable[[], object], units: int) -> Lane:
    """Make a lane of a function that does so many units; it is run once to warm up."""
    run()

    def lane() -> float:
        began = time.process_time()
        run()
        return (time.process_time() - began) / units

    return lane


def rows(n: int) -> Tensor:
    """Bits like digits: each column with a mean of its own."""
    rng = generator(1)
    return (torch.rand(n, VISIBLE, generator=rng) < torch.rand(VISIBLE, generator=rng) ** 3).float()


def quicker(*ways: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The fastest of some ways to compute the same, after ten trials each."""

    def cost(way: Callable[[], Tensor]) -> float:
        way()
        times = []
        for _ in range(10):
            began = time.process_time()
            for _ in range(10):
                way()
            times.append(time.process_time() - began)
        return min(times)

    return min(ways, key=cost)


def products(kind: str) -> tuple[Lane, Lane]:
    """Products of a batch of PCD-1, or of a temperature: as torch multiplies, and by the quicker library."""
    rng = generator(2)
    v, h = (torch.rand(BATCH, n, generator=rng).round() for n in (VISIBLE, HIDDEN))
    w, linear = 0.01 * torch.randn(VISIBLE, HIDDEN, generator=rng), matmul.linear()[0]
    up = (lambda: v @ w, lambda: linear(v, w.T, None))
    down = (lambda: h @ w.T, lambda: linear(h, w, None))
    outer = (lambda: v.T @ h, lambda: linear(v.T, h.T, None))
    # A batch: hidden fields of the data, of the chains before and after the step; visible fields; two gradients.
    ways = [up, down] if kind == "ais" else [up, up, down, up, outer, outer]

    def lane(chosen: list[Callable[[], Tensor]]) -> Lane:
        return timed(lambda: [way() for _ in range(20) for way in chosen], 20)

    best = {id(each): quicker(*each) for each in (up, down, outer)}
    return lane([each[0] for each in ways]), lane([best[id(each)] for each in ways])


def pcd_lanes(batches: int) -> dict[str, Lane]:
    """Batches of persistent contrastive divergence."""
    from sklearn.neural_network import BernoulliRBM

    data, rng = rows(batches * BATCH), generator(3)
    rbm = gb.RBM(VISIBLE, HIDDEN, rng=rng)
    objective = gb.PersistentContrastiveDivergence(
        gb.RBMGibbs(), rbm.base(data), steps=1, buffer_size=BATCH, restart=0.0, compile=True
    )
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.01)

    def epoch() -> None:
        for batch in data.split(BATCH):
            optimizer.zero_grad()
            objective(rbm, gb.Batch(batch), rng).value.backward()
            optimizer.step()

    peer = BernoulliRBM(HIDDEN, learning_rate=0.01, batch_size=BATCH, n_iter=1, random_state=0)
    matrix = data.numpy()
    torchs, best = products("pcd")
    lanes = {"pcd": timed(epoch, batches), "BernoulliRBM": timed(lambda: peer.fit(matrix), batches)}
    return lanes | {"products (torch)": torchs, "products": best}


def ais_lanes(temperatures: int) -> dict[str, Lane]:
    """Temperatures of annealed importance sampling, the machine being one that has seen some data."""
    rng = generator(4)
    rbm = gb.RBM(VISIBLE, HIDDEN, weight_scale=0.05, rng=rng).requires_grad_(False)
    base = rbm.base(rows(1000))
    path, schedule = gb.rbm_path(base, rbm), Schedule.linear(temperatures + 1)

    def run() -> Tensor:
        return log_weights(path, schedule, gb.RBMGibbs(), base.sample(100, rng), rng=rng, compile=True)

    torchs, best = products("ais")
    return {"ais": timed(run, temperatures), "products (torch)": torchs, "products": best}


class Peer:
    """THRML's worker, kept warm."""

    def __init__(self, python: Path) -> None:
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [str(python), "-W", "ignore", str(Path(__file__).parent / "peers" / "thrml_worker.py")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env={**os.environ, **single}, **pipes)
        self.versions: dict[str, str] = {}

    def lane(self, chains: int, sweeps: int) -> Lane:
        """Seconds per sweep of one chain."""

        def lane() -> float:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(chains, sweeps, file=self.process.stdin, flush=True)
            found = json.loads(self.process.stdout.readline())
            self.versions = {"thrml": found["version"], "jax": found["jax"]}
            return found["cpu"] / (sweeps * chains)

        return lane

    def close(self) -> None:
        """End the worker by closing its input."""
        self.process.communicate(timeout=60)


def environment(folder: Path) -> Path:
    """Make the peer's environment unless it is there; return its python."""
    own = folder / "benchmark-thrml"
    python = interpreter(own)
    if not python.exists():
        venv.create(own, with_pip=True)
    check = f"from importlib.metadata import version as v; raise SystemExit(v('thrml') != {THRML[0].split('==')[1]!r})"
    if subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL).returncode:
        print(f"installing {', '.join(THRML)} into {own}", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *THRML], check=True)
    return python


def ising_lanes(peer: Peer) -> dict[str, Lane]:
    """Sweeps of the lattice, and THRML's."""
    lanes, model = {}, gb.Ising.lattice((SIDE, SIDE))
    for chains in (1, 8):
        told = f"{chains} chain{'s' * (chains > 1)}"
        start = (torch.rand(chains, SIDE, SIDE, generator=generator(5)) < 0.5).float()
        rng = generator(6)

        def run(start: Tensor = start, rng: torch.Generator = rng) -> object:
            return gb.sample(model, CheckerboardGibbs(SWEEPS), start, steps=2, rng=rng, compile=True)

        lanes[f"CheckerboardGibbs, {told}"] = timed(run, 2 * SWEEPS * chains)
        lanes[f"THRML, {told}"] = peer.lane(chains, 60 if chains == 1 else 8)
        lanes[f"THRML, {told}"]()
    return lanes


def measure(lanes: dict[str, Lane], rounds: int) -> dict[str, list[float]]:
    """Run the lanes in turn, in alternating directions."""
    found: dict[str, list[float]] = {name: [] for name in lanes}
    for turn in range(rounds):
        for name in list(lanes) if turn % 2 == 0 else reversed(lanes):
            found[name].append(lanes[name]())
    return found


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median over median, with the range over rounds."""
    paired = [a / b for a, b in zip(over, under)]
    return {"ratio": statistics.median(over) / statistics.median(under), "low": min(paired), "high": max(paired)}


def ratios(part: str, found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """What a part is judged by."""
    if part == "pcd":
        pairs = {"pcd / products": ("pcd", "products"), "pcd / products (torch)": ("pcd", "products (torch)")}
        pairs["BernoulliRBM / pcd"] = ("BernoulliRBM", "pcd")
    elif part == "ais":
        pairs = {"ais / products": ("ais", "products"), "ais / products (torch)": ("ais", "products (torch)")}
    else:
        pairs = {
            f"ising / THRML, {told}": (f"THRML, {told}", f"CheckerboardGibbs, {told}")
            for told in ("1 chain", "8 chains")
        }
    return {name: ratio(found[a], found[b]) for name, (a, b) in pairs.items()}


def sections(results: dict[str, Any]) -> list[str]:
    """The tables."""
    times, judged = [], []
    scale = {"pcd": (BATCHES, "s per epoch of 600 batches"), "ais": (TEMPERATURES, "s per run of 14,500 temperatures")}
    for part, result in results.items():
        for name, values in result["seconds"].items():
            middle, low, high = statistics.median(values), min(values), max(values)
            if part == "ising":
                times.append([part, name, f"{1 / middle:,.0f} ({1 / high:,.0f}-{1 / low:,.0f})", "sweeps per second"])
            else:
                units, told = scale[part]
                times.append([part, name, f"{units * middle:.2f} ({units * low:.2f}-{units * high:.2f})", told])
        for name, r in result["ratios"].items():
            limit = LIMITS.get(name)
            judged.append([name, f"{r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f})", limit or "-"])
    note = (
        "Processor seconds; medians over rounds in which the lanes take turns, with the range. Epochs and runs are "
        "extrapolated from fewer batches and temperatures. `products` are by the quicker of torch and oneDNN, "
        "`products (torch)` by `@`. For pcd and ais a ratio is to be at most the aim, for the others at least."
    )
    return [note, table(("part", "lane", "median (range)", "unit"), times), table(("ratio", "found", "aim"), judged)]


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("pcd", "ising", "ais", []), help="all if absent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1.0, help="share of 100 batches and 400 temperatures a round")
    parser.add_argument("--env-dir", type=Path, default=default_folder(), help="where THRML's environment is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches, temperatures = max(2, round(100 * options.budget)), max(10, round(400 * options.budget))
    record: dict[str, Any] = circumstances(range(1), 1)
    record |= {"rounds": options.rounds, "batches": batches, "temperatures": temperatures, "results": {}}
    for part in options.parts or ("ising", "pcd", "ais"):
        peer = Peer(environment(options.env_dir)) if part == "ising" else None
        try:
            lanes = (
                pcd_lanes(batches) if part == "pcd" else ais_lanes(temperatures) if peer is None else ising_lanes(peer)
            )
            found = measure(lanes, options.rounds)
            record["versions"] |= {} if peer is None else peer.versions
        finally:
            if peer is not None:
                peer.close()
        record["results"][part] = {"seconds": found, "ratios": ratios(part, found)}
        # Written after each part, so that an interrupted run leaves what it has.
        write("boltzmann_speed", "Speed of Boltzmann machines", record, sections(record["results"]))
        print("\n\n".join(sections({part: record["results"][part]})[1:]), flush=True)


if __name__ == "__main__":
    main()
