r"""log Z by thermodynamic integration: chains at fixed stops along a path, and the integral of a mean between them.

.. math:: \log Z_1 - \log Z_0 = - \int_0^1 \Bigl\langle \frac{\partial E_\beta}{\partial \beta} \Bigr\rangle_\beta \,
          d\beta

Each mean is a simple one over chains at that temperature: nothing is weighed, and nothing degenerates. What takes its
place is the error of the rule that integrates, which no number of draws reduces. It is estimated by leaving out every
other stop, and counted in.

**The error of the means.** Chains never meet, and each gives an integral of its own, by its own means at all stops. The
spread of these over m chains, by :math:`\sqrt m`, is the error of their mean, however slowly a chain moves on from draw
to draw or from one stop to the next. Effective sample sizes know nothing of the latter, and are too large where a chain
is no more than some autocorrelation times long; they serve where there are too few chains to have a spread.

Along the geometric path the mean slope never rises, :math:`\partial_\beta \langle E_1 - E_0 \rangle = -
\operatorname{Var}(E_1 - E_0)`, so that the sums over left and right ends of the intervals bound log Z from the two
sides: wide, but without a guess at what lies between the stops.

`Simulating normalizing constants: from importance sampling to bridge sampling to path sampling (Gelman & Meng, 1998)
<https://doi.org/10.1214/ss/1028905934>`_; `Marginal likelihood estimation via power posteriors (Friel & Pettitt, 2008)
<https://doi.org/10.1111/j.1467-9868.2007.00650.x>`_.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from gibbsian.diagnostics.chains import split_r_hat
from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import Tractable
from gibbsian.errors import DivergenceError, OptionError
from gibbsian.kernels.base import Kernel, has_step_size, with_step_size
from gibbsian.partition.annealed import settle
from gibbsian.partition.base import LogZ, variance_of_mean, worth
from gibbsian.partition.paths import Path
from gibbsian.partition.population import Walk, walk
from gibbsian.partition.schedule import PALETTE, interpolate
from gibbsian.processes.collectives import told_by_main
from gibbsian.processes.work import over_lanes
from gibbsian.sampling import sample

CHUNK = 1 << 14
"""Draws at which slopes are evaluated at once."""

SPREAD = 16
"""Chains whose spread is the error: that of 16 is known to 18%. Errors of fewer come from effective sample sizes."""


class Integrated(NamedTuple):
    """What `thermodynamic_integration` found.

    Attributes
    ----------
    log_z
        ``stderr`` counts both errors below; ``ess`` is that of the stop where it is least, of ``chains`` draws.
    statistical, discretisation
        The error of the means, and of the rule between the stops: what leaving out every other one changes, as far as
        that shows above the noise. Both 0-d.
    nodes
        The stops, ``(M,)``.
    slopes, errors, ess
        At each: the mean derivative of the energy in beta, its standard error, and the effective draws behind it,
        ``(M,)``.
    """

    log_z: LogZ
    statistical: Tensor
    discretisation: Tensor
    nodes: Tensor
    slopes: Tensor
    errors: Tensor
    ess: Tensor


@torch.no_grad()
def thermodynamic_integration(
    energy: Energy,
    base: Tractable,
    *,
    rng: Generator,
    nodes: int | Tensor = 25,
    rule: str = "trapezoid",
    kernel: Kernel | None = None,
    path: Path | None = None,
    chains: int = 32,
    steps: int = 100,
    warmup: int | None = None,
    confidence: float = 0.99,
    compile: bool = False,
    lanes: int | None = None,
) -> Integrated:
    """Estimate log Z by thermodynamic integration from a base.

    Parameters
    ----------
    energy, base, rng, kernel, path, compile, lanes
        As in `ais`. Step sizes are found by a pilot walk.
    nodes
        How many stops, or, for the trapezoidal rule, the stops themselves, from 0 to 1. A number is odd, and its stops
        lie as dense as the density changes fast along the pilot's walk. A path whose slope jumps, as that of
        `noise_levels` where its stretch from the base ends, takes stops of yours, one on either side of the jump.
    rule
        ``"trapezoid"``, or ``"gauss"`` for Gauss-Legendre's stops and weights: far better where the slope is smooth in
        beta, far worse where it is steep near 0 as it is from a base much wider than the energy. It gives no bounds.
    chains, steps
        At each stop; the chains go on from stop to stop. At beta = 0 draws are exact. With 16 chains or more the error
        is that of their spread; with fewer it is too small unless each is many autocorrelation times long.
    warmup
        Steps at each stop before those that count; half as many as these when ``None``.
    confidence
        Probability with which ``lower <= log Z <= upper``, as far as the chains have converged and their means are
        normal; bounds are finite for the geometric path and the trapezoidal rule.

    Raises
    ------
    OptionError
        If the stops, the rule or a number does not fit.
    DivergenceError
        If a slope is not finite: the base reaches where the energy is infinite.
    ShapeError, DomainError, ArgumentTypeError
        If an argument does not fit.
    """
    geometric = path is None
    kernel, path = settle(energy, base, kernel, path)
    if chains < 2 or steps < 4 or (warmup is not None and warmup < 0) or not 0.0 < confidence < 1.0:
        raise OptionError(
            "chains is 2 or more, steps 4 or more, warmup 0 or more, confidence between 0 and 1; got "
            f"{chains}, {steps}, {warmup}, {confidence}."
        )
    _check_nodes(nodes, rule)
    found = walk(path, base, kernel, rng, chains=128, moves=5)
    if lanes is not None:
        found.betas, found.log_sizes = told_by_main((found.betas, found.log_sizes))
    betas = _stops(nodes, rule, found)
    target = Energy.of(energy)
    slope = (lambda b, x: target(x) - base(x)) if geometric else _differences(path)
    burn = steps // 2 if warmup is None else warmup

    def walked(count: int, own: Generator) -> Tensor:
        """Slopes of so many chains at every stop, ``(stops, steps, count)``."""
        x, values = base.sample(count, own), []
        for b in betas:
            at = x.new_tensor(float(b))
            if float(b) == 0.0:
                draws = base.sample(count * steps, own).reshape(steps, count, *x.shape[1:])
            else:
                x, draws = _chains(path(at), kernel, x, _size(found, float(b)), burn, steps, own, compile)
            flat = torch.cat([slope(at, part).double() for part in draws.flatten(0, 1).split(CHUNK)])
            _check_finite(flat, float(b))
            values.append(flat.reshape(steps, count))
        return torch.stack(values)

    if lanes is None:
        values = walked(chains, rng)
    else:
        work = lambda rows, own: (walked(rows.stop - rows.start, own).movedim(2, 0),)  # noqa: E731
        values = over_lanes(lanes, chains, rng, work)[0].movedim(0, 2)
    values = list(values.unbind())
    return _integrated(betas, values, rule, geometric, confidence)


def _chains(
    energy: Energy, kernel: Kernel, x: Tensor, size: float, burn: int, steps: int, rng: Generator, compile: bool
) -> tuple[Tensor, Tensor]:
    """Warm chains up, with short steps first that reach those in a steep place, and keep what follows."""
    shares = (1.0 / PALETTE, PALETTE**-0.5, 1.0) if has_step_size(kernel) else (1.0,)
    moving = kernel
    for i, share in enumerate(shares):
        if has_step_size(kernel):
            moving = with_step_size(kernel, share * size)
        few = burn * (i + 1) // len(shares) - burn * i // len(shares)
        if few:
            x = sample(energy, moving, x, steps=few, rng=rng, compile=compile).x
    out = sample(energy, moving, x, steps=steps, thin=1, rng=rng, compile=compile)
    assert out.draws is not None
    return out.x, out.draws


def _integrated(betas: Tensor, values: list[Tensor], rule: str, geometric: bool, confidence: float) -> Integrated:
    """Integrate the means of slopes ``(steps, chains)`` at the stops; those at beta = 0 are independent."""
    arranged = [v.flatten() if float(b) == 0.0 else v for b, v in zip(betas, values)]
    by_chain = torch.stack([v.mean(0) for v in values]).cpu()
    means, chains = by_chain.mean(1), by_chain.shape[1]
    wide = chains >= SPREAD
    errors = by_chain.std(1) / math.sqrt(chains)
    if not wide:
        errors = torch.stack([variance_of_mean(v) for v in arranged]).sqrt().cpu()
    ess = torch.stack([worth(v) for v in arranged]).cpu()

    def error_of(weights: Tensor) -> Tensor:
        """Standard error of a weighted sum of the means."""
        return (weights @ by_chain).std() / math.sqrt(chains) if wide else (weights * errors).square().sum().sqrt()

    weights, half = _weights(betas, rule), _weights_of_half(betas, rule)
    statistical = error_of(weights)
    change = ((weights - half) * means).sum()
    discretisation = (change.square() - error_of(weights - half).square()).clamp(min=0.0).sqrt()
    value = -(weights * means).sum()
    none = torch.full_like(value, torch.inf)
    low, high = -none, none
    if geometric and rule == "trapezoid":
        from scipy.special import stdtrit

        gaps, zero = betas.diff(), betas.new_zeros(1)
        left, right = torch.cat((gaps, zero)), torch.cat((zero, gaps))
        # The spread of chains is itself an estimate: Student's law, which is normal at infinity.
        reach = float(stdtrit(chains - 1 if wide else math.inf, 0.5 + 0.5 * confidence))
        low = -(left * means).sum() - reach * error_of(left)
        high = -(right * means).sum() + reach * error_of(right)
    stderr = torch.hypot(statistical, discretisation)
    _judge(betas, values, ess, statistical, discretisation)
    log_z = LogZ(value, stderr, low, high, ess.min(), values[0].numel())
    return Integrated(log_z, statistical, discretisation, betas, means, errors, ess)


def _judge(betas: Tensor, values: list[Tensor], ess: Tensor, statistical: Tensor, discretisation: Tensor) -> None:
    """Warn of chains that have not converged, and of stops too far apart."""
    worst = int(ess.argmin())
    r_hat = torch.stack([split_r_hat(v) for v in values]).nan_to_num(nan=1.0)
    # The largest of many R-hats is above 1.01 by chance alone.
    if float(ess[worst]) < 100.0 or float(r_hat.max()) > 1.1:
        warnings.warn(
            f"Chains have not told their means: at beta={float(betas[worst]):.3g} {values[0].numel()} draws are worth "
            f"{float(ess[worst]):.0f}, and R-hat is up to {float(r_hat.max()):.2f} (at "
            f"beta={float(betas[int(r_hat.argmax())]):.3g}). Value, error and bounds assume that they have. Try more "
            "steps, a longer warm-up, or a kernel that moves farther.",
            RuntimeWarning,
            stacklevel=5,
        )
    if float(discretisation) > max(0.1, 3.0 * float(statistical)):
        warnings.warn(
            f"The {len(betas)} nodes are too few: leaving out every other one changes log Z by "
            f"{float(discretisation):.2g}, against {float(statistical):.2g} by the draws. More steps do not help, more "
            "nodes do.",
            RuntimeWarning,
            stacklevel=5,
        )


def _check_nodes(nodes: int | Tensor, rule: str) -> None:
    if rule not in ("trapezoid", "gauss"):
        raise OptionError(f'rule is "trapezoid" or "gauss"; got {rule!r}.')
    if not isinstance(nodes, Tensor):
        if nodes < 3 or (rule == "trapezoid" and nodes % 2 == 0):
            raise OptionError(f"nodes is 3 or more, and odd for the trapezoidal rule; got {nodes}.")
        return
    if rule == "gauss":
        raise OptionError("Gauss-Legendre integration has stops of its own; give their number as nodes.")
    if nodes.ndim != 1 or len(nodes) < 3 or not bool((nodes.diff() > 0).all()):
        raise OptionError(f"nodes are three or more increasing stops, ({len(nodes)},); got {nodes}.")
    if float(nodes[0]) != 0.0 or float(nodes[-1]) != 1.0:
        raise OptionError(f"nodes run from 0 to 1; these run from {float(nodes[0]):.6g} to {float(nodes[-1]):.6g}.")


def _check_finite(values: Tensor, beta: float) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise DivergenceError(
            f"The slope is not finite at {bad} of {values.numel()} draws at beta={beta:.3g}: the base reaches where "
            "the energy is infinite, and its mean there with it. Choose a base on the energy's own domain, or ais, "
            "which counts such draws as weights of zero."
        )


def _stops(nodes: int | Tensor, rule: str, found: Walk) -> Tensor:
    if isinstance(nodes, Tensor):
        return nodes.double().cpu()
    if rule == "gauss":
        return torch.from_numpy(0.5 + 0.5 * np.polynomial.legendre.leggauss(nodes)[0])
    passed = torch.tensor(found.betas, dtype=torch.float64)
    stops = interpolate(torch.linspace(0.0, len(passed) - 1.0, nodes, dtype=torch.float64), passed)
    stops[0], stops[-1] = 0.0, 1.0
    return stops


def _size(found: Walk, beta: float) -> float:
    """The step size that the pilot's walk found best around a temperature."""
    passed = torch.tensor(found.betas, dtype=torch.float64)
    i = int(torch.searchsorted(passed, beta).clamp(1, len(passed) - 1)) - 1
    place = i + (beta - float(passed[i])) / max(float(passed[i + 1] - passed[i]), 1e-300)
    logs = torch.tensor(found.log_sizes, dtype=torch.float64)
    return math.exp(float(interpolate(torch.tensor(place, dtype=torch.float64), logs)))


