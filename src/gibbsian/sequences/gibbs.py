"""Gibbs sampling of sequences: the letters of a Potts model, column by column, by looking couplings up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gibbsian.errors import OptionError
from gibbsian.kernels.base import Info, State, settings_repr
from gibbsian.kernels.discrete import check_states, uniforms
from gibbsian.sequences.tables import Tables, codes_of, states_of, tables_of
from gibbsian.typing import EnergyFn


@dataclass(frozen=True)
class SequenceGibbs:
    """Draw every column's letter given all others, one column after another.

    The chain of `BlockGibbs` on a Potts model between all letters, some fifty times faster: a sequence is looked up by
    its letters, and only the column at hand is computed. Nothing is rejected. Moves `Potts` models, tempered ones (in
    `ParallelTempering`), and those on `potts_path`.

    `Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (Geman & Geman, 1984)
    <https://doi.org/10.1109/TPAMI.1984.4767596>`_.

    Parameters
    ----------
    sweeps
        Through all columns in one step.
    reversible
        Sweep to and fro, so that a step is in detailed balance, as annealed log Z asks for its error. Costs twice.

    Raises
    ------
    OptionError
        If there is no sweep.
    """

    sweeps: int = 1
    reversible: bool = False

    gradients = 1
    domain = "one_hot"
    dynamic = True  # Lookups do not gain from compiling.
    __repr__ = settings_repr

    def __post_init__(self) -> None:
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise OptionError(f"sweeps counts passes through all columns in a step, 1 or more; got {self.sweeps!r}.")

    def init(self, energy: EnergyFn, x: Tensor) -> State:
        """Evaluate at the start."""
        check_states(energy, x)
        return self._begun(energy, x)

    def arrive(self, energy: EnergyFn, state: State, before: EnergyFn) -> State:
        """Start at another temperature, where chains stand on states for sure."""
        return self._begun(energy, state.x)

    def noise(self, state: State, steps: int, rng: Generator) -> tuple[Tensor, ...]:
        """A uniform number for each letter drawn."""
        n, length = state.x.shape[:2]
        return uniforms(steps, rng, state.x, (self.sweeps * (1 + self.reversible), length, n))

    def step(self, energy: EnergyFn, state: State, noise: tuple[Tensor, ...]) -> tuple[State, Info]:
        """Sweep; the energy follows from the logits on the way."""
        tables = tables_of(energy)
        codes = codes_of(state.x)
        change = torch.zeros_like(state.energy)
        for k, u in enumerate(noise[0]):
            change += sweep(tables, codes, u, backwards=self.reversible and k % 2 == 1)
        x = states_of(codes, tables.letters, state.x.dtype)
        sure = torch.ones_like(state.energy)
        return State(x, state.energy + change, state.x.new_zeros((len(x), 0))), Info(sure, 1.0 - sure)

    def _begun(self, energy: EnergyFn, x: Tensor) -> State:
        return State(x, tables_of(energy).energy(codes_of(x)).to(x.dtype), x.new_zeros((len(x), 0)))


@torch.no_grad()
def sweep(tables: Tables, codes: Tensor, u: Tensor, backwards: bool = False) -> Tensor:
    """Draw every column of some sequences anew, in place; return the change of their energies, ``(n,)``.

    Parameters
    ----------
    tables
        Of the model.
    codes
        ``(n, L)``, changed.
    u
        Uniform numbers, ``(L, n)``.
    backwards
        Begin with the last column.
    """
    places = tables.places(codes)
    length, letters = tables.field.shape
    change = torch.zeros_like(u[0])
    for i in reversed(range(length)) if backwards else range(length):
        logits = tables.logits(places, i)
        # Inverting the distribution function takes one uniform number a letter.
        shares = (logits - logits.amax(1, keepdim=True)).exp_().cumsum(1)
        drawn = (shares < (u[i] * shares[:, -1])[:, None]).sum(1).clamp_(max=letters - 1)
        both = logits.gather(1, torch.stack((codes[:, i], drawn), 1))
        change += both[:, 0] - both[:, 1]
        codes[:, i] = drawn
        places[:, i] = drawn + letters * i
    return change
