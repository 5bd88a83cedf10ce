"""NUTS: exact, the same tree as a plain recursion builds, turns where it should, and the faults that these expose."""

import itertools
import math

import pytest
import torch

import gibbsian as gb
from contracts import (
    TARGETS,
    assert_continues,
    assert_flat_memory,
    assert_invariant,
    assert_leaves_inputs_alone,
    assert_state_is_current,
    log_exponential,
    seeded,
)
from gibbsian.adaptation import tune
from gibbsian.compilation import wanting
from gibbsian.diagnostics.chains import chain_mean, effective_sample_size
from gibbsian.energies.targets import Funnel
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError
from gibbsian.kernels import nuts, trees
from gibbsian.kernels.base import evaluate
from gibbsian.kernels.normals import uniform, word
from gibbsian.kernels.nuts import NUTS
from gibbsian.kernels.scales import stretch, stretch_gradient
from kernels.test_compiled import needs_compiler
from kernels.test_nonfinite import wall

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
KERNELS = (
    NUTS(0.12, max_depth=6),
    NUTS(0.35, max_depth=5),
    NUTS(0.9, max_depth=4),
    NUTS(1.4, max_depth=4),
    NUTS(0.5, 2),
)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_nuts_leaves_the_target_invariant(kernel, target):
    assert_invariant(kernel, target)


@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
def test_a_scale_keeps_nuts_exact(scale):
    for target in TARGETS[:2]:
        assert_invariant(NUTS(0.6, max_depth=4, scale=scale), target)


def test_nuts_keeps_the_contracts():
    target, kernel = log_exponential(), NUTS(0.4, max_depth=4)
    start = target.draw(6, seeded())
    assert_continues(kernel, target.energy, start)
    assert_state_is_current(kernel, target.energy, start)
    assert_leaves_inputs_alone(kernel, target.energy, start)
    assert_flat_memory(kernel, target.energy, start)


class Recursion:
    """NUTS for one chain, by recursion over halves, with the numbers of one step of the kernel."""

    def __init__(self, energy, kernel, x, v, key):
        self.energy, self.kernel, self.key = energy, kernel, key
        self.acceptance, self.leaves, self.diverging = 0.0, 0, False
        value, grad = evaluate(energy, x)
        self.start = float(value + 0.5 * v.square().sum())
        tree = [(x, v, grad, 0.0)]
        drawn, depth, number = x, 0, 0
        for depth in range(kernel.max_depth):
            forwards = int(word(key, depth)) < 0
            part = self.build(tree[-1] if forwards else tree[0], 1.0 if forwards else -1.0, depth)
            if part is None:
                break
            size = 4 if depth >= 2 else 1
            held, weight = None, -math.inf
            for i in range(0, len(part), size):
                block, place = part[i : i + size], 128 + 2 * number
                number += 1
                total = self.total(block)
                u, below = self.uniform(place), 0.0
                for leaf in block:
                    below += math.exp(leaf[3] - total)
                    if below > u:
                        break
                weight = self.total([(0, 0, 0, weight), (0, 0, 0, total)])
                if self.uniform(place + 1) < math.exp(total - weight):
                    held = leaf[0]
            if self.uniform(64 + depth) < math.exp(weight - self.total(tree)):
                drawn = held
            tree = tree + part if forwards else part[::-1] + tree
            depth += 1
            if self.bends(*((tree[: -len(part)], part) if forwards else (part[::-1], tree[len(part) :]))):
                break
        else:
            depth = kernel.max_depth
        self.x, self.depth = drawn, int(math.log2(len(tree)))

    def build(self, end, sign, depth):
        """Leaves in the order in which they are made; None when they turn or diverge."""
        if depth == 0:
            h, scale = sign * self.kernel.step_size, self.kernel.scale
            x, v, grad, _ = end
            half = v - 0.5 * h * stretch_gradient(scale, grad)
            x = x + stretch(scale, h * half)
            value, grad = evaluate(self.energy, x)
            v = half - 0.5 * h * stretch_gradient(scale, grad)
            gain = self.start - float(value + 0.5 * v.square().sum())
            self.leaves += 1
            self.acceptance += math.exp(min(0.0, gain)) if math.isfinite(gain) else 0.0
            if not -1000.0 < gain < math.inf:
                self.diverging = True
                return None
            return [(x, v, grad, gain)]
        near = self.build(end, sign, depth - 1)
        far = None if near is None else self.build(near[-1], sign, depth - 1)
        if near is None or far is None or self.bends(near, far):
            return None
        return near + far

    def bends(self, one, other):
        """Two halves in order: the whole turns, or one half with the first point of the other."""
        return self.turns(one + other) or self.turns(one + other[:1]) or self.turns(one[-1:] + other)

    @staticmethod
    def turns(tree):
        """Whether the way, half of each end's momentum and the whole of all others, points against either end."""
        v = [leaf[1] for leaf in tree]
        way = 0.5 * v[0] + sum(v[1:-1]) + 0.5 * v[-1]
        return not (float((way * v[0]).sum()) > 0 and float((way * v[-1]).sum()) > 0)

    @staticmethod
    def total(leaves):
        return float(torch.logsumexp(torch.tensor([leaf[3] for leaf in leaves], dtype=torch.float64), 0))

    def uniform(self, place):
        return float(uniform(self.key, place, torch.zeros(1, dtype=torch.float64)))


