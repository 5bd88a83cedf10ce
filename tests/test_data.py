"""Loading: every kind of source to the right rows, kinds, splits and names."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gibbsian.data import datasets, load
from gibbsian.data.catalogue import TARGETS

FOLDER = os.environ.get("GIBBSIAN_DATA", "")
X = np.random.default_rng(0).normal(size=(40, 3))


def all_rows(data):
    """Training and held-out rows together, sorted, so that they can be compared with the source."""
    rows = torch.cat([data.train, data.held_out]).flatten(1).numpy()
    return rows[np.lexsort(rows.T[::-1])]


def in_order(x):
    rows = np.asarray(x, dtype=np.float32).reshape(len(x), -1)
    return rows[np.lexsort(rows.T[::-1])]


def needs(name):
    there = bool(FOLDER) and (Path(FOLDER) / name).is_file()
    return pytest.mark.skipif(not there, reason=f"GIBBSIAN_DATA does not name a folder with {name}")


# ---- Sources


def write_npy(path):
    np.save(path / "x.npy", X)
    return path / "x.npy"


def write_npz(path):
    np.savez(path / "x.npz", X=X, other=np.zeros(3))
    return path / "x.npz"


def write_lone_npz(path):
    np.savez_compressed(path / "x.npz", anything=X)
    return path / "x.npz"


def write_csv(path):
    pd.DataFrame(X, columns=["a", "b", "c"]).to_csv(path / "x.csv", index=False)
    return path / "x.csv"


def write_numbered_csv(path):
    # What pandas writes by default: row numbers in front, column numbers on top.
    pd.DataFrame(X).to_csv(path / "x.csv")
    return path / "x.csv"


def write_savetxt(path):
    np.savetxt(path / "x.txt", X, header="three columns, made by hand")
    return path / "x.txt"


def write_semicolons(path):
    pd.DataFrame(X).to_csv(path / "x.csv", index=False, header=False, sep=";")
    return path / "x.csv"


def write_tsv(path):
    pd.DataFrame(X, columns=["a b", "b,c", "c"]).to_csv(path / "x.tsv", index=False, sep="\t", encoding="utf-8-sig")
    return path / "x.tsv"


def write_parquet(path):
    pd.DataFrame(X, columns=["a", "b", "c"]).to_parquet(path / "x.parquet")
    return path / "x.parquet"


WRITERS = [
    write_npy,
    write_npz,
    write_lone_npz,
    write_csv,
    write_numbered_csv,
    write_savetxt,
    write_semicolons,
    write_tsv,
    write_parquet,
    lambda path: X,
    lambda path: torch.tensor(X, requires_grad=True),
    lambda path: pd.DataFrame(X, columns=["a", "b", "c"]),
    lambda path: X.tolist(),
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_source_gives_the_same_rows(write, tmp_path):
    data = load(write(tmp_path))
    assert data.kind == "table"
    assert data.train.dtype == torch.float32
    assert data.train.shape == (32, 3)
    assert data.held_out.shape == (8, 3)
    assert len(data.columns) == 3
    assert np.allclose(all_rows(data), in_order(X), rtol=1e-6)


def test_strings_and_paths_with_a_home_are_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_csv(tmp_path)
    assert load("~/x.csv").columns == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        ("a,b\n1,2\n3,4\n5,6\n", ("a", "b"), 3),
        ("1,2\n3,4\n5,6.5\n", ("x0", "x1"), 3),
        ("# made today\n\na b\n1 2\n3 4\n5 6\n", ("a", "b"), 3),
        ("place,1990,1991\n1,2,3\n4,5,6\n7,8,10\n", ("place", "1990", "1991"), 3),
        ('"a;1";b\n1;2\n3;4\n5;7\n', ("a;1", "b"), 3),
        ("a\n1\n2\n3\n", ("a",), 3),
        ("1\n2\n4\n", ("x0",), 3),
        ("a,b,\n1,2,\n3,4,\n5,6,\n", ("a", "b"), 3),
        ("0,1,2\n1.5,2,3\n4,5,6\n7,8,9\n", ("0", "1", "2"), 3),
        ("0,1\n1,0\n0,0\n1,1\n", ("x0", "x1"), 4),
        ("a,b\nTrue,2\nFalse,3\nTrue,4\n", ("a", "b"), 3),
        ("a,b\r\n1,2\r\n3,4\r\n5,6\r\n", ("a", "b"), 3),
        ("a,b\n1e3,-2\n+3,.4\n5.,6\n", ("a", "b"), 3),
    ],
)
def test_headers_and_separators(text, columns, rows, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    data = load(path, held_out=0)
    assert data.columns == columns
    assert len(data.train) == rows


def test_text_above_text_is_a_header_and_text_beside_numbers_is_not(tmp_path):
    (tmp_path / "named.csv").write_text("x,kind\n1,iris\n2,rose\n4,rose\n")
    (tmp_path / "bare.csv").write_text("1,iris\n2,rose\n4,rose\n")
    named = load(tmp_path / "named.csv", labels="kind", held_out=0)
    bare = load(tmp_path / "bare.csv", labels="x1", held_out=0)
    for data in (named, bare):
        assert data.train.flatten().tolist() == [1, 2, 4]
        assert data.label_names == ("iris", "rose")
        assert data.labels.tolist() == [0, 1, 1]


def test_types_are_converted():
    whole = load(np.arange(12).reshape(6, 2), held_out=0)
    assert whole.train.tolist() == np.arange(12.0).reshape(6, 2).tolist()
    z = X[:, :2] + 1j * X[:, 1:]
    pair = load(z, held_out=0)
    assert pair.columns == ("re(x0)", "im(x0)", "re(x1)", "im(x1)")
    expected = np.stack([X[:, 0], X[:, 1], X[:, 1], X[:, 2]], 1)
    assert np.allclose(pair.train, expected, rtol=1e-6)
    assert "imaginary" in pair.notes[0]
    assert np.allclose(load(X.astype(complex), held_out=0).train, X, rtol=1e-6)
    assert np.allclose(load(torch.tensor(X).bfloat16(), held_out=0).train, X, rtol=1e-2)
    assert load(pd.DataFrame({"a": pd.array([1, 2, 4], dtype="Int64")}), held_out=0).train.flatten().tolist() == [
        1,
        2,
        4,
    ]


def test_zeros_and_ones_are_binary():
    bits = np.random.default_rng(1).random((30, 6)) < 0.5
    assert load(bits).kind == load(bits.astype(int)).kind == "binary"
    assert load(bits.reshape(30, 2, 3)).event_shape == (1, 2, 3)
    assert load(bits.astype(float), kind="table").kind == "table"
    never = bits.copy()
    never[:, 2] = False
    assert any("never vary" in note for note in load(never).notes)


@pytest.mark.parametrize(
    ("shape", "event"),
    [((9, 4, 5), (1, 4, 5)), ((9, 3, 8, 7), (3, 8, 7)), ((9, 8, 7, 3), (3, 8, 7)), ((9, 8, 7, 1), (1, 8, 7))],
)
def test_axes_of_pictures(shape, event):
    x = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    x.flat[0] = 255
    data = load(x, held_out=0)
    assert data.kind == "image"
    assert data.event_shape == event
    assert data.value_range == (0, 255)
    moved = np.moveaxis(x, 3, 1) if shape[-1] in (1, 3) else x.reshape(9, *event)
    assert np.array_equal(data.train, moved)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.linspace(0, 1, 64).reshape(4, 4, 4), (0, 1)),
        (np.linspace(-0.9, 1, 64).reshape(4, 4, 4), (-1, 1)),
        (np.linspace(-3, 7, 64).reshape(4, 4, 4), (-3, 7)),
        ((np.arange(64) % 17).astype(np.uint8).reshape(4, 4, 4), (0, 16)),
        (np.arange(64, dtype=np.uint16).reshape(4, 4, 4) * 1000, (0, 65535)),
        (np.arange(64).reshape(4, 4, 4) + 5, (0, 68)),
    ],
)
def test_ranges_of_pixels(x, expected):
    data = load(x, held_out=0)
    assert data.value_range == expected
    z = data.scaling().forward(data.train)
    assert z.min() >= -1
    assert z.max() <= 1


# ---- Folders of pictures


def picture(path, mode="L", size=(5, 4), seed=0, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = () if mode in ("L", "1") else (len(mode),)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    if mode == "RGBA":
        pixels[..., 3] = 255 if value is None else value
    Image.fromarray(pixels, mode="L" if mode == "1" else mode).save(path)
    return pixels


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_folder_of_pictures(mode, tmp_path):
    pixels = [picture(tmp_path / f"{i}.png", mode, seed=i) for i in range(5)]
    (tmp_path / ".hidden.png").write_text("no picture")
    data = load(tmp_path, held_out=0)
    channels = 1 if mode == "L" else 3
    expected = np.stack(pixels).reshape(5, 4, 5, -1)[..., :channels]
    assert data.kind == "image"
    assert data.labels is None
    assert np.array_equal(data.train, np.moveaxis(expected, 3, 1))


def test_sixteen_bit_greys_keep_their_values(tmp_path):
    x = np.random.default_rng(0).integers(0, 65536, (4, 6, 6)).astype(np.uint16)
    x[0, 0, 0] = 65535
    for i in range(4):
        Image.fromarray(x[i]).save(tmp_path / f"{i}.png")
    data = load(tmp_path, held_out=0)
    assert np.array_equal(data.train[:, 0], x)
    assert data.value_range == (0, 65535)


def test_folders_inside_are_classes_and_other_files_are_told_of(tmp_path):
    for i in range(6):
        picture(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png", seed=i)
    (tmp_path / "cat" / "readme.txt").write_text("cats")
    data = load(tmp_path, held_out=0)
    assert data.label_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "readme.txt" in data.notes[0]
    assert len(load(tmp_path, limit=4, held_out=0).train) == 4


def test_greys_among_colours_are_read_as_colour(tmp_path):
    picture(tmp_path / "a.png", "RGB")
    grey = picture(tmp_path / "b.png", "L")
    picture(tmp_path / "c.png", "RGB", seed=1)
    data = load(tmp_path, held_out=0)
    assert np.array_equal(data.train[1], np.stack([grey] * 3))
    assert "grey" in data.notes[0]


def test_black_and_white_pictures_are_binary(tmp_path):
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).random((5, 5)) < 0.5).save(tmp_path / f"{i}.png")
    assert load(tmp_path).kind == "binary"


# ---- Splits


def test_the_split_is_seeded_stated_and_complete():
    a, b, c = load(X, seed=1), load(X, seed=1), load(X, seed=2)
    assert torch.equal(a.train, b.train)
    assert not torch.equal(a.train, c.train)
    assert np.array_equal(all_rows(a), in_order(X))
    assert "8 of 40" in a.split
    assert "seed 1" in a.split
    assert load(X, held_out=0.5).held_out.shape[0] == 20
    assert load(X, held_out=0).held_out.shape == (0, 3)


def test_labels_travel_with_their_rows():
    y = (X[:, 0] > 0).astype(int)
    data = load(X, labels=y, limit=20)
    assert torch.equal(data.labels, (data.train[:, 0] > 0).long())
    assert torch.equal(data.held_out_labels, (data.held_out[:, 0] > 0).long())
    assert len(data.train) + len(data.held_out) == 20
    assert "20 of 40" in data.split


@pytest.mark.parametrize(
    "labels", [np.eye(3)[np.arange(40) % 3], (np.arange(40) % 3 + 5.0)[:, None], list("abc" * 13 + "a")]
)
def test_forms_of_labels(labels):
    data = load(X, labels=labels, held_out=0)
    assert data.labels.tolist() == [i % 3 for i in range(40)]
    assert len(data.label_names) == 3


def test_a_file_keeps_its_own_split(tmp_path):
    path = tmp_path / "own.npz"
    y = np.arange(40) % 4
    np.savez(path, x_train=X[:30], x_test=X[30:], y_train=y[:30], y_test=y[30:])
    data = load(path)
    assert np.allclose(data.train, X[:30])
    assert np.allclose(data.held_out, X[30:])
    assert data.held_out_labels.tolist() == y[30:].tolist()
    assert "the file's own" in data.split
    small = load(path, limit=5)
    assert len(small.train) == len(small.held_out) == 5


def test_parts_named_train_valid_and_test(tmp_path):
    np.savez(tmp_path / "own.npz", train=X[:20], valid=X[20:30], test=X[30:])
    data = load(tmp_path / "own.npz")
    assert np.allclose(data.valid, X[20:30])
    assert np.allclose(data.held_out, X[30:])
    np.savez(tmp_path / "two.npz", train=X[:20], valid=X[20:30])
    data = load(tmp_path / "two.npz")
    assert data.valid is None
    assert np.allclose(data.held_out, X[20:30])


def test_an_array_and_its_labels_can_be_picked_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", first=X, second=2 * X, species=np.arange(40) % 2)
    data = load(tmp_path / "x.npz", array="second", labels="species", held_out=0)
    assert np.allclose(data.train, 2 * X)
    assert data.labels.tolist() == [i % 2 for i in range(40)]


# ---- The catalogue


def test_digits_hold_out_a_third():
    data = load("digits")
    assert (data.kind, data.event_shape, data.value_range) == ("image", (1, 8, 8), (0, 16))
    assert (len(data.train), len(data.held_out)) == (1198, 599)
    z = data.scaling().forward(data.train)
    assert (z.min(), z.max()) == (-1, 1)


@pytest.mark.parametrize("info", [i for i in datasets() if i.available and i.size <= 10_000], ids=lambda i: i.name)
def test_the_table_says_what_is_loaded(info):
    data = load(info.name)
    assert data.kind == info.kind
    assert data.event_shape == info.shape
    assert len(data.train) + len(data.held_out) == info.size
    assert data.kind != "table" or len(data.columns) == info.shape[0]


@pytest.mark.parametrize("name", TARGETS)
def test_generated_sets_carry_their_truth(name):
    data = load(name, limit=50, seed=4)
    assert data.truth is not None
    assert torch.isfinite(data.truth(data.train)).all()
    assert torch.equal(data.train, load(name.upper().replace("-", "_"), limit=50, seed=4).train)
    assert not torch.equal(data.train, load(name, limit=50, seed=5).train)


@pytest.mark.parametrize(
    ("name", "file", "kind", "event", "train", "held_out"),
    [
        pytest.param("mnist", "mnist.npz", "image", (1, 28, 28), 60000, 10000, marks=needs("mnist.npz")),
        pytest.param("nltcs", "nltcs.npz", "binary", (16,), 16181, 3236, marks=needs("nltcs.npz")),
        pytest.param("plants", "plants.npz", "binary", (69,), 17412, 3482, marks=needs("plants.npz")),
        pytest.param(
            "fashion-mnist", "fashion_mnist.npz", "image", (1, 28, 28), 60000, 10000, marks=needs("fashion_mnist.npz")
        ),
    ],
)
def test_sets_from_the_users_folder(name, file, kind, event, train, held_out):
    data = load(name, limit=100)
    assert (data.kind, data.event_shape, len(data.train), len(data.held_out)) == (kind, event, 100, 100)
    assert f"{train} training and {held_out} held-out" in data.split
    assert all(not i.remedy for i in datasets() if i.name == name)
