"""Discriminators checked and calibrated, before they correct any draws.

A discriminator tells data from draws by the sign of its logit; to correct draws its size must be right, too. Logistic
regression on rows that trained neither network finds by how much it is too steep or too flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.base import Energy
from gibbsian.energies.discriminators import (
    CalibratedDiscriminator,
    LatentDiscriminator,
    check_discriminator,
    latent_energy,
)
from gibbsian.energies.generators import GeneratorNetwork, require_fitting
from gibbsian.errors import ArgumentTypeError, DataError, OptionError

DiscriminatorLike = Energy | nn.Module | Callable[[Tensor], Tensor]
"""An energy, minus the logit, or a module that gives logits."""

CHUNK = 10_000
"""Draws that are made at once."""


@dataclass(frozen=True)
class Calibration:
    """A discriminator, calibrated.

    Attributes
    ----------
    energy
        The calibrated discriminator's energy, minus the logit.
    slope, offset
        What the logit was multiplied with, and what was added, in nats: 1 and 0 for a calibrated one.
    z
        How far the share of data was from what the discriminator said of them before, in standard errors.
    loss_before, loss_after
        Cross entropy of the rows, in nats; log 2 is a guess's.
    """

    energy: CalibratedDiscriminator
    slope: Estimate
    offset: Estimate
    z: float
    loss_before: float
    loss_after: float


@torch.no_grad()
def calibrate_discriminator(
    discriminator: DiscriminatorLike, generator: GeneratorNetwork, real: Tensor, *, rng: Generator
) -> Calibration:
    r"""Fit :math:`P(data \mid x) = 1 / (1 + e^{-a d(x) - b})` to held-out rows and as many draws.

    Logistic regression on the logit, as `Metropolis-Hastings generative adversarial networks (Turner et al., 2019)
    <https://arxiv.org/abs/1811.11357>`_ calibrate; a is an inverse temperature, and b no matter to any sampler here.

    Parameters
    ----------
    discriminator, generator
        As for `gibbsian.energies.discriminators.latent_energy`.
    real
        Rows that trained neither of the two, ``(n, *event)``; some hundreds.
    rng
        The generator of the draws.

    Raises
    ------
    ShapeError, ArgumentTypeError, DomainError, OptionError
        As `gibbsian.energies.discriminators.latent_energy`.
    DataError
        If there are fewer than ten rows, a logit is not finite, or the logit tells the rows and draws apart without
        error, or the wrong way round.
    """
    energy = checked(discriminator, generator, rng)
    require_fitting(generator, real.shape[1:], "the held-out rows")
    if len(real) < 10:
        raise DataError(f"Calibration needs 10 held-out rows or more, better hundreds; got {len(real)}.")
    points = torch.cat([real, generator.sample(len(real), rng).to(real.dtype)])
    logits = -torch.cat([energy.discriminator(part) for part in points.split(CHUNK)]).double()
    if bad := int((~torch.isfinite(logits)).sum()):
        raise DataError(f"{bad} of {len(logits)} logits are not finite; look for a saturated sigmoid.")
    labels = torch.zeros_like(logits)
    labels[: len(real)] = 1.0
    of_data, of_draws = logits[: len(real)], logits[len(real) :]
    if float(of_data.min()) > float(of_draws.max()):
        raise DataError(
            f"The discriminator tells all {len(real)} held-out rows from as many draws without error, logits "
            f"{float(of_data.min()):.3g} and up against {float(of_draws.max()):.3g} and down: the two do not overlap, "
            "so that no draw can be corrected. Train the generator further, or take a larger r1."
        )
    slope, offset = _logistic(logits, labels)
    if slope.value < -3.0 * slope.stderr or float(of_data.max()) < float(of_draws.min()):
        raise DataError(
            f"The discriminator is higher at draws than at held-out rows: the slope is {slope}. An energy is minus the "
            "logit; pass Discriminator(net) for a network that gives logits."
        )
    told = logits.sigmoid()
    z = float((labels - told).sum() / (told * (1.0 - told)).sum().sqrt())
    cross = nn.functional.binary_cross_entropy_with_logits
    after = cross(slope.value * logits + offset.value, labels)
    fitted = CalibratedDiscriminator(energy.discriminator, slope.value, offset.value).to(real.device, real.dtype)
    return Calibration(fitted, slope, offset, z, float(cross(logits, labels)), float(after))


def _logistic(logits: Tensor, labels: Tensor) -> tuple[Estimate, Estimate]:
    """Slope and offset of a logistic regression in one number, with errors from Fisher's information."""
    from sklearn.linear_model import LogisticRegression

    column = logits.cpu()[:, None]
    fitted = LogisticRegression(C=math.inf).fit(column.numpy(), labels.cpu().numpy())
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    p = (slope * column + offset).sigmoid()
    design = torch.cat([column, torch.ones_like(column)], 1)
    errors = torch.linalg.pinv(design.T @ (p * (1.0 - p) * design), hermitian=True).diagonal().sqrt().tolist()
    return Estimate(slope, errors[0]), Estimate(offset, errors[1])


@torch.no_grad()
def checked(
    discriminator: DiscriminatorLike, generator: GeneratorNetwork, rng: Generator, **counts: int
) -> LatentDiscriminator:
    """Build the latent energy of a pair, and check it and what else was passed.

    Raises
    ------
    ShapeError, ArgumentTypeError, DomainError, OptionError
        As `gibbsian.energies.discriminators.latent_energy`, and if a count is not a whole number from 1 on.
    """
    energy = latent_energy(discriminator, generator)
    if not isinstance(rng, Generator):
        raise ArgumentTypeError(f"rng is a torch.Generator, as torch.Generator().manual_seed(0); got {rng!r}.")
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name} is a whole number, 1 or more; got {value!r}.")
    # Draws of its own: to look changes nothing in what follows.
    looking = torch.Generator(rng.device).manual_seed(0)
    check_discriminator(energy.discriminator, generator.sample(64, looking))
    return energy
