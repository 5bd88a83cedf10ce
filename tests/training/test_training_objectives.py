"""Training with the library's own objectives: it learns, and it resumes to the bit, buffers and labels included."""

import pytest
import torch
from test_checkpoints import assert_same_run
from training_cases import QUIET, Bowl, rows, same

from gibbsian.energies.neural import MLP
from gibbsian.energies.tractable import Gaussian
from gibbsian.errors import OptionError
from gibbsian.kernels.langevin import MALA, ULA
from gibbsian.objectives.augment import AdditiveNoise
from gibbsian.objectives.base import Batch
from gibbsian.objectives.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from gibbsian.objectives.denoising import DenoisingScoreMatching, LogUniform, MultiLevelDenoising
from gibbsian.objectives.sampler_gradient import SamplerKL
from gibbsian.objectives.starts import Starts
from gibbsian.training.fit import fit

RUN = {"steps": 40, "log_every": 4, "checkpoint_every": 10, "batch_size": 16, "learning_rate": 0.01, **QUIET}


def persistent(base):
    return PersistentContrastiveDivergence(MALA(0.1), base, steps=3, buffer_size=32, restart=0.1)


def everything(**options):
    """Starts of all kinds, moves between rounds, and the gradient through the sampler."""
    settings = {"starts": Starts(0.25, 0.25, 0.5), "augment": AdditiveNoise(0.1), "kl": SamplerKL(0.1, steps=2)}
    return ContrastiveDivergence(
        ULA(0.05), 3, base=wide(), buffer_size=32, data_noise=0.1, augment_fraction=0.5, **(settings | options)
    )


def wide():
    return Gaussian(2, scale=torch.full((2,), 2.0, dtype=torch.float64))


def labelled():
    x = rows(48).float()
    return Batch(x, {"y": (x[:, 0] > 1).long()})


def classes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP(2, hidden=(8,), classes=2)


def smooth():
    """Its layers carry on a power iteration while they train."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP(2, hidden=(8,), spectral_norm=True)


CASES = {
    "labelled PCD": lambda: (classes(), labelled(), persistent(Gaussian(2, scale=2.0))),
    "labelled CD": lambda: (classes(), labelled(), ContrastiveDivergence(MALA(0.1), steps=2)),
    "PCD with spectral norms": lambda: (smooth(), rows(48).float(), persistent(Gaussian(2, scale=2.0))),
    "PCD": lambda: (Bowl(), rows(48), persistent(wide())),
    "PCD with all options": lambda: (Bowl(), rows(48), everything()),
    "short runs": lambda: (
        Bowl(),
        rows(48),
        ContrastiveDivergence(ULA(0.05), 5, starts=Starts(noise=1.0), base=wide()),
    ),
    "DSM": lambda: (Bowl(), rows(48), DenoisingScoreMatching(sigma=0.3)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_off_run_goes_on_exactly(tmp_path, case):
    def train(folder, **options):
        energy, data, objective = CASES[case]()
        rng = torch.Generator().manual_seed(1)
        return fit(energy, data, objective, rng=rng, folder=tmp_path / folder, **RUN, **options), objective

    plain, objective = train("a")
    with pytest.raises(ZeroDivisionError):
        train("b", callbacks=[lambda record: 1 / (record["step"] < 28)])
    again, resumed = train("b", resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b", step=40)
    assert same(plain.energy.state_dict(), again.energy.state_dict())
    assert same(objective.state_dict(), resumed.state_dict())
    assert plain.rollbacks == 0
    if "PCD" in case:
        assert objective.buffer.filled
        assert plain.history[-1]["buffer_age"] > 0


def test_the_same_objects_may_go_on_after_a_break(tmp_path):
    energy, data, objective = CASES["PCD with spectral norms"]()
    rng = torch.Generator().manual_seed(1)
    with pytest.raises(ZeroDivisionError):
        fit(energy, data, objective, rng=rng, folder=tmp_path, callbacks=[lambda r: 1 / (r["step"] < 28)], **RUN)
    assert fit(energy, data, objective, rng=rng, folder=tmp_path, resume=True, **RUN).steps == 40


def test_persistent_chains_find_the_mean_and_the_precision():
    data = rows(1000, seed=2)
    objective = PersistentContrastiveDivergence(MALA(0.2), wide(), steps=3, buffer_size=1000, restart=0.0)
    energy = Bowl()
    fit(energy, data, objective, rng=torch.Generator().manual_seed(0), steps=600, batch_size=250, learning_rate=0.03)
    # Off the sample's own moments by the noise of averaged stochastic gradients: well under the width of 0.5.
    torch.testing.assert_close(energy.mean.detach(), data.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(energy.log_precision.detach(), -data.var(0).log(), atol=0.15, rtol=0)


def test_another_kernel_is_refused_by_name_on_resuming(tmp_path):
    rng = torch.Generator().manual_seed(0)
    fit(Bowl(), rows(48), persistent(wide()), rng=rng, folder=tmp_path, **RUN)
    objective = PersistentContrastiveDivergence(MALA(0.2), wide(), steps=3, buffer_size=33, restart=0.1)
    with pytest.raises(OptionError) as caught:
        fit(Bowl(), rows(48), objective, rng=rng, folder=tmp_path, resume=True, **RUN)
    assert "objective.kernel was MALA(step_size=0.1), now MALA(step_size=0.2)" in str(caught.value)
    assert "objective.buffer.size was 32, now 33" in str(caught.value)


def test_other_starts_moves_and_weights_are_refused_on_resuming(tmp_path):
    rng = torch.Generator().manual_seed(0)
    fit(Bowl(), rows(48), everything(), rng=rng, folder=tmp_path, **RUN)
    objective = everything(starts=Starts(0.5, 0.25, 0.25), augment=AdditiveNoise(0.2), kl=SamplerKL(0.2, steps=2))
    with pytest.raises(OptionError) as caught:
        fit(Bowl(), rows(48), objective, rng=rng, folder=tmp_path, resume=True, **RUN)
    for told in (
        "starts was Starts(data=0.25, noise=0.25, buffer=0.5), now Starts(data=0.5",
        "augment was AdditiveNoise(sigma=0.1), now AdditiveNoise(sigma=0.2)",
        "kl was SamplerKL(weight=0.1",
    ):
        assert told in str(caught.value)


def test_settings_that_are_callable_count_and_addresses_do_not(tmp_path):
    class Leveled(Bowl):
        context = ("sigma",)

        def forward(self, x, sigma):
            return super().forward(x)

    def train(low, **options):
        objective = MultiLevelDenoising(LogUniform(low, 1.0))
        rng = torch.Generator().manual_seed(0)
        return fit(Leveled(), rows(48), objective, rng=rng, folder=tmp_path, **RUN, **options)

    train(0.1)
    train(0.1, resume=True)
    with pytest.raises(OptionError, match=r"LogUniform\(.*0\.2"):
        train(0.2, resume=True)
