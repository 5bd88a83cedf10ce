"""NUTS: exact, the same tree as a plain recursion builds, turns where it should, and the faults that these expose."""

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
from gibbsian.kernels import nuts
from gibbsian.kernels.base import evaluate
from gibbsian.kernels.nuts import NUTS, at, splitmix, uniform
from gibbsian.kernels.scales import stretch, stretch_gradient
from kernels.test_compiled import needs_compiler

DIAGONAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
KERNELS = (NUTS(0.12, max_depth=6), NUTS(0.35, max_depth=5), NUTS(0.9), NUTS(1.4), NUTS(0.5, max_depth=2))


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_nuts_leaves_the_target_invariant(kernel, target):
    assert_invariant(kernel, target)


@pytest.mark.parametrize("scale", [DIAGONAL, FACTOR], ids=["diagonal", "factor"])
def test_a_scale_keeps_nuts_exact(scale):
    for target in TARGETS[:2]:
        assert_invariant(NUTS(0.6, scale=scale), target)


def test_nuts_keeps_the_contracts():
    target, kernel = log_exponential(), NUTS(0.2)
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
            forwards = int(splitmix(at(key, depth))) < 0
            part = self.build(tree[-1] if forwards else tree[0], 1.0 if forwards else -1.0, depth)
            if part is None:
                break
            size = min(8, len(part))
            held, weight = None, -math.inf
            for i in range(0, len(part), size):
                block, place = part[i : i + size], 128 + 2 * (depth - 3 if depth < 3 else number)
                number += depth >= 3
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
            if self.turns(tree):
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
        if near is None or far is None or self.turns(near + far):
            return None
        return near + far

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
    monkeypatch.setattr(nuts, "check_passed", lambda tree, part, corner: tree)
    with pytest.raises(AssertionError):
        assert_built_as_by_recursion(NUTS(0.03, max_depth=7), TARGETS[0])


def fault(monkeypatch, name):
    """Break the sampler in one place."""
    real_uniform, real_turns, real_inner = nuts.uniform, nuts.turns, nuts._inner
    faults = {
        "leaves drawn without weights": (
            "draw_leaf",
            lambda log_w, u: ((u * len(log_w)).long(), torch.logsumexp(log_w, 0)),
        ),
        "the last leaf": ("draw_leaf", lambda log_w, u: (torch.full_like(u, len(log_w) - 1).long(), log_w.logsumexp(0))),
        "new parts always accepted": (
            "uniform",
            lambda keys, place, like: real_uniform(keys, place, like) * (0 if 64 <= place < 96 else 1),
        ),
        "kinetic energy with the wrong sign in the weights": (
            "_inner",
            lambda a, b, lead=1: real_inner(a, b, lead) * (-1 if a is b else 1),
        ),
        "no turns looked for within new parts": (
            "turns",
            lambda v, w, way, lead=1: torch.zeros_like(real_turns(v, w, way, lead)) if lead == 2 else real_turns(v, w, way),
        ),
    }
    monkeypatch.setattr(nuts, *faults[name])


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize(
    ("name", "h"),
    [
        ("leaves drawn without weights", 1.2),
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
