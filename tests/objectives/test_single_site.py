"""Objectives over single-site changes, on systems small enough to list: values, gradients and minima against sums."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import one_hot, pad

import gibbsian as gb
from enumeration import binary_system, block_update, differing, one_hot_system
from gibbsian import Energy
from gibbsian.energies.base import tells_conditionals
from gibbsian.energies.pairwise import Lattice
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives import single_site
from gibbsian.objectives.base import Batch
from gibbsian.objectives.concrete_score import ConcreteScoreMatching
from gibbsian.objectives.probability_flow import MinimumProbabilityFlow
from gibbsian.objectives.pseudo_likelihood import PseudoLikelihood, RatioMatching
from gibbsian.objectives.single_site import SingleSiteObjective
from recovery import seeded

OBJECTIVES = (PseudoLikelihood, RatioMatching, MinimumProbabilityFlow, ConcreteScoreMatching)
# Warmer than those that kernels are tested on, whose ratios, squared, span twelve orders of magnitude.
SYSTEMS = {s.name: replace(s, energy=0.4 * s.energy) for s in (binary_system(), one_hot_system())}
BINARY, ONE_HOT = SYSTEMS.values()


class Tilted(Energy):
    """A listed system whose energy is multiplied by a parameter, with a field of its own; the truth is (1, 0)."""

    def __init__(self, system) -> None:
        super().__init__()
        self.system, self.support, self.event_shape = system, system.energy.support, system.states.shape[1:]
        self.theta = nn.Parameter(torch.ones((), dtype=torch.float64))
        # One class fewer than there are: a field equal over the classes is a constant.
        free = (*self.event_shape[:-1], self.event_shape[-1] - 1) if system.hot else self.event_shape
        self.field = nn.Parameter(torch.zeros(free, dtype=torch.float64))

    def forward(self, x):
        v = x[..., 1:] if self.system.hot else x
        return self.theta * self.system.energy(x) + (self.field * v).flatten(1).sum(1)

    def moved(self, seed):
        """The same, off the truth."""
        other = Tilted(self.system)
        other.load_state_dict(
            {k: v + 0.4 * torch.randn(v.shape, generator=seeded(seed)).double() for k, v in self.state_dict().items()}
        )
        return other


def expected(objective, energy, system):
    """The loss in expectation over the system's law: each state is a batch of one, weighted."""
    losses = [objective(energy, Batch(x.unsqueeze(0)), seeded()).value for x in system.states]
    return system.law @ torch.stack(losses)


# The same by sums over pairs of states, written from the definitions, without log-ratios.


def by_conditionals(rule):
    """Expected scores of the laws that a model gives to each site given the others; the weight is the data's law."""

    def value(model, system):
        near = [
            ~differing(system)[:, :, [r for r in range(system.sites) if r != s]].any(2) for s in range(system.sites)
        ]
        weights = (-model).exp()
        laws = [torch.where(same, weights, 0.0) / (same * weights).sum(1, keepdim=True) for same in near]
        return sum(system.law @ rule(law) for law in laws)

    return value


def flow(model, system):
    """Derivative of the divergence of the data's law from itself: what leaves each state by the rates."""
    near = differing(system).sum(2) == 1
    rates = torch.where(near, (0.5 * (model.unsqueeze(1) - model.unsqueeze(0))).exp(), 0.0)
    return system.law @ rates.sum(1)


def concrete(model, system):
    """The squared distance of concrete scores, less the part that does not depend on the model."""
    near, p, q = differing(system).sum(2) == 1, system.law, (-model).softmax(0)
    own, data = q / q.unsqueeze(1) - 1, p / p.unsqueeze(1) - 1
    return (p.unsqueeze(1) * near * ((own - data).square() - data.square())).sum()


def brier(law):
    return 0.5 * (torch.eye(len(law)) - law).square().sum(1)


EXACT = {
    PseudoLikelihood: by_conditionals(lambda law: -law.diagonal().log()),
    RatioMatching: by_conditionals(brier),
    MinimumProbabilityFlow: flow,
    ConcreteScoreMatching: concrete,
}


def check_value(objective, exact, system) -> None:
    """Value and gradient at three models, off the truth."""
    for seed in range(3):
        energy = Tilted(system).moved(seed)
        params = list(energy.parameters())
        found, want = expected(objective, energy, system), exact(energy(system.states), system)
        pairs = [(found, want), *zip(torch.autograd.grad(found, params), torch.autograd.grad(want, params))]
        for a, b in pairs:
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-11), f"missed: {a} for {b}"


