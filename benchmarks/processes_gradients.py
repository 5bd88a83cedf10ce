"""Gradients in several processes against one, for every objective: DDP on 2 and 4 processes, FSDP2 on 2.

The same batch of 32 rows in 4 lanes, three steps of plain descent in float32; the error is the length of the
difference over that of the gradient, the largest of the steps and processes. The models are those of
``tests/processes/lane_cases.py``, a small one for each objective.

    python benchmarks/processes_gradients.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import circumstances, table, write

TESTS = Path(__file__).parents[1] / "tests"

KINDS = {"DDP, 2 processes": (2, "none"), "DDP, 4 processes": (4, "none"), "FSDP2, 2 processes": (2, "full")}


def main() -> None:
    """Measure, and write the table."""
    sys.path[:0] = [str(TESTS), str(TESTS / "processes")]
    from lane_cases import CASES, apart, gradients_of

    from spawned import run_in

    names = list(CASES)
    alone = gradients_of(names)
    errors: dict[str, dict[str, float | None]] = {name: {} for name in names}
    reasons: dict[str, str] = {}
    for kind, (size, sharding) in KINDS.items():
        for found in run_in(size, gradients_of, names, sharding):
            for name in names:
                if isinstance(found[name], str):
                    errors[name][kind], reasons[name] = None, found[name]
                else:
                    error = apart(found[name], alone[name])
                    errors[name][kind] = max(error, errors[name].get(kind) or 0.0)
    largest = {kind: max(row[kind] or 0.0 for row in errors.values()) for kind in KINDS}
    print(largest)
    record = circumstances([20], 1) | {"errors": errors, "largest": largest, "refused": reasons}
    rows = [[name, *("refused" if row[k] is None else f"{row[k]:.1e}" for k in KINDS)] for name, row in errors.items()]
    rows.append(["largest", *(f"{largest[kind]:.1e}" for kind in KINDS)])
    told = "Relative error of the gradient against one process, the same 4 lanes, largest of 3 steps; float32."
    refused = "\n".join(f"* {name}: {reason}" for name, reason in reasons.items())
    write("processes_gradients", "Gradients in several processes", record, [told, table(["", *KINDS], rows), refused])


if __name__ == "__main__":
    main()
