r"""Scores of foreign rows from any classifier that gives logits :math:`f(x) \in \mathbb{R}^K`.

==================  ========================================================  ================================
score               formula                                                   reads the logits as
==================  ========================================================  ================================
`LogSumExp`         :math:`-T \log \sum_y e^{f(x)_y / T}`                     an energy of points
`JointEnergy`       :math:`\min_y E(x, y)`                                    an energy of points and classes
`MaxProbability`    :math:`-\log \max_y p(y \mid x)`                          probabilities of the classes
==================  ========================================================  ================================

The classifier is a plain module that returns logits, one that returns an object with ``logits`` or a tuple with one
table of them, or a `ClassifierEnergy`. `GradientNorm` of a `ClassifierEnergy` is the approximate mass of joint energy
models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gibbsian.detection.base import check_scored, in_parts
from gibbsian.energies.base import Energy
from gibbsian.energies.classifier import ClassifierEnergy, check_logits, classifier_of, outputs_of
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError, unknown_name

Classifier = nn.Module | Callable[[Tensor], Any]


@torch.no_grad()
def logits(net: Classifier, x: Tensor) -> Tensor:
    """Logits of rows by any classifier, ``(n, *event) -> (n, K)``, without gradients and in parts.

    Raises
    ------
    ShapeError
        If the classifier returns anything but two or more numbers per row.
    DomainError
        If it returns probabilities or their logarithms.
    """

    def some(part: Tensor) -> Tensor:
        values = net.logits(part) if isinstance(net, ClassifierEnergy) else outputs_of(net, part)
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(part) or values.shape[1] < 2:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(
                f"A classifier returns logits ({len(part)}, K) of {len(part)} rows, K at least 2, or an object that "
                f"holds them as .logits, or a tuple with this one table; got {found}. Wrap it in a function that "
                "returns the logits."
            )
        return values

    values = in_parts(some, x)
    check_logits(values)
    return values


@dataclass(frozen=True)
class LogSumExp:
    r"""The energy of a classifier's logits at a temperature, :math:`-T \log \sum_y e^{f(x)_y / T}`.

    `Energy-based Out-of-distribution Detection (Liu et al., 2020) <https://arxiv.org/abs/2010.03759>`_. Training by
    cross-entropy alone does not determine it; `gibbsian.objectives.energy_bounded.EnergyBounded` does.

    Parameters
    ----------
    net
        The classifier.
    temperature
        T, positive. High ones approach the mean logit, low ones the largest.

    Raises
    ------
    OptionError
        If the temperature is not positive and finite.
    ArgumentTypeError, InputError
        If the classifier cannot be called, or is in training mode.
    """

    net: Classifier
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise OptionError(f"temperature is a positive number, usually 1; got {self.temperature}.")
        check_scored(self.net, "net")

    def __call__(self, x: Tensor) -> Tensor:
        """Energies, ``(n, *event) -> (n,)``."""
        return -self.temperature * torch.logsumexp(logits(self.net, x) / self.temperature, 1)


@dataclass(frozen=True)
class JointEnergy:
    r"""The lowest energy of a row with any class, :math:`\min_y E(x, y) = E(x) - \max_y \log p(y \mid x)`.

    The joint energy of `Your classifier is secretly an energy based model and you should treat it like one (Grathwohl
    et al., 2020) <https://arxiv.org/abs/1912.03263>`_. Of a bare classifier it is minus the largest logit; the other
    terms of a sum, which are energies of points alone, are added.

    Parameters
    ----------
    energy
        A `ClassifierEnergy`, or a sum of one with energies of points.

    Raises
    ------
    ArgumentTypeError, InputError
        If there is no classifier in it, or it is in training mode.
    """

    energy: Energy

    def __post_init__(self) -> None:
        if not isinstance(self.energy, Energy):
            raise ArgumentTypeError(f"A joint energy is a ClassifierEnergy(net, classes); got {self.energy!r}.")
        classifier_of(self.energy)
        check_scored(self.energy, "energy")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Energies, ``(n, *event) -> (n,)``."""
        classifier = classifier_of(self.energy)
        found = logits(classifier, x)
        return in_parts(self.energy, x) - found.amax(1) + found.logsumexp(1)


@dataclass(frozen=True)
class MaxProbability:
    r"""Minus the logarithm of the largest class probability: the baseline that other scores are held against.

    `A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks (Hendrycks & Gimpel,
    2017) <https://arxiv.org/abs/1610.02136>`_.

    Parameters
    ----------
    net
        The classifier.

    Raises
    ------
    ArgumentTypeError, InputError
        If it cannot be called, or is in training mode.
    """

    net: Classifier

    def __post_init__(self) -> None:
        check_scored(self.net, "net")

    def __call__(self, x: Tensor) -> Tensor:
        """Minus log-probabilities, ``(n, *event) -> (n,)``, from 0 to log K."""
        # In double precision rows of which the classifier is sure keep their order.
        return -torch.log_softmax(logits(self.net, x).double(), 1).amax(1)


@dataclass(frozen=True)
class LayerFeatures:
    """What a layer of a network gives out, read as a vector per row: features for distances.

    Parameters
    ----------
    net
        Any module.
    layer
        The layer's name, as in ``net.named_modules()``.

    Raises
    ------
    OptionError
        If the network has no such layer.
    ArgumentTypeError, InputError
        If it is no module, or is in training mode.
    """

    net: nn.Module
    layer: str

    def __post_init__(self) -> None:
        if not isinstance(self.net, nn.Module):
            raise ArgumentTypeError(f"Layers are those of a torch.nn.Module; got {self.net!r}.")
        check_scored(self.net, "net")
        names = dict(self.net.named_modules())
        if self.layer not in names:
            raise unknown_name("layer", self.layer, (name for name in names if name))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of the layer, ``(n, *event) -> (n, d)``.

        Raises
        ------
        ShapeError
            If the layer is not used, or gives out anything but a tensor with one entry per row.
        """
        return in_parts(self._outputs, x)

    def _outputs(self, x: Tensor) -> Tensor:
        seen: list[Any] = []
        hook = self.net.get_submodule(self.layer).register_forward_hook(lambda _m, _i, output: seen.append(output))
        try:
            self.net(x)
        finally:
            hook.remove()
        if not seen or not isinstance(seen[-1], Tensor) or seen[-1].ndim < 1 or len(seen[-1]) != len(x):
            found = "nothing" if not seen else str(getattr(seen[-1], "shape", type(seen[-1]).__name__))
            raise ShapeError(
                f"The layer {self.layer!r} should give a tensor with one entry for each of {len(x)} rows; it gave "
                f"{found}. Name another layer."
            )
        return seen[-1].reshape(len(x), -1)
