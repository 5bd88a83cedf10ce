"""Signals while training: what asks the loop to stop after the step and save.

Ctrl-C comes from a person. SIGTERM is how schedulers, containers and service managers announce that a process will be
killed, some seconds later; SIGUSR1 is what users of Slurm ask it to send first (``--signal=USR1@60``).
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Requests to stop: the first asks the loop to stop after the step; a second Ctrl-C stops at once.

    A signal may come to one process of several; they tell each other at every step, see `gibbsian.training.votes`.
    Only where no other handler is in force, in the main thread: an application's handler is left alone. Schedulers say
    what they say more than once, so that SIGTERM again changes nothing.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number, usual in _usual().items():
                if signal.getsignal(number) is usual:
                    self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.asked == signal.SIGINT:
                raise KeyboardInterrupt
            os.write(2, b"\nStopping after this step and saving; Ctrl-C again stops at once.\n")
        self.asked = self.asked or number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()


def code_of(number: int) -> int:
    """Exit code of a process that a signal ended, as shells and schedulers write it: 128 and the signal's number."""
    return 128 + number


def _usual() -> dict[int, Any]:
    """The signals that ask to stop, and the handler of each where an application has set none."""
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGUSR1"):  # unknown to Windows
        usual[signal.SIGUSR1] = signal.SIG_DFL
    return usual
