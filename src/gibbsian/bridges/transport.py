r"""Flows trained on an energy alone, and chains that walk in their noise.

With points :math:`x = T_\theta(u)` of a flow's noise and the flow's density q, the reverse Kullback-Leibler divergence
to the energy's density is, up to log Z,

.. math:: \mathrm{KL}(q_\theta \,\|\, p) = \mathbb{E}_u\big[E(x) + \log q_\theta(x)\big] + \log Z \;\ge\; 0,

so that minus its first term, the evidence lower bound, is below log Z. Its gradient flows through the points alone:
the part by which :math:`\log q_\theta(x)` depends on :math:`\theta` at a fixed x has mean zero, and is left out, so
that the gradient's noise vanishes where q is the energy's density: `Sticking the landing (Roeder, Wu & Duvenaud, 2017)
<https://arxiv.org/abs/1703.09194>`_.

The divergence is blind to modes that the flow does not reach. Where there are several, start from samples
(`MaximumLikelihood`) or from a flow that covers them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import functional_call

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.energies.base import Energy, formula
from gibbsian.energies.flows import Flow, check_same_points
from gibbsian.energies.transport import Transported
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError
from gibbsian.kernels.base import Kernel, State, evaluate
from gibbsian.samples import Samples
from gibbsian.sampling import reporter, sample

JUDGED = 4096
"""Draws by which a trained flow is judged."""


@dataclass(frozen=True)
class TransportFit:
    """A flow trained on an energy.

    Attributes
    ----------
    flow
        The flow that was given, now trained.
    elbo
        The evidence lower bound in nats, below log Z, with its standard error, by fresh draws.
    history
        One dict of numbers per record: ``step`` and ``elbo``, the mean over the steps since the last record.
    gradients
        Gradients of the energy that training took.
    seconds
        Wall time.
    """

    flow: Flow
    elbo: Estimate
    history: list[dict[str, float]]
    gradients: int
    seconds: float

    def __repr__(self) -> str:
        """Bound and cost."""
        return f"TransportFit(elbo {self.elbo}, {self.gradients} gradients of the energy, {self.seconds:.1f} s)"


def fit_transport(
    energy: Energy | Callable[[Tensor], Tensor],
    flow: Flow,
    *,
    rng: Generator,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    final_learning_rate_factor: float = 0.01,
    clip_norm: float = 10.0,
    log_every: int = 50,
    sticking: bool = True,
    progress: bool | Callable[[int], object] = False,
) -> TransportFit:
    """Train a flow towards an energy by the reverse Kullback-Leibler divergence, without data.

    Parameters
    ----------
    energy
        Over the reals, with the flow's event shape.
    flow
        Changed in place. Draws must be quick: `inverse_autoregressive_flow`, or coupling transforms.
    rng
        The generator of the draws, on the flow's device.
    steps, batch_size
        Steps of Adam, and draws per step, each of which costs a gradient of the energy.
    learning_rate, final_learning_rate_factor
        It falls along a cosine to this fraction of itself.
    clip_norm
        Gradients with a larger norm are scaled down to it.
    log_every
        Steps between records.
    sticking
        Whether the gradient goes by the points alone. That takes the density of given points at every step, one pass
        per coordinate of an inverse autoregressive flow; without it steps are quicker and noisier.
    progress
        ``True`` for a bar on the terminal, or a function called with the number of steps just made.

    Raises
    ------
    ArgumentTypeError
        If the flow is none, or no parameter of it learns.
    ShapeError, DomainError
        If the energy is over other points than the flow.
    OptionError
        If a setting is out of its range, or the energy has open context.
    DivergenceError
        If a loss or a gradient is not finite; the flow keeps the weights of the steps before.
    """
    adopted = _checked(energy, flow)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("log_every", log_every)):
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is a whole number, 1 or more; got {value!r}.")
    for name, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if not 0.0 < value < math.inf:
            raise OptionError(f"{name} is a positive number; got {value}.")
    began = time.perf_counter()
    params = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, learning_rate, fused=True)
    broken = torch.zeros((), dtype=torch.bool, device=flow.loc.device)
    history: list[dict[str, float]] = []
    pending: list[Tensor] = []
    report, close = reporter(progress, steps, "training the flow")
    try:
        for step in range(steps):
            floor = final_learning_rate_factor
            rate = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = learning_rate * rate
            loss = _reverse_divergence(adopted, flow, batch_size, rng, sticking)
            broken |= _move(loss, params, optimizer, clip_norm)
            pending.append(-loss.detach())
            if (step + 1) % log_every == 0 or step + 1 == steps:
                if bool(broken):
                    raise _diverged(step + 1, pending)
                history.append({"step": step + 1, "elbo": float(torch.stack(pending).mean())})
                pending.clear()
            report(1)
    finally:
        close()
    return TransportFit(flow, _bound(adopted, flow, rng), history, steps * batch_size, time.perf_counter() - began)


def sample_transported(
    moved: Transported,
    kernel: Kernel,
    start: Tensor | State,
    *,
    steps: int,
    rng: Generator,
    warmup: int = 0,
    thin: int | None = None,
    compile: bool = False,
    progress: bool | Callable[[int], object] = False,
) -> Samples:
    """Run chains in a flow's noise, and return them as chains of the energy's own points.

    R-hat, effective sizes and whatever else `Samples.summary` tells are then about these points.

    Parameters
    ----------
    moved
        From `neural_transport`.
    kernel, steps, rng, warmup, thin, compile, progress
        As in `sample`. Tune the kernel in the noise: ``warm_up(moved, HMC(0.5), moved.start(64, rng), rng=rng)``.
    start
        Noise ``(n, d)``, as ``moved.start(n, rng)`` gives it and ``moved.backward_points(x)`` of points x, or the
        ``state`` that `tune` or `warm_up` ended in.

    Returns
    -------
    Samples
        ``draws`` and ``state`` are points ``(kept, n, *event)`` and ``(n, *event)``, with the energy's own values and
        gradients in ``state``; the ``energy`` in ``kept`` is that of the noise.

    Raises
    ------
    ArgumentTypeError
        If ``moved`` does not come from `neural_transport`.
    OptionError, ShapeError, DomainError
        As `sample` does.
    """
    if not isinstance(moved, Transported):
        raise ArgumentTypeError(f"moved comes from neural_transport(energy, flow); got {moved!r}.")
    made = sample(
        moved,
        kernel,
        start,
        steps=steps,
        rng=rng,
        warmup=warmup,
        thin=thin,
        compile=compile,
        progress=progress,
    )
    x = moved.forward_points(made.x)
    draws = None if made.draws is None else moved.forward_points(made.draws)
    return dataclasses.replace(made, state=State(x, *evaluate(moved.energy, x)), draws=draws)


def _checked(energy: Energy | Callable[[Tensor], Tensor], flow: Flow) -> Energy:
    if not isinstance(flow, Flow) or not any(p.requires_grad for p in flow.parameters()):
        raise ArgumentTypeError(
            f"What is trained is a Flow with parameters, such as inverse_autoregressive_flow(2); got {flow!r}."
        )
    adopted = Energy.of(energy)
    if adopted.context:
        raise OptionError(f"{formula(adopted)} has open context, {adopted.context}; fix it with given(...).")
    check_same_points(flow, adopted, "The energy")
    return adopted


def _reverse_divergence(energy: Energy, flow: Flow, n: int, rng: Generator, sticking: bool) -> Tensor:
    """The divergence less log Z, by n draws, whose gradient is that of the flow's parameters."""
    x, log_q = flow.rsample_and_log_prob(n, rng)
    if sticking:
        resting = {name: p.detach() for name, p in flow.named_parameters()}
        log_q = -functional_call(flow, resting, (x,))
    return (energy(x) + log_q).mean()


