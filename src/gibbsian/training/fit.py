r"""Fitting an energy to data: one loop.

Every step draws a batch, asks the objective for a loss, clips the gradient's norm, and moves energy and objective with
AdamW or plain SGD. The weights that are returned are an exponential average over steps,

.. math::

    \bar\theta_t = d_t\, \bar\theta_{t-1} + (1 - d_t)\, \theta_t, \qquad d_t = \min(d, \tfrac{1 + t}{10 + t}),

which takes out most of the noise that short chains put into the gradient; the growing decay forgets the first steps.
Where the offsets of a Boltzmann machine move, the average is rewritten at the new ones: it is the mean of the weights
that the machine would have at fixed offsets, whichever these are.
Between two records nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gibbsian.data.rows import Rows
from gibbsian.energies.layers import dropout
from gibbsian.errors import DivergenceError, OptionError, TrainingInterrupted
from gibbsian.objectives.base import Batch, Objective
from gibbsian.processes import Lanes, together, told_by_main, watching, world
from gibbsian.training.checkpoints import Checkpoints, fingerprint
from gibbsian.training.checks import checked
from gibbsian.training.feed import Feed
from gibbsian.training.health import Alarm, nonfinite
from gibbsian.training.interrupts import Interrupts, code_of
from gibbsian.training.lanes import check_lanes, mean_over_lanes
from gibbsian.training.metrics import Record, Recorder, mean_metrics
from gibbsian.training.settings import TrainingSettings, with_overrides
from gibbsian.training.state import TrainingState
from gibbsian.training.step import take_step
from gibbsian.training.stream_feed import closing_feed
from gibbsian.training.verdict import TOLD, buffer_diversity, chain_distance, verdicts, warn
from gibbsian.training.votes import extra_marks, require_alike, share_start

REMEDY = "Start the job again with resume=True: it goes on from the last checkpoint."


@dataclass(frozen=True)
class Fit:
    """A finished run.

    Attributes
    ----------
    energy
        The energy that was given, now with its averaged weights (those of the last step are in the last checkpoint).
    history
        One dict of numbers per record (means over ``log_every`` steps), and one with the key ``event`` per rollback
        and for the verdict on a run that was useless.
    steps
        Steps done in all, those before a resumption included.
    seconds
        Time spent training, likewise.
    folder
        Where checkpoints and ``metrics.jsonl`` are, if anywhere.
    """

    energy: nn.Module
    history: list[Record]
    steps: int
    seconds: float
    folder: Path | None

    @property
    def events(self) -> list[Record]:
        """What was wrong: each rollback, with where the run went back to, and the verdict at the end, if any."""
        return [record for record in self.history if "event" in record]

    @property
    def rollbacks(self) -> int:
        """How often the run went back to an earlier state."""
        return sum(record["event"] == "rollback" for record in self.events)

    def __repr__(self) -> str:
        """Lead with what went wrong, if anything did."""
        told = [f"{self.rollbacks} rollback{'s' * (self.rollbacks != 1)}"] if self.rollbacks else []
        told += [TOLD[e["kind"]] for e in self.events if e["event"] == "verdict"]
        warning = "".join(f"{words}, " for words in told)
        last = next((record for record in reversed(self.history) if "loss" in record), None)
        loss = "" if last is None else f", loss {last['loss']:.4g}"
        where = "" if self.folder is None else f", in {self.folder}"
        return f"Fit({warning}{self.steps} steps{loss}, {self.seconds:.1f} s{where})"


def fit(
    energy: nn.Module,
    data: Tensor | Batch | Feed | Rows,
    objective: Objective,
    *,
    rng: Generator,
    steps: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    settings: TrainingSettings | None = None,
    callbacks: Iterable[Callable[[Record], object]] = (),
    **overrides: Any,
) -> Fit:
    """Train an energy or a score, and the objective where it has parameters of its own.

    Parameters
    ----------
    energy
        An energy, any module that is to be one, or a `Score` such as `DenoiserUNet` (whose objective is then
        `MultiLevelDenoising`). With parameters; changed in place, and left with the averaged weights.
    data
        ``(n, *event)``, two finite rows or more, or a `Batch` with its context. Moved as a whole to the device and
        precision of the energy's parameters. Or `Rows` that stay on the disk, in the model's units; or any
        `gibbsian.training.feed.Feed`.
    objective
        How to fit; moved to the same device.
    rng
        The generator of everything random, on the energy's device.
    steps
        Optimiser steps in all; see `TrainingSettings` for the default.
    folder
        Where to keep checkpoints and ``metrics.jsonl``; nothing is written without it.
    resume
        Go on from the newest checkpoint in ``folder``, exactly as if the run had not stopped; start if there is none.
    progress
        Show the run on the terminal.
    settings
        All settings; the defaults when left out.
    callbacks
        Called with each record of the history. One that draws from ``rng`` changes the run.
    overrides
        Single settings by name: the fields of `TrainingSettings`.

    Raises
    ------
    OptionError, DataError, ShapeError, DomainError, ArgumentTypeError
        If an argument does not fit; the message says what does.
    DivergenceError
        If training still falls ill after ``max_rollbacks`` returns to an earlier state. The energy is left with the
        averaged weights of the last good state.
    StorageError
        If a checkpoint or a record cannot be written; earlier checkpoints are intact.
    TrainingInterrupted
        After Ctrl-C, SIGTERM or SIGUSR1, once the state is saved. A second Ctrl-C stops at once.
    ProcessError
        If another process of the job is lost.
    """
    # Signals are caught to the end: torchrun sends them when a process is lost, and what was lost is still to be said.
    with Interrupts() as interrupts, watching(REMEDY):
        settings = with_overrides(
            settings or TrainingSettings(), overrides | ({} if steps is None else {"steps": steps})
        )
        here = world()
        with together():
            settings = in_lanes(settings)
            model, feed = checked(energy, data, objective, rng, settings)
            check_lanes(objective, settings.lanes, feed)
        home = None if folder is None else Path(folder)
        marks = {} if home is None and here.size == 1 else fingerprint(feed, model, objective, settings)
        if here.size > 1:
            require_alike(marks | extra_marks(model, objective, settings, home, resume), rng)
            share_start(model, objective)
        kept = Checkpoints(settings, home, marks)
        state = TrainingState(model, objective, feed, settings, rng)
        recorder = Recorder(
            settings, home if here.main else None, progress and here.main, callbacks if here.main else ()
        )
        run = state.engine.quiet()
        with kept, recorder, closing_feed(feed), dropout(model), torch.enable_grad(), run:
            begin(state, kept, recorder, resume)
            while state.step < settings.steps:
                state.asked = interrupts.asked or 0
                take_step(state, *state.batches())
                alarm = look(state, recorder)
                if alarm is not None:
                    roll_back(state, kept, recorder, alarm)
                elif kept.is_regular(state.step) or state.step == settings.steps:
                    save(state, kept, recorder)
                # Of several processes each knows what all were asked when the step began.
                asked = state.asked if here.size > 1 else interrupts.asked
                if asked and state.step < settings.steps:
                    raise interrupted(state, kept, recorder, asked)
        state.use_average()
        return Fit(energy, recorder.history, state.step, state.seconds, home)


def in_lanes(settings: TrainingSettings) -> TrainingSettings:
    """Give every process a lane, where the number of lanes was left at 1; refuse one that processes cannot share."""
    return dataclasses.replace(settings, lanes=Lanes(world().size if settings.lanes == 1 else settings.lanes).count)


def begin(state: TrainingState, kept: Checkpoints, recorder: Recorder, resume: bool) -> None:
    """Start a run, or take up the one in the folder."""
    if resume and kept.files is None:
        raise OptionError("resume=True needs the folder of the run to go on with: folder=...")
    last = told_by_main(kept.last_file)
    if not resume and last is not None:
        raise OptionError(
            f"A run is already saved there ({last}). Pass resume=True to go on with it, or another folder."
        )
    like = state.capture() if state.engine.sharded else None
    saved = kept.take_up(like) if resume else None
    if saved is not None:
        if saved["step"] > state.settings.steps:
            raise OptionError(f"The saved run has done {saved['step']} steps, more than steps={state.settings.steps}.")
        state.restore(saved)
    with together():
        recorder.open(state.records, state.step)
    recorder.history = told_by_main(recorder.history)
    if saved is None:
        save(state, kept, recorder)


def look(state: TrainingState, recorder: Recorder) -> Alarm | None:
    """Write a record where one is due, and tell what is wrong, if anything is.

    On a CPU every step is looked at; elsewhere, where looking means waiting, those with a record or a checkpoint.
    """
    settings = state.settings
    due = state.step % settings.log_every == 0 or state.step == settings.steps
    if settings.health and (state.device.type == "cpu" or due or state.step % settings.checkpoint_every == 0):
        alarm = first_broken(state) if bool(state.broken) else None
        if alarm is not None:
            return alarm
    if not due:
        return None
    seconds = state.seconds
    steps, since = state.step - state.lap[0], seconds - state.lap[1]
    with state.engine.whole():
        spread = state.energy_spread()
        apart = buffer_diversity(state) if settings.health else {}
    record: Record = {
        "step": state.step,
        **metrics_of(state),
        **({} if spread is None else {"energy_std": spread}),
        **apart,
        "learning_rate": settings.learning_rate_at(state.step - 1, state.rollbacks),
        "seconds": seconds,
        "steps_per_second": steps / since,
    }
    state.lap = (state.step, seconds)
    # Times differ between processes, and what follows from a record must not.
    record = told_by_main(record)
    alarm = state.health.check(record) if settings.health else None
    if alarm is None and state.step == settings.steps:
        record |= judge(state, recorder)
    write(state, recorder, record)
    return alarm


def metrics_of(state: TrainingState) -> dict[str, float]:
    """Means of the metrics since the last record, over steps and over lanes, and forget these steps."""
    found = mean_metrics(state.pending, state.broken)
    state.pending.clear()
    if state.settings.lanes > 1:
        norm = found.pop("grad_norm")
        found |= mean_over_lanes([mean_metrics(lane.pending, state.broken) for lane in state.lanes])
        found["grad_norm"] = norm
        for lane in state.lanes:
            lane.pending.clear()
    return found


def judge(state: TrainingState, recorder: Recorder) -> Record:
    """Look at the end whether the run was useful; verdicts go before the last record, which holds what was measured."""
    with state.engine.whole():
        distance = chain_distance(state)
    for alarm in verdicts(state, distance) if state.settings.health else ():
        write(state, recorder, alarm.event("verdict"))
        if world().main:
            warn(alarm)
    return {} if distance is None else {"chain_distance": distance.value}


def first_broken(state: TrainingState) -> Alarm:
    """Find the first step since the last record whose loss or gradient was not finite."""
    first = state.step - len(state.pending) + 1
    for step, metrics in enumerate(state.pending, first):
        for name in ("loss", "grad_norm"):
            if not bool(torch.isfinite(torch.as_tensor(metrics[name]))):
                return nonfinite(step, name, float(metrics[name]))
    raise AssertionError("A broken step leaves a non-finite loss or gradient norm behind.")


def roll_back(state: TrainingState, kept: Checkpoints, recorder: Recorder, alarm: Alarm) -> None:
    """Go back to the last good state, with new noise, another order of the data, and a lower learning rate.

    Raises
    ------
    DivergenceError
        If that has been done ``max_rollbacks`` times already, or cannot help.
    """
    target = kept.rollback_target(state.last_target)
    state.restore_model(target)
    # Where no gradient ever came, no earlier state is better.
    if state.rollbacks >= state.settings.max_rollbacks or alarm.kind == "stalled":
        write(state, recorder, {**alarm.event("divergence"), "to_step": state.step})
        state.use_average()
        kept.wait()
        last = told_by_main(kept.last_file)
        where = "" if last is None else f" The last good checkpoint is {last}."
        raise DivergenceError(
            f"Training {'stalled' if alarm.kind == 'stalled' else 'diverged'}: {alarm}, after {state.rollbacks} "
            f"rollbacks. {alarm.remedy} The energy holds the "
            f"averaged weights of step {state.step}.{where}"
        )
    state.rollbacks += 1
    state.last_target = state.step
    write(state, recorder, {**alarm.event("rollback"), "to_step": state.step, "rollbacks": state.rollbacks})
    save(state, kept, recorder)


def write(state: TrainingState, recorder: Recorder, record: Record) -> None:
    """Add to the history."""
    with together():
        recorder.write(record)
    state.records += 1


def save(state: TrainingState, kept: Checkpoints, recorder: Recorder) -> None:
    """Keep the state; the record goes to the disk first, as the checkpoint counts on it."""
    captured = state.capture()
    with together():
        recorder.sync()
        kept.save(captured)


def interrupted(state: TrainingState, kept: Checkpoints, recorder: Recorder, stop: int) -> TrainingInterrupted:
    """Save the state, and say how to go on."""
    save(state, kept, recorder)
    kept.wait()
    state.use_average()
    who = "the user" if stop == signal.SIGINT else signal.Signals(stop).name
    stopped = f"Stopped by {who} after step {state.step} of {state.settings.steps}."
    last = told_by_main(kept.last_file)
    if last is None:
        told = "Nothing was saved, as fit was given no folder; the energy holds the averaged weights so far."
    else:
        told = f"Saved in {last}; the same call with resume=True goes on exactly."
    return TrainingInterrupted(f"{stopped} {told}", code_of(stop))
