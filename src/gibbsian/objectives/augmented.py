r"""Data that are moved at random before an objective sees them: noise, mirrored and shifted images.

Uniform noise of one step w of the values makes a density out of values that come in steps: with u uniform between -1/2
and 1/2, :math:`\log P(x) \ge \mathbb{E}_u[\log q(x + w u)] + d \log w`, by Jensen's inequality. `RNADE (Uria et al.,
2013) <https://arxiv.org/abs/1306.0186>`_; `A note on the evaluation of generative models (Theis et al., 2016)
<https://arxiv.org/abs/1511.01844>`_.
"""

from __future__ import annotations

from torch import Generator

from gibbsian.energies.base import Energy, formula
from gibbsian.energies.tractable import require_support
from gibbsian.errors import ArgumentTypeError
from gibbsian.objectives.augment import Move
from gibbsian.objectives.base import Batch, Loss, Objective


class Augmented(Objective):
    """Another objective, on batches whose rows are moved at random, anew each time.

    What is fitted is the density of the moved rows: with `UniformNoise` of one step of the data's values a flow has
    one, with `AdditiveNoise` an energy whose draws lose that noise again.

    Parameters
    ----------
    objective
        What is fitted.
    move
        ``(x, rng) -> x``, such as ``UniformNoise(2 / 16)``, ``AdditiveNoise(0.3)``, ``HorizontalFlip()``.

    Raises
    ------
    ArgumentTypeError
        If the first argument is no objective, or the second cannot be called.
    """

    def __init__(self, objective: Objective, move: Move) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"Rows are moved before an objective sees them; got {objective!r}.")
        if isinstance(move, type) or not callable(move):
            raise ArgumentTypeError(f"A move is a function (x, rng) -> x, such as UniformNoise(0.1); got {move!r}.")
        self.objective, self.move = objective, move
        self.seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """The inner objective's loss of the moved rows.

        Raises
        ------
        DomainError
            If a move leads off the energy's domain, which the first call looks at.
        """
        x = self.move(batch.x, rng)
        if not self.seen:
            require_support(x, energy, f"the data moved by {self.move}")
            self.seen = True
        return self.objective(energy, Batch(x, batch.context), rng)

    def extra_repr(self) -> str:
        """The objective and the move."""
        return f"{formula(self.objective)}, {self.move}"
