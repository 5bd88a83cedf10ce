"""The words of the command line: what each option means, and how it becomes a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

By = Literal["energy", "typicality", "gradient", "levels"]
"""What tells foreign rows on the command line."""

BY = "{" + ",".join(get_args(By)) + "}"
"""The same, as help writes it."""

SWITCH = {"yes": True, "true": True, "no": False, "false": False}


def plain_option(hint: Any, help: str, unset: str = "", aliases: tuple[str, ...] = ()) -> Any:
    """Annotate an option of a plain type that may be left out, with one clear message for what does not parse.

    Names are not compared with a list here: where they become objects, the nearest one is suggested.
    """
    pair, choice = get_origin(hint) is tuple, get_origin(hint) is Literal
    kind = float if pair else str if choice else hint
    count = len(get_args(hint)) if pair else 1
    name = "|".join(get_args(hint)) if choice else {int: "INT", float: "FLOAT", bool: "yes|no"}.get(kind, "NAME")

    def parse(words: list[str]) -> Any:
        try:
            values = tuple(SWITCH[word.lower()] if kind is bool else kind(word) for word in words)
        except (ValueError, KeyError):
            wanted = {int: "a whole number", bool: "yes or no"}.get(kind, "a number" if count == 1 else "two numbers")
            raise ValueError(f"expected {wanted}, got {' '.join(words)!r}") from None
        return values if pair else values[0]

    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=count,
        metavar=" ".join([name] * count),
        instance_from_str=parse,
        is_instance=lambda value: True,
        str_from_instance=lambda value: list(map(str, value)) if pair and value else [str(value)],
    )
    return Annotated[hint | None, spec, tyro.conf.arg(help=help, help_behavior_hint=unset, aliases=aliases or None)]


@dataclass(frozen=True)
class DataOptions:
    """How to read the data."""

    labels: plain_option(str, "Column of a table, or array of an .npz, that holds the class of each row.") = None  # type: ignore
    array: plain_option(str, "Array of an .npz to read.") = None  # type: ignore
    kind: plain_option(Literal["image", "table", "binary"], "Read the rows as this instead of guessing.") = None  # type: ignore
    held_out: plain_option(float, "Part of the rows held out for evaluation.") = None  # type: ignore
    binarise: plain_option(float, "Read values above this part of their range as ones, the others as zeros.") = None  # type: ignore
    limit: plain_option(int, "Rows to use at most, or to draw for a generated set.") = None  # type: ignore
    shape: plain_option(str, "Shape of a row, as 1x28x28, where lists or bytes of a large table are pictures.") = None  # type: ignore
    stream: plain_option(
        bool, "Leave the rows on the disk and read them while training, as with large data anyway."
    ) = None  # type: ignore
    split_seed: int = 0
    """Seed of the split into training and held-out rows."""


def override_class() -> type:
    """Build the dataclass of all options that a recipe has; those left out are the recipe's choice."""
    from gibbsian.recipes import Recipe
    from gibbsian.training.settings import TrainingSettings

    made: list[tuple[str, Any, Any]] = []
    for kind in (Recipe, TrainingSettings):
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.name in ("training", "kind", "shape", "class_names", "version", "seed"):
                continue
            told, aliases = f.metadata.get("help", ""), f.metadata.get("aliases", ())
            annotation = plain_option(hints[f.name], told, "(recipe's choice)", aliases)
            made.append((f.name, annotation, dataclasses.field(default=None)))
    cls = dataclasses.make_dataclass("Overrides", made, frozen=True)
    cls.__doc__ = "The recipe is chosen from the data's kind and size; every field of it can be set here."
    return cls


def spell_out(arguments: Sequence[str], *options: type) -> list[str]:
    """Write switches with their value: ``--spectral-norm`` is yes, ``--no-spectral-norm`` no, ``... yes`` stays."""
    hints = [hint for each in options for hint in get_type_hints(each, include_extras=True).items()]
    switches = {f"--{name.replace('_', '-')}" for name, hint in hints if _is_switch(hint)}
    words: list[str] = []
    for i, word in enumerate(arguments):
        positive = word.replace("--no-", "--", 1)
        if positive not in switches:
            words.append(word)
        elif word != positive:
            words += [positive, "no"]
        else:
            valued = i + 1 < len(arguments) and arguments[i + 1].lower() in SWITCH
            words += [word] if valued else [word, "yes"]
    return words


def _is_switch(hint: Any) -> bool:
    return get_origin(hint) is Annotated and bool in get_args(get_args(hint)[0])
