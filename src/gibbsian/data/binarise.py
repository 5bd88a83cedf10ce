"""Grey values to bits, at a threshold that is told and kept, so that what is scored later is read alike."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gibbsian.data.dataset import Dataset
from gibbsian.data.raw import count
from gibbsian.errors import DataError, OptionError

HALF = 0.5
"""The part of the range at which pictures become bits where nothing else is said."""


def binarised(dataset: Dataset, part: float = HALF) -> Dataset:
    """Read values above a part of their range as ones and the others as zeros; a data set of bits stays as it is.

    Parameters
    ----------
    dataset
        Of pictures, whose range is known, or a table of values between 0 and 1.
    part
        Strictly between 0 and 1: 0.5 is half-way between the lowest and the highest value that a pixel can have.

    Returns
    -------
    Dataset
        Of the kind ``"binary"``, with the threshold, and a note that states it.

    Raises
    ------
    OptionError
        If the part is not between 0 and 1.
    DataError
        If a table has other values than from 0 to 1, or all bits come out alike.
    """
    if not 0.0 < part < 1.0:
        raise OptionError(f"binarise is a part of the range of values, between 0 and 1; got {part}.")
    if dataset.kind == "binary":
        return dataset
    low, high = dataset.value_range if dataset.value_range is not None else _unit_range(dataset)
    threshold = low + part * (high - low)
    parts = {name: rows for name in ("train", "held_out", "valid") if (rows := getattr(dataset, name)) is not None}
    bits = {name: as_bits(rows, threshold) for name, rows in parts.items()}
    train = bits["train"]
    if bool((train == train.flatten()[0]).all()):
        raise DataError(
            f"No value of {dataset.name} is {'above' if float(train.max()) == 0 else 'below'} {threshold:g}: all bits "
            f"would be alike. Choose another part of the range than {part:g}."
        )
    what = "Pixels" if dataset.kind == "image" else "Values"
    told = (
        f"{what} above {threshold:g}, {part:g} of the way from {low:g} to {high:g}, are read as ones, others as zeros."
    )
    fixed = int((train == train[:1]).all(0).sum())
    if fixed:
        told += f" {count(fixed, 'bit')} of {train[0].numel()} never {'varies' if fixed == 1 else 'vary'}."
    return dataclasses.replace(
        dataset, kind="binary", **bits, value_range=(0.0, 1.0), threshold=threshold, notes=(*dataset.notes, told)
    )


def as_bits(rows: Tensor, threshold: float) -> Tensor:
    """Ones where rows exceed the threshold, zeros elsewhere; rows that are bits already stay as they are."""
    if bool(((rows == 0) | (rows == 1)).all()):
        return rows
    return (rows > threshold).to(rows.dtype)


def _unit_range(dataset: Dataset) -> tuple[float, float]:
    rows = torch.cat([part for part in (dataset.train, dataset.held_out) if len(part)])
    low, high = float(rows.min()), float(rows.max())
    if low < 0.0 or high > 1.0:
        raise DataError(
            f"{dataset.name} runs from {low:g} to {high:g}; a table is binarised where its values lie between 0 and 1, "
            "since its columns have no common range otherwise. Scale or threshold the columns first."
        )
    return 0.0, 1.0
