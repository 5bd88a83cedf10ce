"""What `load` returns: a data set ready to be learned from, still in its own units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from gibbsian.data.scaling import Scaling, identity_scaling, range_scaling, standard_scaling
from gibbsian.energies.base import Energy

Kind: TypeAlias = Literal["image", "table", "binary"]
"""What the rows are: pictures, rows of real numbers, or zeros and ones of any shape."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to learn from and rows held out, as float32 tensors in the units of the file.

    Attributes
    ----------
    name
        The built-in name, or the file's without its ending.
    kind
        ``"image"`` for ``(n, channels, height, width)``, ``"table"`` for ``(n, columns)`` of real numbers, ``"binary"``
        for zeros and ones of any shape.
    train, held_out
        Rows, ``(n, *event)``. ``held_out`` may have none.
    source
        Where the rows came from.
    split
        How the held-out rows were chosen, in words.
    labels, held_out_labels
        Class of each row as int64 ``(n,)``, counted from 0, or ``None``.
    label_names
        What each class is called.
    columns
        The names of a table's columns, or empty.
    value_range
        The lowest and highest value that a picture's pixel can have, or ``None``.
    valid
        The validation rows of a file that brings its own, else ``None``.
    threshold
        The value above which grey values were read as ones, when they were, in the units of the source.
    truth
        The energy that the rows were drawn from, when the set is generated.
    notes
        What was decided or converted on the way in, one sentence each.
    """

    name: str
    kind: Kind
    train: Tensor
    held_out: Tensor
    source: str
    split: str
    labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    label_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    valid: Tensor | None = None
    threshold: float | None = None
    truth: Energy | None = None
    notes: tuple[str, ...] = ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(self.train.shape[1:])

    def scaling(self) -> Scaling:
        """Build the way to model units that suits the kind, from the training rows alone.

        Raises
        ------
        DataError
            If a table's column is constant.
        """
        if self.kind == "table":
            return standard_scaling(self.train, self.columns)
        if self.kind == "image" and self.value_range is not None:
            return range_scaling(*self.value_range, self.event_shape)
        return identity_scaling(self.event_shape)

    def __repr__(self) -> str:
        """Name, kind, sizes and shape."""
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        return (
            f"Dataset({self.name}: {self.kind}, {self.train.shape[0]} training and {self.held_out.shape[0]} held-out "
            f"rows of {self.event_shape}{classes}, from {self.source})"
        )
