"""The training loop against a plain one, its data order, its refusals, and Ctrl-C."""

import math
import signal
import threading

import pytest
import torch
from torch import nn
from training_cases import QUIET, Bowl, Chains, ExactLikelihood, labelled, rows, same

from gibbsian.energies.tractable import Bernoulli, Gaussian
from gibbsian.errors import (
    ArgumentTypeError,
    DataError,
    DomainError,
    InputError,
    OptionError,
    ShapeError,
    TrainingInterrupted,
)
from gibbsian.kernels.langevin import MALA
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching
from gibbsian.objectives.exact import ExactLikelihood as Exact
from gibbsian.objectives.noise_contrastive import NoiseContrastiveEstimation
from gibbsian.training.feed import Order
from gibbsian.training.fit import fit
from gibbsian.training.settings import TrainingSettings


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_maximum_likelihood_estimate_is_reached():
    data = rows(200)
    result = fit(Bowl(), data, ExactLikelihood(), rng=seeded(), steps=400, batch_size=200, learning_rate=0.05)
    # With whole batches the optimum is the sample's own mean and variance, not only close to the truth.
    torch.testing.assert_close(result.energy.mean, data.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.energy.log_precision, -data.var(0, correction=0).log(), atol=1e-3, rtol=0)
    assert result.steps == 400
    assert result.events == []


def reference(data, settings, clip=True, build=torch.optim.AdamW):
    """The same training written out plainly, with torch's unfused optimiser."""
    energy, objective, rng = Bowl(), ExactLikelihood(), seeded()
    seed = int(torch.randint(2**31, (), generator=rng))
    optimizer = build(energy.parameters(), betas=settings.betas, weight_decay=settings.weight_decay)
    average = [p.detach().clone() for p in energy.parameters()]
    per_epoch = len(data) // settings.batch_size
    for t in range(settings.steps):
        generator = seeded(seed + t // per_epoch)
        order = torch.randperm(len(data), generator=generator)
        start = t % per_epoch * settings.batch_size
        batch = data[order[start : start + settings.batch_size]]
        loss = objective(energy, Batch(batch), rng).value
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(energy.parameters(), settings.clip_norm)
        floor = settings.final_learning_rate_factor
        cosine = floor + (1 - floor) * (1 + math.cos(math.pi * t / settings.steps)) / 2
        optimizer.param_groups[0]["lr"] = settings.learning_rate * cosine * min(1, (t + 1) / settings.warmup_steps)
        optimizer.step()
        d = min(settings.ema_decay, (1 + t) / (10 + t))
        average = [d * a + (1 - d) * p.detach() for a, p in zip(average, energy.parameters())]
    return average


def test_the_loop_is_adamw_with_warmup_cosine_clipping_and_averaging():
    settings = TrainingSettings(
        steps=57, batch_size=8, learning_rate=0.03, warmup_steps=10, weight_decay=0.1, clip_norm=0.7, ema_decay=0.9
    )
    data = rows(45)
    fitted = fit(Bowl(), data, ExactLikelihood(), rng=seeded(), settings=settings).energy
    for p, expected in zip(fitted.parameters(), reference(data, settings)):
        # The clipping factor passes through float32.
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)


def test_sgd_follows_the_gradient_with_momentum():
    settings = TrainingSettings(
        steps=23, batch_size=8, optimizer="sgd", momentum=0.6, learning_rate=0.03, warmup_steps=4, clip_norm=0.7
    )
    data = rows(45)

    def run(momentum):
        def plain(params, **_):
            return torch.optim.SGD(params, settings.learning_rate, momentum=momentum)

        fitted = fit(Bowl(), data, ExactLikelihood(), rng=seeded(), settings=settings).energy
        return [p.detach() for p in fitted.parameters()], reference(data, settings, build=plain)

    for p, expected in zip(*run(0.6)):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)
    for p, twin in zip(*run(0.0)):
        assert not torch.allclose(p, twin, rtol=1e-3, atol=1e-4)