def _move(loss: Tensor, params: Sequence[Tensor], optimizer: Any, clip_norm: float) -> Tensor:
    """One step of the optimiser, which moves nothing where something is not finite; returns whether."""
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    for p, g in zip(params, grads):
        p.grad = g
    norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
    broken = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
    # As `fit` does: the fused optimiser divides by the first and does nothing where the second is 1.
    optimizer.grad_scale = (norm / clip_norm).clamp(min=1.0).to(torch.float32)
    optimizer.found_inf = broken.to(torch.float32)
    optimizer.step()
    for p in params:
        p.grad = None
    return broken


def _diverged(step: int, pending: list[Tensor]) -> DivergenceError:
    values = torch.stack(pending)
    bad = (~torch.isfinite(values)).nonzero()
    where = f"step {step - len(values) + 1 + int(bad[0])}" if len(bad) else f"one of the steps up to {step}"
    return DivergenceError(
        f"Training the flow came to a loss or a gradient that is not finite at {where}. Lower learning_rate, start the "
        "flow where the energy is finite (flow.calibrate on some points of it), or look for NaN in the energy."
    )


@torch.no_grad()
def _bound(energy: Energy, flow: Flow, rng: Generator) -> Estimate:
    x, log_q = flow.rsample_and_log_prob(JUDGED, rng)
    values = -(energy(x) + log_q).double()
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(JUDGED))
