"""`fit` finds planted couplings of trainable Ising and Potts models, by every discrete objective, within its errors."""

import pytest
import torch
from torch import nn

import gibbsian as gb
from gibbsian.energies.gauges import lattice_gas_gauge, pair_couplings
from gibbsian.energies.pairwise import Ising, Potts
from gibbsian.kernels.gibbs import BlockGibbs
from gibbsian.kernels.tempering import ParallelTempering
from gibbsian.objectives.concrete_score import ConcreteScoreMatching
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.energy_discrepancy import EnergyDiscrepancy
from gibbsian.objectives.probability_flow import MinimumProbabilityFlow
from gibbsian.objectives.pseudo_likelihood import PseudoLikelihood, RatioMatching
from gibbsian.objectives.single_site import SingleSiteObjective
from recovery import SPIN_CASE, SPINS, assert_recovered, estimates, flat, planted, seeded, spins, standard_errors

ROWS, CHAINS = 2000, 500
TRUTH = torch.tensor(SPIN_CASE.truth, dtype=torch.float64)


def fitted(energy, data, objective, steps=250, ema=0.9):
    """All rows in every step, and no clipping: the minimum is what is asked for."""
    run = gb.fit(
        energy,
        data,
        objective,
        rng=seeded(3),
        steps=steps,
        batch_size=len(data),
        learning_rate=0.05,
        final_learning_rate_factor=0.01,
        warmup_steps=0,
        ema_decay=ema,
        clip_norm=0.0,
        log_every=steps,
        checkpoint_every=10_000,
    )
    assert run.events == []
    return energy


def assert_within_errors(found, error, truth=TRUTH) -> None:
    """Of 78 scores, z > 3 is once in 370 for each: three or more are a false alarm once in 600, and seeds are fixed.

    Their mean square is 1, known to 0.16: errors that are too large or too small are seen too.
    """
    z = (found - truth) / error
    assert int((z.abs() > 3).sum()) <= 2, f"missed: z = {z.tolist()}"
    assert 0.5 < float(z.square().mean()) < 1.7, f"missed: mean square of z {float(z.square().mean())}"


OBJECTIVES = {
    "pseudo-likelihood": PseudoLikelihood,
    "ratio matching": RatioMatching,
    "probability flow": MinimumProbabilityFlow,
    "concrete score": ConcreteScoreMatching,
    "energy discrepancy": lambda: EnergyDiscrepancy(1.0, negatives=8),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fit_finds_planted_couplings_within_three_errors(name):
    # The bias of concrete scores falls as 1 / n, and is seen with 2000 rows.
    data = SPIN_CASE.rows(8 * ROWS if name == "concrete score" else ROWS, seeded(5))
    objective = OBJECTIVES[name]()
    energy = fitted(spins(), data, objective)
    assert_within_errors(flat(energy), standard_errors(objective, energy, data, 100))


def likelihood_errors():
    """Of maximum likelihood: the covariance of means and correlations, inverted."""
    energy, x = SPIN_CASE.at_truth(), SPIN_CASE.rows(20_000, seeded(8))
    s = 2 * x - 1
    i, j = torch.triu_indices(SPINS, SPINS, 1)
    told = torch.cat((s, s[:, i] * s[:, j]), 1)
    assert energy.field.shape == (SPINS,)
    return torch.linalg.inv(told.T.cov()).diagonal().div(ROWS).sqrt()


CHAIN_OBJECTIVES = {
    "CD": lambda base: ContrastiveDivergence(BlockGibbs(), steps=5),
    "PCD": lambda base: PersistentContrastiveDivergence(BlockGibbs(), base, 1, CHAINS, 0.0),
    "PT-PCD": lambda base: PersistentContrastiveDivergence(
        ParallelTempering(BlockGibbs(), (1.0, 0.5)), base, 1, CHAINS, 0.0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN_OBJECTIVES)
def test_chains_find_them_too(name):
    """The last hundreds of steps are averaged, which leaves little of the chains' noise."""
    data = SPIN_CASE.rows(ROWS, seeded(6))
    base = gb.Bernoulli(logits=torch.zeros(SPINS, dtype=torch.float64))
    objective = CHAIN_OBJECTIVES[name](base).double()
    energy, batch = spins(), CHAINS
    gb.fit(
        energy,
        data,
        objective,
        rng=seeded(3),
        steps=1000,
        batch_size=batch,
        learning_rate=0.02,
        final_learning_rate_factor=0.02,
        ema_decay=0.997,
        clip_norm=0.0,
    )
    z = (flat(energy) - TRUTH) / likelihood_errors()
    assert int((z.abs() > 3).sum()) <= 3, f"missed: z = {z.tolist()}"
    assert float(z.square().mean()) < 2.0, "missed"


class Twin(SingleSiteObjective):
    """Pseudo-likelihood that counts a state's own value twice."""

    def score(self, log_ratios):
        return (2 + log_ratios.squeeze(2).exp()).log()


def test_a_slip_is_not_recovered_from():
    data = SPIN_CASE.rows(ROWS, seeded(5))
    energy = fitted(spins(), data, Twin())
    with pytest.raises(AssertionError, match="missed"):
        assert_within_errors(flat(energy), standard_errors(PseudoLikelihood(), energy, data, 100))


def test_energy_discrepancy_recovers_them_over_data_sets():
    found = estimates(lambda: EnergyDiscrepancy(1.0, negatives=2), CHAIN_CASE, 500)
    assert_recovered(found, CHAIN_CASE.truth, 0.6)


def graph_of_four() -> Ising:
    """Four spins around a ring: a sparse model."""
    return Ising.sparse(4, [0, 1, 2, 3], [1, 2, 3, 0], torch.zeros(4, dtype=torch.float64), trainable=True)


CHAIN_CASE = planted("ring", graph_of_four, torch.tensor([0.2, -0.1, 0.0, 0.3, 0.4, -0.3, 0.2, 0.5]).double())


def test_a_potts_model_is_found_up_to_its_gauge():
    """Pseudo-likelihood fixes what is free of a gauge; in the lattice-gas gauge each parameter is compared."""
    sites, classes, n = 4, 3, 6000
    case = planted(
        "potts", lambda: Potts.dense(sites, classes, torch.float64), 0.5 * torch.randn(66, generator=seeded(2)).double()
    )
    truth = lattice_gas_gauge(case.at_truth(), 0)
    found = []
    for seed in range(6):
        energy = fitted(case.model(), case.rows(n, seeded(20 + seed)), PseudoLikelihood(), steps=120)
        gas = lattice_gas_gauge(energy, 0)
        found.append(torch.cat((gas.field[:, 1:].flatten(), pair_couplings(gas)[2][:, 1:, 1:].flatten())).detach())
    want = torch.cat((truth.field[:, 1:].flatten(), pair_couplings(truth)[2][:, 1:, 1:].flatten())).detach()
    found = torch.stack(found)
    assert float(found.std(0).max()) < 0.25, "no power"
    # The standard error is that of the spread of all parameters over 6 data sets, 32 of them: known to a tenth.
    error = found.std(0).square().mean().sqrt() / 6**0.5
    z = (found.mean(0) - want) / error
    assert float(z.abs().max()) < 5.0, f"missed: z = {z.tolist()}"
    assert float(z.square().mean()) < 2.0
    assert nn.utils.parameters_to_vector(energy.parameters()).shape == (66,)
