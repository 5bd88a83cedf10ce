"""Data: names, files, folders and arrays become rows to learn from, in their own units, checked and split."""

from gibbsian.data.catalogue import DatasetInfo, datasets
from gibbsian.data.dataset import Dataset
from gibbsian.data.loading import load
from gibbsian.data.rows import Rows, open_rows
from gibbsian.data.scaling import Scaling

__all__ = ["Dataset", "DatasetInfo", "Rows", "Scaling", "datasets", "load", "open_rows"]
