"""Rows that stay on the disk: every kind of file gives the right rows, and every fault is named."""

import builtins
import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gibbsian.data.rows import Rows, open_rows
from gibbsian.data.rows.opening import why_stream
from gibbsian.data.rows.tables import TableSource
from gibbsian.errors import DataError, MissingPackageError, OptionError

N = 60
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(N, 3)).astype(np.float32)
GREY = RNG.integers(0, 256, size=(N, 1, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, size=(N, 3, 6, 5), dtype=np.uint8)


def everything(rows):
    """All rows of both parts, sorted, to be compared with what was written."""
    parts = [part.take(np.arange(len(part)))[0] for part in (rows, rows.held_out())]
    return in_order(torch.cat(parts).numpy())


def in_order(x):
    flat = np.asarray(x, dtype=np.float32).reshape(len(x), -1)
    return flat[np.lexsort(flat.T[::-1])]


def table_of(x, names="abcdefgh"):
    return pa.table({name: x[:, i] for i, name in enumerate(names[: x.shape[1]])})


def write_shards(folder, table, shards=3, ending=".parquet", per_group=7):
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-table.num_rows // shards)
    for i in range(shards):
        part = table.slice(i * size, size)
        if ending == ".parquet":
            pq.write_table(part, folder / f"part-{i}.parquet", row_group_size=per_group)
        else:
            pyarrow.feather.write_feather(part, folder / f"part-{i}{ending}", chunksize=per_group, compression="lz4")
    return folder


def png(picture):
    held = io.BytesIO()
    Image.fromarray(np.moveaxis(picture, 0, 2).squeeze()).save(held, format="PNG")
    return held.getvalue()


def columns(path):
    return write_shards(path / "d", table_of(TABLE)), TABLE, {}


def wide_columns(path):
    return write_shards(path / "d", table_of(TABLE.astype(np.float64))), TABLE, {}


def feather(path):
    return write_shards(path / "d", table_of(TABLE), ending=".feather"), TABLE, {}


def uneven_arrow(path):
    with pa.OSFile(str(path / "d.arrow"), "wb") as file, pa.ipc.new_file(file, table_of(TABLE).schema) as writer:
        for start, stop in ((0, 10), (10, 33), (33, 60)):
            writer.write_table(table_of(TABLE[start:stop]))
    return path / "d.arrow", TABLE, {}


def fixed_lists(path):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(TABLE.reshape(-1)), 3)
    return write_shards(path / "d", pa.table({"x": lists})), TABLE, {}


def plain_lists(path):
    return write_shards(path / "d", pa.table({"x": TABLE.tolist(), "note": ["a"] * N})), TABLE, {"array": "x"}


def half_lists(path):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(TABLE.astype(np.float16).reshape(-1)), 3)
    return write_shards(path / "d", pa.table({"x": lists})), TABLE.astype(np.float16), {}


def tensors(path):
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(GREY[:, 0].astype(np.uint8).copy())
    return write_shards(path / "d", pa.table({"x": column})), GREY, {}


def flat_bytes(path):
    column = pa.array([p.tobytes() for p in GREY], pa.binary(30))
    return write_shards(path / "d", pa.table({"x": column})), GREY, {"shape": (1, 6, 5)}


def picture_files(path):
    return write_shards(path / "d", pa.table({"x": [png(p) for p in GREY]})), GREY, {}


def picture_structs(path):
    structs = pa.array([{"bytes": png(p), "path": None} for p in COLOUR])
    return write_shards(path / "d", pa.table({"image": structs})), COLOUR, {}


def one_array(path):
    np.save(path / "x.npy", TABLE.astype(np.float64))
    return path / "x.npy", TABLE, {}


def array_shards(path):
    for i in range(3):
        np.save(path / f"x{i}.npy", COLOUR[20 * i : 20 * i + 20].transpose(0, 2, 3, 1))
    return path, COLOUR, {}


def number_list(path):
    np.save(path / "x.npy", TABLE[:, 0])
    return path / "x.npy", TABLE[:, :1], {}