def check_minimum(objective, system) -> None:
    """At the truth the expected gradient is zero and the curvature positive in every direction."""
    energy = Tilted(system)
    shapes = {name: value.shape for name, value in energy.named_parameters()}

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
        given = Energy.of(lambda x: torch.func.functional_call(energy, values, (x,)), support=energy.support)
        return expected(objective, given, system)

    truth = nn.utils.parameters_to_vector(energy.parameters()).detach()
    gradient = torch.autograd.functional.jacobian(loss, truth)
    assert float(gradient.abs().max()) < 1e-10, f"missed: gradient {gradient.tolist()}"
    curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, truth))
    assert float(curvature[0]) > 1e-4, f"missed: curvatures {curvature.tolist()}"


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_value_and_gradient_are_those_of_sums_over_pairs_of_states(kind, name):
    check_value(kind(), EXACT[kind], SYSTEMS[name])


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_true_model_is_the_minimum(kind, name):
    check_minimum(kind(), SYSTEMS[name])


def test_ratio_matching_of_bits_is_the_papers_sum_of_squared_bounded_ratios():
    system = BINARY
    e, near = system.energy(system.states), differing(system).sum(2) == 1
    ratio = (e.unsqueeze(0) - e.unsqueeze(1)).exp()  # p(x) / p(x') in row x
    want = system.law @ torch.where(near, (1.0 / (1.0 + ratio)).square(), 0.0).sum(1)
    assert float(expected(RatioMatching(), system.energy, system)) == pytest.approx(float(want), rel=1e-12)


def test_the_laws_of_the_sums_are_those_of_gibbs_updates():
    """Ties the sums above to the transition matrices that kernels are judged by."""
    system = ONE_HOT
    want = -sum(system.law @ block_update(system, [s]).diagonal().log() for s in range(system.sites))
    assert float(expected(PseudoLikelihood(), system.energy, system)) == pytest.approx(float(want), rel=1e-12)


def with_own(r):
    """The log-ratio of the value that a site has, 0, and those of the others."""
    return pad(r, (1, 0))


class Twin(SingleSiteObjective):
    """An objective with another function of the log-ratios."""

    def __init__(self, fn) -> None:
        super().__init__(None, 8192)
        self.fn = fn

    def score(self, log_ratios):
        return self.fn(log_ratios)


