"""A fitted family: an energy of sequences, its alphabet, and what one asks of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.couplings import Couplings
from gibbsian.energies.gauges import contact_scores
from gibbsian.energies.pairwise import Potts
from gibbsian.energies.tractable import Categorical
from gibbsian.errors import DataError, ModelFileError, OptionError, StorageError
from gibbsian.files import replace_file
from gibbsian.sequences.letters import decode, encode
from gibbsian.sequences.machines import machine_of
from gibbsian.sequences.mutations import DoubleMutations, double_mutations, single_mutations
from gibbsian.sequences.tables import profile, states_of, tables_of

WEIGHTS, FAMILY = "model.safetensors", "family.json"
METHODS = ("pseudo-likelihood", "boltzmann", "rbm")
VERSION = 1

ROWS = 2048
"""Sequences that are scored at once."""


@dataclass(frozen=True)
class FamilyInfo:
    """What is told of a family's model, in plain values.

    Attributes
    ----------
    alphabet
        Its letters, the gap first.
    columns
        L.
    by
        ``"pseudo-likelihood"``, ``"boltzmann"`` or ``"rbm"``.
    sequences, effective
        How many it was fitted to, and the sum of their weights.
    hidden
        Hidden units, of a machine.
    reference
        The letters of the sequence whose mutations are scanned.
    reference_name
        Its name.
    settings
        How it was fitted.
    """

    alphabet: str
    columns: int
    by: str
    sequences: int
    effective: float
    reference: str
    reference_name: str = "consensus"
    hidden: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.by not in METHODS:
            raise OptionError(f"by is one of {', '.join(METHODS)}; got {self.by!r}.")


@dataclass(frozen=True)
class Family:
    """A fitted family.

    Attributes
    ----------
    energy
        On one-hot sequences ``(n, L, K)``, in nats: a `Potts` between all letters, or an `RBM`.
    shares
        Of the letters in each column of the family, all above 0, ``(L, K)``: where chains start.
    couplings
        A `Potts` whose couplings tell contacts: the energy itself, or what pairs a machine has.
    info
        What is told of it.
    """

    energy: Potts | RBM
    shares: Tensor
    couplings: Potts
    info: FamilyInfo

    @property
    def letters(self) -> int:
        """K."""
        return len(self.info.alphabet)

    @property
    def base(self) -> Categorical:
        """Independent columns with the family's shares of letters."""
        return profile(self.shares)

    @property
    def reference(self) -> Tensor:
        """Codes of the sequence whose mutations are scanned, ``(L,)``."""
        return encode([self.info.reference], self.info.alphabet)[0]

    def contacts(self) -> Tensor:
        """Score every pair of columns, ``(L, L)``: Frobenius norm in the zero-sum gauge, average product corrected."""
        return contact_scores(self.couplings)

    @torch.no_grad()
    def energies(self, codes: Tensor) -> Tensor:
        """Energies of sequences ``(n, L)``, in nats, ``(n,)``."""
        self.check(codes)
        if isinstance(self.energy, Potts):
            tables = tables_of(self.energy)
            return torch.cat([tables.energy(part) for part in codes.split(ROWS)])
        return torch.cat([self.energy(states_of(part, self.letters)) for part in codes.split(ROWS)])

    def mutations(self, sequence: Tensor | None = None) -> Tensor:
        """Effects of all single mutations, ``(L, K)``, of the reference or another sequence ``(L,)``."""
        return single_mutations(self.energy, self.reference if sequence is None else sequence, self.letters)

    def double_mutations(self, sequence: Tensor | None = None) -> DoubleMutations:
        """Effects of all double mutations, of the reference or another sequence ``(L,)``."""
        return double_mutations(self.energy, self.reference if sequence is None else sequence, self.letters)

    def encode(self, rows: list[str]) -> Tensor:
        """Turn aligned sequences into codes ``(n, L)``; errors as of `gibbsian.sequences.alignment.encode`."""
        codes = encode(rows, self.info.alphabet)
        self.check(codes)
        return codes

    def decode(self, codes: Tensor) -> list[str]:
        """Turn codes into letters."""
        return decode(codes, self.info.alphabet)

    def check(self, codes: Tensor) -> None:
        """Refuse sequences of other columns.

        Raises
        ------
        DataError
            If there are not as many as the model's.
        """
        if codes.ndim != 2 or codes.shape[1] != self.info.columns:
            raise DataError(
                f"The model is of {self.info.columns} aligned columns; these sequences have {codes.shape[-1]}. Align "
                "them to the family, and keep the same columns (--focus)."
            )


def save_family(folder: str | Path, family: Family) -> Path:
    """Write a family's folder: ``model.safetensors`` and ``family.json``, each replaced in one move.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    from safetensors.torch import save

    home = Path(folder)
    weights = {f"energy.{k}": v for k, v in family.energy.state_dict().items()} | {"shares": family.shares}
    if family.couplings is not family.energy:
        weights["couplings"] = cast(Couplings, family.couplings.interaction).dense()
        weights["couplings_field"] = family.couplings.field
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    try:
        home.mkdir(parents=True, exist_ok=True)
        replace_file(home / WEIGHTS, save(weights))
        replace_file(home / FAMILY, json.dumps({"version": VERSION, **asdict(family.info)}, indent=1).encode())
    except OSError as error:
        raise StorageError(
            f"The family could not be saved in {home}: {error}. Free some space or choose another folder; files that "
            "were there before are intact."
        ) from error
    return home


def load_family(folder: str | Path) -> Family:
    """Rebuild a saved family.

    Raises
    ------
    ModelFileError
        If a file is missing, damaged or of a newer version, or one does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    home = Path(folder)
    try:
        told = json.loads((home / FAMILY).read_text(encoding="utf-8"))
        weights = load((home / WEIGHTS).read_bytes())
        if told.pop("version") != VERSION:
            raise ModelFileError(f"{home / FAMILY} is of another version; load it with the Gibbsian that wrote it.")
        info = FamilyInfo(**told)
        energy = empty_energy(info)
        energy.load_state_dict({k.removeprefix("energy."): v for k, v in weights.items() if k.startswith("energy.")})
        energy.requires_grad_(False)
        couplings = energy if isinstance(energy, Potts) else _couplings(weights)
        return Family(energy, weights["shares"], couplings, info)
    except FileNotFoundError as error:
        raise ModelFileError(
            f"A saved family is a folder with {WEIGHTS} and {FAMILY}; {error.filename} is not there. Fit one: gibbsian "
            f"protein family ALIGNMENT --out {home}"
        ) from error
    except ModelFileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelFileError(f"The family in {home} is damaged: {error}. Fit it again or restore the files.") from error


def empty_energy(info: FamilyInfo) -> Potts | RBM:
    """Build the energy of a family, to be filled."""
    if info.by == "rbm":
        return machine_of(info.columns, len(info.alphabet), info.hidden)
    return Potts.dense(info.columns, len(info.alphabet))


def _couplings(weights: dict[str, Tensor]) -> Potts:
    return Potts(Couplings(weights["couplings"]), field=weights["couplings_field"])
