"""PT-PCD: where plain persistent chains stay in one mode, its gradient is the exact one."""

import signal

import pytest
import torch

import gibbsian as gb
from gibbsian.buffers import ReplayBuffer
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.grids import states
from gibbsian.energies.pairwise import Ising
from gibbsian.errors import OptionError, ShapeError, TrainingInterrupted
from gibbsian.kernels.gibbs import BlockGibbs, SingleSiteGibbs
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.kernels.path_tempering import PathTempering
from gibbsian.kernels.tempering import ParallelTempering
from gibbsian.objectives import replicas
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.starts import Starts
from gibbsian.partition.boltzmann import MachineRungs
from recovery import seeded

D, CHAINS = 8, 50
LADDER = (1.0, 0.75, 0.55, 0.4, 0.28, 0.18, 0.08)


def ferromagnet():
    """Two modes of equal mass, up and down, behind a barrier of 17 nats; a little field on one spin."""
    energy = Ising(0.45 * (torch.ones(D, D) - torch.eye(D)).double(), trainable=True)
    with torch.no_grad():
        energy.field[0] = 0.2
    return energy


def two_sided():
    """A machine whose hidden units all side with all visible ones, or against."""
    energy = RBM(D, 2, rng=seeded()).double()
    with torch.no_grad():
        energy.weight.fill_(3.0)
        energy.visible_offset.fill_(0.5)
        energy.hidden_offset.fill_(0.5)
        energy.visible_bias[0] = 0.3
    return energy


def up():
    """Chains start in one of the modes."""
    return gb.Bernoulli(logits=torch.full((D,), 6.0, dtype=torch.float64))


def plain(energy):
    return RBMGibbs() if isinstance(energy, RBM) else BlockGibbs()


def tempering(energy, base):
    if isinstance(energy, RBM):
        return PathTempering(RBMGibbs(), (*LADDER[:-1], 0.0), MachineRungs(energy.base()))
    return ParallelTempering(BlockGibbs(), LADDER)


def exact_gradient(energy, data):
    """Of the negative log-likelihood, by listing all states."""
    listed = states(torch.Size((D,)), energy.support, data)
    loss = energy(data).mean() + (-energy(listed)).logsumexp(0)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(energy.parameters()))])


def gradients(energy, kernel, data, rounds=220, skip=60):
    """Gradients of rounds with the parameters held, ``(rounds - skip, k)``, and the objective."""
    objective = PersistentContrastiveDivergence(kernel, up(), steps=1, buffer_size=CHAINS, restart=0.0).double()
    rng, found = seeded(5), []
    for _ in range(rounds):
        value = objective(energy, Batch(data), rng).value
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(energy.parameters()))]))
    return torch.stack(found[skip:]), objective


def z_scores(found, exact, parts=8):
    """Means of blocks of rounds are nearly independent; t statistics of 7 degrees of freedom."""
    blocks = torch.stack([part.mean(0) for part in found.chunk(parts)])
    error = blocks.std(0) / parts**0.5
    return (blocks.mean(0) - exact) / error.clamp(min=1e-3), error


MODELS = {"ferromagnet": ferromagnet, "machine": two_sided}


@pytest.mark.parametrize("name", MODELS)
def test_its_gradient_is_the_exact_one_and_that_of_pcd_is_not(name):
    """Data are drawn from the model, so that the exact gradient is small; PCD's is off by a mode."""
    energy = MODELS[name]()
    listed = states(torch.Size((D,)), energy.support, energy(torch.zeros(1, D).double()).detach())
    law = (-energy(listed).detach()).softmax(0)
    data = listed[torch.multinomial(law, CHAINS, replacement=True, generator=seeded(1))]
    exact = exact_gradient(energy, data)
    found, objective = gradients(energy, tempering(energy, up()), data)
    z, error = z_scores(found, exact)
    assert float(error.max()) < 0.1, "no power"
    # Once in 1e5 for each of some 40, which are nearly one.
    assert float(z.abs().max()) < 10.0, f"missed: z = {z.tolist()}"
    means = objective.buffer.positions.mean(1)
    assert 0.1 < float((means > 0.5).double().mean()) < 0.9
    stuck, twin = gradients(energy, plain(energy), data, rounds=60, skip=20)
    assert float((stuck.mean(0) - exact).abs().max()) > 0.3
    assert float((twin.buffer.positions.mean(1) > 0.5).double().mean()) > 0.95
    rates = objective.exchange.swap_rates
    assert float(rates.min()) > 0.1
    assert float(rates.max()) < 1.0


