"""The grammar of composed densities: what is read, what is written back, and what is refused, with its place."""

from __future__ import annotations

import math

import pytest

from gibbsian.errors import OptionError
from gibbsian.expressions import Mixture, Power, Product, Run, parse, runs_of

A, B, C = Run("runs/a"), Run("runs/b"), Run("c")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", A),
        ("runs/a * runs/b", Product((A, B))),
        ("runs/a*runs/b*c", Product((A, B, C))),
        ("runs/a + runs/b", Mixture((A, B), (1.0, 1.0))),
        ("0.5*runs/a + 0.5*runs/b", Mixture((A, B), (0.5, 0.5))),
        ("1e-3 * runs/a + c", Mixture((A, C), (1e-3, 1.0))),
        ("runs/a * not runs/b", Product((A, Power(B, -1.0)))),
        ("runs/a * not runs/b^0.5", Product((A, Power(B, -0.5)))),
        ("runs/a^2", Power(A, 2.0)),
        ("runs/a^1", A),
        ("(runs/a + runs/b) * c", Product((Mixture((A, B), (1.0, 1.0)), C))),
        ("2*runs/a*runs/b + c", Mixture((Product((A, B)), C), (2.0, 1.0))),
        ("not (runs/a * c)^2", Power(Product((A, C)), -2.0)),
        ("((runs/a))", A),
        ("runs/a[y=3] + runs/a[y=8]", Mixture((Run("runs/a", "3"), Run("runs/a", "8")), (1.0, 1.0))),
        ("runs/a[sigma=0.2..2]", Run("runs/a", None, (0.2, 2.0))),
        ("runs/a[y=left,sigma=0.2..]", Run("runs/a", "left", (0.2, math.inf))),
        ("runs/a[sigma=..2]", Run("runs/a", None, (0.0, 2.0))),
        ('"my runs/a (2)" * c', Product((Run("my runs/a (2)"), C))),
        ('"3" * "not"', Product((Run("3"), Run("not")))),
        ("./notes * ../not-quite", Product((Run("./notes"), Run("../not-quite")))),
    ],
)
def test_a_formula_is_read_and_written_back(text, expected):
    found = parse(text)
    assert found == expected
    assert parse(str(found)) == expected


def test_a_formula_is_written_as_one_would_write_it():
    for text in ("runs/a * not runs/b^0.5", "0.3*runs/a + 0.7*runs/b", "(runs/a + c)^2 * c[y=1, sigma=0.1..]"):
        assert str(parse(text)) == text


def test_models_are_found_in_order():
    assert [run.folder for run in runs_of(parse("(runs/a + 2*runs/b)^2 * not c * runs/a"))] == [
        "runs/a",
        "runs/b",
        "c",
        "runs/a",
    ]


@pytest.mark.parametrize(
    ("text", "place", "told"),
    [
        ("", 0, "folder of a model"),
        ("a b", 2, "expected * or +"),
        ("a *", 3, "folder of a model"),
        ("a * 2", 4, "after ^"),
        ("2 * a", 0, "sharpen"),
        ("0*a + b", 0, "above 0"),
        ("-1*a + b", 0, "not"),
        ("a^b", 2, "above 0"),
        ("a^-1", 2, "write not"),
        ("a^0", 2, "above 0"),
        ("not not a", 4, "folder of a model"),
        ("(a + b", 6, "close a bracket"),
        ("a)", 1, "the end"),
        ("a[z=1]", 2, "y=LABEL"),
        ("a[y=]", 2, "y=LABEL"),
        ("a[]", 2, "y=LABEL"),
        ("a[y=1,y=2]", 6, "set before"),
        ("a[y=1", 5, "expected , or ]"),
        ("a[sigma=2..1]", 2, "LOW..HIGH"),
        ("a[sigma=1]", 2, "LOW..HIGH"),
        ("a[sigma=x..2]", 2, "LOW..HIGH"),
        ('"a', 0, "not closed"),
    ],
)
def test_a_mistake_is_shown_where_it_is(text, place, told):
    with pytest.raises(OptionError) as caught:
        parse(text)
    message = str(caught.value)
    assert told in message
    assert f"\n  {text}\n  {' ' * place}^" in message
