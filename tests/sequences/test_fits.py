"""Fits of families: gradients against the library's own, parameters recovered, statistics matched, broken twins."""

import os
from pathlib import Path

import pytest
import torch

from gibbsian.energies.gauges import pair_couplings, zero_sum_gauge
from gibbsian.energies.pairwise import Potts
from gibbsian.errors import ArgumentTypeError, DataError, OptionError
from gibbsian.kernels.tempering import ParallelTempering
from gibbsian.objectives.base import Batch
from gibbsian.objectives.pseudo_likelihood import PseudoLikelihood
from gibbsian.sequences.alignment import read_alignment
from gibbsian.sequences.boltzmann import BoltzmannLearning
from gibbsian.sequences.contacts import precision, read_structure
from gibbsian.sequences.fitting import fit_family
from gibbsian.sequences.frequencies import Statistics, agreement, statistics
from gibbsian.sequences.gibbs import SequenceGibbs
from gibbsian.sequences.machines import effective_couplings, machine_of, weighted_rows
from gibbsian.sequences.mean_field import mean_field_potts
from gibbsian.sequences.pseudo_likelihood import (
    PseudoLikelihoodLoss,
    PseudoLikelihoodSettings,
    fit_pseudo_likelihood,
)
from gibbsian.sequences.settings import FamilySettings
from gibbsian.sequences.tables import profile
from gibbsian.training.fit import fit
from protein_families import alignment, drawn, every, hot, law, small_potts

SITES, LETTERS = 5, 3


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def flat_of(energy):
    gauge = zero_sum_gauge(energy)
    return torch.cat((gauge.field.flatten(), pair_couplings(gauge)[2].flatten())).detach().double()


def exact_statistics(energy):
    """One- and two-point statistics by enumeration."""
    codes, p = law(energy)
    return statistics(codes, energy.field.shape[1], p)


def test_the_loss_and_its_gradient_are_those_of_the_library(monkeypatch):
    monkeypatch.setattr("gibbsian.sequences.pseudo_likelihood.ROWS", 16)
    codes = drawn(small_potts(SITES), 60)
    settings = PseudoLikelihoodSettings(coupling_penalty=0.02, field_penalty=0.01)
    loss = PseudoLikelihoodLoss(codes, torch.ones(60), LETTERS, settings)
    flat = 0.3 * torch.randn(loss.size, generator=rng(1))
    value, gradient = loss(flat)
    energy = loss.energy(flat)
    other = PseudoLikelihood()(energy, Batch(hot(codes, LETTERS, torch.float32)), rng()).value
    j, h = energy.interaction.pairs_above, energy.field
    other = other + 0.02 * j.square().sum() + 0.01 * h.square().sum()
    other.backward()
    assert value == pytest.approx(float(other.detach()), rel=1e-5)
    assert torch.allclose(gradient, torch.cat((h.grad.flatten(), j.grad.flatten())), atol=1e-5)
    assert torch.equal(loss.flat(energy), flat)


def test_weights_count_as_copies():
    codes = drawn(small_potts(SITES), 40)
    settings = PseudoLikelihoodSettings()
    flat = 0.3 * torch.randn(PseudoLikelihoodLoss(codes, torch.ones(40), LETTERS, settings).size, generator=rng(1))
    copies = torch.cat((codes, codes[:20]))
    weighed = PseudoLikelihoodLoss(codes, torch.cat((torch.full((20,), 2.0), torch.ones(20))), LETTERS, settings)(flat)
    copied = PseudoLikelihoodLoss(copies, torch.ones(60), LETTERS, settings)(flat)
    assert weighed[0] == pytest.approx(copied[0], rel=1e-6)
    assert torch.allclose(weighed[1], copied[1], atol=1e-6)
    # A broken twin: weights left out.
    assert PseudoLikelihoodLoss(codes, torch.ones(40), LETTERS, settings)(flat)[0] != pytest.approx(copied[0], rel=1e-4)


def test_pseudo_likelihood_recovers_the_parameters():
    truth = small_potts(SITES, strength=0.4)
    settings = PseudoLikelihoodSettings(1e-6, 1e-6, iterations=300, tolerance=1e-10)
    errors = []
    for n in (4000, 64_000):
        found = fit_pseudo_likelihood(drawn(truth, n), torch.ones(n), LETTERS, settings)
        assert found.converged
        errors.append(float((flat_of(found.energy) - flat_of(truth)).square().mean().sqrt()))
    # Errors fall as the square root of the sequences: four times fewer with sixteen times as many.
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.5)


def test_couplings_of_one_direction_only_are_caught():
    """A broken twin: each pair's gradient taken from its first column alone, so that half of it is missing."""

    class OneWay(PseudoLikelihoodLoss):
        def __call__(self, flat):
            value, gradient = super().__call__(flat)
            cut = self.length * self.letters
            return value, torch.cat((gradient[:cut], 0.5 * gradient[cut:]))

    codes = drawn(small_potts(SITES), 60)
    broken = OneWay(codes, torch.ones(60), LETTERS, PseudoLikelihoodSettings())
    flat = (0.3 * torch.randn(broken.size, generator=rng(1))).double()
    place = broken.parts(flat)[0].numel() + 4
    step = torch.zeros_like(flat)
    step[place] = 1e-2
    slope = (broken((flat + step).float())[0] - broken((flat - step).float())[0]) / 2e-2
    right = PseudoLikelihoodLoss.__call__(broken, flat.float())[1][place]
    assert float(right) == pytest.approx(slope, rel=0.02)
    assert float(broken(flat.float())[1][place]) != pytest.approx(slope, rel=0.2)


