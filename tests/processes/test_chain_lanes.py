"""Chains in lanes: the same draws, estimates and replicas in 1, 2 and 4 processes, to the bit, for every kernel."""

import functools
import math
import tempfile
import warnings

import numpy as np
import pytest
import torch
from kernel_cases import LANES, STEPS, D, cases, crooked, exported_kernels, points

import gibbsian as gb
from contracts import ks, seeded, two_modes
from gibbsian import chain_lanes
from gibbsian.annealing import Annealing, ancestral_sample, anneal, annealed_chains
from gibbsian.buffers import ReplayBuffer, joined_buffer, split_buffer
from gibbsian.building import initial_weights
from gibbsian.commands.asking import sample as commands_sample
from gibbsian.data.scaling import standard_scaling
from gibbsian.diagnostics.chains import effective_sample_size, split_r_hat
from gibbsian.diagnostics.shared import over_processes
from gibbsian.errors import ArgumentTypeError, DivergenceError, DomainError, OptionError
from gibbsian.models import load_model, save_model
from gibbsian.partition.importance import importance_sampling
from gibbsian.processes import Lanes, lane_seed, world
from gibbsian.processes.work import together
from gibbsian.recipes import choose
from gibbsian.sampling import own_rows
from gibbsian.short_run import ShortRun
from gibbsian.temperatures import SHARED, temper
from spawned import run_in

TWO = gb.ParallelTempering(gb.HMC(0.2, leapfrog=2), [1.0, 0.6, 0.4, 0.2], step_sizes=[0.2, 0.25, 0.3, 0.4])


def told(made):
    """Everything that a run returns, by name."""
    found = {f"state {i}": t for i, t in enumerate([*made.state[:3], *sum(made.state[3:], ())])}
    found |= {"draws": made.draws, "acceptance": made.acceptance, "nonfinite": made.nonfinite}
    found |= {f"mean of {k}": v for k, v in made.details.items()} | {f"kept {k}": v for k, v in made.kept.items()}
    return {name: value for name, value in found.items() if value is not None}


def run_of(kernel, energy, start):
    return gb.sample(energy, kernel, start, steps=STEPS, thin=2, rng=seeded(1), lanes=LANES)


def runs_of_kernels():
    return {f"{name}: {part}": value for name, case in cases().items() for part, value in told(run_of(*case)).items()}


def goes_on():
    """Two steps and four, of which the second run knows its own chains alone."""
    energy, rng, start = gb.Energy.of(crooked, (2,)), seeded(1), points(2)
    first = gb.sample(energy, gb.MALA(0.2), own_rows(LANES, start), steps=2, rng=rng, lanes=LANES, own=True)
    return gb.sample(energy, gb.MALA(0.2), first.state, steps=4, thin=1, rng=rng, lanes=LANES, own=True)


def estimates():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # So few chains are enough for nothing else.
        return estimated()


def estimated():
    energy = gb.Energy.of(crooked, (2,))
    base = gb.Gaussian(scale=torch.full((2,), 1.5, dtype=D))
    draws = gb.sample(energy, gb.MALA(0.2), points(2).repeat(4, 1), steps=50, rng=seeded(2)).x
    few = {"temperatures": 20, "kernel": gb.MALA(0.3), "lanes": LANES}
    found = {
        "ais": gb.ais(energy, base, rng=seeded(3), chains=32, **few),
        "reverse": gb.reverse_ais(energy, base, draws, rng=seeded(3), **few),
        "bracket": gb.bracket(energy, base, draws, rng=seeded(3), chains=16, **few),
        "importance": importance_sampling(energy, base, rng=seeded(3), draws=64, lanes=LANES),
        "integral": gb.thermodynamic_integration(
            energy, base, rng=seeded(3), nodes=5, kernel=gb.MALA(0.3), chains=32, steps=20, lanes=LANES
        ).log_z,
    }
    adapted = gb.smc(energy, base, rng=seeded(4), chains=160, populations=8, kernel=gb.MALA(0.3), lanes=LANES)
    kept = gb.smc(energy, base, rng=seeded(4), chains=160, populations=8, kernel=gb.MALA(0.3),
                  schedule=adapted.schedule, lanes=LANES)  # fmt: skip
    tuned = gb.tune(energy, gb.MALA(0.5), points(2), rng=seeded(5), steps=30, lanes=LANES)
    short = ShortRun(gb.ULA(0.1), 3, base).sample(energy, 8, seeded(6), lanes=LANES)
    extra = {"tuned": tuned.step_sizes, "where it ended": tuned.state.x, "short run": short.x}
    numbers = extra | {f"{name}: {k}": v for name, z in found.items() for k, v in z._asdict().items()}
    for name, particles in (("smc", adapted), ("smc again", kept)):
        parts = particles._replace(log_z=particles.log_z.value, schedule=particles.schedule.betas)
        numbers |= {f"{name}: {k}": v for k, v in parts._asdict().items()}
        numbers[f"{name}: step sizes"] = particles.schedule.step_sizes
    return {k: torch.as_tensor(v) for k, v in numbers.items()}


