r"""A density over a molecule's internal coordinates that can be drawn from: a proposal for its physical energy.

It factorises as a molecule does. The chosen torsions (phi, psi) have a density of their own on the torus; torsions that
turn nearly freely, as those of methyl groups, follow given these, by a flow of circular splines; the rest, bonds and
angles and stiff torsions, given all of them, as a Gaussian whose mean depends on the torsions, bent by a spline flow:

.. math:: q(z) = q(\phi, \psi)\; q(\chi \mid \phi, \psi)\; q(r \mid \chi, \phi, \psi) .

`Boltzmann generators: Sampling equilibrium states of many-body systems with deep learning (Noé, Olsson, Köhler & Wu,
2019) <https://arxiv.org/abs/1812.01729>`_; `Normalizing flows on tori and spheres (Rezende et al., 2020)
<https://arxiv.org/abs/2002.02428>`_; `Neural spline flows (Durkan et al., 2019) <https://arxiv.org/abs/1906.04032>`_.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.periodic import TURN
from gibbsian.energies.tractable import Tractable, batch_rows
from gibbsian.errors import OptionError, ShapeError
from gibbsian.molecules.internal import InternalCoordinates

ORDER = 3
"""The highest frequency of the chosen torsions by which means of the others depend on them."""


class InternalProposal(Tractable):
    """A normalised density over internal coordinates, with exact draws: see the module's words.

    Built by `fit_proposal`. Torsions are taken modulo a turn. Densities are in nats, lengths in nanometres.

    Parameters
    ----------
    internal
        The coordinates, from `internal_coordinates`.
    chosen
        Which coordinates the first density is of.
    marginal
        A tractable density over these, ``(n, len(chosen))`` in radians on the torus.
    rotors, folds
        Which coordinates are torsions that turn freely, and their symmetry: 3 for a methyl group, else 1.
    circular, linear
        Flows of zuko: over the rotors, with the waves of the chosen torsions as context; and over the rest, with the
        waves of both. ``circular`` is ``None`` where there are no rotors.
    mean, factor, centres
        The rest is ``centres + features @ mean + noise @ factor.T``: ``(features, rest)``, lower ``(rest, rest)``, and
        ``(rest,)``.

    Raises
    ------
    OptionError
        If the coordinates are not all there once.
    ShapeError
        If the marginal is over other torsions.
    """

    mean: Tensor
    factor: Tensor
    centres: Tensor

    def __init__(
        self,
        internal: InternalCoordinates,
        chosen: Sequence[int],
        marginal: Tractable,
        rotors: Sequence[int],
        folds: Sequence[int],
        circular: nn.Module | None,
        linear: nn.Module,
        mean: Tensor,
        factor: Tensor,
        centres: Tensor,
    ) -> None:
        super().__init__()
        self.internal = internal
        self.event_shape = torch.Size((internal.dim,))
        self.chosen, self.rotors, self.folds = list(chosen), list(rotors), list(folds)
        taken = {*self.chosen, *self.rotors}
        self.rest = [i for i in range(internal.dim) if i not in taken]
        if len(taken) != len(self.chosen) + len(self.rotors) or len(self.folds) != len(self.rotors):
            raise OptionError(f"Each coordinate has one place; got chosen {self.chosen} and rotors {self.rotors}.")
        if tuple(marginal.event_shape) != (len(self.chosen),):
            raise ShapeError(
                f"The marginal is over points {tuple(marginal.event_shape)} and there are {len(self.chosen)} torsions."
            )
        self.marginal, self.circular, self.linear = marginal, circular, linear
        for name, value in (("mean", mean), ("factor", factor), ("centres", centres)):
            self.register_buffer(name, value)

    def forward(self, z: Tensor) -> Tensor:
        """Minus the log-density of each row, ``(n, 3 * atoms - 6) -> (n,)``."""
        chosen, turned, noise = self.parts(z)
        total = self.marginal(chosen) + self.factor.diagonal().log().sum()
        if self.circular is not None:
            total = total - self.circular(self.waves(chosen)).log_prob(turned)
        return total - self.linear(self.conditions(chosen, turned, z)).log_prob(noise)

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen torsions; rotors times their symmetry, on the circle; and the rest, whitened."""
        z = batch_rows(z, self.event_shape)
        chosen = TURN.wrap(z[:, self.chosen])
        turned = TURN.wrap(z[:, self.rotors] * z.new_tensor(self.folds))
        away = self._residual(z) - self.features(chosen, z[:, self.rotors]) @ self.mean
        return chosen, turned, torch.linalg.solve_triangular(self.factor, away.T, upper=False).T

    @torch.no_grad()
    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` points, torsions within half a turn of their centres."""
        dtype = self.mean.dtype
        chosen = self.marginal.sample(n, rng).to(dtype)
        turned, shape = chosen.new_zeros((n, 0)), (n, len(self.rotors))
        if self.circular is not None:
            u = math.pi * (2.0 * torch.rand(shape, generator=rng, dtype=dtype) - 1.0)
            turned = cast(Any, self.circular(self.waves(chosen))).transform.inv(u)
        folds = chosen.new_tensor(self.folds)
        which = (torch.rand(shape, generator=rng, dtype=dtype) * folds).floor()
        rotors = TURN.wrap((turned + 2.0 * math.pi * which) / folds)
        z = chosen.new_zeros((n, self.internal.dim))
        z[:, self.chosen], z[:, self.rotors] = chosen, rotors
        u = torch.randn((n, len(self.rest)), generator=rng, dtype=dtype)
        noise = cast(Any, self.linear(self.conditions(chosen, turned, z))).transform.inv(u)
        z[:, self.rest] = self.centres + self.features(chosen, rotors) @ self.mean + noise @ self.factor.T
        return z

    def waves(self, chosen: Tensor) -> Tensor:
        """Context of the rotors: first and second waves of the chosen torsions."""
        angle = torch.cat((chosen, 2.0 * chosen), 1)
        return torch.cat((angle.cos(), angle.sin()), 1)

    def conditions(self, chosen: Tensor, turned: Tensor, z: Tensor) -> Tensor:
        """Context of the rest: waves of the chosen torsions and of the rotors, these with and without symmetry."""
        angle = torch.cat((z[:, self.rotors], turned), 1)
        return torch.cat((self.waves(chosen), angle.cos(), angle.sin()), 1)

    def features(self, chosen: Tensor, rotors: Tensor) -> Tensor:
        """What the mean of the rest is linear in: products of waves of the chosen torsions, and waves of the rotors."""
        return mean_features(chosen, rotors)

    def _residual(self, z: Tensor) -> Tensor:
        """The rest about its centres, torsions by the shorter way round."""
        return residual(self.internal, self.rest, z, self.centres)

    def extra_repr(self) -> str:
        """How many coordinates of each kind."""
        return f"{self.internal.dim}, chosen={len(self.chosen)}, rotors={len(self.rotors)}, rest={len(self.rest)}"


class CartesianProposal:
    """A proposal over internal coordinates as one of Cartesian coordinates, for chains that live there.

    Draws lie in the frame of `InternalCoordinates.cartesian`. A density over places and directions in space they have
    not; where the energy does not change with these, the acceptance of `IndependentMH` does not need it, and the chain
    is exact on all that does not depend on them either.

    Parameters
    ----------
    proposal
        Over internal coordinates.
    """

    def __init__(self, proposal: InternalProposal) -> None:
        self.proposal = proposal
        self.event_shape = torch.Size((proposal.internal.atoms, 3))

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` molecules, ``(n, atoms, 3)`` in nanometres."""
        return self.proposal.internal.cartesian(self.proposal.sample(n, rng))

    def __call__(self, x: Tensor) -> Tensor:
        """Minus the log-density in the volume element of Cartesian coordinates, ``(n, atoms, 3) -> (n,)``."""
        z = self.proposal.internal.of(x)
        return self.proposal(z) + self.proposal.internal.log_det(z)

    def __repr__(self) -> str:
        return f"CartesianProposal({self.proposal!r})"


def mean_features(chosen: Tensor, rotors: Tensor) -> Tensor:
    """1, products of waves of the chosen torsions up to `ORDER`, and as many waves of each rotor; ``(n, features)``."""
    columns = chosen.new_ones((len(chosen), 1))
    for angle in chosen.unbind(1):
        columns = (columns.unsqueeze(2) * _waves(angle).unsqueeze(1)).flatten(1)
    return torch.cat((columns, *(_waves(angle)[:, 1:] for angle in rotors.unbind(1))), 1)


def residual(internal: InternalCoordinates, rest: Sequence[int], z: Tensor, centres: Tensor) -> Tensor:
    """Coordinates ``rest`` about their centres, torsions by the shorter way round."""
    away = z[:, list(rest)] - centres
    turns = z.new_tensor([float(i >= 2 * internal.atoms - 3) for i in rest])
    return away - turns * 2.0 * math.pi * (away / (2.0 * math.pi)).round()


def _waves(angle: Tensor) -> Tensor:
    k = torch.arange(1, ORDER + 1, dtype=angle.dtype)
    at = angle.unsqueeze(1) * k
    return torch.cat((torch.ones_like(at[:, :1]), at.cos(), at.sin()), 1)
