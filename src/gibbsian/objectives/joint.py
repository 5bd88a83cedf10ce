r"""Joint energy models: one network as a classifier and as a density.

The likelihood of points with their labels falls in two,

.. math:: -\log p(x, y) = -\log p(y \mid x) - \log p(x),

of which the first is the classifier's cross-entropy, without any normaliser, and the second is left to any objective
for the energy of points. Fitted apart, rather than by contrasting pairs (x, y), the classifier's part has no noise of
chains in its gradient, and points without a label take part in the second.
"""

from __future__ import annotations

import math

from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from gibbsian.energies.base import Energy
from gibbsian.energies.classifier import classifier_of
from gibbsian.errors import ArgumentTypeError, DataError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective

UNLABELLED = -1
"""The label of a row that has none."""


class JointEnergyModel(Objective):
    r"""JEM: cross-entropy of the labels, plus an objective for the energy of points.

    .. math:: \overline{-\log p(y \mid x)} + \lambda\, L[E(x)],

    with the first mean over the rows that have a label. With :math:`\lambda = 1` and L the negative log-likelihood, it
    is that of the pairs. `Your classifier is secretly an energy based model and you should treat it like one (Grathwohl
    et al., 2020) <https://arxiv.org/abs/1912.03263>`_.

    The energy is a `ClassifierEnergy`, or a sum of one with energies of points alone; labels are whole numbers
    ``batch.context["y"]``, ``(n,)``, from 0, and -1 where a row has none.

    Parameters
    ----------
    generative
        The objective for the energy of points, which never sees labels: contrastive divergence as in the paper, or any
        other. Its metrics are reported under their own names.
    weight
        :math:`\lambda`, 0 or more. An objective that is no likelihood has another scale than the cross-entropy.

    Raises
    ------
    ArgumentTypeError
        If ``generative`` is no objective.
    OptionError
        If the weight is negative or not finite.
    """

    def __init__(self, generative: Objective, weight: float = 1.0) -> None:
        super().__init__()
        if not isinstance(generative, Objective):
            raise ArgumentTypeError(
                f"generative is an objective for the energy of points, such as PersistentContrastiveDivergence(kernel, "
                f"base); got {generative!r}."
            )
        if not 0.0 <= weight < math.inf:
            raise OptionError(f"weight is 0 or a positive number; got {weight}.")
        self.generative = generative
        self.weight = float(weight)

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Classify the rows that have a label, and fit the energy to all.

        Raises
        ------
        ArgumentTypeError
            If the energy holds no classifier, or the labels are not whole numbers.
        OptionError
            If the batch has no labels.
        ShapeError, DataError
            If there is not one label for each row, or one is out of range.
        """
        classifier = classifier_of(energy)
        y = check_labels(batch, classifier.classes)
        points = self.generative(energy, batch, rng)
        logits = classifier.logits(batch.x)
        each = cross_entropy(logits, y, ignore_index=UNLABELLED, reduction="none")
        labelled = (y != UNLABELLED).sum()
        # A batch without a single label has nothing to classify: a sum over no rows, which is zero.
        entropy = each.sum() / labelled.clamp(min=1)
        right = (logits.detach().argmax(1) == y).sum()
        metrics = {"cross_entropy": entropy.detach(), "class_accuracy": right / labelled}
        return Loss(entropy + self.weight * points.value, points.metrics | metrics)

    def extra_repr(self) -> str:
        """The weight."""
        return f"weight={self.weight}"


def check_labels(batch: Batch, classes: int) -> Tensor:
    """Read a batch's labels, ``(n,)`` of int64.

    Raises
    ------
    OptionError
        If it brings none.
    ArgumentTypeError
        If they are not whole numbers.
    ShapeError
        If there is not one for each row.
    DataError
        If one is neither a class nor -1.
    """
    if "y" not in batch.context:
        brings = ", ".join(sorted(batch.context)) or "none"
        raise OptionError(
            f"A joint energy model learns from labels, y, which the batch lacks (its context: {brings}). Pass "
            'Batch(x, {"y": labels}), with -1 for rows without one.'
        )
    y = batch.context["y"]
    if y.is_floating_point() or y.is_complex():
        raise ArgumentTypeError(
            f"Labels are whole numbers from 0 to {classes - 1}; got {y.dtype}. Convert with .long()."
        )
    if tuple(y.shape) != (len(batch),):
        raise ShapeError(
            f"{len(batch)} rows have one label each, ({len(batch)},); got {tuple(y.shape)}. Turn one-hot rows into "
            "classes with .argmax(1)."
        )
    y = y.long()
    # On an accelerator looking would wait for it; there the cross-entropy itself stops at such a label.
    if y.device.type == "cpu" and len(y) and (int(y.min()) < UNLABELLED or int(y.max()) >= classes):
        raise DataError(
            f"Labels lie between 0 and {classes - 1}, or are -1 where a row has none; got {int(y.min())} to "
            f"{int(y.max())}. Number the classes from 0, or make ClassifierEnergy with more."
        )
    return y
