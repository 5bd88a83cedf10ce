"""Plans against measurement: what `gibbsian plan` says of steps of training and of chains, and what they then take.

Each configuration is predicted in a fresh process, which calibrates at other sizes than the one asked for (they are
recorded), and measured right afterwards in fresh processes, of which there are as many as it has ranks: the best of
some runs of `fit`, or of `sample`, by their own clocks. Then the plan is carried on to 8, 64 and 1,024 GPUs that nobody
measured, with what is assumed of them.

    python benchmarks/plan_check.py
    python benchmarks/plan_check.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

# Torch stays out of the parent: on Linux a child starts from the peak of the process that forked it.

HERE = Path(__file__).resolve()
ROWS = 5000
"""Rows of made-up data."""

TOLERANCE, ASKED, OF = 0.2, 9, 12
"""How close predictions are to be, and how many of how many."""

RECORDS = 50
"""Steps from record to record of the runs that are measured, which is `fit`'s default."""

RECIPES: dict[str, dict[str, Any]] = {
    "two moons, mlp, NCE": {"kind": "table", "shape": [2], "fields": {}},
    "10 columns, mlp, PCD-20": {"kind": "table", "shape": [10], "fields": {"energy": "mlp"}},
    "digits, noise levels": {"kind": "image", "shape": [1, 8, 8], "fields": {}},
    "digits, convolutional, CD-5": {
        "kind": "image",
        "shape": [1, 8, 8],
        "fields": {"energy": "convolutional", "objective": "cd", "chain_steps": 5, "width": 16, "depth": 2},
    },
    "64 bits, RBM, PCD-1": {"kind": "binary", "shape": [64], "fields": {}},
    "32 columns, mlp of 256, MALA": {"kind": "table", "shape": [32], "fields": {"energy": "mlp", "width": 256}},
}

CONFIGURATIONS: list[dict[str, Any]] = [
    {"recipe": "two moons, mlp, NCE", "what": "training", "size": 512, "ranks": 1},
    {"recipe": "two moons, mlp, NCE", "what": "training", "size": 2048, "ranks": 2},
    {"recipe": "10 columns, mlp, PCD-20", "what": "training", "size": 256, "ranks": 1},
    {"recipe": "10 columns, mlp, PCD-20", "what": "training", "size": 1024, "ranks": 2},
    {"recipe": "digits, noise levels", "what": "training", "size": 256, "ranks": 1},
    {"recipe": "digits, noise levels", "what": "training", "size": 256, "ranks": 2},
    {"recipe": "digits, convolutional, CD-5", "what": "training", "size": 64, "ranks": 1},
    {"recipe": "digits, convolutional, CD-5", "what": "training", "size": 128, "ranks": 2},
    {"recipe": "64 bits, RBM, PCD-1", "what": "training", "size": 128, "ranks": 1},
    {"recipe": "64 bits, RBM, PCD-1", "what": "training", "size": 1024, "ranks": 2},
    {"recipe": "32 columns, mlp of 256, MALA", "what": "sampling", "size": 1000, "ranks": 1},
    {"recipe": "32 columns, mlp of 256, MALA", "what": "sampling", "size": 4000, "ranks": 2},
    {"recipe": "digits, convolutional, CD-5", "what": "sampling", "size": 256, "ranks": 1},
    {"recipe": "digits, convolutional, CD-5", "what": "sampling", "size": 512, "ranks": 2},
    {"recipe": "64 bits, RBM, PCD-1", "what": "sampling", "size": 5000, "ranks": 1},
    {"recipe": "64 bits, RBM, PCD-1", "what": "sampling", "size": 20000, "ranks": 2},
]

SYSTEMS: dict[str, dict[str, Any]] = {
    "digits, noise levels (0.9 M weights)": {
        "kind": "image",
        "shape": [1, 8, 8],
        "fields": {"batch_size": 8192},
        "chains": 65_536,
    },
    "mlp of 4 x 4,096 on 1,024 columns, PCD-20 (55 M weights)": {
        "kind": "table",
        "shape": [1024],
        "fields": {"energy": "mlp", "width": 4096, "depth": 4, "batch_size": 8192, "buffer_size": 65_536},
        "chains": 1_048_576,
    },
    "u-net of width 128 on 3 x 32 x 32": {
        "kind": "image",
        "shape": [3, 32, 32],
        "fields": {"energy": "unet", "width": 128, "depth": 2, "batch_size": 8192},
        "chains": 65_536,
    },
}
"""What is carried on to GPUs; batch and chains are those of eight of them."""

