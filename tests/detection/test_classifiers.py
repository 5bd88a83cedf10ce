"""Scores of classifiers of every make, and classifiers that have normalised their energy away."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gibbsian import MLP, Gaussian
from gibbsian.detection.base import ROWS_AT_ONCE
from gibbsian.detection.classifiers import JointEnergy, LayerFeatures, LogSumExp, MaxProbability, logits
from gibbsian.detection.scores import GradientNorm
from gibbsian.energies.classifier import ClassifierEnergy, check_logits
from gibbsian.errors import ArgumentTypeError, DomainError, InputError, OptionError, ShapeError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.randn((9, 2), generator=seeded(), dtype=torch.float64)
W = torch.randn((2, 4), generator=seeded(1), dtype=torch.float64)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(2, 5), nn.Tanh()), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.body(x))


class Wrapped(nn.Module):
    """As transformers and some of timm's: an object that holds the logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return SimpleNamespace(logits=self.net(x), hidden=None)


class Several(nn.Module):
    """As classifiers that return a loss or hidden layers beside the logits, in a tuple or by name."""

    def __init__(self, net, named=False):
        super().__init__()
        self.net, self.named = net, named

    def forward(self, x):
        logits = self.net(x)
        hidden = (x, x)
        return {"hidden": x, "logits": logits} if self.named else (logits.mean(), logits, hidden)


