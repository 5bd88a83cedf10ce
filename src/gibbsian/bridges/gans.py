r"""Draws of a generator, corrected by its discriminator: rejection, independence chains, and chains in latent space.

All three have :math:`p_g(x)\, e^{d(x)}` for their target, the data's density where the discriminator's logit d is the
exact log-ratio. They differ in what they cost and in how they fail:

========================  ===========================================  ==============================================
`rejection`               independent draws, exact                     accepts one in :math:`\max e^d` draws
`metropolis_hastings`     as exact as the chains are long              stays long where d is high
`ddls`                    uses gradients, improves every draw          moves locally; modes keep nearly their shares
========================  ===========================================  ==============================================

A discriminator that came out of a game is rarely an exact log-ratio: train it on alone while the generator stands still
(``generator.requires_grad_(False)``, and ``fit`` again), and calibrate it on held-out rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.adaptation import tune
from gibbsian.bridges.discriminators import CHUNK, DiscriminatorLike, checked
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.discriminators import LatentDiscriminator
from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.errors import OptionError
from gibbsian.kernels.base import Kernel, State
from gibbsian.kernels.independent import IndependentMH
from gibbsian.kernels.langevin import MALA
from gibbsian.sampling import sample

TOO_FEW = 1e-4
"""A mean acceptance below this is none."""

SMALL_STEP = 1e-3
"""Where the tuning of a step size starts."""


@dataclass(frozen=True, repr=False)
class GanDraws:
    """Corrected draws of a generator.

    Attributes
    ----------
    x
        The draws, ``(n, *event)``.
    z
        Their latent vectors, ``(n, *latent)``.
    acceptance
        The share of proposals that were accepted, with its error.
    evaluations
        How many points the discriminator has seen.
    nonfinite
        How many proposals had no finite logit; they were rejected.
    log_bound
        Of rejection: the largest logit seen, in nats; else NaN.
    """

    x: Tensor
    z: Tensor
    acceptance: Estimate
    evaluations: int
    nonfinite: int = 0
    log_bound: float = math.nan

    def __repr__(self) -> str:
        """Number, shape, acceptance and cost."""
        return (
            f"GanDraws({len(self.x)} of shape {tuple(self.x.shape[1:])}, acceptance {self.acceptance}, "
            f"{self.evaluations} evaluations)"
        )


@torch.no_grad()
def rejection(
    discriminator: DiscriminatorLike,
    generator: GeneratorNetwork,
    n: int,
    *,
    rng: Generator,
    gamma: float = 0.0,
    quantile: float | None = None,
    pilot: int = CHUNK,
    most: int = 1_000_000,
) -> GanDraws:
    r"""Accept draws with the probability :math:`\sigma(F(x) - \gamma)`: discriminator rejection sampling.

    .. math:: F(x) = d(x) - M - \log(1 - e^{d(x) - M}), \qquad \sigma(F(x)) = e^{d(x) - M},

    with M the largest logit of all draws, the pilot's included: where a later draw raises it, earlier ones are judged
    again, with their own uniform numbers. With :math:`\gamma = 0` the accepted draws are those of :math:`p_g e^d`;
    below it more are accepted, and they are nearer to the generator's own. `Discriminator rejection sampling (Azadi et
    al., 2019) <https://arxiv.org/abs/1810.06758>`_.

    Parameters
    ----------
    discriminator, generator
        As for `gibbsian.energies.discriminators.latent_energy`.
    n
        Draws to accept.
    rng
        The generator of everything random.
    gamma
        The shift, in nats.
    quantile
        Takes this quantile of F over the pilot draws for :math:`\gamma` instead, as the paper does: at q about 1 - q of
        the draws are accepted with more than even odds.
    pilot
        Draws from which M is found first.
    most
        Draws to try at most, the pilot's not counted.

    Raises
    ------
    ShapeError, ArgumentTypeError, DomainError
        As `gibbsian.energies.discriminators.latent_energy`.
    OptionError
        If an option is out of its range, or too few of the draws were accepted.
    """
    energy = checked(discriminator, generator, rng, n=n, pilot=pilot, most=most)
    if quantile is not None and not 0.0 < quantile < 1.0:
        raise OptionError(f"quantile lies between 0 and 1; got {quantile}.")
    if not math.isfinite(gamma):
        raise OptionError(f"gamma is a finite number of nats; got {gamma}.")
    seen = _finite(torch.cat([_proposed(energy, count, rng)[1] for count in _chunks(pilot)]))
    bound = float(seen.max())
    if quantile is not None:
        # The quantile of the largest, which is certain to be accepted, is no shift.
        gamma = min(float(torch.quantile(_odds(seen, bound).float(), quantile)), 1e3)
    kept: list[Tensor] = []
    tried = accepted = nonfinite = 0
    while accepted < n and tried < most:
        z, d = _proposed(energy, min(CHUNK, most - tried), rng)
        u = torch.rand(d.shape, generator=rng, dtype=d.dtype, device=d.device)
        nonfinite += int((~d.isfinite() & (d != -math.inf)).sum())
        bound = max(bound, float(_finite(d).max()))
        kept = [torch.cat(parts) for parts in zip(kept, (z, d, u))] if kept else [z, d, u]
        chosen = kept[2] < _odds(kept[1], bound).sub(gamma).sigmoid()
        kept = [part[chosen] for part in kept]
        tried, accepted = tried + len(d), len(kept[2])
    share = accepted / tried
    if accepted < n:
        raise OptionError(
            f"Rejection accepted {accepted} of {tried} draws, and {n} were asked for: the largest logit, {bound:.4g} "
            f"nats, is {bound - float(seen.median()):.4g} above the median draw's. Calibrate the discriminator, accept "
            "more with gamma below 0 or with quantile=0.8, allow most= more draws, or use ddls, which moves draws "
            "instead of waiting for good ones."
        )
    x = energy.points(kept[0][:n])
    error = Estimate(share, math.sqrt(share * (1.0 - share) / tried))
    return GanDraws(x, kept[0][:n], error, pilot + tried, nonfinite, bound)


@torch.no_grad()
def metropolis_hastings(
    discriminator: DiscriminatorLike,
    generator: GeneratorNetwork,
    n: int,
    *,
    rng: Generator,
    steps: int = 200,
    start: Tensor | None = None,
    compile: bool = False,
) -> GanDraws:
    r"""Run independence chains whose proposals are the generator's draws, and return where they end.

    It is `gibbsian.kernels.independent.IndependentMH` on `latent_energy`, with proposals from the law of z.

    A proposal x' is accepted with probability

    .. math:: \min\{1, \frac{D(x)^{-1} - 1}{D(x')^{-1} - 1}\} = \min\{1, e^{d(x') - d(x)}\}, \qquad
              D = \frac{1}{1 + e^{-d}} .

    `Metropolis-Hastings generative adversarial networks (Turner et al., 2019) <https://arxiv.org/abs/1811.11357>`_.
    Chains that start at real rows are near their target from the start; those that never leave theirs start again at a
    draw, so that no real row is ever returned.

    Parameters
    ----------
    discriminator, generator
        As for `gibbsian.energies.discriminators.latent_energy`.
    n
        Chains, each of which gives one draw.
    rng
        The generator of everything random.
    steps
        Proposals per chain.
    start
        Real rows at which chains start, ``(m, *event)``, drawn from with replacement; without them chains start at
        draws of the generator.
    compile
        As in `gibbsian.sampling.sample`.

    Raises
    ------
    ShapeError, ArgumentTypeError, DomainError
        As `gibbsian.energies.discriminators.latent_energy`.
    OptionError
        If an option is out of its range, or nearly no proposal was accepted.
    """
    energy = checked(discriminator, generator, rng, n=n, steps=steps)
    kernel = IndependentMH(generator.latent)
    at: Tensor | State = generator.latent.sample(n, rng)
    if start is not None:
        require_fitting(generator, start.shape[1:], "the chains' start")
        picked = torch.randint(len(start), (n,), generator=rng, device=rng.device).to(start.device)
        at = _outside(energy, start[picked], at)
    made = sample(energy, kernel, at, steps=steps, rng=rng, compile=compile)
    if not (mean := float(made.acceptance.mean())) > TOO_FEW:
        raise OptionError(
            f"The chains accepted {mean:.2g} of their proposals: the discriminator's logits where they start are "
            "far above those of draws. Calibrate it, train it on against the generator as it now is, or use ddls, "
            "which moves draws instead of waiting for good ones."
        )
    z, acceptance, seen = made.x, made.acceptance, n * (steps + 1)
    if len(stayed := z.flatten(1).isnan().any(1).nonzero().flatten()):
        again = sample(energy, kernel, generator.latent.sample(len(stayed), rng), steps=steps, rng=rng, compile=compile)
        z, acceptance = z.index_copy(0, stayed, again.x), acceptance.index_copy(0, stayed, again.acceptance)
        seen += len(stayed) * (steps + 1)
    return GanDraws(energy.points(z), z, _mean(acceptance), seen, int(made.nonfinite.sum()))


def _mean(acceptance: Tensor) -> Estimate:
    """Mean over chains, with its error."""
    error = float(acceptance.std()) / math.sqrt(len(acceptance)) if len(acceptance) > 1 else math.nan
    return Estimate(float(acceptance.mean()), error)


def _outside(energy: LatentDiscriminator, rows: Tensor, z: Tensor) -> State:
    """Chains at rows that no latent vector made: NaN stands for it until a proposal is accepted."""
    of_rows = torch.cat([energy.discriminator(part) for part in rows.split(CHUNK)]).to(z.dtype)
    nothing = z.new_zeros((len(z), 0))
    return State(torch.full_like(z, math.nan), of_rows, nothing, memory=(torch.zeros_like(of_rows),))


def ddls(
    discriminator: DiscriminatorLike,
    generator: GeneratorNetwork,
    n: int,
    *,
    rng: Generator,
    steps: int = 200,
    kernel: Kernel | None = None,
    tuning: int = 100,
    compile: bool = False,
) -> GanDraws:
    """Walk the latent space by Langevin steps on `latent_energy`: discriminator driven latent sampling.

    `Your GAN is secretly an energy-based model and you should use discriminator driven latent sampling (Che et al.,
    2020) <https://arxiv.org/abs/2003.06060>`_. Chains start at draws of the generator's own law.

    Parameters
    ----------
    discriminator, generator
        As for `gibbsian.energies.discriminators.latent_energy`.
    n
        Chains, each of which gives one draw.
    rng
        The generator of everything random.
    steps
        Steps per chain.
    kernel
        Any over the law's domain, taken as it is, such as ``ULA(0.01)``; MALA with a tuned step size when left out.
    tuning
        Steps of that tuning, which warm the chains up.
    compile
        As in `gibbsian.sampling.sample`.

    Raises
    ------
    ShapeError, ArgumentTypeError, DomainError
        As `gibbsian.energies.discriminators.latent_energy`.
    OptionError
        If an option is out of its range, or nearly no proposal was accepted.
    DivergenceError
        If no step size suits.
    """
    energy = checked(discriminator, generator, rng, n=n, steps=steps)
    at: Any = generator.latent.sample(n, rng)
    seen = n * (steps + 1)
    if kernel is None:
        tuned = tune(energy, MALA(SMALL_STEP), at, rng=rng, steps=tuning, compile=compile)
        kernel, at = tuned.kernel, tuned.state
        seen += n * tuning
    assert kernel is not None
    made = sample(energy, kernel, at, steps=steps, rng=rng, compile=compile)
    if not (mean := float(made.acceptance.mean())) > TOO_FEW:
        raise OptionError(f"{kernel!r} accepted {mean:.2g} of its proposals; use a smaller step_size, or no kernel=.")
    return GanDraws(energy.points(made.x), made.x, _mean(made.acceptance), seen, int(made.nonfinite.sum()))


def _proposed(energy: LatentDiscriminator, n: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Draw latent vectors, and evaluate the logits of their points."""
    z = energy.generator.latent.sample(n, rng)
    return z, torch.cat([-energy.discriminator(energy.generator(part)) for part in z.split(CHUNK)])


def _odds(d: Tensor, bound: float) -> Tensor:
    """F: the log-odds of a probability of exp(d - bound)."""
    below = (d - bound).clamp(max=0.0)
    odds = below - (-torch.expm1(below)).log()
    # No finite logit above the bound exists; what is not finite is rejected.
    return torch.where(d.isfinite(), odds, -math.inf)


def _finite(d: Tensor) -> Tensor:
    found = d[d.isfinite()]
    if len(found) == 0:
        raise OptionError(
            f"None of {len(d)} draws has a finite logit; look for a saturated sigmoid in the discriminator."
        )
    return found


def _chunks(total: int) -> list[int]:
    return [min(CHUNK, total - at) for at in range(0, total, CHUNK)]
