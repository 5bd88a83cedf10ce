r"""Telescoping density ratios: many easy classifications in the place of one that is too easy to teach anything.

Where noise and data hardly overlap, a classifier is right about everything long before its log-odds are the log-ratio,
and noise contrastive estimation learns next to nothing. Between them waymarks :math:`x_k = \sqrt{1 - \alpha_k^2}\,x_0 +
\alpha_k x_m` are built, so that two that follow each other do overlap, and each bridge of a `Telescope` learns to tell
:math:`x_k` from :math:`x_{k+1}`.
"""

from __future__ import annotations

import torch
from torch import Generator
from torch.nn.functional import softplus

from gibbsian.energies.base import Energy, repeated
from gibbsian.energies.telescope import Telescope
from gibbsian.errors import ArgumentTypeError
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.noise_contrastive import check_finite_cover, check_space


class TelescopingRatios(Objective):
    r"""Fit all bridges of a `Telescope`, one logistic regression each.

    .. math:: \frac{1}{m} \sum_{k=0}^{m-1} \mathbb{E} \log\left(1 + e^{b_k(x_k)}\right)
              + \mathbb{E} \log\left(1 + e^{-b_k(x_{k+1})}\right)

    `Telescoping density-ratio estimation (Rhodes et al., 2020) <https://arxiv.org/abs/2006.12204>`_. The two ends of a
    bridge are built from the same draw of noise, which leaves less to chance, and every bridge has its own, as errors
    of one draw would add up along the chain. Noise and waymarks are the energy's, so there is nothing to set here. The
    metric ``accuracy_most`` is that of the bridge whose ends are told apart best: near 1 they are too far from each
    other, and a waymark is missing between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Build waymarks, and classify neighbours.

        Raises
        ------
        ArgumentTypeError
            If the energy is not a `Telescope`, or the data are integers.
        OptionError
            If the bridges ask for a label that the batch lacks, or the noise's energy is not finite at the data.
        ShapeError
            If the noise draws points of another shape than the data's.
        """
        if not isinstance(energy, Telescope):
            raise ArgumentTypeError(
                f"TelescopingRatios fits a Telescope, such as Telescope(MLP(2, classes=4), Gaussian(2), 4); got "
                f"{energy!r}."
            )
        n, x, m = len(batch), batch.x.detach(), len(energy.alphas)
        context = context_of(energy, batch)
        check_space(energy, energy.noise, x)
        with torch.no_grad():
            if not self.seen or x.device.type == "cpu":
                check_finite_cover(energy.noise, energy.noise(x))
                self.seen = True
            drawn = energy.noise.sample(m * n, rng).to(x.dtype).view(m, *x.shape)
            points = energy.ends(x, drawn).flatten(0, 2)
            number = torch.arange(m, device=x.device).repeat_interleave(n).repeat(2)
        values = energy.bridge(points, number, **repeated(context, 2 * m)).view(2, m, n)
        loss = (softplus(values[0]).mean(1) + softplus(-values[1]).mean(1)).mean()
        right = 0.5 * ((values[0] < 0).float().mean(1) + (values[1] > 0).float().mean(1))
        return Loss(loss, {"accuracy": right.mean(), "accuracy_most": right.max()})
