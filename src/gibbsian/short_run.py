r"""Short-run chains as an object, and the chains of a replay buffer carried on without being written back.

A model trained with k steps of a kernel from a fixed start has learned an energy whose *k-step chains* look like the
data. Its density need not: run longer, the chains leave. Such a model is sampled as it was trained, by the push-forward

.. math:: q_\theta = K_\theta^k \, q_0,

of which kernel, steps k and start :math:`q_0` are all that there is to know. A persistent model is sampled from its
buffer, whose chains are its draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from gibbsian.buffers import ReplayBuffer, Slots
from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.kernels.base import Kernel
from gibbsian.samples import Samples
from gibbsian.sampling import sample
from gibbsian.typing import EnergyFn


@runtime_checkable
class Start(Protocol):
    """Where chains start: a tractable energy, a replay buffer, or anything else that draws points."""

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points, ``(n, *event)``."""
        ...


@dataclass(frozen=True)
class ShortRun:
    """Chains of a few steps from a start of their own, in training and after it.

    `Learning non-convergent non-persistent short-run MCMC toward energy-based model (Nijkamp et al., 2019)
    <https://arxiv.org/abs/1904.09770>`_.

    Parameters
    ----------
    kernel
        How a chain moves; often `ULA` with a step size and a noise scale of their own.
    steps
        k, 1 or more.
    start
        Where chains start: a `Tractable`, a `GeneratorNetwork`, or anything with ``sample(n, rng)``. With a
        `ReplayBuffer` its chains go on for k steps and are not written back.

    Raises
    ------
    OptionError
        If there is no step.
    ArgumentTypeError
        If the kernel is none, or the start draws no points.
    """

    kernel: Kernel
    steps: int
    start: Start

    def __post_init__(self) -> None:
        if isinstance(self.kernel, type) or not isinstance(self.kernel, Kernel):
            raise ArgumentTypeError(f"A short run needs a kernel, such as ULA(0.01); got {self.kernel!r}.")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"steps counts the steps of a short run, 1 or more; got {self.steps!r}.")
        if isinstance(self.start, type) or not isinstance(self.start, Start):
            raise ArgumentTypeError(
                f"The start of a short run draws points with sample(n, rng), as Gaussian(2) does; got {self.start!r}."
            )

    def sample(
        self,
        energy: EnergyFn,
        n: int,
        rng: Generator,
        *,
        compile: bool = False,
        progress: bool | Callable[[int], object] = False,
        lanes: int | None = None,
    ) -> Samples:
        """Start ``n`` new chains and run them to their end; ``.x`` of the result are the draws.

        Parameters
        ----------
        energy
            Batched: ``(n, *event) -> (n,)``.
        n
            Chains, 1 or more.
        rng
            The generator of the starts, then of all noise.
        compile, progress, lanes
            As in `gibbsian.sample`; starts are drawn for all lanes in every process.

        Raises
        ------
        OptionError, ShapeError, DomainError, ArgumentTypeError
            If start, energy and kernel do not fit each other; the message says what does.
        """
        if n < 1:
            raise OptionError(f"n counts the chains, 1 or more; got {n}.")
        # Draws of a generator network have a graph behind them.
        start = self.start.sample(n, rng).detach()
        how = {"rng": rng, "compile": compile, "progress": progress, "lanes": lanes}
        return sample(energy, self.kernel, start, steps=self.steps, **how)


def continue_chains(
    energy: Energy,
    kernel: Kernel,
    buffer: ReplayBuffer,
    n: int,
    *,
    steps: int,
    rng: Generator,
    compile: bool = False,
) -> tuple[Samples, Slots]:
    """Carry ``n`` chains of a buffer on, each under its own labels, and leave the buffer as it was.

    Parameters
    ----------
    energy
        The model; the names of its open context are the buffer's labels.
    kernel, steps
        How the chains move, and how far.
    buffer
        The trained model's, filled.
    n
        Chains, all different.
    rng
        The generator of the choice, then of all noise.
    compile
        As in `gibbsian.sample`.

    Returns
    -------
    samples, slots
        The run, and what was taken: labels in ``slots.context``, row by row those of ``samples.x``.

    Raises
    ------
    OptionError
        If the buffer is empty or smaller than ``n``, or lacks a label that the energy asks for.
    """
    energy, slots = Energy.of(energy), buffer.peek(n, rng)
    labels = {name: value for name, value in slots.context.items() if name in energy.context}
    given = energy.given(**labels) if labels else energy
    return sample(given, kernel, slots.x, steps=steps, rng=rng, compile=compile), slots
