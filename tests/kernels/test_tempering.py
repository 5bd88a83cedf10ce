"""Parallel tempering: the joint law of all levels, swaps against their closed form, round trips against a slow count.

Levels of a Gaussian N(0, 1) are Gaussians of variance 1 / beta, and so are those between it and a wider one: with the
base N(0, s^2) the precision at beta is (1 - beta) / s^2 + beta. Replicas start as exact draws of their levels, and
every level must still be exact afterwards, by the Kolmogorov-Smirnov bound of `contracts` (false alarms 1 in 10^8).
"""

import dataclasses
import math

import pytest
import torch
from torch.distributions import constraints

import gibbsian as gb
from contracts import (
    KS_LIMIT,
    assert_continues,
    assert_flat_memory,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_state_is_current,
    correlated_gaussian,
    ks,
    normal_cdf,
    seeded,
    tensors_of,
)
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels.base import Info, State, is_adjusted, metropolis
from gibbsian.kernels.hmc import leapfrog
from gibbsian.kernels.ladder import ladder_of
from gibbsian.kernels.normals import normals_and_uniforms
from gibbsian.kernels.tempering import ParallelTempering, replicas_of
from gibbsian.sampling import with_tensor_settings

TARGET = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64))
BASE = gb.Gaussian(loc=torch.zeros(2, dtype=torch.float64), scale=3.0)
SCALED = ParallelTempering(gb.MALA(0.5), [1.0, 0.5, 0.2, 0.1], step_sizes=[0.5, 1.0, 2.0, 4.0])
BRIDGED = ParallelTempering(gb.HMC(0.5, leapfrog=2), [1.0, 0.4, 0.1, 0.0], base=BASE)
CHAINS = 20_000


def spreads(kernel):
    """Standard deviation of a coordinate at every level."""
    precision = kernel.betas if kernel.base is None else kernel.betas + (1.0 - kernel.betas) / 9.0
    return precision**-0.5


def exact(kernel, n, rng):
    return torch.randn((n, len(kernel.betas), 2), generator=rng, dtype=torch.float64) * spreads(kernel)[:, None]


def run_exact(kernel, steps=6, n=CHAINS, seed=1):
    rng = seeded(seed)
    own = with_tensor_settings(kernel, torch.zeros(1, dtype=torch.float64))
    start = own.init_replicas(TARGET, exact(kernel, n, rng))
    if start.momentum:
        start = start._replace(momentum=(torch.randn(start.momentum[0].shape, generator=rng, dtype=torch.float64),))
    return gb.sample(TARGET, kernel, start, steps=steps, rng=rng)


def assert_levels_are_exact(kernel):
    r = replicas_of(run_exact(kernel).state)
    for k, spread in enumerate(spreads(kernel)):
        for name, values in (("x", r.x[:, k, 0]), ("x0 + x1", r.x[:, k].sum(1) / math.sqrt(2.0))):
            distance = ks(values, lambda v, s=spread: normal_cdf(v / s))
            assert distance < KS_LIMIT, f"sqrt(n) D = {distance:.2f} for {name} at level {k}"
    # Not only each level: the radii of neighbours are independent, so their correlation has deviation 1 / sqrt(n).
    radii = r.x.norm(dim=2) / spreads(kernel)
    for k in range(len(spreads(kernel)) - 1):
        c = float(torch.corrcoef(radii[:, k : k + 2].T)[0, 1])
        assert abs(c) * math.sqrt(CHAINS) < 6.0, f"levels {k} and {k + 1} are correlated: {c:.3f}"


@pytest.mark.parametrize("kernel", [SCALED, BRIDGED], ids=["scaled", "bridged"])
def test_all_levels_together_are_invariant(kernel):
    assert_levels_are_exact(kernel)


@dataclasses.dataclass(frozen=True)
class Persistent:
    """A leapfrog step with a momentum that is only partly drawn anew, and turns back where the step is rejected."""

    gradients, domain = 1, "real"
    kept = 0.8

    def init(self, energy, x):
        return State(x, *gb.evaluate(energy, x), momentum=(torch.zeros_like(x),))

    def noise(self, state, steps, rng):
        return normals_and_uniforms(steps, state.x, rng)

    def step(self, energy, state, noise):
        v = self.kept * state.momentum[0] + math.sqrt(1.0 - self.kept**2) * noise[0]
        new, v_new = leapfrog(energy, state, v, 0.7, 1)
        log_ratio = state.energy - new.energy + 0.5 * (v.square().sum(1) - v_new.square().sum(1))
        kept, info = metropolis(state, new, log_ratio, noise[1])
        accepted = (kept.x != state.x).any(1, keepdim=True)
        return kept._replace(momentum=(torch.where(accepted, v_new, -v),)), info


