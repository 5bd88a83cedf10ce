"""Folders of very many pictures: the names are read on opening, a picture when its turn comes."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gibbsian.data.images import SUFFIXES, read_picture
from gibbsian.data.raw import count
from gibbsian.data.rows.source import Blocks, Chunk, Source
from gibbsian.errors import DataError, OptionError

PER_BLOCK = 16
"""Neighbouring pictures that are read together."""

opened = read_picture


@dataclass(frozen=True, eq=False)
class Style:
    """What all pictures of a set have in common: channels first, and the type of their pixels.

    Attributes
    ----------
    shape
        ``(channels, height, width)``.
    dtype
        Of the pixels.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype

    @staticmethod
    def of(pictures: list[np.ndarray], place: str) -> Style:
        """Tell from some pictures ``(height, width, channels)``; colour if one of them has it."""
        if not pictures:
            raise DataError(f"{place} has no pictures.")
        first = pictures[0]
        types = {p.dtype for p in pictures}
        dtype = np.dtype(np.uint8) if types <= {np.dtype(np.uint8), np.dtype(bool)} and len(types) > 1 else first.dtype
        return Style((max(p.shape[2] for p in pictures), first.shape[0], first.shape[1]), dtype)

    def fit(self, picture: np.ndarray, called: str, place: str) -> np.ndarray:
        """Bring a picture to the style, ``(channels, height, width)``; grey ones to colour, never the other way.

        Raises
        ------
        DataError
            If its size, depth or channels do not allow it.
        """
        channels, height, width = self.shape
        h, w, c = picture.shape
        if (h, w) != (height, width):
            raise DataError(
                f"The picture {called} in {place} is {w} x {h}, the first ones are {width} x {height} (width x "
                "height). Scale or crop all to one size."
            )
        if picture.dtype == bool and self.dtype == np.uint8:
            picture = picture * np.uint8(255)
        if picture.dtype != self.dtype:
            raise DataError(
                f"The picture {called} in {place} has {picture.dtype} pixels, the first ones {self.dtype}. Save all "
                "alike."
            )
        if c > channels:
            raise DataError(
                f"The picture {called} in {place} is in colour, and those looked at when the data were opened are "
                "grey. Save all in one of the two."
            )
        return np.moveaxis(picture if c == channels else np.repeat(picture, channels, axis=2), 2, 0)


class PictureSource(Source):
    """The pictures in a folder; folders inside it are classes.

    Parameters
    ----------
    path
        The folder.

    Raises
    ------
    DataError
        If there are none, or one of those looked at cannot be read.
    """

    sampled_blocks = 512
    readers = 4

    def __init__(self, path: Path, labels: Any = None) -> None:
        if labels is not None:
            raise OptionError(
                "A folder of pictures that is read piece by piece has its classes in the names of the folders inside "
                "it; leave labels out."
            )
        import pyarrow as pa

        self.name, self.place, self.path = path.resolve().name, f"the folder {path.name}", path
        self.shards = ()
        names = sorted(_names(path))
        if not names:
            raise DataError(
                f"The folder {path} has neither pictures ({', '.join(SUFFIXES)}) nor .parquet, .arrow, .feather or "
                ".npy files."
            )
        tops = [name.split(os.sep, 1)[0] if os.sep in name else "" for name in names]
        found = sorted(set(tops))
        if "" in found and len(found) > 1:
            direct = tops.count("")
            raise DataError(
                f"Of the {len(names)} pictures in {path}, {direct} lie directly there and the others in folders "
                "inside it. Either put each class into a folder of its own, or all pictures into one."
            )
        if len(found) > 1:
            self.classes, self.labelled = tuple(found), True
            numbers = {name: i for i, name in enumerate(found)}
            self._labels = np.fromiter((numbers[top] for top in tops), np.int32, len(tops))
        # A million names as Python's strings would take a hundred megabytes.
        self._names = pa.array(names, pa.large_string())
        self._digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        some = np.unique(np.linspace(0, len(names) - 1, min(32, len(names))).astype(int))
        self.style = Style.of([read_picture(path / names[i], names[i], path) for i in some], self.place)
        self.event_shape, self.dtype = self.style.shape, self.style.dtype
        self.blocks = Blocks.cut([len(names)], PER_BLOCK)
        self.block_bytes = PER_BLOCK * self.row_bytes

    def read(self, block: int, start: int, stop: int) -> Chunk:
        """Read some pictures."""
        first = int(self.blocks.first[block])
        low, high = first + start, first + stop
        names = self._names.slice(low, high - low).to_pylist()
        rows = []
        for name in names:
            if not (self.path / name).exists():
                raise DataError(
                    f"The picture {name} was in {self.path} when the data were opened and is gone now. Put it back; a "
                    "run that was saved goes on with resume=True."
                )
            picture = read_picture(self.path / name, name, self.path)
            rows.append(self.style.fit(picture, name, str(self.path)))
        return np.stack(rows), self._labels[low:high] if self.labelled else None

    def labels(self, block: int) -> np.ndarray:
        """Classes of some pictures, as numbers."""
        first = int(self.blocks.first[block])
        return self._labels[first : first + int(self.blocks.rows[block])]

    def where(self, block: int, row: int = 0) -> tuple[str, int]:
        """Name a picture."""
        return self._names[int(self.blocks.first[block]) + row].as_py(), 1

    def marks(self) -> dict[str, str]:
        """How many there are, and a checksum of their names."""
        size = "x".join(map(str, self.event_shape))
        return {"data": f"{count(len(self._names), 'picture')} of {size} {self.dtype} #{self._digest}"}


def more_pictures(path: Path, most: int) -> bool:
    """Whether a folder and those inside it have more than so many pictures."""
    return next(itertools.islice(_names(path), most, None), None) is not None


def _names(path: Path) -> Any:
    """Names of the pictures from the folder on; hidden files and folders are passed over."""
    for folder, inside, files in os.walk(path):
        inside[:] = [name for name in inside if not name.startswith((".", "__"))]
        base = os.path.relpath(folder, path)
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith((".", "__")):
                yield name if base == "." else os.path.join(base, name)
