"""A protein family: PF00014 by mean field, pseudo-likelihood, Boltzmann learning, and a restricted Boltzmann machine.

Of each: seconds of a processor core, the precision of contacts at L/2, L and 2L beside that of pairs taken at random,
and how well 30,000 drawn sequences agree with the natural ones, as the Pearson correlation of connected two-point
statistics; beside it stands what as many sequences drawn from the family itself reach. Chains from independent columns
and from natural sequences must have come together (R-hat), and log Z stands between bounds.

The family is read from the folder that GIBBSIAN_DATA names: PF00014_mgap6.fasta.gz, 13,600 sequences of 53 columns, and
PF00014_struct.dat. Contacts lie 5 or more columns and less than 8 angstroms apart.

    python benchmarks/family.py                      # all, about ten minutes of one core
    python benchmarks/family.py --methods pseudo-likelihood
    python benchmarks/family.py --quick              # a small generated family instead, to see that all works
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import common
from common import Stopwatch, circumstances, generator, table, write
from gibbsian.energies.gauges import contact_scores
from gibbsian.energies.pairwise import Potts
from gibbsian.sequences import figures
from gibbsian.sequences.alignment import Alignment, read_alignment
from gibbsian.sequences.contacts import CUTOFF, SEPARATION, Precision, Structure, precision, read_structure
from gibbsian.sequences.draws import draw_family
from gibbsian.sequences.family import Family, save_family
from gibbsian.sequences.fitting import fit_family
from gibbsian.sequences.frequencies import Agreement, Statistics, agreement, statistics
from gibbsian.sequences.likelihood import family_log_z, independent_log_prob
from gibbsian.sequences.mean_field import mean_field_potts
from gibbsian.sequences.settings import FamilySettings

METHODS = ("pseudo-likelihood", "boltzmann", "rbm")
ASKED = {
    "pearson": 0.95,
    "L/2": 1.0,
    "L": 0.98,
    "2L": 0.90,
    "pseudo-likelihood minutes": 3.0,
    "boltzmann minutes": 20.0,
}
"""What is asked; minutes are on two cores, and one was measured."""

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the results and the figures, and return the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--quick", action="store_true", help="a small generated family")
    parser.add_argument("--draws", type=int, default=30_000)
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the fitted models")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    family, structure, name = generated() if options.quick else pfam()
    record = circumstances([options.seed], options.threads)
    own = statistics(family.codes, family.letters, family.weights)
    record |= {
        "family": name,
        "sequences": len(family),
        "columns": family.length,
        "effective": family.effective,
        "draws": options.draws,
        "asked": ASKED,
    }
    record["ceiling"] = ceiling(family, own, options)._asdict()
    with Stopwatch() as watch:
        mean_field = mean_field_potts(own)
    found = precision(contact_scores(mean_field), structure)
    record["base_rate"] = found.base_rate
    record["methods"] = {"mean field": {"core_seconds": watch.cpu, "contacts": contacts(found)}}
    record["methods"] |= earlier(name)
    if not options.quick:
        save("profile", lambda f: figures.profile_logo(f, own.one.numpy(), family.alphabet), 8.0, 1.9)
    for method in options.methods:
        row, model, drawn = run(method, family, structure, options)
        record["methods"][method] = row
        print(method, row, flush=True)
        if options.keep is not None:
            save_family(options.keep / method, model)
        if not options.quick:
            draw_figures(method, model, family, own, statistics(drawn, family.letters), structure, found)
        # After each, for a long run may be stopped.
        record["met"] = met(record)
        write("family", f"The family {name}", record, (report(record),))
    return record


def ceiling(family: Alignment, own: Statistics, options: argparse.Namespace) -> Agreement:
    """How well as many sequences agree with the family that are taken from itself by weight."""
    rng = generator(options.seed, 99)
    again = family.codes[torch.multinomial(family.weights, options.draws, True, generator=rng)]
    return agreement(own, statistics(again, family.letters))


def earlier(name: str) -> dict[str, Any]:
    """What was measured of the same family before, by method: a run of some methods leaves the others' rows."""
    try:
        record = json.loads((common.RESULTS / "family.json").read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in record["methods"].items() if k != "mean field"} if record["family"] == name else {}


