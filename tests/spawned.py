"""Run a function of a test module in several processes, joined over gloo, and bring back what each returned."""

import socket
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank, size, port, fn, args, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    # Or one that ends at once would leave while the others still look for it.
    dist.barrier()
    try:
        found = ("value", fn(*args))
    except Exception as error:
        found = ("error", (type(error).__name__, str(error), traceback.format_exc()))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def run_in(size, fn, *args, errors=False):
    """What ``fn(*args)`` returned in each of ``size`` processes; 1 runs here, without a process group.

    ``fn`` is a function at the top of a module that can be imported. With ``errors`` the names and messages of the
    exceptions are returned instead, and there has to be one everywhere.
    """
    if size == 1 and not errors:
        return [fn(*args)]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (size, free_port(), fn, args, folder), nprocs=size, start_method="fork")
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
    wanted = "error" if errors else "value"
    for rank, (kind, value) in enumerate(found):
        assert kind == wanted, f"rank {rank}: {value[2] if kind == 'error' else value}"
    return [value[:2] if errors else value for _, value in found]
