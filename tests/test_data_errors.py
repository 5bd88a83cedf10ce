"""Bad input: each kind is refused, and the message names the place, the value and the remedy."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gibbsian.data import datasets, load
from gibbsian.errors import ArgumentTypeError, DataError, OptionError

X = np.random.default_rng(0).normal(size=(20, 3))
GOOD = "a,b\n1,2\n3,4\n5,7\n"


def refuse(source, *says, error=DataError, **options):
    """Load, expect a refusal that contains every one of ``says``, and that fits on a screen."""
    with pytest.raises(error) as caught:
        load(source, **options)
    message = str(caught.value)
    for text in says:
        assert text in message, message
    assert len(message) < 1200


def table(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---- Files that are missing, broken or unknown


def test_missing_file(tmp_path):
    table(tmp_path, GOOD, "measurements.csv")
    refuse(tmp_path / "measurement.csv", "no file", "Did you mean measurements.csv")
    refuse(tmp_path / "nowhere" / "x.csv", "nowhere does not exist")
    refuse("absent.csv", "absent.csv", "current folder")


def test_unknown_name():
    refuse("digit", "no data set named 'digit'", "'digits'", "file or folder", error=OptionError)
    refuse("Two_Moon", "'two-moons'", error=OptionError)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.csv", "x.parquet"])
def test_empty_file(name, tmp_path):
    refuse(table(tmp_path, "", name), name, "empty")


@pytest.mark.parametrize("ending", [".npy", ".npz", ".parquet"])
@pytest.mark.parametrize("keep", [0.97, 0.5, 0.1])
def test_truncated_file(ending, keep, tmp_path):
    path = tmp_path / f"x{ending}"
    if ending == ".npy":
        np.save(path, X)
    elif ending == ".npz":
        np.savez_compressed(path, x=X)
    else:
        pd.DataFrame(X, columns=list("abc")).to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    refuse(path, path.name, "cannot be read" if ending != ".npy" or keep > 0.2 else path.name)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".parquet"])
def test_a_file_of_another_format(ending, tmp_path):
    refuse(
        table(tmp_path, "this is text\n" * 40, f"x{ending}"),
        f"x{ending}",
        "not a NumPy file" if "n" in ending else "Parquet",
    )


def test_a_damaged_array_inside_an_archive(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=X)
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(bytes(content))
    refuse(path, "x.npz", "again")


def test_a_single_array_with_the_wrong_ending(tmp_path):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    refuse(tmp_path / "x.npz", "rename it to x.npy")


@pytest.mark.parametrize("name", ["x.xlsx", "x.pt", "x"])
def test_unknown_kind_of_file(name, tmp_path):
    refuse(table(tmp_path, "1,2\n", name), name, ".parquet", "folders of pictures")


def test_text_in_another_encoding(tmp_path):
    refuse(table(tmp_path, GOOD.encode("utf-16")), "UTF-8")
    refuse(table(tmp_path, "a,größe\n1,2\n3,4\n".encode("latin-1")), "UTF-8")


def test_not_data_at_all():
    refuse(3, "int", error=ArgumentTypeError)
    refuse(None, "NoneType", error=ArgumentTypeError)


# ---- Tables


def test_text_columns_are_named_with_their_first_value(tmp_path):
    path = table(tmp_path, "x,age,kind\n1,10,setosa\n2,unknown,rosa\n3,12,rosa\n")
    refuse(
        path, "2 columns", "age (1 of 3 values; the first is 'unknown' in row 2)", "kind (all", "'setosa'", "labels="
    )
    refuse(pd.DataFrame({"x": [1, 2, 3], "day": pd.to_datetime(["2020-01-01"] * 3)}), "day (dates", "2020-01-01")
    refuse(pd.DataFrame({"x": [1, 2, 3], "v": [[1], [2], [3]]}), "v (all", "[1]")
    refuse(table(tmp_path, "1;2,5\n3;4,5\n5;6,5\n"), "decimal mark")
    refuse(table(tmp_path, "?,1,2\n3,4,5\n6,7,9\n"), "'?' in row 1")


def test_missing_values_are_counted_and_placed(tmp_path):
    path = table(tmp_path, "a,b\n1,2\n3,\nnan,4\n,5\n")
    refuse(path, "3 missing values", "in 3 of 4 rows", "b (1)", "a (2)", "row 2, column b", "dropna")
    refuse(table(tmp_path, "a,b\n1,2\n3,inf\n-inf,4\n"), "2 infinite", "row 2, column b")
    bad = X.copy()
    bad[4, 1] = np.nan
    refuse(bad, "1 missing value", "row 5, column x1")
    refuse(torch.tensor(bad), "1 missing value")
    refuse(pd.DataFrame({"a": pd.array([1, None, 3], dtype="Int64")}), "row 2, column a")
    pictures = np.random.default_rng(0).random((5, 4, 4))
    pictures[2, 1, 3] = np.inf
    refuse(pictures, "1 infinite", "picture 3", "(0, 1, 3)")


def test_missing_values_in_the_files_own_held_out_part(tmp_path):
    bad = X.copy()
    bad[0, 0] = np.nan
    np.savez(tmp_path / "x.npz", x_train=X, x_test=bad)
    refuse(tmp_path / "x.npz", "held-out part of x.npz", "row 1")


def test_constant_columns_are_named():
    x = X.copy()
    x[:, 1] = 7
    refuse(pd.DataFrame(x, columns=["a", "b", "c"]), "b (always 7)", "drop it")
    refuse(np.full((5, 4, 4), 3, dtype=np.uint8), "Every pixel")
    rare = np.zeros((100, 2))
    rare[:, 1] = np.arange(100)
    rare[99, 0] = 1e-3
    refuse(rare, "Constant over all 3 rows", "drop", limit=3, held_out=0)


def test_duplicate_columns_are_named(tmp_path):
    refuse(table(tmp_path, "a,b,a\n1,2,3\n4,5,6\n7,8,9\n"), "'a'", "Rename")
    refuse(pd.DataFrame(X, columns=["a", "a", "b"]), "'a'")


def test_values_beyond_single_precision(tmp_path):
    times = pd.DataFrame({"time": 1.7e9 + np.arange(30.0), "x": np.arange(30.0)})
    refuse(times, "time", "single precision", "Subtract")
    refuse(X * 1e60, "single precision")
    refuse(np.random.default_rng(0).random((5, 3, 3)) * 1e60, "single precision")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n", "no rows below"),
        ("\n\n# nothing\n", "no rows"),
        ("a,b\n1,2\n", "1 row"),
        ("a,b\n1,2\n3,4,5\n6,7\n", "line 3"),
        ("a,b\n1,2,3\n4,5,6\n7,8,9\n", "names 2 columns"),
    ],
)
def test_tables_without_enough_rows_or_with_ragged_ones(text, says, tmp_path):
    refuse(table(tmp_path, text), "table.csv", says)


def test_unknown_columns(tmp_path):
    refuse(table(tmp_path, GOOD), "no column named 'bb'", "'b'", labels="bb", error=OptionError)


# ---- Arrays


def test_archives_without_usable_arrays(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, scalar=3.0, names=np.array(["a", "b"]))
    refuse(path, "no array of numbers", "scalar", "names")
    np.savez(path)
    refuse(path, "holds nothing")
    np.savez(path, first=X, second=X)
    refuse(path, "first (20, 3) float64", "second", "array='first'")
    refuse(path, "no array in x.npz named 'frst'", "'first'", array="frst", error=OptionError)
    refuse(path, "named 'y'", array="first", labels="y", error=OptionError)


def test_archives_whose_parts_do_not_fit(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x_train=X, x_test=X[:, :2])
    refuse(path, "(3,)", "(2,)")
    np.savez(path, x_train=X, x_test=X, y_train=np.zeros(20))
    refuse(path, "only one of the two parts")
    np.savez(path, x_train=X, x_test=X, y_train=np.arange(20) % 2, y_test=np.arange(20) % 3)
    refuse(path, "classes that the training rows lack: 2")
    np.savez(path, x_train=X > 0, x_test=X)
    refuse(path, "zeros and ones")
    np.savez(path, x_train=X, x_test=X)
    refuse(path, "its own held-out rows", held_out=0.2, error=OptionError)


def test_objects_are_not_unpickled(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([[1, 2], [3]], dtype=object), allow_pickle=True)
    refuse(path, "x.npy", "Python objects", "dtype=float")
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object))
    refuse(tmp_path / "x.npz", "Python objects")
    refuse(np.array([[1, "a"], [2, "b"]], dtype=object), "Python objects", "numpy.asarray")
    refuse([[1, 2], [3]], "one array", "same shape")
    refuse(np.array([["a", "b"]] * 4), "text", "'a'")
    refuse(np.zeros(4, dtype="datetime64[s]"), "dates")


def test_records_are_refused_with_a_way_out(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(4, dtype=[("a", float), ("b", int)]))
    refuse(tmp_path / "x.npy", "fields a, b", "to_csv")


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.array(3.0), "1 number"),
        (np.zeros((0, 3)), "(0, 3)"),
        (X[:1], "1 row"),
        (np.zeros((4, 1, 2, 3, 3)), "5 axes"),
        (np.ones((4, 3, 3)) * 1j, "channels"),
    ],
)
def test_shapes_that_are_no_data_set(x, says):
    refuse(x, "he array", says)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.zeros(19), "20 rows but 19 labels"),
        (np.zeros((20, 2, 2)), "(20, 2, 2)"),
        (np.full((20, 2), 0.5), "not one-hot"),
        (np.linspace(0, 1, 20), "row 2"),
        ([None] * 20, "row 1"),
        ([1.0] * 19 + [np.nan], "row 20"),
        (np.zeros(20, dtype=complex), "complex"),
    ],
)
def test_bad_labels(labels, says):
    refuse(X, says, labels=labels)


# ---- Pictures


def pictures(folder, count=4, size=(5, 4), **options):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_pictures_of_unequal_size(tmp_path):
    folder = pictures(tmp_path / "set")
    Image.new("L", (7, 6)).save(folder / "z.png")
    refuse(folder, "0.png is 5 x 4", "z.png is 7 x 6", "1 of 5")


def test_a_folder_without_pictures(tmp_path):
    refuse(tmp_path, "no pictures", "empty")
    table(tmp_path, GOOD, "data.csv")
    refuse(tmp_path, "data.csv", ".png")


def test_a_broken_picture_is_named(tmp_path):
    folder = pictures(tmp_path / "set", size=(50, 40))
    whole = (folder / "2.png").read_bytes()
    for kept in (whole[: len(whole) // 2], b"", b"not a picture"):
        (folder / "2.png").write_bytes(kept)
        refuse(folder, "2.png", "cannot be read")


def test_pictures_that_do_not_belong_together(tmp_path):
    folder = pictures(tmp_path / "set")
    pictures(folder / "class")
    refuse(folder, "4 lie directly", "folder of its own")
    deep = pictures(tmp_path / "deep")
    Image.fromarray(np.zeros((4, 5), dtype=np.uint16)).save(deep / "z.png")
    refuse(deep, "different depths", "uint16")
    clear = pictures(tmp_path / "clear")
    Image.new("RGBA", (5, 4), (1, 2, 3, 0)).save(clear / "z.png")
    refuse(clear, "z.png", "transparent in 20 of 20")
    film = pictures(tmp_path / "film")
    frames = [Image.fromarray(np.full((4, 5), v, dtype=np.uint8)) for v in (0, 9)]
    frames[0].save(film / "z.tif", save_all=True, append_images=frames[1:])
    refuse(film, "z.tif", "2 pictures")


def test_labels_of_pictures(tmp_path):
    folder = pictures(tmp_path / "set")
    refuse(folder, "4 pictures but 3 labels", labels=[0, 1, 1])
    refuse(folder, "no column 'kind'", labels="kind", error=OptionError)
    refuse(folder / "1.png", "single picture", str(folder))


# ---- Options and the user's folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"held_out": 1.0}, "got 1.0"),
        ({"held_out": -0.1}, "got -0.1"),
        ({"limit": 1}, "got 1"),
        ({"seed": -1}, "got -1"),
        ({"kind": "picture"}, "'picture'"),
        ({"kind": "binary"}, "0 and 1"),
        ({"kind": "image"}, "reshape"),
        ({"array": "x"}, "npz"),
        ({"labels": "kind"}, "'kind'"),
    ],
)
def test_bad_options(options, says):
    refuse(X, says, error=OptionError, **options)


def test_options_that_a_source_does_not_take(tmp_path):
    refuse("digits", "built-in", labels="y", error=OptionError)
    refuse(table(tmp_path, GOOD), "npz", array="x", error=OptionError)


def test_what_to_do_without_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GIBBSIAN_DATA", raising=False)
    refuse("mnist", "GIBBSIAN_DATA", "mnist.npz", "x_train", "28 x 28")
    refuse("nltcs", "nltcs.npz", "16 columns")
    lines = {i.name: i for i in datasets()}
    assert not lines["mnist"].available
    assert "GIBBSIAN_DATA" in lines["mnist"].remedy
    assert lines["digits"].available
    monkeypatch.setenv("GIBBSIAN_DATA", str(tmp_path / "none"))
    refuse("fashion-mnist", "no such folder")
    monkeypatch.setenv("GIBBSIAN_DATA", str(tmp_path))
    refuse("fashion-mnist", "fashion_mnist.npz", "not there")
    np.savez(tmp_path / "nltcs.npz", train=X)
    refuse("nltcs", "not the file expected", "(3,)", "lacks valid, test")
