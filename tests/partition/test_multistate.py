"""Bridge sampling and MBAR on densities of known size: within their own errors, which repeats confirm; broken twins."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from enumeration import binary_system
from gibbsian.energies.base import Energy
from gibbsian.energies.pairwise import Ising
from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import ArgumentTypeError, DivergenceError, OptionError, ShapeError
from gibbsian.kernels.langevin import MALA
from gibbsian.partition import multistate
from gibbsian.partition.enumeration import enumeration
from gibbsian.partition.multistate import Multistate, bridge, mbar
from gibbsian.sampling import sample
from oracles import Z_LIMIT, double_precision

SIZES = (0.0, 3.0, -2.0, 1.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ladder() -> tuple[list[Gaussian], list[Energy]]:
    """Four overlapping Gaussians of the plane; and the same with log Z of SIZES."""
    with double_precision():
        plain = [Gaussian(2, loc=m, scale=s) for m, s in ((0.0, 1.0), (0.8, 0.8), (1.5, 0.9), (1.2, 0.7))]
    return plain, [_raised(g, size) for g, size in zip(plain, SIZES)]


def _raised(energy: Energy, log_z: float) -> Energy:
    return Energy.of(lambda x: energy(x) - log_z, event_shape=energy.event_shape, support=energy.support)


def chains_of(gaussian: Gaussian, draws: int, chains: int, keep: float, rng: torch.Generator) -> Tensor:
    """Stationary autoregressive chains: each draw holds the part ``keep`` of the one before."""
    z = gaussian.sample(draws * chains, rng).reshape(draws, chains, 2) - gaussian.loc
    for t in range(1, draws):
        z[t] = keep * z[t - 1] + math.sqrt(1.0 - keep**2) * z[t]
    return z + gaussian.loc


def assert_covered(values: Tensor, errors: Tensor, truth: float, width: float) -> None:
    """Errors are the spread of repeats, to ``width`` (5.5 of its own errors: 4 false alarms in 10^8), about the truth.

    The mean may lie off by a tenth of the spread, which is the bias that such estimates have at these sizes.
    """
    spread = float(values.std())
    assert abs(spread / float(errors.square().mean().sqrt()) - 1.0) < width, "missed: the errors are not the spread"
    off = abs(float(values.mean()) - truth)
    assert off < Z_LIMIT * spread / math.sqrt(len(values)) + 0.1 * spread, f"missed: off by {off:.3g}"


@pytest.mark.parametrize(("n_base", "n"), [(200, 200), (400, 100)])
def test_bridge_is_right_and_knows_its_error(n_base, n):
    plain, states = ladder()
    rng = generator()
    found = [
        bridge(states[1], plain[0], plain[1].sample(n, rng), plain[0].sample(n_base, rng), base_log_z=2.0)
        for _ in range(250)
    ]
    # The base is said to have log Z 2, so that all is 2 more. The spread of 250 is known to 4.5%.
    assert_covered(torch.stack([f.value for f in found]), torch.stack([f.stderr for f in found]), 5.0, 0.25)
    # At 99%, more than 15 failures in 250 have probability below 1e-7.
    assert sum(not float(f.lower) <= 5.0 <= float(f.upper) for f in found) <= 15
    assert found[0].chains == n + n_base


def test_mbar_is_right_and_knows_its_errors():
    plain, states = ladder()
    rng, runs = generator(1), []
    for _ in range(250):
        draws = [g.sample(n, rng) for g, n in zip(plain, (400, 300, 200))]
        runs.append(mbar(states, [*draws, None], base_log_z=SIZES[0]))
    for k in (1, 2, 3):
        assert_covered(
            torch.stack([r.value[k] for r in runs]), torch.stack([r.stderr[k] for r in runs]), SIZES[k], 0.25
        )
    apart = [r.difference(2, 1) for r in runs]
    assert_covered(torch.stack([d.value for d in apart]), torch.stack([d.stderr for d in apart]), -5.0, 0.25)


def test_the_error_counts_the_correlation_along_chains():
    """Draws that hold 0.9 of the last are worth a nineteenth; taken for independent, their error is far too low."""
    plain, states = ladder()
    runs, rng = 120, generator(2)
    values, errors, careless, many = [], [], [], []
    both = [chains_of(g, 800, 4 * runs, 0.9, rng).split(4, 1) for g in plain[:2]]
    for draws in zip(*both):
        found = bridge(states[1], plain[0], draws[1], draws[0])
        values.append(found.value)
        errors.append(found.stderr)
        many.append(mbar(states[:2], draws).stderr[1])
        careless.append(bridge(states[1], plain[0], draws[1].flatten(0, 1), draws[0].flatten(0, 1)).stderr)
    # The spread of 120 is known to 6.5%.
    assert_covered(torch.stack(values), torch.stack(errors), 3.0, 0.36)
    assert_covered(torch.stack(values), torch.stack(many), 3.0, 0.36)
    with pytest.raises(AssertionError, match="missed"):
        assert_covered(torch.stack(values), torch.stack(careless), 3.0, 0.36)


def test_two_states_are_a_bridge():
    plain, states = ladder()
    draws = [plain[0].sample(500, generator()), plain[1].sample(200, generator(1))]
    one, two = bridge(states[1], plain[0], draws[1], draws[0]), mbar(states[:2], draws).log_z(1)
    assert float(one.value) == pytest.approx(float(two.value), abs=1e-10)
    assert float(one.stderr) == pytest.approx(float(two.stderr), rel=0.05)
    assert float(one.ess) == pytest.approx(float(two.ess), rel=0.05)


def test_the_covariance_is_that_of_shirts_and_chodera():
    """Of independent draws, by their eq. 8 with a pseudo-inverse, for states with and without draws."""
    plain, states = ladder()
    n = torch.tensor([4000, 3000, 3000, 0])
    draws = [g.sample(int(k), generator(i)) for i, (g, k) in enumerate(zip(plain, n)) if k]
    found = mbar(states, [*draws, None])
    x = torch.cat(draws)
    u = torch.stack([e(x) for e in states])
    mixture = torch.logsumexp(n.double().log().unsqueeze(1) - found.value.unsqueeze(1) - u, 0)
    w = (-u - found.value.unsqueeze(1) - mixture).exp().T
    # The same by the push-through identity, with matrices of the size of K.
    s, right = torch.linalg.svd(w, full_matrices=False)[1:]
    middle = torch.eye(4, dtype=torch.float64) - s.diag() @ right @ n.double().diag() @ right.T @ s.diag()
    theta = right.T @ s.diag() @ torch.linalg.pinv(middle, rtol=1e-8) @ s.diag() @ right
    d = theta.diagonal()
    expected = theta - theta[:1] - theta[:, :1] + d[0]
    torch.testing.assert_close(found.covariance, expected, rtol=0.05, atol=1e-6)


def test_a_ladder_of_temperatures_on_bits():
    """Exact draws of four temperatures of an enumerated system, whose log Z are known."""
    system = binary_system((2, 3))
    betas = (0.0, 0.3, 0.6, 1.0)
    states = [b * system.energy for b in betas]
    rng, draws = generator(3), []
    for e in states:
        law = (-e(system.states)).softmax(0)
        draws.append(system.states[torch.multinomial(law, 500, replacement=True, generator=rng)])
    found = mbar(states, draws, base_log_z=6.0 * math.log(2.0))
    for k, e in enumerate(states):
        truth = float(enumeration(e, shape=(2, 3), dtype=torch.float64).value)
        assert abs(float(found.value[k]) - truth) <= Z_LIMIT * float(found.stderr[k])
    assert 0.0 < float(found.stderr[3]) < 0.2
    torch.testing.assert_close(found.overlap.sum(1), torch.ones(4, dtype=torch.float64))


def test_draws_of_the_library_s_own_chains():
    plain, states = ladder()
    out = sample(states[1], MALA(0.3), plain[1].sample(32, generator()), steps=300, thin=1, rng=generator(1))
    assert out.draws is not None
    found = bridge(states[1], plain[0], out.draws, plain[0].sample(4000, generator(2)))
    assert abs(float(found.value) - 3.0) < Z_LIMIT * float(found.stderr)
    assert float(found.lower) < 3.0 < float(found.upper)


def test_a_fitted_base_on_spins():
    energy = Ising.lattice((3, 3), torch.tensor(0.25, dtype=torch.float64), field=0.2)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 9).reshape(-1, 3, 3)
    law = (-energy(states)).softmax(0)
    draws = states[torch.multinomial(law, 2000, replacement=True, generator=generator())]
    base = Bernoulli(probs=draws.mean(0))
    found = bridge(energy, base, draws, base.sample(2000, generator(1)))
    truth = float(enumeration(energy).value)
    assert abs(float(found.value) - truth) < Z_LIMIT * float(found.stderr) < 0.5


def test_single_precision():
    plain, states = ladder()
    one, two = (
        bridge(e, plain[0], plain[1].sample(100, generator()), plain[0].sample(100, generator(1)))
        for e in (states[1], Energy.of(lambda x: states[1](x).float(), event_shape=(2,)))
    )
    assert float(one.value) == pytest.approx(float(two.value), abs=1e-4)


def quietly(run):
    """What is broken may well warn too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def missing_sizes(u: Tensor, sizes: Tensor, b: Tensor) -> Tensor:
    return multistate_solve(u, torch.full_like(sizes, float(sizes.mean())), b)


