r"""Importance sampling: log Z from draws of a normalised density near the energy's own, without any chain.

.. math:: Z = \mathbb{E}_{x \sim q}[w(x)], \qquad w(x) = e^{-E(x)} / q(x)

It is annealing in one increment: good where q is close already, as a flow is to what is `tilted` from it. From draws of
the model, :math:`\mathbb{E}_p[1 / w] = 1 / Z` bounds log Z from above, and Bennett's acceptance ratio takes the value
from both (see `gibbsian.partition.bracket`).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.domains import same_support
from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.partition.annealed import check_draws
from gibbsian.partition.base import LogZ, from_log_weights, warn_if_degenerate
from gibbsian.partition.bracket import between

CHUNK = 1 << 14
"""Draws at once."""

REMEDY = "Take a base closer to the energy, or anneal from it: ais(energy, base, rng=rng)."


@torch.no_grad()
def importance_sampling(
    energy: Energy,
    base: Tractable,
    model_draws: Tensor | None = None,
    *,
    rng: Generator,
    draws: int = 4096,
    confidence: float = 0.99,
) -> LogZ:
    """Estimate log Z from weighted draws of a base.

    Parameters
    ----------
    energy
        The energy whose log Z is sought.
    base
        What is drawn from: it must have density wherever the energy's does.
    model_draws
        Independent exact draws of the energy's own density, ``(n, *event)``, for an upper bound. Where they come from
        chains, the bound is as good as these: see `reverse_ais`.
    rng
        The generator, on the base's device.
    draws
        Draws of the base, 2 or more.
    confidence
        Probability with which the bounds hold, both at once where there are two.

    Returns
    -------
    LogZ
        ``upper`` is infinite without draws of the model; ``ess`` is the effective number of weights, and a warning says
        when few of them dominate.

    Raises
    ------
    ArgumentTypeError
        If the base is not tractable.
    ShapeError, DomainError
        If base, draws and energy are not on one space.
    OptionError
        If there are fewer than two draws, or the confidence is not between 0 and 1.
    DivergenceError
        If no weight is finite.
    """
    require_tractable(base, "base")
    if energy.event_shape is not None and energy.event_shape != base.event_shape:
        raise ShapeError(
            f"The base draws points of shape {tuple(base.event_shape)} and the energy's have "
            f"{tuple(energy.event_shape)}; build the base for the energy's points."
        )
    if (energy.support.is_discrete or base.support.is_discrete) and not same_support(energy.support, base.support):
        raise DomainError(
            f"The base draws from {base.support} and the energy lives on {energy.support}; weights need one domain."
        )
    if draws < 2:
        raise OptionError(f"draws is 2 or more, for an error needs two weights; got {draws}.")
    parts = [min(CHUNK, draws - done) for done in range(0, draws, CHUNK)]
    forward = torch.cat([_log_weights(energy, base, base.sample(n, rng)) for n in parts])
    if model_draws is None:
        found = from_log_weights(forward, confidence)
    else:
        check_draws(model_draws, base)
        back = torch.cat([_log_weights(energy, base, part) for part in model_draws.split(CHUNK)])
        found = between(forward, back, confidence)
    warn_if_degenerate(found, "importance weights", REMEDY)
    return found


def _log_weights(energy: Energy, base: Tractable, x: Tensor) -> Tensor:
    return base(x) - energy(x)
