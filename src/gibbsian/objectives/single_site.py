r"""What objectives on discrete states share that look at changes of single sites: log-ratios of a state's neighbours.

A neighbour :math:`x'` of a state x has another value at one site, and

.. math:: r(x \to x') = \log \frac{p(x')}{p(x)} = E(x) - E(x')

needs no Z. With d sites of K values a state has d (K - 1) neighbours. An energy that tells its conditionals
(``conditional_logits``: Ising, Potts) gives all ratios at once. Any other is evaluated at the neighbours, a piece after
the other; a piece is evaluated once more when gradients flow back, so that memory does not grow with the sites.

What is summed over all sites can be estimated from some: with a random subset S of m sites for each row,
:math:`\tfrac{d}{m} \sum_{s \in S}` has the sum over all as its mean, and so have its gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gibbsian.energies.base import Energy, tells_conditionals
from gibbsian.errors import OptionError
from gibbsian.kernels.discrete import Change, changed
from gibbsian.kernels.gibbs import checked_logits
from gibbsian.objectives.base import Batch, Loss, Objective, check_one_per_row, context_of
from gibbsian.objectives.checks import check_count, check_discrete
from gibbsian.typing import Context


class SingleSiteObjective(Objective):
    """A mean over rows of a sum over sites of a function of the log-ratios; subclasses write that function.

    Parameters
    ----------
    sites
        Sites of each row that are looked at, chosen at random, all different; ``None`` for all.
    chunk
        Points at which the energy is evaluated at once.

    Raises
    ------
    OptionError
        If ``sites`` or ``chunk`` is no whole number of 1 or more.
    """

    def __init__(self, sites: int | None = None, chunk: int = 8192) -> None:
        super().__init__()
        self.sites = None if sites is None else check_count("sites", sites, "the sites of each row that are looked at")
        self.chunk = check_count("chunk", chunk, "the points at which the energy is evaluated at once")

    @abstractmethod
    def score(self, log_ratios: Tensor) -> Tensor:
        """Loss of each site from the log-ratios of its K - 1 other values: ``(n, m, K - 1) -> (n, m)``."""

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Compare every row with its neighbours.

        Raises
        ------
        DomainError
            If the energy does not live on binary or one-hot states, or the data do not.
        ShapeError
            If the data have another shape than the energy's, or it does not return one number per row.
        ArgumentTypeError
            If the data are not floating-point numbers.
        OptionError
            If there are fewer sites than ``sites``, or the energy asks for a label that the batch lacks.
        """
        x = batch.x.detach()
        hot = check_discrete(type(self).__name__, energy, x)
        count = (x.shape[1:-1] if hot else x.shape[1:]).numel()
        if self.sites is not None and self.sites > count:
            raise OptionError(f"sites={self.sites} is more than the {count} of a row; leave it out to look at all.")
        context = context_of(energy, batch)
        metrics: dict[str, Tensor] = {}
        if tells_conditionals(energy):
            ratios = _from_conditionals(energy, x, context, hot)
        else:
            value = check_one_per_row(energy(x, **context), len(x))
            metrics["energy_data"] = value.detach().mean()
            chosen = _chosen(len(x), count, self.sites, x, rng)
            ratios = value.reshape(-1, 1, 1) - _neighbours(energy, x, context, chosen, self.chunk, hot)
        # The sum over sites, or the estimate of it from some.
        loss = count * self.score(ratios).mean()
        metrics["accuracy"] = (ratios.detach() <= 0).all(2).to(x.dtype).mean()
        return Loss(loss, metrics)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{'' if self.sites is None else f'sites={self.sites}, '}chunk={self.chunk}"


def odds_against(log_ratios: Tensor) -> Tensor:
    """Log-odds against the value that a site has, given all others: ``(n, m, K - 1) -> (n, m)``."""
    return log_ratios.squeeze(2) if log_ratios.shape[2] == 1 else log_ratios.logsumexp(2)


def _chosen(n: int, count: int, sites: int | None, like: Tensor, rng: Generator) -> Tensor:
    """Indices of the sites of each row that are looked at, ``(n, m)``."""
    if sites is None or sites == count:
        return torch.arange(count, device=like.device).expand(n, count)
    return torch.rand((n, count), generator=rng, device=like.device).topk(sites, 1).indices


def _others(x: Tensor) -> Tensor:
    """The classes that one-hot sites ``(n, *sites, K)`` do not have, ``(n, d, K - 1)``."""
    classes = x.shape[-1]
    own = x.reshape(len(x), -1, classes).argmax(2, keepdim=True)
    return (own + torch.arange(1, classes, device=x.device)) % classes


def _from_conditionals(energy: Energy, x: Tensor, context: Context, hot: bool) -> Tensor:
    """Log-ratios of all neighbours, from the law of each site given the others, ``(n, d, K - 1)``."""
    logits = checked_logits(energy, x, slice(None), **context)
    if not hot:
        return ((1.0 - 2.0 * x) * logits).reshape(len(x), -1, 1)
    own = (logits * x).sum(-1).reshape(len(x), -1, 1)
    return logits.reshape(len(x), -1, x.shape[-1]).gather(2, _others(x)) - own


def _neighbours(energy: Energy, x: Tensor, context: Context, chosen: Tensor, chunk: int, hot: bool) -> Tensor:
    """Energies of the neighbours at the chosen sites ``(n, m)``, piece by piece: ``(n, m, K - 1)``."""
    others = _others(x) if hot else x.new_zeros((len(x), 1, 1), dtype=torch.int64)
    each = others.shape[2]
    shape = (*chosen.shape, each)
    total = chosen.numel() * each
    flat = chosen.flatten()

    def piece(first: int, last: int) -> Tensor:
        place = torch.arange(first, last, device=x.device)
        row, site = place // (shape[1] * each), flat[place // each]
        # The class before is read by nobody: a change sets the one after.
        after = others[row, site, place % each] if hot else torch.zeros_like(site)
        points = changed(x[row], Change(site, after, after), hot)
        return check_one_per_row(energy(points, **{k: v[row] for k, v in context.items()}), last - first)

    pieces = [(first, min(first + chunk, total)) for first in range(0, total, chunk)]
    if len(pieces) == 1 or not torch.is_grad_enabled():
        found = [piece(*ends) for ends in pieces]
    else:
        found = [cast(Tensor, checkpoint(piece, *ends, use_reentrant=False)) for ends in pieces]
    return torch.cat(found).view(shape)
