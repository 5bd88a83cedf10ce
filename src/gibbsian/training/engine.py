"""How the gradient of a step comes about: in this process, averaged over processes, or in shards of them.

PyTorch's engines do the work. What they wrap is one module whose forward computes the loss of a lane: gradients in x,
of which many losses are made, are then taken inside of it, and the engines see no more than a loss and its parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.score import Score
from gibbsian.errors import DomainError, OptionError
from gibbsian.objectives.base import Batch, Settling
from gibbsian.objectives.fast_weights import FastWeights
from gibbsian.processes import world
from gibbsian.training.checks import checked_loss
from gibbsian.training.lanes import Lane
from gibbsian.training.settings import TrainingSettings

_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class LossModule(nn.Module):
    """All that is trained, as one module whose forward computes the loss of a lane.

    Parameters
    ----------
    energy
        What is fitted.
    lanes
        Of this process.
    precision
        As in `TrainingSettings`.
    """

    def __init__(self, energy: Energy | Score, lanes: list[Lane], precision: str) -> None:
        super().__init__()
        self.energy = energy
        self.objectives = nn.ModuleList(lane.objective for lane in lanes)
        self.lowered = precision != "float32"
        self.changes: list[int] = []
        self.divided = False
        self.error: DomainError | None = None

    def forward(self, place: int, batch: Batch, rng: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the lane at a place among this process's."""
        # Shards change behind the back of the whole weights; what keeps numbers made of these looks at their version.
        if self.changes:
            for p, times in zip(self.parameters(), self.changes):
                for _ in range(times):
                    torch.autograd.graph.increment_version([p])
            self.changes = []
        with torch.autocast(batch.x.device.type, torch.bfloat16) if self.lowered else nullcontext():
            try:
                loss = checked_loss(self.objectives[place](self.energy, batch, rng))
            except DomainError as error:
                if not self.divided:
                    raise
                # Raised by `Engine.loss`: FSDP must see this forward through in every process. DDP must not: it takes a
                # loss without a graph for one in which no parameter is used, and exchanges gradients at once.
                self.error = error
                return batch.x.new_zeros(()), {}
        return loss.value, loss.metrics


