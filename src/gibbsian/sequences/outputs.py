"""Files of a family: tables of contacts and mutations, drawn sequences, figures and the numbers of its evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gibbsian.errors import StorageError
from gibbsian.files import replace_file
from gibbsian.sequences import figures
from gibbsian.sequences.contacts import CUTOFF, SEPARATION, Structure
from gibbsian.sequences.evaluation import Evaluation
from gibbsian.sequences.family import Family
from gibbsian.sequences.letters import fasta
from gibbsian.sequences.mutations import strongest

if TYPE_CHECKING:
    import pandas as pd

RESULTS, DRAWN = "evaluation.json", "samples.fasta"
TABLES = ("contacts.csv", "mutations.csv", "double_mutations.csv")
PICTURES = ("contacts", "mutations", "double_mutations")


def write_outputs(
    folder: Path, family: Family, found: Evaluation, structure: Structure | None = None, doubles: int = 100_000
) -> None:
    """Write tables, sequences, figures (.png and .svg) and numbers.

    Parameters
    ----------
    folder
        Where to.
    family, found, structure
        What of.
    doubles
        Rows of double_mutations.csv: those of largest epistasis.

    Raises
    ------
    StorageError
        If a file cannot be written.
    """
    names = [f"sample-{i}" for i in range(1, len(found.draws.codes) + 1)]
    files: dict[str, Callable[[], bytes]] = {
        "contacts.csv": lambda: _csv(contact_table(found, structure)),
        "mutations.csv": lambda: _csv(mutation_table(family, found)),
        "double_mutations.csv": lambda: _csv(double_table(family, found, doubles)),
        DRAWN: lambda: fasta(names, found.draws.codes, family.info.alphabet).encode(),
        RESULTS: lambda: json.dumps(found.to_dict(), indent=1).encode(),
    }
    for ending in ("png", "svg"):
        for name in PICTURES:
            files[f"{name}.{ending}"] = lambda n=name, e=ending: _picture(n, e, family, found, structure)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in files.items():
            replace_file(folder / name, make())
    except OSError as error:
        raise StorageError(
            f"The results could not be written to {folder}: {error.strerror or error}. The model is intact; free some "
            "space and run the command again with --resume."
        ) from error


def contact_table(found: Evaluation, structure: Structure | None = None) -> pd.DataFrame:
    """All pairs of columns i < j, counted from 1, strongest first: score, and distance where it is known."""
    import pandas as pd

    i, j = torch.triu_indices(len(found.scores), len(found.scores), 1)
    columns = {"i": i + 1, "j": j + 1, "score": found.scores[i, j]}
    if structure is not None:
        columns["distance"] = structure.distances[i, j]
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    return table.sort_values("score", ascending=False, kind="stable").round({"score": 6, "distance": 3})


def mutation_table(family: Family, found: Evaluation) -> pd.DataFrame:
    """All single mutations of the reference: column, letters, and the change of log-probability in nats."""
    import pandas as pd

    own, alphabet = family.info.reference, family.info.alphabet
    rows = [
        (f"{c}{i + 1}{a}", i + 1, c, a, round(float(found.single[i, k]), 5))
        for i, c in enumerate(own)
        for k, a in enumerate(alphabet)
        if a != c
    ]
    return pd.DataFrame(rows, columns=["mutation", "column", "from", "to", "effect"])


def double_table(family: Family, found: Evaluation, count: int) -> pd.DataFrame:
    """The double mutations of largest epistasis: both mutations, their common effect, and the epistasis, in nats."""
    import numpy as np
    import pandas as pd

    info, sequence = family.info, family.reference
    i, j, a, b = strongest(found.double, sequence, count)
    number = torch.zeros((info.columns, info.columns), dtype=torch.int64)
    above = torch.triu_indices(info.columns, info.columns, 1)
    number[above[0], above[1]] = torch.arange(above.shape[1])
    letters = np.array(list(info.alphabet))

    def named(site: torch.Tensor, letter: torch.Tensor) -> list[str]:
        own = letters[sequence[site].numpy()]
        return [f"{x}{k}{y}" for x, k, y in zip(own, (site + 1).tolist(), letters[letter.numpy()])]

    return pd.DataFrame(
        {
            "first": named(i, a),
            "second": named(j, b),
            "effect": found.double.effects[number[i, j], a, b].numpy().round(5),
            "epistasis": found.double.epistasis[number[i, j], a, b].numpy().round(5),
        }
    )


def strongest_epistasis(family: Family, found: Evaluation) -> torch.Tensor:
    """For each pair of columns the epistasis of largest magnitude, gaps left out, ``(L, L)``."""
    values = found.double.epistasis[:, 1:, 1:].flatten(1)
    place = values.abs().argmax(1, keepdim=True)
    half = torch.zeros((family.info.columns, family.info.columns), dtype=values.dtype)
    i, j = torch.triu_indices(len(half), len(half), 1)
    half[i, j] = values.gather(1, place)[:, 0]
    return half + half.T


def _picture(name: str, ending: str, family: Family, found: Evaluation, structure: Structure | None) -> bytes:
    info = family.info
    path = Path(f"{name}.{ending}")
    if name == "contacts":
        distances = None if structure is None else structure.distances.numpy()
        pairs = 2 * info.columns
        return figures.save_figure(
            path,
            lambda f: figures.contact_map(f, found.scores.numpy(), distances, pairs, SEPARATION, CUTOFF),
            4.6,
            4.9,
        )
    if name == "mutations":
        lines = max(1, -(-info.columns // 90))
        return figures.save_figure(
            path,
            lambda f: figures.mutation_map(f, found.single.numpy(), info.alphabet, info.reference),
            8.5,
            0.4 + 2.6 * lines,
        )
    return figures.save_figure(
        path, lambda f: figures.epistasis_map(f, strongest_epistasis(family, found).numpy()), 5.2, 4.4
    )


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()