SUSTAINED, LAUNCH = 30.0, 5.0
"""TFLOP/s in float32 and microseconds a call that a GPU is assumed to have; an H100's peak is 67 (data sheet)."""

GPUS = (1, 8, 64, 1024)


def recipe_of(told: dict[str, Any], batch: int | None = None) -> Any:
    """Choose a recipe."""
    from gibbsian.recipes import choose

    fields = told["fields"] | ({} if batch is None else {"batch_size": batch})
    if told["kind"] == "binary" and batch is not None:
        fields |= {"buffer_size": batch}
    return choose(told["kind"], tuple(told["shape"]), ROWS, fields)


def predict(job: dict[str, Any]) -> dict[str, Any]:
    """Plan in this process."""
    import torch

    from gibbsian.planning import Question, plan
    from gibbsian.planning.counts import resident

    torch.set_num_threads(1)
    program = resident()
    training = job["what"] == "training"
    recipe = recipe_of(RECIPES[job["recipe"]], job["size"] if training else None)
    question = Question(
        recipe,
        job["ranks"],
        None if training else job["size"],
        rows=ROWS if training else None,
        training=training,
    )
    found = plan(question, job["budget"], program=program)
    step = found.training if training else found.sampling
    memory = found.training_memory if training else found.sampling_memory
    assert step is not None
    curve = found.costs.training["loss"] if training else found.costs.sampling
    assert curve is not None
    return {
        "seconds": step.seconds.value,
        "spread": step.seconds.spread,
        "parts": {name: part.value for name, part in (*step.compute.items(), *step.talk.items())},
        "slowed": (found.setting.crew.training if training else found.setting.crew.sampling).value,
        "bytes": sum(memory.values()),
        "calibrated_at": list(curve.sizes),
        "share": job["size"] / job["ranks"],
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Do in this process, one of as many as there are ranks, what was planned; seconds a step, of the best run."""
    import torch
    import torch.distributed as dist

    from gibbsian.processes import gathered_objects, join_processes

    torch.set_num_threads(1)
    with join_processes() as here:
        runs: list[float] = []
        for _ in range(job["repeats"]):
            if here.size > 1:
                dist.barrier()
            seconds = trained(job, here.size) if job["what"] == "training" else walked(job, here.size)
            runs.append(max(gathered_objects(seconds)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Kilobytes on Linux, bytes on macOS.
        peak = max(gathered_objects(peak)) * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": min(runs), "runs": runs, "peak": peak}


def trained(job: dict[str, Any], ranks: int) -> float:
    """Train; seconds a step by the run's own records, the first of which is left out."""
    import dataclasses
    import warnings

    import torch

    from gibbsian.building import build_objective, initial_weights
    from gibbsian.objectives.base import Batch
    from gibbsian.planning.clocks import rows_for, sized
    from gibbsian.training.fit import fit
    from gibbsian.training.settings import TrainingSettings

    lanes = ranks > 1 and "lanes" in {f.name for f in dataclasses.fields(TrainingSettings)}
    share = job["size"] if lanes else job["size"] // ranks
    recipe = sized(recipe_of(RECIPES[job["recipe"]], job["size"]), share)
    blocks = 1 + max(1, round(job["seconds"] / job["predicted"] / RECORDS))
    x = rows_for(recipe, ROWS)
    energy = initial_weights(recipe, x)
    objective = build_objective(recipe, x, energy)
    settings = dataclasses.replace(recipe.training, steps=RECORDS * blocks, log_every=RECORDS)
    records: list[dict[str, Any]] = []
    if ranks > 1 and not lanes:
        summed_by_hand(energy, objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more: dict[str, Any] = {"lanes": ranks} if lanes else {}
        rng = torch.Generator().manual_seed(0)
        fit(energy, Batch(x), objective, rng=rng, settings=settings, callbacks=(records.append,), **more)
    timed = [r for r in records if "seconds" in r]
    if len(timed) < 2:
        return 0.0  # records are the first process's
    return (timed[-1]["seconds"] - timed[0]["seconds"]) / (timed[-1]["step"] - timed[0]["step"])


_HANDLES: list[Any] = []


def summed_by_hand(energy: Any, objective: Any) -> None:
    """Average gradients over processes before the optimiser's step, where `fit` does not do so itself."""
    import torch
    import torch.distributed as dist
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    params = list({id(p): p for m in (energy, objective) for p in m.parameters() if p.requires_grad}.values())

    def average(*_: Any) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch._utils._flatten_dense_tensors(grads)
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, mean in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads)):
            grad.copy_(mean)

    for handle in _HANDLES:
        handle.remove()
    _HANDLES[:] = [register_optimizer_step_pre_hook(average)]


