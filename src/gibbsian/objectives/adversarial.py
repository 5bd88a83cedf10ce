r"""Adversarial training: an energy and a generator, trained against one another by one loss.

With the discriminator's logit d = -E and the generator's draws G(z), the logistic game without saturation has

.. math:: L_d = \mathbb{E}_{data}\, s(-d(x)) + \mathbb{E}_z\, s(d(G(z))), \qquad
          L_G = \mathbb{E}_z\, s(-d(G(z))), \qquad s(t) = \log(1 + e^t),

the relativistic game, of pairs of a row and a draw, in which constants of the logit do not count,

.. math:: L_d = \mathbb{E}\, s\big(d(G(z)) - d(x)\big), \qquad L_G = \mathbb{E}\, s\big(d(x) - d(G(z))\big),

and the game of an energy-based GAN, with a margin m,

.. math:: L_d = \mathbb{E}_{data}\, E(x) + \mathbb{E}_z\, [m - E(G(z))]_+, \qquad L_G = \mathbb{E}_z\, E(G(z)).

Both networks move at each step of one optimiser. The value is the sum of both losses; the energy's weights get the
gradient of the first alone, the generator's that of the second alone.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize, softplus

from gibbsian.energies.base import Energy
from gibbsian.energies.discriminators import check_discriminator
from gibbsian.energies.generators import GeneratorNetwork
from gibbsian.energies.reconstruction import ReconstructionEnergy
from gibbsian.errors import DomainError, OptionError
from gibbsian.objectives.amortised import GeneratorObjective
from gibbsian.objectives.base import Batch, Loss, check_one_per_row
from gibbsian.objectives.checks import check_at_least, check_count
from gibbsian.objectives.diversity import COMPARED, diversity
from gibbsian.objectives.noise_contrastive import accuracy, energies


class Adversarial(GeneratorObjective):
    r"""A generative adversarial network: the energy given to ``fit`` is minus the discriminator's logit.

    The loss without saturation of `Generative adversarial nets (Goodfellow et al., 2014)
    <https://arxiv.org/abs/1406.2661>`_, with the penalties :math:`\tfrac{\gamma_1}{2} \mathbb{E}_{data} |\nabla d|^2`
    and :math:`\tfrac{\gamma_2}{2} \mathbb{E}_G |\nabla d|^2` of `Which training methods for GANs do actually converge?
    (Mescheder et al., 2018) <https://arxiv.org/abs/1801.04406>`_, without which the two circle around one another.

    The discriminator then estimates :math:`\log p_{data} / p_g`, and better when the generator stands still: with
    ``every=None`` a second ``fit`` trains the discriminator alone. `latent_energy`, `rejection`
    and `metropolis_hastings` draw from :math:`p_g e^d`. Betas of (0.5, 0.99) and more steps than usual suit a game.

    Parameters
    ----------
    generator
        Learns beside the energy, and is kept as ``objective.generator``. The energy must not contain it.
    relativistic
        Play the game of pairs, `The relativistic discriminator (Jolicoeur-Martineau, 2018)
        <https://arxiv.org/abs/1807.00734>`_. With both penalties, of equal weight, its generator leaves out fewer
        modes: `The GAN is dead; long live the GAN! (Huang et al., 2024) <https://arxiv.org/abs/2501.05441>`_. The logit
        is then a log-ratio up to a constant; train the discriminator alone without the option to find that.
    r1, r2
        Weights of the penalties at data and at draws, in squared units of x. A penalty blurs the logit: the smaller,
        the sharper, and the less steady.
    every
        The generator moves at each so-manieth step, and the discriminator at all of them; ``None`` holds it still.
    learning_rate_factor
        The generator's learning rate over the discriminator's.

    Raises
    ------
    ArgumentTypeError
        If the generator is none.
    OptionError
        If an option is out of its range.
    """

    def __init__(
        self,
        generator: GeneratorNetwork,
        r1: float = 0.1,
        r2: float = 0.0,
        *,
        relativistic: bool = False,
        every: int | None = 1,
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__(generator, 0.0, learning_rate_factor)
        check_at_least(("r1", r1, 0.0), ("r2", r2, 0.0))
        self.r1, self.r2, self.relativistic = float(r1), float(r2), relativistic
        self.every = _turn(every, "discriminator")

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw from the generator, and classify.

        Raises
        ------
        ShapeError
            If generator, data and energy are of different shapes.
        OptionError
            If the energy is conditional, or contains the generator.
        DomainError
            If the energy ends in a sigmoid, or lives on discrete states.
        """
        n, moves = len(batch), _moves(self.generator, self.next_call(), self.every)
        first = not self.seen
        self.check(energy, batch)
        if first:
            check_discriminator(energy, batch.x)
        x, drawn, fake = _points(self, batch, moves, rng, slopes=self.r1 > 0)
        values = check_one_per_row(energy(torch.cat((x, drawn))), 2 * n)
        of_data, of_draws = -values[:n], -values[n:]
        if self.relativistic:
            loss, own = softplus(of_draws - of_data).mean(), softplus(of_data - of_draws).mean()
        else:
            loss, own = softplus(-of_data).mean() + softplus(of_draws).mean(), softplus(-of_draws).mean()
        metrics = energies(values, n) | {"accuracy": accuracy(of_data.detach(), of_draws.detach())}
        metrics["discriminator_loss"] = loss.detach()
        for name, weight, logits, at in (("r1", self.r1, of_data, x), ("r2", self.r2, of_draws, drawn)):
            if weight:
                (slope,) = torch.autograd.grad(logits.sum(), at, create_graph=True)
                squared = slope.flatten(1).square().sum(1).mean()
                loss, metrics[name] = loss + 0.5 * weight * squared, squared.detach()
        metrics |= {"generator_loss": own.detach()} | diversity(drawn[:COMPARED], x[:COMPARED])
        return Loss(loss + _followed(own, drawn, fake) if moves else loss, metrics)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"{self.generator!r}, r1={self.r1}, r2={self.r2}, relativistic={self.relativistic}, every={self.every}, "
            f"learning_rate_factor={self.learning_rate_factor}"
        )


