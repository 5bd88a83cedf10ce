r"""Conditional noise contrastive estimation: noise is made from each datum by a small symmetric change.

If the change is symmetric, :math:`p_c(x' \mid x) = p_c(x \mid x')`, the log-odds that of a pair x came first are
:math:`E(x') - E(x)`, whatever the change's density and the energy's log Z. No noise has to be designed to cover the
data: it lies around them by construction. Small changes see little beyond the slope of the energy, and in the limit the
method is score matching; large ones tell the masses of modes that lie a change apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from gibbsian.energies.base import Energy, repeated
from gibbsian.energies.domains import kind_of
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.checks import check_count, check_floating
from gibbsian.objectives.noise_contrastive import energies

Perturbation: TypeAlias = Callable[[Tensor, Generator], Tensor]
"""A random change of each row, as likely back as forth: ``(n, *event) -> (n, *event)``."""


@dataclass(frozen=True)
class GaussianPerturbation:
    """Gaussian noise added to every coordinate.

    Parameters
    ----------
    epsilon
        Its standard deviation, in units of x.

    Raises
    ------
    OptionError
        If it is not positive.
    """

    epsilon: float

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon < math.inf:
            raise OptionError(
                f"epsilon is the positive standard deviation of a perturbation, in units of x; got {self.epsilon}. "
                "Half the data's standard deviation is a start."
            )

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Add noise to each row."""
        return x + self.epsilon * torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)