def spread_temperatures():
    energy, rng = gb.Energy.of(crooked, (2,)), seeded(6)
    first = temper(energy, TWO, points(2), steps=5, rng=rng)
    return told(temper(energy, TWO, first.state, steps=5, thin=2, rng=rng)) | {"whole": first.x}


def down_noise_levels():
    energy, start, how = Noisy(), 3.0 * points(2), {"rng": seeded(1), "lanes": LANES}
    return {
        "annealed": anneal(energy, start, Annealing(3.0, 0.3, levels=4), **how),
        "chains": annealed_chains(energy, start, [2.0, 1.0, 0.5], gb.MALA(0.5), steps=3, **how).samples.x,
        "ancestral": ancestral_sample(energy, start, [0.3, 1.0, 3.0], gb.ULA(0.1), steps=3, **how),
    }


class Noisy(gb.Energy):
    """A standard normal density under noise."""

    event_shape = torch.Size((2,))
    context = ("sigma",)

    def forward(self, x, sigma):
        return 0.5 * x.square().sum(1) / (1.0 + torch.as_tensor(sigma, dtype=x.dtype) ** 2)


def buffers():
    """Every lane draws, moves and writes; then all are joined."""
    buffer = ReplayBuffer(gb.Gaussian(scale=torch.ones(2, dtype=D)), size=32, restart=0.3)
    buffer.fill(seeded(9), {"y": torch.arange(32.0)})
    parts = split_buffer(buffer, LANES)
    own = []
    for lane, rng in Lanes(LANES).generators(5):
        taken = parts[lane].draw(4, rng, {"y": torch.arange(32.0)})
        parts[lane].write(taken, taken.x + 1.0, steps=3)
        own.append(parts[lane])
    return dict(joined_buffer(own, gather=True).state_dict())


def diagnosed():
    energy, start = gb.Energy.of(crooked, (2,)), points(2)
    run = functools.partial(gb.sample, energy, gb.MALA(0.2), steps=40, thin=1, lanes=LANES)
    own, whole = run(own_rows(LANES, start), rng=seeded(1), own=True), run(start, rng=seeded(1))
    return {
        "summary": str(own.summary()) == str(whole.summary()),
        "r_hat": (over_processes(split_r_hat, own.draws), split_r_hat(whole.draws)),
        "ess": (over_processes(effective_sample_size, own.draws), effective_sample_size(whole.draws)),
    }


def broken():
    """A twin whose lanes have seeds by rank too."""
    honest = chain_lanes.lane_seed
    chain_lanes.lane_seed = lambda key, lane: lane_seed(key + world().rank, lane)
    try:
        return gb.sample(gb.Energy.of(crooked, (2,)), gb.MALA(0.2), points(2), steps=3, rng=seeded(1), lanes=LANES).x
    finally:
        chain_lanes.lane_seed = honest


