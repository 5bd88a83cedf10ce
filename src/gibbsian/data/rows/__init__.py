"""Rows that stay on the disk: opened without reading them, and read in a shuffled order while a model is trained."""

from gibbsian.data.rows.opening import open_rows
from gibbsian.data.rows.reading import stream
from gibbsian.data.rows.rows import Rows

__all__ = ["Rows", "open_rows", "stream"]
