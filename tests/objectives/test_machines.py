"""Contrastive divergence on Boltzmann machines: exact gradients, recovery, centring, and runs of fit."""

import copy
import signal

import pytest
import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.joined_units import JoinedUnits
from gibbsian.energies.real_units import GaussianUnits
from gibbsian.energies.units import BernoulliUnits, CategoricalUnits, SpinUnits
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, TrainingInterrupted
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Batch, Objective
from gibbsian.objectives.centring import Centred
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.exact import ExactLikelihood
from gibbsian.partition.boltzmann import exact_log_likelihood
from machines import alternation, everywhere, machine, randomised, table

KINDS = [("bernoulli", "bernoulli"), ("spin", "relu"), ("categorical", "spin")]


def gradient(loss, energy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(energy.parameters()))])


def drawn(energy, law, n, seed):
    v = everywhere(energy.visible)[0]
    return v[torch.multinomial(law, n, replacement=True, generator=seeded(seed))]


def assert_mean_gradient(make, energy, data, exact, replicates=40, limit=9.0):
    """Gradients of repeated rounds have the mean ``exact``: 40 replicates, |t| beyond 9 once in 2e10 per parameter."""
    rows = torch.stack(
        [gradient(make()(energy, Batch(data), seeded(100 + i)).value, energy) for i in range(replicates)]
    )
    error = rows.std(0) / replicates**0.5
    t = (rows.mean(0) - exact) / error.clamp(min=1e-12)
    assert float(t.abs().max()) < limit, f"missed: t = {t.tolist()}"


@pytest.mark.parametrize("pair", KINDS, ids="-".join)
def test_the_gradient_of_cd_is_that_of_its_transition_matrix(pair):
    """CD-3 in expectation: energies of data minus those of what three steps make of them; one step is told apart."""
    energy, v, data = cd_case(pair)
    batch = drawn(energy, data, 4000, 1)
    share, step = (v[None].flatten(2) == batch[:, None].flatten(2)).all(2).double().mean(0), step_of(energy)
    three, one = (gradient((share - share @ step.matrix_power(k)) @ energy(v), energy) for k in (3, 1))
    assert_mean_gradient(lambda: ContrastiveDivergence(RBMGibbs(), steps=3), energy, batch, three)
    with pytest.raises(AssertionError, match="missed"):
        assert_mean_gradient(lambda: ContrastiveDivergence(RBMGibbs(), steps=3), energy, batch, one)


@torch.no_grad()
def step_of(energy):
    h, log_w = everywhere(energy.hidden)
    return alternation(table(energy, everywhere(energy.visible)[0], h) - log_w)


def cd_case(pair):
    energy = machine(*pair, scale=0.8)
    v = everywhere(energy.visible)[0]
    data = torch.rand(len(v), generator=seeded(3), dtype=torch.float64)
    return energy, v, data / data.sum()


@pytest.mark.parametrize("pair", KINDS, ids="-".join)
def test_the_gradient_of_pcd_from_the_models_draws_is_the_likelihoods(pair):
    energy, v, data = cd_case(pair)
    batch = drawn(energy, data, 2000, 1)
    exact = gradient(ExactLikelihood()(energy, Batch(batch), seeded()).value, energy)
    law, seeds = (-energy(v)).softmax(0).detach(), iter(range(1000))

    def make():
        objective = PersistentContrastiveDivergence(RBMGibbs(), energy.base(), steps=1, buffer_size=2000, restart=0.0)
        objective.buffer.fill(seeded())
        objective.buffer.positions = drawn(energy, law, 2000, 5000 + next(seeds))
        return objective

    assert_mean_gradient(make, energy, batch, exact)


def trained(objective, energy, data, steps=300, rate=0.05):
    optimiser, rng = torch.optim.SGD(energy.parameters(), rate), seeded(1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate / (1 + 4 * step / steps)
        optimiser.zero_grad()
        objective(energy, Batch(data), rng).value.backward()
        optimiser.step()


@pytest.mark.parametrize("centred", [False, True])
def test_pcd_finds_a_planted_machine(centred):
    """Its hidden units may come in any order; its likelihood on the data is that of the truth, to 0.02 nats."""
    truth = randomised(RBM(5, 2), seed=3, scale=1.8)
    v = everywhere(truth.visible)[0]
    data = drawn(truth, (-truth(v)).softmax(0).detach(), 1500, 4)
    energy = RBM(5, 2, rng=seeded(5), weight_scale=0.3).double()
    objective = PersistentContrastiveDivergence(RBMGibbs(), energy.base(), steps=2, buffer_size=1500, restart=0.0)
    if centred:
        energy.start_at(data)
    before = float(exact_log_likelihood(energy, data).mean())
    trained(Centred(objective, 0.05) if centred else objective, energy, data, rate=0.4)
    after, best = (float(exact_log_likelihood(e, data).mean()) for e in (energy, truth))
    print(f"before {before:.4f}, after {after:.4f}, truth {best:.4f}")
    assert after > best - 0.02
    assert before < best - 0.05


def test_offsets_follow_the_data_and_the_density_does_not_move():
    energy = machine("bernoulli", "spin")
    v = everywhere(energy.visible)[0]
    data = drawn(energy, torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]).double(), 500, 1)
    before = (-energy(v)).log_softmax(0).detach()
    old = energy.visible_offset.clone()
    objective = Centred(ContrastiveDivergence(RBMGibbs()), rate=0.25)
    with torch.no_grad():
        objective(energy, Batch(data), seeded())
        assert torch.equal(energy.visible_offset, old), "an evaluation moves nothing"
    loss = objective(energy, Batch(data), seeded())
    torch.testing.assert_close(energy.visible_offset, old + 0.25 * (data.mean(0) - old))
    torch.testing.assert_close((-energy(v)).log_softmax(0), before)
    assert {"energy_data", "energy_samples", "gap", "acceptance", "nonfinite", "moved"} <= loss.metrics.keys()
    # The gradient is that of the centred machine: the gap of covariances around the offsets.
    samples_seed = copy.deepcopy(energy)
    inner = ContrastiveDivergence(RBMGibbs())
    a = gradient(inner(samples_seed, Batch(data), seeded()).value, samples_seed)
    torch.testing.assert_close(gradient(loss.value, energy), a)


