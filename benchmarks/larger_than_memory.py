"""Data larger than memory: training from a Parquet data set of 20 GB against data that lie in memory.

Generates shards of random rows, lets the system forget them, and trains the recipe that `gibbsian train` chooses for
pictures, by turns from the disk and from memory, each time in a process of its own (reading ahead happens in threads,
so that a process is all there is). It asks for under 1.5 GB of resident memory, and 0.9 of the steps per second. The
data set is removed in any case::

    python benchmarks/larger_than_memory.py                 # 20 GB, needs 22 GB of disk; some 20 minutes
    python benchmarks/larger_than_memory.py --gigabytes 2 --steps 600 --repeats 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import circumstances, generator, table, write

SHAPE = (1, 28, 28)
COLUMNS = 32
SHARD = 2**28
BLOCK = 3 * 2**20
WARM = 100
IN_MEMORY = 20_000
LIMIT, SHARE = 1.5e9, 0.9


def table_of(values: np.ndarray, layout: str) -> Any:
    """Rows as lists of numbers, as bytes, or as a column for each coordinate."""
    import pyarrow as pa

    if layout == "columns":
        return pa.table({f"c{i}": column for i, column in enumerate(values.reshape(COLUMNS, -1))})
    if layout == "bytes":
        d = int(np.prod(SHAPE))
        buffers = [None, pa.py_buffer(values)]
        return pa.table({"x": pa.FixedSizeBinaryArray.from_buffers(pa.binary(d), values.size // d, buffers)})
    return pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values.reshape(-1, *SHAPE))})


def row_bytes(layout: str) -> int:
    """Bytes of a row in the file."""
    return 4 * COLUMNS if layout == "columns" else int(np.prod(SHAPE)) * (1 if layout == "bytes" else 4)


def generate(folder: Path, gigabytes: float, layout: str) -> dict[str, float]:
    """Write shards until there are so many bytes, and let the system forget them."""
    import pyarrow.parquet as pq

    began = time.perf_counter()
    per = row_bytes(layout)
    shards = max(4, round(gigabytes * 1e9 / SHARD))
    rows = int(gigabytes * 1e9 / (shards * per))
    width = COLUMNS if layout == "columns" else int(np.prod(SHAPE))
    rng = np.random.default_rng(0)
    if layout == "bytes":
        base = rng.integers(0, 256, rows * width, dtype=np.uint8)
    else:
        base = rng.standard_normal(rows * width, dtype=np.float32)
    for i in range(shards):
        path = folder / f"part-{i:04d}.parquet"
        # Another scale in every shard: their order matters.
        content = table_of(
            base // 2 + i % 128 if layout == "bytes" else base * np.float32(1 - i / (2 * shards)), layout
        )
        pq.write_table(content, path, row_group_size=BLOCK // per, use_dictionary=False, compression="none")
        with path.open("rb") as file:
            os.fsync(file.fileno())
            # Else what was just written would be read from memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = sum(p.stat().st_size for p in folder.iterdir())
    return {
        "bytes": size,
        "rows": rows * shards,
        "shards": shards,
        "blocks": shards * -(-rows // (BLOCK // per)),
        "seconds": time.perf_counter() - began,
    }


def forget(folder: Path) -> None:
    """Let the system drop its cache of the shards."""
    for path in folder.glob("*.parquet"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, int]:
    """Bytes of this process that are resident: now and at most, its own and those of mapped files."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"now": "VmRSS", "most": "VmHWM", "own": "RssAnon", "files": "RssFile"}
    return {name: int(told[key].split()[0]) * 1024 for name, key in names.items()}


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process; or read everything once."""
    from gibbsian.building import build_objective, initial_weights
    from gibbsian.data.rows import open_rows, stream
    from gibbsian.data.rows.reading import Reading
    from gibbsian.processes import join_processes, world
    from gibbsian.recipes import choose
    from gibbsian.training.fit import fit

    torch.set_num_threads(options.threads)
    told: dict[str, Any] = {"imported": memory()["now"]}
    table_like = options.layout == "columns"
    shape = (COLUMNS,) if table_like else SHAPE
    kind = "table" if table_like else "image"
    began = time.perf_counter()
    rows = None
    if options.work == "memory":
        data = torch.randn(IN_MEMORY, *shape, generator=generator(0))
        sample = data[:4096]
    else:
        kept_shape = SHAPE if options.layout == "bytes" else None
        rows = open_rows(options.folder, kind=kind, shape=kept_shape, memory=options.memory)
        told["open"] = time.perf_counter() - began
        rows = rows.scaled(rows.scaling())
        with Reading(rows, options.batch_size) as reading:
            reading.batch(0, 0, 0)
            told["first batch"] = time.perf_counter() - began
            told["blocks per window"] = reading.blocks_per_window
        data, sample = rows, rows.sample(4096)[0]
    if options.work == "pass":
        assert rows is not None
        began, n = time.perf_counter(), 0
        for x, _ in stream(rows, options.batch_size):
            n += len(x)
        return told | {"rows": n, "seconds": time.perf_counter() - began, "memory": memory()}
    recipe = choose(kind, shape, IN_MEMORY, {"batch_size": options.batch_size})
    energy = initial_weights(recipe, sample)
    objective = build_objective(recipe, sample, energy)
    marks: list[tuple[int, float, float]] = []

    def note(record: dict[str, Any]) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        marks.append((record.get("step", 0), time.perf_counter(), usage.ru_utime + usage.ru_stime))

    with join_processes():
        fit(
            energy,
            data,
            objective,
            rng=generator(1),
            settings=recipe.training,
            steps=options.steps,
            log_every=WARM // 2,
            callbacks=[note],
            tensorboard=False,
        )
        told["rank"] = world().rank
    if marks:
        first, last = next(m for m in marks if m[0] >= WARM), marks[-1]
        steps = last[0] - first[0]
        told |= {
            "steps per second": steps / (last[1] - first[1]),
            "CPU ms per step": (last[2] - first[2]) / steps * 1e3,
        }
    return told | {"memory": memory()}


def call(options: argparse.Namespace, mode: str, folder: Path, size: int = 1) -> list[dict[str, Any]]:
    """Run `work` in processes of its own; what each told, in the order of ranks."""
    launch = [sys.executable]
    if size > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    words = ["--work", mode, "--folder", str(folder), "--layout", options.layout]
    for name in ("steps", "batch_size", "threads", "memory"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    told = folder.parent / f"{folder.name}-told"
    told.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "GIBBSIAN_TOLD": str(told)}
    try:
        done = subprocess.run([*launch, __file__, *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{mode} with {size} processes failed:\n{done.stderr[-3000:]}")
        return [json.loads(p.read_text()) for p in sorted(told.iterdir())]
    finally:
        shutil.rmtree(told)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take turns, so that other work on the machine slows both alike."""
    found: dict[str, Any] = {"generated": generate(folder, options.gigabytes, options.layout), "runs": []}
    for size in options.processes:
        for _ in range(options.repeats):
            for mode in ("memory", "disk"):
                forget(folder)
                began = time.perf_counter()
                told = call(options, mode, folder, size)
                found["runs"].append({"mode": mode, "processes": size, "told": told})
                speed = told[0]["steps per second"]
                most = max(t["memory"]["most"] for t in told)
                taken = time.perf_counter() - began
                print(
                    f"{mode}, {size} process(es): {speed:.1f} steps/s, {most / 1e9:.2f} GB, {taken:.0f} s", flush=True
                )
    forget(folder)
    found["pass"] = call(options, "pass", folder)[0]
    return found