def failure(fn):
    try:
        fn()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def refused():
    """What each process says to arguments that do not fit."""
    energy, rank, size = gb.Energy.of(crooked, (2,)), world().rank, world().size
    run = functools.partial(gb.sample, energy, gb.MALA(0.2), steps=2)
    three, base = gb.ParallelTempering(gb.MALA(0.1), [1.0, 0.7, 0.5]), gb.Gaussian(2).double()
    bad = points(2)
    bad[-1] = math.nan

    def work():
        with together():
            if rank == size - 1:
                raise DivergenceError("It went away.")

    return {
        "lanes": failure(lambda: run(points(2), rng=seeded(), lanes=3)),
        "chains": failure(lambda: run(points(2)[:2], rng=seeded(), lanes=4)),
        "share": failure(lambda: run(points(2), rng=seeded(), lanes=16 * size)),
        "seeds": failure(lambda: run(points(2), rng=seeded(rank), lanes=4)),
        "steps": failure(lambda: gb.sample(energy, gb.MALA(0.2), points(2), steps=2 + rank, rng=seeded(), lanes=4)),
        "start": failure(lambda: run(bad, rng=seeded(), lanes=4)),
        "one fails": failure(work),
        "ladder": failure(lambda: temper(energy, three, points(2), steps=2, rng=seeded())),
        "ais seeds": failure(lambda: gb.ais(energy, base, rng=seeded(rank), chains=8, temperatures=9, lanes=4)),
    }


def drawn(folder):
    """Rows of a model that was not trained, in uneven number, and what the command writes."""
    commands_sample(folder, n=6, out=folder / f"{world().size}.npy", lanes=LANES, seed=3)
    return {"rows": load_model(folder).draw(7, seeded(2), lanes=LANES)}


def everything(folder):
    return {
        "drawn": drawn(folder),
        "kernels": runs_of_kernels(),
        "estimates": estimates(),
        "temperatures": spread_temperatures(),
        "levels": down_noise_levels(),
        "buffers": buffers(),
        "goes on": told(goes_on()),
        "diagnosed": diagnosed(),
        "broken": broken(),
        "refused": refused() if world().size > 1 else {},
    }


@functools.cache
def found_in(size):
    return run_in(size, everything, folder_of_model())


@functools.cache
def folder_of_model():
    x = torch.randn(60, 2, generator=seeded())
    recipe = choose("table", (2,), len(x), {"objective": "noise-contrastive", "width": 8, "sample_steps": 10})
    return save_model(tempfile.mkdtemp(), gb.Model(initial_weights(recipe, x), recipe, standard_scaling(x)))


def assert_same(one, other):
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, differing


def test_every_exported_kernel_is_in_the_table():
    assert cases().keys() == exported_kernels()
    assert all(type(kernel).__name__ == name for name, (kernel, _, _) in cases().items())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("what", ["kernels", "estimates", "levels", "buffers"])
def test_numbers_are_the_same_however_many_processes_there_are(what, size):
    (alone,) = found_in(1)
    assert len(alone[what]) > 2
    for each in found_in(size):
        assert_same(alone[what], each[what])


@pytest.mark.parametrize("size", [2, 4])
def test_temperatures_may_live_anywhere(size):
    (alone,) = found_in(1)
    own = {f"state {i}" for i in range(3 + SHARED - 1, 30)}  # The replicas of the process.
    same = [name for name in alone["temperatures"] if name not in own]
    assert len(alone["temperatures"]) - len(same) == 4
    assert len(same) > 15
    for each in found_in(size):
        assert_same(*({name: part["temperatures"][name] for name in same} for part in (alone, each)))


