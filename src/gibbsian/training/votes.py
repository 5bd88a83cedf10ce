"""What the processes of a run tell each other: that they were given the same, and at every step that all goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from gibbsian.errors import DomainError
from gibbsian.processes import agree, raise_together, world
from gibbsian.training.feed import brief
from gibbsian.training.settings import TrainingSettings


@dataclass(frozen=True)
class Told:
    """What at least one process said of a step.

    Attributes
    ----------
    asked
        The signal by which the run is to stop after it; 0 for none.
    broken
        Chains stand where the energy has no finite value, so that there is no gradient.
    """

    asked: int
    broken: bool


class Votes:
    """The exchange of every step, over a group of its own on the host, so that no process waits for its device."""

    def __init__(self) -> None:
        self.group = None
        if world().size > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")

    def exchange(self, asked: int, error: Exception | None, first: bool) -> Told:
        """Tell the others how this process fared, before gradients are exchanged; with one process nothing is sent.

        Parameters
        ----------
        asked
            The signal by which this process was asked to stop; 0 for none.
        error
            What ended its step, if anything did.
        first
            Whether it is the run's first step, when a `DomainError` is one of the arguments.

        Raises
        ------
        Exception
            What ended this process's step.
        ProcessError
            If that of another one ended.
        """
        broken = isinstance(error, DomainError) and not first
        failed = error is not None and not broken
        if world().size > 1:
            told = torch.tensor([asked, broken, failed], dtype=torch.int32)
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
            asked, broken, anywhere = int(told[0]), bool(told[1]), bool(told[2])
            if anywhere:
                raise_together(error if failed else None)
        if failed and error is not None:
            raise error
        return Told(asked, broken)


def require_alike(marks: dict[str, str], rng: Generator) -> None:
    """Refuse processes that were given different things.

    Parameters
    ----------
    marks
        What the run is of.
    rng
        The caller's generator, which must stand alike everywhere.

    Raises
    ------
    ProcessError
        On every process, naming what differs.
    """
    state = hashlib.sha256(rng.get_state().cpu().numpy().tobytes()).hexdigest()[:16]
    agree({"gibbsian": code_version(), "torch": torch.__version__}, "versions of the code")
    agree(marks | {"rng": f"#{state}"}, "data, energies, objectives or settings")


def extra_marks(
    energy: nn.Module, objective: nn.Module, settings: TrainingSettings, folder: Path | None, resume: bool
) -> dict[str, str]:
    """Describe what resumed runs may change and processes may not: shapes of buffers, all settings, the folder."""
    marks = {f"settings.{name}": repr(value) for name, value in dataclasses.asdict(settings).items()}
    marks |= {"folder": str(folder), "resume": str(resume)}
    for owner, module in (("energy", energy), ("objective", objective)):
        marks |= {f"{owner}.{name}": brief(b) for name, b in module.named_buffers()}
    return marks


def code_version() -> str:
    """Write a checksum of the package's source."""
    whole = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"source #{whole.hexdigest()[:16]}"


@torch.no_grad()
def share_start(*modules: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            from_main(tensor)


def from_main(tensor: Tensor) -> None:
    """Overwrite a tensor with the first process's."""
    plain = tensor.detach().contiguous()
    sent = plain.to(torch.uint8) if plain.dtype == torch.bool else plain
    dist.broadcast(sent, 0)
    if sent.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(sent)
