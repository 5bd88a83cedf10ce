"""Calling graphs without Dynamo: the same results, and Dynamo's again wherever anything but tensors changes."""

import pytest
import torch
from torch import nn

import gibbsian as gb
from contracts import seeded
from gibbsian import compilation, replaying
from gibbsian.compilation import compiled
from gibbsian.replaying import Replay, in_loop, loop
from kernels.test_compiled import needs_compiler


@pytest.fixture
def asked(monkeypatch, graphs):
    """How often Dynamo was asked for each function."""
    calls = []
    real = compilation._build

    def build(fn):
        run = real(fn)

        def counted(*arguments):
            calls.append(fn.__name__)
            return run(*arguments)

        return counted

    monkeypatch.setattr(compilation, "_build", build)
    return calls


class Owner:
    """Something to keep graphs with."""


def step(state, settings, noise):
    x, origin = state
    return (x + settings[0] * noise, origin), [x * 2.0]


def run(owner, times, settings=(3.0,), shapes=((4, 2),), states=None):
    """Call a compiled function again and again; what it returned at each call, and what it should have."""
    settings, found = [torch.tensor(s) for s in settings], []
    state = states or (torch.randn(shapes[0], generator=seeded()), torch.zeros(shapes[0]))
    for i in range(times):
        noise = torch.randn(shapes[i % len(shapes)], generator=seeded(i))
        if noise.shape != state[0].shape:
            state = (torch.ones(noise.shape), torch.zeros(noise.shape))
        result = compiled(step, owner)(state, settings, noise)
        found.append((result, step(state, settings, noise)))
        state = result[0]
    return found


def assert_right(found):
    for (state, seen), (true_state, true_seen) in found:
        torch.testing.assert_close(state, true_state)
        torch.testing.assert_close(seen, true_seen)
        assert type(seen) is list


def test_two_calls_are_watched_and_further_ones_go_to_the_graph(asked):
    with loop():
        assert_right(run(Owner(), 9))
    assert len(asked) == 2
    assert_right(run(Owner(), 3))  # outside of a loop
    with loop(steady=False):
        assert_right(run(Owner(), 3))
    assert len(asked) == 8


def test_other_sizes_types_and_values_are_ways_of_their_own(asked):
    owner = Owner()
    with loop():
        assert_right(run(owner, 12, shapes=((4, 2), (3, 2))))
        x = torch.ones(4, 2, dtype=torch.float64)
        turned = torch.ones(2, 4).T
        for start in ((x, x.clone()), (turned, turned.clone())):
            assert_right(run(owner, 3, states=start))


def scaled(x, factor, energy):
    return factor * energy(x)


def test_numbers_and_objects_are_told_apart(asked):
    owner, double, triple = Owner(), nn.Linear(2, 2), nn.Linear(2, 2)
    with loop(), torch.no_grad():
        for _ in range(5):
            for factor, energy in ((2.0, double), (3.0, double), (2.0, triple)):
                x = torch.randn(4, 2, generator=seeded())
                torch.testing.assert_close(compiled(scaled, owner)(x, factor, energy), factor * energy(x))
    assert len(asked) == 6


def test_weights_that_change_in_place_are_seen_and_replaced_ones_begin_anew(asked):
    owner, energy, x = Owner(), nn.Linear(2, 2), torch.ones(4, 2)
    for _ in range(2):
        with loop(), torch.no_grad():
            for _ in range(5):
                energy.weight += 1.0
                torch.testing.assert_close(compiled(scaled, owner)(x.clone(), 2.0, energy), 2.0 * energy(x))
        energy.weight = nn.Parameter(torch.zeros(2, 2))
    assert len(asked) == 4


def twice(x, y):
    return x + 1.0, y * 2.0


def test_the_same_tensor_in_two_places_teaches_nothing(asked):
    owner = Owner()
    with loop():
        for _ in range(6):
            x = torch.ones(3)
            assert torch.equal(compiled(twice, owner)(x, x)[1], torch.full((3,), 2.0))
        assert len(asked) == 6
        for i in range(6):
            x, y = torch.ones(3), torch.full((3,), float(i))
            assert torch.equal(compiled(twice, Owner())(x, y)[1], 2.0 * y)