def walked(job: dict[str, Any], ranks: int) -> float:
    """Run this process's share of the chains; seconds a step."""
    import torch

    from gibbsian.planning.clocks import chains_of, kernel_of
    from gibbsian.sampling import sample

    recipe = recipe_of(RECIPES[job["recipe"]])
    energy, start = chains_of(recipe)
    rng = torch.Generator().manual_seed(0)
    x = start(job["size"] // ranks, rng)
    kernel = kernel_of(recipe)
    state = sample(energy, kernel, x, steps=5, rng=rng).state
    steps = max(10, round(job["seconds"] / job["predicted"]))
    run = sample(energy, kernel, state, steps=steps, rng=rng)
    return run.seconds / steps


def carry(job: dict[str, Any]) -> dict[str, Any]:
    """Carry a plan on to GPUs that nobody measured."""
    from gibbsian.planning import INFINIBAND, NVLINK, Device, Question, plan
    from gibbsian.planning.model import scaling

    told = SYSTEMS[job["system"]]
    recipe = recipe_of(told)
    device = Device(SUSTAINED * 1e12, LAUNCH * 1e-6)
    question = Question(recipe, 8, told["chains"], None, None, True, False, NVLINK, INFINIBAND, 8, device, True)
    found = plan(question, 1.0)
    rows = [
        {
            "what": what,
            "strong": strong,
            "gpus": row.ranks,
            "size": row.size,
            "seconds": row.step.seconds.value,
            "talk": row.step.talking.value,
            "efficiency": row.efficiency,
            "bound": row.step.bound,
        }
        for what, size in (("training", question.batch), ("sampling", told["chains"]))
        for strong in (True, False)
        for row in scaling(found.costs, found.setting, size, 8, what, strong, GPUS)
    ]
    assert found.costs.sizes is not None
    return {
        "rows": rows,
        "gradient_bytes": found.costs.sizes.trained,
        "flops_per_row": found.costs.work.flops_per_row if found.costs.work else None,
        "operations": found.costs.work.operations if found.costs.work else None,
        "memory": dict(found.training_memory),
        "assumptions": list(found.assumptions),
    }


CHILDREN = {"predict": predict, "measure": measure, "carry": carry}


def children(what: str, job: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """Run `predict`, `measure` or `carry` in fresh processes; what the first of them found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    if ranks > 1:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE), "--child", what, json.dumps(job)]
    started = [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [each.communicate(timeout=1800)[0] for each in started]
    if any(each.returncode for each in started):
        raise RuntimeError(f"{what} of {job} failed")
    return json.loads(told[0].strip().splitlines()[-1])


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the predictions within the tolerance; the part asked for is that of nine in twelve."""
    within = sum(abs(row["ratio"] - 1.0) <= TOLERANCE for row in rows)
    return {"within": within, "of": len(rows), "met": within * OF >= ASKED * len(rows)}


def report(rows: list[dict[str, Any]], carried: dict[str, dict[str, Any]], record: dict[str, Any]) -> str:
    """Write the results; the table of predictions."""
    import common

    told = verdict(rows)
    lines = [
        [
            row["recipe"],
            row["what"],
            f"{row['size']:,}",
            row["ranks"],
            f"{1e3 * row['predicted']['seconds']:.2f} ± {1e3 * row['predicted']['spread']:.2f}",
            f"{1e3 * row['measured']['seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['predicted']['bytes'] / 1e6:.0f}",
            f"{row['measured']['peak'] / 1e6:.0f}",
            ", ".join(map(str, row["predicted"]["calibrated_at"])),
        ]
        for row in rows
    ]
    head = ["recipe", "of", "size", "ranks", "predicted ms", "measured ms", "ratio", "MB predicted", "MB measured"]
    text = common.table([*head, "calibrated at, a rank"], lines)
    words = (
        f"Within {TOLERANCE:.0%}: {told['within']} of {told['of']}; asked: {ASKED} of {OF}: "
        f"{'met' if told['met'] else 'not met'}. A step's seconds, predicted over measured; the memory of a process is "
        "its largest resident size, Python's and torch's included."
    )
    sections = [words, text]
    for system, found in carried.items():
        sections += [f"## {system}, on GPUs that nobody measured", carried_words(found), carried_table(found["rows"])]
    common.write("plan_check", "Plans against measurement", record | {"verdict": told}, sections)
    return text + "\n\n" + words


def carried_words(found: dict[str, Any]) -> str:
    """Say what a system takes whatever it runs on."""
    return (
        f"{found['gradient_bytes'] / 1e6:.1f} MB of gradients, {found['flops_per_row'] / 1e9:.3g} GFLOP a row, "
        f"{found['operations']:.0f} calls a step; {sum(found['memory'].values()) / 1e9:.2f} GB a GPU in training, of "
        f"8. Assumed: {' '.join(found['assumptions'])}"
    )


def carried_table(rows: list[dict[str, Any]]) -> str:
    """Steps by the number of GPUs."""
    import common

    return common.table(
        ["of", "kept", "GPUs", "size", "ms a step", "talk ms", "efficiency", "bound by"],
        [
            [
                row["what"],
                "total" if row["strong"] else "share",
                f"{row['gpus']:,}",
                f"{row['size']:,}",
                f"{1e3 * row['seconds']:.3g}",
                f"{1e3 * row['talk']:.3g}",
                f"{row['efficiency']:.0%}",
                row["bound"],
            ]
            for row in rows
        ],
    )


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Predict, measure, carry on, and write ``results/plan_check.json`` and ``results/plan_check.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "JOB"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a moment for each configuration, which proves nothing")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0")
    parser.add_argument("--budget", type=float, default=12.0, help="seconds of calibration for each")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of each measured run")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs, of which the best counts")
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](json.loads(options.child[1]))))
        return []
    if options.quick:
        options.budget, options.seconds, options.repeats = 1.0, 0.5, 1
    chosen = CONFIGURATIONS if options.only is None else [CONFIGURATIONS[i] for i in options.only]
    rows: list[dict[str, Any]] = []
    for job in chosen:
        predicted = children("predict", job | {"budget": options.budget})
        asked = job | {"predicted": predicted["seconds"], "seconds": options.seconds, "repeats": options.repeats}
        measured = children("measure", asked, job["ranks"])
        ratio = predicted["seconds"] / measured["seconds"]
        rows.append(job | {"predicted": predicted, "measured": measured, "ratio": ratio})
        print(
            f"{job['recipe']:30} {job['what']} {job['size']:>6} x {job['ranks']}: {1e3 * predicted['seconds']:8.2f} ms "
            f"predicted, {1e3 * measured['seconds']:8.2f} ms measured, ratio {ratio:.2f}",
            file=sys.stderr,
        )
    systems = list(SYSTEMS)[:1] if options.quick else list(SYSTEMS)
    carried = {system: children("carry", {"system": system}) for system in systems}
    sys.path.insert(0, str(HERE.parent))
    import common

    record = common.circumstances((0,), 1) | {"rows": rows, "carried": carried}
    record |= {"budget": options.budget, "seconds": options.seconds, "repeats": options.repeats}
    print(report(rows, carried, record))
    return rows


if __name__ == "__main__":
    main()
