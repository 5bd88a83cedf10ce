r"""Physical energies: a molecule's force field as an energy in nats.

With the potential energy :math:`U(x)` of coordinates x, the law of a molecule at temperature T is
:math:`p(x) \propto e^{-U(x) / kT}`, and so :math:`E(x) = U(x) / kT`. Another temperature is a multiple of it:
``(300 / 400) * energy`` is the molecule at 400 K, if ``energy`` is at 300.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gibbsian.energies.base import Energy
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.molecules.bridge import BRIDGES, Bridge
from gibbsian.molecules.extras import require_openmm
from gibbsian.molecules.systems import MolecularSystem
from gibbsian.molecules.thermal import thermal_energy


class MolecularEnergy(Energy):
    r"""The potential energy of a molecule over kT, :math:`E(x) = U(x) / kT`, computed by OpenMM.

    Points are coordinates in nanometres, ``(atoms, 3)``. Values and gradients are OpenMM's own, in double precision
    where its platform has it (the reference one, which is the fastest for small molecules), and come for all chains in
    one call; second derivatives there are none. The energy does not change as the molecule moves or turns as a whole:
    its density has no log Z until a restraint keeps it in a place (`Centred`).

    Parameters
    ----------
    molecule
        From `alanine_dipeptide` or `system_from_pdb`; or an ``openmm.System``, without constraints or virtual sites.
    temperature
        In kelvin; the molecule's own when left out.
    platform
        An OpenMM platform's name; the fastest for this size on one thread when left out.
    threads
        Chains computed at a time.

    Raises
    ------
    ArgumentTypeError
        If it is no molecule.
    OptionError
        If the temperature or the number of threads is not positive, or there is no such platform.
    DomainError
        If the system has constraints or virtual sites, or changes its box: it has then no density over coordinates.
    MissingPackageError
        If OpenMM is not installed.
    """

    def __init__(
        self,
        molecule: MolecularSystem | Any,
        temperature: float | None = None,
        *,
        platform: str | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__()
        openmm = require_openmm()
        system = molecule.system if isinstance(molecule, MolecularSystem) else molecule
        if not isinstance(system, openmm.System):
            raise ArgumentTypeError(
                f"A molecular energy is made from alanine_dipeptide(), system_from_pdb(path) or an openmm.System; got "
                f"{molecule!r}."
            )
        if isinstance(molecule, MolecularSystem):
            temperature = molecule.temperature if temperature is None else temperature
        elif temperature is None:
            raise OptionError("An openmm.System has no temperature: say temperature= in kelvin.")
        _check_density(system)
        self.kt = thermal_energy(cast(float, temperature))
        self.temperature = float(cast(float, temperature))
        self.name = molecule.name if isinstance(molecule, MolecularSystem) else f"{system.getNumParticles()} atoms"
        self.bridge = Bridge(system, platform, threads)
        self.event_shape = torch.Size((self.bridge.atoms, 3))
        masses = [system.getParticleMass(i)._value for i in range(self.bridge.atoms)]
        self.register_buffer("masses", torch.tensor(masses, dtype=torch.float64))
        start = molecule.positions if isinstance(molecule, MolecularSystem) else np.full((self.bridge.atoms, 3), np.nan)
        self.register_buffer("positions", torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Energy of each configuration in nats, ``(n, atoms, 3) -> (n,)``; infinite where one has exploded.

        Raises
        ------
        ShapeError
            If the points are of another shape.
        """
        self._check(x)
        if torch.compiler.is_compiling():
            # Transformed and compiled code takes the operator, which has no derivative, with its gradient as a slope.
            at = x.detach()
            energy, grad = _potential(at, self.bridge.number, self.kt)
            return energy + (grad * (x - at)).sum((1, 2))
        return cast(Tensor, _Potential.apply(x, self.bridge, self.kt))

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and gradients in nats and nats per nanometre, ``(n,)`` and ``(n, atoms, 3)``, without a graph."""
        self._check(x)
        return _in_nats(x, self.bridge, self.kt, True)

    def potential(self, x: Tensor) -> Tensor:
        """Potential energies in kJ/mol, ``(n, atoms, 3) -> (n,)``."""
        return self(x) * self.kt

    def start(self, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Coordinates of the molecule's structure for n chains, ``(n, atoms, 3)`` in nanometres.

        Raises
        ------
        OptionError
            If the energy was made from an ``openmm.System``, which has none.
        """
        positions = cast(Tensor, self.positions)
        if not bool(torch.isfinite(positions).all()):
            raise OptionError("An openmm.System has no coordinates: start chains from those that you have.")
        return positions.to(dtype).expand(n, -1, -1).clone()

    def scale(self, hydrogen_mass: float | None = None) -> Tensor:
        r"""Return the thermal velocities :math:`\sqrt{kT/m}` in nm/ps, ``(atoms, 3)``: a kernel's ``scale``.

        With it momenta are those of the masses, and a step size is a time in picoseconds: ``HMC(0.001, scale=...)``
        makes steps of 1 fs. Masses do not change what is sampled; heavier hydrogens vibrate slower, and allow longer
        steps.

        Parameters
        ----------
        hydrogen_mass
            Of atoms lighter than 2 daltons; 3 to 4 allow twice the step. Their own when left out.

        Raises
        ------
        OptionError
            If the mass is not positive.
        """
        masses = cast(Tensor, self.masses)
        if hydrogen_mass is not None:
            if not hydrogen_mass > 0:
                raise OptionError(f"A mass is positive, in daltons; got {hydrogen_mass}.")
            masses = torch.where(masses < 2.0, hydrogen_mass, masses)
        return (self.kt / masses).sqrt().unsqueeze(1).repeat(1, 3)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[1:] != self.event_shape:
            raise ShapeError(
                f"This molecule takes coordinates (n, {self.bridge.atoms}, 3) in nanometres; got {tuple(x.shape)}."
            )

    def extra_repr(self) -> str:
        """The molecule and the temperature."""
        return f"{self.name}, {self.temperature:g} K"


