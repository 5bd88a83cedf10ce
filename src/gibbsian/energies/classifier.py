r"""A classifier read as an energy.

The logits :math:`f(x) \in \mathbb{R}^K` of a classifier are, up to one constant, the logarithm of a joint density of
points and classes. Its energy, and those of its two marginals' factors, are

.. math:: E(x, y) = -f(x)_y, \qquad E(x) = -\log \sum_y e^{f(x)_y}, \qquad
          \log p(y \mid x) = f(x)_y - \log \sum_k e^{f(x)_k},

so that :math:`E(x, y) = E(x) - \log p(y \mid x)`. A number added to all logits of a point changes its density and no
class probability: it is what a classifier leaves open, and an energy-based model learns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gibbsian.energies.base import Combination, Energy, formula
from gibbsian.energies.neural import select
from gibbsian.energies.tractable import shape_of
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError

SIGMOID_ROWS = 8
"""Fewer rows may lie between 0 and 1 by chance."""


class ClassifierEnergy(Energy):
    r"""The energy of points under a classifier: :math:`E(x) = -\log \sum_y e^{f(x)_y}`.

    `Your classifier is secretly an energy based model and you should treat it like one (Grathwohl et al., 2020)
    <https://arxiv.org/abs/1912.03263>`_.

    Parameters
    ----------
    net
        From points ``(n, *event)`` to logits ``(n, K)``, to an object that holds them as ``logits``, or to a tuple with
        no other table of n lines: any module, or one of the library's networks made with ``classes=K``, as ``MLP(2,
        classes=3)``.
    classes
        K, 2 or more.
    event_shape
        Size or shape of one point; that of ``net`` where it tells one, else any.

    Raises
    ------
    OptionError
        If there are fewer than two classes.
    ArgumentTypeError
        If ``net`` cannot be called.
    """

    def __init__(
        self, net: nn.Module | Callable[[Tensor], Tensor], classes: int, event_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(classes, int) or classes < 2:
            raise OptionError(
                f"A classifier tells 2 classes or more apart; got classes={classes!r}. A network with one output is an "
                "energy as it is."
            )
        if not callable(net):
            raise ArgumentTypeError(f"A classifier is a module from (n, *event) to logits (n, {classes}); got {net!r}.")
        self.net = net
        self.classes = classes
        told = net.event_shape if isinstance(net, Energy) else None
        self.event_shape = told if event_shape is None else shape_of(event_shape)

    def logits(self, x: Tensor) -> Tensor:
        """The classifier's outputs: ``(n, *event) -> (n, K)``.

        Raises
        ------
        ShapeError
            If the network's output is of another shape.
        """
        values = outputs_of(self.net, x)
        if not isinstance(values, Tensor) or tuple(values.shape) != (x.shape[0], self.classes):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(
                f"The logits of {x.shape[0]} points and {self.classes} classes have shape ({x.shape[0]}, "
                f"{self.classes}); the network returned {found}. Give its last layer {self.classes} outputs, or say "
                "classes=..."
            )
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row, of any class: ``(n, *event) -> (n,)``."""
        return -torch.logsumexp(self.logits(x), 1)

    def log_class_probs(self, x: Tensor) -> Tensor:
        r"""Logarithms of :math:`p(y \mid x)` for all classes: ``(n, *event) -> (n, K)``."""
        return torch.log_softmax(self.logits(x), 1)

    @property
    def joint(self) -> ClassEnergy:
        """The energy of points and classes, with the context ``y``; it shares the network."""
        return ClassEnergy(self)

    def extra_repr(self) -> str:
        """The network's kind and the number of classes."""
        return f"{type(self.net).__name__}, classes={self.classes}"