def test_a_fit_goes_on_from_a_start_to_the_same_optimum():
    codes = drawn(small_potts(SITES), 500)
    settings = PseudoLikelihoodSettings(tolerance=1e-9)
    once = fit_pseudo_likelihood(codes, torch.ones(500), LETTERS, settings)
    seen = []
    short = PseudoLikelihoodSettings(iterations=4)
    part = fit_pseudo_likelihood(
        codes, torch.ones(500), LETTERS, short, progress=lambda i, loss, e: seen.append((i, e)), every=2
    )
    assert not part.converged
    assert [i for i, _ in seen] == [1, 2, 3, 4]
    assert [e is not None for _, e in seen] == [False, True, False, True]
    twice = fit_pseudo_likelihood(codes, torch.ones(500), LETTERS, settings, start=part.energy)
    assert twice.loss[-1] == pytest.approx(once.loss[-1], rel=1e-5)


@pytest.mark.parametrize("values", [{"coupling_penalty": 0.0}, {"iterations": 0}, {"tolerance": -1.0}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(OptionError, match=r"got|above 0"):
        PseudoLikelihoodSettings(**values)


def test_boltzmann_learning_has_the_gradient_of_the_likelihood():
    family = exact_statistics(small_potts(SITES))
    energy = Potts.dense(SITES, LETTERS)
    base = profile(torch.ones((SITES, LETTERS)))
    objective = BoltzmannLearning(family, base, chains=50_000, coupling_penalty=0.01)
    with torch.no_grad():
        energy.interaction.pairs_above.normal_(0.0, 0.3, generator=rng(3))
    codes = every(SITES, LETTERS)
    noise, nothing = rng(), Batch(torch.zeros(2, SITES, LETTERS))
    for _ in range(6):
        loss = objective(energy, nothing, noise)
    loss.value.backward()
    pairs, field = energy.interaction.pairs_above, energy.field
    found = torch.cat((field.grad.flatten(), pairs.grad.flatten()))
    energy.zero_grad()
    x = hot(codes, LETTERS, torch.float32)
    likelihood = -((field * family.one).sum() + (pairs * family.two).sum()) + (-energy(x)).logsumexp(0)
    (likelihood + 0.01 * pairs.square().sum()).backward()
    exact = torch.cat((field.grad.flatten(), pairs.grad.flatten()))
    assert float((found - exact).abs().max()) < 5.0 / 50_000**0.5
    # A broken twin: the other sign would be as far off as twice the gradient.
    assert float((-found - exact).abs().max()) > 0.1


def learned(kernel, **settings):
    truth = small_potts(SITES, strength=0.4)
    family = exact_statistics(truth)
    energy = Potts.dense(SITES, LETTERS)
    objective = BoltzmannLearning(family, profile(family.one), kernel, chains=2000, **settings)
    run = fit(
        energy,
        hot(drawn(truth, 64), LETTERS, torch.float32),
        objective,
        rng=rng(),
        steps=250,
        batch_size=2,
        optimizer="sgd",
        learning_rate=0.2,
        momentum=0.9,
        clip_norm=0.0,
        ema_decay=0.98,
        warmup_steps=10,
    )
    return truth, energy.requires_grad_(False), run


@pytest.mark.parametrize("kernel", [None, ParallelTempering(SequenceGibbs(), [1.0, 0.6])])
def test_boltzmann_learning_recovers_the_parameters(kernel):
    truth, energy, run = learned(kernel)
    assert float((flat_of(energy) - flat_of(truth)).square().mean().sqrt()) < 0.04
    assert agreement(exact_statistics(truth), exact_statistics(energy)).connected > 0.998
    last = run.history[-1]
    assert last["connected"] > 0.99
    assert ("swap_min" in last) is (kernel is not None)


def test_a_run_of_boltzmann_learning_goes_on_exactly(tmp_path):
    truth = small_potts(SITES)

    def run(folder, steps, resume=False):
        found = alignment(truth, 200)
        settings = FamilySettings("boltzmann", steps=steps, chains=100)
        settings = settings if steps == 20 else FamilySettings("boltzmann", steps=20, chains=100)
        training = settings.training
        object.__setattr__(training, "checkpoint_every", 10)
        stop = () if steps == 20 else (lambda r: (_ for _ in ()).throw(KeyboardInterrupt),)
        object.__setattr__(training, "log_every", 15)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FamilySettings, "training", property(lambda self: training))
            return fit_family(found, settings, rng=rng(), folder=folder, resume=resume, callbacks=stop)

    whole = run(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 15)
    parts = run(tmp_path / "parts", 20, resume=True)
    assert torch.equal(whole.couplings.interaction.pairs_above, parts.couplings.interaction.pairs_above)


def test_boltzmann_learning_refuses_what_it_cannot_fit():
    family = exact_statistics(small_potts(SITES))
    objective = BoltzmannLearning(family, profile(family.one))
    with pytest.raises(ArgumentTypeError, match=r"Potts.dense"):
        objective(small_potts(SITES), Batch(torch.zeros(2, SITES, LETTERS)), rng())
    with pytest.raises(OptionError, match="chains is 2 or more"):
        BoltzmannLearning(family, profile(family.one), chains=1)


def test_mean_field_is_right_where_couplings_are_weak():
    truth = small_potts(SITES, strength=0.05)
    energy = mean_field_potts(exact_statistics(truth), pseudocount=1e-4)
    gap = (flat_of(energy) - flat_of(truth)).abs().max()
    assert float(gap) < 0.03
    assert float(flat_of(truth).abs().max()) > 0.15
    with pytest.raises(OptionError, match="between 0 and 1"):
        mean_field_potts(exact_statistics(truth), 1.0)


def test_a_machine_of_weak_weights_has_the_couplings_that_are_read_off_it():
    machine = machine_of(4, LETTERS, 6, rng())
    with torch.no_grad():
        machine.weight.mul_(20.0)
    machine.requires_grad_(False)
    codes = every(4, LETTERS)
    found = flat_of(effective_couplings(machine, codes, torch.ones(len(codes))))[4 * LETTERS :]
    # The exact couplings: second differences of the free energy, averaged over all others, in the zero-sum gauge.
    minus = -machine(hot(codes, LETTERS, torch.float32)).double().view((LETTERS,) * 4)
    pairs = []
    for i in range(4):
        for j in range(i + 1, 4):
            rest = [k for k in range(4) if k not in (i, j)]
            both = minus.mean(rest)
            pairs.append(both - both.mean(0, keepdim=True) - both.mean(1, keepdim=True) + both.mean())
    exact = torch.stack(pairs).flatten()
    assert float((found - exact).norm() / exact.norm()) < 0.1


def test_rows_come_in_proportion_to_their_weights():
    codes = torch.arange(4)[:, None]
    found = weighted_rows(codes, torch.tensor([1.0, 3.0, 0.0, 4.0]), 800, rng())
    assert torch.bincount(found[:, 0], minlength=4).tolist() == [100, 300, 0, 400]


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        (FamilySettings(coupling_penalty=1e-3), 0.98),
        (FamilySettings("boltzmann", steps=300, chains=2000, learning_rate=0.2), 0.99),
        (FamilySettings("boltzmann", steps=200, chains=1000, learning_rate=0.2, tempering=3), 0.985),
        (FamilySettings("rbm", steps=700, chains=500, hidden=20, batch_size=200, learning_rate=0.02), 0.97),
    ],
    ids=["pseudo-likelihood", "boltzmann", "tempered", "rbm"],
)
def test_every_way_of_fitting_matches_the_family(settings, least):
    found = alignment(small_potts(SITES, strength=0.5), 3000)
    family = fit_family(found, settings, rng=rng())
    codes = every(SITES, LETTERS)
    model = statistics(codes, LETTERS, (-family.energies(codes)).double().softmax(0))
    own = statistics(found.codes, LETTERS)
    assert agreement(own, model).connected > least
    assert family.info.effective == 3000.0
    assert family.info.settings["by"] == settings.by


