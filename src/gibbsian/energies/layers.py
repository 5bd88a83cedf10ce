"""Layers that keep a network from being an energy: one number for each row, and the same one each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gibbsian.errors import InputError


def check_independent_rows(energy: object) -> None:
    """Refuse networks that mix the rows of a batch, which would tie independent chains together.

    Raises
    ------
    InputError
        If a batch normalisation is in training mode.
    """
    if not isinstance(energy, nn.Module):
        return
    for name, module in energy.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise InputError(
                f"The energy holds a batch normalisation in training mode ({name or type(module).__name__}): it makes "
                "each chain depend on all others. Call energy.eval(), or use group or layer normalisation."
            )


def check_function(energy: object) -> None:
    """Refuse what is no function of each row alone.

    Raises
    ------
    InputError
        If a batch normalisation or a dropout is in training mode.
    """
    check_independent_rows(energy)
    if isinstance(energy, nn.Module) and any(layer.training for layer in dropout_layers(energy)):
        raise InputError(
            "The energy holds a dropout in training mode: it gives another number each time, and no density belongs "
            "to it. Call energy.eval(); fit() turns dropout on for training by itself, and off again."
        )


def dropout_layers(energy: nn.Module) -> list[nn.Module]:
    """Find the layers of an energy that drop units at random."""
    return [m for m in energy.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]


@contextmanager
def dropout(energy: nn.Module) -> Iterator[None]:
    """Turn an energy's dropout layers on for training, and off afterwards: elsewhere an energy is a function."""
    layers = dropout_layers(energy)
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


@contextmanager
def dropout_paused(energy: nn.Module) -> Iterator[None]:
    """Turn dropout off inside training, where chains need a function."""
    layers = [layer for layer in dropout_layers(energy) if layer.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
