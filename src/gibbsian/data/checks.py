"""What makes data unfit to learn from, each with a message that says where it is and what to do.

Nothing is repaired here: a missing value that is filled or a row that is dropped changes the density to be learned, and
that is for the owner of the data to decide.
"""

from __future__ import annotations

import numpy as np

from gibbsian.data.dataset import Kind
from gibbsian.data.raw import count, listed, named, opening
from gibbsian.errors import DataError, OptionError

FEW_VALUES = 20
"""A column of at most this many distinct values is remarked upon: a density of real numbers has no steps."""


def as_numbers(x: np.ndarray, place: str, columns: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """Make an array real: booleans become 0 and 1, complex columns two real ones.

    Parameters
    ----------
    x
        Any array.
    place
        How messages name it.
    columns
        Names of its columns, or empty.

    Returns
    -------
    The array, integer or floating point; the names of its columns; notes on what was done.

    Raises
    ------
    DataError
        If the array holds objects, text or dates.
    """
    if x.dtype.kind in "iuf":
        return x, columns, []
    if x.dtype.kind == "b":
        return x.astype(np.uint8), columns, []
    if x.dtype.kind != "c":
        raise DataError(_not_numbers(x, place))
    real, imaginary = np.real(x), np.imag(x)
    if not imaginary.any():
        return real, columns, [f"{opening(place)} is complex with no imaginary part; the real part was kept."]
    if x.ndim > 2:
        raise DataError(
            f"{opening(place)} holds complex numbers of shape {x.shape}; pictures have real channels. Stack the two "
            "parts as channels: numpy.stack([x.real, x.imag], axis=1)."
        )
    names = named(columns, x[0].size)
    return (
        np.stack([real, imaginary], axis=-1).reshape(len(x), -1),
        tuple(f"{part}({name})" for name in names for part in ("re", "im")),
        [f"Each complex column of {place} became two, its real and its imaginary part."],
    )


def _not_numbers(x: np.ndarray, place: str) -> str:
    what, remedy = {
        "O": (
            "Python objects",
            "If every row has the same length, make it one array with numpy.asarray(rows, dtype=float); rows of "
            "different lengths must be cut or padded first.",
        ),
        "M": ("dates", "Turn them into a number of seconds: x.astype('datetime64[s]').astype(float)."),
        "m": ("time differences", "Turn them into a number of seconds: x / numpy.timedelta64(1, 's')."),
    }.get(x.dtype.kind, (f"values of type {x.dtype}", ""))
    if x.dtype.kind in "UST":
        what, remedy = "text", "Turn it into numbers; x.astype(float) does so if every text is a number."
    first = f" (the first is {str(x.flat[0])[:40]!r})" if x.size else ""
    return f"{opening(place)} holds {what}{first}, not numbers. {remedy}"


def as_rows(x: np.ndarray, place: str) -> tuple[np.ndarray, list[str]]:
    """Give an array the axes of a data set: ``(n, d)`` for tables, ``(n, channels, height, width)`` for pictures.

    Raises
    ------
    DataError
        If it has no rows, or axes that mean neither.
    """
    if x.ndim in (0, 1) and x.size < 2:
        raise DataError(
            f"{opening(place)} holds {count(x.size, 'number')}; a data set is an array with one row per example."
        )
    if x.size == 0:
        raise DataError(
            f"{opening(place)} has shape {x.shape}, so there is nothing in it. Was it saved before it was filled?"
        )
    if x.ndim == 1:
        return x[:, None], [f"{opening(place)} is a plain list of numbers and was read as one column."]
    if x.ndim == 2:
        return x, []
    if x.ndim == 3:
        return x[:, None], []
    if x.ndim > 4:
        raise DataError(
            f"{opening(place)} has {x.ndim} axes, shape {x.shape}. Tables have two (rows, columns) and pictures three "
            "or four (rows, channels, height, width). Flatten the rows with x.reshape(len(x), -1) to learn them as a "
            "table."
        )
    first, last = x.shape[1] in (1, 2, 3, 4), x.shape[3] in (1, 2, 3, 4)
    if last and not first:
        return np.moveaxis(x, 3, 1), [
            f"{opening(place)} has its channels last, shape {x.shape}; they were moved to the front."
        ]
    if last and first:
        return x, [f"{opening(place)} of shape {x.shape} was read as (rows, channels, height, width)."]
    return x, []


def kind_of(x: np.ndarray, wanted: Kind | None, place: str) -> Kind:
    """Tell tables, pictures and binary data apart.

    Raises
    ------
    OptionError
        If the data cannot be of the kind that was asked for.
    """
    low, high = x.min(), x.max()
    binary = low >= 0 and high <= 1 and bool(((x == 0) | (x == 1)).all()) and low < high
    if wanted is None:
        return "binary" if binary else "table" if x.ndim == 2 else "image"
    if wanted not in ("image", "table", "binary"):
        raise OptionError(f"The kinds of data are image, table and binary; got {wanted!r}.")
    if wanted == "binary" and not binary:
        raise OptionError(
            f"Binary data hold both 0 and 1 and nothing else; {place} runs from {low:g} to {high:g}. "
            "Threshold it, as (x > 0.5), or on the way in, by binarise=0.5 (--binarise 0.5); or leave the kind out."
        )
    if x.ndim != {"image": 4, "table": 2}.get(wanted, x.ndim):
        remedy = "x.reshape(n, channels, height, width)" if wanted == "image" else "x.reshape(n, -1)"
        raise OptionError(f"Rows of {place} have shape {x.shape[1:]}, which is no {wanted}. Reshape it: {remedy}.")
    return wanted


def check_finite(x: np.ndarray, place: str, columns: tuple[str, ...] = ()) -> None:
    """Refuse missing values and infinities.

    Raises
    ------
    DataError
        With how many there are, in which columns and rows, where the first is, and what to do.
    """
    if x.dtype.kind != "f" or np.isfinite(x).all():
        return
    bad = ~np.isfinite(x)
    missing = int(np.isnan(x).sum())
    infinite = int(bad.sum()) - missing
    found = " and ".join(
        text
        for n, text in (
            (missing, f"{count(missing, 'missing value')} (NaN)"),
            (infinite, f"{count(infinite, 'infinite value')}"),
        )
        if n
    )
    rows = np.flatnonzero(bad.reshape(len(x), -1).any(1))
    first = tuple(np.argwhere(bad)[0])
    if x.ndim == 2:
        names = named(columns, x.shape[1])
        per_column = [f"{names[i]} ({n})" for i, n in enumerate(bad.sum(0)) if n]
        where = f"Columns: {listed(per_column)}. The first is in row {first[0] + 1}, column {names[first[1]]}."
    else:
        where = f"The first is in picture {first[0] + 1}, at channel, height, width {tuple(int(i) for i in first[1:])}."
    remedy = "with pandas, frame.dropna() drops the rows and frame.fillna(frame.median()) fills the gaps"
    if infinite:
        remedy += "; find out where the infinities come from (a division by zero, a logarithm of zero)"
    if x.ndim > 2:
        remedy = "leave those pictures out, or fill the gaps before saving"
    raise DataError(
        f"{opening(place)} has {found}, in {len(rows)} of {count(len(x), 'row')}. {where} A density cannot be learned "
        f"from them, and whether to drop or fill them is yours to decide: {remedy}. Rows count from 1, without the "
        "header."
    )


def check_rows(n: int, place: str) -> None:
    """Refuse data too few to be split.

    Raises
    ------
    DataError
        If there are fewer than three rows.
    """
    if n < 3:
        raise DataError(
            f"{opening(place)} has {count(n, 'row')}. Each row is one example; a density needs dozens at least, and "
            "some are held out to judge it. If the examples stand in columns, transpose the table."
        )


def check_spread(x: np.ndarray, place: str, kind: Kind, columns: tuple[str, ...]) -> list[str]:
    """Refuse what does not vary, and remark upon what varies in steps.

    Raises
    ------
    DataError
        If a table's column, or the whole of the pictures, is constant; or if float32 could not tell a column's values
        apart.
    """
    if kind == "image" and x.min() == x.max():
        raise DataError(f"Every pixel of every picture in {place} is {x.flat[0]:g}; there is nothing to learn.")
    if kind == "image":
        return []
    x = x.reshape(len(x), -1)
    names = named(columns, x.shape[1])
    constant = [f"{names[i]} (always {x[0, i]:g})" for i in np.flatnonzero((x == x[:1]).all(0))]
    if kind == "binary":
        return (
            [f"{opening(place)} has {count(len(constant), 'bit')} that never vary: {listed(constant)}."]
            if constant
            else []
        )
    if constant:
        raise DataError(
            f"{opening(place)} has {count(len(constant), 'column')} without any variation: {listed(constant)}. "
            "There is no density to learn in a constant; drop it from the table."
        )
    _check_precision(x, place, names)
    steps = [f"{names[i]} ({k})" for i in range(x.shape[1]) if (k := _distinct(x[:, i])) <= FEW_VALUES < len(x) / 2]
    few = f"{count(len(steps), 'column')} of {place} with few distinct values, read as real numbers: {listed(steps)}."
    return [few] if steps else []


def _distinct(column: np.ndarray) -> int:
    # A long column that shows more values than remarked upon in its first rows need not be sorted whole.
    head = len(np.unique(column[:1000]))
    return head if head > FEW_VALUES else len(np.unique(column))


def _check_precision(x: np.ndarray, place: str, names: tuple[str, ...]) -> None:
    """Refuse columns whose offset would swallow their spread in single precision."""
    x = x.astype(np.float64)
    largest = np.abs(x).max(0)
    deviation = (x / np.maximum(largest, 1.0)).std(0) * np.maximum(largest, 1.0)
    single = np.finfo(np.float32)
    blurred = (largest * single.eps > 0.01 * deviation) | (largest > single.max) | (deviation < single.tiny)
    if blurred.any():
        i = int(np.flatnonzero(blurred)[0])
        raise DataError(
            f"Column {names[i]} of {place} reaches {largest[i]:g} and spreads by {deviation[i]:g}: single precision, "
            "which models compute in, cannot tell its values apart. Subtract its mean or first value, or divide it by "
            "a suitable unit, before loading."
        )


def check_parts(x: np.ndarray, parts: dict[str, np.ndarray | None], kind: Kind, place: str) -> None:
    """Refuse a held-out part of another shape, or with other values than zero and one beside binary data.

    Raises
    ------
    DataError
        With the part and what differs.
    """
    for name, part in parts.items():
        if part is None:
            continue
        called = f"the {name.replace('_', '-')} part of {place}"
        if part.shape[1:] != x.shape[1:]:
            raise DataError(f"The rows of {called} have shape {part.shape[1:]}; those to train on have {x.shape[1:]}.")
        if kind == "binary" and not ((part == 0) | (part == 1)).all():
            raise DataError(
                f"The rows to train on are zeros and ones, but {called} reaches from {part.min():g} to "
                f"{part.max():g}. Threshold both alike, or ask for kind='table'."
            )


def pixel_range(
    x: np.ndarray, dtype: np.dtype, known: tuple[float, float] | None, place: str
) -> tuple[tuple[float, float], list[str]]:
    """Find the lowest and highest value that a pixel can have: known, told by the type, or seen in the data.

    Parameters
    ----------
    x
        Pictures.
    dtype
        Of the file, before any conversion.
    known
        The range where the source states it.
    place
        How messages name the data.

    Returns
    -------
    The range, and a note where it was read off the data.
    """
    low, high = float(x.min()), float(x.max())
    if known is not None:
        return known, []
    full = 1.0 if dtype == np.bool_ else float(np.iinfo(dtype).max) if dtype in (np.uint8, np.uint16) else None
    if full is not None and high > full / 2:
        return (0.0, full), []
    if full is None and high > 0.5:
        # Floating-point pictures are customarily kept in one of these ranges.
        for usual in ((0.0, 1.0), (-1.0, 1.0)):
            if usual[0] <= low and high <= usual[1]:
                return usual, []
    if dtype.kind in "iu" and low >= 0:
        low = 0.0
    return (low, high), [f"Pixels of {place} run from {low:g} to {high:g}, which is taken for their whole range."]