TWINS = {
    "pseudo-likelihood, sign": lambda r: -with_own(-r).log_softmax(2)[..., 0],
    "pseudo-likelihood, own value counted twice": lambda r: -with_own(with_own(r)).log_softmax(2)[..., 0],
    "pseudo-likelihood, own value not counted": lambda r: r.logsumexp(2),
    "ratio matching, sign": lambda r: with_own(-r).softmax(2)[..., 1:].sum(2).square(),
    "ratio matching, no square": lambda r: with_own(r).softmax(2)[..., 1:].sum(2),
    "flow, sign": lambda r: (-0.5 * r).exp().sum(2),
    "flow, no half": lambda r: r.exp().sum(2),
    "concrete, sign": lambda r: ((-2 * r).exp() - 2 * r.exp()).sum(2),
    "concrete, no square": lambda r: (r.exp() - 2 * (-r).exp()).sum(2),
    "concrete, no two": lambda r: ((2 * r).exp() - (-r).exp()).sum(2),
    "concrete, the data's score of the wrong end": lambda r: ((2 * r).exp() - 2 * r.exp()).sum(2),
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("twin", TWINS)
def test_slips_move_the_minimum(twin, name):
    with pytest.raises(AssertionError, match="missed"):
        check_minimum(Twin(TWINS[twin]), SYSTEMS[name])


@pytest.mark.parametrize(
    ("kind", "slip"),
    [
        (PseudoLikelihood, lambda r: -with_own(r).log_softmax(2)[..., 0] / 4),
        (RatioMatching, lambda r: 0.5 * with_own(r).softmax(2)[..., 1:].sum(2).square()),
        (MinimumProbabilityFlow, lambda r: (0.5 * with_own(r)).exp().sum(2)),
        (ConcreteScoreMatching, lambda r: ((2 * r).exp() - 2 * (-r).exp()).sum(2)),
    ],
    ids=["mean over sites", "own square left out", "own state counted", "constant left out"],
)
def test_slips_that_keep_the_minimum_move_the_value(kind, slip):
    for system in SYSTEMS.values():
        with pytest.raises(AssertionError, match="missed"):
            check_value(Twin(slip), EXACT[kind], system)


# Ways of evaluation: all are one.


def potts(shape=(2, 3), classes=3):
    field = torch.randn((*shape, classes), generator=seeded(3), dtype=torch.float64)
    return gb.Potts(Lattice(shape, torch.tensor(0.4, dtype=torch.float64), periodic=False), classes, field)


def ising(shape=(2, 3)):
    field = torch.randn(shape, generator=seeded(4), dtype=torch.float64)
    return gb.Ising.lattice(shape, torch.tensor(0.3, dtype=torch.float64), field, periodic=False)


def rows(energy, n=5, seed=0):
    shape = energy.event_shape
    if energy.support is constraints.one_hot:
        return one_hot(torch.randint(shape[-1], (n, *shape[:-1]), generator=seeded(seed)), shape[-1]).double()
    return torch.randint(2, (n, *shape), generator=seeded(seed)).double()


class Scaled(Energy):
    """An energy times a parameter, by itself or with its conditionals."""

    def __init__(self, inner, told) -> None:
        super().__init__()
        self.inner, self.support, self.event_shape = inner, inner.support, inner.event_shape
        self.theta = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.most = 0
        if told:
            self.conditional_logits = lambda x, block: self.theta * inner.conditional_logits(x, block)

    def forward(self, x):
        self.most = max(self.most, len(x))
        return self.theta * self.inner(x)


@pytest.mark.parametrize("inner", [ising(), potts()], ids=["ising", "potts"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_conditionals_and_pieces_of_any_size_give_the_same(kind, inner):
    x = rows(inner)
    found = []
    for told, chunk in ((True, 8192), (False, 8192), (False, 1), (False, 7), (False, 30)):
        energy = Scaled(inner, told)
        loss = kind(chunk=chunk)(energy, Batch(x), seeded()).value
        (slope,) = torch.autograd.grad(loss, energy.theta)
        assert energy.most <= max(chunk, len(x)) or told
        found.append((float(loss.detach()), float(slope)))
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-11)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_pieces_give_the_gradient_of_a_network(kind):
    energy = (gb.MLP(6, hidden=(8,)).double() + gb.Bernoulli(torch.zeros(6, dtype=torch.float64))).double()
    x = torch.randint(2, (4, 6), generator=seeded(1)).double()
    slopes = []
    for chunk in (5, 8192):
        loss = kind(chunk=chunk)(energy, Batch(x), seeded()).value
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(energy.parameters()))]))
    assert torch.allclose(*slopes, rtol=1e-10, atol=1e-12)


def test_memory_of_the_graph_is_that_of_one_piece():
    """What is kept for the backward pass does not grow with the number of neighbours."""

    def kept(chunk):
        sizes = []
        energy = gb.MLP(40, hidden=(64,)) + gb.Bernoulli(torch.zeros(40))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            PseudoLikelihood(chunk=chunk)(energy, Batch(torch.zeros(20, 40)), seeded()).value.backward()
        return max(sizes), sum(sizes)

    (most, total), (most_of_pieces, total_of_pieces) = kept(8192), kept(100)
    assert most_of_pieces <= 100 * 64
    assert most >= 800 * 64
    assert total_of_pieces < 0.2 * total


def test_a_sum_has_conditionals_when_all_terms_have():
    bits = gb.Bernoulli(torch.zeros(2, 3, dtype=torch.float64))
    network = gb.MLP((2, 3), hidden=(4,)).double()
    assert tells_conditionals(0.5 * ising() + bits)
    assert not tells_conditionals(ising() + network)
    assert not tells_conditionals(network)
    x = rows(ising())
    for energy in (0.5 * ising() + bits, ising() + network):
        bare = Energy.of(lambda v, e=energy: e(v), support=constraints.boolean)
        a, b = (PseudoLikelihood()(e, Batch(x), seeded()).value for e in (energy, bare))
        assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-11)


# A random part of the sites.