class EnergyBasedGAN(GeneratorObjective):
    r"""An energy-based GAN: the discriminator is an energy, low at data and pushed up to a margin at draws.

    `Energy-based generative adversarial network (Zhao et al., 2017) <https://arxiv.org/abs/1609.03126>`_. The energy is
    one that is bounded below, such as `ReconstructionEnergy`, which ``fit`` is given. The generator may be repelled
    from collapse by the pulling-away term, the mean of the squared cosines between the codes of different draws,

    .. math:: \frac{1}{n (n - 1)} \sum_{i \ne j} \left(\frac{s_i \cdot s_j}{|s_i| |s_j|}\right)^2 .

    Such an energy tells data from the generator's draws near them, and is no log-ratio of densities.

    Parameters
    ----------
    generator
        Learns beside the energy, and is kept as ``objective.generator``. The energy must not contain it.
    margin
        m, in nats: above it the energy leaves draws alone. Larger than the energy of a well rebuilt datum.
    pull_away
        Weight of the pulling-away term; needs an energy with ``codes(x)``, as a `ReconstructionEnergy` has.
    every
        The generator moves at each so-manieth step; ``None`` holds it still.
    learning_rate_factor
        The generator's learning rate over the energy's.

    Raises
    ------
    ArgumentTypeError
        If the generator is none.
    OptionError
        If an option is out of its range.
    """

    def __init__(
        self,
        generator: GeneratorNetwork,
        margin: float = 1.0,
        pull_away: float = 0.0,
        *,
        every: int | None = 1,
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__(generator, 0.0, learning_rate_factor)
        if not 0.0 < margin < math.inf:
            raise OptionError(f"margin is a positive number of nats; got {margin}.")
        check_at_least(("pull_away", pull_away, 0.0))
        self.margin, self.pull_away = float(margin), float(pull_away)
        self.every = _turn(every, "energy")

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw from the generator, and compare energies.

        Raises
        ------
        ShapeError
            If generator, data and energy are of different shapes.
        OptionError
            If the energy is conditional, contains the generator, or has no codes to pull away.
        DomainError
            If the energy lives on discrete states, or is negative at a point, unlike a bounded one.
        """
        n, moves = len(batch), _moves(self.generator, self.next_call(), self.every)
        first = not self.seen
        self.check(energy, batch)
        self._check_codes(energy)
        x, drawn, fake = _points(self, batch, moves, rng)
        values = check_one_per_row(energy(torch.cat((x, drawn))), 2 * n)
        if first and bool((values < 0).any()):
            raise DomainError(
                f"An energy-based GAN needs an energy that is 0 or more, such as ReconstructionEnergy; the lowest of "
                f"{2 * n} values is {float(values.min()):.4g}. With a network's output as a logit, use Adversarial."
            )
        of_data, of_draws = values[:n], values[n:]
        loss = of_data.mean() + (self.margin - of_draws).relu().mean()
        own = of_draws.mean()
        metrics = energies(values, n) | {"discriminator_loss": loss.detach(), "generator_loss": own.detach()}
        metrics |= diversity(drawn[:COMPARED], x[:COMPARED])
        if moves and self.pull_away:
            cosines = pulling_away(energy.codes(drawn))  # pyright: ignore[reportCallIssue]
            own, metrics["pull_away"] = own + self.pull_away * cosines, cosines.detach()
        return Loss(loss + _followed(own, drawn, fake) if moves else loss, metrics)

    def _check_codes(self, energy: Energy) -> None:
        if self.pull_away and not isinstance(energy, ReconstructionEnergy):
            raise OptionError(
                f"pull_away={self.pull_away} needs the codes of a ReconstructionEnergy; got {energy!r}. Set "
                "pull_away=0, or use one."
            )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"{self.generator!r}, margin={self.margin}, pull_away={self.pull_away}, every={self.every}, "
            f"learning_rate_factor={self.learning_rate_factor}"
        )


def pulling_away(codes: Tensor) -> Tensor:
    """Mean squared cosine between different rows of codes ``(n, k)``, 0-d; 0 for a single row."""
    n = len(codes)
    unit = normalize(codes.flatten(1), dim=1)
    squared = (unit @ unit.T).square()
    return (squared.sum() - squared.diagonal().sum()) / max(n * (n - 1), 1)


def _turn(every: int | None, whose: str) -> int | None:
    """Check how often the generator moves."""
    return (
        every if every is None else check_count("every", every, f"the steps of the {whose} per step of the generator")
    )


def _moves(generator: GeneratorNetwork, call: int, every: int | None) -> bool:
    """Whether the generator moves at a call: at its turn, unless it has none or all its weights are frozen."""
    return every is not None and call % every == 0 and any(p.requires_grad for p in generator.parameters())


def _points(
    objective: GeneratorObjective, batch: Batch, moves: bool, rng: Generator, slopes: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Data, draws cut off from the generator, and the draws themselves; the first two ask for gradients of their own.

    Where nothing asks for a gradient in the data, none is kept.
    """
    with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
        fake = objective.draw(len(batch), rng).x.to(batch.x.dtype)
    return batch.x.detach().requires_grad_(slopes), fake.detach().requires_grad_(True), fake


def _followed(own: Tensor, drawn: Tensor, fake: Tensor) -> Tensor:
    """The generator's loss, whose gradient reaches the generator's weights and no others."""
    (slope,) = torch.autograd.grad(own, drawn, retain_graph=True)
    # Worth nothing, with the slope that the loss has in the draws.
    return own.detach() + (slope * (fake - fake.detach())).sum()
