r"""Force matching: fit an energy's gradient to forces that are known.

With forces F of a physical system at its temperature, in nats per unit of x, :math:`f = F / kT`,

.. math:: \tfrac12 \, \mathbb{E} \left\| \nabla_x E(x) + f(x) \right\|^2,

summed over a point's coordinates. Where x is all of the system's coordinates, the minimum is the physical energy over
kT, up to a constant, wherever there are rows. Where x is a part of them, or a map of them, and f the force along it, f
scatters around its mean given x, and the minimum is the potential of mean force, whose density is that of x: multiscale
coarse-graining. Rows need not follow any particular law, so that biased and hot runs serve as well.
"""

from __future__ import annotations

import torch
from torch import Generator

from gibbsian.energies.base import Energy
from gibbsian.errors import DomainError, OptionError, ShapeError
from gibbsian.kernels.base import row_sum
from gibbsian.objectives.base import Batch, Loss, Objective, context_of, energy_and_gradient
from gibbsian.objectives.checks import check_floating


class ForceMatching(Objective):
    """Least squares between an energy's gradient and minus the forces that come with the rows.

    `Interatomic potentials from first-principles calculations: the force-matching method (Ercolessi & Adams, 1994)
    <https://arxiv.org/abs/cond-mat/9306054>`_; `The multiscale coarse-graining method. I (Noid et al., 2008)
    <https://doi.org/10.1063/1.2938860>`_ for parts of the coordinates.

    The batch brings ``forces`` as context, ``Batch(x, {"forces": f})``, of the shape of x, in nats per unit of x: for
    OpenMM's kJ/mol/nm divide by kT in kJ/mol.
    """

    def forward(self, energy: Energy, batch: Batch, rng: Generator) -> Loss:
        """Compare gradients with forces; nothing is drawn.

        Raises
        ------
        OptionError
            If the batch brings no forces, or lacks what the energy asks for.
        ShapeError
            If the forces have another shape than the rows.
        DomainError
            If the energy lives on discrete states.
        ArgumentTypeError
            If the energy does not depend on x, or the data are no floating-point numbers.
        """
        x, forces = batch.x, batch.context.get("forces")
        if energy.support.is_discrete:
            raise DomainError(f"Force matching follows gradients, and the energy lives on {energy.support}.")
        check_floating("Force matching", x)
        if forces is None:
            raise OptionError(
                'Force matching needs the forces at the rows, in nats per unit of x: Batch(x, {"forces": forces / kT}).'
            )
        if forces.shape != x.shape:
            raise ShapeError(f"Forces have the shape of the rows, {tuple(x.shape)}; got {tuple(forces.shape)}.")
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            y = x.detach().requires_grad_(True)
            value, slope = energy_and_gradient(energy, y, context_of(energy, batch), training)
        error = row_sum((slope + forces).square())
        scale = forces.square().mean().sqrt()
        metrics = {
            "energy_data": value.detach().mean(),
            "force_rms": (error.detach().mean() / x[0].numel()).sqrt(),
            "force_scale": scale,
        }
        return Loss(0.5 * (error if training else error.detach()).mean(), metrics)
