"""The summary of a run: its numbers, its table, and what it says first."""

import dataclasses
import io
import re

import pytest
import torch
from chain_cases import ar1

import gibbsian as gb
from contracts import seeded
from gibbsian.diagnostics.chains import chain_mean, chain_sd, effective_sample_size, split_r_hat
from gibbsian.diagnostics.mixing import energy_bfmi
from gibbsian.diagnostics.quantiles import chain_quantile, tail_effective_sample_size
from gibbsian.diagnostics.summary import enough, marginals, summarise
from gibbsian.errors import OptionError, ShapeError

GOOD = torch.stack([ar1(0.2, 500, 4, seed=s) for s in range(3)], dim=-1)


def told(draws=GOOD, **options):
    """What is said of these draws."""
    n = draws.shape[1]
    options = {"acceptance": torch.full((n,), 0.7), "nonfinite": torch.zeros(n), "steps": len(draws), **options}
    return summarise(draws, **options)


def test_the_numbers_are_those_of_the_diagnostics():
    m = told().coordinates
    assert torch.equal(torch.stack(m[:2]), torch.stack(chain_mean(GOOD)))
    assert torch.equal(m.sd, chain_sd(GOOD)[0])
    for value, p in ((m.low, 0.05), (m.median, 0.5), (m.high, 0.95)):
        assert torch.equal(value, chain_quantile(GOOD, p)[0])
    assert torch.equal(m.bulk_ess, effective_sample_size(GOOD))
    assert torch.equal(m.tail_ess, tail_effective_sample_size(GOOD))
    assert torch.equal(m.r_hat, split_r_hat(GOOD))


def test_large_events_are_summarised_in_parts_of_the_same_numbers(monkeypatch):
    draws = torch.randn(40, 2, 3, 5, generator=seeded())
    whole = marginals(draws)
    monkeypatch.setattr("gibbsian.diagnostics.summary._CHUNK", 40 * 2 * 4)
    for a, b in zip(marginals(draws), whole):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.shape == (3, 5)


def test_a_good_run_is_a_table_without_warnings():
    summary = told(kept={"energy": ar1(0.1, 500, 4, seed=9)}, title="MALA(step_size=0.3)")
    assert summary.warnings == ()
    lines = str(summary).splitlines()
    assert lines[0] == "MALA(step_size=0.3): 4 chains of 500 draws"
    assert [line.split()[0] for line in lines[3:]] == ["energy", "x[0]", "x[1]", "x[2]"]
    assert len({len(line) for line in lines[2:]}) == 1  # aligned
    assert lines[2].split() == ["mean", "error", "sd", "5%", "50%", "95%", "bulk", "ESS", "tail", "ESS", "R-hat"]
    mean, error = (float(word.replace("−", "-")) for word in lines[4].split()[1:3])
    assert (mean, error) == pytest.approx(tuple(float(v[0]) for v in chain_mean(GOOD)), abs=5e-4)


def test_values_are_written_to_the_second_digit_of_their_error():
    row = told(GOOD[:, :, :1] * 100 + 5000).cells()[0]
    assert re.fullmatch(r"4\d{3}\.\d|5\d{3}\.\d|[45]\d{3}", row[1])
    assert len(row[2].replace(".", "")) == 2
    assert told(GOOD[:, :, :1] * 1e-9).cells()[0][3].endswith("e−09")


def test_only_the_worst_of_many_coordinates_are_listed():
    draws = torch.randn(200, 4, 2, 10, generator=seeded())
    draws[:, :, 1, 3] = ar1(0.97, 200, 4)
    draws[:, :, 0, 2] = 1.0
    draws[7, 1, 1, 1] = torch.inf
    summary = told(draws, rows=3)
    assert [row[0] for row in summary.cells()][:2] == ["x[1,1]", "x[1,3]"]
    assert len(summary.cells()) == 3
    assert "of 20 coordinates the 3 with the smallest effective sizes" in str(summary)
    assert len(told(draws, rows=20).cells()) == 20
    assert "1 of 20 coordinates hold draws that are not finite." in summary.warnings
    assert any(text.startswith("1 of 20 coordinates never moved.") for text in summary.warnings)


def spread_of_kept(value, n=500, chains=4):
    return torch.full((n, chains), float(value))


