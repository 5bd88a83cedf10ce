"""Times the samplers of ebmkit (imported as ``ebm``).

Used as its README shows: a plain module for the energy, ``sample`` without a trajectory.  The library freezes the
parameters of a module by itself, and has no compile option of its own.
"""

from __future__ import annotations

from importlib.metadata import version

import ebm
import targets
import torch
from ebm.samplers import Sampler
from harness import Case, Runner, Worker, main
from torch import Tensor


def sampler(case: Case) -> Sampler:
    """Sampler of a case."""
    step_size = targets.TARGETS[case.target].step_sizes[case.kernel]
    if case.kernel == "ULA":
        return ebm.LangevinDynamics(step_size=step_size)
    if case.kernel == "MALA":
        return ebm.MALA(step_size=step_size)
    return ebm.HMC(step_size=step_size, leapfrog_steps=targets.LEAPFROG)


def prepare(case: Case, compiled: bool) -> Runner:
    """Runner of a case."""
    if case.kernel == "CD":
        return train(case, compiled)
    energy = targets.build(case.target)
    if compiled:
        energy = torch.compile(energy)
    x0 = targets.start(case.target, case.chains)
    chain = sampler(case)

    def run(steps: int) -> Tensor:
        return chain.sample(energy, x0, steps=steps)

    return run


def train(case: Case, compiled: bool) -> Runner:
    """Runner of training steps: the library's trainer, quiet, with chains that start at normal draws as it does."""
    energy = targets.trainable(case.target)
    step_size = targets.TARGETS[case.target].step_sizes["ULA"]
    loss = ebm.ContrastiveDivergence(ebm.LangevinDynamics(step_size=step_size, steps=targets.CD_STEPS))
    if compiled:
        energy = torch.compile(energy)
    trainer = ebm.Trainer(energy, loss, lr=targets.LEARNING_RATE)
    data = targets.start(case.target, targets.CD_ROWS)

    def run(steps: int) -> Tensor:
        trainer.fit(data, steps=steps, batch_size=case.chains, verbose=False)
        return torch.cat([p.detach().flatten() for p in energy.parameters()])

    return run


if __name__ == "__main__":
    main(Worker("ebmkit", version("ebmkit"), prepare))