def _weights(betas: Tensor, rule: str) -> Tensor:
    """What each stop weighs in the integral over [0, 1]."""
    if rule == "gauss":
        return torch.from_numpy(0.5 * np.polynomial.legendre.leggauss(len(betas))[1])
    gaps = betas.diff()
    weights = torch.zeros_like(betas)
    weights[:-1] += 0.5 * gaps
    weights[1:] += 0.5 * gaps
    return weights


def _weights_of_half(betas: Tensor, rule: str) -> Tensor:
    """The same with every other stop left out."""
    kept = torch.arange(0, len(betas), 2)
    weights = torch.zeros_like(betas)
    if rule == "gauss":
        # The rule that is exact for polynomials on the stops that are left.
        table = np.polynomial.legendre.legvander(2.0 * betas[kept].numpy() - 1.0, len(kept) - 1)
        weights[kept] = torch.from_numpy(np.linalg.solve(table.T, np.eye(len(kept))[0]))
        return weights
    if len(betas) % 2 == 0:
        kept = torch.cat((kept, torch.tensor([len(betas) - 1])))
    weights[kept] = _weights(betas[kept], rule)
    return weights


def _differences(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The derivative of a path's energies in beta by differences of second order, one-sided at the ends of [0, 1]."""

    def slope(b: Tensor, x: Tensor) -> Tensor:
        h, here = torch.finfo(x.dtype).eps ** (1.0 / 3.0), float(b)
        at = lambda shift: path(x.new_tensor(here + shift))(x).double()  # noqa: E731
        if here - h < 0.0:
            return (4.0 * at(h) - 3.0 * at(0.0) - at(2.0 * h)) / (2.0 * h)
        if here + h > 1.0:
            return (3.0 * at(0.0) - 4.0 * at(-h) + at(-2.0 * h)) / (2.0 * h)
        return (at(h) - at(-h)) / (2.0 * h)

    return slope