@dataclass(frozen=True)
class BitFlips:
    """So many bits of each row turned over, chosen with equal chances.

    Any state can be reached by single flips, so that with ``flips=1`` the whole law is seen; an even number would never
    compare states of different parity.

    Parameters
    ----------
    flips
        Bits per row, all different.

    Raises
    ------
    OptionError
        If it is below 1.
    """

    flips: int = 1

    def __post_init__(self) -> None:
        check_count("flips", self.flips, "the bits turned over per row")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Turn over bits of each row.

        Raises
        ------
        OptionError
            If a row has fewer bits than flips.
        """
        flat = x.flatten(1)
        if flat.shape[1] < self.flips:
            raise OptionError(f"flips={self.flips} is more than the {flat.shape[1]} bits of a row.")
        chosen = _sites(flat, self.flips, rng)
        return flat.scatter(1, chosen, 1.0 - flat.gather(1, chosen)).view_as(x)


@dataclass(frozen=True)
class ClassChanges:
    """So many sites of each one-hot row given another class, sites and classes chosen with equal chances.

    Parameters
    ----------
    changes
        Sites per row, all different.

    Raises
    ------
    OptionError
        If it is below 1.
    """

    changes: int = 1

    def __post_init__(self) -> None:
        check_count("changes", self.changes, "the sites per row that get another class")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """Change the classes of sites: ``(n, *sites, K)``, as it came.

        Raises
        ------
        OptionError
            If a row has fewer sites than changes, or there is one class only.
        """
        classes = x.shape[-1]
        flat = x.reshape(len(x), -1, classes)
        if flat.shape[1] < self.changes or classes < 2:
            raise OptionError(
                f"changes={self.changes} sites of another class are more than rows of {flat.shape[1]} sites with "
                f"{classes} classes have."
            )
        chosen = _sites(flat[..., 0], self.changes, rng)
        by = torch.randint(1, classes, chosen.shape, generator=rng, device=x.device)
        label = (flat.argmax(2).gather(1, chosen) + by) % classes
        index = chosen[..., None].expand(-1, -1, classes)
        return flat.scatter(1, index, torch.nn.functional.one_hot(label, classes).to(x.dtype)).view_as(x)


def _sites(flat: Tensor, count: int, rng: Generator) -> Tensor:
    """Choose sites of each row, all different, with equal chances: ``(n, sites)`` to ``(n, count)``."""
    return torch.rand(flat.shape, generator=rng, device=flat.device).topk(count, 1).indices


class ConditionalNCE(Objective):
    r"""Conditional noise contrastive estimation with a symmetric perturbation.

    .. math:: 2 \, \mathbb{E}_{x \sim data} \, \mathbb{E}_{x' \sim p_c(\cdot \mid x)}
              \log\left(1 + e^{E(x) - E(x')}\right)

    `Conditional noise-contrastive estimation of unnormalised models (Ceylan & Gutmann, 2018)
    <https://arxiv.org/abs/1806.03664>`_. With Gaussian perturbations of standard deviation :math:`\epsilon \to 0` the
    loss is :math:`2 \log 2 + \tfrac{1}{2} \epsilon^2` times exact score matching's. The energy's constant cannot be
    learned, and is not needed.

    Parameters
    ----------
    perturb
        The standard deviation of Gaussian perturbations, in units of x, or a callable ``perturb(x, rng)`` that changes
        each row: `BitFlips` for bits, `ClassChanges` for categories. It must be symmetric, which is not checked.
    perturbations
        Perturbed copies of each row.

    Raises
    ------
    OptionError
        If the standard deviation is not positive, or ``perturbations`` is below 1.
    ArgumentTypeError
        If ``perturb`` is neither a number nor callable.
    """

    def __init__(self, perturb: float | Perturbation, perturbations: int = 4) -> None:
        super().__init__()
        if isinstance(perturb, (int, float)):
            perturb = GaussianPerturbation(float(perturb))
        if not callable(perturb):
            raise ArgumentTypeError(
                f"perturb is a standard deviation or a callable perturb(x, rng) that changes rows; got {perturb!r}."
            )
        self.perturb: Perturbation = perturb
        self.perturbations = check_count("perturbations", perturbations, "the perturbed copies of each row")

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Perturb the rows, and tell them from their copies.

        Raises
        ------
        OptionError
            If the energy asks for a label that the batch lacks.
        DomainError
            If the perturbation leaves the energy's domain.
        ShapeError, ArgumentTypeError
            If the data are integers, or the perturbation changes their shape or type.
        """
        x, n = batch.x.detach(), len(batch)
        context = context_of(energy, batch)
        check_floating("Contrasting data with noise", x)
        _check_domain(energy, self.perturb)
        with torch.no_grad():
            copies = self.perturb(x.repeat(self.perturbations, *[1] * (x.ndim - 1)), rng)
        if copies.shape != (self.perturbations * n, *x.shape[1:]) or copies.dtype != x.dtype:
            raise ShapeError(
                f"The perturbation of {self.perturbations * n} rows of shape {tuple(x.shape[1:])} and type {x.dtype} "
                f"gave {tuple(copies.shape)} of {copies.dtype}; it must keep shape and type."
            )
        values = energy(torch.cat((x, copies)), **repeated(context, self.perturbations + 1))
        odds = values[n:] - values[:n].repeat(self.perturbations)
        right = (odds > 0).float().mean()
        return Loss(2.0 * softplus(-odds).mean(), energies(values, n) | {"accuracy": right})

    def extra_repr(self) -> str:
        """The perturbation and its number."""
        return f"{self.perturb}, perturbations={self.perturbations}"


def _check_domain(energy: Energy, perturb: Perturbation) -> None:
    kind = kind_of(energy.support)
    if isinstance(perturb, GaussianPerturbation) and kind not in ("real", "box"):
        raise DomainError(
            f"{perturb} takes points off the energy's domain, {energy.support}. Pass a symmetric perturb(x, rng) that "
            "stays there: BitFlips() for bits, ClassChanges() for one-hot categories."
        )
    if isinstance(perturb, BitFlips) and kind != "boolean":
        raise DomainError(
            f"{perturb} turns over bits, and the energy lives on {energy.support}. Declare {constraints.boolean} as "
            "the energy's support if its states are bits, or give a standard deviation for real ones."
        )
    if isinstance(perturb, ClassChanges) and kind != "one_hot":
        raise DomainError(
            f"{perturb} changes classes of one-hot sites, and the energy lives on {energy.support}. Take BitFlips() "
            f"for bits, or declare {constraints.one_hot} as the energy's support if its sites are one-hot."
        )