@pytest.mark.parametrize("size", [2, 4])
def test_own_chains_go_on_as_those_of_all(size):
    (alone,) = found_in(1)
    energy = gb.Energy.of(crooked, (2,))
    whole = gb.sample(energy, gb.MALA(0.2), points(2), steps=6, rng=seeded(1), lanes=LANES)
    assert torch.equal(whole.x, alone["goes on"]["state 0"])
    parts = [each["goes on"] for each in found_in(size)]
    for name, value in alone["goes on"].items():
        dim = int(name == "draws" or name.startswith("kept"))
        assert torch.equal(torch.cat([part[name] for part in parts], dim), value), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_diagnostics_are_of_all_chains(size):
    for each in found_in(size):
        assert each["diagnosed"]["summary"]
        for name in ("r_hat", "ess"):
            assert torch.equal(*each["diagnosed"][name])


def test_rows_of_a_model_and_of_the_command_are_the_same():
    (alone,) = found_in(1)
    assert alone["drawn"]["rows"].shape == (7, 2)
    for size in (2, 4):
        assert all(torch.equal(each["drawn"]["rows"], alone["drawn"]["rows"]) for each in found_in(size))
        one, several = (np.load(folder_of_model() / f"{n}.npy") for n in (1, size))
        assert np.array_equal(one, several)
        assert one.shape == (6, 2)


def test_a_twin_with_seeds_by_rank_is_caught():
    (alone,), two = found_in(1), found_in(2)
    assert torch.equal(two[0]["broken"], two[1]["broken"])
    assert torch.equal(two[0]["broken"][:4], alone["broken"][:4])
    assert not torch.equal(two[0]["broken"][4:], alone["broken"][4:])


def test_what_does_not_fit_is_refused_everywhere():
    for each in found_in(2):
        said = each["refused"]
        assert said["lanes"][0] == "OptionError"
        assert "3 lanes cannot be shared equally by 2 processes" in said["lanes"][1]
        assert "2 chains cannot be divided equally among 4 lanes; take 4" in said["chains"][1]
        assert "8 chains cannot be divided equally among 32 lanes" in said["share"][1]
        for name in ("seeds", "ais seeds"):
            assert said[name][0] == "ProcessError"
            assert "random numbers is" in said[name][1]
        assert "chains, lanes and steps is" in said["steps"][1]
        assert said["start"][0] == "DomainError"
        assert "1 of 8 chains start where" in said["start"][1]
        assert said["one fails"][0] == "DivergenceError"
        assert "It went away." in said["one fails"][1]
        assert "3 levels cannot be shared equally by 2 processes" in said["ladder"][1]
    assert "On rank 1" in found_in(2)[0]["refused"]["one fails"][1]


def test_lanes_change_numbers_and_not_the_law():
    target = two_modes()
    start = target.draw(40_000, seeded(1))
    x = gb.sample(target.energy, gb.HMC(0.5, leapfrog=3), start, steps=4, rng=seeded(2), lanes=8).x
    assert float((x != start).double().mean()) > 0.5
    assert ks(x.flatten(), target.projections["x"][1]) < 3.1
    halves = x.flatten().unflatten(0, (8, -1))
    assert float(torch.corrcoef(halves).fill_diagonal_(0.0).abs().max()) < 6.0 / math.sqrt(halves.shape[1])


def test_compiled_lanes_are_one_graph_and_go_on():
    energy, rng = gb.Energy.of(crooked, (2,)), seeded(1)
    whole = gb.sample(energy, gb.ULA(0.1), points(2), steps=25, rng=seeded(1), lanes=2, compile=True)
    first = gb.sample(energy, gb.ULA(0.1), points(2), steps=13, rng=rng, lanes=2, compile=True)
    both = gb.sample(energy, gb.ULA(0.1), first.state, steps=12, rng=rng, lanes=2)
    torch.testing.assert_close(both.x, whole.x)


def test_progress_counts_steps_and_not_lanes():
    energy, made = gb.Energy.of(crooked, (2,)), []
    gb.sample(energy, gb.ULA(0.1), points(2), steps=25, rng=seeded(), lanes=4, progress=made.append)
    assert sum(made) == 25


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda run: run(gb.MALA(0.1), own=True), OptionError, "say how many, lanes="),
        (lambda run: run(gb.MALA(torch.full((8,), 0.1)), lanes=2), OptionError, "step_size holds 8 numbers"),
        (lambda run: run(gb.MALA(0.1), lanes=0), OptionError, "1 lane or more"),
    ],
)
def test_wrong_lanes_are_refused(run, error, message):
    energy = gb.Energy.of(crooked, (2,))
    with pytest.raises(error, match=message):
        run(lambda kernel, **options: gb.sample(energy, kernel, points(2), steps=2, rng=seeded(), **options))


