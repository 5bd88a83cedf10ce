"""Classifiers as energies: the joint, its marginal and its conditional belong together, whatever the network."""

import math

import pytest
import torch
from torch import nn

from gibbsian import MALA, MLP, ConvEnergy, Gaussian, sample
from gibbsian.energies.classifier import ClassEnergy, ClassifierEnergy, classifier_of
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def nets():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4))
        return {
            "module": flat.double(),
            "function": lambda x: torch.stack([(x - k).square().flatten(1).sum(1) for k in range(4)], 1),
            "MLP": MLP((3, 4, 4), hidden=(8,), frequencies=2, classes=4).double(),
            "convolution": ConvEnergy((3, 4, 4), widths=(6, 8), classes=4).double(),
        }


NETS = nets()


@pytest.mark.parametrize("name", NETS)
def test_the_three_energies_belong_together(name):
    energy = ClassifierEnergy(NETS[name], 4)
    x = 0.1 * torch.randn((7, 3, 4, 4), generator=seeded(), dtype=torch.float64)
    of_class = torch.stack([energy.joint(x, y=torch.full((7,), k)) for k in range(4)], 1)
    logits = energy.logits(x)
    torch.testing.assert_close(of_class, -logits)
    torch.testing.assert_close((-of_class).exp().sum(1), (-energy(x)).exp())
    torch.testing.assert_close(energy.log_class_probs(x), energy(x)[:, None] - of_class)
    torch.testing.assert_close(energy.log_class_probs(x).exp().sum(1), torch.ones(7, dtype=torch.float64))


def test_a_librarys_network_has_the_energies_of_its_classes():
    net = NETS["MLP"]
    energy, x, y = ClassifierEnergy(net, 4), torch.randn((5, 3, 4, 4), dtype=torch.float64), torch.arange(5) % 4
    torch.testing.assert_close(energy.joint(x, y=y), net(x, y=y))
    assert energy.event_shape == energy.joint.event_shape == (3, 4, 4)


class Headed(nn.Module):
    """A network whose last layer is called as the library's networks call all their outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.outputs = nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.outputs(self.body(x).tanh())


def test_a_layer_named_outputs_is_not_taken_for_the_network():
    net, x = Headed(), torch.randn((5, 2), generator=seeded())
    torch.testing.assert_close(ClassifierEnergy(net, 3).logits(x), net(x))


def test_the_joint_shares_its_weights_and_names_itself():
    energy = ClassifierEnergy(nn.Linear(2, 3), 3, 2)
    joint = energy.joint
    assert isinstance(joint, ClassEnergy)
    assert joint.context == ("y",)
    assert energy.context == ()
    assert [p.data_ptr() for p in joint.parameters()] == [p.data_ptr() for p in energy.parameters()]
    assert repr(energy) == "ClassifierEnergy(Linear, classes=3)"
    assert repr(joint.given(y=1)) == "ClassEnergy(ClassifierEnergy(Linear, classes=3)).given(y=1)"


def normal_logits(x):
    """Two normal densities of means -1 and 2 and deviations 0.5 and 1."""
    return torch.cat((-2 * (x + 1) ** 2, -0.5 * (x - 2) ** 2 - math.log(2)), 1)


@pytest.mark.parametrize("labels", [0, 1, "each"])
def test_chains_of_a_class_have_its_law(labels):
    """Means and variances within 6 standard errors of independent chains."""
    n, rng = 4000, seeded(1)
    y = torch.arange(n) % 2 if labels == "each" else torch.full((n,), labels)
    joint = ClassifierEnergy(normal_logits, 2, 1).joint
    given = joint.given(y=y if labels == "each" else labels)
    x = sample(given, MALA(0.25), torch.randn((n, 1), generator=rng, dtype=torch.float64), steps=60, rng=rng).x[:, 0]
    for k, mean, deviation in ((0, -1.0, 0.5), (1, 2.0, 1.0)):
        if bool((y == k).any()):
            rows = x[y == k]
            assert abs(float(rows.mean()) - mean) < 6 * deviation / math.sqrt(len(rows))
            assert abs(float(rows.var()) / deviation**2 - 1) < 6 * math.sqrt(2 / len(rows))


def test_the_classifier_of_a_sum_is_found():
    energy = ClassifierEnergy(nn.Linear(2, 3), 3, 2)
    assert classifier_of(energy) is energy
    assert classifier_of(energy + Gaussian(2) + 0.5 * MLP(2)) is energy
    other = ClassifierEnergy(nn.Linear(2, 3), 3, 2)
    for wrong in (2.0 * energy, energy + other, energy + energy, energy.joint, MLP(2, classes=3), energy - other):
        with pytest.raises(ArgumentTypeError, match="one ClassifierEnergy"):
            classifier_of(wrong)


def test_what_is_no_classifier_is_refused():
    for classes in (1, 0, 2.0, None):
        with pytest.raises(OptionError, match=f"2 classes or more.*classes={classes}"):
            ClassifierEnergy(nn.Linear(2, 3), classes)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="module from"):
        ClassifierEnergy(3, 2)  # type: ignore[arg-type]
    x = torch.zeros(5, 2)
    with pytest.raises(ShapeError, match=r"shape \(5, 4\).*returned \(5, 3\)"):
        ClassifierEnergy(nn.Linear(2, 3), 4)(x)
    with pytest.raises(ShapeError, match=r"returned \(5,\)"):
        ClassifierEnergy(Gaussian(2), 4)(x)
    with pytest.raises(ShapeError, match=r"returned tuple"):
        ClassifierEnergy(lambda x: (x, x), 2)(x)  # type: ignore[arg-type, return-value]
    with pytest.raises(ShapeError, match=r"returned \(5, 1\)"):
        ClassifierEnergy(MLP(2), 2)(x)
    with pytest.raises(OptionError, match="y"):
        ClassifierEnergy(nn.Linear(2, 3), 3).given(y=1)
