"""The command line: from data to a trained model and a report, and what one asks of it afterwards."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import tyro

from gibbsian.commands.asking import compose, datasets, sample, score
from gibbsian.commands.making import evaluate, report, train
from gibbsian.commands.planning import plan_command
from gibbsian.errors import GibbsianError, ProcessError, TrainingInterrupted
from gibbsian.options import DataOptions, override_class, spell_out
from gibbsian.processes import World, join_processes, part

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every expected failure ends with one message and a code other than 0.

    Started by torchrun or a scheduler as one of several processes, it trains and draws together with the others; the
    first one speaks, and does alone whatever else is asked for.
    """
    warnings.showwarning = _show_warning
    try:
        # The command line trains on the processor, GPUs or not.
        with join_processes("gloo") as here, _heard(here):
            _run(sys.argv[1:] if arguments is None else list(arguments), here)
    except ProcessError as error:
        _complain(str(error))
        raise SystemExit(1) from None


def _run(arguments: list[str], here: World) -> None:
    try:
        _dispatch(arguments, here)
    except TrainingInterrupted as stopped:
        _complain(str(stopped), "stopped")
        raise SystemExit(stopped.code) from None
    except KeyboardInterrupt:
        _complain("Stopped by the user.", "stopped")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except ProcessError as error:
        # Where the first process was lost, another one speaks.
        if error.speaks is None or error.speaks:
            with redirect_stderr(sys.__stderr__ if error.speaks else sys.stderr):
                _complain(str(error))
        raise SystemExit(1) from None
    except GibbsianError as error:
        _complain(str(error))
        raise SystemExit(1) from None
    except OSError as error:
        _complain(f"{error.strerror or error}: {error.filename or ''}")
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        _complain(
            f"There is not enough memory ({error}). Use a smaller --width, --batch-size, --buffer-size or --limit."
        )
        raise SystemExit(1) from None


@contextmanager
def _heard(here: World) -> Iterator[None]:
    """Let the first process speak, and no other."""
    if here.main:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _dispatch(arguments: list[str], here: World) -> None:
    if here.size > 1 and arguments[:1] not in (["train"], ["sample"]):
        part()
        if not here.main:
            return
    if arguments[:1] == ["protein"]:
        _dispatch_protein(arguments[1:])
        return
    overrides = override_class()
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("data", Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=_DATA_HELP, metavar="DATA")]),
            (
                "out",
                Annotated[Path | None, tyro.conf.arg(help=_OUT_HELP, metavar="FOLDER", help_behavior_hint="")],
                None,
            ),
            ("seed", Annotated[int, tyro.conf.arg(help="Of weights, batches, chains and draws.")], 0),
            ("resume", Annotated[bool, tyro.conf.arg(help="Go on with the run in the folder.")], False),
            ("overwrite", Annotated[bool, tyro.conf.arg(help="Replace the run in the folder.")], False),
            ("evaluation", Annotated[bool, tyro.conf.arg(help="Evaluate the model and write the report.")], True),
            ("reading", DataOptions, dataclasses.field(default_factory=DataOptions)),
            ("overrides", overrides, dataclasses.field(default_factory=overrides)),
        ],
    )

    def train_command(options: Any) -> None:
        train(options, shlex.join([*_launcher(here), *arguments]))

    train_command.__annotations__ = {"options": Annotated[options, tyro.conf.arg(name="")], "return": None}
    train_command.__doc__ = train.__doc__
    commands = {
        "train": train_command,
        "sample": sample,
        "score": score,
        "compose": compose,
        "evaluate": evaluate,
        "report": report,
        "datasets": datasets,
        "plan": plan_command(overrides),
        "protein": protein,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="gibbsian",
        description="Energy-based models: from data to a model you can trust.",
        args=spell_out(arguments, overrides, DataOptions),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _launcher(here: World) -> list[str]:
    """Write how this was started, up to its arguments."""
    if here.size == 1:
        return ["gibbsian"]
    return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(here.size)), "-m", "gibbsian"]


def protein() -> None:
    """Molecules and protein families: gibbsian protein --help."""


def _dispatch_protein(arguments: list[str]) -> None:
    from gibbsian.commands.protein import PROTEIN_COMMANDS

    tyro.extras.subcommand_cli_from_dict(
        PROTEIN_COMMANDS,
        prog="gibbsian protein",
        description="Energy landscapes of molecules' conformations and of protein families' sequences.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


_OUT_HELP = "The run's folder; runs/NAME by default."
_DATA_HELP = (
    "A built-in name (see gibbsian datasets), a .csv, .npy, .npz or .parquet file, or a folder of images or of "
    ".parquet, .arrow or .npy files."
)


def _complain(message: str, what: str = "error") -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]{what}:[/] ", end="")
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(str(message), "warning")