def assert_built_as_by_recursion(kernel, target, chains=40):
    start = target.draw(chains, seeded(1))
    state = kernel.init(target.energy, start)
    v, keys = (z[0] for z in kernel.noise(state, 1, seeded(2)))
    new, info = kernel.step(target.energy, state, (v, keys))
    deepest = 0
    for i in range(chains):
        plain = Recursion(target.energy, kernel, start[i : i + 1], v[i : i + 1], keys[i : i + 1])
        assert int(info.details["depth"][i]) == plain.depth
        assert int(info.details["leapfrog_steps"][i]) == plain.leaves
        assert bool(info.details["diverging"][i]) == plain.diverging
        assert abs(float(info.acceptance[i]) - plain.acceptance / plain.leaves) < 1e-10
        torch.testing.assert_close(new.x[i : i + 1], plain.x, rtol=0, atol=1e-9)
        deepest = max(deepest, plain.depth)
    return deepest


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize(("h", "scale"), [(0.03, None), (0.3, None), (1.3, None), (0.1, DIAGONAL), (0.1, FACTOR)])
def test_trees_are_those_of_the_recursion(target, h, scale):
    if scale is not None and len(target.draw(1, seeded())[0]) == 1:
        scale = scale.reshape(-1)[:1]
    deepest = assert_built_as_by_recursion(NUTS(h, max_depth=7, scale=scale), target)
    assert deepest >= {0.03: 6, 0.3: 3, 1.3: 1, 0.1: 4}[h]


def test_the_recursion_exposes_a_tree_that_checks_no_large_subtrees(monkeypatch):
    monkeypatch.setattr(nuts, "check_passed", lambda pace, *corners: (pace, pace.active.any()))
    with pytest.raises(AssertionError):
        assert_built_as_by_recursion(NUTS(0.03, max_depth=7), TARGETS[0])


def fault(monkeypatch, name):
    """Break the sampler in one place."""
    real_uniform, real_kinetic = trees.uniform, trees.kinetic
    faults = {
        "all leaves weigh the same": (
            "draw_leaf",
            lambda log_w, u: ((u * len(log_w)).long(), torch.full_like(u, math.log(len(log_w)))),
        ),
        "the last leaf": (
            "draw_leaf",
            lambda log_w, u: (torch.full_like(u, len(log_w) - 1).long(), log_w.logsumexp(0)),
        ),
        "new parts always accepted": (
            "uniform",
            lambda keys, place, like: real_uniform(keys, place, like) * (0 if 64 <= place < 96 else 1),
        ),
        "kinetic energy with the wrong sign in the weights": (
            "kinetic",
            lambda v: -real_kinetic(v),
        ),
        "no turns looked for within new parts": (
            "turned_within",
            lambda path: [None] * len(path),
        ),
    }
    monkeypatch.setattr(trees, *faults[name])


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize(
    ("name", "h"),
    [
        ("all leaves weigh the same", 1.2),
        ("the last leaf", 0.5),
        ("new parts always accepted", 1.2),
        ("kinetic energy with the wrong sign in the weights", 0.5),
        ("no turns looked for within new parts", 0.5),
    ],
)
def test_the_invariance_test_catches_broken_twins(monkeypatch, name, h, target):
    fault(monkeypatch, name)
    with pytest.raises(AssertionError, match=r"sqrt\(n\) D"):
        assert_invariant(NUTS(h, max_depth=3), target)


