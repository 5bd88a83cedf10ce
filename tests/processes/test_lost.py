"""Processes that die, hang, or do not find each other: the others end soon, with one clear line."""

import multiprocessing
import os
import re
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from gibbsian.errors import OptionError, ProcessError
from gibbsian.processes import World, join_processes, lost, watching, world
from gibbsian.processes.lost import Peer, _self, gone, is_lost
from spawned import free_port


def work(rank, size, port, victim, how, seconds, told):
    """Sum in a loop; the victim falls out of it."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    began = time.monotonic()
    try:
        with watching("Start it again."):
            for step in range(10_000):
                if step == 20 and rank == victim:
                    began = time.monotonic()
                    os.kill(os.getpid(), how)
                dist.all_reduce(torch.ones(100))
    except ProcessError as error:
        told.put((rank, str(error), not error.speaks, time.monotonic() - began))
    os._exit(1)


def fallen(size, victim, how=signal.SIGKILL, seconds=30.0):
    """What the others say of it, by rank."""
    context = multiprocessing.get_context("fork")
    told, port = context.SimpleQueue(), free_port()
    started = [context.Process(target=work, args=(r, size, port, victim, how, seconds, told)) for r in range(size)]
    for process in started:
        process.start()
    found = [told.get() for _ in range(size - 1)]
    for process in started:
        process.kill()
        process.join()
    return {rank: (message, elsewhere) for rank, message, elsewhere, _ in found}, max(each[3] for each in found)


def test_a_process_that_is_lost_as_work_begins_is_told(monkeypatch):
    def reset(value):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer")

    monkeypatch.setattr(lost, "world", lambda: World(0, 2))
    monkeypatch.setattr(lost, "gathered_objects", reset)
    with pytest.raises(ProcessError, match=r"lost as the work began.*Start it again"), watching("Start it again."):
        pass


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_once_and_at_once(victim):
    found, seconds = fallen(2, victim)
    other = 1 - victim
    message = f"Rank {victim} of 2 was lost (killed, out of memory, or ended by an error of its own). Start it again."
    assert found == {other: (message, False)}
    assert seconds < 20


def test_one_of_those_left_speaks():
    found, _ = fallen(4, 2)
    assert found.keys() == {0, 1, 3}
    assert found[0] == (found[0][0], False)
    assert all(elsewhere for rank, (_, elsewhere) in found.items() if rank != 0)
    assert all("Rank 2" in message or re.search(r"Rank [\d and]+2", message) for message, _ in found.values())


def test_one_that_hangs_is_named_after_the_timeout():
    found, seconds = fallen(2, 1, signal.SIGSTOP, seconds=3.0)
    assert found[0][0].startswith("Rank 1 of 2 was lost")
    assert 2.5 < seconds < 20


def test_other_errors_pass_as_they_are():
    with pytest.raises(ZeroDivisionError), watching("nothing"):
        1 / 0  # noqa: B018
    assert not is_lost(RuntimeError("shapes cannot be multiplied"))
    assert is_lost(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:57247."))


def test_only_processes_of_this_machine_are_looked_after():
    here = _self()
    ended = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    ended.start()
    ended.join()
    assert gone([here, Peer(here.machine, ended.pid), Peer("elsewhere", ended.pid)]) == [1]


# Meeting.


@pytest.fixture
def launcher(monkeypatch):
    """What torchrun would have set for the first of two processes, at a free port."""
    port = free_port()
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return port


def meet(**kwargs):
    with join_processes(**kwargs):
        raise AssertionError("There is nobody to meet.")


def test_a_port_in_use_is_told(launcher):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", launcher))
        taken.listen()
        with pytest.raises(ProcessError, match=rf"Port 127\.0\.0\.1:{launcher} is in use.*--standalone"):
            meet(timeout=5)
    assert not dist.is_initialized()


def test_a_missing_backend_is_told(launcher):
    with pytest.raises(OptionError, match="no backend 'mpi'; it has gloo"):
        meet(backend="mpi")


def test_a_rank_that_is_no_number_is_told(launcher, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(OptionError, match=r"whole numbers.*'first'"):
        meet()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_others_that_do_not_come_are_told(launcher, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ProcessError, match=f"Process {rank} of 2 did not find the others at 127.0.0.1:{launcher}"):
        meet(timeout=2)
    assert world().size == 1
    assert not dist.is_initialized()