def folder_of_pictures(path):
    for i, p in enumerate(GREY):
        (path / "d" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (path / "d" / str(i % 3) / f"{i}.png").write_bytes(png(p))
    return path / "d", GREY, {}


@pytest.mark.parametrize(
    "write",
    [
        columns,
        wide_columns,
        feather,
        uneven_arrow,
        fixed_lists,
        plain_lists,
        half_lists,
        tensors,
        flat_bytes,
        picture_files,
        picture_structs,
        one_array,
        array_shards,
        number_list,
        folder_of_pictures,
    ],
)
def test_every_kind_of_file_gives_its_rows(write, tmp_path):
    path, expected, options = write(tmp_path)
    rows = open_rows(path, held_out=0.25, **options)
    assert rows.event_shape == expected.shape[1:]
    assert rows.kind == ("image" if expected.ndim == 4 else "table")
    assert len(rows) + len(rows.held_out()) == N
    assert np.array_equal(everything(rows), in_order(expected))
    if expected.ndim == 4:
        assert rows.value_range == (0.0, 255.0)


def test_patterns_and_lists_of_files_are_folders_too(tmp_path):
    write_shards(tmp_path / "d", table_of(TABLE))
    (tmp_path / "d" / "_SUCCESS.parquet").write_bytes(b"")  # what other programs keep for themselves
    whole = everything(open_rows(tmp_path / "d"))
    assert np.array_equal(whole, everything(open_rows(str(tmp_path / "d" / "part-*.parquet"))))
    assert np.array_equal(whole, everything(open_rows([tmp_path / "d" / f"part-{i}.parquet" for i in range(3)])))


def test_the_same_share_of_every_block_is_held_out(tmp_path):
    x = np.arange(4000, dtype=np.float32)[:, None]
    pq.write_table(pa.table({"a": x[:, 0], "b": -x[:, 0]}), tmp_path / "x.parquet", row_group_size=100)
    rows = open_rows(tmp_path / "x.parquet", held_out=0.2, seed=3)
    held = rows.held_out().take(np.arange(800))[0][:, 0].numpy()
    assert len(rows) == 3200
    assert (np.bincount(held.astype(int) // 100) == 20).all()
    again = open_rows(tmp_path / "x.parquet", held_out=0.2, seed=3).held_out().take(np.arange(800))[0][:, 0].numpy()
    other = open_rows(tmp_path / "x.parquet", held_out=0.2, seed=4).held_out().take(np.arange(800))[0][:, 0].numpy()
    assert np.array_equal(held, again)
    assert not np.array_equal(held, other)
    train = rows.take(np.arange(3200))[0][:, 0].numpy()
    assert np.array_equal(np.sort(np.concatenate([held, train])), x[:, 0])


def test_classes_become_numbers(tmp_path):
    names = np.array(["cat", "dog", "eel"])[np.arange(N) % 3]
    write_shards(tmp_path / "d", table_of(TABLE).append_column("y", pa.array(names)))
    rows = open_rows(tmp_path / "d", labels="y", held_out=0)
    _, y = rows.take(np.arange(N))
    assert rows.classes == ("cat", "dog", "eel")
    assert y is not None
    assert np.array_equal(y.numpy(), np.arange(N) % 3)
    assert rows.unlabelled().take(np.arange(3))[1] is None
    # Ten is after nine, as numbers are.
    write_shards(tmp_path / "e", table_of(TABLE).append_column("y", pa.array((np.arange(N) % 12).astype(float))))
    numbered = open_rows(tmp_path / "e", labels="y", held_out=0)
    assert numbered.classes == tuple(map(str, range(12)))
    _, y = numbered.take(np.arange(N))
    assert y is not None
    assert np.array_equal(y.numpy(), np.arange(N) % 12)


def test_classes_of_arrays_and_of_folders(tmp_path):
    path, _, _ = one_array(tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(N) % 2)
    _, y = open_rows(path, labels=str(tmp_path / "labels.npy"), held_out=0).take(np.array([0, 1, 5]))
    assert y is not None
    assert y.tolist() == [0, 1, 1]
    folder, _, _ = folder_of_pictures(tmp_path)
    rows = open_rows(folder, held_out=0)
    assert rows.classes == ("0", "1", "2")
    _, y = rows.take(np.arange(N))
    assert y is not None
    assert torch.bincount(y).tolist() == [20, 20, 20]


def test_rows_come_in_the_units_asked_for(tmp_path):
    path, expected, options = flat_bytes(tmp_path)
    rows = open_rows(path, held_out=0, **options)
    scaled, _ = rows.scaled(rows.scaling()).take(np.arange(N))
    assert torch.allclose(scaled, torch.from_numpy(expected).float() / 127.5 - 1.0, atol=1e-6)
    bits = open_rows(path, held_out=0, binarise=0.5, **options)
    assert (bits.kind, bits.threshold) == ("binary", 127.5)
    assert torch.equal(bits.take(np.arange(N))[0], (torch.from_numpy(expected) > 127).float())
    with pytest.raises(OptionError, match="scaling is for rows of shape"):
        rows.scaled(open_rows(columns(tmp_path / "t")[0]).scaling())


def test_a_sample_is_evenly_spread_and_reads_few_blocks(tmp_path, monkeypatch):
    x = np.arange(50_000, dtype=np.float32)
    pq.write_table(pa.table({"a": x, "b": -x}), tmp_path / "x.parquet", row_group_size=100)
    rows = open_rows(tmp_path / "x.parquet", held_out=0)
    read, real = [], type(rows.source).read
    monkeypatch.setattr(type(rows.source), "read", lambda *a: read.append(a[1]) or real(*a))
    sample, _ = rows.sample(1000)
    a = np.sort(sample[:, 0].numpy())
    assert len(set(read)) <= 32
    assert len(a) == 1000
    assert abs(a.mean() / 25_000 - 1) < 0.02
    assert np.abs(np.quantile(a, [0.1, 0.5, 0.9]) / [5000, 25_000, 45_000] - 1).max() < 0.2


def test_a_dataset_is_a_sample_that_says_so(tmp_path):
    rows = open_rows(write_shards(tmp_path / "d", table_of(TABLE)), held_out=0.2)
    data = rows.dataset(most=20)
    assert len(data.train) == 20
    assert len(data.held_out) == 12
    assert data.columns == ("a", "b", "c")
    assert "48 rows to train on" in data.notes[-1] or "48 rows to train on" in data.notes[-2]
    assert "of every block" in data.split


def test_marks_tell_files_apart_without_reading_rows(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "d", table_of(TABLE))
    monkeypatch.setattr(TableSource, "read", None)
    source = TableSource(folder, sorted(folder.glob("*.parquet")))
    marks = Rows(source, "table").marks()
    assert marks["data['part-1.parquet']"].startswith("20 rows, ")
    pq.write_table(table_of(TABLE[::-1][:20]), folder / "part-1.parquet", row_group_size=7)
    changed = Rows(TableSource(folder, sorted(folder.glob("*.parquet"))), "table").marks()
    assert [name for name in marks if marks[name] != changed[name]] == ["data['part-1.parquet']"]
    # Of very many files there is one mark.
    monkeypatch.setattr("gibbsian.data.rows.rows.MANY", 2)
    assert Rows(source, "table").marks()["data"].startswith("3 files, 60 rows #")


def test_samples_of_large_rows_are_small(tmp_path):
    rows = open_rows(columns(tmp_path)[0])
    assert rows.affordable(10_000) == 10_000
    object.__setattr__(rows.source, "event_shape", (3, 256, 256))
    assert rows.affordable(10_000) == 341
    assert rows.affordable(10_000, megabytes=64) == 256


def test_when_the_command_line_leaves_rows_on_the_disk(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "d", table_of(TABLE))
    pictures, _, _ = folder_of_pictures(tmp_path / "p")
    assert "3 files" in why_stream(folder)
    assert why_stream(folder / "part-0.parquet") == ""
    assert why_stream(pictures) == ""
    monkeypatch.setattr("gibbsian.data.rows.opening.LARGE", 100)
    monkeypatch.setattr("gibbsian.data.rows.opening.MANY", 59)
    assert "GiB" in why_stream(folder / "part-0.parquet")
    assert "more than 59 pictures" in why_stream(pictures)


# ---- Faults found on opening


def cut_short(path):
    folder = write_shards(path / "d", table_of(TABLE))
    whole = (folder / "part-1.parquet").read_bytes()
    (folder / "part-1.parquet").write_bytes(whole[:-40])
    return folder


def cut_arrow(path):
    folder = write_shards(path / "d", table_of(TABLE), ending=".arrow")
    whole = (folder / "part-2.arrow").read_bytes()
    (folder / "part-2.arrow").write_bytes(whole[:-40])
    return folder


def stream_file(path):
    with pa.OSFile(str(path / "d.arrow"), "wb") as file, pa.ipc.new_stream(file, table_of(TABLE).schema) as writer:
        writer.write_table(table_of(TABLE))
    return path / "d.arrow"


def cut_array(path):
    np.save(path / "x.npy", TABLE)
    (path / "x.npy").write_bytes((path / "x.npy").read_bytes()[:-40])
    return path / "x.npy"


def no_bytes(path):
    folder = write_shards(path / "d", table_of(TABLE))
    (folder / "part-1.parquet").write_bytes(b"")
    return folder


def no_rows(path):
    return write_shards(path / "d", table_of(TABLE[:0]))


def other_names(path):
    folder = write_shards(path / "d", table_of(TABLE))
    pq.write_table(table_of(TABLE, names="abz"), folder / "part-1.parquet")
    return folder


def other_types(path):
    folder = write_shards(path / "d", table_of(TABLE))
    pq.write_table(table_of(TABLE.astype(np.float64)), folder / "part-2.parquet")
    return folder


def text_column(path):
    return write_shards(path / "d", table_of(TABLE).append_column("town", pa.array(["Bern"] * N)))


def two_kinds_of_column(path):
    return write_shards(path / "d", pa.table({"x": TABLE.tolist(), "b": TABLE[:, 0]}))


def two_kinds_of_file(path):
    folder = write_shards(path / "d", table_of(TABLE))
    np.save(folder / "x.npy", TABLE)
    return folder


def saved(x):
    def write(path):
        np.save(path / "x.npy", x, allow_pickle=True)
        return path / "x.npy"

    return write


def unlike_arrays(path):
    np.save(path / "a.npy", TABLE)
    np.save(path / "b.npy", TABLE[:, :2])
    return path


def equal_rows(path):
    return write_shards(path / "d", table_of(np.ones((N, 3), np.float32)))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (cut_short, r"part-1\.parquet cannot be read as Parquet .*truncated"),
        (cut_arrow, r"part-2\.arrow cannot be read as an Arrow file"),
        (stream_file, "Arrow streams"),
        (cut_array, r"x\.npy is truncated: an array of shape \(60, 3\)"),
        (no_bytes, r"part-1\.parquet is empty \(0 bytes\)"),
        (no_rows, "d has no rows: 3 files, all empty"),
        (other_names, r"part-1\.parquet are not those of part-0\.parquet: it lacks c; it has in addition z"),
        (other_types, r"part-2\.parquet .* another type a \(float there, double here\)"),
        (text_column, r"1 column of other things than numbers: town \(string\)"),
        (two_kinds_of_column, "1 column of whole rows, x, among 2 columns"),
        (two_kinds_of_file, "files of several kinds: Parquet, array"),
        (saved(np.array([{}, {}])), "not.*numbers|Python objects|type object"),
        (saved(np.array(["a", "b"])), "values of type <U1"),
        (saved(TABLE.astype(complex)), "values of type complex128"),
        (saved(np.float32(1.0)), "0 axes"),
        (saved(np.zeros((2, 2, 2, 2, 2))), "5 axes"),
        (saved(np.asfortranarray(TABLE)), "Fortran order"),
        (saved(np.zeros(3, dtype=[("a", "f4")])), "records with the fields a"),
        (unlike_arrays, r"a\.npy has float32 rows of shape \(3,\), b\.npy"),
        (equal_rows, "All rows in the sample of d are equal"),
        (lambda path: path / "nothing", "is no file or folder"),
        (lambda path: path, "holds none"),
    ],
)
def test_a_fault_is_found_on_opening(write, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_rows(write(tmp_path))


def test_shards_without_rows_are_passed_over(tmp_path):
    folder = write_shards(tmp_path / "d", table_of(TABLE))
    pq.write_table(table_of(TABLE[:0]), folder / "part-00.parquet")
    rows = open_rows(folder)
    assert np.array_equal(everything(rows), in_order(TABLE))
    assert rows.notes == ("1 shard without rows passed over: part-00.parquet.",)


def test_without_a_reader_of_parquet(tmp_path, monkeypatch):
    folder, _, _ = columns(tmp_path)
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):
        open_rows(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "d"}, "no column named 'd'"),
        ({"array": "d"}, "no column named 'd'"),
        ({"shape": (1, 28, 28)}, "table of 3 columns"),
        ({"held_out": 1.0}, "held_out is a share"),
        ({"memory": 0}, "memory is 1 MiB"),
        ({"binarise": 2.0}, "binarise is a part"),
        ({"labels": [1, 2]}, "one of its columns"),
        ({"classes": ["a"]}, "name it: labels"),
        ({"kind": "binary"}, "Binary data hold both 0 and 1"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        open_rows(columns(tmp_path)[0], **options)


# ---- Faults met while reading


def reading_all(rows):
    return rows.take(np.arange(len(rows)))


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "d", table_of(TABLE))


