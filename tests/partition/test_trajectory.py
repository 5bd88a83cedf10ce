"""log Z along a path of parameters: exact values within the stated error, which is neither too large nor too small."""

import copy
import warnings

import pytest
import torch

import gibbsian as gb
from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.grids import states
from gibbsian.errors import DivergenceError, OptionError, ShapeError
from gibbsian.kernels.layers import RBMGibbs
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import PersistentContrastiveDivergence
from gibbsian.partition import trajectory as module
from gibbsian.partition.boltzmann import exact_log_z
from gibbsian.partition.trajectory import trajectory

D = 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def machines(count=4, size=0.6):
    """A machine that moves along a straight line of parameters, from independent units."""
    energy = RBM(D, 3, weight_scale=0.0).double()
    way = [torch.randn(p.shape, generator=seeded(1), dtype=torch.float64) for p in energy.parameters()]
    found = []
    for t in range(count):
        with torch.no_grad():
            for p, w in zip(energy.parameters(), way):
                p.copy_(size * t * w)
        found.append(copy.deepcopy(energy))
    return found


LISTED = states(torch.Size((D,)), RBM(D, 1).support, torch.zeros(1, dtype=torch.float64))


def exact_draws(energy, n, rng):
    law = (-energy(LISTED).detach()).softmax(0)
    return LISTED[torch.multinomial(law, n, replacement=True, generator=rng)]


def truth(energies):
    return torch.stack([exact_log_z(e).value for e in energies])


def z_scores(repeats=24, chains=60, persistent=False):
    """``(repeats, T)`` differences from the truth in units of the stated error."""
    energies, rng, found = machines(), seeded(7), []
    exact = truth(energies)
    for _ in range(repeats):
        draws = [exact_draws(e, chains, rng) for e in energies]
        if persistent:
            # The same chains all along, hardly moved: the model changes under them, half of each stays.
            u = torch.rand((chains, 1), generator=rng, dtype=torch.float64)
            laws = [(-e(LISTED).detach()).softmax(0).cumsum(0) for e in energies]
            draws = [LISTED[torch.searchsorted(law, u[:, 0]).clamp(max=len(law) - 1)] for law in laws]
        path = trajectory(energies, draws, start=float(exact[0]))
        found.append((path.value - exact)[1:] / path.stderr[1:])
    return torch.stack(found)


@pytest.mark.parametrize("persistent", [False, True])
def test_errors_are_as_stated(persistent):
    """Also of chains that are the same all along. The spread of 24 scores is known to a seventh."""
    z = z_scores(persistent=persistent)
    assert float(z.mean(0).abs().max()) < 1.0
    assert 0.55 < float(z.std(0).min()) <= float(z.std(0).max()) < 1.7


@pytest.mark.parametrize("twin", ["other way round", "one bridge's error"])
def test_slips_are_seen(twin, monkeypatch):
    if twin == "other way round":
        real = module.bridge
        monkeypatch.setattr(module, "bridge", lambda e, b, x, y: real(b, e, y, x))
        assert float(z_scores(5).mean(0).abs().max()) > 5.0
        return
    # Errors of steps as if they were independent, of chains that are the same all along, miss how steps add up.
    cumsum, calls = torch.Tensor.cumsum, []

    def alone(self, dim):
        calls.append(self.ndim)
        return self if self.ndim == 2 else cumsum(self, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", alone)
    assert float(z_scores(20, persistent=True).std(0)[-1]) > 1.7


def test_along_a_short_training_run():
    """A machine of 8 visible units is trained by PCD; log Z of every snapshot, within 5 of its errors."""
    d, rng = 8, seeded(2)
    data = torch.cat((torch.ones(60, d), torch.zeros(40, d))).double()
    flips = torch.rand(data.shape, generator=rng, dtype=torch.float64) < 0.15
    data = torch.where(flips, 1.0 - data, data)
    energy = RBM(d, 3, rng=seeded(3)).double()
    objective = PersistentContrastiveDivergence(
        RBMGibbs(), energy.base(data), steps=2, buffer_size=400, restart=0.0
    ).double()
    optimiser = torch.optim.SGD(energy.parameters(), 0.05)
    snapshots, draws = [], []
    for step in range(81):
        optimiser.zero_grad()
        objective(energy, Batch(data.repeat(4, 1)), rng).value.backward()
        if step % 20 == 0:
            snapshots.append(copy.deepcopy(energy))
            draws.append(gb.sample(energy, RBMGibbs(), objective.buffer.positions, steps=5, rng=rng).x)
        optimiser.step()
    exact = truth(snapshots)
    path = trajectory(snapshots, draws, start=exact_log_z(snapshots[0]))
    assert float((exact[-1] - exact[0]).abs()) > 20 * float(path.stderr[-1]), "no power"
    assert float(path.stderr[-1]) < 0.1
    assert bool(((path.value - exact).abs()[1:] < 5 * path.stderr[1:]).all())
    last = path.log_z()
    assert float(last.value) == float(path.value[-1])
    assert float(last.ess) == float(path.ess.min()) > 40
    assert last.chains == 5 * 400
    assert path.log_z(0) == path.start
    assert not torch.isfinite(last.upper)


def test_the_start_counts():
    energies = machines(3)
    draws = [exact_draws(e, 50, seeded(k)) for k, e in enumerate(energies)]
    plain = trajectory(energies, draws)
    known = exact_log_z(energies[0])._replace(stderr=torch.tensor(0.5, dtype=torch.float64))
    shifted = trajectory(energies, draws, start=known)
    torch.testing.assert_close(shifted.value, plain.value + known.value)
    torch.testing.assert_close(shifted.stderr, (plain.stderr.square() + 0.25).sqrt())
    # Draws of chains over time are as many more.
    longer = trajectory(energies, [exact_draws(e, 4 * 50, seeded(9)).view(4, 50, D) for e in energies])
    assert float(longer.stderr[-1]) < 0.8 * float(plain.stderr[-1])


def test_steps_that_are_too_long_are_told_loudly():
    near, far = RBM(D, 1, weight_scale=0.0).double(), RBM(D, 1, weight_scale=0.0).double()
    with torch.no_grad():
        near.visible_bias.fill_(-12.0)
        far.visible_bias.fill_(12.0)
    draws = [exact_draws(e, 50, seeded()) for e in (near, near, far)]
    with pytest.warns(RuntimeWarning, match=r"snapshots 1 and 2 the models hardly overlap: 100 draws .*1 of 2 steps"):
        path = trajectory([near, near, far], draws)
    assert float(path.log_z(1).ess) > 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectory([near, near], draws[:2])


@pytest.mark.parametrize(
    ("energies", "draws", "error", "message"),
    [
        (1, [(50, D)], OptionError, "Two snapshots or more.* got 1 and draws of 1"),
        (2, [(50, D)], OptionError, "got 2 and draws of 1"),
        (2, [(50, D), (19, D)], OptionError, "20 or more for each snapshot; got 19"),
        (2, [(50, D), (50, D + 1)], ShapeError, "state 1 have shape"),
    ],
)
def test_what_does_not_fit_is_refused(energies, draws, error, message):
    with pytest.raises(error, match=message):
        trajectory(machines(energies), [torch.zeros(s, dtype=torch.float64) for s in draws])


def test_energies_that_are_not_finite_are_refused():
    broken = gb.Energy.of(lambda x: x[:, 0] / 0.0, (D,))
    with pytest.raises(DivergenceError, match="not finite"):
        trajectory([broken, broken], [torch.ones(50, D)] * 2)