def wrong_sign(u: Tensor, sizes: Tensor, b: Tensor) -> Tensor:
    return multistate_solve(-u, sizes, b)


multistate_solve = multistate._solve


@pytest.mark.parametrize("twin", [missing_sizes, wrong_sign])
def test_broken_twins_of_mbar_are_caught(twin, monkeypatch):
    plain, states = ladder()
    draws = [g.sample(n, generator(i)) for i, (g, n) in enumerate(zip(plain, (4000, 500, 1000)))]

    def check(found: Multistate) -> None:
        for k in range(3):
            assert abs(float(found.value[k]) - SIZES[k]) <= Z_LIMIT * float(found.stderr[k]), "missed"

    check(mbar(states[:3], draws))
    monkeypatch.setattr(multistate, "_solve", twin)
    with pytest.raises(AssertionError, match="missed"):
        check(quietly(lambda: mbar(states[:3], draws)))


@pytest.mark.parametrize(
    "twin",
    [
        lambda f, r: (-f, -r),
        lambda f, r: (r, f),
        # Without the ratio of sample sizes: as if from as many draws of each, and all weights shifted by its logarithm.
        lambda f, r: (f - math.log(len(f) / len(r)), r - math.log(len(f) / len(r))),
    ],
)
def test_broken_twins_of_the_bridge_are_caught(twin, monkeypatch):
    plain, states = ladder()
    draws = plain[1].sample(400, generator()), plain[0].sample(4000, generator(1))

    def check() -> None:
        found = quietly(lambda: bridge(states[1], plain[0], *draws))
        assert abs(float(found.value) - 3.0) <= Z_LIMIT * float(found.stderr), "missed"

    check()
    right = multistate.acceptance_ratio
    monkeypatch.setattr(multistate, "acceptance_ratio", lambda f, r: right(*twin(f, r)))
    with pytest.raises(AssertionError, match="missed"):
        check()