def run(
    method: str, family: Alignment, structure: Structure, options: argparse.Namespace
) -> tuple[dict[str, Any], Family, torch.Tensor]:
    """Fit by a method, and measure it."""
    quick = options.quick
    settings = FamilySettings(method, steps=60 if quick and method != "pseudo-likelihood" else None)
    with tempfile.TemporaryDirectory() as folder, Stopwatch() as watch:
        model = fit_family(family, settings, rng=generator(options.seed, METHODS.index(method)), folder=folder)
    rng = generator(options.seed, 10 + METHODS.index(method))
    with Stopwatch() as drawing:
        drawn = draw_family(model, options.draws, rng, sweeps=options.sweeps, start=family.codes)
    with Stopwatch() as annealing:
        log_z = family_log_z(model, drawn.codes, rng, chains=50 if quick else 400, temperatures=50 if quick else None)
    own = statistics(family.codes, family.letters, family.weights)
    weights = family.weights.double() / family.weights.double().sum()
    logs = -model.energies(family.codes).double() - log_z.value
    row = {
        "core_seconds": watch.cpu,
        "wall_seconds": watch.wall,
        "contacts": contacts(precision(model.contacts(), structure)),
        "agreement": agreement(own, statistics(drawn.codes, family.letters))._asdict(),
        "r_hat": drawn.r_hat,
        "autocorrelation_sweeps": drawn.autocorrelation,
        "drawing_core_seconds": drawing.cpu,
        "log_z": {name: float(getattr(log_z, name)) for name in ("value", "stderr", "lower", "upper", "ess")},
        "log_z_core_seconds": annealing.cpu,
        "log_likelihood": float((weights * logs).sum()),
        "log_likelihood_independent": float((weights * independent_log_prob(model, family.codes).double()).sum()),
        "settings": model.info.settings,
    }
    return row, model, drawn.codes


def contacts(found: Precision) -> dict[str, float]:
    """Precision at the usual numbers of pairs, and the base rate."""
    return {mark: found.at(n) for mark, n in found.marks.items()} | {"base rate": found.base_rate}


def met(record: dict[str, Any]) -> dict[str, bool]:
    """What is asked, and whether it is reached."""
    methods, asked = record["methods"], record["asked"]
    found = {}
    if "boltzmann" in methods:
        row = methods["boltzmann"]
        found["pearson of connected pairs, boltzmann"] = row["agreement"]["connected"] >= asked["pearson"]
        found["boltzmann in minutes"] = row["core_seconds"] / 60 <= asked["boltzmann minutes"]
    if "pseudo-likelihood" in methods:
        row = methods["pseudo-likelihood"]
        for mark in ("L/2", "L", "2L"):
            found[f"precision at {mark}, pseudo-likelihood"] = row["contacts"][mark] >= asked[mark]
        found["pseudo-likelihood in minutes"] = row["core_seconds"] / 60 <= asked["pseudo-likelihood minutes"]
    return found


def report(record: dict[str, Any]) -> str:
    """The tables of the results."""
    rows = []
    for name, row in record["methods"].items():
        c, a = row["contacts"], row.get("agreement", {})
        rows.append(
            [
                name,
                f"{row['core_seconds'] / 60:.2f}",
                *(f"{c[mark]:.3f}" for mark in ("L/2", "L", "2L")),
                f"{c['base rate']:.3f}",
                f"{a['connected']:.3f}" if a else "",
                f"{a['slope']:.3f}" if a else "",
                f"{row['r_hat']:.4f}" if a else "",
            ]
        )
    heads = ["method", "core-minutes", "precision L/2", "L", "2L", "at random", "connected pairs", "slope", "R-hat"]
    likelihood = [
        [
            name,
            f"{row['log_z']['value']:.2f} ± {row['log_z']['stderr']:.2f}",
            f"[{row['log_z']['lower']:.2f}, {row['log_z']['upper']:.2f}]",
            f"{row['log_likelihood']:.2f}",
            f"{row['log_likelihood_independent']:.2f}",
        ]
        for name, row in record["methods"].items()
        if "log_z" in row
    ]
    ceiling = record["ceiling"]
    words = (
        f"{record['sequences']} sequences of {record['columns']} columns, {record['effective']:.0f} effective; "
        f"{record['draws']} drawn. As many drawn from the family itself reach {ceiling['connected']:.3f} in connected "
        f"pairs. Contacts are {SEPARATION} or more columns and less than {CUTOFF:g} angstroms apart."
    )
    asked = "\n".join(f"* {name}: {'met' if good else 'not met'}" for name, good in record["met"].items())
    second = table(
        ["method", "log Z", "bounds (99 %)", "log-likelihood per sequence", "independent columns"], likelihood
    )
    return "\n\n".join((words, table(heads, rows), second, asked))