def judged(found: dict[str, Any], size: int) -> dict[str, float]:
    """Medians over repetitions: of steps per second, of their ratio turn by turn, of memory the most."""
    runs = {
        m: [r["told"] for r in found["runs"] if (r["mode"], r["processes"]) == (m, size)] for m in ("memory", "disk")
    }
    speed = {m: [told[0]["steps per second"] for told in each] for m, each in runs.items()}
    cpu = {m: [told[0]["CPU ms per step"] for told in each] for m, each in runs.items()}
    ratios = [d / m for d, m in zip(speed["disk"], speed["memory"])]
    disk = [each for told in runs["disk"] for each in told]
    return {
        "steps/s, memory": statistics.median(speed["memory"]),
        "steps/s, disk": statistics.median(speed["disk"]),
        "ratio": statistics.median(ratios),
        "lowest ratio": min(ratios),
        "CPU ms per step, memory": statistics.median(cpu["memory"]),
        "CPU ms per step, disk": statistics.median(cpu["disk"]),
        "peak GB, disk": max(t["memory"]["most"] for t in disk) / 1e9,
        "of these after imports": max(t["imported"] for t in disk) / 1e9,
        "peak GB, memory": max(t["memory"]["most"] for told in runs["memory"] for t in told) / 1e9,
        "seconds to open": max(t["open"] for t in disk),
        "seconds to first batch": max(t["first batch"] for t in disk),
    }


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what was measured."""
    made, whole = found["generated"], found["pass"]
    results = {str(size): judged(found, size) for size in options.processes}
    ok = all(r["ratio"] >= SHARE and r["peak GB, disk"] * 1e9 < LIMIT for r in results.values())
    names = list(next(iter(results.values())))
    lines = [(name, *(f"{r[name]:.3g}" for r in results.values())) for name in names]
    facts = (
        f"{made['bytes'] / 1e9:.1f} GB of Parquet, layout `{options.layout}`: {made['rows']:,} rows in "
        f"{made['shards']} shards and {made['blocks']:,} row groups, written in {made['seconds']:.0f} s. Batches of "
        f"{options.batch_size}, {options.steps} steps of which the first {WARM} are not timed, {options.repeats} "
        f"turns, memory={options.memory} (MiB of windows). Every process reads in threads of its own; there are no "
        "worker processes. The system's cache of the files was dropped before every run; what it kept of them "
        "meanwhile is not counted."
    )
    through = (
        f"Reading everything once without training: {whole['rows']:,} rows in {whole['seconds']:.0f} s "
        f"({whole['rows'] / whole['seconds']:,.0f} rows/s), at most {whole['memory']['most'] / 1e9:.2f} GB resident, "
        f"{whole['memory']['own'] / 1e9:.2f} GB of it the process's own at the end."
    )
    asked = f"Asked: a ratio of {SHARE} or more, under {LIMIT / 1e9} GB per process: {'held' if ok else 'NOT held'}."
    record = circumstances([0, 1], options.threads)
    record |= {"options": vars(options) | {"folder": None}, "asked held": ok, "results": results, "found": found}
    name = "larger_than_memory" if options.layout == "lists" else f"larger_than_memory_{options.layout}"
    header = ["", *(f"{size} process{'es' * (size > 1)}" for size in options.processes)]
    write(
        options.name or name,
        "Training from data larger than memory",
        record,
        [facts, table(header, lines), through, asked],
    )
    print("\n".join((facts, table(header, lines), through, asked)))


def main() -> None:
    """Generate, measure, write, and remove the data in any case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--layout", choices=("lists", "bytes", "columns"), default="lists")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=None, help="where the data set is made; the temporary folder")
    parser.add_argument("--name", default="", help="of the files of results")
    parser.add_argument("--work", choices=("memory", "disk", "pass"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        found = work(options)
        path = Path(os.environ["GIBBSIAN_TOLD"]) / f"{found.get('rank', 0)}.json"
        path.write_text(json.dumps(found))
        return
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    if free < 1.1e9 * options.gigabytes:
        parser.error(f"{options.gigabytes} GB are to be written, and {free / 1e9:.0f} GB are free; --gigabytes less.")
    with tempfile.TemporaryDirectory(prefix="gibbsian-rows-", dir=options.folder) as folder:
        inside = Path(folder) / "data"
        inside.mkdir()
        found = measure(options, inside)
    report(options, found)


if __name__ == "__main__":
    main()
