"""Discrete kernels against transition matrices in closed form, and broken twins against the same."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import gibbsian as gb
from contracts import (
    assert_continues,
    assert_flat_memory,
    assert_leaves_inputs_alone,
    assert_one_graph,
    assert_state_is_current,
    seeded,
)
from enumeration import (
    acceptance,
    adjusted,
    assert_keeps_law,
    assert_transitions,
    binary_system,
    first_order,
    gradient_proposal,
    imbalance,
    langevin_proposal,
    matrix_of,
    one_hot_system,
    path_auxiliary,
    single_site,
)
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.kernels import discrete, discrete_langevin, gradient_gibbs
from gibbsian.kernels.base import State, metropolis
from gibbsian.kernels.discrete_langevin import DiscreteLangevin
from gibbsian.kernels.gibbs import SingleSiteGibbs
from gibbsian.kernels.gradient_gibbs import GibbsWithGradients
from gibbsian.kernels.ladder import Tempered
from gibbsian.kernels.path_auxiliary import PathAuxiliary, log_path

SYSTEMS = (binary_system(), one_hot_system())
EXACT = (
    GibbsWithGradients(),
    DiscreteLangevin(0.4),
    DiscreteLangevin(2.0),
    PathAuxiliary(1),
    PathAuxiliary(2),
    SingleSiteGibbs(),
)
REPEATED = (GibbsWithGradients(flips=2), SingleSiteGibbs(updates=2), DiscreteLangevin(0.5, adjusted=False))
ALL = (*EXACT, *REPEATED)


def proposal_for(kernel, system):
    """The probabilities of its proposals."""
    if isinstance(kernel, GibbsWithGradients):
        return gradient_proposal(system)
    return langevin_proposal(system, kernel.step_size)


def matrix_for(kernel, system):
    """The closed form that belongs to a kernel."""
    if isinstance(kernel, GibbsWithGradients):
        return torch.linalg.matrix_power(adjusted(proposal_for(kernel, system), system.law), kernel.flips)
    if isinstance(kernel, SingleSiteGibbs):
        return torch.linalg.matrix_power(single_site(system), kernel.updates)
    if isinstance(kernel, PathAuxiliary):
        return path_auxiliary(system, kernel.length)
    proposal = proposal_for(kernel, system)
    return adjusted(proposal, system.law) if kernel.adjusted else proposal


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@pytest.mark.parametrize("kernel", EXACT, ids=repr)
def test_transition_matrices_are_those_of_theory_and_in_detailed_balance(kernel, system):
    theory, law = matrix_for(kernel, system), system.law
    assert imbalance(theory, law) < 1e-15
    # Integration over one or two numbers is sharp; over the noise of all sites and classes it is less so.
    sharp = isinstance(kernel, (GibbsWithGradients, SingleSiteGibbs))
    points, off, uneven = (2**14, 5e-4, 5e-5) if sharp else (2**13, 5e-3, 8e-4)
    own = matrix_of(kernel, system, points, decides=not isinstance(kernel, SingleSiteGibbs))
    assert float((own - theory).abs().max()) < off
    assert imbalance(own, law) < uneven
    assert_transitions(kernel, system, theory)


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@pytest.mark.parametrize(
    "kernel", [k for k in EXACT if isinstance(k, (GibbsWithGradients, DiscreteLangevin))], ids=repr
)
def test_reported_acceptances_are_the_exact_ratios(kernel, system):
    """With proposals drawn as theory says, this is detailed balance to twelve digits."""
    proposal = proposal_for(kernel, system)
    exact = acceptance(proposal, system.law)
    start = system.states.repeat_interleave(400, 0)
    state = kernel.init(system.energy, start)
    which, uniform = kernel.noise(state, 1, seeded())
    new, info = kernel.step(system.energy, state, (which[0], torch.zeros_like(uniform[0])))
    i, j = system.index(start), system.index(new.x)
    torch.testing.assert_close(info.acceptance, exact[i, j], rtol=1e-12, atol=1e-12)
    assert len(set(zip(i.tolist(), j.tolist()))) > 3 * len(system.states)


def test_probabilities_of_paths_are_those_of_drawing_without_replacement():
    sites, classes, longest = 5, 3, 3
    rng = seeded(6)
    logits = 2.0 * torch.randn(1, sites, classes, generator=rng, dtype=torch.float64)
    weights, into = logits[0].exp(), torch.randint(0, classes, (1, sites), generator=rng)

    def slow(order):
        left, out = weights.sum(), 1.0
        for s in order:
            out = out * weights[s, into[0, s]] / left
            left = left - weights[s].sum()
        return float(out)

    for order in itertools.permutations(range(sites), longest):
        for length in range(1, longest + 1):
            walked = (torch.arange(longest) < length).unsqueeze(0)
            there, back = (log_path(logits, into, torch.tensor([order]), walked, back) for back in (False, True))
            assert abs(float(there.exp()) - slow(order[:length])) < 1e-14
            assert abs(float(back.exp()) - slow(order[:length][::-1])) < 1e-14


def test_paths_of_one_change_are_gibbs_with_gradients():
    for system in SYSTEMS:
        one, other = path_auxiliary(system, 1), matrix_for(GibbsWithGradients(), system)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@pytest.mark.parametrize("kernel", REPEATED, ids=repr)
def test_repeated_and_unadjusted_steps_have_the_transitions_of_theory(kernel, system):
    assert_transitions(kernel, system, matrix_for(kernel, system))


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@pytest.mark.parametrize("kernel", EXACT, ids=repr)
def test_exact_draws_stay_exact(kernel, system):
    assert_keeps_law(kernel, system)


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@pytest.mark.parametrize("kernel", [*REPEATED, DiscreteLangevin(0.4), PathAuxiliary(2)], ids=repr)
def test_every_discrete_kernel_keeps_the_contracts(kernel, system, graphs):
    start = system.states[::3]
    assert_continues(kernel, system.energy, start)
    assert_state_is_current(kernel, system.energy, start)
    assert_leaves_inputs_alone(kernel, system.energy, start)
    if not system.hot:  # Counting every object alive takes longest, and the loop is the same.
        assert_flat_memory(kernel, system.energy, start)
    assert_one_graph(kernel, system.energy, start, graphs)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Compilation failed:RuntimeWarning")
@pytest.mark.parametrize("kernel", [*REPEATED, DiscreteLangevin(0.4), PathAuxiliary(2)], ids=repr)
def test_compiled_chains_are_the_eager_ones(kernel, monkeypatch):
    """Through Inductor itself, without falling back."""
    monkeypatch.setattr("gibbsian.compilation._said", set())
    monkeypatch.setattr("gibbsian.sampling.GRADIENTS_PER_BLOCK", 2)
    for system in SYSTEMS:
        start = system.states.repeat(20, *[1] * (system.states.ndim - 1))
        eager, compiled = (
            gb.sample(system.energy, kernel, start, steps=20, rng=seeded(), compile=compile)
            for compile in (False, True)
        )
        torch.testing.assert_close(compiled.acceptance, eager.acceptance, rtol=0, atol=1e-10)
        assert torch.equal(compiled.x, eager.x)


def test_walks_reach_every_state():
    """A fixed, even number of flips would keep the parity; paths of random length do not."""
    for system in SYSTEMS:
        for kernel in EXACT:
            reached = torch.linalg.matrix_power(matrix_for(kernel, system), 64)
            torch.testing.assert_close(reached, system.law.expand_as(reached), rtol=0, atol=0.05)


class WithoutWayBack(GibbsWithGradients):
    """The reverse proposal with the gradient of the start."""

    def step(self, energy, state, noise):
        hot = discrete.is_one_hot(energy)
        logits = discrete.change_logits(state.x, state.grad, hot).flatten(1).log_softmax(1)
        index = discrete.pick(logits.exp(), noise[0][:, 0])
        x = discrete.changed(state.x, discrete.change_at(state.x, index, hot), hot)
        new = State(x, *gb.evaluate(energy, x))
        return metropolis(state, new, state.energy - new.energy, noise[1][:, 0])


class UphillOneWay(DiscreteLangevin):
    """The proposal follows the gradient with the wrong sign; its probabilities are those of the right one."""

    def step(self, energy, state, noise):
        hot = discrete.is_one_hot(energy)
        wrong = discrete_langevin.site_logits(state._replace(grad=-state.grad), self.step_size, hot)
        x = discrete_langevin._draw(state.x, wrong, noise[0], hot)
        new = State(x, *gb.evaluate(energy, x))
        there, back = (discrete_langevin.site_logits(s, self.step_size, hot) for s in (state, new))
        ratio = discrete_langevin.log_proposal(x, state.x, back, hot) - discrete_langevin.log_proposal(
            state.x, x, there, hot
        )
        return metropolis(state, new, state.energy - new.energy + ratio, noise[1])


class WithoutReversePath(PathAuxiliary):
    """The ratio of the target's densities alone."""

    def step(self, energy, state, noise):
        proposed, _ = super().step(energy, state, (*noise[:2], torch.full_like(noise[2], -1.0)))
        return metropolis(state, proposed, state.energy - proposed.energy, noise[2])