def test_a_ladder_that_never_swaps_is_the_broken_twin(monkeypatch):
    """Without swaps the chains stay; replicas that were put back at the target's point every round would, too."""
    energy = ferromagnet()
    data = torch.cat((torch.ones(25, D), torch.zeros(25, D))).double()
    real = ParallelTempering._order

    def never(self, r, uniform):
        return real(self, r, torch.ones_like(uniform))

    monkeypatch.setattr(ParallelTempering, "_order", never)
    _, objective = gradients(energy, tempering(energy, up()), data, rounds=60, skip=10)
    assert float(objective.buffer.positions.mean(1).min()) > 0.5
    monkeypatch.undo()
    run = replicas.Exchange.run

    def forgetful(self, energy, kernel, points, *rest):
        return run(self, energy, kernel, points[:, :1].expand_as(points), *rest)

    monkeypatch.setattr(replicas.Exchange, "run", forgetful)
    _, objective = gradients(energy, tempering(energy, up()), data, rounds=60, skip=10)
    assert float((objective.buffer.positions.mean(1) > 0.5).double().mean()) > 0.9


def test_every_pair_has_its_turn_and_rates_are_told():
    energy = ferromagnet()
    objective = PersistentContrastiveDivergence(
        ParallelTempering(BlockGibbs(), LADDER), up(), steps=1, buffer_size=CHAINS, restart=0.2
    ).double()
    data, rng = torch.ones(20, D, dtype=torch.float64), seeded()
    first = objective(energy, Batch(data), rng).metrics
    assert [float(first[f"swap_{k}"]) > 0 for k in range(6)] == [True, False] * 3
    second = objective(energy, Batch(data), rng).metrics
    assert all(0 < float(second[f"swap_{k}"]) <= 1 for k in range(6))
    assert float(second["swap_min"]) == min(float(second[f"swap_{k}"]) for k in range(6))
    assert objective.exchange.time == 2
    assert objective.buffer.hot.shape == (CHAINS, 6, D)
    # Of one step the even pairs have turns, of the next the odd ones; a pair alone has all.
    kernel = ParallelTempering(BlockGibbs(), LADDER[:3])
    assert [kernel.turns(t, n) for t, n in ((0, 1), (1, 1), (0, 3), (1, 3))] == [[1, 0], [0, 1], [2, 1], [1, 2]]
    assert ParallelTempering(BlockGibbs(), LADDER[:2]).turns(1, 3) == [3]


