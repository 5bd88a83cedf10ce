"""Alignments: three formats, weights against brute force, and every way in which a file can be wrong."""

import gzip
import os
import time
from pathlib import Path

import pytest
import torch

from gibbsian.errors import DataError, OptionError, ShapeError
from gibbsian.sequences.alignment import Alignment, alignment_of, read_alignment
from gibbsian.sequences.letters import decode, encode, fasta
from gibbsian.sequences.weights import identity_weights

ROWS = ["ACD-", "ACDE", "-CDE", "GCDF"]
FASTA = "".join(f">s{i}/1-4 words\n{row[:2]}\n{row[2:]}\n" for i, row in enumerate(ROWS))


def write(folder, text, name="family.fasta"):
    path = folder / name
    path.write_text(text)
    return path


def rows(alignment):
    return decode(alignment.codes, alignment.alphabet)


def test_fasta_is_read_over_several_lines(tmp_path):
    found = read_alignment(write(tmp_path, FASTA))
    assert rows(found) == ROWS
    assert found.names == tuple(f"s{i}/1-4" for i in range(4))
    assert (len(found), found.length, found.letters) == (4, 4, 21)
    assert found.codes.dtype == torch.int64


def test_a_packed_file_is_unpacked_whatever_its_ending(tmp_path):
    path = tmp_path / "family.data"
    path.write_bytes(gzip.compress(FASTA.encode()))
    assert rows(read_alignment(path)) == ROWS


def test_a2m_loses_its_inserts(tmp_path):
    text = ">a\nA.CDf-\n>b\nAxCDE\n>c\n-C.DE\n>d\nGCD.F\n"
    found = read_alignment(write(tmp_path, text, "family.a2m"))
    assert rows(found) == ["ACD-", "ACDE", "-CDE", "GCDF"]
    assert rows(read_alignment(write(tmp_path, text), format="a2m")) == rows(found)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("a AC\nb A-\n\na DE\nb .E\n", ["ACDE", "A--E"]),
        ("a ACdeD\nb A-..E\n#=GC SS_cons HHHHH\n", ["ACD", "A-E"]),
        ("a ACxDE\nb A-.DF\n#=GC RF xx.xx\n", ["ACDE", "A-DF"]),
    ],
)
def test_stockholm_interleaved_by_case_and_by_reference(tmp_path, lines, expected):
    found = read_alignment(write(tmp_path, f"# STOCKHOLM 1.0\n#=GF ID x\n{lines}//\n", "family.sto"))
    assert rows(found) == expected


def test_the_focus_keeps_its_own_columns(tmp_path):
    found = read_alignment(write(tmp_path, FASTA), focus="s2/1-4")
    assert rows(found) == ["CD-", "CDE", "CDE", "CDF"]
    # What follows the slash may be left out.
    assert read_alignment(write(tmp_path, FASTA), focus="s2").focus == "s2"


def test_what_is_written_is_read_again(tmp_path):
    first = read_alignment(write(tmp_path, FASTA))
    again = read_alignment(write(tmp_path, fasta(first.names, first.codes, first.alphabet)))
    assert torch.equal(first.codes, again.codes)
    assert first.names == again.names


def test_other_alphabets(tmp_path):
    path = write(tmp_path, ">a\nACGU\n>b\n-CGA\n")
    assert read_alignment(path, alphabet="rna").letters == 5
    assert read_alignment(path, alphabet="-UGCA").codes[0].tolist() == [4, 3, 2, 1]
    assert read_alignment(path, alphabet="ACGU").alphabet == "-ACGU"
    for wrong in ("AC-GU", "AACGU", "A"):
        with pytest.raises(OptionError, match="left out or first"):
            read_alignment(path, alphabet=wrong)


def test_rows_with_many_gaps_are_left_out(tmp_path):
    found = read_alignment(write(tmp_path, FASTA + ">gaps\n--DE\n"), max_gaps=0.3)
    assert rows(found) == ROWS


