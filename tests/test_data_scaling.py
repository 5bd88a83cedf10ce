"""Scaling: exact inverses, the log-determinant against the Jacobian, and the way to JSON and back."""

import json
import math

import pytest
import torch

from gibbsian.data.scaling import Scaling, identity_scaling, range_scaling, standard_scaling
from gibbsian.errors import DataError, ModelFileError, OptionError, ShapeError

RNG = torch.Generator().manual_seed(3)
TABLE = torch.randn(200, 3, generator=RNG, dtype=torch.float64) * torch.tensor([0.1, 2.0, 30.0]) + 5.0
SCALINGS = {
    "table": (standard_scaling(TABLE), TABLE[:4]),
    "one column": (standard_scaling(TABLE[:, :1]), TABLE[:4, :1]),
    "image": (range_scaling(0, 16, (2, 3, 3)), 16 * torch.rand(4, 2, 3, 3, generator=RNG, dtype=torch.float64)),
    "binary": (identity_scaling((5,)), torch.ones(4, 5, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_backward_undoes_forward(name):
    scaling, x = SCALINGS[name]
    assert torch.allclose(scaling.backward(scaling.forward(x)), x, rtol=1e-14, atol=1e-14)


def jacobian_log_det(scaling, x):
    point = x[:1]
    jacobian = torch.autograd.functional.jacobian(lambda v: scaling.forward(v).flatten(), point)
    return torch.linalg.slogdet(jacobian.reshape(point.numel(), point.numel()))[1].item()


@pytest.mark.parametrize("name", SCALINGS)
def test_log_det_is_that_of_the_jacobian(name):
    scaling, x = SCALINGS[name]
    assert scaling.log_det == pytest.approx(jacobian_log_det(scaling, x), abs=1e-10)


def test_the_jacobian_catches_a_broken_twin():
    # Counting the one scale of a picture once, instead of once per pixel, is the mistake to guard against.
    scaling, x = SCALINGS["image"]
    assert -math.log(scaling.scale[0]) != pytest.approx(jacobian_log_det(scaling, x), abs=1e-3)


def test_a_density_in_model_units_becomes_one_in_data_units():
    scaling, x = SCALINGS["table"]
    standard = torch.distributions.Normal(torch.zeros(3, dtype=torch.float64), 1.0)
    exact = torch.distributions.Normal(torch.tensor(scaling.offset).double(), torch.tensor(scaling.scale).double())
    found = standard.log_prob(scaling.forward(x)).sum(1) + scaling.log_det
    assert torch.allclose(found, exact.log_prob(x).sum(1), rtol=0, atol=1e-4)


def test_standard_columns_have_mean_zero_and_deviation_one():
    z = standard_scaling(TABLE).forward(TABLE)
    assert torch.allclose(z.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(z.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-12)


def test_a_range_goes_to_minus_one_and_one():
    scaling = range_scaling(0, 255, (1, 1, 3))
    x = torch.tensor([0.0, 127.5, 255.0]).reshape(1, 1, 1, 3)
    assert scaling.forward(x).flatten().tolist() == [-1.0, 0.0, 1.0]
    assert scaling.log_det == pytest.approx(-3 * math.log(127.5))


@pytest.mark.parametrize("name", SCALINGS)
def test_json_keeps_every_bit(name):
    scaling = SCALINGS[name][0]
    assert Scaling.from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling


def test_dtype_is_kept():
    assert SCALINGS["image"][0].forward(torch.zeros(1, 2, 3, 3, dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: range_scaling(1, 1, (2,)), OptionError, "1 to 1"),
        (lambda: Scaling((0.0,), (0.0,), (2,)), OptionError, "positive"),
        (lambda: Scaling((math.nan,), (1.0,), (2,)), OptionError, "nan"),
        (lambda: Scaling((0.0,) * 3, (1.0,) * 3, (2,)), OptionError, "got 3 and 3"),
        (lambda: identity_scaling((2,)).forward(torch.zeros(4, 3)), ShapeError, r"\(4, 3\)"),
        (lambda: standard_scaling(torch.zeros(4)), ShapeError, r"\(n, d\)"),
        (lambda: standard_scaling(torch.ones(4, 2), ("a", "b")), DataError, "a, b"),
        (lambda: Scaling.from_dict({"offset": [0.0]}), ModelFileError, "scale"),
        (lambda: Scaling.from_dict({"offset": ["x"], "scale": [1], "event_shape": [1]}), ModelFileError, "'x'"),
    ],
)
def test_bad_scalings_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