def test_labels_of_single_chains_are_refused():
    labels = torch.arange(8.0, dtype=D)
    energy = gb.Energy.of(lambda x: 0.5 * (x[:, 0] - labels).square(), (1,))
    with pytest.raises(OptionError, match="label for each chain cannot be shared by lanes"):
        gb.sample(energy, gb.MALA(0.1), points(1), steps=2, rng=seeded(), lanes=2)


def tempered_ks(run):
    target = two_modes()
    start = torch.full((4000, 1), -2.0, dtype=D)
    x = run(target.energy, gb.ParallelTempering(gb.HMC(0.4, leapfrog=2), [1.0, 0.5, 0.25, 0.12]), start)
    return ks(x.flatten(), target.projections["x"][1])


def test_travelling_temperatures_leave_the_target_as_it_is():
    assert tempered_ks(lambda e, k, x: temper(e, k, x, steps=120, rng=seeded(1)).x) < 3.1


def test_a_twin_that_swaps_the_wrong_way_is_caught(monkeypatch):
    real = gb.ParallelTempering._order

    def upside_down(self, r, uniform):
        return real(self, r._replace(energy=-r.energy), uniform)

    monkeypatch.setattr(gb.ParallelTempering, "_order", upside_down)
    assert tempered_ks(lambda e, k, x: temper(e, k, x, steps=120, rng=seeded(1)).x) > 4.5


def test_what_temper_cannot_do_is_said():
    energy, base = gb.Energy.of(crooked, (2,)), gb.Gaussian(2).double()
    run = functools.partial(temper, energy, steps=2, rng=seeded())
    with pytest.raises(OptionError, match="powers of one energy"):
        run(gb.ParallelTempering(gb.MALA(0.1), [1.0, 0.5, 0.0], base=base), points(2))
    with pytest.raises(ArgumentTypeError, match="levels of a ParallelTempering"):
        run(gb.MALA(0.1), points(2))
    kernel = gb.ParallelTempering(gb.MALA(0.1), [1.0, 0.5])
    other = gb.sample(energy, kernel, points(2), steps=1, rng=seeded()).state
    with pytest.raises(ArgumentTypeError, match="goes on from a state of its own"):
        run(kernel, other)
    with pytest.raises(OptionError, match="unadjusted"):
        run(gb.ParallelTempering(gb.ULA(0.1), [1.0, 0.5]), points(2))
    with pytest.raises(DomainError, match="8 of 8 chains"):
        run(kernel, points(2) * math.nan)


def test_a_buffer_is_split_and_joined_again():
    buffer = ReplayBuffer(gb.Gaussian(2), size=12, replicas=3)
    assert not joined_buffer(split_buffer(buffer, 4)).filled
    buffer.fill(seeded(), {"y": torch.arange(5.0)})
    parts = split_buffer(buffer, 4)
    assert [part.size for part in parts] == [3] * 4
    again = joined_buffer(parts)
    assert_same(dict(buffer.state_dict()), dict(again.state_dict()))
    assert (again.size, again.replicas, again.restart) == (12, 3, buffer.restart)
    taken = parts[0].draw(2, seeded(), {"y": torch.arange(5.0)})
    parts[0].write(taken, taken.x + 1, 1, taken.hot)
    assert_same(dict(buffer.state_dict()), dict(again.state_dict()))
    with pytest.raises(OptionError, match="12 chains cannot be divided equally among 5 lanes; take size=10"):
        split_buffer(buffer, 5)
    with pytest.raises(OptionError, match="all filled or none"):
        joined_buffer([parts[0], ReplayBuffer(gb.Gaussian(2), size=3)])
