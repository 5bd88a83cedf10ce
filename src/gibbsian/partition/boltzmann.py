r"""log Z of restricted Boltzmann machines: exactly, and the path on which alternating Gibbs sampling anneals to one.

Either layer can be summed out in closed form, so that

.. math:: \log Z = \log \sum_h e^{-F(h)} = \log \sum_v e^{-F(v)}

takes one free energy per state of the *smaller* layer that can be listed. Two Gaussian layers are one Gaussian, whose
log Z is a determinant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from gibbsian.energies.base import Energy
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.convolutional import ConvolutionalRBM
from gibbsian.energies.deep import DeepBoltzmannMachine, OddLayers
from gibbsian.energies.layered import Natural, TwoLayers, two_layers
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.tractable import Tractable
from gibbsian.energies.units import Units
from gibbsian.errors import DomainError, OptionError
from gibbsian.partition.base import LogZ
from gibbsian.partition.paths import Path
from gibbsian.sampling import reporter
from gibbsian.typing import Scalar

Layered: TypeAlias = RBM | ConvolutionalRBM | DeepBoltzmannMachine | OddLayers
"""Machines of two layers, or of more packed into two."""

MOST_STATES = 1 << 25
"""States that are listed at most."""

CHUNK_BYTES = 1 << 26
"""Bytes of the arrays of states and fields that are held at once."""


@torch.no_grad()
def exact_log_z(energy: Energy, *, progress: bool | Callable[[int], object] = False) -> LogZ:
    r"""Compute log Z of a restricted Boltzmann machine by listing its smaller layer, in float64.

    Time is that of one free energy per state. Memory is 64 MiB for states and fields together, whatever their number.

    Parameters
    ----------
    energy
        An `RBM` or a `ConvolutionalRBM`; a conditional one with its context fixed to one value, as
        ``rbm.given(y=torch.tensor(3))``.
    progress
        ``True`` for a bar on the terminal, or a function called with the number of states just done.

    Returns
    -------
    LogZ
        Without error, up to rounding: ``stderr`` is 0 and both bounds are the value. ``ess`` is the effective number of
        the states that were listed, :math:`1 / \sum p^2`.

    Raises
    ------
    OptionError
        If neither layer has at most 2^25 states, or the context is open; the message tells the size and what else there
        is.
    DomainError
        If two Gaussian layers are coupled so strongly that there is no density.
    ArgumentTypeError
        If the energy has no two layers.
    """
    machine = _machine(energy)
    visible, hidden = cast(Units, machine.visible), cast(Units, machine.hidden)
    if isinstance(visible, GaussianUnits) and isinstance(hidden, GaussianUnits):
        return _gaussian(machine, visible)
    units, of = _smaller(machine, visible, hidden)
    count = cast(int, units.count)
    # States, their statistics, fields and what is made of these: about four arrays over both layers.
    rows = max(1, CHUNK_BYTES // (32 * (visible.size + hidden.size)))
    report, close = reporter(progress, count, "summing states")
    total, squares = (
        torch.full((), -torch.inf, dtype=torch.float64, device=machine.visible_bias.device) for _ in range(2)
    )
    try:
        for first in range(0, count, rows):
            index = torch.arange(first, min(first + rows, count), device=total.device)
            log_p = -of(units.listed(index))
            total = torch.logaddexp(total, torch.logsumexp(log_p, 0))
            squares = torch.logaddexp(squares, torch.logsumexp(2.0 * log_p, 0))
            report(len(index))
    finally:
        close()
    return LogZ(total, torch.zeros_like(total), total, total, (2.0 * total - squares).exp())


@torch.no_grad()
def exact_log_likelihood(energy: Energy, x: Tensor, log_z: LogZ | None = None) -> Tensor:
    """Log-density of each row under a restricted Boltzmann machine, in nats: ``(n, *event) -> (n,)``, float64.

    Parameters
    ----------
    energy
        As for `exact_log_z`.
    x
        Visible states.
    log_z
        What `exact_log_z` returned, when it is known already.

    Raises
    ------
    DomainError, OptionError, ShapeError
        If a row is no state, or as for `exact_log_z`.
    """
    machine = _machine(energy)
    cast(Units, machine.visible).check(x, "the rows")
    z = exact_log_z(energy) if log_z is None else log_z
    x = x.to(machine.visible_bias)
    return -machine.energy(x, machine.hidden_field(x))[0] - z.value


class IntermediateRBM(Energy):
    r"""A machine between independent units and an RBM; what `rbm_path` passes through.

    .. math:: F_\beta(v) = (1 - \beta) E_0(v) + \beta \bigl(g(v) - (s(v) - \mu) b + \lambda a\bigr)
              - \sum_j A_j(\beta a_j) + (1 - \beta) \sum_j A_j(0)

    Parameters
    ----------
    energy
        The machine, without a context.
    base
        At beta = 0.
    beta
        0-d.
    """

    def __init__(self, energy: Layered, base: Tractable, beta: Scalar) -> None:
        super().__init__()
        self.energy, self.base = energy, base
        self.register_buffer("beta", torch.as_tensor(beta))
        self.event_shape, self.support = energy.event_shape, energy.support

    beta: Tensor

    def two_layers(self, x: Tensor, beta: Tensor | None = None) -> TwoLayers:
        """The machine with the base beside it, at another beta if one is given."""
        beta = self.beta if beta is None else beta
        law = cast(Natural, cast(Any, self.base).natural)
        beside = ((1.0 - beta, self.base, law),)
        return replace(self.energy.two_layers(x), strength=beta, sites=beside, is_path=True)

    def at(self, beta: Tensor) -> AtBeta:
        """The machine at another beta, without a module of its own: a compiled block of many has one to look at."""
        return AtBeta(self, beta)

    def forward(self, x: Tensor) -> Tensor:
        """Free energy of each row."""
        machine = self.two_layers(x)
        return machine.energy(x, machine.hidden_field(x))[0]

    def extra_repr(self) -> str:
        """Where on the path."""
        return f"{self.energy!r}, beta={float(self.beta):.4g}"


@dataclass(frozen=True)
class AtBeta:
    """An intermediate machine at another beta than its own; what compiled blocks of `ais` walk through.

    Parameters
    ----------
    energy
        Any machine of the path.
    beta
        0-d.
    """

    energy: IntermediateRBM
    beta: Tensor

    @property
    def support(self) -> Any:
        """Where the visible units live."""
        return self.energy.support

    def two_layers(self, x: Tensor) -> TwoLayers:
        """The machine with the base beside it."""
        return self.energy.two_layers(x, self.beta)

    def __call__(self, x: Tensor) -> Tensor:
        """Free energy of each row."""
        machine = self.two_layers(x)
        return machine.energy(x, machine.hidden_field(x))[0]


def rbm_path(base: Tractable, energy: Layered) -> Path:
    """Build the path of machines from independent units to an RBM, on which `RBMGibbs` never rejects.

    `On the quantitative analysis of deep belief networks (Salakhutdinov & Murray, 2008)
    <https://doi.org/10.1145/1390156.1390266>`_. Give it to `ais`, `smc` or `bracket` with the same base.

    Parameters
    ----------
    base
        Independent units: `RBM.base`, or `Bernoulli`, `Categorical` or a diagonal `Gaussian` of the visible kind.
    energy
        The machine, `RBM` or `ConvolutionalRBM`, without a context; a `DeepBoltzmannMachine`, over its even layers, or
        its ``odd_layers``.

    Raises
    ------
    OptionError
        If the base's units are not independent, or the RBM is conditional.
    """
    if getattr(base, "natural", None) is None:
        raise OptionError(
            f"The path of machines starts at independent units, such as energy.base(data); {base!r} tells no law of "
            "each. A geometric path (path=None) starts anywhere."
        )
    if not isinstance(energy, Layered) or energy.context:
        raise OptionError(
            f"The path of machines leads to an RBM without a context; got {energy!r}. A geometric path (path=None) "
            "takes rbm.given(y=...), and sums."
        )
    return lambda beta: IntermediateRBM(energy, base, beta)


@dataclass(frozen=True)
class MachineRungs:
    """The path of machines from a base, as `PathTempering` asks for it: from an RBM and beta to the machine there.

    Parameters
    ----------
    base
        Independent units, as for `rbm_path`; best those from which training chains start.
    """

    base: Tractable

    def __call__(self, energy: Any, beta: Tensor) -> Energy:
        """The machine at beta; the errors are those of `rbm_path`."""
        return rbm_path(self.base, energy)(beta)


def _machine(energy: Energy) -> TwoLayers:
    """The machine in float64, with one row's biases."""
    if energy.context:
        raise OptionError(
            f"log Z depends on the context, {', '.join(energy.context)}: fix it to one value, as "
            "energy.given(y=torch.tensor(3))."
        )
    machine = two_layers(energy, torch.empty(1), {})
    if not isinstance(machine.strength, float) or machine.strength != 1.0 or machine.sites or machine.rest:
        raise OptionError(
            f"A layer of {energy!r} cannot be summed in closed form at a temperature or beside other energies; "
            "estimate log Z with ais, smc or bracket."
        )
    doubled = {name: value.double() for name, value in vars(machine).items() if isinstance(value, Tensor)}
    return replace(machine, **doubled | {"weight": machine.weight.double()})


