r"""Gauges of Potts models: couplings and fields that say the same of every state, and what is read off them.

Any numbers :math:`k_i(a)` that are added to all couplings of class a at site i, whatever its partner's class, and taken
from the field there, change no energy: a Potts model of d sites and K classes has only :math:`(K - 1)^2` free couplings
per pair and :math:`K - 1` free fields per site. A gauge picks one of the many. With weights :math:`w_i(a)` that sum to
one at each site, and a bar for the mean under them in the place of a class, it is

.. math::

   J'_{ij}(a, b) &= J_{ij}(a, b) - J_{ij}(\bar{\cdot}, b) - J_{ij}(a, \bar{\cdot}) + J_{ij}(\bar{\cdot}, \bar{\cdot}),

   h'_i(a) &= h_i(a) - h_i(\bar{\cdot}) + \sum_j \bigl(J_{ij}(a, \bar{\cdot}) - J_{ij}(\bar{\cdot}, \bar{\cdot})\bigr),

so that couplings and fields have mean zero under the weights. Uniform weights give the *zero-sum* (or Ising) gauge, of
all gauges that with the least squared couplings: what can be in the fields is in the fields. All weight on one class
gives the *lattice-gas* gauge, in which that class has couplings and fields of 0.

**Contacts.** How strongly two sites are coupled is the Frobenius norm of their couplings in the zero-sum gauge. Sites
that are coupled to everything, by how the data came about, stand out in it; the average product correction takes out
:math:`\bar S_i \bar S_j / \bar S`, with means over the other sites.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.energies.couplings import Couplings
from gibbsian.energies.pairwise import Ising, Potts
from gibbsian.energies.sparse_couplings import SparseCouplings
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError


def zero_sum_gauge(energy: Potts) -> Potts:
    """Move a Potts model to the gauge in which couplings and fields sum to zero over the classes.

    Parameters
    ----------
    energy
        Any `Potts`; left as it is.

    Returns
    -------
    Potts
        The same density, its energy shifted by a constant. Couplings between all classes, along the edges of the model
        given, or as a matrix where it has one between classes; trainable where that one's couplings are.

    Raises
    ------
    ArgumentTypeError
        If it is no `Potts`.
    """
    _check(energy)
    return gauged(energy, torch.full_like(energy.field.detach(), 1.0 / energy.field.shape[-1]))


def lattice_gas_gauge(energy: Potts, reference: int | Tensor = -1) -> Potts:
    """Move a Potts model to the gauge in which a class has neither couplings nor a field.

    Parameters
    ----------
    energy
        Any `Potts`; left as it is.
    reference
        The class: one for all sites, or one for each, ``(*sites)``, such as the consensus of an alignment.

    Returns
    -------
    Potts
        As of `zero_sum_gauge`.

    Raises
    ------
    OptionError
        If there is no such class.
    ShapeError
        If the classes do not fit the sites.
    ArgumentTypeError
        If it is no `Potts`.
    """
    _check(energy)
    sites, k = energy.field.shape[:-1], energy.field.shape[-1]
    own = torch.as_tensor(reference, device=energy.field.device)
    if own.is_floating_point() or own.dtype == torch.bool or not bool(((own >= -k) & (own < k)).all()):
        raise OptionError(
            f"reference is a class, a whole number from 0 to {k - 1}, or one for each site; got {reference}."
        )
    if own.ndim and own.shape != sites:
        raise ShapeError(f"reference has one class for each of {tuple(sites)} sites; got shape {tuple(own.shape)}.")
    hot = torch.nn.functional.one_hot(own.long() % k, k)
    return gauged(energy, hot.expand(energy.field.shape).to(energy.field.dtype))


@torch.no_grad()
def gauged(energy: Potts, weights: Tensor) -> Potts:
    """Move a Potts model to the gauge in which couplings and fields have mean zero under weights of the classes.

    Parameters
    ----------
    energy
        Any `Potts`; left as it is.
    weights
        Of the field's shape, ``(*sites, K)``, adding to one at each site.

    Raises
    ------
    OptionError
        If they do not add to one.
    ShapeError
        If they have another shape.
    ArgumentTypeError
        If it is no `Potts`.
    """
    _check(energy)
    if weights.shape != energy.field.shape:
        raise ShapeError(f"Weights are as the field, {tuple(energy.field.shape)}; got {tuple(weights.shape)}.")
    total = weights.sum(-1)
    if not bool(((total - 1.0).abs() < 1e-4).all()):
        raise OptionError(
            f"Weights add to one at each site; they add to {float(total.min()):.4g} to {float(total.max()):.4g}."
        )
    i, j, between = pair_couplings(energy)
    k = energy.field.shape[-1]
    w, h = (t.detach().reshape(-1, k) for t in (weights, energy.field))
    # Means over the class of the second site, (m, K), of the first, and of both, (m,).
    by_first = torch.einsum("mab,mb->ma", between, w[j])
    by_second = torch.einsum("mab,ma->mb", between, w[i])
    both = (by_first * w[i]).sum(1)
    moved = between - by_first[:, :, None] - by_second[:, None, :] + both[:, None, None]
    field = h - (h * w).sum(1, keepdim=True)
    field = field.index_add(0, i, by_first - both[:, None]).index_add(0, j, by_second - both[:, None])
    return _rebuilt(energy, i, j, moved, field.view(energy.field.shape))


def pair_couplings(energy: Potts) -> tuple[Tensor, Tensor, Tensor]:
    """The coupled pairs of a Potts model, ``(m,)`` sites each, and their couplings between classes, ``(m, K, K)``."""
    _check(energy)
    i, j, between = energy.interaction.pairs()
    if between.ndim == 1:
        between = between[:, None, None] * torch.eye(energy.field.shape[-1], dtype=between.dtype, device=between.device)
    return i, j, between


@torch.no_grad()
def coupling_norms(energy: Potts | Ising, without: int | None = None) -> Tensor:
    """Strength of every pair's couplings: their Frobenius norm in the zero-sum gauge.

    `Improved contact prediction in proteins: using pseudolikelihoods to infer Potts models (Ekeberg et al., 2013)
    <https://arxiv.org/abs/1211.1281>`_.

    Parameters
    ----------
    energy
        A `Potts`; or an `Ising`, of which it is twice the absolute coupling, as of the same model with two classes.
    without
        A class that is left out of the norm (not of the gauge), such as the gap of an alignment.

    Returns
    -------
    Tensor
        ``(d, d)``, symmetric, 0 where there is no coupling.

    Raises
    ------
    OptionError
        If there is no such class.
    ArgumentTypeError
        If it is neither.
    """
    if isinstance(energy, Ising):
        i, j, value = energy.interaction.pairs()
        # A coupling J s s' of spins is J times +1, -1, -1, +1 between two classes: already zero-sum.
        return _square(energy.interaction.shape.numel(), i, j, 2.0 * value.detach().abs())
    i, j, between = pair_couplings(zero_sum_gauge(energy))
    k = between.shape[1]
    if without is not None:
        if not -k <= without < k:
            raise OptionError(f"without is a class that is left out, from 0 to {k - 1}; got {without}.")
        kept = [a for a in range(k) if a != without % k]
        between = between[:, kept][:, :, kept]
    return _square(energy.interaction.shape.numel(), i, j, between.detach().square().sum((1, 2)).sqrt())


def average_product_correction(scores: Tensor) -> Tensor:
    r"""Take out of each pair's score what its sites have with all others: :math:`S_{ij} - \bar S_i \bar S_j / \bar S`.

    `Mutual information without the influence of phylogeny or entropy dramatically improves residue contact prediction
    (Dunn, Wahl & Gloor, 2008) <https://doi.org/10.1093/bioinformatics/btm604>`_.

    Parameters
    ----------
    scores
        ``(d, d)``, symmetric, of 3 sites or more; the diagonal is not read.

    Returns
    -------
    Tensor
        ``(d, d)`` with a zero diagonal. Off it, rows add to what is near zero.

    Raises
    ------
    ShapeError
        If it is not square, or of fewer than 3 sites.
    OptionError
        If it is not symmetric.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 3:
        raise ShapeError(f"Scores of pairs are (d, d), of 3 sites or more; got shape {tuple(scores.shape)}.")
    if not bool(((scores - scores.T).abs() <= 1e-5 * scores.abs().max()).all()):
        raise OptionError("Scores of pairs are symmetric; these are not. Use (S + S.T) / 2.")
    d = len(scores)
    apart = 1.0 - torch.eye(d, dtype=scores.dtype, device=scores.device)
    kept = scores * apart
    row = kept.sum(1) / (d - 1)
    mean = row.mean()
    # Scores that are all zero have nothing to take out.
    shared = torch.where(mean == 0, torch.zeros_like(kept), row[:, None] * row / torch.where(mean == 0, 1.0, mean))
    return (kept - shared) * apart