BROKEN = {
    "lengths": (FASTA + ">long\nACDEF\n", "long has 5"),
    "lower case": (FASTA + ">low\nAcDE\n", r"'c' at place 2 of low.*--format a2m"),
    "unknown letters": (FASTA + ">x\nAXDB\n", r"'X' 1 times, 'B' 1 times; the first at place 2 of x.*--unknown gap"),
    "empty columns": (">a\n-A-\n>b\n-C-\n", r"2 of 3 columns have nothing but gaps \(1, 3\)"),
    "no names": ("ACDE\nACDE\n", "neither '>'"),
    "nothing": ("", "neither '>'"),
    "no letters": (">a\n>b\nAC\n", "1 sequences have no letters, a first"),
    "letters first": (";x\nAC\n>b\nAC\n", "before the first name"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_told(tmp_path, kind):
    text, message = BROKEN[kind]
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_alignment(write(tmp_path, text))


def test_a2m_with_other_lengths_and_stockholm_that_is_broken_are_told(tmp_path):
    with pytest.raises(DataError, match="b has 3"):
        read_alignment(write(tmp_path, ">a\nACDEx\n>b\nACD\n>c\nACDE\n", "f.a2m"))
    for text, message in {
        "a AC\n//\nb AC\n//\n": "several alignments",
        "a AC DE\n//\n": "a name and a row",
        "a ACD\n#=GC RF xx\n//\n": "#=GC RF 2",
        "//\n": "no sequence",
    }.items():
        with pytest.raises(DataError, match=message):
            read_alignment(write(tmp_path, f"# STOCKHOLM 1.0\n{text}", "f.sto"))


def test_files_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        read_alignment(tmp_path / "nothing.fasta")
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(FASTA.encode())[:-12])
    with pytest.raises(DataError, match="cut short"):
        read_alignment(cut)
    binary = tmp_path / "binary.fasta"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no text"):
        read_alignment(binary)
    with pytest.raises(OptionError, match="format is one of"):
        read_alignment(write(tmp_path, FASTA), format="clustal")


def test_unknown_letters_become_gaps_or_their_rows_are_dropped(tmp_path):
    path = write(tmp_path, FASTA + ">x\nAXDE\n")
    assert rows(read_alignment(path, unknown="gap"))[-1] == "A-DE"
    assert len(read_alignment(path, unknown="drop")) == 4
    with pytest.raises(OptionError, match="refuse"):
        read_alignment(path, unknown="ignore")
    with pytest.raises(DataError, match="every sequence has a letter"):
        read_alignment(write(tmp_path, ">x\nAX\n"), unknown="drop")


def test_a_focus_that_is_not_there_or_there_twice_is_told(tmp_path):
    with pytest.raises(OptionError, match=r"No sequence is named s9.*Did you mean"):
        read_alignment(write(tmp_path, FASTA), focus="s9/1-4")
    with pytest.raises(OptionError, match="2 sequences are named s1"):
        read_alignment(write(tmp_path, FASTA + ">s1/9-12\nACDE\n"), focus="s1")


@pytest.mark.parametrize("identity", [0.5, 0.8, 1.0])
def test_weights_are_those_of_brute_force(identity):
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (300, 10), generator=rng)
    codes[50:90] = codes[:40]
    codes[90:120, :8] = codes[:30, :8]
    alike = (codes[:, None] == codes[None]).double().mean(2) >= identity - 1e-9
    assert torch.allclose(identity_weights(codes, identity).double(), 1.0 / alike.double().sum(1), atol=1e-7)


def test_blocks_of_comparisons_make_no_difference(monkeypatch):
    codes = torch.randint(0, 4, (200, 6), generator=torch.Generator().manual_seed(1))
    whole = identity_weights(codes, 0.6)
    monkeypatch.setattr("gibbsian.sequences.weights.ROWS", 7)
    monkeypatch.setattr("gibbsian.sequences.weights.COLUMNS", 11)
    assert torch.equal(identity_weights(codes, 0.6), whole)


def test_a_share_of_exactly_eight_tenths_counts():
    # 8 of 10 columns: 0.8 * 10 is 8.000000000000002 or 7.999999 in other orders of rounding.
    codes = torch.zeros((2, 10), dtype=torch.int64)
    codes[1, :2] = 1
    assert identity_weights(codes, 0.8).tolist() == [0.5, 0.5]


def test_more_columns_than_a_byte_counts():
    codes = torch.zeros((2, 300), dtype=torch.int64)
    codes[1, :30] = 1
    assert identity_weights(codes, 0.9).tolist() == [0.5, 0.5]
    assert identity_weights(codes, 0.91).tolist() == [1.0, 1.0]


def test_weights_that_count_only_other_sequences_are_caught():
    """A broken twin: a sequence that does not count itself."""
    codes = torch.zeros((4, 5), dtype=torch.int64)
    broken = 1.0 / ((codes[:, None] == codes[None]).float().mean(2) >= 0.8).float().fill_diagonal_(0.0).sum(1)
    assert float(identity_weights(codes).sum()) == 1.0
    assert float(broken.sum()) != 1.0


@pytest.mark.parametrize("identity", [0.0, 1.5])
def test_identity_is_a_share(identity):
    with pytest.raises(OptionError, match="share of the columns"):
        identity_weights(torch.zeros((2, 2), dtype=torch.int64), identity)


def test_too_few_and_duplicate_sequences_are_refused_with_the_effective_number():
    copies = alignment_of(["ACDE"] * 500)
    with pytest.raises(DataError, match=r"500, of which 1 differ, count as 1\.0 effective"):
        copies.check_enough()
    with pytest.raises(DataError, match=r"4, of which 4 differ, count as 4\.0"):
        alignment_of(ROWS, identity=1.0).check_enough()


def test_parts_of_an_alignment_fit_each_other():
    with pytest.raises(ShapeError, match="N names and N weights"):
        Alignment("-A", ("a",), torch.zeros((2, 3), dtype=torch.int64), torch.ones(2))
    with pytest.raises(DataError, match="row 2 has 1"):
        encode(["AC", "A", "CC"])


def real():
    folder = os.environ.get("GIBBSIAN_DATA")
    path = Path(folder or ".") / "PF00014_mgap6.fasta.gz"
    if folder is None or not path.exists():
        pytest.skip("GIBBSIAN_DATA is not a folder with PF00014_mgap6.fasta.gz")
    return path


def test_a_real_family_is_read_and_weighed_in_seconds():
    path, began = real(), time.process_time()
    found = read_alignment(path)
    assert time.process_time() - began < 20.0
    assert (len(found), found.length, found.letters) == (13600, 53, 21)
    assert found.effective == pytest.approx(4364, abs=1)
    some = torch.arange(0, len(found), 500)
    alike = (found.codes[some][:, None] == found.codes[None]).double().mean(2) >= 0.8 - 1e-9
    assert torch.allclose(found.weights[some].double(), 1.0 / alike.double().sum(1))
