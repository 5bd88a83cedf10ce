r"""Gibbs sampling: sites are drawn from their law given all the others.

**In blocks.** Sites that do not meet in the energy are independent given the rest, and a block of them is drawn at
once. An energy that knows its conditionals offers

``conditional_logits(x, block)``
    For states ``(n, *event)``, logits of every site given all the others, of the shape of x: the log-odds of a one,
    :math:`E(x_i = 0) - E(x_i = 1)`, on binary states; unnormalised logits of the classes, over the last axis, on
    one-hot states. Only those of ``block`` will be read, so that an energy may compute just these and leave anything
    in the other places; ignoring it is right too.

``blocks``
    A tuple that parts the sites into blocks, each independent given the rest. A block is a boolean mask over the sites
    (the event; without its last axis when one-hot), or a slice along the event's first axis.

Logits of a sum of energies are the sum of theirs, so that tempering and annealing keep the protocol. A lattice has the
two colours of a checkerboard, a Boltzmann machine over ``(visible, hidden)`` two slices, independent sites one block.

**Site by site.** Where an energy knows no conditionals, one site's are evaluated: E at each value it could take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, choose, energy_only, is_finite, per_chain, settings_repr
from gibbsian.kernels.discrete import DISCRETE, check_states, gumbel, hot_at, is_one_hot, pick, uniforms
from gibbsian.typing import EnergyFn

Block: TypeAlias = Tensor | slice


@dataclass(frozen=True)
class BlockGibbs:
    """Draw block after block from its law given the rest; a step sweeps all of them, in order.

    `Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (Geman & Geman, 1984)
    <https://doi.org/10.1109/TPAMI.1984.4767596>`_. Nothing is ever rejected. A sweep leaves the density invariant, but
    in a fixed order it is not reversible.

    Parameters
    ----------
    blocks
        A partition of the sites into blocks (boolean masks over the sites, or slices along the event's first axis), or
        ``None`` for the energy's own.

    Raises
    ------
    OptionError
        If there is no block; at the start, if a site is in none or in several, or sites of one block depend on each
        other.
    ArgumentTypeError
        At the start, if the energy does not tell its conditionals.
    """

    blocks: Sequence[Block] | None = None

    gradients = 1  # The one evaluation at the end of a sweep.
    domain = DISCRETE

    def __post_init__(self) -> None:
        if self.blocks is None:
            return
        if not len(self.blocks) or not all(isinstance(b, (Tensor, slice)) for b in self.blocks):
            raise OptionError(f"blocks is a tuple of boolean masks or slices, one or more; got {self.blocks!r}.")
        # Not one tensor of masks, which would be turned into floats as settings are.
        object.__setattr__(self, "blocks", tuple(self.blocks))

    def __repr__(self) -> str:
        return "BlockGibbs()" if self.blocks is None else f"BlockGibbs(<{len(self.blocks)} blocks>)"

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start, and check that the blocks fit."""
        hot = check_states(energy, x)
        blocks = _blocks_of(self, energy)
        if self.blocks is not None and not torch.compiler.is_compiling():
            _check_blocks(energy, x, blocks, hot)
        return energy_only(energy, x)

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Uniform numbers of the shape of x: each site is drawn once in a sweep."""
        return uniforms(steps, rng, state.x, tuple(state.x.shape))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """One sweep; undone, and counted, in chains where a conditional is NaN or the energy ends infinite."""
        (u,) = noise
        hot = is_one_hot(energy)
        state = without_gradient(state)
        x = state.x
        for block in _blocks_of(self, energy):
            logits = _logits(energy, x, block)
            drawn = hot_at((logits + gumbel(u)).argmax(-1), x) if hot else (u < logits.sigmoid()).to(x.dtype)
            # A comparison with NaN would draw a zero without a word.
            x = _within(block, torch.where(logits.isnan(), logits, drawn), x, hot)
        new = State(x, energy(x).detach(), state.grad)
        fine = is_finite(new.energy, x)
        sure = fine.to(state.energy.dtype)
        return choose(fine, new, state), Info(sure, 1.0 - sure)


@dataclass(frozen=True)
class SingleSiteGibbs:
    """Draw single sites, chosen at random, from their law given the rest: exact for any energy, without gradients.

    Each update evaluates the energy at every other value of the site: once on binary states, K - 1 times on one-hot
    ones. `Equation of state calculations by fast computing machines (Metropolis et al., 1953)
    <https://doi.org/10.1063/1.1699114>`_ moves one particle at a time in this way; the heat bath is `Glauber's (1963)
    <https://doi.org/10.1063/1.1703954>`_.

    Parameters
    ----------
    updates
        Sites per step, one after another.

    Raises
    ------
    OptionError
        If there is no site to update.
    """

    updates: int = 1

    domain = DISCRETE
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise OptionError(f"updates counts the sites drawn in a step, 1 or more; got {self.updates}.")

    @property
    def gradients(self) -> int:
        """Evaluations, which stand in the place of gradients: one per update."""
        return self.updates

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_states(energy, x)
        return energy_only(energy, x)

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """Two uniform numbers per update: which site, and its value."""
        shape = (state.x.shape[0], self.updates)
        return uniforms(steps, rng, state.x, shape, shape)

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Update some sites; a value whose energy is not finite is not drawn, and counted."""
        which, value = noise
        hot = is_one_hot(energy)
        state = without_gradient(state)
        moved, lost = torch.zeros_like(state.energy), torch.zeros_like(state.energy)
        for i in range(self.updates):
            state, left, bad = _heat_bath(energy, state, which[:, i], value[:, i], hot)
            moved, lost = moved + left, lost + bad
        return state, Info(moved / self.updates, lost)


def without_gradient(state: State) -> State:
    """Drop the gradient of another kernel's state, which would be out of date after a move."""
    return State(state.x, state.energy, state.x.new_zeros((state.x.shape[0], 0)))


def _heat_bath(energy: EnergyFn, state: State, which: Tensor, value: Tensor, hot: bool) -> tuple[State, Tensor, Tensor]:
    """Draw one site of each chain; also the probability of leaving its value, and how many others were not finite."""
    x = state.x
    shape = x.shape[1:-1] if hot else x.shape[1:]
    sites = torch.arange(shape.numel(), device=x.device).reshape(1, *shape)
    here = sites == per_chain((which * shape.numel()).long(), sites)
    here = here.unsqueeze(-1) if hot else here
    # Turning the class by k = 1 ... K - 1 places passes through all the others.
    others = (
        [torch.where(here, x.roll(k, -1), x) for k in range(1, x.shape[-1])] if hot else [torch.where(here, 1 - x, x)]
    )
    energies = torch.stack([state.energy, *(energy(y).detach() for y in others)], 1)
    fine = torch.isfinite(energies)
    law = torch.where(fine, -energies, -torch.inf).softmax(1)
    drawn = pick(law, value)
    for k, y in enumerate(others, start=1):
        x = torch.where(per_chain(drawn == k, x), y, x)
    taken = energies.gather(1, drawn.unsqueeze(1)).squeeze(1)
    return State(x, taken, state.grad), 1.0 - law[:, 0], (~fine).to(law.dtype).sum(1)


def _blocks_of(kernel: BlockGibbs, energy: EnergyFn) -> Sequence[Block]:
    if not hasattr(energy, "conditional_logits"):
        raise ArgumentTypeError(
            f"BlockGibbs asks the energy for its conditionals, and {type(energy).__name__} has none. Write "
            "conditional_logits(x, block), the log-odds of a one (or logits of the classes) of each site given the "
            "others; or use GibbsWithGradients, DiscreteLangevin or PathAuxiliary, which need a gradient only, or "
            "SingleSiteGibbs, which needs the energy only."
        )
    blocks = kernel.blocks if kernel.blocks is not None else getattr(energy, "blocks", None)
    if blocks is None:
        raise ArgumentTypeError(
            f"{type(energy).__name__} does not say which sites are independent given the rest; give "
            "BlockGibbs(blocks=...): boolean masks over the sites, or slices along the event's first axis."
        )
    return blocks


def _logits(energy: EnergyFn, x: Tensor, block: Block) -> Tensor:
    return checked_logits(energy, x, block).detach()


def checked_logits(energy: EnergyFn, x: Tensor, block: Block, **context: Tensor) -> Tensor:
    """Ask an energy for its conditionals, and check their shape.

    Raises
    ------
    ShapeError
        If it is not that of the states.
    """
    logits = energy.conditional_logits(x, block, **context)  # type: ignore[attr-defined]
    if logits.shape != x.shape:
        raise ShapeError(
            f"conditional_logits of states {tuple(x.shape)} have their shape; {type(energy).__name__} returned "
            f"{tuple(logits.shape)}."
        )
    return logits


def _within(block: Block, new: Tensor, old: Tensor, hot: bool) -> Tensor:
    """Take ``new`` in the block and ``old`` elsewhere."""
    if isinstance(block, slice):
        x = old.clone()
        x[:, block] = new[:, block]
        return x
    return torch.where(block.unsqueeze(-1) if hot else block, new, old)


def _check_blocks(energy: EnergyFn, x: Tensor, blocks: Sequence[Block], hot: bool) -> None:
    """Refuse blocks that are no partition, or whose sites depend on each other at the start."""
    sites = x.shape[1:-1] if hot else x.shape[1:]
    times = torch.zeros(sites, dtype=torch.long, device=x.device)
    for block in blocks:
        if isinstance(block, Tensor) and (block.dtype != torch.bool or block.shape != sites):
            raise OptionError(
                f"A block is a boolean mask over the sites, of shape {tuple(sites)}, or a slice along the event's "
                f"first axis; got {block.dtype} of shape {tuple(block.shape)}."
            )
        times[block] += 1
    if not bool((times == 1).all()):
        raise OptionError(
            f"Blocks are a partition: each site is in one. Of {times.numel()} sites, {int((times == 0).sum())} are in "
            f"none and {int((times > 1).sum())} in several."
        )
    for i, block in enumerate(blocks):
        # Were its sites independent given the rest, their own values would not show in their logits.
        other = _within(block, x.roll(1, -1) if hot else 1.0 - x, x, hot)
        logits = _logits(energy, x, block)
        gap = _within(block, _logits(energy, other, block) - logits, torch.zeros_like(x), hot).abs()
        if bool((gap > 1e-3 * (1.0 + logits.abs())).any()):
            raise OptionError(
                f"The sites of block {i} depend on each other: their logits move by up to {float(gap.max()):.3g} when "
                "the block changes. Part them into blocks in which no two sites meet in the energy."
            )