def assert_turns_in_half_a_period():
    """On a round Gaussian a way of less than pi does not turn, so a tree, twice that and a step, is within 2 pi + h."""
    energy = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64))
    start = energy.sample(2000, seeded())
    means = []
    for h in (0.2, 0.1, 0.05):
        kept = gb.sample(energy, NUTS(h), start, steps=1, rng=seeded(1), thin=1).kept
        way = h * (2.0 ** kept["depth"] - 1.0)
        assert 0.5 < float(way.median()) < math.pi
        assert float(way.max()) < 2 * math.pi + h, "a tree went round the circle"
        means.append(float(kept["leapfrog_steps"].mean()))
    assert all(abs(b / a - 2.0) < 0.3 for a, b in itertools.pairwise(means)), means


def test_the_number_of_leapfrog_steps_follows_the_path():
    assert_turns_in_half_a_period()
    start = torch.randn(20, 2, generator=seeded(), dtype=torch.float64)
    kept = gb.sample(gb.Gaussian(2).double(), NUTS(1e-4, max_depth=4), start, steps=2, rng=seeded(1), thin=1).kept
    assert bool((kept["depth"] == 4).all() & (kept["leapfrog_steps"] == 15).all())


def test_without_a_look_across_the_halves_trees_go_round_the_circle(monkeypatch):
    monkeypatch.setattr(trees, "bends", lambda first, left, right, last: trees.turns(first, last))
    with pytest.raises(AssertionError, match="went round"):
        assert_turns_in_half_a_period()


def test_leaves_conserve_energy_to_second_order():
    target = TARGETS[0]
    start = target.draw(2000, seeded())
    lost = []
    for h in (0.2, 0.1, 0.05, 0.025):
        # Trees of one length of time: the depth is held down where turns would end it.
        depth = round(math.log2(0.8 / h))
        lost.append(
            1.0 - float(gb.sample(target.energy, NUTS(h, depth), start, steps=1, rng=seeded(1)).acceptance.mean())
        )
    ratios = [a / b for a, b in itertools.pairwise(lost)]
    assert lost[-1] < 1e-4
    assert all(abs(math.log2(r) - 2.0) < 0.35 for r in ratios), ratios


def test_the_hamiltonian_reported_is_that_of_the_start():
    energy = gb.Gaussian(3)
    kernel, x = NUTS(0.3), torch.randn(5, 3, generator=seeded())
    state = kernel.init(energy, x)
    v, keys = (z[0] for z in kernel.noise(state, 1, seeded(1)))
    _, info = kernel.step(energy, state, (v, keys))
    torch.testing.assert_close(info.details["hamiltonian"], energy(x) + 0.5 * v.square().sum(1))


