"""The bridge to OpenMM: energies and gradients of many configurations in one call.

What it costs beside OpenMM's own work is passing arrays: positions go in as arrays of doubles, forces come out into one
that is there already. Quantities with units and lists of vectors, which OpenMM's Python layer makes otherwise, take as
long as the forces of a small molecule.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gibbsian.errors import OptionError
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.platforms import platform_for

FARTHEST = 1e6
"""Nanometres from the origin beyond which a configuration has exploded."""

BRIDGES: weakref.WeakValueDictionary[int, Bridge] = weakref.WeakValueDictionary()
"""Bridges in use, by number: compiled code knows one by it."""

_numbers = itertools.count()


class Bridge:
    """An OpenMM system that tells energies and gradients in kJ/mol and kJ/mol/nm.

    Its contexts are made when they are first needed, and again in a copy or in another process.

    Parameters
    ----------
    system
        The ``openmm.System``.
    platform
        An OpenMM platform's name; the fastest for this size on one thread when left out.
    threads
        Configurations computed at a time, each by a context of its own.

    Raises
    ------
    OptionError
        If there is no such platform here, or no thread.
    """

    def __init__(self, system: Any, platform: str | None = None, threads: int = 1) -> None:
        if threads < 1:
            raise OptionError(f"threads is 1 or more; got {threads}.")
        self.system, self.threads = system, threads
        self.platform: str = platform_for(system, platform).getName()
        self.atoms: int = system.getNumParticles()
        self._begin()

    def _begin(self) -> None:
        self._contexts: list[Any] = []
        self._pool: ThreadPoolExecutor | None = None
        self.number = next(_numbers)
        BRIDGES[self.number] = self

    def __call__(self, x: np.ndarray, gradient: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate configurations.

        Parameters
        ----------
        x
            Coordinates in nanometres, doubles, ``(n, atoms, 3)``.
        gradient
            Whether gradients are wanted.

        Returns
        -------
        Energies ``(n,)``, and gradients ``(n, atoms, 3)`` or nothing of them, ``(0, atoms, 3)``. Where a configuration
        has exploded the energy is infinite and the gradient 0.
        """
        x = np.ascontiguousarray(x, dtype=np.float64)
        energy = np.full(len(x), np.inf)
        out = np.zeros((len(x) if gradient else 0, self.atoms, 3))
        # The largest of each row is NaN where a coordinate is; a comparison with it is false.
        rows = np.flatnonzero(np.abs(x).max((1, 2), initial=0.0) < FARTHEST)
        workers = min(self.threads, len(rows))
        if workers <= 1:
            self._evaluate(self._context(0), x, rows, energy, out)
        else:
            self._pool = self._pool or ThreadPoolExecutor(self.threads)
            contexts = [self._context(i) for i in range(workers)]
            tasks = [
                self._pool.submit(self._evaluate, context, x, part, energy, out)
                for context, part in zip(contexts, np.array_split(rows, workers))
            ]
            for task in tasks:
                task.result()
        self._refuse_exploded(energy, out)
        return energy, out

    def _evaluate(
        self, context: Any, x: np.ndarray, rows: Sequence[int] | np.ndarray, energy: np.ndarray, out: np.ndarray
    ) -> None:
        openmm = require_openmm()
        forces, gradient, kind = np.empty((self.atoms, 3)), len(out) > 0, openmm.State.Forces
        for i in rows:
            try:
                context.setPositions(x[i])
                state = context.getState(energy=True, forces=gradient)
            except openmm.OpenMMException:
                continue  # What OpenMM cannot compute has no finite energy.
            energy[i] = state.getPotentialEnergy()._value
            if gradient:
                state._getVectorAsNumpy(kind, forces)
                np.negative(forces, out=out[i])

    @staticmethod
    def _refuse_exploded(energy: np.ndarray, gradient: np.ndarray) -> None:
        bad = ~np.isfinite(energy)
        if len(gradient):
            # The sum of a row is not finite where a number of it is not.
            bad |= ~np.isfinite(gradient.sum((1, 2)))
            gradient[bad] = 0.0
        energy[bad] = np.inf

    def _context(self, i: int) -> Any:
        openmm = require_openmm()
        while len(self._contexts) <= i:
            platform = platform_for(self.system, self.platform)
            properties = {"Threads": "1"} if self.platform == "CPU" else {}
            self._contexts.append(openmm.Context(self.system, openmm.VerletIntegrator(0.001), platform, properties))
        return self._contexts[i]

    def __getstate__(self) -> dict[str, Any]:
        xml = require_openmm().XmlSerializer.serialize(self.system)
        return {"system": xml, "platform": self.platform, "threads": self.threads, "atoms": self.atoms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.system = require_openmm().XmlSerializer.deserialize(state["system"])
        self._begin()
