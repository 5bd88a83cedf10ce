"""Rows that are not of the data's kind, made from the data: what an energy should tell from them."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def strangers(rows: Tensor, rng: Generator, image: bool, bits: bool = False) -> dict[str, Tensor]:
    """Make uniform noise, shuffled coordinates, and of pictures inverted ones, in the range of the rows.

    Parameters
    ----------
    rows
        Of the data, ``(n, *event)``.
    rng
        The generator.
    image
        Whether they are pictures, whose pixels have one range and are shuffled within each of them.
    bits
        Whether they are zeros and ones; noise is of such too.
    """
    low, high = rows.amin(0, keepdim=True), rows.amax(0, keepdim=True)
    if bits:
        low, high = rows.new_zeros(()), rows.new_ones(())
    elif image:
        low, high = low.min(), high.max()
    uniform = torch.rand(rows.shape, generator=rng)
    made = {"uniform noise": (uniform < 0.5).to(rows.dtype) if bits else low + (high - low) * uniform}
    if rows[0].numel() > 2:
        order = torch.rand((len(rows), rows[0].numel()), generator=rng).argsort(1)
        made["shuffled pixels" if image else "shuffled columns"] = (
            rows.flatten(1).gather(1, order).reshape(rows.shape) if image else shuffled_columns(rows, rng)
        )
    if image:
        made["inverted"] = low + high - rows
    return made


def shuffled_columns(rows: Tensor, rng: Generator) -> Tensor:
    """Permute each column on its own: the marginals stay, what ties the columns together goes."""
    order = torch.rand(rows.shape, generator=rng).argsort(0)
    return rows.gather(0, order)