def pfam() -> tuple[Alignment, Structure, str]:
    """PF00014 from the folder of data."""
    folder = os.environ.get("GIBBSIAN_DATA")
    if folder is None or not (Path(folder) / "PF00014_mgap6.fasta.gz").exists():
        raise SystemExit(
            "GIBBSIAN_DATA must name a folder with PF00014_mgap6.fasta.gz and PF00014_struct.dat; or use --quick."
        )
    family = read_alignment(Path(folder) / "PF00014_mgap6.fasta.gz")
    return family, read_structure(Path(folder) / "PF00014_struct.dat", family.length), "PF00014"


def generated(columns: int = 12, sequences: int = 400, strength: float = 1.0) -> tuple[Alignment, Structure, str]:
    """A small family with a few contacts that are known, by Gibbs chains of a Potts model."""
    letters, alphabet = 5, "-ACDE"
    rng = generator(1)
    couplings, distances = torch.zeros((columns, letters, columns, letters)), torch.full((columns, columns), 20.0)
    for i in range(columns // 2):
        j = columns - 1 - i
        own = strength * torch.randn((letters, letters), generator=rng)
        couplings[i, :, j, :], couplings[j, :, i, :] = own, own.T
        distances[i, j] = distances[j, i] = 5.0
    potts = Potts(couplings, field=0.3 * torch.randn((columns, letters), generator=rng))
    base = Family(potts, torch.full((columns, letters), 1 / letters), potts, info_of(columns, alphabet))
    codes = draw_family(base, sequences, rng, sweeps=30).codes
    names = tuple(f"sequence-{i}" for i in range(sequences))
    return (
        Alignment(alphabet, names, codes, torch.ones(sequences)),
        Structure(distances.fill_diagonal_(math.nan)),
        "generated",
    )


def info_of(columns: int, alphabet: str) -> Any:
    """What is told of a family that nobody fitted."""
    from gibbsian.sequences.family import FamilyInfo

    return FamilyInfo(alphabet, columns, "boltzmann", 0, 0.0, "A" * columns)


def draw_figures(
    method: str,
    model: Family,
    family: Alignment,
    own: Statistics,
    drawn: Statistics,
    structure: Structure,
    mean_field: Precision,
) -> None:
    """Draw what the page of the documentation shows."""
    x, y = own.connected.flatten().numpy(), drawn.connected.flatten().numpy()
    save(f"{method}-pairs", lambda f: figures.agreement_map(f, x, y, "connected pairs"), 3.8, 3.8)
    if method != "pseudo-likelihood":
        return
    curves = {method: precision(model.contacts(), structure), "mean field": mean_field}
    scores, effects = model.contacts().numpy(), model.mutations().numpy()
    apart, pairs = structure.distances.numpy(), 2 * family.length
    save("precision", lambda f: figures.precision_curve(f, curves), 4.6, 3.4)
    save("contacts", lambda f: figures.contact_map(f, scores, apart, pairs, SEPARATION, CUTOFF), 4.6, 4.9)
    save("mutations", lambda f: figures.mutation_map(f, effects, family.alphabet, model.info.reference), 8.5, 3.0)


def save(name: str, paint: Any, width: float, height: float) -> None:
    """Draw one figure."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"family-{name}.png"
    path.write_bytes(figures.save_figure(path, paint, width, height))


if __name__ == "__main__":
    main()