def test_a_loop_without_clipping_is_told_apart():
    settings = TrainingSettings(
        steps=57, batch_size=8, learning_rate=0.03, warmup_steps=10, weight_decay=0.1, clip_norm=0.7, ema_decay=0.9
    )
    data = rows(45)
    fitted = fit(Bowl(), data, ExactLikelihood(), rng=seeded(), settings=settings).energy
    twin = reference(data, settings, clip=False)
    assert not torch.allclose(next(fitted.parameters()).detach(), twin[0], rtol=1e-3, atol=1e-4)


def test_without_averaging_the_last_weights_are_returned(tmp_path):
    energy = Bowl()
    fit(energy, rows(), Chains(), rng=seeded(), steps=20, ema_decay=0.0, folder=tmp_path, **QUIET)
    saved = torch.load(tmp_path / "checkpoints" / "step-0000020.pt", weights_only=True)
    assert torch.equal(energy.mean, saved["energy"]["mean"])


def test_the_average_and_the_last_weights_differ_and_both_are_kept(tmp_path):
    energy, objective = Bowl(), Chains()
    fit(energy, rows(), objective, rng=seeded(), steps=20, folder=tmp_path, **QUIET)
    saved = torch.load(tmp_path / "checkpoints" / "step-0000020.pt", weights_only=True)
    assert torch.equal(energy.mean, saved["average"]["energy.mean"])
    assert not torch.equal(energy.mean, saved["energy"]["mean"])
    assert torch.equal(objective.shift, saved["average"]["objective.shift"])
    assert float(objective.shift.detach()) != 0.0


