"""How long a simulation is and how it steps, and what it came to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gibbsian.errors import OptionError


@dataclass(frozen=True)
class Dynamics:
    """Settings of a simulation.

    Parameters
    ----------
    picoseconds
        Length of what is recorded.
    step_fs
        Step of the integrator in femtoseconds: 2 with bonds to hydrogens held, 0.5 to 1 without.
    friction
        Of the Langevin bath, per picosecond.
    frame_ps
        Time between frames.
    equilibration_ps
        Time before the first one, unbiased.
    discard
        With metadynamics: part of the frames at the start that weighs nothing, as the bias was still growing.
    seed
        Of velocities and noise.

    Raises
    ------
    OptionError
        If a setting is out of its range, or no whole number of steps goes into a frame.
    """

    picoseconds: float = 1000.0
    step_fs: float = 2.0
    friction: float = 1.0
    frame_ps: float = 0.5
    equilibration_ps: float = 20.0
    discard: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("picoseconds", "step_fs", "friction", "frame_ps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name} is a positive number; got {value}.")
        if not (math.isfinite(self.equilibration_ps) and self.equilibration_ps >= 0):
            raise OptionError(f"equilibration_ps is 0 or more; got {self.equilibration_ps}.")
        if not 0.0 <= self.discard < 1.0:
            raise OptionError(f"The part of frames to discard lies from 0 to below 1; got {self.discard}.")
        if self.seed < 0:
            raise OptionError(f"A seed is 0 or more; got {self.seed}.")
        steps_in("frame_ps", self.frame_ps, self.step_fs)
        if self.picoseconds < self.frame_ps:
            raise OptionError(
                f"A simulation of {self.picoseconds:g} ps has no frame with one every {self.frame_ps:g} ps: make it "
                "longer, or frames more frequent."
            )

    @property
    def frames(self) -> int:
        """How many are recorded."""
        return int(self.picoseconds / self.frame_ps + 1e-9)


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation came to.

    Attributes
    ----------
    folder
        Where it is.
    frames
        How many frames there are.
    effective_frames
        As many equally weighted ones would be worth as much, were they independent.
    picoseconds, seconds
        Simulated, and spent, over all sittings.
    """

    folder: Path
    frames: int
    effective_frames: float
    picoseconds: float
    seconds: float

    def __str__(self) -> str:
        speed = nanoseconds_per_day(self.picoseconds, self.seconds)
        return (
            f"{self.frames} frames over {self.picoseconds:g} ps in {self.folder} ({self.seconds:.0f} s, "
            f"{speed} ns per day; worth {self.effective_frames:.0f} of equal weight)"
        )


def nanoseconds_per_day(picoseconds: float, seconds: float) -> str:
    """Tell the speed of a simulation, with three figures."""
    speed = 86.4 * picoseconds / max(seconds, 1e-9)
    return f"{float(f'{speed:.3g}'):,.0f}" if speed >= 100 else f"{speed:.3g}"


def steps_in(name: str, picoseconds: float, step_fs: float) -> int:
    """Count the steps in a time.

    Raises
    ------
    OptionError
        If it is not a whole number of them, 1 or more.
    """
    steps = picoseconds / (1e-3 * step_fs)
    if round(steps) < 1 or abs(steps - round(steps)) > 1e-6 * steps:
        raise OptionError(f"{name} is a whole number of steps of {step_fs:g} fs; got {picoseconds:g} ps.")
    return round(steps)
