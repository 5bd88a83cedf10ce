"""Training with labels that are dropped at random, so that one energy is conditional and unconditional at once.

An extra label stands for "none". Rows that carry it are of all classes together, so that the energy given that label is
the unconditional one: what guidance moves away from (`gibbsian.applications.guidance`).
"""

from __future__ import annotations

import torch
from torch import Generator

from gibbsian.energies.base import Energy
from gibbsian.energies.labels import check_labels
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective, formula


class LabelDropping(Objective):
    """Another objective, on batches in which each label becomes "none" with a probability.

    `Classifier-free diffusion guidance (Ho & Salimans, 2022) <https://arxiv.org/abs/2207.12598>`_.

    In evaluation mode (``objective.eval()``) labels stay. The metric ``dropped`` is the share of rows without label.

    Parameters
    ----------
    objective
        What is fitted.
    none
        The label that stands for none. Numbering classes from 0, it is their number.
    probability
        That a row's label is dropped.
    name
        What the energy calls the label.
    classes
        How many classes there are, from 0; ``none`` when left out. Other labels are refused: of tensors on the CPU at
        every call, elsewhere at the first, so as not to wait for the device.

    Raises
    ------
    ArgumentTypeError
        If the first argument is no objective.
    OptionError
        If the probability is not between 0 and 1, or ``none`` is one of the classes.
    """

    def __init__(
        self,
        objective: Objective,
        none: int,
        probability: float = 0.1,
        name: str = "y",
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(f"Labels are dropped before an objective sees them; got {objective!r}.")
        if not 0.0 <= probability <= 1.0:
            raise OptionError(f"probability, that a label is dropped, lies between 0 and 1; got {probability}.")
        self.classes = none if classes is None else classes
        if self.classes < 1 or 0 <= none < self.classes:
            raise OptionError(
                f"The label for none lies outside the classes 0 to {self.classes - 1}, of which there is one or more; "
                f"got "
                f"{none}."
            )
        self.objective, self.fits_scores = objective, objective.fits_scores
        self.none, self.probability, self.name = none, probability, name
        self._seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Drop labels, and compute the inner loss.

        Raises
        ------
        OptionError
            If the batch has no such label, or one that is no class.
        ArgumentTypeError
            If labels are no whole numbers.
        """
        if self.name not in batch.context:
            brings = ", ".join(sorted(batch.context)) or "none"
            raise OptionError(
                f"There are no labels {self.name!r} to drop (the batch brings: {brings}). Pass "
                f"Batch(x, {{{self.name!r}: labels}})."
            )
        labels = batch.context[self.name]
        if labels.device.type == "cpu" or not self._seen:
            check_labels(labels, self.none, self.classes)
            self._seen = True
        if not self.training:
            return self.objective(energy, batch, rng)
        gone = torch.rand(labels.shape, generator=rng, device=labels.device) < self.probability
        told = torch.where(gone, labels.new_tensor(self.none), labels)
        loss = self.objective(energy, Batch(batch.x, {**batch.context, self.name: told}), rng)
        return Loss(loss.value, {**loss.metrics, "dropped": gone.to(batch.x.dtype).mean()})

    def extra_repr(self) -> str:
        """The objective and the probability."""
        return f"{formula(self.objective)}, none={self.none}, probability={self.probability}"
