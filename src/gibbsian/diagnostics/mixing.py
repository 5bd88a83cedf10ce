r"""How chains move through energies and along a ladder of temperatures.

Hamiltonian kernels change the energy only by the momentum that they draw. The *energy Bayesian fraction of missing
information*

.. math:: \mathrm{E\text{-}BFMI} = \frac{\mathbb{E}\,(H_t - H_{t-1})^2}{\mathrm{Var}\,H}

compares one draw's change with the spread to be covered: near 1 or above is free movement, below 0.3 means that the
chain walks slowly between typical energies and the tails.

Diagnosing Suboptimal Cotangent Disintegrations in Hamiltonian Monte Carlo (Betancourt, 2016)
<https://arxiv.org/abs/1604.00695>

Replicas on a ladder carry a state from the hot end, where it is renewed, to the cold one, where it counts. A *round
trip* is the way from one end to the other and back; their rate says how often the cold chain is told something new.

Feedback-optimized parallel tempering Monte Carlo (Katzgraber et al., 2006)
<https://arxiv.org/abs/cond-mat/0602085>
"""

from __future__ import annotations

import torch
from torch import Tensor

from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError


def energy_bfmi(hamiltonian: Tensor) -> Tensor:
    """E-BFMI of each chain.

    Parameters
    ----------
    hamiltonian
        ``(draws, chains)``, of every step in a row, with its momentum just drawn, as ``Samples.kept["hamiltonian"]``
        holds it with ``thin=1``; thinned, the value says too much.

    Returns
    -------
    Tensor
        ``(chains,)``, float64; NaN where the Hamiltonian never changes or is not finite.

    Raises
    ------
    ShapeError
        If there are fewer than two draws or no chain axis.
    """
    if hamiltonian.ndim != 2 or hamiltonian.shape[0] < 2:
        raise ShapeError(f"Hamiltonians come as (draws, chains), two draws or more; got {tuple(hamiltonian.shape)}.")
    h = hamiltonian.detach().to(torch.float64)
    return h.diff(dim=0).square().mean(dim=0) / h.var(dim=0)


def round_trips(levels: Tensor, rungs: int | None = None) -> Tensor:
    """Round trips of each replica between the ends of a ladder.

    A trip counts when it is complete: from whichever end is met first to the other one and back. Divide by the number
    of draws for the rate.

    Parameters
    ----------
    levels
        ``(draws, replicas)``, whole numbers: the rung on which each replica stands.
    rungs
        Rungs of the ladder, 0 and ``rungs - 1`` its ends; as many as there are replicas when left out.

    Returns
    -------
    Tensor
        ``(replicas,)``, int64.

    Raises
    ------
    ShapeError
        If the levels are not ``(draws, replicas)``.
    ArgumentTypeError
        If they are not whole numbers.
    OptionError
        If a level is no rung of the ladder, or the ladder has fewer than two.
    """
    if levels.ndim != 2 or levels.numel() == 0:
        raise ShapeError(f"Levels come as (draws, replicas); got {tuple(levels.shape)}.")
    if levels.is_floating_point() or levels.dtype == torch.bool:
        raise ArgumentTypeError(f"Levels are whole numbers, 0 for one end of the ladder; got {levels.dtype}.")
    rungs = levels.shape[1] if rungs is None else rungs
    low, high = int(levels.min()), int(levels.max())
    if rungs < 2 or low < 0 or high >= rungs:
        raise OptionError(f"A ladder of {rungs} rungs (2 or more) has levels 0 to {rungs - 1}; got {low} to {high}.")
    ends = (levels == rungs - 1).long() - (levels == 0).long()
    # The end met last, at each draw: carried forward by the place of the latest visit.
    draw = torch.arange(len(levels), device=levels.device)[:, None]
    latest = torch.where(ends != 0, draw, 0).cummax(dim=0).values
    last_end = ends.gather(0, latest)
    crossings = ((last_end[1:] != last_end[:-1]) & (last_end[:-1] != 0)).sum(dim=0)
    return crossings // 2