WRONG = {
    "some not finite": (
        {"nonfinite": torch.tensor([3.0, 0, 0, 1])},
        r"^4 of 2.000 proposals were not finite \(0.2%, in 2 of 4 chains\)\. Try a smaller step size",
    ),
    "all not finite": ({"nonfinite": torch.full((4,), 500.0)}, "^Every proposal was not finite: nothing was explored"),
    "low acceptance": ({"acceptance": torch.full((4,), 0.003)}, "^Acceptance is 0.003: chains hardly move"),
    "unknown acceptance": ({"acceptance": torch.full((4,), torch.nan)}, "^Acceptance is NaN"),
    "high acceptance": ({"acceptance": torch.full((4,), 0.9995)}, "^Acceptance is 0.9995: steps are needlessly small"),
    "one stuck": ({"acceptance": torch.tensor([0.8, 0.0, 0.8, 0.8])}, "^1 of 4 chains hardly move"),
    "some diverged": (
        {"kept": {"diverging": spread_of_kept(0).index_fill(0, torch.arange(5), 1.0)}},
        r"^20 kept steps diverged \(1%\): somewhere the energy bends",
    ),
    "everything diverged": ({"kept": {"diverging": spread_of_kept(1)}}, r"^Almost everything diverged \(100%"),
    "chains apart": (
        {"draws": GOOD + torch.arange(4.0)[:, None]},
        r"^R-hat is above 1.01 for 3 of 3 coordinates \(1\.",
    ),
    "energies apart": (
        {"kept": {"energy": ar1(0.2, 500, 4, seed=8) + torch.arange(4.0)}},
        r"^R-hat of the energy is 1\.\d+, above 1.01",
    ),
    "slow": ({"draws": GOOD[:100]}, r"^Bulk ESS is below 400 for \d of 3 rows \(\d+ at least\)"),
    "slow tails": ({"draws": GOOD[:150]}, r"^Tail ESS is below 400 for \d of 3 rows"),
    "low bfmi": (
        {"kept": {"hamiltonian": ar1(0.95, 500, 4, seed=3)}},
        r"^E-BFMI is below 0.3 in 4 of 4 chains \(0\.0\d+ at least\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_first_with_what_to_try(case):
    options, message = WRONG[case]
    summary = told(**options)
    found = [text for text in summary.warnings if re.search(message, text)]
    assert len(found) == 1, summary.warnings
    assert "Try" in found[0]
    assert str(summary).startswith("! ")
    assert told().warnings == ()


def test_kernels_that_accept_everything_are_not_told_to_take_larger_steps():
    assert told(acceptance=torch.ones(4), adjusted=False).warnings == ()
    energy = gb.Gaussian(2)
    for kernel, said in ((gb.ULA(0.3), False), (gb.MALA(1e-3), True)):
        out = gb.sample(energy, kernel, energy.sample(4, seeded()), steps=20, thin=1, rng=seeded())
        assert any(text.startswith("Acceptance") for text in out.summary().warnings) == said


def test_the_limit_is_a_hundred_per_chain_up_to_four_hundred():
    assert [enough(n) for n in (1, 2, 4, 512)] == [100, 200, 400, 400]
    one = GOOD[:, :1]
    assert told(one).warnings == ()
    assert any("below 400" in text for text in told(torch.cat([one[:90]] * 4, dim=1)).warnings)


def test_the_samples_of_a_run_summarise_themselves():
    energy = gb.Gaussian(2)
    out = gb.sample(energy, gb.HMC(0.5, 5), energy.sample(4, seeded()), steps=800, warmup=50, thin=1, rng=seeded(1))
    summary = out.summary()
    assert summary.warnings == ()
    assert torch.equal(summary.bfmi, energy_bfmi(out.kept["hamiltonian"]))
    assert (summary.draws, summary.chains) == (750, 4)
    # Half a chi-squared of two degrees of freedom plus log(2 pi): mean 1 + 1.838, standard deviation 1.
    truth = energy(torch.zeros(1, 2)).item() + 1.0
    assert abs(float(summary.energy.mean) - truth) < 5.5 * float(summary.energy.mean_error)
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.draws = 3


def test_a_step_size_that_makes_everything_diverge_is_said_first():
    energy = gb.Energy.of(lambda x: x.square().square().sum(1))
    start = torch.ones(4, 2)
    out = gb.sample(energy, gb.MALA(1e20), start, steps=20, thin=1, rng=seeded())
    assert str(out.summary()).startswith("! Every proposal was not finite: nothing was explored.")
    out = gb.sample(energy, gb.NUTS(5.0), start, steps=20, thin=1, rng=seeded())
    assert str(out.summary()).startswith("! Almost everything diverged (100% of the kept steps).")
    out = gb.sample(energy, gb.MALA(1e3), start, steps=20, thin=1, rng=seeded())
    assert str(out.summary()).startswith("! Acceptance is 0: chains hardly move.")


def test_without_draws_there_is_no_summary():
    out = gb.sample(gb.Gaussian(2), gb.MALA(0.3), torch.zeros(4, 2), steps=10, rng=seeded())
    for ask in (out.summary, out.to_arviz):
        with pytest.raises(OptionError, match=r"needs draws, and this run kept none; use sample\(.*thin=1"):
            ask()
    few = gb.sample(gb.Gaussian(2), gb.MALA(0.3), torch.zeros(4, 2), steps=3, thin=1, rng=seeded())
    with pytest.raises(ShapeError, match=r"four draws or more of each chain; got \(3, 4, 2\)"):
        few.summary()
    with pytest.raises(OptionError, match="rows counts the coordinates to list, 1 or more; got 0"):
        told(rows=0)


def test_rich_shows_the_same_rows():
    from rich.console import Console

    summary = told(GOOD + torch.arange(4.0)[:, None], kept={"energy": ar1(0.1, 500, 4, seed=9)})
    out = io.StringIO()
    Console(file=out, width=100).print(summary)
    text = out.getvalue()
    for row in summary.cells():
        assert all(cell in text for cell in row)
    assert text.lstrip().startswith("! R-hat is above 1.01")
