"""The flow's likelihood of held-out rows under a trained model: exact for a Gaussian, in the data's units, kept."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gibbsian import Model
from gibbsian import flow_evaluation as module
from gibbsian.building import initial_weights
from gibbsian.data.scaling import Scaling
from gibbsian.diagnostics.estimate import Estimate
from gibbsian.evaluation import Evaluation, follow
from gibbsian.flow_evaluation import FlowSummary, flow_summary
from gibbsian.recipes import choose
from gibbsian.reporting import likelihood_summary

SHAPES = {"exact": (1, 2, 4), "probes": (1, 5, 5)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_model(shape, kind="image"):
    """The Gaussian of the rows: the network says nothing. Grey values of mean 100 and spread 20."""
    rows = (100.0 + 20.0 * torch.randn((2000, *shape), generator=generator(1))).round()
    recipe = choose(kind, shape, len(rows), {"width": 4, "depth": 1, "local": 0, "dropout": 0.0})
    scaling = Scaling((127.5,), (127.5,), shape)
    energy = initial_weights(recipe, scaling.forward(rows))
    energy.leave.weight.data.zero_()
    energy.leave.bias.data.zero_()
    return Model(energy, recipe, scaling), rows


def check_bits(name) -> None:
    model, rows = gaussian_model(SHAPES[name])
    found = flow_summary(model, rows, generator(2))
    d, low, density = rows[0].numel(), model.recipe.sigma_min, model.recipe.sigma_density
    spread = float((rows - rows.mean(0)).square().mean().sqrt())

    def nats(variance, model_variance):
        return -0.5 * d * (math.log(2 * math.pi * model_variance) + variance / model_variance)

    # Rows spread by 20 with noise of so many grey levels, or dequantised, under the Gaussian of the level's spread.
    at = {sigma: spread**2 + (127.5 * sigma) ** 2 for sigma in (low, density)}
    expected = nats(at[density], at[density])
    assert abs(found.log_prob.value - expected) < 4.0 * found.log_prob.stderr, f"{found.log_prob}, not {expected}"
    whole = nats(spread**2 + 1.0 / 12.0, at[low])
    assert abs(found.bits_log_prob.value - whole) < 4.0 * found.bits_log_prob.stderr
    assert found.bits.value == pytest.approx(-found.bits_log_prob.value / d / math.log(2.0))
    assert found.change < 0.01
    assert found.rows == (module.MANY_ROWS if name == "exact" else module.ROWS)
    assert 0.0 < found.log_prob.stderr < 0.1 * d
    assert "bits per dimension" in found.told()


@pytest.mark.parametrize("name", SHAPES)
def test_the_flow_of_a_gaussian_has_its_likelihood_in_the_datas_units(name):
    check_bits(name)


def test_a_scaling_that_is_forgotten_is_caught(monkeypatch):
    monkeypatch.setattr(Scaling, "log_det", 0.0)
    with pytest.raises(AssertionError, match="not"):
        check_bits("exact")


def test_rows_that_are_no_whole_numbers_have_no_bits():
    model, rows = gaussian_model((1, 2, 4))
    assert flow_summary(model, rows + 0.25, generator()).bits is None
    assert flow_summary(model, rows, generator()).bits is not None


def test_a_model_without_levels_or_with_open_labels_has_no_flow():
    recipe = choose("table", (2,), 100, {"objective": "denoising", "width": 4})
    scaling = Scaling((0.0,), (1.0,), (2,))
    model = Model(initial_weights(recipe, torch.randn((9, 2), generator=generator())), recipe, scaling)
    assert flow_summary(model, torch.zeros(20, 2), generator()) is None


def test_it_is_kept_and_shown_beside_the_energys_own():
    flow = FlowSummary(100, Estimate(-3.0, 0.1), 0.2, Estimate(1.5, 0.01), Estimate(-800.0, 3.0), 0.001)
    kept = Evaluation.from_dict(json.loads(json.dumps(Evaluation(flow=flow).to_dict())))
    assert kept.flow == flow
    summary = likelihood_summary(kept)
    assert (summary.flow, summary.bits_per_dimension, summary.held_out) == (flow.log_prob, flow.bits, None)
    older = Evaluation().to_dict()
    del older["flow"]
    assert Evaluation.from_dict(older).flow is None


def test_a_flow_that_leaves_the_numbers_is_a_note():
    model, rows = gaussian_model((1, 2, 4))
    with torch.no_grad():
        model.energy.leave.bias.fill_(math.nan)
        model.energy.enter.weight.fill_(math.nan)
    notes = []
    assert follow(model, rows, generator(), notes) is None
    assert "left the numbers" in notes[0]