@pytest.mark.parametrize(("last", "base"), [(0.1, None), (0.0, BASE)])
def test_momenta_stay_at_their_levels(last, base):
    kernel = ParallelTempering(Persistent(), [1.0, 0.5, 0.2, last], base=base)
    assert_levels_are_exact(kernel)
    assert_continues(kernel, TARGET, TARGET.sample(4, seeded()))


class WrongSign(ParallelTempering):
    def _order(self, r, uniform):
        return super()._order(r._replace(energy=-r.energy, base=tuple(-b for b in r.base)), uniform)


class StaleEnergies(ParallelTempering):
    """Points swap, and what is known of them stays."""

    def step(self, energy, state, noise):
        new, info = super().step(energy, state, noise)
        before, r = replicas_of(state), replicas_of(new)
        there = dataclasses.replace(self, betas=self.betas)
        moved = there._untempered(energy, before, there._rows(state), self._unswapped(energy, state, noise))
        told = r._replace(energy=moved.energy, grad=moved.grad)
        return new._replace(energy=told.energy[:, 0], grad=told.grad[:, 0], memory=(*told[:8], *told.base)), info

    def _unswapped(self, energy, state, noise):
        return self.kernel.step(self._tempered(energy, len(state.x)), self._rows(state), noise[:-1])[0]


class AnyLevel(ParallelTempering):
    """The gap between temperatures is left out of the ratio."""

    def _order(self, r, uniform):
        gaps = self.betas[:-1] - self.betas[1:]
        difference = r.energy[:, :-1] - r.energy[:, 1:]
        assert len(gaps) == 3
        cumulative = torch.cat((torch.zeros_like(r.energy[:, :1]), -(difference / gaps).cumsum(1)), 1)
        return super()._order(r._replace(energy=cumulative), uniform)


@pytest.mark.parametrize("broken", [WrongSign, StaleEnergies, AnyLevel])
def test_broken_swaps_are_caught(broken):
    with pytest.raises(AssertionError, match=r"at level|are correlated"):
        assert_levels_are_exact(broken(SCALED.kernel, SCALED.betas))


@pytest.mark.parametrize("kernel", [SCALED, BRIDGED], ids=["scaled", "bridged"])
def test_everything_that_is_carried_belongs_to_its_point(kernel):
    state = run_exact(kernel, steps=9, n=50).state
    r = replicas_of(state)
    for known, energy in (((r.energy, r.grad), TARGET), (r.base, kernel.base)):
        if known:
            value, grad = gb.evaluate(energy, r.x.flatten(0, 1))
            torch.testing.assert_close(known[0].flatten(), value, rtol=0, atol=1e-11)
            torch.testing.assert_close(known[1].flatten(0, 1), grad, rtol=0, atol=1e-11)
    assert torch.equal(state.x, r.x[:, 0])


def test_swaps_are_accepted_as_often_as_theory_says():
    """Energies of planar Gaussians are exponential: for a = beta_j / beta_i the mean acceptance is 2 a / (1 + a).

    Inner moves are so small that levels stay exact draws. Bound of 5.5 standard errors: false alarms below 1e-7.
    """
    for betas in ([1.0, 0.5], [1.0, 0.1]):
        out = run_exact(ParallelTempering(gb.MALA(1e-3), betas), steps=1, n=50_000)
        s = out.details["swap_acceptance"]
        expected = 2.0 * betas[1] / (1.0 + betas[1])
        z = float((s.mean() - expected) / (s.std() / math.sqrt(len(s))))
        assert abs(z) < 5.5, f"{float(s.mean()):.4f} instead of {expected:.4f}"