def test_divergences_are_counted_in_the_neck_of_a_funnel():
    energy = Funnel(10).double()
    neck = torch.cat(
        (torch.full((200, 1), -6.0), torch.exp(torch.tensor(-3.0)) * torch.randn(200, 9, generator=seeded())), 1
    )
    counts = [
        float(
            gb.sample(energy, NUTS(h, max_depth=5), neck.double(), steps=3, rng=seeded(1)).details["diverging"].mean()
        )
        for h in (1.0, 0.01)
    ]
    assert counts[0] > 0.5
    assert counts[1] == 0.0


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
def test_leaves_without_numbers_end_a_tree_and_are_counted(kind):
    start = torch.zeros(64, 2, dtype=torch.float64)
    out = gb.sample(wall(kind), NUTS(0.4, max_depth=4), start, steps=30, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] <= 1.0).all())
    assert float(out.nonfinite.mean()) > 3.0
    assert bool(torch.isfinite(out.acceptance).all() & torch.isfinite(out.state.energy).all())
    torch.testing.assert_close(out.details["diverging"] * 30, out.nonfinite)
    free = gb.sample(lambda x: 0.5 * x.square().sum(1), NUTS(0.4, max_depth=4), start, steps=30, rng=seeded())
    assert float(out.acceptance.mean()) < float(free.acceptance.mean())
    # The chains that never met the wall did not feel that others did.
    early = gb.sample(wall(kind), NUTS(0.4, max_depth=4), start, steps=1, rng=seeded())
    same = early.nonfinite == 0
    alone = gb.sample(lambda x: 0.5 * x.square().sum(1), NUTS(0.4, max_depth=4), start, steps=1, rng=seeded())
    assert 0 < int(same.sum()) < 64
    assert torch.equal(early.x[same], alone.x[same])


@pytest.mark.parametrize("scale", [None, FACTOR], ids=["none", "factor"])
def test_compiled_trees_are_the_eager_ones_and_no_step_size_makes_new_graphs(scale, graphs):
    energy = gb.Gaussian(covariance=torch.tensor([[1.0, 0.4], [0.4, 0.64]], dtype=torch.float64))
    start = energy.sample(5, seeded())
    kernel = NUTS(0.06, max_depth=6, scale=scale)
    eager, compiled = (
        gb.sample(energy, kernel, start, steps=6, rng=seeded(1), thin=1, compile=compile) for compile in (False, True)
    )
    # The start, one leaf, a block of leaves, the check of larger subtrees, the end of a doubling.
    assert graphs() == 5
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=0, atol=1e-11)
    for name in kernel.details:
        torch.testing.assert_close(compiled.kept[name], eager.kept[name], rtol=0, atol=1e-11)
    assert float(eager.kept["depth"].max()) >= 5
    gb.sample(energy, NUTS(0.3, max_depth=9, scale=scale), compiled.state, steps=9, rng=seeded(2), compile=True)
    assert graphs() == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chains", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inductor_builds_the_eager_trees(chains, dtype):
    energy = gb.Gaussian(loc=torch.zeros(20, dtype=dtype), scale=torch.linspace(0.5, 2.0, 20, dtype=dtype))
    start = energy.sample(chains, seeded())
    eager, compiled = (
        gb.sample(energy, NUTS(0.1), start, steps=1, rng=seeded(1), thin=1, compile=compile)
        for compile in (False, True)
    )
    close = (compiled.x - eager.x).abs().amax(1) < (1e-3 if dtype == torch.float32 else 1e-9)
    # A turn or a draw may fall the other way by rounding, in few chains and in single precision only.
    assert float(close.double().mean()) > (0.9 if dtype == torch.float32 else 0.999)


def test_leaves_of_images_come_one_by_one_and_their_trees_are_exact(graphs):
    energy = gb.Energy.of(lambda x: 0.5 * x.square().sum((1, 2, 3)), (1, 1, 2))
    kernel, start = NUTS(0.2, max_depth=5), torch.randn(4000, 1, 1, 2, generator=seeded(), dtype=torch.float64)
    out = gb.sample(energy, kernel, start, steps=1, rng=seeded(1), compile=True, thin=1)
    assert graphs() == 4  # one fewer than of vectors
    assert float(out.kept["depth"].mean()) > 2
    # Mean and mean square of exact draws; false alarms 6e-7 each.
    assert abs(float(out.x.mean())) < 5 / 8000**0.5
    assert abs(float(out.x.square().mean()) - 1) < 5 * (2 / 8000) ** 0.5