def test_a_fit_refuses_too_few_sequences_and_unknown_ways():
    with pytest.raises(DataError, match=r"count as 5\.0 effective"):
        fit_family(alignment(small_potts(SITES), 5), rng=rng())
    with pytest.raises(OptionError, match="by is one of"):
        FamilySettings("mean-field")
    with pytest.raises(OptionError, match="chains is 50 or more"):
        FamilySettings(chains=10)
    with pytest.raises(OptionError, match="hottest lies between"):
        FamilySettings(hottest=1.0)
    with pytest.raises(OptionError, match="learning_rate must be a positive number"):
        fit_family(alignment(small_potts(SITES), 50), FamilySettings("boltzmann", learning_rate=0.0), rng=rng())


def test_statistics_know_their_pairs():
    family = exact_statistics(small_potts(SITES))
    assert isinstance(family, Statistics)
    assert family.two.shape == (10, LETTERS, LETTERS)


@pytest.mark.slow
def test_a_real_family_tells_its_contacts():
    folder = Path(os.environ.get("GIBBSIAN_DATA", "."))
    if not (folder / "PF00014_mgap6.fasta.gz").exists():
        pytest.skip("GIBBSIAN_DATA is not a folder with PF00014_mgap6.fasta.gz and PF00014_struct.dat")
    found = read_alignment(folder / "PF00014_mgap6.fasta.gz")
    family = fit_family(found, rng=rng())
    told = precision(family.contacts(), read_structure(folder / "PF00014_struct.dat", found.length))
    assert told.base_rate == pytest.approx(0.395, abs=1e-3)
    assert all(told.at(n) >= least for n, least in zip(told.marks.values(), (1.0, 0.98, 0.90)))
