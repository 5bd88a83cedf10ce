"""Joint training of deep machines: gradients against those of enumerated sums, centring, recovery, runs of fit."""

import copy

import pytest
import torch

from contracts import seeded
from deep_machines import deep, evens, joint, listed, summed
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.deep import DeepBoltzmannMachine
from gibbsian.energies.mean_field import MeanFieldEnergy
from gibbsian.errors import ArgumentTypeError, DomainError, OptionError, ShapeError
from gibbsian.objectives.base import Batch
from gibbsian.objectives.mean_field import MeanFieldPCD, deep_machine
from gibbsian.partition.boltzmann import exact_log_z
from gibbsian.partition.deep import exact_deep_log_likelihood
from gibbsian.training.fit import fit
from machines import everywhere

KINDS = ["two", "three", "spins", "classes"]


def slopes(value, machine):
    return torch.autograd.grad(value, list(machine.parameters()))


def factorised(name):
    """A machine whose hidden layers are independent given the data, so that mean field is exact."""
    machine = deep(name)
    with torch.no_grad():
        for w in list(machine.weights)[1:]:
            w.zero_()
    return machine


def rows_of(machine, n=12):
    v = everywhere(machine.visible)[0]
    return v[torch.randint(len(v), (n,), generator=seeded(4))]


def by_hand(machine, rows, chains):
    """Exact mean free energy of the rows less that of the chains' even layers, by sums over all states."""
    energies = joint(machine)
    v, even = listed(machine)[0][0], [x.flatten(1) for x in listed(machine)[0][::2]]
    place = (v[None].flatten(2) == rows[:, None].flatten(2)).all(2).long().argmax(1)
    pieces = chains.split([x.shape[1] for x in even], 1)
    index = tuple((x[None] == piece[:, None]).all(2).long().argmax(1) for x, piece in zip(even, pieces))
    return summed(energies, (0,))[place].mean() - summed(energies, evens(machine))[index].mean()


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_enumerated_sums(name):
    machine = factorised(name)
    rows = rows_of(machine)
    objective = MeanFieldPCD(machine, buffer_size=len(rows), iterations=20)
    loss = objective(MeanFieldEnergy(machine), Batch(rows), seeded(1))
    exact = slopes(by_hand(machine, rows, objective.chains.positions), machine)
    for own, due in zip(slopes(loss.value, machine), exact):
        torch.testing.assert_close(own, due, rtol=0, atol=1e-10)


def test_the_twin_whose_posterior_hears_the_data_twice_is_caught():
    """As a machine of a stack does."""
    machine = factorised("two")
    rows = rows_of(machine)
    objective = MeanFieldPCD(machine, buffer_size=len(rows))
    loss = objective(machine, Batch(rows), seeded(1))
    exact = slopes(by_hand(machine, rows, objective.chains.positions), machine)
    twin = copy.deepcopy(machine)
    with torch.no_grad():
        twin.weights[0].mul_(2.0)
    wrong = slopes(by_hand(twin, rows, objective.chains.positions), twin)
    assert max(float((a - b).abs().max()) for a, b in zip(slopes(loss.value, machine), wrong)) > 1e-3
    assert max(float((a - b).abs().max()) for a, b in zip(exact, wrong)) > 1e-3


@pytest.mark.parametrize("name", ["two", "three"])
def test_the_mean_gradient_from_the_models_own_chains_is_the_likelihoods(name):
    machine = factorised(name)
    rows = rows_of(machine, 2000)
    v, log_z = everywhere(machine.visible)[0], torch.logsumexp(-joint(machine).flatten(), 0)
    share = (v[None] == rows[:, None]).all(2).double().mean(0)
    exact = torch.cat([g.flatten() for g in slopes(share @ summed(joint(machine), (0,)) + log_z, machine)])
    law = summed(joint(machine), evens(machine)).flatten().neg().softmax(0).detach()
    states = torch.cat([x.flatten(1)[i] for x, i in zip(listed(machine)[0][::2], even_index(machine))], 1)
    found = []
    for i in range(30):
        objective = MeanFieldPCD(machine, buffer_size=len(rows), steps=1)
        objective.chains.fill(seeded())
        drawn = torch.multinomial(law, len(rows), replacement=True, generator=seeded(50 + i))
        objective.chains.positions = states[drawn]
        found.append(
            torch.cat([g.flatten() for g in slopes(objective(machine, Batch(rows), seeded(i)).value, machine)])
        )
    found = torch.stack(found)
    t = (found.mean(0) - exact) / (found.std(0) / 30**0.5).clamp(min=1e-12)
    # 30 replicates: beyond 8 about once in 1e8 per parameter.
    assert float(t.abs().max()) < 8.0