BROKEN = (WithoutWayBack(), UphillOneWay(0.8), WithoutReversePath(2))


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
@pytest.mark.parametrize("kernel", BROKEN, ids=lambda k: type(k).__name__)
def test_broken_twins_are_caught(kernel, system):
    with pytest.raises(AssertionError, match="p = "):
        assert_keeps_law(kernel, system)
    assert imbalance(matrix_of(kernel, system), system.law) > 5e-3


def test_a_sign_wrong_on_both_ways_is_exact_and_caught_all_the_same(monkeypatch):
    """Metropolis corrects a proposal that goes uphill in energy; only its matrix shows that it is not the one meant."""
    right = discrete_langevin.gains
    monkeypatch.setattr(discrete_langevin, "gains", lambda *a: -right(*a))
    for system in SYSTEMS:
        kernel = DiscreteLangevin(0.8)
        assert_keeps_law(kernel, system)
        with pytest.raises(AssertionError, match="p = "):
            assert_transitions(kernel, system, matrix_for(kernel, system))


def test_first_order_changes_are_exact_for_linear_energies():
    for system in SYSTEMS:
        weight = torch.randn(system.states[0].shape, generator=seeded(5), dtype=torch.float64)
        energy = gb.Energy.of(lambda x, w=weight: (x * w).flatten(1).sum(1), support=system.energy.support)
        linear = dataclasses.replace(system, energy=energy)
        value = energy(system.states)
        torch.testing.assert_close(first_order(linear), value.unsqueeze(1) - value, rtol=0, atol=1e-12)
        # And the kernel's own, for every change of one site.
        x = system.states
        d = discrete.gains(x, gb.evaluate(energy, x)[1], system.hot).flatten(1)
        for index in range(d.shape[1]):
            change = discrete.change_at(x, torch.full((len(x),), index), system.hot)
            y = discrete.changed(x, change, system.hot)
            torch.testing.assert_close(d[:, index], value - energy(y), rtol=0, atol=1e-12)
            there_and_back = discrete.changed(
                y, discrete.change_at(y, discrete.index_back(x, change, system.hot), system.hot), system.hot
            )
            assert torch.equal(there_and_back, x)


