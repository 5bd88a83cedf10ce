"""The replay buffer: chains that outlive a training step.

Persistent contrastive divergence goes on with the chains of earlier steps, since a model that moved a little leaves
them almost in equilibrium. A chain is its position, its age, and the labels it is drawn under; the three live and
move together, in one slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.tractable import Tractable, require_tractable
from gibbsian.errors import OptionError, ShapeError
from gibbsian.kernels.base import per_chain
from gibbsian.processes.collectives import agree, gathered, gathered_objects

_CONTEXT = "context_"


@dataclass(frozen=True)
class Slots:
    """Chains taken out of a buffer, and where they belong.

    Attributes
    ----------
    index
        The slot of each chain, ``(n,)``, all different.
    x
        Positions, ``(n, *event)``.
    age
        Steps made since each chain last started from the base, ``(n,)``.
    context
        The labels of each chain, by name.
    hot
        Its replicas at higher temperatures, ``(n, K - 1, *event)``, where the buffer keeps them.
    """

    index: Tensor
    x: Tensor
    age: Tensor
    context: dict[str, Tensor] = field(default_factory=dict)
    hot: Tensor | None = None


class ReplayBuffer(nn.Module):
    """Chains kept between training steps; a few restart from the base at each draw.

    `Training restricted Boltzmann machines using approximations to the likelihood gradient (Tieleman, 2008)
    <https://doi.org/10.1145/1390156.1390290>`_ keeps the chains; restarting some of them is from `Implicit generation
    and modeling with energy-based models (Du & Mordatch, 2019) <https://arxiv.org/abs/1903.08689>`_.

    Everything it holds is in its ``state_dict`` and follows ``.to()``. The slots are filled from the base on the first
    draw (or by `fill`), and labels are learned from the first batch, so that a fresh buffer takes a saved one's
    contents whole, labels included. Nothing in `draw` and `write` waits for the device.

    Parameters
    ----------
    base
        Where chains start.
    size
        How many chains are kept.
    restart
        The fraction of drawn chains that start anew, exact in expectation.
    replicas
        Replicas of each chain, for tempering: all start from the base, live in one slot and restart together. Only the
        first, the target's, is a chain to whoever reads the buffer; the others are ``hot``.

    Raises
    ------
    OptionError
        If ``size`` or ``replicas`` is less than 1, or ``restart`` is not between 0 and 1.
    ArgumentTypeError
        If the base is not tractable.
    """

    positions: Tensor
    ages: Tensor
    hot: Tensor | None

    def __init__(self, base: Tractable, size: int = 10_000, restart: float = 0.05, replicas: int = 1) -> None:
        super().__init__()
        self.base = require_tractable(base, "The base of a replay buffer")
        if size < 1:
            raise OptionError(f"A replay buffer holds 1 chain or more; got size={size}.")
        if not 0.0 <= restart <= 1.0:
            raise OptionError(f"restart is a fraction between 0 and 1; got {restart}.")
        if replicas < 1:
            raise OptionError(f"replicas counts those of each chain, 1 or more; got {replicas}.")
        self.size = size
        self.restart = restart
        self.replicas = replicas
        # No rows means not filled yet: a shape is known without asking the device, a flag in a tensor is not.
        empty = next(tensors_of(base), torch.empty(())).new_empty((0, *base.event_shape))
        self.register_buffer("positions", empty)
        self.register_buffer("ages", torch.zeros(0, dtype=torch.int64, device=empty.device))
        hot = None if replicas == 1 else empty.new_empty((0, replicas - 1, *base.event_shape))
        self.register_buffer("hot", hot)

    @property
    def filled(self) -> bool:
        """Whether there are chains in the slots."""
        return self.positions.shape[0] > 0

    @property
    def context(self) -> dict[str, Tensor]:
        """The labels of every slot, by name, ``(size, ...)`` each."""
        return {
            k.removeprefix(_CONTEXT): v for k, v in self._buffers.items() if k.startswith(_CONTEXT) and v is not None
        }

    @property
    def mean_age(self) -> Tensor:
        """Mean age of all chains, in steps, a 0-d tensor; NaN before the first draw."""
        return self.ages.float().mean()

    @torch.no_grad()
    def fill(self, rng: Generator, context: Mapping[str, Tensor] | None = None) -> None:
        """Start every chain from the base.

        Parameters
        ----------
        rng
            The generator, on the buffer's device.
        context
            Labels, one row per row of a batch; each slot takes those of a row drawn uniformly.
        """
        x = self.base.sample(self.size, rng)
        self.positions = x.clone()
        self.hot = self._hot_from_base(self.size, rng)
        self.ages = torch.zeros(self.size, dtype=torch.int64, device=x.device)
        for name in self.context:
            delattr(self, _CONTEXT + name)
        for name, value in _random_rows(context or {}, self.size, rng, x.device).items():
            self.register_buffer(_CONTEXT + name, value)

    @torch.no_grad()
    def draw(
        self,
        n: int,
        rng: Generator,
        context: Mapping[str, Tensor] | None = None,
        data: Tensor | None = None,
        from_data: float = 0.0,
    ) -> Slots:
        """Take ``n`` different chains, some of them restarted, at age 0, from the base or at rows of data.

        How many restart of each kind is one of the two whole numbers around its fraction of ``n``.

        Parameters
        ----------
        n
            How many, ``size`` at most.
        rng
            The generator, on the buffer's device.
        context
            The batch's labels; a restarted chain takes those of a row drawn uniformly, and starts at it if at data.
        data
            The batch's rows, ``(m, *event)``; needed when ``from_data`` is not 0.
        from_data
            The fraction of drawn chains that restart at a row of data, besides those that restart from the base.

        Raises
        ------
        OptionError
            If ``n`` exceeds the size, the generator is elsewhere, the labels' names are not the buffer's, or data are
            missing.
        """
        context = context or {}
        self._check_draw(n, rng)
        if from_data and data is None:
            raise OptionError(
                f"from_data={from_data} of the chains restart at data, and none were given; pass data=..."
            )
        if not self.filled:
            self.fill(rng, context)
        self._check_names(context)
        index = torch.randperm(self.size, generator=rng, device=self.positions.device)[:n]
        x, age = self.positions[index], self.ages[index]
        hot = None if self.hot is None else self.hot[index]
        labels = {name: value[index] for name, value in self.context.items()}
        # The slots come in random order, so only the first few are candidates, and the base is asked for no more.
        k, m = (min(n, math.ceil(share * n)) for share in (self.restart, self.restart + from_data))
        if m:
            place, u = torch.arange(m, device=x.device), torch.rand((), generator=rng, device=x.device)
            from_base, anew = (place < (share * n + u).floor() for share in (self.restart, self.restart + from_data))
            row = torch.randint(0, _rows(context, data), (m,), generator=rng, device=x.device)
            if data is not None and from_data:
                x[:m] = torch.where(per_chain(anew, x), data[row], x[:m])
                if hot is not None:
                    hot[:m] = torch.where(per_chain(anew, hot), data[row].unsqueeze(1), hot[:m])
            if k:
                x[:k] = torch.where(per_chain(from_base[:k], x), self.base.sample(k, rng), x[:k])
                fresh = self._hot_from_base(k, rng)
                if hot is not None and fresh is not None:
                    hot[:k] = torch.where(per_chain(from_base[:k], hot), fresh, hot[:k])
            age[:m] = torch.where(anew, 0, age[:m])
            for name, value in context.items():
                labels[name][:m] = torch.where(per_chain(anew, value), value[row], labels[name][:m])
        return Slots(index, x, age, labels, hot)

    @torch.no_grad()
    def peek(self, n: int, rng: Generator) -> Slots:
        """Copy ``n`` different chains as they stand, with ages and labels; none restarts and nothing is written.

        Drawn without replacement: the chains are a finite sample of the model, and a copy would pass for one more.

        Parameters
        ----------
        n
            How many, ``size`` at most.
        rng
            The generator, on the buffer's device.

        Raises
        ------
        OptionError
            If there are no chains yet, ``n`` exceeds the size, or the generator is elsewhere.
        """
        self._check_draw(n, rng)
        if not self.filled:
            raise OptionError(
                "This replay buffer holds no chains yet: train with it, load a saved one, or start its chains with "
                "fill(rng)."
            )
        index = torch.randperm(self.size, generator=rng, device=self.positions.device)[:n]
        labels = {name: value[index] for name, value in self.context.items()}
        return Slots(index, self.positions[index], self.ages[index], labels)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Draw ``n`` different chains as they stand, ``(n, *event)``: positions only; `peek` tells their labels."""
        return self.peek(n, rng).x

    @torch.no_grad()
    def write(self, slots: Slots, x: Tensor, steps: int, hot: Tensor | None = None) -> None:
        """Put chains back into the slots they came from, ``steps`` older.

        Parameters
        ----------
        slots
            What `draw` returned.
        x
            Where the chains stand now, in the order of ``slots``.
        steps
            Steps made since.
        hot
            Where their replicas stand, if the buffer keeps any.

        Raises
        ------
        ShapeError
            If ``x`` is not of the shape of ``slots.x``, or ``hot`` not of that of ``slots.hot``.
        """
        if x.shape != slots.x.shape:
            raise ShapeError(f"Chains of shape {tuple(slots.x.shape)} were drawn; {tuple(x.shape)} cannot be put back.")
        shapes = [None if each is None else tuple(each.shape) for each in (slots.hot, hot)]
        if shapes[0] != shapes[1]:
            raise ShapeError(f"Replicas of shape {shapes[0]} were drawn; {shapes[1]} cannot be put back.")
        if self.hot is not None and hot is not None:
            self.hot.index_copy_(0, slots.index, hot.detach().to(self.hot.dtype))
        self.positions.index_copy_(0, slots.index, x.detach().to(self.positions.dtype))
        self.ages.index_copy_(0, slots.index, slots.age + steps)
        for name, value in self.context.items():
            value.index_copy_(0, slots.index, slots.context[name])

    def extra_repr(self) -> str:
        """Size and fraction restarted."""
        told = f"size={self.size}, restart={self.restart}"
        return told if self.replicas == 1 else f"{told}, replicas={self.replicas}"

    def _hot_from_base(self, n: int, rng: Generator) -> Tensor | None:
        """Draw the replicas of some chains, where they are kept."""
        if self.replicas == 1:
            return None
        return self.base.sample(n * (self.replicas - 1), rng).unflatten(0, (n, self.replicas - 1))

    def _check_draw(self, n: int, rng: Generator) -> None:
        if not 1 <= n <= self.size:
            raise OptionError(
                f"Cannot draw {n} different chains from a replay buffer of size {self.size}; "
                "make the buffer larger or the batch smaller."
            )
        if rng.device.type != self.positions.device.type:
            raise OptionError(f"The generator is on {rng.device} and the replay buffer on {self.positions.device}.")

    def _check_names(self, context: Mapping[str, Tensor]) -> None:
        if context.keys() != self.context.keys():
            kept, given = (", ".join(sorted(names)) or "none" for names in (self.context, context))
            raise OptionError(
                f"The replay buffer keeps chains with labels: {kept}; the batch has: {given}. "
                "One buffer serves one conditional energy; make a new one, or refill it with fill(rng, context)."
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for what the saved buffer holds, then load as any module does."""
        if prefix + "positions" in state_dict:
            for name in self.context:
                if prefix + _CONTEXT + name not in state_dict:
                    delattr(self, _CONTEXT + name)
            for key, saved in state_dict.items():
                name = key.removeprefix(prefix)
                if key.startswith(prefix) and (name in ("positions", "ages", "hot") or name.startswith(_CONTEXT)):
                    now = self._buffers.get(name)
                    # Saved with another size: left at this one's, for torch to report the mismatch.
                    shape = (self.size if saved.shape[0] else 0, *saved.shape[1:])
                    dtype = saved.dtype if now is None else now.dtype
                    self.register_buffer(name, torch.empty(shape, dtype=dtype, device=self.positions.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]


def split_buffer(buffer: ReplayBuffer, lanes: int) -> list[ReplayBuffer]:
    """Part a buffer's slots into equal consecutive shares, a buffer for each lane.

    What a lane then draws and writes depends on nothing but its own generator, whichever process holds it. The parts
    have memory of their own, and share the base.

    Parameters
    ----------
    buffer
        Filled or not.
    lanes
        How many parts; they divide its size.

    Raises
    ------
    OptionError
        If they do not.
    """
    if lanes < 1 or buffer.size % lanes:
        near = max(1, round(buffer.size / max(1, lanes))) * max(1, lanes)
        raise OptionError(
            f"A replay buffer of {buffer.size} chains cannot be divided equally among {lanes} lanes; take size={near}."
        )
    per = buffer.size // lanes
    parts = [{k: v[i * per : (i + 1) * per].clone() for k, v in slots_of(buffer).items()} for i in range(lanes)]
    return [_of_slots(buffer, per, part) for part in parts]


def joined_buffer(parts: Sequence[ReplayBuffer], gather: bool = False) -> ReplayBuffer:
    """Put the buffers of lanes together again, in their order.

    Parameters
    ----------
    parts
        Of all lanes, or of this process's with ``gather``; all filled, or none. The base is the first one's.
    gather
        Collect the parts of all processes, in the order of lanes, on each of them.

    Raises
    ------
    OptionError
        If there is none, or only some have been filled, or labels differ.
    """
    slots = [slots_of(part) for part in parts]
    if not parts or any(s.keys() != slots[0].keys() for s in slots):
        raise OptionError(
            f"Buffers are joined that were split, all filled or none, with the same labels; got {len(parts)}, of "
            f"{[sorted(s) for s in slots]}. Fill them with fill(rng)."
        )
    whole = {name: torch.cat([s[name] for s in slots]) for name in slots[0]}
    size = sum(part.size for part in parts)
    if gather:
        agree({"what buffers hold": ", ".join(sorted(whole)) or "nothing yet"}, "replay buffers")
        size = sum(gathered_objects(size))
        whole = {name: gathered(whole[name]) for name in sorted(whole)}
    return _of_slots(parts[0], size, whole)


def slots_of(buffer: ReplayBuffer) -> dict[str, Tensor]:
    """Everything that has a row for each slot, by its name in the buffer; nothing before they are filled."""
    if not buffer.filled:
        return {}
    own = {k: v for k, v in buffer._buffers.items() if v is not None}
    return {k: v for k, v in own.items() if k in ("positions", "ages", "hot") or k.startswith(_CONTEXT)}


def _of_slots(like: ReplayBuffer, size: int, slots: Mapping[str, Tensor]) -> ReplayBuffer:
    new = ReplayBuffer(like.base, size, like.restart, like.replicas)
    for name, value in slots.items():
        new.register_buffer(name, value)
    return new


def _random_rows(context: Mapping[str, Tensor], n: int, rng: Generator, device: torch.device) -> dict[str, Tensor]:
    """Draw ``n`` rows of labels with replacement; labels of several names stay together."""
    if not context:
        return {}
    rows = min(value.shape[0] for value in context.values())
    index = torch.randint(0, rows, (n,), generator=rng, device=device)
    return {name: value[index] for name, value in context.items()}


def _rows(context: Mapping[str, Tensor], data: Tensor | None) -> int:
    """Rows of the batch that labels and data come from; 1 where there are neither."""
    return min((value.shape[0] for value in (*context.values(), *(() if data is None else (data,)))), default=1)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Floating-point parameters and buffers of a module, which tell its dtype and device."""
    return (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
