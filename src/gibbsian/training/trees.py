"""A captured state as named tensors, and back: what distributed checkpoints store.

The tensors of a tree of dicts, lists and plain values get names by their place in it (``energy/mean``); the rest is
JSON, kept as the bytes of one more tensor. So a checkpoint holds tensors only, and reading one runs no code.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, type(None))


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
    written = _written(tree, name, tensors)
    return {name: _bytes(json.dumps(written).encode()), **tensors}


def tensor_names(written: Tensor) -> list[str]:
    """Name the tensors of a tree, from its JSON."""
    return [part["tensor"] for part in _parts(json.loads(_text(written))) if "tensor" in part]


def unpacked(name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree together again.

    Parameters
    ----------
    name
        Of the tree.
    tensors
        Its JSON and its tensors, by name.
    """
    return _read(json.loads(_text(tensors[name])), tensors)


def _written(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if type(tree) in PLAIN:
        return tree
    if isinstance(tree, Tensor):
        return {"tensor": _named(place, tree, tensors)}
    if isinstance(tree, Mapping) and all(type(key) in (int, str) for key in tree):
        # Pairs, as the keys of optimisers and lanes are numbers, which JSON would make strings of.
        return {"dict": [[key, _written(value, f"{place}/{key}", tensors)] for key, value in tree.items()]}
    if type(tree) in (list, tuple):
        parts = [_written(value, f"{place}/{i}", tensors) for i, value in enumerate(tree)]
        return parts if type(tree) is list else {"tuple": parts}
    held = io.BytesIO()
    torch.save(tree, held)
    return {"saved": True, "tensor": _named(place, _bytes(held.getvalue()), tensors)}


def _named(place: str, tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    # A key may hold a stroke of its own and so meet another's name.
    while place in tensors:
        place += "'"
    tensors[place] = tensor
    return place


def _read(written: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(written, list):
        return [_read(part, tensors) for part in written]
    if not isinstance(written, dict):
        return written
    if "dict" in written:
        return {key: _read(value, tensors) for key, value in written["dict"]}
    if "tuple" in written:
        return tuple(_read(part, tensors) for part in written["tuple"])
    tensor = tensors[written["tensor"]]
    if "saved" in written:
        return torch.load(io.BytesIO(_text(tensor)), weights_only=True)
    return tensor


def _parts(written: Any) -> list[dict[str, Any]]:
    """List the objects of the JSON of a tree."""
    if isinstance(written, dict):
        inner = [value for _, value in written.get("dict", ())] + written.get("tuple", [])
        return [written, *_parts(inner)]
    return [found for part in written for found in _parts(part)] if isinstance(written, list) else []


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _text(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