class Normalised(nn.Module):
    """With batch normalisation, as nearly all networks of images."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)


with torch.random.fork_rng():
    torch.manual_seed(0)
    PLAIN = Plain().double()
    LIBRARY = MLP(2, hidden=(6,), classes=4).double()


@pytest.mark.parametrize(
    "net",
    [
        *(PLAIN, lambda x: PLAIN(x), Wrapped(PLAIN), Several(PLAIN), Several(PLAIN, named=True)),
        *(ClassifierEnergy(net, 4) for net in (PLAIN, Wrapped(PLAIN), Several(PLAIN), Several(PLAIN, named=True))),
    ],
)
def test_any_classifier_has_the_same_energy(net):
    f = PLAIN(X).detach()
    torch.testing.assert_close(logits(net, X), f)
    torch.testing.assert_close(LogSumExp(net)(X), -torch.logsumexp(f, 1))
    torch.testing.assert_close(LogSumExp(net, 0.3)(X), -0.3 * (f / 0.3).exp().sum(1).log())
    torch.testing.assert_close(MaxProbability(net)(X), -torch.softmax(f, 1).amax(1).log())
    assert not LogSumExp(net)(X).requires_grad


def test_the_librarys_networks_are_classifiers():
    torch.testing.assert_close(LogSumExp(LIBRARY)(X), ClassifierEnergy(LIBRARY, 4)(X).detach())
    assert len(LogSumExp(LIBRARY)(X[:1].expand(ROWS_AT_ONCE + 5, 2))) == ROWS_AT_ONCE + 5


def test_batch_normalisation_is_taken_as_it_is_in_use():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Normalised().double()
    images = torch.randn((40, 1, 4, 4), generator=seeded(3), dtype=torch.float64)
    net(images * 3.0 + 1.0)  # in training mode, so that the running averages are those of something
    with pytest.raises(InputError, match="batch normalisation"):
        LogSumExp(net)
    score = LogSumExp(net.eval())
    # A row's score does not depend on its neighbours, and scoring leaves the averages alone.
    averages = net.layers[1].running_mean.clone()
    torch.testing.assert_close(score(images)[:1], score(images[:1]))
    torch.testing.assert_close(score(images), -torch.logsumexp(net(images), 1).detach())
    assert torch.equal(net.layers[1].running_mean, averages)
    assert GradientNorm(ClassifierEnergy(net, 3))(images).isfinite().all()
    assert not net.training
    with pytest.raises(InputError, match="batch normalisation"):
        LogSumExp(net.train())


def test_limits_of_temperature():
    f = PLAIN(X).detach()
    torch.testing.assert_close(LogSumExp(PLAIN, 1e-3)(X), -f.amax(1), rtol=0, atol=2e-3)
    hot = 1e4
    torch.testing.assert_close(LogSumExp(PLAIN, hot)(X) + hot * math.log(4), -f.mean(1), rtol=0, atol=1e-3)


def test_the_joint_energy_is_the_lowest_over_the_classes():
    classifier, base = ClassifierEnergy(PLAIN, 4), Gaussian(dim=2).double()
    each = torch.stack([classifier.joint(X, y=torch.full((9,), k)) for k in range(4)], 1).detach()
    torch.testing.assert_close(JointEnergy(classifier)(X), each.amin(1))
    torch.testing.assert_close(JointEnergy(classifier + base)(X), each.amin(1) + base(X))


def test_the_approximate_mass_is_the_gradient_of_the_energy_of_points():
    # Of linear logits x W the gradient of the energy is minus the mean of W's columns under the class probabilities.
    found = GradientNorm(ClassifierEnergy(lambda x: x @ W, 4))(X)
    torch.testing.assert_close(found, (torch.softmax(X @ W, 1) @ W.T).norm(dim=1))


def test_sure_rows_keep_their_order():
    sure = torch.tensor([[20.0, 0.0], [30.0, 0.0]])
    found = MaxProbability(lambda x: x)(sure)
    assert found[0] > found[1] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_normalised_outputs_are_refused_by_name(dtype):
    f = torch.randn((64, 10), generator=seeded(2), dtype=torch.float32)
    with pytest.raises(DomainError, match=r"returns probabilities: all 64 rows sum to 1.*without its softmax"):
        check_logits(f.softmax(1).to(dtype))
    with pytest.raises(DomainError, match=r"returns log-probabilities.*without its log_softmax"):
        check_logits(f.log_softmax(1).to(dtype))
    check_logits(f.to(dtype))
    check_logits(f.abs().to(dtype))
    check_logits(-f.abs().to(dtype))


def test_one_row_alone_that_sums_to_one_is_not_enough_among_others():
    check_logits(torch.tensor([[0.5, 0.5], [2.0, 3.0]]))
    with pytest.raises(DomainError):
        check_logits(torch.tensor([[0.5, 0.5]]))
    check_logits(torch.tensor([[0.5, 0.5]]).log())  # logits of one row may well have the energy 0


def test_a_trained_sigmoid_is_refused_and_small_logits_are_not():
    f = 4.0 * torch.randn((8, 3), generator=seeded(2))
    with pytest.raises(DomainError, match=r"between 0 and 1 at all 8 rows.*without its sigmoid"):
        check_logits(f.sigmoid())
    check_logits(f.sigmoid()[:7])
    check_logits(0.1 * f.sigmoid())  # a network at its start, whose outputs are mostly its biases
    check_logits(0.9 + 0.1 * f.sigmoid())
    check_logits(1.1 * f.sigmoid())
    with pytest.raises(DomainError, match="sigmoid"):
        logits(lambda x: (20.0 * PLAIN(x)).sigmoid(), X)


@pytest.mark.parametrize("score", [LogSumExp, MaxProbability])
def test_a_classifier_that_returns_probabilities_is_refused(score):
    with pytest.raises(DomainError, match="softmax"):
        score(nn.Sequential(PLAIN, nn.Softmax(1)))(X)
    with pytest.raises(DomainError, match="softmax"):
        JointEnergy(ClassifierEnergy(nn.Sequential(PLAIN, nn.Softmax(1)), 4))(X)


def test_features_of_a_layer():
    torch.testing.assert_close(LayerFeatures(PLAIN, "body")(X), PLAIN.body(X).detach())
    torch.testing.assert_close(LayerFeatures(Wrapped(PLAIN), "net.body.0")(X), PLAIN.body[0](X).detach())
    assert not PLAIN.body._forward_hooks


def dropping():
    return nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x):
        return self.used(x)


BAD = {
    "temperature": (lambda: LogSumExp(PLAIN, 0.0), OptionError, "got 0.0"),
    "no function": (lambda: LogSumExp("resnet"), ArgumentTypeError, "resnet"),
    "training mode": (lambda: LogSumExp(dropping()), InputError, "dropout in training mode"),
    "one output": (lambda: LogSumExp(lambda x: x[:, :1])(X), ShapeError, r"\(9, K\).*got \(9, 1\)"),
    "two tables": (lambda: MaxProbability(lambda x: (x, x))(X), ShapeError, "one table; got tuple"),
    "no table": (lambda: MaxProbability(lambda x: (x[:, 0], "x"))(X), ShapeError, "got tuple"),
    "no tensor": (lambda: MaxProbability(lambda x: None)(X), ShapeError, "got NoneType"),
    "no energy": (lambda: JointEnergy(PLAIN), ArgumentTypeError, "ClassifierEnergy"),
    "no classifier": (lambda: JointEnergy(Gaussian(dim=2)), ArgumentTypeError, "ClassifierEnergy"),
    "no module": (lambda: LayerFeatures(lambda x: x, "body"), ArgumentTypeError, "Module"),
    "unknown layer": (lambda: LayerFeatures(PLAIN, "bodi"), OptionError, "Did you mean 'body'"),
    "unused layer": (lambda: LayerFeatures(Unused().double(), "spare")(X), ShapeError, "it gave nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