def test_a_shard_that_disappears(folder):
    rows = open_rows(folder, held_out=0)
    shutil.move(folder / "part-1.parquet", folder / "elsewhere")
    with pytest.raises(DataError, match=r"part-1\.parquet was there when the data were opened and is gone"):
        reading_all(rows)
    shutil.move(folder / "elsewhere", folder / "part-1.parquet")
    assert len(reading_all(rows)[0]) == N


def test_a_shard_that_is_changed(folder):
    rows = open_rows(folder, held_out=0)
    pq.write_table(table_of(TABLE[:10]), folder / "part-1.parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet had \d+ bytes .* and has \d+ now"):
        reading_all(rows)


def test_a_damaged_block(tmp_path):
    pq.write_table(table_of(TABLE), tmp_path / "x.parquet", row_group_size=20, compression="snappy")
    raw = bytearray((tmp_path / "x.parquet").read_bytes())
    told = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(0)
    for i in range(told.total_compressed_size):
        raw[told.dictionary_page_offset + i] = 0xFF
    (tmp_path / "x.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"Block 2 of .*x\.parquet cannot be read"):
        reading_all(open_rows([tmp_path / "x.parquet"], held_out=0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"part-1\.parquet has a missing value \(NaN\) in row 15, column b"),
        (np.inf, r"part-1\.parquet has an infinite value, .* in row 15, column b"),
        (1e300, r"part-1\.parquet has an infinite value, or one beyond single precision, in row 15, column b"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_named(value, message, tmp_path):
    x = TABLE.astype(np.float64)
    x[34, 1] = value
    folder = write_shards(tmp_path / "d", table_of(x))
    with pytest.raises(DataError, match=message):
        reading_all(open_rows(folder, held_out=0.0))


def test_a_gap_and_a_list_of_another_length_are_named(tmp_path):
    holed = [None if i == 40 else float(v) for i, v in enumerate(TABLE[:, 0])]
    folder = write_shards(tmp_path / "a", pa.table({"a": holed, "b": TABLE[:, 1]}))
    with pytest.raises(DataError, match=r"part-2\.parquet has a missing value in row 1, column a"):
        reading_all(open_rows(folder, held_out=0))
    lists = TABLE.tolist()
    lists[25] = [1.0, 2.0]
    folder = write_shards(tmp_path / "b", pa.table({"x": lists}))
    with pytest.raises(DataError, match=r"part-1\.parquet: the list in column x of row 6 has 2 numbers"):
        reading_all(open_rows(folder, held_out=0))


def test_a_class_that_was_not_known(folder):
    write_shards(folder, table_of(TABLE).append_column("y", pa.array((np.arange(N) % 3).astype(str))))
    with pytest.raises(DataError, match=r"part-0\.parquet has the class '2' in row 3, which is not among those known"):
        reading_all(open_rows(folder, labels="y", classes=["0", "1"], held_out=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.unlink(), "was in .* when the data were opened and is gone"),
        (lambda p: p.write_bytes(p.read_bytes()[:60]), "cannot be read"),
        (lambda p: p.write_bytes(png(GREY[0, :, :3])), "is 5 x 3, the first ones are 5 x 6"),
        (lambda p: p.write_bytes(png(COLOUR[0])), "is in colour"),
    ],
)
def test_a_picture_that_does_not_fit(change, message, tmp_path):
    path, _, _ = folder_of_pictures(tmp_path)
    rows = open_rows(path, held_out=0)
    change(path / "1" / "40.png")
    with pytest.raises(DataError, match=rf"1/40\.png .*{message}"):
        reading_all(rows)