def check_unbiased(kind, energy, m, monkeypatch, weight=1.0) -> None:
    """Averaged over all subsets the loss, and its gradient, are those of all sites."""
    x = rows(energy.inner)
    whole = kind()(energy, Batch(x), seeded()).value
    subsets = list(itertools.combinations(range(6), m))
    with monkeypatch.context() as patch:
        losses = []
        for subset in subsets:
            patch.setattr(single_site, "_chosen", lambda n, *rest, s=subset: torch.tensor(s).expand(n, len(s)))
            losses.append(weight * kind(sites=m)(energy, Batch(x), seeded()).value)
    mean = torch.stack(losses).mean()
    for a, b in ((whole, mean), tuple(torch.autograd.grad(v, energy.theta)[0] for v in (whole, mean))):
        assert torch.allclose(a, b, rtol=1e-11), f"missed: {b} for {a}"
    assert float(torch.stack(losses).detach().std()) > 0.0


@pytest.mark.parametrize("inner", [ising(), potts()], ids=["ising", "potts"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_some_sites_estimate_all_without_bias(kind, inner, monkeypatch):
    check_unbiased(kind, Scaled(inner, False), 2, monkeypatch)
    with pytest.raises(AssertionError, match="missed"):
        check_unbiased(kind, Scaled(inner, False), 2, monkeypatch, weight=2 / 6)


def test_every_subset_is_as_likely():
    """Chi-square over the 10 pairs of 5 sites: below 1e-8 is a false alarm once in 1e8."""
    from scipy import stats

    chosen = single_site._chosen(20_000, 5, 2, torch.zeros(()), seeded())
    assert bool((chosen[:, 0] != chosen[:, 1]).all())
    code = one_hot(chosen, 5).sum(1) @ (2 ** torch.arange(5))
    counts = torch.bincount(code)
    counts = counts[counts > 0]
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-8


def test_rows_have_subsets_of_their_own_drawn_anew_in_every_call():
    rng, like = seeded(), torch.zeros(())
    first, second = (single_site._chosen(50, 30, 3, like, rng) for _ in range(2))
    assert not torch.equal(first, second)
    assert len({tuple(sorted(row)) for row in first.tolist()}) > 40


# Plumbing.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 2, 3), (3, 4, "one-hot")])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_any_shape_and_precision_and_the_same_numbers_for_a_seed(kind, shape, dtype):
    hot = shape[-1] == "one-hot"
    event = shape[:-1] if hot else shape
    base = gb.Categorical(torch.zeros(event)) if hot else gb.Bernoulli(torch.zeros(event))
    energy = (gb.MLP(event, hidden=(8,)) + base).to(dtype)
    x = base.sample(6, seeded(1)).to(dtype)
    a, b, c = (kind(sites=2)(energy, Batch(x), seeded(s)).value for s in (1, 1, 2))
    assert a.dtype == dtype
    assert a.shape == ()
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    a.backward()
    loss = kind()(energy, Batch(x), seeded())
    assert not any(m.requires_grad for m in loss.metrics.values())
    assert torch.allclose(loss.metrics["energy_data"], energy(x).mean())
    assert kind().state_dict() == {}
    assert repr(kind(sites=2, chunk=9)) == f"{kind.__name__}(sites=2, chunk=9)"


@pytest.mark.parametrize("told", [True, False])
def test_accuracy_counts_sites_whose_value_is_the_likeliest(told):
    energy = gb.Bernoulli(torch.tensor([2.0, -1.0, 0.5, -3.0]))
    energy = energy if told else Energy.of(lambda x, e=energy: e(x), support=constraints.boolean)
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    assert float(PseudoLikelihood()(energy, Batch(x), seeded()).metrics["accuracy"]) == 6 / 8


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_labels_go_with_rows_and_their_neighbours(kind):
    def fn(x, y):
        return ((y.unsqueeze(1) + 1) * x).sum(1)

    support = constraints.boolean
    energy = Energy.of(fn, support=support, context=("y",))
    x = torch.randint(2, (4, 3), generator=seeded()).double()
    y = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    alone = [
        kind()(Energy.of(lambda v, s=s: (s + 1) * v.sum(1), support=support), Batch(row[None]), seeded()).value
        for row, s in zip(x, y)
    ]
    for chunk in (1, 5, 8192):
        together = kind(chunk=chunk)(energy, Batch(x, {"y": y}), seeded()).value
        assert float(together) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-12)
    with pytest.raises(OptionError, match="y"):
        kind()(energy, Batch(x), seeded())


def test_conditionals_are_asked_for_with_labels():
    class Labelled(Energy):
        support, event_shape, context = constraints.boolean, torch.Size((3,)), ("y",)

        def forward(self, x, y):
            raise AssertionError("the energy is not needed")

        def conditional_logits(self, x, block, y):
            return -(y.unsqueeze(1) + 1).expand_as(x)

    y = torch.tensor([0.0, 2.0])
    for energy, batch in (
        (Labelled(), Batch(torch.zeros(2, 3), {"y": y})),
        (Labelled().given(y=y), Batch(torch.zeros(2, 3))),
    ):
        found = PseudoLikelihood()(energy, batch, seeded()).value
        assert float(found) == pytest.approx(3 * float(torch.nn.functional.softplus(-(y + 1)).mean()), rel=1e-6)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_forbidden_state_is_no_trouble_for_ratios_that_vanish_with_it(kind):
    energy = Energy.of(lambda x: torch.where(x.sum(1) == 2, torch.inf, x.sum(1)), support=constraints.boolean)
    value = kind()(energy, Batch(torch.tensor([[1.0, 0.0]])), seeded()).value
    assert bool(torch.isfinite(value)) == (kind is not ConcreteScoreMatching)


@pytest.mark.parametrize(("kind", "sites"), [*((kind, None) for kind in OBJECTIVES), (PseudoLikelihood, 3)])
def test_fit_of_a_network_runs_and_nears_the_data(kind, sites):
    system = binary_system((2, 4))
    data = system.states[torch.multinomial(system.law, 2000, replacement=True, generator=seeded())].float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = gb.MLP((2, 4), hidden=(32,)) + gb.Bernoulli(torch.zeros(2, 4))

    def divergence():
        model = -energy(system.states.float()).detach().double()
        return float(system.law @ (system.law.log() - model.log_softmax(0)))

    before = divergence()
    run = gb.fit(
        energy, data, kind(sites=sites, chunk=500), rng=seeded(), steps=150, batch_size=100, learning_rate=0.01
    )
    assert run.events == []
    assert divergence() < 0.3 * before


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sites": 0}, "sites counts"),
        ({"sites": 1.5}, "sites counts"),
        ({"sites": True}, "sites counts"),
        ({"chunk": 0}, "chunk counts"),
        ({"chunk": -3}, "chunk counts"),
        ({"chunk": None}, "chunk counts"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, words):
    with pytest.raises(OptionError, match=words):
        kind(**options)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_does_not_fit_is_refused(kind):
    bits, sites = ising(), potts()
    x, y = rows(bits), rows(sites)
    with pytest.raises(OptionError, match="sites=7 is more than the 6"):
        kind(sites=7)(bits, Batch(x), seeded())
    with pytest.raises(DomainError, match=r"boolean or constraints\.one_hot"):
        kind()(gb.MLP(6).double(), Batch(x.flatten(1)), seeded())
    with pytest.raises(DomainError, match=r"1 of 5 rows do not \(for example 0\.3.*bernoulli"):
        kind()(bits, Batch(torch.cat((x[:4], torch.full((1, 2, 3), 0.3)))), seeded())
    with pytest.raises(DomainError, match=r"example -1.*\(s \+ 1\) / 2"):
        kind()(bits, Batch(2 * x - 1), seeded())
    with pytest.raises(DomainError, match=r"3 of 5 rows do not.*one_hot"):
        kind()(sites, Batch(torch.cat((y[:2], torch.zeros_like(y[:2]), torch.ones_like(y[:1])))), seeded())
    with pytest.raises(ShapeError, match=r"\(5, 2, 3, 2\).*\('n', 2, 3, 3\)"):
        kind()(sites, Batch(y[..., :2]), seeded())
    with pytest.raises(ShapeError, match="2 classes or more"):
        kind()(one_class(), Batch(x[..., :1]), seeded())
    with pytest.raises(ArgumentTypeError, match="int64"):
        kind()(bits, Batch(x.long()), seeded())
    with pytest.raises(ShapeError, match="squeeze"):
        kind()(Energy.of(lambda x: x.sum(1, keepdim=True), support=constraints.boolean), Batch(x.flatten(1)), seeded())
    with pytest.raises(DomainError, match="outside the energy's domain"):
        gb.fit(gb.MLP((2, 3)) + gb.Bernoulli(torch.zeros(2, 3)), x.float() + 0.3, kind(), rng=seeded(), steps=1)


def one_class():
    return Energy.of(lambda x: x.flatten(1).sum(1), support=constraints.one_hot)