class Counting(nn.Module):
    """An energy that keeps a count in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1.0
        return x.square().sum(1)


def test_what_a_function_keeps_elsewhere_is_kept_at_every_call(asked):
    energy = Counting()
    gb.sample(energy, gb.RandomWalk(0.1), torch.ones(3, 2), steps=40, rng=seeded(), compile=True)
    eager = Counting()
    gb.sample(eager, gb.RandomWalk(0.1), torch.ones(3, 2), steps=40, rng=seeded())
    assert float(energy.calls) == float(eager.calls)


@pytest.mark.parametrize("kernel", [gb.ULA(0.1), gb.HMC(0.2, 2), gb.MALA(0.1), gb.NUTS(0.2)], ids=repr)
def test_chains_are_those_of_every_call_through_dynamo(kernel, graphs, monkeypatch, asked):
    energy, start = gb.MLP(2, (8, 8)).double(), torch.randn(5, 2, dtype=torch.float64, generator=seeded())
    runs = []
    for steady in (True, False):
        monkeypatch.setattr("gibbsian.sampling.loop", lambda steady=True, steady_now=steady: loop(steady_now))
        asked.clear()
        runs.append(gb.sample(energy, kernel, start, steps=64, thin=1, rng=seeded(1), compile=True))
        runs[-1].details["asked"] = torch.tensor(float(len(asked)))
    quick, plain = runs
    torch.testing.assert_close(quick.draws, plain.draws, rtol=0, atol=1e-12)
    torch.testing.assert_close(quick.acceptance, plain.acceptance, rtol=0, atol=1e-12)
    assert float(quick.details["asked"]) < 0.5 * float(plain.details["asked"])


def test_an_energy_that_a_users_function_changes_is_asked_about_again(graphs):
    class Weighted(nn.Module):
        weight = 1.0

        def forward(self, x):
            return self.weight * x.square().sum(1)

    def run(compile):
        energy = Weighted()

        def change(_):
            energy.weight += 1.0

        start = torch.ones(3, 2, dtype=torch.float64)
        return gb.sample(energy, gb.ULA(0.01), start, steps=32, rng=seeded(), compile=compile, progress=change).x

    torch.testing.assert_close(run(True), run(False))


def test_a_way_that_is_wrong_would_be_noticed(asked, monkeypatch):
    real = replaying._way
    swapped = lambda *a: (w := real(*a)) and w._replace(inputs=tuple(reversed(w.inputs)))  # noqa: E731
    monkeypatch.setattr(replaying, "_way", swapped)
    with loop(), pytest.raises(AssertionError):
        assert_right(run(Owner(), 9))


def turned(x, y):
    return x.T, x + y


@needs_compiler
@pytest.mark.parametrize(("fn", "direct"), [(twice, True), (turned, False)])
def test_a_way_leads_to_inductors_own_code_but_views_are_left_to_torch(fn, direct, monkeypatch):
    monkeypatch.setattr(replaying, "_PASSED", 0)
    owner = Owner()
    with loop():
        for i in range(6):
            x, y = torch.ones(3, 3) * i, torch.arange(9.0).reshape(3, 3)
            torch.testing.assert_close(compiled(fn, owner)(x, y), fn(x, y))
        (replay,) = [kept for kept in replaying._loop.get().values() if isinstance(kept, Replay)]
    assert [way.graph.__name__ != "listed" for way in replay.learned] == ([True] if direct else [])


def test_functions_are_learned_for_each_loop_and_calls_that_always_differ_are_not():
    def plain(x, k):
        return x + k

    assert in_loop(plain) is plain
    with loop():
        for k in range(replaying._PASSED):
            assert float(in_loop(plain)(torch.zeros(()), k)) == k
        assert in_loop(plain).watched == 0  # a short run would not get back what learning takes
        assert isinstance(in_loop(plain), Replay)
        assert in_loop(plain) is in_loop(plain)
        replay = in_loop(plain)
        for k in range(40):
            assert float(replay(torch.zeros(()), k)) == k
        assert replay.watched == replaying._WATCHED
        with loop():
            assert in_loop(plain) is not replay