def test_frozen_parameters_stay():
    energy = Bowl()
    energy.log_precision.requires_grad_(False)
    fit(energy, rows(), ExactLikelihood(), rng=seeded(), steps=20, weight_decay=0.5)
    assert torch.equal(energy.log_precision, torch.zeros(2, dtype=torch.float64))
    assert bool(energy.mean.any())


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, second, third = (
        fit(Bowl(), rows(), Chains(), rng=seeded(seed), steps=30).energy.mean.detach() for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(Bowl(), rows(), Chains(), rng=seeded(), steps=5)
    assert torch.equal(before, torch.get_rng_state())


def test_each_epoch_visits_every_row_once_in_a_new_order():
    order = Order(12, 4, torch.device("cpu"))
    epochs = [torch.cat([order.rows(3 * e + i, seed=7) for i in range(3)]) for e in range(4)]
    assert all(torch.equal(e.sort().values, torch.arange(12)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(order.rows(2, seed=7), epochs[0][8:])
    assert not torch.equal(order.rows(2, seed=8), epochs[0][8:])


def test_rows_left_over_are_dropped_and_small_data_shrink_the_batch():
    order = Order(11, 4, torch.device("cpu"))
    assert len(torch.cat([order.rows(i, 0) for i in range(2)]).unique()) == 8
    assert len(Order(3, 128, torch.device("cpu")).rows(0, 0)) == 3


def test_labels_travel_with_their_rows():
    class Watching(ExactLikelihood):
        def forward(self, energy, batch, rng):
            assert torch.equal(batch.x[:, 0], batch.context["y"])
            return super().forward(energy, batch, rng)

    fit(Bowl(), labelled(), Watching(), rng=seeded(), steps=10, batch_size=8)


def test_data_take_the_precision_of_the_parameters():
    class Watching(ExactLikelihood):
        def forward(self, energy, batch, rng):
            assert batch.x.dtype == torch.float64
            return super().forward(energy, batch, rng)

    fit(Bowl(), rows().float(), Watching(), rng=seeded(), steps=2)


def test_records_hold_means_over_their_steps():
    values = []

    class Counting(ExactLikelihood):
        def forward(self, energy, batch, rng):
            loss = super().forward(energy, batch, rng)
            values.append(float(loss.value.detach()))
            return Loss(loss.value, {"count": torch.tensor(len(values))})

    seen = []
    result = fit(Bowl(), rows(), Counting(), rng=seeded(), steps=25, log_every=10, callbacks=[seen.append])
    assert [r["step"] for r in result.history] == [10, 20, 25]
    assert [r["count"] for r in result.history] == [5.5, 15.5, 23.0]
    assert result.history[1]["loss"] == pytest.approx(sum(values[10:20]) / 10, rel=1e-12)
    assert result.history[-1]["learning_rate"] == TrainingSettings(steps=25).learning_rate_at(24)
    assert seen == result.history


def test_an_unknown_setting_suggests_the_nearest():
    with pytest.raises(OptionError, match="learning_rate"):
        fit(Bowl(), rows(), ExactLikelihood(), rng=seeded(), learning_rat=0.1)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (rows().round().long(), DataError, "int64"),
        (rows().numpy(), DataError, "ndarray"),
        (rows()[:1], DataError, "2 or more"),
        (rows()[:, 0], DataError, r"\(40,\)"),
        (rows(dim=3), ShapeError, r"\(3,\)"),
        (rows()[:1].expand(40, 2), DataError, "All 40 rows of the data are equal"),
        (torch.zeros(40, 2), DataError, "All 40 rows"),
        (torch.cat([rows(), torch.full((2, 2), math.nan)]), DataError, "2 of 42 rows"),
        (torch.cat([rows(), torch.full((1, 2), math.inf)]), DataError, "1 of 41 rows"),
    ],
)
def test_data_that_cannot_be_learned_from_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        fit(Bowl(), data, ExactLikelihood(), rng=seeded(), steps=1)


def test_labels_of_the_wrong_length_are_refused():
    with pytest.raises(ShapeError, match="40 rows"):
        Batch(rows(), {"y": torch.zeros(39)})


def test_data_off_the_energys_domain_are_refused():
    class Bits(Bernoulli):
        def __init__(self):
            super().__init__(torch.zeros(2, dtype=torch.float64))
            self.bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    with pytest.raises(DomainError, match="40 of 40"):
        fit(Bits(), rows(), ExactLikelihood(), rng=seeded(), steps=1)


def test_modules_that_cannot_be_trained_are_refused():
    frozen = Bowl()
    frozen.requires_grad_(False)
    with pytest.raises(OptionError, match="parameter"):
        fit(frozen, rows(), ExactLikelihood(), rng=seeded(), steps=1)
    with pytest.raises(ArgumentTypeError, match="module"):
        fit(lambda x: x, rows(), ExactLikelihood(), rng=seeded(), steps=1)
    with pytest.raises(ArgumentTypeError, match="Objective"):
        fit(Bowl(), rows(), lambda *_: None, rng=seeded(), steps=1)


def test_batch_normalisation_in_training_mode_is_refused():
    energy = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0)).double()
    with pytest.raises(InputError, match="batch normalisation"):
        fit(energy, rows(), ExactLikelihood(), rng=seeded(), steps=1)


def test_a_plain_module_is_adopted():
    class Square(Objective):
        def forward(self, energy, batch, rng):
            return Loss(energy(batch.x).square().mean())

    energy = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    result = fit(energy, rows(), Square(), rng=seeded(), steps=300, learning_rate=0.05)
    assert result.energy is energy
    assert result.history[-1]["loss"] < 1e-3


OBJECTIVES = {
    "denoising": lambda: DenoisingScoreMatching(0.3),
    "CD": lambda: ContrastiveDivergence(MALA(0.1)),
    "PCD": lambda: PersistentContrastiveDivergence(MALA(0.1), wide(), steps=2, buffer_size=8),
    "NCE": lambda: NoiseContrastiveEstimation(wide()),
    "exact": lambda: Exact(-6.0, 6.0, points=20),
    "sum": lambda: DenoisingScoreMatching(0.3) + 2.0 * NoiseContrastiveEstimation(wide()),
}