def test_events_of_several_axes_and_step_sizes_of_their_own():
    energy = gb.Energy.of(lambda x: 0.5 * x.square().sum((1, 2)), (2, 9))
    start = torch.randn(4, 2, 9, generator=seeded(), dtype=torch.float64)
    image = gb.sample(energy, NUTS(0.2), start, steps=3, rng=seeded(1))
    flat = gb.sample(lambda x: 0.5 * x.square().sum(1), NUTS(0.2), start.flatten(1), steps=3, rng=seeded(1))
    torch.testing.assert_close(image.x.flatten(1), flat.x, rtol=0, atol=1e-10)
    sizes = torch.tensor([0.1, 0.2, 0.3, 0.2], dtype=torch.float64)
    each = gb.sample(energy, NUTS(sizes), start, steps=3, rng=seeded(1))
    torch.testing.assert_close(each.x[sizes == 0.2], image.x[sizes == 0.2], rtol=0, atol=1e-12)
    assert not torch.allclose(each.x[0], image.x[0])


def test_tuning_brings_the_acceptance_of_leaves_to_its_target():
    energy = gb.Gaussian(loc=torch.zeros(10, dtype=torch.float64), scale=torch.linspace(0.5, 1.5, 10).double())
    tuned = tune(energy, NUTS(0.01, max_depth=6), energy.sample(32, seeded()), rng=seeded(), steps=60)
    assert abs(tuned.acceptance - 0.8) < 0.06
    with wanting(False):
        assert tuned.kernel.max_depth == 6


def test_places_of_a_tree_have_uniform_numbers_of_their_own():
    """Kolmogorov-Smirnov at each of many places (a false alarm in 10^7 runs), and no correlation between places."""
    keys = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=seeded())
    u = torch.stack([uniform(keys, place, keys.double()) for place in (*range(64, 74), *range(122, 152))])
    n = len(keys)
    exact = torch.arange(1, n + 1) / n
    assert float((u.sort(1).values - exact).abs().max()) * n**0.5 < 3.4
    correlation = torch.corrcoef(u) - torch.eye(len(u), dtype=u.dtype)
    assert float(correlation.abs().max()) * n**0.5 < 6.0
    single = uniform(keys, torch.tensor(130), keys.float())
    torch.testing.assert_close(single, uniform(keys, 130, keys.double()).float(), rtol=0, atol=1e-6)
    assert float(single.max()) < 1.0


@pytest.mark.slow
def test_nuts_finds_the_neck_of_a_funnel():
    """Within 4 standard errors from the chains' own ESS."""
    energy = Funnel(10).double()
    start = torch.randn(64, 10, generator=seeded(), dtype=torch.float64)
    v = gb.sample(energy, NUTS(0.05), start, steps=400, warmup=100, thin=1, rng=seeded(1)).draws[..., 0]
    assert float(effective_sample_size(v)) > 100
    for q in (-3.0, -5.0):
        mass, stderr = chain_mean((v < q).double())
        assert abs(float(mass) - 0.5 * math.erfc(-q / 3.0 / 2**0.5)) < 4 * float(stderr)


@pytest.mark.parametrize("depth", [0, -1, 25])
def test_bad_depths_are_refused(depth):
    with pytest.raises(OptionError, match=f"doublings of a trajectory, 1 to 24 .*; got {depth}"):
        NUTS(0.1, max_depth=depth)


def test_other_bad_settings_starts_and_states_are_refused():
    with pytest.raises(OptionError, match="step_size is a positive number; got -1"):
        NUTS(-1.0)
    with pytest.raises(OptionError, match=r"step_size is a positive number; got '0\.1'"):
        NUTS("0.1")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="scale is a tensor"):
        NUTS(0.1, scale=2.0)  # type: ignore[arg-type]
    with pytest.raises(DomainError, match="4 of 4 chains start"):
        gb.sample(lambda x: torch.nan * x.sum(1), NUTS(0.1), torch.zeros(4, 2), steps=1, rng=seeded())
    state = gb.kernels.base.State(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 0))
    with pytest.raises(ArgumentTypeError, match="NUTS needs gradients"):
        NUTS(0.1).noise(state, 1, seeded())
