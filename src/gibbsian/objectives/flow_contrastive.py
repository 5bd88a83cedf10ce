r"""Flow contrastive estimation: the noise is a flow that learns to look like the data, and the energy learns to tell.

Energy :math:`E` and flow q play for the value of binary noise contrastive estimation,

.. math:: V = \mathbb{E}_{data} \log \frac{p(x)}{p(x) + \nu q(x)}
              + \nu \, \mathbb{E}_q \log \frac{\nu q(x)}{p(x) + \nu q(x)}, \qquad p(x) = e^{-E(x) - c}.

The energy raises it, and is fitted by noise contrastive estimation whose noise gets harder and harder; the flow lowers
it, and approaches the data in the Jensen-Shannon divergence. Both move at once: the loss is :math:`-V`, and what of its
gradient goes to the flow is reversed, on the flow's draws and on its log-densities, the two ways by which V depends on
it.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus

from gibbsian.energies.base import Energy, repeated
from gibbsian.energies.flows import Flow, check_continuous
from gibbsian.errors import ArgumentTypeError, OptionError
from gibbsian.objectives.base import Batch, Loss, Objective, context_of
from gibbsian.objectives.checks import check_count
from gibbsian.objectives.noise_contrastive import (
    accuracy,
    check_cover,
    check_space,
    energies,
    learned_constant,
)


class FlowContrastiveEstimation(Objective):
    r"""Noise contrastive estimation against a flow that is trained beside the energy, as its adversary.

    `Flow contrastive estimation of energy-based models (Gao et al., 2020) <https://arxiv.org/abs/1912.00589>`_. To
    :math:`-V` the flow's own likelihood may be added, :math:`-w \, \mathbb{E}_{data} \log q(x)`, which steadies it.
    ``fit`` trains both with one optimiser, which is blind to the scale of a gradient: weights set what the flow does,
    not how fast.

    Parameters
    ----------
    flow
        Learns beside the energy, and is kept as ``objective.flow``; calibrated to the data, or pretrained. The energy
        must not contain it.
    ratio
        The flow's draws per row of data, :math:`\nu`.
    adversary
        Weight of the flow's part in the game; with 0 it learns by its likelihood alone.
    likelihood
        Weight w of the flow's likelihood.
    lead
        The flow moves only when the energy is right about at least this share of data and draws, and waits otherwise:
        0.5 is a guess's, 0 lets it always move. Without a lead the flow runs ahead and the energy learns late.
    log_z
        Where the learned constant c starts, in nats.

    Raises
    ------
    ArgumentTypeError
        If the flow is none.
    OptionError
        If an option is out of its range, or the flow learns from neither.
    """

    def __init__(
        self,
        flow: Flow,
        ratio: int = 1,
        adversary: float = 1.0,
        likelihood: float = 0.0,
        lead: float = 0.5,
        log_z: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise ArgumentTypeError(
                f"flow must be a Flow, whose draws can be differentiated: spline_flow(2), or Flow(zuko.flows.MAF(2)); "
                f"got {flow!r}. Noise that does not learn goes with NoiseContrastiveEstimation."
            )
        for name, value in (("adversary", adversary), ("likelihood", likelihood)):
            if not 0.0 <= value < math.inf:
                raise OptionError(f"{name} is a weight, 0 or more; got {value}.")
        if adversary == likelihood == 0.0:
            raise OptionError("With adversary=0 and likelihood=0 the flow would not learn; raise one of them.")
        if not 0.0 <= lead < 1.0:
            raise OptionError(f"lead is a share of right answers, from 0 to below 1; got {lead}.")
        self.flow = flow
        self.ratio = check_count("ratio", ratio, "the flow's draws per row of data")
        self.adversary, self.likelihood, self.lead = float(adversary), float(likelihood), float(lead)
        self.log_z = learned_constant(log_z, learn=True)
        self.seen = False

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Draw from the flow, and classify.

        Raises
        ------
        OptionError
            If the energy asks for a label that the batch lacks, contains the flow, or the flow is far from the data.
        ShapeError, DomainError, ArgumentTypeError
            If flow, data and energy are not on one space, or the data are discrete.
        """
        n, x = len(batch), batch.x
        context = context_of(energy, batch)
        check_space(energy, self.flow, x)
        drawn, log_q = self.flow.rsample_and_log_prob(self.ratio * n, rng)
        of_data = self.flow(x)
        if not self.seen:
            self._look(energy, x, of_data, -log_q)
        plays, learns = (torch.ones((), dtype=x.dtype, device=x.device) for _ in range(2))
        points = torch.cat((x, scaled_gradient(drawn.to(x.dtype), plays)))
        costs = scaled_gradient(torch.cat((of_data, -log_q)), plays)
        values = energy(points, **repeated(context, self.ratio + 1))
        odds = costs - values - self.log_z - math.log(self.ratio)
        right = accuracy(odds[:n].detach(), odds[n:].detach())
        # Filled in now that the answers are known; the backward pass, which reads them, comes after.
        learns.copy_(right >= self.lead)
        plays.copy_(-self.adversary * learns)
        nll = of_data.mean()
        loss = softplus(-odds[:n]).mean() + self.ratio * softplus(odds[n:]).mean()
        if self.likelihood:
            loss = loss + self.likelihood * scaled_gradient(nll, learns)
        metrics = {"accuracy": right, "flow_nll": nll.detach(), "log_z": self.log_z.detach().clone()}
        return Loss(loss, energies(values, n) | metrics)

    def _look(self, energy: Energy, x: Tensor, of_data: Tensor, of_draws: Tensor) -> None:
        """Once, at the start: later the flow moves, and health watches."""
        own = {id(p) for p in self.flow.parameters()}
        if any(id(p) in own for p in energy.parameters()):
            raise OptionError(
                f"{energy!r} contains the flow's parameters, which the game would pull both ways; give it a copy: "
                "copy.deepcopy(flow)."
            )
        check_continuous(x, f"{self.flow!r}", "Add uniform noise of one step of the values to the data.")
        remedy = "Start the flow near the data with flow.calibrate(data), or train it by its likelihood first."
        check_cover(self.flow, of_data.detach(), of_draws.detach(), remedy)
        self.seen = True

    def extra_repr(self) -> str:
        """The settings."""
        return f"ratio={self.ratio}, adversary={self.adversary}, likelihood={self.likelihood}, lead={self.lead}"


def scaled_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """Return the value, whose gradient will be multiplied by what ``factor`` holds in the backward pass."""
    if not value.requires_grad:
        return value
    same = value.view_as(value)
    same.register_hook(lambda grad: factor * grad)
    return same