def wide():
    return Gaussian(2, scale=torch.full((2,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_of_one_row(name):
    run = fit(Bowl(), rows(), OBJECTIVES[name](), rng=seeded(), steps=10, batch_size=1, log_every=2)
    assert all(math.isfinite(record["loss"]) for record in run.history)
    assert run.events == []


def test_a_box_around_one_row_is_refused():
    with pytest.raises(DataError, match="one row"):
        fit(Bowl(), rows(), Exact(), rng=seeded(), steps=10, batch_size=1)


def test_precisions_that_do_not_fit_are_told():
    mixed = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1).double(), nn.Flatten(0))
    with pytest.raises(
        OptionError, match=r"energy holds float32 and float64, .*data are float32.*\.to\(device, dtype\)"
    ):
        fit(mixed, rows(), DenoisingScoreMatching(0.3), rng=seeded(), steps=1)
    pcd = PersistentContrastiveDivergence(MALA(0.1), Gaussian(2), buffer_size=64)
    with pytest.raises(OptionError, match=r"float32.*float64.*move the objective"):
        fit(Bowl(), rows(), pcd, rng=seeded(), steps=1)


def test_an_error_of_the_users_own_is_passed_on():
    class Broken(Objective):
        def forward(self, energy, batch, rng):
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        fit(Bowl(), rows(), Broken(), rng=seeded(), steps=1)


def test_tensors_on_several_devices_are_told():
    energy = Bowl()
    energy.register_buffer("table", torch.zeros(3, device="meta"))
    with pytest.raises(OptionError, match=r"energy\.table is on meta and the first on cpu.*\.to\('cpu'\)"):
        fit(energy, rows(), ExactLikelihood(), rng=seeded(), steps=1)
    del energy.table
    energy.log_precision = nn.Parameter(torch.zeros(2, device="meta"))
    with pytest.raises(OptionError, match=r"energy\.log_precision is on meta"):
        fit(energy, rows(), ExactLikelihood(), rng=seeded(), steps=1)


@pytest.mark.parametrize("value", ["rows", "detached"])
def test_a_loss_that_cannot_be_differentiated_is_refused(value):
    class Wrong(Objective):
        def forward(self, energy, batch, rng):
            energies = energy(batch.x)
            return Loss(energies if value == "rows" else energies.mean().detach())

    with pytest.raises(ShapeError, match="0-d"):
        fit(Bowl(), rows(), Wrong(), rng=seeded(), steps=1)


class Interrupting(Chains):
    """Presses Ctrl-C while a step is under way; the presses are no part of the saved state."""

    def __init__(self, presses):
        super().__init__()
        self._presses = dict(presses)
        self._calls = 0

    def forward(self, energy, batch, rng):
        self._calls += 1
        for _ in range(self._presses.pop(self._calls, 0)):
            signal.raise_signal(signal.SIGINT)
        return super().forward(energy, batch, rng)


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    kwargs = {"steps": 40, "log_every": 7, "checkpoint_every": 15, **QUIET}
    plain = fit(Bowl(), rows(), Interrupting({}), rng=seeded(), folder=tmp_path / "a", **kwargs)
    for step in (1, 18, 34):
        with pytest.raises(TrainingInterrupted, match="resume=True"):
            fit(Bowl(), rows(), Interrupting({step: 1}), rng=seeded(), folder=tmp_path / str(step), **kwargs)
        again = fit(Bowl(), rows(), Interrupting({}), rng=seeded(), folder=tmp_path / str(step), resume=True, **kwargs)
        assert same(plain.energy.state_dict(), again.energy.state_dict())
        assert same(plain.history, again.history)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_without_a_folder_leaves_the_average():
    energy = Bowl()
    with pytest.raises(TrainingInterrupted, match="Nothing was saved"):
        fit(energy, rows(), Interrupting({5: 1}), rng=seeded(), steps=40)
    assert bool(energy.mean.any())


def test_a_second_interrupt_stops_at_once():
    objective = Interrupting({5: 2})
    with pytest.raises(KeyboardInterrupt):
        fit(Bowl(), rows(), objective, rng=seeded(), steps=40)
    assert objective._calls == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_applications_own_handler_is_left_alone():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        fit(Bowl(), rows(), Interrupting({2: 1}), rng=seeded(), steps=4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [1]


def test_training_works_outside_the_main_thread_and_without_gradients_around_it():
    results = []

    def train():
        with torch.no_grad():
            results.append(fit(Bowl(), rows(), Chains(), rng=seeded(), steps=5))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert results[0].steps == 5