class _Potential(torch.autograd.Function):
    """Energies with the gradients that came with them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bridge: Bridge, kt: float) -> Tensor:
        gradient = ctx.needs_input_grad[0]
        energy, grad = _in_nats(x, bridge, kt, gradient)
        if gradient:
            ctx.save_for_backward(grad)
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return upstream[:, None, None] * grad, None, None


def _in_nats(x: Tensor, bridge: Bridge, kt: float, gradient: bool) -> tuple[Tensor, Tensor]:
    energy, grad = (torch.from_numpy(a) for a in bridge(x.detach().cpu().double().numpy(), gradient))
    return energy.div_(kt).to(x), grad.div_(kt).to(x)


@torch.library.custom_op("gibbsian::molecular_potential", mutates_args=())
def _potential(x: Tensor, number: int, kt: float) -> tuple[Tensor, Tensor]:
    """What compiled code calls for energies and gradients."""
    return _in_nats(x, BRIDGES[number], kt, True)


@_potential.register_fake
def _(x: Tensor, number: int, kt: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_density(system: Any) -> None:
    if count := system.getNumConstraints():
        raise DomainError(
            f"The system holds {count} distances fixed, and has no density over all coordinates: build it with "
            "constrain_hydrogens=False (OpenMM: constraints=None, rigidWater=False)."
        )
    massless = [i for i in range(system.getNumParticles()) if system.getParticleMass(i)._value <= 0]
    if massless:
        raise DomainError(
            f"{len(massless)} particles have no mass (virtual sites or frozen atoms), such as number {massless[0]}: an "
            "energy is one of atoms that all move. Take a force field without virtual sites, or restrain atoms instead."
        )
    for force in system.getForces():
        if "Barostat" in force.getName():
            raise DomainError(
                f"The system's {force.getName()} changes its box, which is no part of a point: remove it."
            )