def test_the_unadjusted_bias_vanishes_with_the_step_size_for_quadratic_energies():
    """The paper proves it; the stationary law comes from the matrix."""
    rng = seeded(3)
    field, pairs = torch.randn(4, generator=rng).double(), torch.randn(4, 4, generator=rng).double()
    system = dataclasses.replace(
        binary_system((4,)),
        energy=gb.Energy.of(lambda x: x @ field + 0.5 * ((x @ pairs) * x).sum(1), (4,), constraints.boolean),
    )
    away = []
    for alpha in (1.0, 0.4, 0.2, 0.1):
        matrix = langevin_proposal(system, alpha)
        assert_transitions(DiscreteLangevin(alpha, adjusted=False), system, matrix)
        values, vectors = torch.linalg.eig(matrix.T)
        stationary = vectors[:, values.real.argmax()].real
        away.append(float((stationary / stationary.sum() - system.law).abs().sum()))
    assert away[0] > away[1] > away[2] > away[3]
    assert away[3] < 0.02


def test_tuning_brings_discrete_langevin_to_its_acceptance():
    torch.manual_seed(0)
    base = gb.Bernoulli(probs=torch.full((40,), 0.3))
    energy = gb.Energy.of(nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))) * 30.0 + base
    tuned = gb.tune(energy, DiscreteLangevin(0.1), base.sample(64, seeded()), rng=seeded(1), steps=300)
    assert abs(tuned.acceptance - 0.574) < 0.04
    with pytest.raises(ArgumentTypeError, match="accepts every step"):
        gb.tune(energy, DiscreteLangevin(0.1, adjusted=False), base.sample(64, seeded()), rng=seeded(1))


