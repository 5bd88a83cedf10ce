"""A captured state as named tensors, and back: what distributed checkpoints store.

The tensors of a tree of dicts, lists and plain values get names by their place in it (``energy/mean``). The rest is
JSON, kept as the bytes of one more tensor, and small tensors, of which there are many, are the bytes of another, as
``torch.save`` writes them and ``torch.load(weights_only=True)`` reads them. So a checkpoint holds tensors only, and
reading one runs no code.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PLAIN = (bool, int, float, str, type(None))

SMALL = 4096
"""Bytes up to which a tensor is not worth an entry of its own, which takes a third of a millisecond."""


def packed(tree: Any, name: str) -> dict[str, Tensor]:
    """Take a tree apart.

    Parameters
    ----------
    tree
        Dicts, lists, tuples, tensors and plain values; anything else that ``torch.load(weights_only=True)`` reads.
    name
        Of the tree: its JSON goes under this name, its tensors under names that begin with it.

    Returns
    -------
    dict[str, Tensor]
        Tensors by name.
    """
    tensors: dict[str, Tensor] = {}
    small: list[Any] = []
    written = _written(tree, name, tensors, small)
    held = io.BytesIO()
    torch.save(small, held)
    return {name: _bytes(json.dumps(written).encode()), small_of(name): _bytes(held.getvalue()), **tensors}


def small_of(name: str) -> str:
    """Name what holds the small tensors of a tree."""
    return f"{name} (small)"


def tensor_names(written: Tensor) -> list[str]:
    """Name the tensors of a tree, but for the small ones, from its JSON."""
    return [part["tensor"] for part in _parts(json.loads(_raw(written))) if "tensor" in part]


def unpacked(name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree together again.

    Parameters
    ----------
    name
        Of the tree.
    tensors
        Its JSON and its tensors, by name.
    """
    small = torch.load(io.BytesIO(_raw(tensors[small_of(name)])), weights_only=True)
    return _read(json.loads(_raw(tensors[name])), tensors, small)


def _written(tree: Any, place: str, tensors: dict[str, Tensor], small: list[Any]) -> Any:
    if type(tree) in PLAIN:
        return tree
    if isinstance(tree, Tensor) and (isinstance(tree, DTensor) or tree.nbytes > SMALL):
        # A key may hold a stroke of its own and so meet another's name.
        while place in tensors:
            place += "'"
        tensors[place] = tree
        return {"tensor": place}
    if isinstance(tree, Mapping) and all(type(key) in (int, str) for key in tree):
        # Pairs, as the keys of optimisers and lanes are numbers, which JSON would make strings of.
        return {"dict": [[key, _written(value, f"{place}/{key}", tensors, small)] for key, value in tree.items()]}
    if type(tree) in (list, tuple):
        parts = [_written(value, f"{place}/{i}", tensors, small) for i, value in enumerate(tree)]
        return parts if type(tree) is list else {"tuple": parts}
    small.append(tree)
    return {"small": len(small) - 1}


def _read(written: Any, tensors: Mapping[str, Tensor], small: list[Any]) -> Any:
    if isinstance(written, list):
        return [_read(part, tensors, small) for part in written]
    if not isinstance(written, dict):
        return written
    if "dict" in written:
        return {key: _read(value, tensors, small) for key, value in written["dict"]}
    if "tuple" in written:
        return tuple(_read(part, tensors, small) for part in written["tuple"])
    return small[written["small"]] if "small" in written else tensors[written["tensor"]]


def _parts(written: Any) -> list[dict[str, Any]]:
    """List the objects of the JSON of a tree."""
    if isinstance(written, dict):
        inner = [value for _, value in written.get("dict", ())] + written.get("tuple", [])
        return [written, *_parts(inner)]
    return [found for part in written for found in _parts(part)] if isinstance(written, list) else []


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _raw(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
