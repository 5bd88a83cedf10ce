"""A learned energy of torsions with what it needs to stand alone: names, temperature, and frames to build upon."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Combination, Energy
from gibbsian.energies.periodic import TURN, PeriodicMLP, VonMisesMixture
from gibbsian.errors import ModelFileError, OptionError, StorageError
from gibbsian.files import replace_file
from gibbsian.kernels.domains import Wrapped
from gibbsian.kernels.langevin import MALA
from gibbsian.molecules.backmapping import build_conformations, nearest_frames
from gibbsian.molecules.extras import require_mdtraj
from gibbsian.molecules.features import torsion_angles
from gibbsian.molecules.landscape import cell_centres
from gibbsian.molecules.thermal import checked_temperature, thermal_energy
from gibbsian.molecules.torsion_settings import MOST_BY_NCE
from gibbsian.molecules.torsion_training import base_of, mean_energy
from gibbsian.molecules.trajectories import silent

WEIGHTS, DESCRIPTION, TOPOLOGY, TEMPLATES = "model.safetensors", "torsions.json", "topology.pdb", "templates.dcd"

FINE = 360
"""Cells along each torsion from which points are drawn where there are two; within a cell they are uniform."""

CHAIN_STEPS = 300
"""Steps of the chains that draw from more torsions."""


@dataclass(frozen=True)
class TorsionModel:
    """An energy on torsions of a molecule, in nats at its temperature.

    Attributes
    ----------
    energy
        ``(n, d) -> (n,)`` in nats; a `PeriodicMLP` or the mean of several, over `base_of` the noise where there is one.
    noise
        A mixture fitted to the frames.
    names, atoms
        Of the torsions, as in `Torsions`.
    temperature
        In kelvin.
    templates
        An mdtraj ``Trajectory`` of frames upon which drawn conformations are built.
    """

    energy: Energy
    noise: VonMisesMixture
    names: tuple[str, ...]
    atoms: np.ndarray
    temperature: float
    templates: Any

    @property
    def kt(self) -> float:
        """KT in kJ/mol."""
        return thermal_energy(self.temperature)

    @property
    def members(self) -> list[PeriodicMLP]:
        """The networks."""
        return members_of(self.energy)

    @torch.no_grad()
    def draw(self, n: int, rng: Generator) -> Tensor:
        """Draw torsions in radians, ``(n, d)``.

        Of two torsions from a fine grid, exactly to within its cells of a degree; of more by chains, which start at
        draws of the mixture resampled by their importance, or at the templates where there are many.

        Raises
        ------
        OptionError
            If none is asked for.
        """
        if n < 1:
            raise OptionError(f"Draws are 1 or more; got {n}.")
        if len(self.names) == 2:
            return _from_grid(self.energy, n, rng)
        return self._from_chains(n, rng)

    def _from_chains(self, n: int, rng: Generator) -> Tensor:
        from gibbsian.adaptation import tune
        from gibbsian.sampling import sample

        if len(self.names) <= MOST_BY_NCE:
            start = self.noise.sample(max(8 * n, 4096), rng)
            log_w = (self.noise(start) - self.energy(start)).double()
        else:
            start = torsion_angles(self.templates.xyz, self.atoms)
            log_w = torch.zeros(len(start), dtype=torch.float64)
        start = start[torch.multinomial(log_w.softmax(0), n, replacement=True, generator=rng)]
        kernel, state, *_ = tune(self.energy, Wrapped(MALA(0.1), TURN), start, rng=rng, steps=100)
        return sample(self.energy, kernel, state, steps=CHAIN_STEPS, rng=rng).x

    def conformations(self, angles: Tensor) -> Any:
        """Coordinates with these torsions ``(n, d)``: the nearest templates, turned; an mdtraj ``Trajectory``."""
        return build_conformations(self.templates, self.atoms, angles)

    def nearest(self, angles: Tensor) -> Tensor:
        """Indices of the templates nearest to rows of torsions, ``(n,)``."""
        return nearest_frames(angles, torsion_angles(self.templates.xyz, self.atoms))


def members_of(energy: Energy) -> list[PeriodicMLP]:
    """The networks of an energy that `fit_torsion_energy` made."""
    parts = [e for _, e in energy.terms] if isinstance(energy, Combination) else [energy]
    return [e for e in parts if isinstance(e, PeriodicMLP)]


def save_torsion_model(folder: str | Path, model: TorsionModel) -> Path:
    """Write a model's folder; each file is replaced in one move.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    from safetensors.torch import save

    home, members = Path(folder), model.members
    state = nn.ModuleList([*members, model.noise]).state_dict()
    told = {
        "format": 1,
        "torsions": list(model.names),
        "atoms": model.atoms.tolist(),
        "temperature": model.temperature,
        "members": len(members),
        "hidden": list(members[0].hidden),
        "harmonics": members[0].harmonics,
        "based": any(isinstance(e, VonMisesMixture) for e in model.energy.modules()),
        "components": len(model.noise.locs),
        "templates": len(model.templates),
    }
    try:
        home.mkdir(parents=True, exist_ok=True)
        model.templates[0].save_pdb(str(home / TOPOLOGY))
        model.templates.save_dcd(str(home / TEMPLATES))
        replace_file(home / WEIGHTS, save({k: v.detach().contiguous().clone() for k, v in state.items()}))
        replace_file(home / DESCRIPTION, (json.dumps(told, indent=1) + "\n").encode())
    except OSError as error:
        raise StorageError(f"The model could not be saved in {home}: {error}. Choose another folder.") from error
    return home