def even_index(machine):
    counts = [len(x) for x in listed(machine)[0][::2]]
    return torch.cartesian_prod(*[torch.arange(n) for n in counts]).T


def test_offsets_follow_the_means_and_the_density_stays():
    machine = deep("three")
    rows = rows_of(machine)
    objective = MeanFieldPCD(machine, buffer_size=len(rows), rate=0.5)
    before, offset = joint(machine).detach().flatten().neg().log_softmax(0), machine.even_offset.clone()
    objective(machine, Batch(rows), seeded())
    torch.testing.assert_close(joint(machine).detach().flatten().neg().log_softmax(0), before, rtol=0, atol=1e-10)
    torch.testing.assert_close(machine.even_offset[:2], 0.5 * (offset[:2] + rows.mean(0)))
    now = machine.odd_offset.clone()
    with torch.no_grad():
        objective(machine, Batch(rows), seeded())
    objective.eval()(machine, Batch(rows), seeded())
    torch.testing.assert_close(machine.odd_offset, now, rtol=0, atol=0)


def planted():
    """Bits in two groups that agree within, and rows of them."""
    rng = seeded(7)
    rows = torch.randint(2, (4000, 2), generator=rng).repeat_interleave(3, 1).float()
    return torch.where(torch.rand(rows.shape, generator=rng) < 0.08, 1.0 - rows, rows)


def test_training_from_nothing_comes_close_to_the_truth():
    rows = planted()
    machine = DeepBoltzmannMachine(6, [4, 3], weight_scale=0.05, rng=seeded())
    machine.start_at(rows)
    start = float(exact_deep_log_likelihood(machine, rows[:1000]).mean())
    objective = MeanFieldPCD(machine, rows, steps=2, buffer_size=200, iterations=5, rate=0.01)
    done = fit(
        MeanFieldEnergy(machine, 5), rows, objective, steps=500, batch_size=200, learning_rate=0.02, rng=seeded(1)
    )
    assert not done.events
    found = float(exact_deep_log_likelihood(machine, rows[:1000]).mean())
    groups = rows.view(-1, 2, 3)
    logs = torch.stack([torch.where(groups == bit, 0.92, 0.08).log().sum(2) for bit in (0.0, 1.0)])
    best = float((torch.logsumexp(logs, 0) - torch.tensor(2.0).log()).sum(1)[:1000].mean())
    assert start < best - 0.8
    assert found > best - 0.1, f"{start:.3f} to {found:.3f}, best {best:.3f}"


def test_a_saved_objective_goes_on_with_the_same_chains():
    machine = deep("two")
    rows = rows_of(machine)
    one, other = (MeanFieldPCD(machine, buffer_size=len(rows)) for _ in range(2))
    one(machine, Batch(rows), seeded(1))
    other.load_state_dict(one.state_dict())
    losses = [float(each(machine, Batch(rows), seeded(2)).value.detach()) for each in (one, other)]
    assert losses[0] == losses[1]
    assert "mean_field_change" in one(machine, Batch(rows), seeded(3)).metrics


def test_what_does_not_fit():
    machine = deep("two")
    rows = rows_of(machine)
    with pytest.raises(ArgumentTypeError, match="trains a DeepBoltzmannMachine"):
        MeanFieldPCD(RBM(3, 2))
    with pytest.raises(ArgumentTypeError, match=r"MeanFieldEnergy\(machine\)"):
        MeanFieldPCD(machine)(RBM(3, 2).double(), Batch(rows), seeded())
    with pytest.raises(ArgumentTypeError, match="fits a DeepBoltzmannMachine"):
        deep_machine(machine + machine.base())
    for wrong, said in (
        ({"steps": 0}, "steps"),
        ({"iterations": 0}, "1 iteration"),
        ({"rate": 1.5}, "sliding factor"),
        ({"buffer_size": 0}, "1 chain"),
    ):
        with pytest.raises(OptionError, match=said):
            MeanFieldPCD(machine, **wrong)
    with pytest.raises(OptionError, match="Cannot draw 12 different chains"):
        MeanFieldPCD(machine, buffer_size=5)(machine, Batch(rows), seeded())
    with pytest.raises(ShapeError):
        MeanFieldPCD(machine)(machine, Batch(rows[:, :2]), seeded())
    with pytest.raises(DomainError, match=r"4 of 4 rows of data lie outside the energy's domain, Boolean"):
        fit(MeanFieldEnergy(machine), torch.full((4, 3), 0.3), MeanFieldPCD(machine), steps=1, rng=seeded())
    assert exact_log_z(machine).ess > 0