def test_offsets_may_follow_the_chains_too():
    energy = machine("bernoulli", "bernoulli")
    data = drawn(energy, torch.full((8,), 0.125).double(), 300, 1)
    persistent = PersistentContrastiveDivergence(RBMGibbs(), energy.base(), steps=1, buffer_size=300, restart=0.0)
    objective = Centred(persistent, rate=1.0, chains=0.5)
    objective(energy, Batch(data), seeded())
    chains = persistent.buffer.positions.clone()
    objective(energy, Batch(data), seeded())
    torch.testing.assert_close(energy.visible_offset, 0.5 * (data.mean(0) + chains.mean(0)))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: RBM((2, 3), 3, rng=seeded()), "bits"),
        (lambda: RBM(SpinUnits(6), 3, rng=seeded()), "bits"),
        (lambda: RBM(CategoricalUnits(3, classes=4), 3, rng=seeded()), "classes"),
        (lambda: RBM(GaussianUnits(6, scale=torch.ones(6)), 3, rng=seeded()), "reals"),
        (lambda: RBM(JoinedUnits((BernoulliUnits(4), CategoricalUnits(1, classes=3))), 3, rng=seeded()), "joined"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounds_are_reproducible_and_fit_runs(make, kind, dtype):
    energy = make().to(dtype)
    data = energy.base().sample(64, seeded(2))
    if kind == "bits":
        data[:, ..., -1] = data[:, ..., 0]
    energy.start_at(data)
    losses = [
        ContrastiveDivergence(RBMGibbs(), steps=2)(energy, Batch(data), seeded(3)).value.detach() for _ in range(2)
    ]
    assert torch.equal(*losses)
    persistent = PersistentContrastiveDivergence(RBMGibbs(), energy.base(data), steps=1, buffer_size=64).to(dtype)
    fit = gb.fit(energy, data, Centred(persistent), steps=5, rng=seeded(4), batch_size=32)
    assert all(bool(torch.isfinite(p).all()) for p in energy.parameters())
    assert fit is not None
    again = make().to(dtype)
    again.load_state_dict(energy.state_dict())
    assert torch.equal(again(data), energy(data))


class Interrupting(Objective):
    """Its inner objective, with the user's interrupt at one call."""

    def __init__(self, objective, call=None):
        super().__init__()
        self.objective, self.left = objective, call

    def forward(self, energy, batch, rng):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self.objective(energy, batch, rng)


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    """Offsets, chains and weights are all in the checkpoint."""

    def run(folder, resume=False, call=None):
        energy = RBM(6, 3, rng=seeded())
        data = torch.bernoulli(torch.rand(64, 6, generator=seeded(1)), generator=seeded(2))
        objective = Centred(PersistentContrastiveDivergence(RBMGibbs(), energy.base(), steps=1, buffer_size=64), 0.1)
        options = {"batch_size": 32, "warmup_steps": 0, "learning_rate": 1e-2, "resume": resume}
        gb.fit(energy, data, Interrupting(objective, call), steps=12, rng=seeded(4), folder=folder, **options)
        return energy

    whole = run(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted, match="resume=True"):
        run(tmp_path / "cut", call=5)
    parts = run(tmp_path / "cut", resume=True)
    assert float(whole.visible_offset.abs().min()) > 0.0
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(a, b)


class Noting(Objective):
    """Note the parameters that the machine would have at offsets of 0, and as they are, before each step."""

    def __init__(self, objective):
        super().__init__()
        self.objective, self.at_zero, self.as_they_are = objective, [], []

    def note(self, energy):
        w, b, c = (p.detach().clone() for p in (energy.weight, energy.visible_bias, energy.hidden_bias))
        self.as_they_are.append((w, b, c))
        self.at_zero.append((w, b - w @ energy.hidden_offset, c - energy.visible_offset @ w))

    def forward(self, energy, batch, rng):
        self.note(energy)
        return self.objective(energy, batch, rng)


def averaged(noted, decay):
    """The average over steps that fit documents."""
    mean = [p.clone() for p in noted[0]]
    for t, parameters in enumerate(noted[1:]):
        d = min(decay, (1 + t) / (10 + t))
        mean = [d * a + (1 - d) * p for a, p in zip(mean, parameters)]
    return mean


@pytest.mark.parametrize("kind", [("bernoulli", "bernoulli"), ("spin", "relu")], ids="-".join)
def test_weights_are_averaged_at_one_pair_of_offsets(kind):
    """Whichever they are: the mean of biases at offsets that moved would be another machine, and is told apart."""
    energy = machine(*kind)
    data = energy.base().sample(300, seeded(2))
    objective = Noting(Centred(ContrastiveDivergence(RBMGibbs()), rate=0.3))
    options = {"optimizer": "sgd", "learning_rate": 0.3, "warmup_steps": 0, "clip_norm": 0.0, "ema_decay": 0.9}
    own = Noting(objective)
    gb.fit(
        energy,
        data,
        objective,
        steps=25,
        rng=seeded(4),
        batch_size=32,
        log_every=1,
        callbacks=[lambda record: own.note(energy) if record.get("step") == 25 else None],
        **options,
    )
    own.note(energy)
    last, found = own.at_zero
    expected = averaged([*objective.at_zero, last], 0.9)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    naive = averaged([*objective.as_they_are, own.as_they_are[0]], 0.9)
    assert float((naive[2] - own.as_they_are[1][2]).abs().max()) > 0.01


def test_averages_of_a_machine_with_a_frozen_bias_leave_it_alone():
    energy = machine("bernoulli", "bernoulli")
    energy.visible_bias.requires_grad_(False)
    before = energy.visible_bias - energy.weight @ energy.hidden_offset
    data = energy.base().sample(100, seeded(2))
    energy.weight.requires_grad_(False)
    gb.fit(energy, data, Centred(ContrastiveDivergence(RBMGibbs()), 0.5), steps=5, rng=seeded(), batch_size=32)
    after = energy.visible_bias - energy.weight @ energy.hidden_offset
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_compiled_rounds_are_the_eager_ones(graphs):
    energy = machine("bernoulli", "spin")
    data = energy.base().sample(20, seeded(2))
    losses = []
    for compile in (False, True):
        graphs()
        persistent = PersistentContrastiveDivergence(
            RBMGibbs(), energy.base(), steps=2, buffer_size=20, restart=0.0, compile=compile
        )
        objective, rng = Centred(persistent, rate=0.1), seeded(3)
        own = copy.deepcopy(energy)
        losses.append(torch.stack([objective(own, Batch(data), rng).value for _ in range(3)]).detach())
    assert graphs() == 1, "offsets that move make no new graph"
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_a_conditional_machine_learns_under_its_labels():
    energy = RBM(4, 2, condition=3, rng=seeded())
    y = torch.randint(0, 3, (300,), generator=seeded(1))
    probs = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.1, 0.9, 0.9, 0.1], [0.1, 0.1, 0.9, 0.9]])
    data = torch.bernoulli(probs[y], generator=seeded(2))
    objective = PersistentContrastiveDivergence(RBMGibbs(), energy.base(), steps=2, buffer_size=300, restart=0.0)
    optimiser, rng = torch.optim.SGD(energy.parameters(), 0.5), seeded(3)
    for _ in range(150):
        optimiser.zero_grad()
        objective(energy, Batch(data, {"y": y}), rng).value.backward()
        optimiser.step()
    for label in range(3):
        found = gb.sample(energy.given(y=label), RBMGibbs(), energy.base().sample(2000, rng), steps=30, rng=rng).x.mean(
            0
        )
        assert float((found - data[y == label].mean(0)).abs().max()) < 0.08


def test_bad_input_is_refused():
    energy = RBM(3, 2, rng=seeded())
    cd = ContrastiveDivergence(RBMGibbs())
    for call, error, message in (
        (lambda: Centred("cd"), ArgumentTypeError, "wraps an objective"),
        (lambda: Centred(cd, rate=1.5), OptionError, "rate lies between 0 and 1; got 1.5"),
        (lambda: Centred(cd, chains=0.5), OptionError, "keeps none; take PersistentContrastiveDivergence"),
        (
            lambda: Centred(cd)(gb.Bernoulli(logits=torch.zeros(3)), Batch(torch.zeros(4, 3)), seeded()),
            ArgumentTypeError,
            "there is none in Bernoulli",
        ),
        (
            lambda: gb.fit(energy, torch.rand(8, 3, generator=seeded()), cd, steps=1, rng=seeded()),
            DomainError,
            "Binarise them",
        ),
        (lambda: cd(energy, Batch(torch.full((4, 3), 0.3)), seeded()), DomainError, "zeros and ones"),
    ):
        with pytest.raises(error, match=message):
            call()