def load_torsion_model(folder: str | Path) -> TorsionModel:
    """Rebuild a model that `save_torsion_model` wrote.

    Raises
    ------
    ModelFileError
        If a file is missing or damaged.
    """
    from safetensors.torch import load

    md, home = require_mdtraj(), Path(folder)
    if missing := [name for name in (DESCRIPTION, WEIGHTS, TOPOLOGY, TEMPLATES) if not (home / name).is_file()]:
        raise ModelFileError(
            f"{home} holds no model of torsions: {', '.join(missing)} is not there. Make one: gibbsian protein "
            f"landscape top.pdb traj.dcd --out {home}"
        )
    try:
        told = json.loads((home / DESCRIPTION).read_text())
        weights = load((home / WEIGHTS).read_bytes())
        topology = md.load_topology(str(home / TOPOLOGY))
        with silent():
            templates = md.load_dcd(str(home / TEMPLATES), top=topology)
    except Exception as error:
        raise ModelFileError(f"A file of the model in {home} is damaged: {error}. Train it again.") from error
    try:
        dim = len(told["torsions"])
        members = [PeriodicMLP(dim, tuple(told["hidden"]), told["harmonics"]) for _ in range(told["members"])]
        noise = VonMisesMixture(torch.zeros(told["components"], dim))
        nn.ModuleList([*members, noise]).load_state_dict(weights)
        atoms = np.array(told["atoms"], dtype=int)
        temperature = checked_temperature(told["temperature"])
        if atoms.shape != (dim, 4) or int(atoms.max()) >= topology.n_atoms:
            raise ValueError(f"torsions of {atoms.shape} do not fit {topology.n_atoms} atoms")
        based = bool(told["based"])
        if len(templates) != told["templates"]:
            raise ValueError(f"{TEMPLATES} has {len(templates)} frames, not {told['templates']}")
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelFileError(f"{home / DESCRIPTION} is damaged, or does not fit the other files: {error}.") from error
    for net in members:
        net.eval()
    energy = mean_energy(members, base_of(noise) if based else None)
    return TorsionModel(energy, noise, tuple(told["torsions"]), atoms, temperature, templates)


def _from_grid(energy: Energy, n: int, rng: Generator) -> Tensor:
    axis = cell_centres(FINE).float()
    log_p = torch.cat([-energy(part).double() for part in torch.cartesian_prod(axis, axis).split(1 << 14)])
    # By the distribution function, for torch's multinomial takes fewer kinds than such a grid may have.
    edges = log_p.softmax(0).cumsum(0)
    cell = torch.searchsorted(edges, torch.rand(n, generator=rng, dtype=torch.float64)).clamp(max=len(edges) - 1)
    corner = torch.stack((axis[cell // FINE], axis[cell % FINE]), 1)
    jitter = torch.rand((n, 2), generator=rng) - 0.5
    return TURN.wrap(corner + jitter * (2 * math.pi / FINE))