def test_densities_without_overlap_warn():
    with double_precision():
        near, far = Gaussian(2), Gaussian(2, loc=20.0)
    draws = near.sample(300, generator()), far.sample(300, generator())
    with pytest.warns(RuntimeWarning, match="hardly overlap"):
        found = bridge(far, near, draws[1], draws[0])
    assert float(found.ess) < 1.0
    assert float(found.lower) < 0.0 < float(found.upper)
    with pytest.warns(RuntimeWarning, match="states in between"):
        many = mbar([near, far], draws)
    assert float(many.ess.max()) < 1.0


def test_one_density_twice_is_worth_all_draws():
    with double_precision():
        one = Gaussian(2)
    draws = one.sample(300, generator()), one.sample(100, generator())
    found = bridge(one, one, *draws)
    assert float(found.value) == pytest.approx(0.0, abs=1e-10)
    assert float(found.ess) == pytest.approx(400.0)
    assert float(mbar([one, one], draws).ess[1]) == pytest.approx(400.0)


def test_refusals():
    plain, states = ladder()
    x, y = plain[0].sample(10, generator()), plain[1].sample(10, generator())
    with pytest.raises(ShapeError, match=r"points of shape \(2,\) .* have shape \(10, 3\)"):
        bridge(states[1], plain[0], torch.zeros(10, 3), x)
    with pytest.raises(ShapeError, match=r"two or more.*\(1, 2\)"):
        bridge(states[1], plain[0], y[:1], x)
    with pytest.raises(ShapeError, match=r"four or more of each chain"):
        bridge(states[1], plain[0], y.reshape(2, 5, 2), x)
    with pytest.raises(ShapeError, match="different shapes"):
        bridge(states[1], Gaussian(3), y, x)
    with pytest.raises(ArgumentTypeError, match="floating-point"):
        bridge(states[1], plain[0], y.long(), x)
    with pytest.raises(OptionError, match="confidence"):
        bridge(states[1], plain[0], y, x, confidence=1.0)
    inside = Energy.of(lambda v: torch.where(v[:, 0] > 0, 0.0, torch.inf), event_shape=(2,))
    with pytest.raises(DivergenceError, match="own 10 draws"):
        bridge(inside, plain[0], x, x)
    with pytest.raises(OptionError, match="2 energies has its draws"):
        mbar(states[:2], [x])
    with pytest.raises(OptionError, match="Two states or more"):
        mbar(states[:2], [x, None])
    with pytest.raises(OptionError, match="base=1"):
        mbar(states[:3], [x, None, y], base=1)