class ClassEnergy(Energy):
    r"""The energy of points and classes under a classifier, :math:`E(x, y) = -f(x)_y`: see `ClassifierEnergy.joint`.

    With a class fixed, as ``classifier.joint.given(y=3)``, it is the energy of :math:`p(x \mid y)`.

    Parameters
    ----------
    energy
        The classifier.
    """

    context = ("y",)

    def __init__(self, energy: ClassifierEnergy) -> None:
        super().__init__()
        self.energy = energy
        self.event_shape = energy.event_shape

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Energy of each row with its class: ``(n, *event)`` and ``(n,)`` to ``(n,)``."""
        return select(self.energy.logits(x), y)

    def extra_repr(self) -> str:
        """The classifier."""
        return formula(self.energy)


def outputs_of(net: nn.Module | Callable[..., Any], x: Tensor) -> Any:
    """Call a classifier, and take the logits out of what it returns.

    They are the tensor itself, the attribute or the entry ``logits``, or of a tuple the one table with a line per row:
    of two it would have to be guessed which one holds features.
    """
    # The library's networks are energies, which pick one of their outputs; here all are wanted. Another module's
    # "outputs" may be anything, such as its last layer.
    all_outputs = getattr(net, "outputs", net) if isinstance(net, Energy) else net
    values = all_outputs(x)
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping) and "logits" in values:
        return values["logits"]
    if hasattr(values, "logits") or not isinstance(values, tuple):
        return getattr(values, "logits", values)
    tables = [v for v in values if isinstance(v, Tensor) and v.ndim == 2 and len(v) == len(x)]
    return tables[0] if len(tables) == 1 else values


def check_logits(values: Tensor) -> None:
    r"""Refuse outputs that are class probabilities or their logarithms, and no logits.

    Normalisation takes from a point's logits the number common to all of them, which is its energy: that of
    log-probabilities is 0, and that of probabilities lies between :math:`-\log (K - 1 + e)` and :math:`-\log K - 1/K`.

    Parameters
    ----------
    values
        A classifier's outputs at some points, ``(n, K)``.

    Raises
    ------
    DomainError
        If all rows are non-negative and sum to one, or, of two rows or more, all are logarithms of such, or, of eight
        rows or more, all numbers lie between 0 and 1 and on both sides of one half, as those of a trained sigmoid do.
    """
    if not values.is_floating_point():
        return
    found, sums = values.detach().double(), None
    # Outputs in double precision may have been normalised in single.
    loose = max(torch.finfo(values.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    if bool((found >= 0).all()):
        sums = found.sum(1)
    elif len(found) > 1 and bool((found <= 0).all()):
        sums = found.exp().sum(1)
    if sums is not None and bool(((sums - 1.0).abs() <= loose).all()):
        kind, end = ("probabilities", "softmax") if bool((found >= 0).all()) else ("log-probabilities", "log_softmax")
        raise DomainError(
            f"The classifier returns {kind}: all {len(found)} rows {'' if end == 'softmax' else 'of exponentials '}sum "
            f"to 1. Their energy says nothing, as the normalisation has taken it away. Pass the classifier without its "
            f"{end}, so that it returns logits."
        )
    # A network that has learned nothing may have small logits of one sign, but not near 1 and near 0.
    if len(found) >= SIGMOID_ROWS and bool(((found >= 0) & (found <= 1)).all()) and found.min() < 0.5 < found.max():
        raise DomainError(
            f"The classifier returns numbers between 0 and 1 at all {len(found)} rows, as a sigmoid gives: these are "
            "probabilities, whose energy is bounded on both sides. Pass the classifier without its sigmoid, so that it "
            "returns logits."
        )


def classifier_of(energy: Energy) -> ClassifierEnergy:
    """Find the one classifier in an energy whose class probabilities are that classifier's.

    Those are a `ClassifierEnergy`, and a sum of one, with weight 1, and of energies of points alone.

    Raises
    ------
    ArgumentTypeError
        If there is none.
    """
    terms = energy.terms if isinstance(energy, Combination) else [(1.0, energy)]
    found = [
        term
        for weight, term in terms
        if isinstance(term, ClassifierEnergy) and isinstance(weight, float) and weight == 1.0
    ]
    inside = sum(isinstance(part, ClassifierEnergy) for part in energy.modules())
    if len(found) != 1 or inside != 1:
        raise ArgumentTypeError(
            f"Labels are learned by one ClassifierEnergy(net, classes), alone or in a sum with weight 1, as "
            f"ClassifierEnergy(net, 10) + Gaussian(64); got {energy!r}. An energy of points given labels, as "
            "MLP(2, classes=10), is fitted by any objective with labels in the batch."
        )
    return found[0]
