"""Times the kernels of gibbsian, used as its README shows: ``sample`` with a compiled chain."""

from __future__ import annotations

import targets
import torch
from harness import Case, Runner, Worker, main
from torch import Tensor

import gibbsian as gb


def kernel(case: Case) -> gb.ULA | gb.MALA | gb.HMC:
    """Kernel of a case."""
    step_size = targets.TARGETS[case.target].step_sizes[case.kernel]
    if case.kernel == "ULA":
        return gb.ULA(step_size=step_size)
    if case.kernel == "MALA":
        return gb.MALA(step_size=step_size)
    return gb.HMC(step_size=step_size, leapfrog=targets.LEAPFROG)


def prepare(case: Case, compiled: bool) -> Runner:
    """Runner of a case.

    Compilation is an option of the library, so ``compiled`` chooses ``compile=True`` where the peers compile the
    energy from outside.
    """
    energy = gb.Energy.of(targets.build(case.target))
    transition = kernel(case)
    x0 = targets.start(case.target, case.chains)
    rng = torch.Generator().manual_seed(0)

    def run(steps: int) -> Tensor:
        return gb.sample(energy, transition, x0, steps=steps, rng=rng, compile=compiled).x

    return run


if __name__ == "__main__":
    main(Worker("gibbsian", getattr(gb, "__version__", "unknown"), prepare))