class Engine:
    """The module and what averages its gradients.

    Parameters
    ----------
    energy
        What is fitted.
    lanes
        Of this process.
    settings
        Of the run.

    Attributes
    ----------
    sharded
        Whether this process holds a shard of the weights only.
    """

    def __init__(self, energy: Energy | Score, lanes: list[Lane], settings: TrainingSettings) -> None:
        self.inner = LossModule(energy, lanes, settings.precision)
        self.module: Any = self.inner
        self.sharded = settings.sharding == "full" and world().size > 1
        # Where each parameter stands: an engine that divides them puts others in these places.
        self.places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        self.alone: list[nn.Parameter] = []
        if world().size == 1:
            return
        if self.sharded:
            self._shard(energy)
            return
        # Objectives do not use all parameters at every step, and the constant in an energy has no part in its score.
        # DDP warns of steps that use all, and so there is one that none does.
        self.module.register_parameter("unused", nn.Parameter(next(energy.parameters()).new_zeros(1)))
        self._average(self.module)

    def _average(self, module: nn.Module) -> None:
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():
            # The option's new name is not in all versions of torch that are supported.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self.module = DistributedDataParallel(
                module, broadcast_buffers=False, find_unused_parameters=True, init_sync=False
            )

    def forget(self) -> None:
        """Take back a loss that will have no gradient, for which the engines wait; all processes do so together."""
        if self.sharded:
            for parameter in self.places:
                self._held(parameter).grad = None
            self.module.reshard()
        elif world().size > 1:
            module, self.module = self.module.module, None
            self._average(module)

    def loss(self, place: int, batch: Batch, rng: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and metrics of a lane, by its place among this process's."""
        found = self.module(place, batch, rng)
        if (error := self.inner.error) is not None:
            self.inner.error = None
            raise error
        return found

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Leave out what torch says of the layout of gradients of thin layers, which costs nothing here."""
        if world().size == 1:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Hold back the exchange of gradients until the last lane; of shards they add up in the shards."""
        if world().size > 1 and not self.sharded and not last:
            return self.module.no_sync()
        return nullcontext()

    def local(self, parameter: Tensor) -> Tensor:
        """What this process holds of a parameter: a plain tensor, which changes with it."""
        held = self._held(parameter)
        return held.to_local().detach() if held is not parameter else parameter

    def placed(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Say of what belongs to a parameter, and is held like it, that it is this process's shard."""
        held = self._held(parameter)
        if held is parameter or value.ndim == 0:
            return value
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value.detach(), held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
        )

    def own(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Take this process's shard of what belongs to a parameter, whole or in shards as it may come."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        held = self._held(parameter)
        if isinstance(value, DTensor):
            return value.to_local()
        if held is parameter or value.ndim == 0:
            return value
        return distribute_tensor(value.to(held.to_local().device), held.device_mesh, held.placements).to_local()

    def collect(self, originals: list[Tensor], params: list[Tensor]) -> None:
        """Bring the gradients to what the optimiser moves."""
        if not self.sharded:
            return
        self.module.changes = [1] * len(self.places)
        for original, p in zip(originals, params):
            held = self._held(original)
            if held is not original:
                p.grad = None if held.grad is None else held.grad.to_local()
                held.grad = None
            elif p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world().size

    def norm(self, params: list[Tensor]) -> Tensor:
        """Length of the gradient, over all that processes hold of it."""
        grads = [p.grad for p in params if p.grad is not None]
        if not self.sharded:
            return torch.nn.utils.get_total_norm(grads)
        alone = {id(p) for p in self.alone}
        parts = [p.grad.square().sum() for p in params if p.grad is not None and id(p) not in alone]
        squares = torch.stack(parts).sum() if parts else params[0].new_zeros(())
        dist.all_reduce(squares)
        return (squares + sum(p.grad.square().sum() for p in params if p.grad is not None and id(p) in alone)).sqrt()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all weights in every process meanwhile, to be looked at."""
        if not self.sharded:
            yield
            return
        self.module.unshard()
        try:
            yield
        finally:
            self.module.reshard()

    @torch.no_grad()
    def join(self) -> None:
        """Give the modules their plain parameters back, with the present values; the engine is of no more use."""
        if not self.sharded:
            return
        from torch.distributed.tensor import DTensor

        for parameter, places in self.places.items():
            held = self._held(parameter)
            if isinstance(held, DTensor):
                parameter.data = held.full_tensor().detach().clone()
            for module, name in places:
                module._parameters[name] = parameter
        for module, hooks in self.hooks.items():
            vars(module).update(hooks)
        self.sharded = False

    def _held(self, parameter: Tensor) -> Any:
        """What stands in a parameter's place."""
        module, name = self.places[cast(nn.Parameter, parameter)][0] if self.sharded else (None, "")
        return parameter if module is None else module._parameters[name]

    def _shard(self, energy: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        require_shards(self.module)
        self.inner.divided = True
        for module in self.module.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    self.places.setdefault(p, []).append((module, name))
        # A single number cannot be divided: each process has it, and its gradient is averaged by hand.
        self.alone = [p for p in self.places if p.ndim == 0]
        # Left behind in every module, these hooks would hold on to the engine.
        self.hooks = {m: {name: vars(m)[name].copy() for name in _HOOKS} for m in energy.modules()}
        mesh = init_device_mesh(next(energy.parameters()).device.type, (world().size,))
        self.module.changes = [p._version for p in self.module.parameters()]
        fully_shard(self.module, mesh=mesh, ignored_params=set(self.alone))
        for p in self.places:
            if self._held(p) is not p:
                p.data = p.data.new_empty(0)


def require_shards(module: nn.Module) -> None:
    """Refuse what writes to weights that a process holds only a shard of.

    Raises
    ------
    OptionError
        Naming the objective.
    """
    for part in module.modules():
        if isinstance(part, Settling) and part.moves:
            raise OptionError(
                f"{type(part).__name__} rewrites biases as offsets move, between the losses, when each process holds a "
                "shard of them only; train it with sharding='none'."
            )
        if isinstance(part, FastWeights):
            raise OptionError(
                "Fast weights are laid on all weights at once, of which each process holds a shard only; train with "
                "sharding='none', or fast_rate=0."
            )
