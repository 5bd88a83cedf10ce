"""Kernels on disk: a tuned kernel is a few settings, kept in one safetensors file and rebuilt without pickle.

Tensors (a scale, step sizes of many chains) are the file's tensors; the kernel's class and its plain settings are JSON
in the file's metadata, and kernels inside a kernel are settings like others. A float is written so that it reads back
to the bit.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gibbsian import kernels
from gibbsian.errors import (
    ArgumentTypeError,
    InputError,
    ModelFileError,
    OptionError,
    ShapeError,
    StorageError,
    unknown_name,
)
from gibbsian.files import replace_file
from gibbsian.kernels.base import Kernel

_ENTRY, _VERSION = "gibbsian_kernel", 1
"""Where in the metadata a kernel stands, and how it is written there."""


def save_kernel(kernel: Kernel, path: str | Path) -> Path:
    """Write a kernel to a file, which is replaced in one move.

    Parameters
    ----------
    kernel
        A frozen dataclass whose settings are plain values, tensors, or kernels themselves.
    path
        The file, ``tuned.safetensors`` for example.

    Raises
    ------
    ArgumentTypeError
        If it is no kernel.
    OptionError
        If a setting cannot be written, such as a function.
    StorageError
        If the file cannot be written.
    """
    from safetensors.torch import save

    if isinstance(kernel, type) or not dataclasses.is_dataclass(kernel) or not isinstance(kernel, Kernel):
        raise ArgumentTypeError(f"save_kernel() writes a kernel, such as MALA(0.1); got {kernel!r}.")
    tensors: dict[str, Tensor] = {}
    entry = {"version": _VERSION, **_written(kernel, "", tensors)}
    try:
        replace_file(Path(path), save(tensors, metadata={_ENTRY: json.dumps(entry, allow_nan=False)}))
    except OSError as error:
        raise StorageError(
            f"The kernel could not be saved in {path}: {error}. Choose another place; a file that was there is intact."
        ) from error
    return Path(path)


def load_kernel(path: str | Path, classes: Iterable[type] = ()) -> Any:
    """Rebuild a saved kernel, its tensors on the CPU; `gibbsian.sample` takes them to the chains' device.

    Parameters
    ----------
    path
        What `save_kernel` wrote.
    classes
        Kernels of your own that may be in it; by name they come before the package's.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, no kernel's, of a newer version, or holds settings that the class refuses.
    OptionError
        If the class is not known; the message names the nearest.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            told = (file.metadata() or {}).get(_ENTRY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ModelFileError(f"There is no kernel to read in {path}: {error}. save_kernel() writes one.") from error
    except SafetensorError as error:
        raise ModelFileError(
            f"{path} is truncated, damaged, or no safetensors file: {error}. Save it again."
        ) from error
    if told is None:
        raise ModelFileError(f"{path} is a safetensors file without a kernel; save_kernel() writes one.")
    known = kernel_classes() | {each.__name__: each for each in classes}
    try:
        entry = json.loads(told)
        if entry["version"] > _VERSION:
            raise ModelFileError(
                f"{path} was written in version {entry['version']} of the format, this package reads {_VERSION}; "
                "update gibbsian."
            )
        return _read(entry, tensors, known, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise ModelFileError(f"The settings in {path} are damaged: {error!r}. Save the kernel again.") from error


def kernel_classes() -> dict[str, type]:
    """Find the kernels of this package, by name."""
    found: dict[str, type] = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        name = f"{kernels.__name__}.{module.name}"
        for each in vars(importlib.import_module(name)).values():
            fitting = isinstance(each, type) and dataclasses.is_dataclass(each) and each.__module__ == name
            if fitting and all(hasattr(each, method) for method in ("init", "noise", "step")):
                found[each.__name__] = each
    return found


def _written(kernel: Any, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(kernel)
    if kernel_classes().get(kind.__name__, kind) is not kind:
        raise OptionError(f"A kernel of your own named {kind.__name__} would be read as the package's; rename it.")
    settings = {
        f.name: _plain(getattr(kernel, f.name), f"{place}{f.name}", tensors)
        for f in dataclasses.fields(kernel)
        if f.init
    }
    return {"class": kind.__name__, "settings": settings}


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_plain(each, f"{place}.{i}", tensors) for i, each in enumerate(value)]}
    if dataclasses.is_dataclass(value) and isinstance(value, Kernel):
        return _written(value, f"{place}.", tensors)
    raise OptionError(
        f"The setting {place} cannot be saved: it is {value!r}, and a file holds numbers, words, tensors, tuples and "
        "kernels."
    )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found


def _read(entry: Any, tensors: dict[str, Tensor], known: dict[str, type], path: str | Path) -> Any:
    if not isinstance(entry, dict):
        return entry
    if "class" not in entry:
        ((kind, value),) = entry.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dtype":
            return _dtype(value)
        if kind == "float":
            return float(value)
        return {"tuple": tuple, "list": list}[kind](_read(each, tensors, known, path) for each in value)
    name = entry["class"]
    if name not in known:
        raise OptionError(
            f"{unknown_name('kernel', name, known)} One of your own: load_kernel(path, classes=[{name}])."
        )
    settings = {key: _read(value, tensors, known, path) for key, value in entry["settings"].items()}
    takes = {f.name for f in dataclasses.fields(known[name]) if f.init}
    if settings.keys() - takes:
        extra, has = ", ".join(sorted(settings.keys() - takes)), ", ".join(sorted(takes))
        raise ModelFileError(f"{name} in {path} has the setting {extra}, which the class lacks; it takes: {has}.")
    try:
        return known[name](**settings)
    except (OptionError, ShapeError, ArgumentTypeError) as error:
        raise ModelFileError(f"{name} in {path} cannot be rebuilt: {error}") from error
