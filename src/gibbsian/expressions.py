r"""Densities written as one line: the grammar of ``gibbsian compose``.

.. code-block:: text

    mixture  = part { "+" part }                 runs/a + runs/b
    part     = [ number "*" ] product            0.3*runs/a + 0.7*runs/b
    product  = factor { "*" factor }             runs/a * runs/b
    factor   = [ "not" ] atom [ "^" number ]     runs/a * not runs/b^0.5
    atom     = run | "(" mixture ")"             (runs/a + runs/b) * runs/c
    run      = folder [ "[" setting { "," setting } "]" ]
    setting  = "y=" label | "sigma=" low ".." high

A formula is read as densities, not as energies: a star multiplies them, ``^`` is a power, ``not`` divides, and the
number before a star is a share of a mixture. A folder is a word without spaces and without any of ``*+^()[],"``, or any
text in double quotes. ``[y=3]`` fixes the label of a conditional model; ``[sigma=0.2..2]`` lets a factor act at these
noise levels only, from either end on where a number is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from gibbsian.errors import OptionError

MARKS = "*+^()[],"
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


@dataclass(frozen=True)
class Run:
    """The density of a trained model.

    Attributes
    ----------
    folder
        The run's.
    label
        Of a conditional model, as it was written, or ``None``.
    window
        The noise levels at which it acts, or ``None`` for all.
    """

    folder: str
    label: str | None = None
    window: tuple[float, float] | None = None

    def __str__(self) -> str:
        settings = [] if self.label is None else [f"y={self.label}"]
        if self.window is not None:
            low, high = (f"{end:g}" if 0.0 < end < math.inf else "" for end in self.window)
            settings.append(f"sigma={low}..{high}")
        plain = self.folder != "not" and re.fullmatch(rf'[^\s{re.escape(MARKS)}"]+', self.folder)
        plain = plain and not re.fullmatch(NUMBER, self.folder)
        return (self.folder if plain else f'"{self.folder}"') + (f"[{', '.join(settings)}]" if settings else "")


@dataclass(frozen=True)
class Power:
    """A density to a power other than 1; below 0 for a negation."""

    inside: Density
    exponent: float

    def __str__(self) -> str:
        negated = "not " if self.exponent < 0.0 else ""
        power = "" if abs(self.exponent) == 1.0 else f"^{abs(self.exponent):g}"
        return f"{negated}{_enclosed(self.inside)}{power}"


@dataclass(frozen=True)
class Product:
    """A product of densities, two or more."""

    factors: tuple[Density, ...]

    def __str__(self) -> str:
        return " * ".join(str(f) if isinstance(f, Power) else _enclosed(f) for f in self.factors)


@dataclass(frozen=True)
class Mixture:
    """A mixture of densities, two or more, with weights above 0."""

    parts: tuple[Density, ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        return " + ".join(
            (f"{weight:g}*" if weight != 1.0 else "") + (f"({part})" if isinstance(part, Mixture) else str(part))
            for weight, part in zip(self.weights, self.parts)
        )


Density: TypeAlias = Run | Power | Product | Mixture
"""What a formula is read as."""


def parse(text: str) -> Density:
    """Read a formula by the grammar of this module.

    Parameters
    ----------
    text
        The formula.

    Raises
    ------
    OptionError
        If it does not follow the grammar; the message shows the place and says what was expected there.
    """
    reader = _Reader(text)
    density = _mixture(reader)
    if reader.kind != "end":
        raise reader.error("expected * or + between two models, or the end")
    return density


def runs_of(density: Density) -> Iterator[Run]:
    """Every mention of a model, in the order of the formula."""
    if isinstance(density, Run):
        yield density
    elif isinstance(density, Power):
        yield from runs_of(density.inside)
    else:
        for part in density.factors if isinstance(density, Product) else density.parts:
            yield from runs_of(part)


def _enclosed(density: Density) -> str:
    return str(density) if isinstance(density, Run) else f"({density})"


class _Reader:
    """The words of a formula, and how far it was read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = list(self._split(text))
        self.at = 0

    @property
    def kind(self) -> str:
        """Of the next word: a mark itself, ``"name"``, ``"quoted"``, or ``"end"``."""
        return self.words[self.at][0]

    @property
    def word(self) -> str:
        """The next word."""
        return self.words[self.at][1]

    def take(self) -> str:
        """Go past the next word, and return it."""
        self.at += 1
        return self.words[self.at - 1][1]

    def number(self, ahead: int = 0) -> float | None:
        """The number that a word is, if it is one."""
        kind, word, _ = self.words[min(self.at + ahead, len(self.words) - 1)]
        if kind != "name" or not re.fullmatch(NUMBER, word):
            return None
        return float(word)

    def error(self, expected: str) -> OptionError:
        """Point at the next word."""
        place = self.words[self.at][2]
        found = f"{self.word!r}" if self.kind != "end" else "the end"
        return OptionError(
            f"Cannot read the formula at {found}: {expected}.\n  {self.text}\n  {' ' * place}^\n"
            "Models are folders; * multiplies densities, + mixes them (0.3*a + 0.7*b), ^ is a power, not divides."
        )

    def _split(self, text: str) -> Iterator[tuple[str, str, int]]:
        for found in re.finditer(rf'\s*(?:"([^"]*)"|([{re.escape(MARKS)}])|([^\s{re.escape(MARKS)}"]+)|("))', text):
            quoted, mark, name, open_quote = found.groups()
            if open_quote:
                raise OptionError(f"A quotation in the formula is not closed:\n  {text}\n  {' ' * found.start(4)}^")
            kind = "quoted" if quoted is not None else mark or "name"
            yield kind, quoted if quoted is not None else mark or name, found.end() - len(found[0].lstrip())
        yield "end", "", len(text)


