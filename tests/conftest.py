"""Being here, this file puts the folder of tests on the path, so that `contracts` can be imported from every room."""

import signal

import pytest


@pytest.fixture
def graphs(monkeypatch):
    """Run traces as they are; return a function that counts the graphs made since it was last called."""
    made = []

    def compile(graph, inputs, options):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile", compile)
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 4)
    monkeypatch.setattr("gibbsian.replaying._PASSED", 0)

    def new():
        count = len(made)
        made.clear()
        return count

    return new


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Let tests of Ctrl-C find Python's own handler, also in a job of the background, which begins without one."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
