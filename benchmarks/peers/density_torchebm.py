"""Densities by torchebm, with the settings of its README."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from density_harness import STEPS_README, descend, main, network
from torch import Tensor
from torchebm.core import BaseModel
from torchebm.losses import ContrastiveDivergence, DenoisingScoreMatching, SlicedScoreMatching
from torchebm.samplers import LangevinDynamics


class Model(BaseModel):
    """A network as an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row."""
        return self.net(x).squeeze(-1)


def divergence(rows: Tensor, persistent: bool = False) -> Callable[[Tensor], Tensor]:
    """CD-10 with Langevin steps of 0.1; its README trains for 1000 steps, here it gets as many as the others."""
    model = Model()
    sampler = LangevinDynamics(model=model, step_size=0.1, noise_scale=1.0)
    loss = ContrastiveDivergence(model=model, sampler=sampler, k_steps=10, persistent=persistent, buffer_size=8192)
    descend(list(model.parameters()), lambda x: loss(x)[0], rows, STEPS_README)
    return model


def persistent(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """The same with a replay buffer."""
    return divergence(rows, persistent=True)


def denoising(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Denoising score matching with noise of 0.1."""
    model = Model()
    loss = DenoisingScoreMatching(model=model, noise_scale=0.1)
    descend(list(model.parameters()), loss, rows, STEPS_README)
    return model


def sliced(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Sliced score matching with five projections."""
    model = Model()
    loss = SlicedScoreMatching(model=model, n_projections=5)
    descend(list(model.parameters()), loss, rows, STEPS_README)
    return model


if __name__ == "__main__":
    methods = {"CD-10": divergence, "PCD": persistent, "DSM": denoising, "SSM": sliced}
    main("torchebm", version("torchebm"), methods)
