"""Fitting a family, by any of three ways, with checkpoints to go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from gibbsian.energies.boltzmann import RBM
from gibbsian.energies.pairwise import Potts
from gibbsian.errors import ModelFileError, StorageError
from gibbsian.files import replace_file
from gibbsian.kernels.tempering import ParallelTempering
from gibbsian.sequences.alignment import Alignment
from gibbsian.sequences.boltzmann import BoltzmannLearning
from gibbsian.sequences.family import Family, FamilyInfo
from gibbsian.sequences.frequencies import Statistics, statistics
from gibbsian.sequences.gibbs import SequenceGibbs
from gibbsian.sequences.letters import decode
from gibbsian.sequences.machines import effective_couplings, machine_objective, machine_of, weighted_rows
from gibbsian.sequences.pseudo_likelihood import PseudoLikelihoodSettings, fit_pseudo_likelihood
from gibbsian.sequences.settings import FamilySettings
from gibbsian.sequences.tables import profile, states_of
from gibbsian.training.fit import fit
from gibbsian.training.metrics import Record

PARTIAL = "pseudo-likelihood.safetensors"
"""Where the iterations of pseudo-likelihood are kept."""

SMOOTHING = 0.01
"""Share of uniform letters in the columns where chains start."""

SEEN = 2048
"""Sequences by which training judges its chains at the end."""


def fit_family(
    alignment: Alignment,
    settings: FamilySettings | None = None,
    *,
    rng: Generator,
    reference: str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    told: Callable[[int, int, float], object] | None = None,
    callbacks: tuple[Callable[[Record], object], ...] = (),
) -> Family:
    """Fit a family.

    Parameters
    ----------
    alignment
        Its sequences.
    settings
        How; the defaults when left out.
    rng
        The generator of everything random.
    reference
        Name of the sequence whose mutations are scanned; the focus or, without one, the consensus when ``None``.
    folder
        Where to keep checkpoints; nothing is written without it.
    resume
        Go on from the checkpoints in ``folder``.
    progress
        Show a run of chains on the terminal.
    told
        Called in pseudo-likelihood with the iterations done, the most there are, and the loss.
    callbacks
        Called with each record of a run of chains.

    Raises
    ------
    DataError
        If there are too few sequences.
    OptionError, StorageError, DivergenceError, TrainingInterrupted
        As of `gibbsian.training.fit.fit`.
    """
    settings = settings or FamilySettings()
    alignment.check_enough()
    info = _info(alignment, settings, reference)
    family = statistics(alignment.codes, alignment.letters, alignment.weights)
    shares = family.smoothed(SMOOTHING).one
    home = None if folder is None else Path(folder)
    if settings.by == "pseudo-likelihood":
        energy: Potts | RBM = _by_pseudo_likelihood(alignment, settings, home, resume, told)
    else:
        rows = weighted_rows(alignment.codes, alignment.weights, _rows(alignment, settings), rng)
        energy, objective = (
            _boltzmann(family, settings) if settings.by == "boltzmann" else _machine(alignment, settings, rows, rng)
        )
        fit(
            energy,
            states_of(rows, alignment.letters),
            objective,
            rng=rng,
            settings=settings.training,
            folder=home,
            resume=resume,
            progress=progress,
            callbacks=callbacks,
        )
    energy.requires_grad_(False).eval()
    couplings = energy if isinstance(energy, Potts) else effective_couplings(energy, alignment.codes, alignment.weights)
    return Family(energy, shares, couplings, info)


def consensus(alignment: Alignment) -> Tensor:
    """The commonest letter in each column, a gap only where there is nothing else, ``(L,)``."""
    one = statistics(alignment.codes, alignment.letters, alignment.weights).one.clone()
    one[:, 0] = -1.0
    return one.argmax(1)


def _info(alignment: Alignment, settings: FamilySettings, reference: str | None) -> FamilyInfo:
    name = reference or alignment.focus
    codes = consensus(alignment) if name is None else alignment.codes[alignment.row_of(name)]
    return FamilyInfo(
        alphabet=alignment.alphabet,
        columns=alignment.length,
        by=settings.by,
        sequences=len(alignment),
        effective=alignment.effective,
        reference=decode(codes[None], alignment.alphabet)[0],
        reference_name=name or "consensus",
        hidden=settings.hidden if settings.by == "rbm" else 0,
        settings=settings.told,
    )


def _rows(alignment: Alignment, settings: FamilySettings) -> int:
    """How many sequences a run is given: all, or those by which Boltzmann learning is judged."""
    return len(alignment) if settings.by == "rbm" else min(len(alignment), SEEN)


def _boltzmann(family: Statistics, settings: FamilySettings) -> tuple[Potts, BoltzmannLearning]:
    target, start = family.smoothed(settings.pseudocount), family.smoothed(SMOOTHING).one
    length, letters = start.shape
    energy = Potts.dense(length, letters)
    with torch.no_grad():
        energy.field.copy_(start.log() - start.log().mean(1, keepdim=True))
    kernel: Any = SequenceGibbs()
    if settings.tempering > 1:
        betas = torch.linspace(1.0, settings.hottest, settings.tempering, dtype=torch.float64)
        kernel = ParallelTempering(kernel, betas.tolist())
    objective = BoltzmannLearning(
        target,
        profile(start),
        kernel,
        chains=settings.chains,
        steps=settings.sweeps,
        coupling_penalty=settings.penalty,
        field_penalty=0.1 * settings.penalty,
    )
    return energy, objective


def _machine(alignment: Alignment, settings: FamilySettings, rows: Tensor, rng: Generator) -> tuple[RBM, Any]:
    machine = machine_of(alignment.length, alignment.letters, settings.hidden, rng)
    chains = max(settings.chains, min(settings.batch_size, len(rows)))
    return machine, machine_objective(machine, states_of(rows, alignment.letters), chains, settings.sweeps)


def _by_pseudo_likelihood(
    alignment: Alignment,
    settings: FamilySettings,
    home: Path | None,
    resume: bool,
    told: Callable[[int, int, float], object] | None,
) -> Potts:
    from safetensors.torch import save

    def keep(iteration: int, loss: float, energy: Potts | None) -> None:
        if told is not None:
            told(iteration, settings.iterations, loss)
        if home is not None and energy is not None:
            weights = {k: v.detach().contiguous().clone() for k, v in energy.state_dict().items()}
            try:
                home.mkdir(parents=True, exist_ok=True)
                replace_file(home / PARTIAL, save(weights))
            except OSError as error:
                raise StorageError(f"{home / PARTIAL} cannot be written: {error.strerror or error}.") from error

    start = _partial(home / PARTIAL, alignment) if resume and home is not None else None
    found = fit_pseudo_likelihood(
        alignment.codes,
        alignment.weights,
        alignment.letters,
        PseudoLikelihoodSettings(settings.penalty, min(settings.penalty, 0.001), settings.iterations),
        start=start,
        progress=keep,
    )
    return found.energy


def _partial(path: Path, alignment: Alignment) -> Potts | None:
    """The model that an earlier run had come to, if it kept one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.exists():
        return None
    energy = Potts.dense(alignment.length, alignment.letters)
    try:
        energy.load_state_dict(load(path.read_bytes()))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelFileError(
            f"{path} is damaged or of another alignment: {error}. Start anew with --overwrite."
        ) from error
    return energy