def _smaller(machine: TwoLayers, visible: Units, hidden: Units) -> tuple[Units, Callable[[Tensor], Tensor]]:
    """The layer to list, and the free energy of its states."""
    counts = [
        (units.count, units, of) for units, of in ((visible, _of_visible(machine)), (hidden, machine.hidden_energy))
    ]
    listed = [(count, units, of) for count, units, of in counts if count is not None]
    instead = (
        "Estimate log Z instead, with its error: bracket or ais along rbm_path(energy.base(data), energy), with "
        "kernel=RBMGibbs()."
    )
    if not listed:
        raise OptionError(
            f"Neither layer of {visible} and {hidden} has states to list, and ReLU has no closed form. {instead}"
        )
    count, units, of = min(listed, key=lambda each: each[0])
    if count > MOST_STATES:
        size = f"2^{math.log2(count):.1f} states"
        raise OptionError(f"The smaller layer that can be listed, {units}, has {size}, more than 2^25. {instead}")
    return units, of


def _of_visible(machine: TwoLayers) -> Callable[[Tensor], Tensor]:
    return lambda v: machine.energy(v, machine.hidden_field(v))[0]


def _gaussian(machine: TwoLayers, units: GaussianUnits) -> LogZ:
    """Of two Gaussian layers: the free energy is a quadratic, known by its values at few points."""
    d, like = units.size, machine.visible_bias
    of = _of_visible(machine)
    points = torch.cat((like.new_zeros(1, d), torch.eye(d, dtype=like.dtype, device=like.device)))
    with torch.enable_grad():
        x = points.requires_grad_(True)
        (slopes,) = torch.autograd.grad(of(units.shaped(x)).sum(), x)
    slope, curvature = slopes[0], slopes[1:] - slopes[:1]
    factor, info = torch.linalg.cholesky_ex(0.5 * (curvature + curvature.T))
    if int(info):
        raise DomainError(
            "Two Gaussian layers are coupled so strongly that the energy has no minimum, and Z is infinite: the "
            "largest singular value of the couplings, in units of the scales, must stay below 1."
        )
    lowest = -torch.cholesky_solve(slope[:, None], factor)[:, 0]
    value = -of(units.shaped(lowest[None]))[0] + 0.5 * d * math.log(2.0 * math.pi) - factor.diagonal().log().sum()
    return LogZ(value, torch.zeros_like(value), value, value, torch.full_like(value, torch.inf))
