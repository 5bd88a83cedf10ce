"""Layers of real units: Gaussian, and Gaussian cut off below 0; the formulas are in `gibbsian.energies.units`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from gibbsian.energies.layered import Natural
from gibbsian.energies.units import Alike, Units
from gibbsian.errors import DomainError, OptionError, ShapeError


@dataclass(frozen=True, repr=False)
class GaussianUnits(Alike):
    """Reals of a given standard deviation.

    Parameters
    ----------
    shape
        How many, or the shape in which they stand.
    scale
        Standard deviation given the other layer: one, or a tensor that fits the shape.

    Raises
    ------
    OptionError
        If a scale is not positive.
    ShapeError
        If the scales do not fit the shape.
    """

    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale, Tensor):
            try:
                flat = self.scale.expand(self.sites).reshape(-1)
            except RuntimeError:
                raise ShapeError(
                    f"scale of shape {tuple(self.scale.shape)} does not fit units of shape {tuple(self.sites)}."
                ) from None
            object.__setattr__(self, "scale", flat)
        scale = torch.as_tensor(self.scale)
        if not bool(((scale > 0) & (scale < math.inf)).all()):
            raise OptionError(f"scale is a positive, finite standard deviation; got {self.scale}.")

    @property
    def support(self) -> Constraint:
        """The reals."""
        return constraints.real

    def statistic(self, x: Tensor) -> Tensor:
        """States over their variance."""
        return x.flatten(1) / self._variance

    def own_energy(self, x: Tensor) -> Tensor:
        """Half the squares over their variance."""
        return (0.5 * x.flatten(1).square() / self._variance).sum(1)

    def natural(self, field: Tensor) -> Natural:
        """The field is the mean."""
        precision = 1.0 / self._variance
        return Natural(field * precision, precision)

    def log_partition(self, field: Tensor) -> Tensor:
        """Of each Gaussian integral."""
        spread = 0.5 * math.log(2.0 * math.pi)
        log_scale = self.scale.log() if isinstance(self.scale, Tensor) else math.log(self.scale)
        return 0.5 * field.square() / self._variance + log_scale + spread

    def mean(self, law: Natural) -> Tensor:
        """Mean."""
        return self.shaped(law.linear / law.precision)

    def draw(self, law: Natural, u: Tensor) -> Tensor:
        """Normal numbers, by the inverse of their distribution function."""
        precision = torch.as_tensor(law.precision)
        return self.shaped(law.linear / precision) + self.shaped(normal(u).flatten(1) * precision.rsqrt())

    def fitted(self, x: Tensor, smoothing: float) -> Tensor:
        """Means; no smoothing is needed."""
        return x.flatten(1).mean(0)

    def with_scale(self, scale: Tensor) -> GaussianUnits:
        """Make the same units with scales that were checked before, ``(size,)``."""
        units = object.__new__(GaussianUnits)
        object.__setattr__(units, "shape", self.shape)
        object.__setattr__(units, "scale", scale)
        return units

    def check(self, x: Tensor, what: str) -> None:
        """Refuse what is not finite."""
        self.check_shape(x, what)
        check_finite(x, what)

    def settings(self) -> str:
        """The scale."""
        if isinstance(self.scale, Tensor):
            return f", scale=<{tuple(self.scale.shape)}>"
        return "" if self.scale == 1.0 else f", scale={self.scale:.6g}"

    @property
    def _variance(self) -> Tensor | float:
        return self.scale * self.scale


@dataclass(frozen=True, repr=False)
class ReLUUnits(Alike):
    """Reals from 0 on: Gaussians of variance 1, cut off below 0.

    `Rectified linear units improve restricted Boltzmann machines (Nair & Hinton, 2010)
    <https://www.cs.toronto.edu/~hinton/absps/reluICML.pdf>`_ draws them by a rule of thumb; this is the exact law of
    the same name in the later literature (see the module), which has a free energy.

    Parameters
    ----------
    shape
        How many, or the shape in which they stand.
    """

    @property
    def support(self) -> Constraint:
        """Zero and above."""
        return constraints.nonnegative

    def own_energy(self, x: Tensor) -> Tensor:
        """Half the squares; infinite below 0."""
        flat = x.flatten(1)
        return torch.where(flat < 0.0, torch.inf, 0.5 * flat.square()).sum(1)

    def natural(self, field: Tensor) -> Natural:
        """The field is the mean before the cut."""
        return Natural(field, 1.0)

    def log_partition(self, field: Tensor) -> Tensor:
        """Of each Gaussian integral over the positive half."""
        # f^2/2 + log Phi(f) is a small difference of large numbers far below 0, where erfcx is the ratio itself.
        below = torch.special.erfcx(field.clamp(max=0.0) * -math.sqrt(0.5)).log() - math.log(2.0)
        above = field.clamp(min=0.0)
        above = 0.5 * above.square() + torch.special.log_ndtr(above)
        return torch.where(field < 0.0, below, above) + 0.5 * math.log(2.0 * math.pi)

    def mean(self, law: Natural) -> Tensor:
        """Mean of the cut Gaussian."""
        a = law.linear
        below = math.sqrt(2.0 / math.pi) / torch.special.erfcx(a.clamp(max=0.0) * -math.sqrt(0.5))
        above = (-0.5 * a.square() - torch.special.log_ndtr(a.clamp(min=0.0))).exp() / math.sqrt(2.0 * math.pi)
        return self.shaped(a + torch.where(a < 0.0, below, above))

    def draw(self, law: Natural, u: Tensor) -> Tensor:
        r"""Numbers h with :math:`P(h > x) = Φ(f - x) / Φ(f)`, by the inverse of that."""
        a, u = law.linear, inner(u).flatten(1)
        here = torch.special.ndtr(a.clamp(min=-2.0)) * u
        near = a - torch.special.ndtri(here.clamp(max=1.0 - 0.5 * torch.finfo(a.dtype).eps))
        # Where Phi(f) leaves the numbers: begin at the tail's leading term, and go on by Newton's method in logarithms.
        far = a.clamp(max=-2.0)
        aim = u.log() + torch.special.log_ndtr(far)
        y = (far.square() - 2.0 * u.log()).sqrt()
        for _ in range(5):
            log_q = torch.special.log_ndtr(-y)
            hazard = (-0.5 * y.square() - 0.5 * math.log(2.0 * math.pi) - log_q).exp()
            y = y + (log_q - aim) / hazard
        return self.shaped(torch.where(a < -2.0, y + far, near).clamp(min=0.0))

    def fitted(self, x: Tensor, smoothing: float) -> Tensor:
        """Not known in closed form: 0."""
        return torch.zeros_like(x[0].flatten())

    def check(self, x: Tensor, what: str) -> None:
        """Refuse what is negative or not finite."""
        self.check_shape(x, what)
        check_finite(x, what)
        if bool((x < 0).any()):
            raise DomainError(f"ReLUUnits have states of 0 and above; {what} go down to {float(x.min()):.4g}.")


def keep_scale(module: nn.Module, name: str, units: Units) -> Units:
    """Keep scales that differ from unit to unit as a buffer of a module, which follows its ``.to()``."""
    if isinstance(units, GaussianUnits) and isinstance(units.scale, Tensor):
        module.register_buffer(name, units.scale.clone())
    return units


def with_kept_scale(module: nn.Module, name: str, units: Units) -> Units:
    """Return units with the scales kept by `keep_scale`, if any."""
    scale = module._buffers.get(name)
    return units if scale is None else cast(GaussianUnits, units).with_scale(scale)


def normal(u: Tensor) -> Tensor:
    """Turn uniform numbers into normal ones; 24 bits of a float32 reach 5.4 standard deviations."""
    return torch.special.ndtri(inner(u))


def inner(u: Tensor) -> Tensor:
    """Uniform numbers with 0 moved to the middle of its cell."""
    return u.clamp(min=0.25 * torch.finfo(u.dtype).eps)


def check_finite(x: Tensor, what: str) -> None:
    """Refuse rows with NaN or infinite numbers."""
    if bad := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
        raise DomainError(f"{bad} of {x.shape[0]} rows of {what} are not finite; drop or fill them first.")
