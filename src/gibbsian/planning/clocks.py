"""Timing what a recipe does at one size: steps of `fit` itself, taken apart, and steps of chains."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gibbsian.building import build_objective, family_of, initial_weights
from gibbsian.energies.base import Energy
from gibbsian.errors import DivergenceError, OptionError
from gibbsian.families.networks import build_kernel
from gibbsian.kernels.base import Kernel
from gibbsian.kernels.langevin import MALA
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Batch, Objective
from gibbsian.objectives.contrastive import ChainObjective
from gibbsian.planning.costs import Quantity
from gibbsian.recipes import Recipe
from gibbsian.sampling import sample
from gibbsian.training.fit import fit

RECORDS = 10
"""Steps from record to record while steps are timed, so that some are seen."""

FEWEST, WARM = 5, 2
"""Steps that are timed at least, and those before the clock counts, in which memory is new and graphs are made."""

WALKED = ("flow", "tilted-flow", "vae", "vae-ebm")
"""Energies whose chains are Metropolis-adjusted Langevin's, whatever the recipe's kernel."""

_NEVER = 1e30


class _Enough(BaseException):
    """The time is over; nothing is wrong, and no handler of errors is to see it."""


@dataclass
class Timed:
    """Seconds of each step of training, by part, and of records."""

    parts: dict[str, Quantity] = field(default_factory=dict)
    record: Quantity = Quantity(0.0)
    steps: int = 0


def quantity(values: Sequence[float]) -> Quantity:
    """Median, and half the distance between the quartiles."""
    if len(values) < 2:
        return Quantity(values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quantity(middle, 0.5 * (high - low))


def rows_for(recipe: Recipe, rows: int, data: Tensor | None = None, seed: int = 0) -> Tensor:
    """Make up rows in model units, or repeat those there are until there are enough.

    Parameters
    ----------
    recipe
        Says what they are.
    rows
        How many.
    data
        Rows in model units, ``(m, *event)``.
    seed
        Of what is made up.
    """
    if data is not None:
        return data[torch.arange(rows) % len(data)]
    rng = torch.Generator().manual_seed(seed)
    shape = (rows, *recipe.shape)
    if recipe.kind == "binary":
        return (torch.rand(shape, generator=rng) < 0.3).float()
    if recipe.is_image:
        return 2.0 * torch.rand(shape, generator=rng) - 1.0
    return torch.randn(shape, generator=rng)


def batch_of(recipe: Recipe, x: Tensor) -> Batch:
    """Give rows the labels that the recipe's energy asks for, in turn."""
    context = {"y": torch.arange(len(x)) % len(recipe.class_names)} if recipe.conditional else {}
    return Batch(x, context)


def sized(recipe: Recipe, rows: int) -> Recipe:
    """Change a recipe to another batch; a replay buffer that cannot serve it grows."""
    # Lanes and sharding are the model's affair: what is timed is one lane of one process.
    single: dict[str, Any] = {"lanes": 1, "sharding": "none"}
    single = {name: value for name, value in single.items() if hasattr(recipe.training, name)}
    training = dataclasses.replace(
        recipe.training,
        **single,
        batch_size=rows,
        log_every=RECORDS,
        checkpoint_every=10**9,
        tensorboard=False,
        # Data that were made up are not to look ill: only what is not a number still is.
        gap_limit=_NEVER,
        gradient_limit=_NEVER,
        acceptance_limit=0.0,
        movement_limit=0.0,
        saturation_limit=0.0,
        flat_limit=0.0,
        coverage_limit=0.0,
    )
    return dataclasses.replace(recipe, training=training, buffer_size=max(recipe.buffer_size, rows))


def built(recipe: Recipe, rows: int, data: Tensor | None = None) -> tuple[Energy, Objective, Batch]:
    """Build energy, objective and a data set of one batch."""
    x = rows_for(recipe, max(2, rows), data)
    energy = initial_weights(recipe, x)
    return energy, build_objective(recipe, x, energy), batch_of(recipe, x)


