"""Kernels on disk: every setting back to the bit, and files that are no kernels named as such."""

import dataclasses
import json
import math
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gibbsian as gb
from contracts import seeded
from gibbsian.adaptation import tune
from gibbsian.errors import ArgumentTypeError, ModelFileError, OptionError, StorageError
from gibbsian.kernels.base import settings_repr
from gibbsian.kernels.domains import Reflected, Wrapped
from gibbsian.kernels.saving import kernel_classes, load_kernel, save_kernel
from gibbsian.kernels.spherical import SphericalHMC

FACTOR = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
KERNELS = (
    gb.MALA(0.1 + 0.2),
    gb.ULA(1 / 3, noise_scale=0.1, clip_grad=0.5, box=(-1.0, 2), autocast=torch.bfloat16),
    gb.HMC(torch.tensor([0.1, 0.2]), leapfrog=7, scale=FACTOR, jitter=0.25),
    SphericalHMC(0.3, leapfrog=2),
    Wrapped(gb.HMC(0.1, scale=FACTOR), 2 * math.pi),
    Reflected(gb.MALA(torch.tensor(0.1), scale=torch.ones(2)), torch.tensor([0.0, -math.inf]), math.inf),
)


def same(a, b):
    """Equal to the bit, types and dtypes included."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for f in dataclasses.fields(a):
            same(getattr(a, f.name), getattr(b, f.name))
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for each, other in zip(a, b):
            same(each, other)
    else:
        assert a == b


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_kernel_comes_back_as_it_was(kernel, tmp_path):
    path = save_kernel(kernel, tmp_path / "kernel.safetensors")
    same(load_kernel(path), kernel)
    assert repr(load_kernel(str(path))) == repr(kernel)
    assert os.listdir(tmp_path) == ["kernel.safetensors"]


def test_a_saved_kernel_that_loses_a_setting_is_caught(tmp_path):
    path = save_kernel(KERNELS[2], tmp_path / "kernel")
    with pytest.raises(AssertionError):
        same(load_kernel(path), dataclasses.replace(KERNELS[2], jitter=0.250001))


def test_a_tuned_kernel_draws_the_same_chains_after_a_round_trip(tmp_path):
    energy = gb.Gaussian(covariance=FACTOR @ FACTOR.T)
    tuned = tune(energy, gb.HMC(0.1, 3, scale=FACTOR), energy.sample(64, seeded()), rng=seeded(1), steps=30)
    loaded = load_kernel(save_kernel(tuned.kernel, tmp_path / "kernel"))
    a, b = (gb.sample(energy, k, tuned.state, steps=5, rng=seeded(2)).x for k in (tuned.kernel, loaded))
    assert torch.equal(a, b)


def test_every_kernel_of_the_package_is_found():
    assert {"ULA", "MALA", "HMC", "Wrapped", "Reflected", "SphericalHMC"} <= kernel_classes().keys()
    assert not {"Folding", "State", "Info", "Kernel", "Lifted"} & kernel_classes().keys()


@dataclasses.dataclass(frozen=True)
class Mine:
    """A user's own kernel around another."""

    inner: object
    sizes: tuple
    rule: object = None

    gradients = 1
    domain = "real"
    __repr__ = settings_repr

    def init(self, energy, x): ...

    def noise(self, state, steps, rng): ...

    def step(self, energy, state, noise): ...


def test_kernels_of_ones_own_are_passed_in(tmp_path):
    kernel = Mine(Mine(gb.MALA(0.1, scale=FACTOR), (1, [2.5, -math.inf], None, True, "word")), (torch.ones(3),))
    path = save_kernel(kernel, tmp_path / "kernel")
    same(load_kernel(path, classes=[Mine]), kernel)
    with pytest.raises(
        OptionError, match=r"no kernel named 'Mine'.* Known: .*MALA.*load_kernel\(path, classes=\[Mine\]"
    ):
        load_kernel(path)


def written(path, entry, tensors=None):
    save_file(tensors or {}, path, metadata={"gibbsian_kernel": json.dumps(entry)})
    return path


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"version": 1, "class": "MALLA", "settings": {}}, OptionError, "Did you mean 'MALA'"),
        ({"version": 2, "class": "MALA", "settings": {}}, ModelFileError, "in version 2 of the format"),
        ({"version": 1, "class": "MALA", "settings": {"h": 1}}, ModelFileError, "the setting h, .* it takes: scale, "),
        ({"version": 1, "class": "MALA", "settings": {"step_size": -1.0}}, ModelFileError, "rebuilt: step_size is"),
        ({"version": 1, "class": "MALA", "settings": {}}, ModelFileError, "damaged: TypeError"),
        ({"version": 1, "class": "MALA", "settings": {"scale": {"tensor": "x"}}}, ModelFileError, "KeyError"),
        ({"version": 1, "class": "ULA", "settings": {"autocast": {"dtype": "load"}}}, ModelFileError, "is no dtype"),
        ({"version": 1, "class": "ULA", "settings": {"box": {"set": []}}}, ModelFileError, "damaged"),
        ({"version": 1, "class": ["ULA"], "settings": {}}, ModelFileError, "damaged"),
        ([], ModelFileError, "damaged"),
    ],
)
def test_damaged_settings_are_named(entry, error, message, tmp_path):
    with pytest.raises(error, match=message):
        load_kernel(written(tmp_path / "kernel", entry))


def test_other_files_are_refused(tmp_path):
    path = save_kernel(KERNELS[2], tmp_path / "kernel")
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(ModelFileError, match="truncated, damaged"):
            load_kernel(tmp_path / "cut")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"step_size": 0.1}))
    with pytest.raises(ModelFileError, match="no safetensors file"):
        load_kernel(tmp_path / "pickle")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ModelFileError, match="without a kernel"):
        load_kernel(tmp_path / "weights")
    with pytest.raises(ModelFileError, match="There is no kernel to read"):
        load_kernel(tmp_path / "nothing")


def test_what_cannot_be_saved_is_refused_and_leaves_the_old_file(tmp_path):
    path = save_kernel(gb.MALA(0.1), tmp_path / "kernel")
    for bad, error, message in (
        (Mine(gb.MALA(0.1), (), rule=len), OptionError, "setting rule cannot be saved: it is <built-in"),
        (Mine(Mine(None, (1j,)), ()), OptionError, "setting inner.sizes.0 cannot be saved: it is 1j"),
        (gb.MALA, ArgumentTypeError, r"such as MALA\(0.1\); got"),
        (0.1, ArgumentTypeError, "got 0.1"),
    ):
        with pytest.raises(error, match=message):
            save_kernel(bad, path)
    with pytest.raises(StorageError, match="could not be saved"):
        save_kernel(gb.MALA(0.2), tmp_path / "no" / "folder" / "kernel")
    same(load_kernel(path), gb.MALA(0.1))


def test_a_class_that_takes_a_name_of_the_package_is_refused(tmp_path):
    mala = dataclasses.make_dataclass("MALA", [("step_size", float)], bases=(gb.MALA,), frozen=True)
    with pytest.raises(OptionError, match="named MALA would be read as the package's; rename it"):
        save_kernel(mala(0.1), tmp_path / "kernel")


def test_the_file_is_plain(tmp_path):
    path = save_kernel(KERNELS[4], tmp_path / "kernel")
    with safe_open(str(path), framework="pt") as file:
        entry = json.loads(file.metadata()["gibbsian_kernel"])
        assert list(file.keys()) == ["kernel.scale"]
    assert entry["class"] == "Wrapped"
    assert entry["settings"]["kernel"]["settings"]["scale"] == {"tensor": "kernel.scale"}
