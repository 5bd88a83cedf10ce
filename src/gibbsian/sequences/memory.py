"""How much memory a fit takes, said before it starts."""

from __future__ import annotations

import os
from pathlib import Path

from gibbsian.errors import InputError

MEGABYTE = 2**20
TAKEN = 320 * MEGABYTE
"""What Python and torch take by themselves, and counting in pieces."""


def memory_needed(
    by: str,
    sequences: int,
    columns: int,
    letters: int,
    *,
    chains: int = 2000,
    replicas: int = 1,
    hidden: int = 100,
    draws: int = 4000,
) -> int:
    """Estimate the memory of a fit with draws and scans, in bytes.

    Parameters
    ----------
    by
        ``"pseudo-likelihood"``, ``"boltzmann"`` or ``"rbm"``.
    sequences, columns, letters
        N, L and K of the alignment.
    chains, replicas
        Of Boltzmann learning and machines.
    hidden
        Units of a machine.
    draws
        Chains that are drawn at once.
    """
    states, codes = columns * letters, sequences * columns
    pairs = columns * (columns - 1) // 2 * letters**2
    reading = 24 * codes + 128 * MEGABYTE
    if by == "pseudo-likelihood":
        # L-BFGS keeps eight pairs of vectors in float64 and works on as many again; tables, and lookups both ways.
        fitting = 8 * 40 * pairs + 3 * 4 * states**2 + 40 * codes
    elif by == "boltzmann":
        # Weights, gradient, momentum, average, targets and checkpoints; tables; chains, copied some times.
        fitting = 4 * 70 * pairs + 3 * 4 * states**2 + 6 * 4 * chains * replicas * states
    else:
        fitting = 4 * 12 * hidden * states + 6 * 4 * chains * states + 3 * 4 * sequences * states
    asking = 4 * 4 * draws * states + 6 * 8 * pairs
    return TAKEN + max(reading, fitting, asking) + 24 * codes


def memory_available() -> int | None:
    """Memory that is free for a process, in bytes; ``None`` where the system does not tell."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    try:
        # A container's own limit.
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        found.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def check_memory(needed: int, available: int | None = None) -> None:
    """Refuse a fit that the machine has no memory for.

    Parameters
    ----------
    needed
        In bytes, see `memory_needed`.
    available
        In bytes; as the system tells when ``None``.

    Raises
    ------
    InputError
        With both numbers.
    """
    available = memory_available() if available is None else available
    if available is not None and needed > available:
        raise InputError(
            f"This fit takes about {needed / MEGABYTE:,.0f} MB, and {available / MEGABYTE:,.0f} MB are free. Memory "
            "grows with the square of the columns: keep those of one sequence (--focus NAME) or of one domain, take "
            "fewer chains (--chains) or draws (--draws), or a restricted Boltzmann machine (--by rbm)."
        )
