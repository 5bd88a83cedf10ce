r"""Plain importance sampling: log Z from draws of one proposal, without annealing.

The weight of a draw is :math:`w = e^{-E(x)} / q(x)`, and :math:`E[w] = Z`. It is the best there is where q is close to
the model, as a trained flow or generator may be, and useless where it is not, of which the effective size is the
measure. By Jensen's inequality

.. math:: \mathbb{E}_q[\log w] = -\mathbb{E}_q[E(x)] + H(q) = \log Z - KL(q \| p) \;\le\; \log Z .

From draws of the model, :math:`E_p[1 / w] = 1 / Z` bounds log Z from above, and Bennett's acceptance ratio takes the
value from both sides (see `gibbsian.partition.bracket`).

A generator with noise has only estimates :math:`\hat q` of its density. Those of
`gibbsian.energies.generator_proposals` have :math:`E[1 / \hat q \mid x] = 1 / q(x)`, so that both lines stay true (the
bound loses what the estimate is uncertain by).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.base import Energy
from gibbsian.energies.domains import common_event_shape, common_support, same_support
from gibbsian.energies.generator_proposals import GeneratorProposal
from gibbsian.energies.layers import check_function
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError
from gibbsian.partition.annealed import check_draws
from gibbsian.partition.base import LogZ, from_log_weights, warn_if_degenerate
from gibbsian.partition.bracket import between
from gibbsian.processes.work import over_lanes

CHUNK = 1 << 13
"""Draws evaluated at once."""

REMEDY = "Train the proposal longer, take a wider one, or anneal from it: ais(energy, proposal, rng=rng)."
"""What to try when a few weights dominate."""


def importance_sampling(
    energy: Energy,
    proposal: Tractable | GeneratorProposal,
    model_draws: Tensor | None = None,
    *,
    rng: Generator,
    draws: int = 10_000,
    confidence: float = 0.99,
    lanes: int | None = None,
) -> LogZ:
    """Estimate log Z by importance sampling.

    Parameters
    ----------
    energy
        The energy whose log Z is sought.
    proposal
        What is drawn from: a `Tractable`, such as a `Flow` or a `Gaussian`, with mass wherever the energy's density has
        some; or a `GeneratorProposal`.
    model_draws
        Independent exact draws of the energy's own density, ``(n, *event)``, for an upper bound. Where they come from
        chains, the bound is as good as these: see `reverse_ais`. With a tractable proposal only.
    rng
        The generator, on the proposal's device.
    draws
        Of the proposal, 2 or more.
    confidence
        Probability with which the bounds hold, both at once where there are two; this holds for any number of draws and
        any law of the weights.
    lanes
        Equal shares of the draws, as in `ais`.

    Returns
    -------
    LogZ
        ``upper`` is infinite without draws of the model: draws of the proposal cannot tell how much of the energy they
        never saw.

    Warns
    -----
    RuntimeWarning
        If a few weights dominate.

    Raises
    ------
    OptionError, ShapeError, DomainError, ArgumentTypeError, DivergenceError
        If an argument does not fit or no energy is finite; the message says what to try.
    """
    if lanes is None:
        forward = log_importance_weights(energy, proposal, draws, rng=rng)
    else:
        _checked(energy, proposal, draws)
        # A lane may have one draw alone.
        work = lambda rows, own: (_weights(Energy.of(energy), proposal, rows.stop - rows.start, own),)  # noqa: E731
        (forward,) = over_lanes(lanes, draws, rng, work, "draws")
    if model_draws is None:
        result = from_log_weights(forward, confidence)
    else:
        if not isinstance(proposal, Tractable):
            raise ArgumentTypeError(
                f"Draws of the model bound log Z from above where the proposal's density is known; {proposal!r} has an "
                "estimate of it. Leave out model_draws, or take a Flow."
            )
        check_draws(model_draws, proposal)
        with torch.no_grad():
            parts = [proposal(x).double() - energy(x).double() for x in model_draws.split(CHUNK)]
        result = between(forward, torch.cat(parts), confidence)
    warn_if_degenerate(result, "importance weights", REMEDY)
    return result


def reverse_kl_bound(
    energy: Energy, proposal: Tractable | GeneratorProposal, *, rng: Generator, draws: int = 10_000
) -> Estimate:
    r"""Lower bound on log Z, :math:`\mathbb{E}_q[\log w]`, in nats: on average, not at a confidence.

    It is below log Z by the reverse divergence of the proposal from the model, and with a `GeneratorProposal` further
    below by what the estimate of its density costs. The ``lower`` of `importance_sampling` holds at a confidence, and
    is mostly the higher of the two.

    Parameters
    ----------
    energy, proposal, rng, draws
        As in `importance_sampling`.

    Returns
    -------
    Estimate
        The mean of the log-weights, and its standard error over draws.

    Raises
    ------
    DivergenceError
        If a weight is not finite: the bound is then minus infinity.
    OptionError, ShapeError, DomainError, ArgumentTypeError
        As in `importance_sampling`.
    """
    log_w = log_importance_weights(energy, proposal, draws, rng=rng)
    if bad := int((~torch.isfinite(log_w)).sum()):
        raise DivergenceError(
            f"{bad} of {draws} log-weights are not finite, so that their mean bounds nothing. Take a proposal that "
            "stays where the energy is finite, or importance_sampling, in which such draws count as weight 0."
        )
    return Estimate(float(log_w.mean()), float(log_w.std() / draws**0.5))


@torch.no_grad()
def log_importance_weights(
    energy: Energy, proposal: Tractable | GeneratorProposal, draws: int, *, rng: Generator
) -> Tensor:
    """Log-weights of draws of a proposal, ``(draws,)``, in float64.

    Parameters
    ----------
    energy, proposal, draws, rng
        As in `importance_sampling`.
    """
    return _weights(_checked(energy, proposal, draws), proposal, draws, rng)


@torch.no_grad()
def _weights(energy: Energy, proposal: Tractable | GeneratorProposal, draws: int, rng: Generator) -> Tensor:
    parts = []
    for size in [CHUNK] * (draws // CHUNK) + [draws % CHUNK] * (draws % CHUNK > 0):
        if isinstance(proposal, GeneratorProposal):
            x, cost = proposal.propose(size, rng)
        else:
            x = proposal.sample(size, rng)
            cost = proposal(x)
        parts.append(cost.double() - energy(x).double())
    return torch.cat(parts)


def _checked(energy: Energy, proposal: Tractable | GeneratorProposal, draws: int) -> Energy:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise OptionError(f"draws counts the draws, 2 or more, for an error needs two weights; got {draws!r}.")
    if not isinstance(proposal, Tractable | GeneratorProposal):
        raise ArgumentTypeError(
            "proposal is a tractable energy (Gaussian, Flow, ...), or GeneratorProposal(generator, scale, rng=rng) for "
            f"a generator network; got {proposal!r}."
        )
    if context := getattr(energy, "context", ()):
        raise OptionError(f"The energy is conditional on {', '.join(context)}: fix it with energy.given(...).")
    check_function(energy)
    adopted = Energy.of(energy)
    common_event_shape((proposal, adopted))
    support = common_support((proposal, adopted))
    if (support.is_discrete or proposal.support.is_discrete) and not same_support(proposal.support, adopted.support):
        raise DomainError(
            f"The proposal draws from {proposal.support} and the energy lives on {adopted.support}; choose one of its "
            "kind."
        )
    return adopted