def explicit_trips(labels):
    """Complete round trips from a table (steps, K) of who is at which level, by following one replica at a time."""
    levels, trips = labels.shape[1], 0
    for replica in range(levels):
        ends = [place for row in labels.tolist() if (place := row.index(replica)) in (0, levels - 1)]
        visits = [place for i, place in enumerate(ends) if i == 0 or place != ends[i - 1]]
        # Only what begins at the target's level: cold, hot, cold, hot, cold is two.
        trips += max(0, (len(visits) - visits.index(0) - 1) // 2) if 0 in visits else 0
    return trips


@dataclasses.dataclass(frozen=True)
class Still:
    """Every proposal is rejected: points are names of replicas."""

    gradients, domain = 1, "real"

    def init(self, energy, x):
        return State(x, *gb.evaluate(energy, x))

    def noise(self, state, steps, rng):
        return (torch.rand((steps, len(state.x)), generator=rng, dtype=state.x.dtype),)

    def step(self, energy, state, noise):
        new, info = metropolis(state, state, torch.full_like(noise[0], -math.inf), noise[0])
        return new, Info(info.acceptance, info.nonfinite)


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_round_trips_are_those_of_a_slow_count(levels):
    kernel = ParallelTempering(Still(), [1.0, 0.8, 0.6, 0.4, 0.2][:levels])
    names = torch.arange(levels, dtype=torch.float64).expand(3, levels).unsqueeze(-1).contiguous()
    energy = gb.Energy.of(lambda x: 0.7 * x.sum(1))
    state, rng = kernel.init_replicas(energy, names), seeded(2)
    tables, told = [names[..., 0]], torch.zeros(3, dtype=torch.float64)
    for _ in range(300):
        out = gb.sample(energy, kernel, state, steps=1, rng=rng)
        state = out.state
        told += out.details["round_trips"]
        tables.append(replicas_of(state).x[..., 0])
    seen = [explicit_trips(torch.stack(tables)[:, i]) for i in range(3)]
    assert min(seen) >= 3
    assert replicas_of(state).trips.tolist() == seen == told.tolist()


@pytest.mark.parametrize("levels", [3, 6])
def test_where_every_swap_is_accepted_replicas_travel_without_turning(levels):
    """A flat energy: everybody returns after 2 K steps, so a chain completes one trip in two steps."""
    kernel = ParallelTempering(Still(), [1.0 - 0.1 * k for k in range(levels)])
    flat = gb.Energy.of(lambda x: 0.0 * x.sum(1))
    out = gb.sample(flat, kernel, torch.zeros(2, 1), steps=20 * levels, rng=seeded())
    first = 2 * levels  # Those that start elsewhere than at the target's level come round later.
    assert abs(int(replicas_of(out.state).trips[0]) - 10 * levels) <= first
    assert float(out.details["swap_acceptance"].min()) == 1.0


@pytest.mark.parametrize("kernel", [SCALED, BRIDGED], ids=["scaled", "bridged"])
def test_a_run_continues_to_the_bit_and_keeps_its_books(kernel):
    start = TARGET.sample(5, seeded())
    assert_continues(kernel, TARGET, start)
    assert_state_is_current(kernel, TARGET, start)
    assert_leaves_inputs_alone(kernel, TARGET, start)
    assert_flat_memory(kernel, TARGET, start)


@pytest.mark.parametrize("kernel", [SCALED, BRIDGED], ids=["scaled", "bridged"])
def test_it_compiles_to_one_graph(kernel, graphs):
    target = correlated_gaussian()
    assert_one_graph(kernel, target.energy, target.draw(4, seeded()), graphs)


def test_replicas_make_one_batch_and_no_evaluation_is_repeated():
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.square().sum(1)

    kernel = ParallelTempering(gb.HMC(0.1, leapfrog=3), [1.0, 0.5, 0.2])
    gb.sample(energy, kernel, torch.zeros(4, 2), steps=5, rng=seeded())
    assert calls == [12] * (1 + 3 * 5)


@dataclasses.dataclass(frozen=True)
class FlipOne:
    """A minimal discrete kernel: propose to flip one bit or none, without which it is periodic where all is flat."""

    gradients, domain = 1, "boolean"

    def init(self, energy, x):
        return State(x, energy(x), x.new_zeros((len(x), 0)))

    def noise(self, state, steps, rng):
        n = len(state.x)
        return (
            torch.rand((steps, n), generator=rng, dtype=state.x.dtype),
            torch.rand((steps, n), generator=rng, dtype=state.x.dtype),
        )

    def step(self, energy, state, noise):
        d = state.x.shape[1]
        bit = torch.nn.functional.one_hot((noise[0] * (d + 1)).long().clamp(max=d), d + 1)[:, :d].to(state.x.dtype)
        x = (state.x - bit).abs()
        new = State(x, energy(x), state.grad)
        return metropolis(state, new, state.energy - new.energy, noise[1])


@pytest.mark.parametrize("bridged", [False, True])
def test_bits_are_tempered_too(bridged):
    """Against enumeration: a ring of three bits with a deep minimum; 6 standard errors over independent chains."""
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    table = torch.tensor([0.0, 6.0, 5.0, 5.5, 6.5, 5.0, 6.0, -0.5], dtype=torch.float64)
    weights = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    energy = gb.Energy.of(lambda x: table[(x @ weights).long()], (3,), constraints.boolean)
    base = gb.Bernoulli(logits=torch.zeros(3, dtype=torch.float64)) if bridged else None
    kernel = ParallelTempering(FlipOne(), [1.0, 0.5, 0.0 if bridged else 0.1], base=base)
    out = gb.sample(energy, kernel, torch.zeros(20_000, 3, dtype=torch.float64), steps=100, rng=seeded(3))
    for state, p in zip(states, (-table).softmax(0)):
        found = float((out.x == state).all(1).double().mean())
        assert abs(found - float(p)) < 6.0 * math.sqrt(float(p) / 20_000), f"{state}: {found:.4f} for {float(p):.4f}"
    with pytest.raises(DomainError, match="walks on boolean"):
        gb.sample(TARGET, kernel, torch.zeros(2, 2, dtype=torch.float64), steps=1, rng=seeded())


def test_a_target_that_is_infinite_at_draws_of_the_base_rejects_them():
    """A box in the base's middle: swaps into it fail where they must, and the chain stays exact there."""
    box = gb.Uniform(low=-torch.ones(2, dtype=torch.float64), high=torch.ones(2, dtype=torch.float64))
    kernel = ParallelTempering(gb.MALA(0.5), [1.0, 0.5, 0.0], base=BASE)
    start = torch.zeros(20_000, 2, dtype=torch.float64)
    out = gb.sample(box, kernel, start, steps=60, rng=seeded(4))
    assert bool(torch.isfinite(out.state.energy).all())
    assert ks(out.x[:, 0], lambda v: (v + 1.0) / 2.0) < KS_LIMIT


@pytest.mark.parametrize(
    ("betas", "base", "message"),
    [
        ([1.0], None, "two or more inverse temperatures .* got .1"),
        ([0.9, 0.5], None, "decrease from 1, the target's; got .0.9, 0.5"),
        ([1.0, 0.5, 0.5], None, "decrease from 1"),
        ([1.0, float("nan")], None, "decrease from 1"),
        ([1.0, 0.0], None, "At beta = 0 the density is flat .* give a base"),
        ([1.0, 0.5], BASE, "With a base the ladder ends in 0"),
    ],
)
def test_what_is_no_ladder_is_refused(betas, base, message):
    with pytest.raises(OptionError, match=message):
        ParallelTempering(gb.MALA(0.1), betas, base=base)


def test_what_cannot_be_tempered_is_refused():
    x = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(OptionError, match=r"ULA is unadjusted\. Use MALA"):
        gb.sample(TARGET, ParallelTempering(gb.ULA(0.1), [1.0, 0.5]), x, steps=1, rng=seeded())
    with pytest.raises(OptionError, match="ParallelTempering carries a memory"):
        gb.sample(TARGET, ParallelTempering(SCALED, [1.0, 0.5]), x, steps=1, rng=seeded())
    wide = ParallelTempering(gb.MALA(0.1), [1.0, 0.0], base=gb.Gaussian(3))
    with pytest.raises(ShapeError, match=r"base takes points of shape \(3,\); the chains are at \(2,\)"):
        gb.sample(TARGET, wide, x, steps=1, rng=seeded())
    with pytest.raises(ArgumentTypeError, match="The kernel inside needs init"):
        ParallelTempering(gb.MALA, [1.0, 0.5])
    with pytest.raises(ArgumentTypeError, match="The base is an energy"):
        ParallelTempering(gb.MALA(0.1), [1.0, 0.0], base=3.0)
    with pytest.raises(ShapeError, match=r"one for each of 2 levels; got shape \(3,\)"):
        ParallelTempering(gb.MALA(0.1), [1.0, 0.5], step_sizes=[1.0, 2.0, 3.0])
    with pytest.raises(OptionError, match=r"Step sizes are positive numbers; got .1, -2"):
        ParallelTempering(gb.MALA(0.1), [1.0, 0.5], step_sizes=[1.0, -2.0])
    with pytest.raises(OptionError, match="has no step size; leave step_sizes out"):
        ParallelTempering(FlipOne(), [1.0, 0.5], step_sizes=[1.0, 2.0])
    with pytest.raises(ShapeError, match="ladder has 4 levels; got points for 3"):
        SCALED.init_replicas(TARGET, torch.zeros(2, 3, 2, dtype=torch.float64))


def test_states_of_other_kernels_and_ladders_are_refused():
    x = torch.zeros(3, 2, dtype=torch.float64)
    plain = gb.sample(TARGET, gb.MALA(0.1), x, steps=1, rng=seeded()).state
    with pytest.raises(ArgumentTypeError, match="a memory of earlier steps"):
        gb.sample(TARGET, SCALED, plain, steps=1, rng=seeded())
    short = gb.sample(TARGET, ParallelTempering(gb.MALA(0.1), [1.0, 0.5]), x, steps=1, rng=seeded()).state
    with pytest.raises(ShapeError, match="holds 2 replicas per chain, and the ladder has 4"):
        gb.sample(TARGET, SCALED, short, steps=1, rng=seeded())


def test_settings_inside_become_tensors():
    made = with_tensor_settings(ParallelTempering(gb.MALA(0.1), [1.0, 0.5]), torch.zeros(1))
    assert made.kernel.step_size.dtype == made.betas.dtype == torch.float32
    assert torch.equal(ladder_of(made.betas), made.betas)
    assert all(t.dtype in (torch.float64, torch.int64) for t in tensors_of(run_exact(SCALED, 1, 5).state))


@pytest.mark.parametrize("inner", [gb.GibbsWithGradients(), gb.BlockGibbs(), gb.SingleSiteGibbs(updates=4)], ids=repr)
def test_discrete_kernels_climb_ladders(inner):
    """Tempered energies still tell where they live, and their conditionals: exact draws stay exact at each level."""
    torch.manual_seed(0)
    couplings = torch.randn(4, 4, dtype=torch.float64)
    energy = gb.Ising(couplings + couplings.T - torch.diag(2.0 * couplings.diagonal()))
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    betas = (1.0, 0.5)
    laws = [torch.softmax(-b * energy(states), 0) for b in betas]
    n, rng = 20_000, seeded(3)
    start = torch.stack([states[torch.multinomial(law, n, replacement=True, generator=rng)] for law in laws], 1)
    kernel = gb.ParallelTempering(inner, betas)
    out = gb.sample(energy, kernel, kernel.init_replicas(energy, start), steps=3, rng=rng)
    at = replicas_of(out.state).x
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    for k, law in enumerate(laws):
        counts = torch.bincount((at[:, k] @ weights).long(), minlength=16).double()
        chi2 = float(((counts - n * law).square() / (n * law)).sum())
        # 15 degrees of freedom: above 72 in 2 of 10^9.
        assert chi2 < 72.0


def test_unadjusted_kernels_say_so():
    unadjusted = (gb.ULA(0.1), gb.Underdamped(0.1, 1.0), gb.SVGD(0.1), gb.MCLMC(0.1, 1.0), gb.PSGLD(0.1))
    for kernel in (*unadjusted, gb.DiscreteLangevin(0.1, adjusted=False), gb.Wrapped(gb.ULA(0.1), 1.0)):
        assert not is_adjusted(kernel)
        with pytest.raises(OptionError, match="invariant"):
            gb.ais(gb.Gaussian(2, scale=0.5), gb.Gaussian(2), kernel=kernel, rng=seeded())
    for kernel in (gb.MALA(0.1), gb.HMC(0.1), gb.RandomWalk(0.1), gb.BlockGibbs(), gb.Wrapped(gb.MALA(0.1), 1.0)):
        assert is_adjusted(kernel)
