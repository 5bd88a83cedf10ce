"""Times the samplers of torchebm.

Used as its README shows: the energy is a ``BaseModel``, ``sample`` is called without trajectory or diagnostics, the
integrators are the defaults.  Parameters are frozen beforehand, since the library does not do so, and there is no
compile option of its own.  Two of its limits need a way around:

* There is no MALA.  Hamiltonian Monte Carlo with one leapfrog step is the same Markov kernel, ``step_size`` becoming
  ``sqrt(2 * step_size)``, and takes its place.
* The Hamiltonian sampler sums the kinetic energy over the last dimension alone, which fails for images; positions are
  therefore rows, and the model restores the shape.
"""

from __future__ import annotations

import math
from importlib.metadata import version

import targets
import torch
from harness import Case, Runner, Worker, main
from targets import Energy
from torch import Tensor
from torchebm.core import BaseModel
from torchebm.losses import ContrastiveDivergence
from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics


class Model(BaseModel):
    """A shared target in the form that torchebm samples from: rows in, energies out."""

    def __init__(self, net: Energy, event: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.event = event

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row."""
        return self.net(x.unflatten(1, self.event) if len(self.event) > 1 else x)


def sampler(case: Case, model: Model) -> LangevinDynamics | HamiltonianMonteCarlo:
    """Sampler of a case."""
    step_size = targets.TARGETS[case.target].step_sizes[case.kernel]
    if case.kernel == "ULA":
        return LangevinDynamics(model, step_size=step_size, noise_scale=1.0)
    if case.kernel == "MALA":
        return HamiltonianMonteCarlo(model, step_size=math.sqrt(2.0 * step_size), n_leapfrog_steps=1)
    return HamiltonianMonteCarlo(model, step_size=step_size, n_leapfrog_steps=targets.LEAPFROG)


def prepare(case: Case, compiled: bool) -> Runner:
    """Runner of a case."""
    if case.kernel == "CD":
        return train(case, compiled)
    net = targets.build(case.target)
    # The samplers call ``forward`` directly, past the hook of ``nn.Module.compile``, so the inner module is compiled.
    model = Model(torch.compile(net) if compiled else net, targets.TARGETS[case.target].event).eval()
    x0 = targets.start(case.target, case.chains).flatten(1)
    chain = sampler(case, model)

    def run(steps: int) -> Tensor:
        return chain.sample(x=x0, n_steps=steps)

    return run


def train(case: Case, compiled: bool) -> Runner:
    """Runner of training steps: the loop of its documentation, with Adam and batches in random order."""
    net, target = targets.trainable(case.target), targets.TARGETS[case.target]
    model = Model(torch.compile(net) if compiled else net, target.event)
    chain = LangevinDynamics(model, step_size=target.step_sizes["ULA"], noise_scale=1.0)
    loss = ContrastiveDivergence(model=model, sampler=chain, k_steps=targets.CD_STEPS)
    optimiser = torch.optim.Adam(model.parameters(), lr=targets.LEARNING_RATE)
    data = targets.start(case.target, targets.CD_ROWS).flatten(1)

    def run(steps: int) -> Tensor:
        done = 0
        while done < steps:
            for rows in torch.randperm(len(data)).split(case.chains)[: steps - done]:
                optimiser.zero_grad()
                value, _ = loss(data[rows])
                value.backward()
                optimiser.step()
                done += 1
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    return run


if __name__ == "__main__":
    main(Worker("torchebm", version("torchebm"), prepare))
