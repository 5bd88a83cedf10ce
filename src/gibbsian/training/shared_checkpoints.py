"""Checkpoints that all processes of a job write at once, through ``torch.distributed.checkpoint``.

One is a folder. The first process writes what all share, each process its own lanes and its own shards, everything as
tensors (see `gibbsian.training.trees`). They write into a folder beside, which gets its name in one move once all have
finished and what they wrote is noted in ``manifest.json``: files, sizes, SHA-256, lanes. So under a final name there is
a whole checkpoint, and damage shows, which the library does not look for.

The library pickles the table of contents. It is read with an unpickler that knows the few plain classes it is made of
and nothing else, and entries that would be unpickled in turn are refused: reading a checkpoint runs no code.

To be imported where it is used only: the library takes more than a second to import.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from gibbsian.files import flush_folder, replace_file
from gibbsian.training.state import FORMAT, State
from gibbsian.training.trees import packed, small_of, tensor_names, unpacked

MANIFEST, CONTENTS = "manifest.json", ".metadata"
SHARED = "shared"
ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""What torch warns of where there is one process, which is as it should be."""

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    (_METADATA, name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


def write_shared(path: Path, state: State, group: dist.ProcessGroup | None) -> None:
    """Write a checkpoint together, whole or not at all; every process calls this with its own state.

    Parameters
    ----------
    path
        Of the folder; one of this name is replaced.
    state
        What is captured; of ``state["lanes"]`` each process has its own.
    group
        Of all processes, with a backend for the CPU and used for nothing else; ``None`` where there is one.

    Raises
    ------
    OSError
        On every process, if any of them could not write.
    """
    rank = 0 if group is None else dist.get_rank(group)
    partial = path.with_name(f"{path.name}.partial")
    flat: dict[str, Tensor] = {}

    def prepare() -> None:
        if rank == 0:
            _empty(partial)
        flat.update(_flat(state, rank == 0))

    _together(prepare, group)
    if group is None:
        # For good: to do so for a while would, on a thread, take back what others filter meanwhile.
        warnings.filterwarnings("ignore", ALONE)
    try:
        dcp.save(flat, storage_writer=dcp.FileSystemWriter(partial), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise OSError(_told({r: failed for r, (failed, _) in error.failures.items()})) from error
    lanes = sorted(state.get("lanes", {}))
    written = _together(lambda: (lanes, _marks(partial, rank)), group)
    _together(lambda: _name(path, partial, state["step"], written) if rank == 0 else None, group)


def read_shared(
    path: Path,
    lanes: Collection[int] | None = None,
    *,
    only: Collection[str] = (),
    like: State | None = None,
    place: tuple[int, int] = (0, 1),
) -> State:
    """Read a checkpoint, by any number of processes.

    Parameters
    ----------
    path
        Of the folder.
    lanes
        Those asked for; all that there are when left out.
    only
        Entries of the shared part that are asked for; all when left out.
    like
        A state whose sharded tensors tell which shards this process has; without it tensors come whole.
    place
        This process's rank and their number: each looks at its share of the files.

    Raises
    ------
    OSError, ValueError, RuntimeError, UnpicklingError
        If it is not whole, or not a checkpoint.
    """
    manifest = read_manifest(path)
    _verify(path, manifest["files"], place)
    saved = _Contents(path, manifest["files"])
    wanted = manifest["lanes"] if lanes is None else sorted(lanes)
    if missing := set(wanted) - set(manifest["lanes"]):
        raise ValueError(f"it lacks lane {', '.join(map(str, sorted(missing)))}")
    names = [SHARED, *(f"lanes/{lane}" for lane in wanted)]
    trees = saved.load([*names, *map(small_of, names)])
    sharded = {} if like is None else {k: t for k, t in _flat(like, True).items() if isinstance(t, DTensor)}
    inner = [name for tree in names for name in tensor_names(trees[tree]) if _asked(name, only)]
    # What is not asked for is left empty, where the tree is put together.
    tensors = _Partly(trees | saved.load(inner, sharded))
    state = unpacked(SHARED, tensors)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"it is no checkpoint of format {FORMAT}")
    if manifest["lanes"]:
        state["lanes"] = {lane: unpacked(f"lanes/{lane}", tensors) for lane in wanted}
    return state


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself.

    Raises
    ------
    OSError, ValueError
        If it cannot be read.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or not {"format", "files", "lanes"} <= manifest.keys():
        raise ValueError(f"{MANIFEST} is no list of what a checkpoint holds")
    return manifest


def remove(path: Path) -> None:
    """Remove a checkpoint; half-way it has no checkpoint's name."""
    leaving = path.with_name(f"{path.name}.leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.replace(path, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


class _Contents(dcp.FileSystemReader):
    """A checkpoint's table of contents, and what it tells the place of."""

    def __init__(self, path: Path, files: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.folder = path
        self.contents = self.read_metadata()
        for where in (self.contents.storage_data or {}).values():
            if where.relative_path not in files:
                raise ValueError(f"it refers to {where.relative_path}, which is no part of it")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read it without running code."""
        with open(self.folder / CONTENTS, "rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"{CONTENTS} is no table of contents")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def load(self, names: Collection[str], sharded: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
        """Read tensors by name; whole ones, but for those whose sharded likes are given."""
        into: dict[str, Any] = {}
        for name in names:
            told = self.contents.state_dict_metadata.get(name)
            # An entry of bytes would be unpickled.
            if not isinstance(told, TensorStorageMetadata):
                raise ValueError(f"it lacks {name}")
            whole = name not in sharded
            into[name] = torch.empty(told.size, dtype=told.properties.dtype) if whole else _blank(sharded[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ALONE)
            try:
                dcp.load(into, storage_reader=self, no_dist=True)
            except CheckpointException as error:
                raise ValueError(_told({r: failed for r, (failed, _) in error.failures.items()})) from error
        return into


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a table of contents, and no others."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if is_dtype or (module_name, global_name) in _KNOWN:
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"{CONTENTS} names {module_name}.{global_name}, which is no part of a checkpoint")


class _Partly(dict[str, Tensor]):
    """Tensors by name; an empty one for what was not read."""

    def __missing__(self, name: str) -> Tensor:
        return torch.empty(0)


def _asked(name: str, only: Collection[str]) -> bool:
    return not only or any(name.startswith(f"{SHARED}/{entry}/") for entry in only)


def _blank(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")


def _flat(state: State, main: bool) -> dict[str, Tensor]:
    """Name the tensors that this process writes: those that all share are the first one's, but for their shards."""
    shared = packed({k: v for k, v in state.items() if k != "lanes"}, SHARED)
    flat = {name: t for name, t in shared.items() if main or isinstance(t, DTensor)}
    for lane, own in state.get("lanes", {}).items():
        flat |= packed(own, f"lanes/{lane}")
    return flat


def _empty(folder: Path) -> None:
    # What is there was left by a process that was killed while it wrote.
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _marks(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Size and checksum of the files that this process wrote."""
    own = [*folder.glob(f"__{rank}_*.distcp"), *([folder / CONTENTS] if rank == 0 else [])]
    return {path.name: (path.stat().st_size, _digest(path)) for path in own}


def _name(path: Path, partial: Path, step: int, written: list[tuple[list[int], dict[str, tuple[int, str]]]]) -> None:
    """Note what was written, and give the folder its name."""
    files = {name: mark for _, marks in written for name, mark in marks.items()}
    for name, (size, _) in files.items():
        if not (partial / name).exists() or (partial / name).stat().st_size != size:
            raise OSError(f"{name} is not seen whole by the first process: the folder has to be one that all share")
    manifest = {
        "format": FORMAT,
        "step": step,
        "processes": len(written),
        "lanes": sorted(lane for lanes, _ in written for lane in lanes),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
    }
    replace_file(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    flush_folder(partial)
    if path.exists():
        remove(path)
    os.replace(partial, path)
    flush_folder(path.parent)


def _verify(path: Path, files: Mapping[str, Any], place: tuple[int, int]) -> None:
    rank, size = place
    for i, (name, mark) in enumerate(files.items()):
        if not (path / name).exists():
            raise ValueError(f"{name} is missing")
        if (found := (path / name).stat().st_size) != mark["bytes"]:
            raise ValueError(f"{name} has {found} of {mark['bytes']} bytes")
        if i % size == rank and _digest(path / name) != mark["sha256"]:
            raise ValueError(f"the checksum of {name} is wrong")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _together(work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Do something on every process, and fail on all of them where it failed on one; what each returned, by rank."""
    try:
        done: tuple[bool, Any] = (True, work())
    except Exception as error:  # told to all: the others would wait for a process that went its own way
        done = (False, str(error))
    if group is None:
        told = [done]
    else:
        told = [done] * dist.get_world_size(group)
        dist.all_gather_object(told, done, group=group)
    failed = {rank: value for rank, (well, value) in enumerate(told) if not well}
    if failed:
        raise OSError(_told(failed))
    return [value for _, value in told]


def _told(failed: Mapping[int, Any]) -> str:
    rank, error = next(iter(failed.items()))
    reason = (str(error).strip().splitlines() or [repr(error)])[-1]
    return reason if rank == 0 else f"rank {rank}: {reason}"
