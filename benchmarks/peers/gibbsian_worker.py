"""Times the kernels of gibbsian, used as its README shows: ``sample`` with a compiled chain, and ``fit``."""

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
    if case.kernel == "CD":
        return train(case, compiled)
    energy = gb.Energy.of(targets.build(case.target))
    transition = kernel(case)
    x0 = targets.start(case.target, case.chains)
    rng = torch.Generator().manual_seed(0)

    def run(steps: int) -> Tensor:
        return gb.sample(energy, transition, x0, steps=steps, rng=rng, compile=compiled).x

    return run


def train(case: Case, compiled: bool) -> Runner:
    """Runner of training steps: ``fit``, with its clipping, averaged weights and health as they come."""
    energy = gb.Energy.of(targets.trainable(case.target))
    kernel = gb.ULA(targets.TARGETS[case.target].step_sizes["ULA"])
    objective = gb.ContrastiveDivergence(kernel, targets.CD_STEPS, compile=compiled)
    data, rng = targets.start(case.target, targets.CD_ROWS), torch.Generator().manual_seed(0)
    options = {"batch_size": case.chains, "learning_rate": targets.LEARNING_RATE, "warmup_steps": 0}

    def run(steps: int) -> Tensor:
        gb.fit(energy, data, objective, steps=steps, rng=rng, **options)
        return torch.cat([p.detach().flatten() for p in energy.parameters()])

    return run


if __name__ == "__main__":
    main(Worker("gibbsian", getattr(gb, "__version__", "unknown"), prepare))
