"""Labels of rows: whole numbers from 0, and the vectors by which a network is told of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError

WIDTH = 32
"""Numbers by which a network is told of a label, as many as of a noise level."""


class LabelEmbedding(nn.Module):
    """A learned vector for each label: ``(n,)`` of whole numbers to ``(n, width)``.

    Parameters
    ----------
    classes
        How many labels there are, from 0; one more than there are classes where one label stands for none.
    width
        Of the vectors.

    Raises
    ------
    OptionError
        If there are fewer than 2 labels.
    """

    def __init__(self, classes: int, width: int = WIDTH) -> None:
        super().__init__()
        if not isinstance(classes, int) or classes < 2:
            raise OptionError(
                f"classes counts the labels that are told apart, 2 or more; got {classes!r}. Leave it out for an "
                "energy without labels."
            )
        self.classes = classes
        self.vectors = nn.Embedding(classes, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Look up the vector of each row's label.

        Raises
        ------
        ShapeError
            If there is not one label per row.
        ArgumentTypeError
            If labels are no whole numbers.
        OptionError
            With labels that are not told apart here; on the CPU, as looking elsewhere would wait for the device.
        """
        if labels.ndim != 1:
            raise ShapeError(f"Each row has one label, (n,); got {tuple(labels.shape)}. One-hot rows: .argmax(1).")
        # A compiled graph cannot look at values.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, None, self.classes)
        return self.vectors(labels.long())

    def extra_repr(self) -> str:
        """How many labels."""
        return f"classes={self.classes}"


def check_labels(labels: Tensor, none: int | None, classes: int) -> None:
    """Refuse labels that are not among the classes.

    Parameters
    ----------
    labels
        Whole numbers of any shape.
    none
        The label that stands for none, which is let through, or ``None``.
    classes
        How many classes there are, from 0.

    Raises
    ------
    ArgumentTypeError
        If they are no whole numbers.
    OptionError
        With the labels that are no classes.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ArgumentTypeError(f"Labels are whole numbers; got {labels.dtype}.")
    strange = (labels < 0) | (labels >= classes)
    if none is not None:
        strange &= labels != none
    if bool(strange.any()):
        found = ", ".join(str(v) for v in labels[strange].unique().tolist()[:5])
        empty = "" if none is None else f", and {none} stands for none"
        raise OptionError(
            f"Labels were seen from 0 to {classes - 1}{empty}; got {found}. A model says nothing of a class that it "
            "has not seen."
        )