def _mixture(reader: _Reader) -> Density:
    parts, weights, places = [], [], []
    while True:
        places.append(reader.at)
        weight = 1.0
        number = reader.number()
        if number is not None and reader.words[reader.at + 1][0] == "*":
            if not 0.0 < number < math.inf:
                raise reader.error("the share of a mixture is a number above 0; to divide by a density write not")
            weight = number
            reader.take()
            reader.take()
        parts.append(_product(reader))
        weights.append(weight)
        if reader.kind != "+":
            break
        reader.take()
    if len(parts) > 1:
        return Mixture(tuple(parts), tuple(weights))
    if weights[0] != 1.0:
        reader.at = places[0]
        raise reader.error(
            "a number before * is a share of a mixture, and here is nothing to mix with; to sharpen a density write "
            "it with a power, runs/a^2"
        )
    return parts[0]


def _product(reader: _Reader) -> Density:
    factors = [_factor(reader)]
    while reader.kind == "*":
        reader.take()
        factors.append(_factor(reader))
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _factor(reader: _Reader) -> Density:
    sign = 1.0
    if reader.kind == "name" and reader.word == "not":
        reader.take()
        sign = -1.0
    inside, exponent = _atom(reader), 1.0
    if reader.kind == "^":
        reader.take()
        number = reader.number()
        if number is None or not 0.0 < number < math.inf:
            raise reader.error("a power is a number above 0; to divide by a density write not")
        exponent = number
        reader.take()
    return inside if sign * exponent == 1.0 else Power(inside, sign * exponent)


def _atom(reader: _Reader) -> Density:
    if reader.kind == "(":
        reader.take()
        inside = _mixture(reader)
        if reader.kind != ")":
            raise reader.error("expected ) to close a bracket")
        reader.take()
        return inside
    if reader.kind == "quoted":
        return _settings(reader, reader.take())
    if reader.kind != "name" or reader.word == "not":
        raise reader.error("expected the folder of a model, or (")
    if reader.number() is not None:
        raise reader.error("expected the folder of a model; a number stands at the head of a product, or after ^")
    return _settings(reader, reader.take())


def _settings(reader: _Reader, folder: str) -> Run:
    found: dict[str, str] = {}
    if reader.kind == "[":
        while reader.kind != "]":
            reader.take()
            name, equals, value = reader.word.partition("=")
            if reader.kind not in ("name", "quoted") or not equals or name not in ("y", "sigma") or not value:
                raise reader.error("expected a setting, y=LABEL or sigma=LOW..HIGH")
            if name in found:
                raise reader.error(f"{name} was set before")
            found[name] = value if name == "y" else _window_word(reader, value)
            reader.take()
            if reader.kind not in (",", "]"):
                raise reader.error("expected , or ]")
        reader.take()
    window = _window(found["sigma"]) if "sigma" in found else None
    return Run(folder, found.get("y"), window)


def _window_word(reader: _Reader, value: str) -> str:
    try:
        low, high = _window(value)
    except ValueError:
        low = high = 0.0
    if not 0.0 <= low < high:
        raise reader.error("a window of noise levels is written LOW..HIGH, such as 0.2..2, 0.2.. or ..2")
    return value


def _window(value: str) -> tuple[float, float]:
    low, _, high = value.partition("..")
    return float(low or 0.0), float(high or math.inf) if ".." in value else math.nan
