"""Draws in the form of ArviZ, for its plots and its file formats.

ArviZ orders axes as ``(chain, draw, *event)`` and knows the statistics of a step under the names of Stan and PyMC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gibbsian.errors import MissingPackageError

ARVIZ_NAMES = {
    "hamiltonian": "energy",
    "diverging": "diverging",
    "depth": "tree_depth",
    "leapfrog_steps": "n_steps",
    "acceptance": "acceptance_rate",
}
"""What a kernel tells of a step, and what ArviZ calls it; other details keep their names."""

_WHOLE = ("tree_depth", "n_steps")


def to_arviz(draws: Tensor, kept: Mapping[str, Tensor], *, name: str = "x", kernel: str = "") -> Any:
    """Build ArviZ's ``InferenceData``, or its ``DataTree`` from version 1 on.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``.
    kept
        By name, ``(draws, chains)``; ``energy`` becomes ``lp``, its negative.
    name
        Of the positions.
    kernel
        Kept as an attribute.

    Raises
    ------
    MissingPackageError
        If ArviZ is not installed.
    """
    try:
        import arviz
    except ImportError as error:
        raise MissingPackageError(
            'to_arviz needs the package arviz, which is not installed; try pip install "gibbsian[arviz]".'
        ) from error
    posterior = {name: _by_chain(draws)}
    stats = sample_stats(kept)
    if int(arviz.__version__.split(".")[0]) < 1:
        made = arviz.from_dict(posterior=posterior, sample_stats=stats)
    else:
        made = arviz.from_dict({"posterior": posterior, "sample_stats": stats})
    made["posterior"].attrs.update(inference_library="gibbsian", sampler=kernel)
    return made


def sample_stats(kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """Statistics of each step under ArviZ's names, arrays ``(chain, draw)``.

    Parameters
    ----------
    kept
        By our names, ``(draws, chains)``.
    """
    found = {}
    for ours, value in kept.items():
        if ours == "energy":
            found["lp"] = _by_chain(-value)
            continue
        name = ARVIZ_NAMES.get(ours, ours)
        if name == "diverging":
            value = value > 0
        elif name in _WHOLE:
            value = value.round().long()
        found[name] = _by_chain(value)
    return found


def _by_chain(x: Tensor) -> Any:
    x = x.detach().cpu()
    # NumPy has no bfloat16.
    x = x.float() if x.dtype == torch.bfloat16 else x
    return x.transpose(0, 1).contiguous().numpy()