def test_chains_may_have_step_sizes_of_their_own():
    for system in SYSTEMS:
        sizes = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64).repeat(len(system.states) // 3)
        start = system.states[: len(sizes)]
        each = gb.sample(system.energy, DiscreteLangevin(sizes), start, steps=20, rng=seeded(1))
        one = gb.sample(system.energy, DiscreteLangevin(0.6), start, steps=20, rng=seeded(1))
        assert torch.equal(each.x[sizes == 0.6], one.x[sizes == 0.6])


def wall(kind):
    """A bit that must stay zero: with it the energy, or its gradient alone, leaves the numbers."""

    def energy(x):
        value = x.sum(1)
        if kind == "gradient":
            return value + torch.where(x[:, 0] > 0, x[:, 0] - x[:, 0].detach(), 1.0).sqrt()
        return torch.where(x[:, 0] > 0, float(kind), value)

    return gb.Energy.of(energy, (3,), constraints.boolean)


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
@pytest.mark.parametrize("kernel", [k for k in ALL if not hasattr(k, "adjusted") or k.adjusted], ids=repr)
def test_moves_that_leave_the_numbers_are_rejected_and_counted(kernel, kind):
    if isinstance(kernel, SingleSiteGibbs) and kind == "gradient":
        return  # It asks for none.
    out = gb.sample(wall(kind), kernel, torch.zeros(200, 3, dtype=torch.float64), steps=30, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] == 0).all())
    assert bool((out.draws[..., 1] == 1).any())
    assert bool((out.nonfinite > 0).any())
    assert bool(torch.isfinite(out.state.energy).all())


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
def test_unadjusted_chains_restart_and_count(kind):
    start = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).repeat(200, 1)
    out = gb.sample(wall(kind), DiscreteLangevin(1.0, adjusted=False), start, steps=30, rng=seeded(), thin=1)
    assert bool((out.draws[..., 0] == 0).all())
    assert int(out.nonfinite.sum()) > 100
    assert bool((out.acceptance == 1).all())


def test_networks_on_bits_and_classes_are_walked_in_single_precision():
    torch.manual_seed(0)
    for base in (gb.Bernoulli(logits=torch.zeros(1, 6, 6)), gb.Categorical(logits=torch.zeros(4, 5))):
        net = nn.Sequential(nn.Flatten(), nn.Linear(base.event_shape.numel(), 16), nn.SiLU(), nn.Linear(16, 1))
        energy = gb.Energy.of(lambda x, net=net: net(x).squeeze(1)) + base
        start = base.sample(32, seeded())
        for kernel in ALL:
            out = gb.sample(energy, kernel, start, steps=20, rng=seeded(1))
            assert out.x.dtype == torch.float32
            assert bool(base.support.check(out.x).all())
            assert not torch.equal(out.x, start)


def test_single_sites_need_nothing_to_differentiate():
    """Integers, comparisons and tables are fine, on events of any shape."""
    system = binary_system((2, 2))
    table = torch.randn(16, generator=seeded(4), dtype=torch.float64)
    energy = gb.Energy.of(lambda x: table[system.index(x)], (2, 2), constraints.boolean)
    looked_up = dataclasses.replace(system, energy=energy)
    assert_transitions(SingleSiteGibbs(), looked_up, single_site(looked_up))
    with pytest.raises(ArgumentTypeError, match="differentiable"):
        gb.sample(energy, GibbsWithGradients(), system.states, steps=1, rng=seeded())


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_bad_starts_and_energies_are_refused(kernel):
    binary, hot = (system.energy for system in SYSTEMS)

    def run(energy, x):
        gb.sample(energy, kernel, x, steps=1, rng=seeded())

    with pytest.raises(DomainError, match=r"2 of 3 chains do not \(for example 0.3\)"):
        run(binary, torch.tensor([[0.0, 1, 0, 1], [0.3, 0, 0, 1], [0, 0, 1, 2]]).view(3, 2, 2))
    with pytest.raises(DomainError, match=r"Spins s of -1 and 1 are \(s \+ 1\) / 2"):
        run(binary, 2 * SYSTEMS[0].states - 1)
    with pytest.raises(DomainError, match=r"1 of 2 chains do not\. torch\.nn"):
        run(hot, torch.stack((torch.eye(3), torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]]))))
    with pytest.raises(ArgumentTypeError, match="floating-point tensor"):
        run(binary, torch.zeros(2, 2, 2, dtype=torch.long))
    with pytest.raises(DomainError, match=r"walks on boolean and one_hot states.* support=constraints.boolean"):
        run(lambda x: x.sum(1), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="K of 2 classes or more"):
        run(gb.Energy.of(lambda x: x.flatten(1).sum(1), support=constraints.one_hot), torch.ones(3, 4, 1))


