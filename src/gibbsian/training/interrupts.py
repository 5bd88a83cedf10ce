"""Signals while training: what asks the loop to stop after the step and save."""

from __future__ import annotations

import os
import signal
import threading


class Interrupts:
    """Ctrl-C while training: the first asks the loop to stop after the step, the second stops at once.

    Only where Python's own handler is in force, in the main thread: an application's handler is left alone.
    """

    def __init__(self) -> None:
        self.asked = False
        self.installed = False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)
            self.installed = True
        return self

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nStopping after this step and saving; Ctrl-C again stops at once.\n")

    def __exit__(self, *_: object) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
