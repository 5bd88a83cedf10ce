r"""Fine-tuning of a classifier so that its energy tells foreign rows.

Cross-entropy does not see a number added to all logits of a row, so that the energy :math:`E(x) = -\log \sum_y
e^{f(x)_y}` of a trained classifier is what chance made it. Two squared hinges determine it: rows of the data are pushed
below one bound, foreign rows above another,

.. math:: L = \overline{-\log p(y \mid x)} + \lambda \left( \overline{\max(0,\, E(x) - m_\mathrm{in})^2}
              + \overline{\max(0,\, m_\mathrm{out} - E(x'))^2} \right).

Beyond their bounds rows have no gradient, so that the classifier keeps what it knows.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, relu

from gibbsian.energies.base import Energy
from gibbsian.energies.classifier import check_logits, classifier_of
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective, check_one_per_row
from gibbsian.objectives.joint import UNLABELLED, check_labels


class EnergyBounded(Objective):
    r"""Cross-entropy of the labels, and squared hinges on the energies of rows of the data and of foreign rows.

    `Energy-based Out-of-distribution Detection (Liu et al., 2020) <https://arxiv.org/abs/2010.03759>`_. The energy is a
    `ClassifierEnergy`, or a sum of one with energies of points; labels are ``batch.context["y"]``, -1 where a row has
    none.

    Parameters
    ----------
    outside
        Foreign rows to learn from, ``(m, *event)``: any others than those to be detected later. They are not saved with
        the objective.
    inside_bound, outside_bound
        :math:`m_\mathrm{in} < m_\mathrm{out}`, nats. Take the first near the mean energy of the data under the
        classifier as it is, and the second above that of the foreign rows.
    weight
        :math:`\lambda`, 0 or more.

    Raises
    ------
    ArgumentTypeError, ShapeError
        If the foreign rows are no tensor, or there are none.
    OptionError
        If the bounds are not finite or not in this order, or the weight is negative.
    """

    outside: Tensor

    def __init__(self, outside: Tensor, inside_bound: float, outside_bound: float, weight: float = 0.1) -> None:
        super().__init__()
        if not isinstance(outside, Tensor):
            raise ArgumentTypeError(f"outside is a tensor of foreign rows (m, *event); got {type(outside).__name__}.")
        if outside.ndim < 2 or len(outside) == 0:
            raise ShapeError(f"outside holds foreign rows (m, *event), m at least 1; got {tuple(outside.shape)}.")
        if not (math.isfinite(inside_bound) and math.isfinite(outside_bound) and inside_bound < outside_bound):
            raise OptionError(
                f"Rows of the data are pushed below inside_bound and foreign ones above outside_bound, the larger; got "
                f"{inside_bound} and {outside_bound}."
            )
        if not 0.0 <= weight < math.inf:
            raise OptionError(f"weight is 0 or a positive number; got {weight}.")
        self.register_buffer("outside", outside, persistent=False)
        self.inside_bound, self.outside_bound = float(inside_bound), float(outside_bound)
        self.weight = float(weight)
        self._looked = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Classify the labelled rows, and bound the energies of the batch and of as many foreign rows, drawn anew.

        Raises
        ------
        ArgumentTypeError, OptionError, ShapeError, DataError
            As of `JointEnergyModel`, or if foreign rows have another shape than those of the data.
        DomainError
            If the classifier returns probabilities instead of logits; looked at in the first call.
        """
        classifier = classifier_of(energy)
        y = check_labels(batch, classifier.classes)
        if self.outside.shape[1:] != batch.x.shape[1:]:
            raise ShapeError(
                f"Foreign rows have the shape of those of the data, {tuple(batch.x.shape[1:])}; got "
                f"{tuple(self.outside.shape[1:])}."
            )
        logits = classifier.logits(batch.x)
        if not self._looked:
            check_logits(logits)
            self._looked = True
        picked = torch.randint(len(self.outside), (len(batch),), generator=rng, device=rng.device)
        foreign = self.outside[picked.to(self.outside.device)].to(batch.x)
        inside = check_one_per_row(energy(batch.x), len(batch))
        outside = check_one_per_row(energy(foreign), len(foreign))
        low, high = relu(inside - self.inside_bound), relu(self.outside_bound - outside)
        hinges = low.square().mean() + high.square().mean()
        each = cross_entropy(logits, y, ignore_index=UNLABELLED, reduction="none")
        labelled = (y != UNLABELLED).sum()
        entropy = each.sum() / labelled.clamp(min=1)
        metrics = {
            "cross_entropy": entropy.detach(),
            "class_accuracy": (logits.detach().argmax(1) == y).sum() / labelled,
            "energy_data": inside.detach().mean(),
            "energy_outside": outside.detach().mean(),
            "outside_bounds": torch.cat((low, high)).detach().gt(0).to(inside.dtype).mean(),
        }
        return Loss(entropy + self.weight * hinges, metrics)

    def extra_repr(self) -> str:
        """The bounds and the weight."""
        return f"{self.inside_bound:g}, {self.outside_bound:g}, weight={self.weight:g}"