def test_kernels_over_the_reals_name_the_kernels_that_fit():
    with pytest.raises(
        DomainError, match="BlockGibbs, GibbsWithGradients, DiscreteLangevin, PathAuxiliary, SingleSite"
    ):
        gb.sample(SYSTEMS[0].energy, gb.MALA(0.1), SYSTEMS[0].states, steps=1, rng=seeded())


def test_an_energy_must_say_what_its_states_are():
    with pytest.raises(DomainError, match="support is None"):
        GibbsWithGradients().init(lambda x: x.sum(1), torch.zeros(2, 3))


def test_a_copied_energy_lives_where_it_did():
    import copy

    for system in SYSTEMS:
        own, copied = (
            gb.sample(energy, GibbsWithGradients(), system.states, steps=3, rng=seeded())
            for energy in (system.energy, copy.deepcopy(system.energy))
        )
        assert torch.equal(own.x, copied.x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GibbsWithGradients(flips=0), "flips counts .* got 0"),
        (lambda: SingleSiteGibbs(updates=0), "updates counts .* got 0"),
        (lambda: PathAuxiliary(length=0), "length is .* got 0"),
        (lambda: DiscreteLangevin(0.0), "step_size is a positive number; got 0.0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_paths_longer_than_the_event_are_refused():
    with pytest.raises(OptionError, match="up to 9 different sites, and an event has 4; use length=2 or less"):
        gb.sample(SYSTEMS[0].energy, PathAuxiliary(5), SYSTEMS[0].states, steps=1, rng=seeded())


def test_states_of_other_kernels_are_refused():
    system = SYSTEMS[0]
    state = gb.sample(system.energy, SingleSiteGibbs(), system.states, steps=1, rng=seeded()).state
    for kernel in (GibbsWithGradients(), DiscreteLangevin(0.3), PathAuxiliary()):
        with pytest.raises(ArgumentTypeError, match="needs gradients"):
            gb.sample(system.energy, kernel, state, steps=1, rng=seeded())
    with_grad = gb.sample(system.energy, GibbsWithGradients(), system.states, steps=1, rng=seeded()).state
    back = gb.sample(system.energy, SingleSiteGibbs(), with_grad, steps=1, rng=seeded()).state
    assert back.grad.numel() == 0  # A gradient kept here would be another place's.


def test_an_index_of_weight_zero_is_never_picked():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).repeat(5, 1)
    top = 1.0 - 2.0**-24
    u = torch.tensor([0.0, 0.7, 0.75, 0.9, top])
    assert discrete.pick(weights, u).tolist() == [1, 1, 3, 3, 3]


def test_kernels_print_their_settings():
    assert repr(DiscreteLangevin(0.5)) == "DiscreteLangevin(step_size=0.5, adjusted=True)"
    assert repr(GibbsWithGradients()) == "GibbsWithGradients(flips=1)"
    assert gradient_gibbs.GibbsWithGradients(flips=4).gradients == 4


@dataclasses.dataclass(frozen=True, repr=False)
class Uphill(SingleSiteGibbs):
    """Sites drawn from the law of minus the energy."""

    def step(self, energy, state, noise):
        turned = Tempered(energy, -torch.ones((), dtype=torch.float64))
        new, info = super().step(turned, state._replace(energy=-state.energy), noise)
        return new._replace(energy=-new.energy), info


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_a_heat_bath_with_the_wrong_sign_is_caught(system):
    assert_transitions(SingleSiteGibbs(), system, single_site(system))
    with pytest.raises(AssertionError):
        assert_transitions(Uphill(), system, single_site(system))