def time_training(
    recipe: Recipe, rows: int, seconds: float, data: Tensor | None = None, exactly: int | None = None, **options: Any
) -> Timed:
    """Time steps of `fit` with batches of so many rows, for so many seconds but not fewer than some steps.

    Parameters
    ----------
    recipe
        What is trained.
    rows
        Of a batch, 2 or more.
    seconds
        How long.
    data
        Rows in model units; made up when left out.
    exactly
        Steps to time, whatever the seconds, where several processes have to agree.
    options
        For `fit`, as ``lanes``.
    """
    recipe = sized(recipe, rows)
    energy, objective, batch = built(recipe, rows, data)
    clock = _Clock(objective, seconds, exactly)
    with clock.listening(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(_Enough, DivergenceError):
            fit(
                energy,
                batch,
                objective,
                rng=torch.Generator().manual_seed(1),
                settings=recipe.training,
                **options,
            )
    return clock.timed()


class _Clock:
    """Marks the moments of a run by torch's own hooks: before and after the objective, and the optimiser's step."""

    def __init__(self, objective: Objective, seconds: float, exactly: int | None) -> None:
        self.objective, self.seconds, self.exactly = objective, seconds, exactly
        self.steps: list[tuple[float, float, float, float]] = []
        self.loss, self.entered, self.backward_done, self.last, self.began = 0.0, 0.0, 0.0, 0.0, 0.0
        self.first: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to hooks while inside."""
        handles = [
            # Functions, since a copy of an objective, as lanes have, would copy methods together with the clock.
            self.objective.register_forward_pre_hook(lambda *_: self._enter()),
            self.objective.register_forward_hook(lambda *_: self._leave()),
            register_optimizer_step_pre_hook(lambda *_: self._before()),
            register_optimizer_step_post_hook(lambda *_: self._after()),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self) -> None:
        self.entered = _now()
        # There are several calls a step where a process has several lanes.
        self.first = self.entered if self.first is None else self.first

    def _leave(self) -> None:
        self.loss += _now() - self.entered

    def _before(self) -> None:
        self.backward_done = _now()

    def _after(self) -> None:
        now = _now()
        if self.first is None:
            return  # an optimiser of somebody else
        update, whole = now - self.backward_done, now - self.first
        between = self.first - self.last if self.steps else 0.0
        self.steps.append((self.loss, whole - self.loss - update, update, between))
        self.loss, self.first, self.last = 0.0, None, now
        if len(self.steps) == WARM:
            self.began = now
        most = now - self.began > self.seconds if self.exactly is None else len(self.steps) >= WARM + self.exactly
        if most and len(self.steps) >= WARM + FEWEST:
            raise _Enough

    def timed(self) -> Timed:
        """Medians over steps; a record is told by how much longer it takes to the step after it."""
        kept = list(enumerate(self.steps))[WARM:]
        recorded = [step[3] for k, step in kept if k % RECORDS == 0]
        plain = [step[3] for k, step in kept if k % RECORDS]
        columns = list(zip(*(step for _, step in kept)))
        parts = {name: quantity(columns[i]) for i, name in enumerate(("loss", "backward", "update"))}
        parts["between"] = quantity(plain)
        found = quantity(recorded) if recorded else parts["between"]
        record = Quantity(max(0.0, found.value - parts["between"].value), found.spread)
        return Timed(parts, record, len(self.steps))


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def kernel_of(recipe: Recipe) -> Kernel:
    """Build the kernel of a recipe's chains over rows."""
    if recipe.is_machine:
        return RBMGibbs()
    return MALA(recipe.step_size) if recipe.energy in WALKED else build_kernel(recipe)


def chains_of(recipe: Recipe, data: Tensor | None = None) -> tuple[Energy, Callable[[int, Generator], Tensor]]:
    """Build the density that a recipe's chains walk on, and where they may start.

    Raises
    ------
    OptionError
        If the model has no density over rows.
    """
    family = family_of(recipe)
    if not family.of_rows:
        raise OptionError(
            f"The {recipe.energy} model has no density over rows on which chains could walk; leave out --chains."
        )
    energy = initial_weights(recipe, rows_for(recipe, 256, data)).eval()
    model = family(energy, recipe)
    base = model.base
    return model.density, lambda n, rng: base.sample(n, rng).detach()


def time_chains(energy: Energy, kernel: Kernel, start: Tensor, seconds: float) -> Quantity:
    """Time steps of `sample`, for so many seconds but not fewer than some steps.

    Parameters
    ----------
    energy, kernel, start
        As for `gibbsian.sample`.
    seconds
        How long.
    """
    marks: list[float] = []
    counts: list[int] = []

    def mark(count: int) -> None:
        marks.append(_now())
        counts.append(count)
        if len(marks) > FEWEST and marks[-1] - marks[0] > seconds:
            raise _Enough

    rng = torch.Generator(start.device).manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(_Enough):
            sample(energy, kernel, start, steps=10**9, rng=rng, progress=mark)
    return quantity([(b - a) / n for a, b, n in zip(marks, marks[1:], counts[1:])])


def chain_part(objective: Objective) -> ChainObjective | None:
    """Find the part of an objective that runs chains, if one does."""
    return next((part for part in objective.modules() if isinstance(part, ChainObjective)), None)