def contact_scores(energy: Potts | Ising, without: int | None = None) -> Tensor:
    """Score every pair of sites for a contact: `coupling_norms` after the average product correction, ``(d, d)``.

    Parameters
    ----------
    energy, without
        As of `coupling_norms`.
    """
    return average_product_correction(coupling_norms(energy, without))


def _square(sites: int, i: Tensor, j: Tensor, values: Tensor) -> Tensor:
    half = values.new_zeros((sites, sites)).index_put((i, j), values)
    return half + half.T


def _rebuilt(energy: Potts, i: Tensor, j: Tensor, between: Tensor, field: Tensor) -> Potts:
    """A Potts model of these couplings, as a matrix where the first was one between classes, else along its edges."""
    old = energy.interaction
    trainable = any(p.requires_grad for p in old.parameters())
    d, k = old.shape.numel(), field.shape[-1]
    if isinstance(old, Couplings) and old.classes is not None:
        half = between.new_zeros((d, d, k, k)).index_put((i, j), between)
        full = half + half.permute(1, 0, 3, 2)
        interaction = Couplings(full.transpose(1, 2).contiguous(), trainable)
    else:
        interaction = SparseCouplings(old.shape, i, j, between, trainable)
    return Potts(interaction, field=field, trainable=any(p is energy.field for p in energy.parameters()))


def _check(energy: object) -> None:
    if not isinstance(energy, Potts):
        raise ArgumentTypeError(
            f"Gauges are of Potts models; got {type(energy).__name__}. An Ising model has only one."
        )
