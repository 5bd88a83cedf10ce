"""Every exception that Gibbsian raises by its own decision.

::

    GibbsianError
    ├── InputError (ValueError)         a value that cannot be used as it is
    │   ├── ShapeError                  a tensor of another shape than its place asks for
    │   ├── DomainError                 a point, a data set or a kernel on the wrong domain
    │   ├── DataError                   a file or a table that cannot be learned from
    │   ├── OptionError                 an unknown name or an option out of its range
    │   └── ModelFileError              a saved model that cannot be rebuilt
    ├── ArgumentTypeError (TypeError)   an object of another kind than its place asks for
    ├── DivergenceError (ArithmeticError)  a run or a chain that left the numbers
    ├── MissingPackageError (ImportError)  an optional package that is not installed
    ├── ProcessError (RuntimeError)     processes of one job that do not find each other, differ, or were lost
    ├── StorageError (OSError)          something could not be written; what was saved before is intact
    └── TrainingInterrupted             the user stopped a run; its state is saved

A message says what was found, what was expected, and what to try.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GibbsianError(Exception):
    """The root: catch this to catch everything that Gibbsian raises on purpose."""


class InputError(GibbsianError, ValueError):
    """A value that cannot be used as it is."""


class ShapeError(InputError):
    """A tensor of another shape than its place asks for."""


class DomainError(InputError):
    """A point, a data set or a kernel on the wrong domain."""


class DataError(InputError):
    """A file or a table that cannot be learned from."""


class OptionError(InputError):
    """An unknown name, or an option outside its range."""


class ModelFileError(InputError):
    """A saved model that cannot be rebuilt."""


class ArgumentTypeError(GibbsianError, TypeError):
    """An object of another kind than its place asks for."""


class DivergenceError(GibbsianError, ArithmeticError):
    """A run or a chain that left the numbers, after every configured rescue."""


class MissingPackageError(GibbsianError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


class ProcessError(GibbsianError, RuntimeError):
    """Processes of one job that do not find each other, were given different things, or of which one was lost.

    Attributes
    ----------
    speaks
        Whether it is this process of the job that tells the user; ``None``, as usual, leaves it to the first one.
    """

    speaks: bool | None = None


class StorageError(GibbsianError, OSError):
    """Something could not be written; what had been saved before is intact."""


class TrainingInterrupted(GibbsianError):
    """The user or a scheduler stopped a run; the message says where it was saved and how to go on.

    Parameters
    ----------
    message
        What is said.
    code
        The exit code of a program that ends by it: 128 and the signal's number, so 130 after Ctrl-C.
    """

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


def unknown_name(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """Build the error for a name that is not among those known, with the nearest ones suggested.

    Parameters
    ----------
    kind
        What the name stands for, for example ``"data set"``.
    name
        The name as given.
    known
        The names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return OptionError(f"There is no {kind} named {name!r}. {hint}Known: {', '.join(names)}.")