@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_run_goes_on_exactly_with_its_ladder(name, tmp_path):
    data = torch.cat((torch.ones(16, D), torch.zeros(16, D))).double()

    def run(folder, ladder=None, stop=None, resume=False):
        energy = MODELS[name]()
        kernel = tempering(energy, up())
        if ladder is not None:
            kernel = type(kernel)(kernel.kernel, ladder, *((kernel.path,) if isinstance(energy, RBM) else ()))
        objective = PersistentContrastiveDivergence(kernel, up(), steps=1, buffer_size=32, restart=0.1).double()

        def look(record):
            if record.get("step") == stop:
                signal.raise_signal(signal.SIGINT)

        options = {"batch_size": 16, "warmup_steps": 0, "learning_rate": 1e-2, "log_every": 1, "health": False}
        gb.fit(
            energy, data, objective, steps=8, rng=seeded(4), folder=folder, resume=resume, callbacks=[look], **options
        )
        return objective, energy

    whole, weights = run(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "cut", stop=5)
    # The saved ladder is the run's; the one given to resume with takes no effect.
    other = torch.linspace(1.0, 0.1, len(LADDER), dtype=torch.float64)
    parts, again = run(tmp_path / "cut", ladder=other, resume=True)
    assert torch.equal(parts.exchange.betas, whole.exchange.betas)
    assert parts.exchange.time == whole.exchange.time == 8
    assert torch.equal(parts.buffer.hot, whole.buffer.hot)
    assert torch.equal(parts.exchange.swap_rates, whole.exchange.swap_rates)
    for a, b in zip(weights.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_a_buffer_of_replicas_keeps_them_in_their_slots():
    base = gb.Bernoulli(logits=torch.zeros(3))
    buffer, rng = ReplayBuffer(base, 10, restart=0.0, replicas=4), seeded()
    slots = buffer.draw(6, rng)
    assert slots.hot.shape == (6, 3, 3)
    hot = slots.hot + 2.0
    buffer.write(slots, slots.x, 1, hot)
    assert torch.equal(buffer.hot[slots.index], hot)
    rest = [i for i in range(10) if i not in slots.index.tolist()]
    assert float(buffer.hot[rest].max()) <= 1.0
    with pytest.raises(ShapeError, match=r"Replicas of shape \(6, 3, 3\) were drawn; None"):
        buffer.write(slots, slots.x, 1)
    other = ReplayBuffer(base, 10, restart=0.0, replicas=4)
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.hot, buffer.hot)
    assert repr(buffer).startswith("ReplayBuffer(\n  size=10, restart=0.0, replicas=4")
    # All replicas of a chain restart with it, from the base or at a row of data.
    buffer.restart = 1.0
    assert float(buffer.draw(6, rng).hot.max()) <= 1.0
    buffer.restart = 0.0
    anew = buffer.draw(6, rng, data=torch.full((2, 3), 7.0), from_data=1.0)
    assert torch.equal(anew.hot, torch.full((6, 3, 3), 7.0))
    with pytest.raises(OptionError, match="replicas counts those of each chain, 1 or more; got 0"):
        ReplayBuffer(base, 10, replicas=0)


def test_contrastive_divergence_with_a_buffer_keeps_replicas_too():
    kernel, starts = ParallelTempering(BlockGibbs(), LADDER[:3]), Starts(data=0.5, buffer=0.5)
    objective = ContrastiveDivergence(kernel, starts=starts, base=up(), buffer_size=20).double()
    data = torch.zeros(10, D, dtype=torch.float64)
    loss = objective(ferromagnet(), Batch(data), seeded())
    assert "swap_1" in loss.metrics
    assert ContrastiveDivergence(kernel).exchange is None


def test_labels_go_with_chains_level_by_level():
    """Of a conditional energy: replicas of a chain share its label; one batch of all replicas cannot."""

    def fn(x, y):
        return -(4.0 * (2.0 * y - 1.0).unsqueeze(1) * x).sum(1)

    energy = gb.Energy.of(fn, (D,), up().support, ("y",)) + gb.Bernoulli(logits=torch.zeros(D).double())
    y = torch.tensor([0.0, 1.0]).double().repeat(10)
    data = y.unsqueeze(1).expand(-1, D).contiguous()

    def objective(kernel):
        base = gb.Bernoulli(logits=torch.zeros(D).double())
        return PersistentContrastiveDivergence(kernel, base, steps=5, buffer_size=20, restart=0.0).double()

    along = objective(PathTempering(SingleSiteGibbs(D), LADDER[:3], lambda e, beta: beta * e))
    for _ in range(5):
        along(energy, Batch(data, {"y": y}), seeded(3))
    labels = along.buffer.context["y"]
    # At log-odds of 4 a site differs from its label once in 56.
    assert float((along.buffer.positions - labels.unsqueeze(1)).abs().mean()) < 0.1
    with pytest.raises(OptionError, match="walks level by level"):
        objective(ParallelTempering(SingleSiteGibbs(D), LADDER[:3]))(energy, Batch(data, {"y": y}), seeded())
