r"""Energies of coordinates that do not change when a molecule is moved, turned or mirrored.

They see coordinates only through distances of atoms. Their gradients, the forces, turn with the molecule. A density
over coordinates that does not depend on where the molecule is has no finite Z; draws are made with a restraint of the
centre, or of relative coordinates. Seeing distances alone, they do not tell a molecule from its mirror image either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import batch_rows
from gibbsian.errors import OptionError, ShapeError


class DistanceEnergy(Energy):
    r"""An energy on distances of chosen pairs of atoms, standardised, :math:`E(x) = h((d(x) - \mu) / s)`.

    Parameters
    ----------
    atoms
        Atoms of a point; points are ``(atoms, 3)``.
    pairs
        Indices of the pairs, ``(k, 2)``.
    head
        An energy on ``(k,)``, such as ``MLP(k)``.
    loc, scale
        :math:`\mu` and s: ``(k,)``, or 0 and 1 until `calibrate` sets them.

    Raises
    ------
    ShapeError
        If the pairs do not form ``(k, 2)``, or the head is over points of another size.
    OptionError
        If a pair is not of two different atoms.
    """

    pairs: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, atoms: int, pairs: Any, head: Energy, loc: Any = 0.0, scale: Any = 1.0) -> None:
        super().__init__()
        index = torch.as_tensor(pairs, dtype=torch.int64)
        if index.ndim != 2 or index.shape[1] != 2:
            raise ShapeError(f"Pairs of atoms have shape (k, 2); got {tuple(index.shape)}.")
        if bool(((index < 0) | (index >= atoms)).any()) or bool((index[:, 0] == index[:, 1]).any()):
            raise OptionError(f"A pair is of two different atoms of {atoms}; got {index.tolist()[:5]}.")
        if head.event_shape is not None and tuple(head.event_shape) != (len(index),):
            raise ShapeError(
                f"The head is over points of {tuple(head.event_shape)}, and there are {len(index)} distances."
            )
        self.event_shape = torch.Size((atoms, 3))
        self.head = head
        self.register_buffer("pairs", index)
        dtype = torch.get_default_dtype()
        self.register_buffer("loc", torch.as_tensor(loc, dtype=dtype).expand(len(index)).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=dtype).expand(len(index)).clone())

    def features(self, x: Tensor) -> Tensor:
        """Standardised distances: ``(n, atoms, 3) -> (n, k)``."""
        x = batch_rows(x, cast(torch.Size, self.event_shape))
        apart = x[:, self.pairs[:, 0]] - x[:, self.pairs[:, 1]]
        return (torch.linalg.vector_norm(apart, dim=2) - self.loc) / self.scale

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> DistanceEnergy:
        """Standardise by rows ``(n, atoms, 3)``; distances that are held fixed keep a scale of 1. Returns itself."""
        raw = self.features(x) * self.scale + self.loc
        self.loc.copy_(raw.mean(0))
        self.scale.copy_(torch.where(raw.std(0) > 1e-6, raw.std(0), 1.0))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row: ``(n, atoms, 3) -> (n,)``."""
        return self.head(self.features(x))

    def extra_repr(self) -> str:
        """Atoms and distances."""
        return f"{cast(torch.Size, self.event_shape)[0]} atoms, {len(self.pairs)} distances"


class InvariantNetwork(Energy):
    r"""A message-passing network on atoms and their distances, smooth, with a sum over atoms at the end.

    Atoms begin as learned vectors of their kind. In each layer, neighbours within the cutoff send their vectors times a
    filter of the distance r, a network of Gaussians :math:`e^{-\gamma (r - \mu_k)^2}` brought to zero smoothly by
    :math:`\tfrac12 (1 + \cos \pi r / r_c)`; what arrives is mixed and added. `SchNet: a continuous-filter convolutional
    neural network for modeling quantum interactions (Schütt et al., 2017) <https://arxiv.org/abs/1706.08566>`_.

    Parameters
    ----------
    kinds
        Kind of each atom, whole numbers from 0, ``(atoms,)``: elements, or names; atoms of one kind can be exchanged.
    features
        Width of an atom's vector.
    layers
        Rounds of messages.
    basis
        Gaussians, whose centres lie evenly from 0 to the cutoff.
    cutoff
        In units of x, beyond which atoms do not see each other: 0.5 to 1 for nanometres.

    Raises
    ------
    OptionError
        If a size is not positive, or there are fewer than two atoms.
    """

    kinds: Tensor
    pairs: Tensor
    centres: Tensor

    def __init__(
        self, kinds: Sequence[int] | Tensor, features: int = 32, layers: int = 2, basis: int = 24, cutoff: float = 0.8
    ) -> None:
        super().__init__()
        kind = torch.as_tensor(kinds, dtype=torch.int64)
        if kind.ndim != 1 or len(kind) < 2 or bool((kind < 0).any()):
            raise OptionError(f"kinds lists the kind of each of two atoms or more, from 0; got {tuple(kind.shape)}.")
        if min(features, layers, basis - 1) < 1 or not 0.0 < cutoff < math.inf:
            raise OptionError(
                f"A network has 1 or more features and layers, 2 or more basis functions and a positive cutoff; got "
                f"{features}, {layers}, {basis}, {cutoff}."
            )
        self.event_shape = torch.Size((len(kind), 3))
        self.cutoff = float(cutoff)
        self.register_buffer("kinds", kind)
        near = torch.cartesian_prod(torch.arange(len(kind)), torch.arange(len(kind)))
        self.register_buffer("pairs", near[near[:, 0] != near[:, 1]])
        self.register_buffer("centres", torch.linspace(0.0, self.cutoff, basis))
        self.embedding = nn.Embedding(int(kind.max()) + 1, features)
        self.layers = nn.ModuleList(_Interaction(features, basis) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each row: ``(n, atoms, 3) -> (n,)``."""
        x = batch_rows(x, cast(torch.Size, self.event_shape))
        n, atoms = x.shape[:2]
        apart = x[:, self.pairs[:, 0]] - x[:, self.pairs[:, 1]]
        r = torch.linalg.vector_norm(apart, dim=2)
        width = self.centres[1] - self.centres[0]
        radial = torch.exp(-0.5 * ((r.unsqueeze(2) - self.centres) / width).square())
        fade = torch.where(r < self.cutoff, 0.5 + 0.5 * torch.cos(math.pi * r / self.cutoff), 0.0).unsqueeze(2)
        h = self.embedding(self.kinds).expand(n, -1, -1)
        for layer in self.layers:
            # Pairs come sorted by the atom that receives, as many for each.
            h = h + layer(h[:, self.pairs[:, 1]], radial, fade, (n, atoms, atoms - 1))
        return self.head(h).sum((1, 2))

    def extra_repr(self) -> str:
        """Atoms and cutoff."""
        return f"{cast(torch.Size, self.event_shape)[0]} atoms, cutoff={self.cutoff:g}"


class _Interaction(nn.Module):
    def __init__(self, features: int, basis: int) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(basis, features), nn.SiLU(), nn.Linear(features, features))
        self.send = nn.Linear(features, features, bias=False)
        self.mix = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, senders: Tensor, radial: Tensor, fade: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Messages of all pairs ``(n, pairs, f)``, summed at the receiving atoms and mixed, ``(n, atoms, f)``."""
        messages = self.send(senders) * self.filter(radial) * fade
        return self.mix(messages.view(*shape, -1).sum(2))
