"""What a run of chains found, and first of all whether to believe it.

`summarise` reads plain tensors: it knows neither kernels nor the loop, and `Samples.summary` hands it what it has. Each
warning names the number that is wrong and what to try. The limits are the usual ones: R-hat below 1.01, an effective
sample size of 100 per chain up to 400 in all (below which R-hat and the errors themselves are unreliable; Vehtari et
al., 2021), an E-BFMI of 0.3 (Betancourt, 2016).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gibbsian.diagnostics.chains import chain_mean, chain_sd, effective_sample_size, split_r_hat
from gibbsian.diagnostics.estimate import plain
from gibbsian.diagnostics.mixing import energy_bfmi
from gibbsian.diagnostics.quantiles import ordered_draws, quantile_of, tail_effective_sample_size
from gibbsian.errors import OptionError, ShapeError
from gibbsian.processes.collectives import gathered
from gibbsian.processes.work import gathered_along
from gibbsian.processes.world import world

if TYPE_CHECKING:
    from rich.table import Table

R_HAT_LIMIT = 1.01
ESS_PER_CHAIN, ESS_IN_ALL = 100, 400
BFMI_LIMIT = 0.3
LOW_ACCEPTANCE, HIGH_ACCEPTANCE = 0.05, 0.99

HEAD = ("", "mean", "error", "sd", "5%", "50%", "95%", "bulk ESS", "tail ESS", "R-hat")

_CHUNK = 1 << 23


class Marginals(NamedTuple):
    """What draws say of each coordinate alone; every tensor has the event's shape, float64.

    Attributes
    ----------
    mean, mean_error
        Mean and its Monte Carlo standard error.
    sd
        Standard deviation.
    low, median, high
        Quantiles: 5, 50 and 95 per cent.
    bulk_ess, tail_ess
        Effective sample sizes; NaN where a coordinate never moves or is not finite.
    r_hat
        Rank-normalised split R-hat; NaN likewise.
    """

    mean: Tensor
    mean_error: Tensor
    sd: Tensor
    low: Tensor
    median: Tensor
    high: Tensor
    bulk_ess: Tensor
    tail_ess: Tensor
    r_hat: Tensor


@dataclass(frozen=True)
class Summary:
    """A run of chains in numbers; printed, a table that says first what is wrong.

    Attributes
    ----------
    warnings
        What is wrong, each with what to try; empty when nothing was found.
    coordinates
        Of the positions.
    energy
        Of the energy, 0-d tensors; ``None`` when it was not kept.
    bfmi
        E-BFMI of each chain, ``(chains,)``, or ``None`` for kernels without a Hamiltonian.
    acceptance
        Mean acceptance probability of each chain, ``(chains,)``.
    draws, chains
        How many of each.
    rows
        Coordinates that the table lists at most: the worst ones.
    title
        Kernel and run, in words.
    """

    warnings: tuple[str, ...]
    coordinates: Marginals
    energy: Marginals | None
    bfmi: Tensor | None
    acceptance: Tensor
    draws: int
    chains: int
    rows: int = 10
    title: str = field(default="", compare=False)

    def __str__(self) -> str:
        """Print warnings, then the table in aligned columns."""
        cells = [HEAD, *self.cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
        said = [textwrap.fill(text, 110, initial_indent="! ", subsequent_indent="  ") for text in self.warnings]
        return "\n".join([*said, self.caption(), "", *lines])

    __repr__ = __str__

    def __rich__(self) -> Table:
        """Show the same as a table of rich."""
        from rich.table import Table
        from rich.text import Text

        title = Text("\n".join(f"! {text}" for text in self.warnings), style="bold red")
        table = Table(
            title=title if self.warnings else None,
            caption=self.caption(),
            box=None,
            title_justify="left",
            caption_justify="left",
            padding=(0, 0, 0, 2),
            pad_edge=False,
        )
        for name in HEAD:
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        limits = (enough(self.chains), R_HAT_LIMIT)
        for row, bad in zip(self.cells(), self._bad(limits), strict=True):
            table.add_row(*row, style="red" if bad else None)
        return table

    def caption(self) -> str:
        """Say what was run, and which coordinates are listed."""
        count, size = self.coordinates.mean.numel(), len(self.order())
        listed = f"; of {plain(count)} coordinates the {size} with the smallest effective sizes" if size < count else ""
        draws = f"{plain(self.chains)} chain{'s' * (self.chains != 1)} of {plain(self.draws)} draws"
        bfmi = "" if self.bfmi is None else f", E-BFMI {_number(self.bfmi.nan_to_num(math.inf).min(), 3)} at least"
        return f"{self.title}{': ' if self.title else ''}{draws}{bfmi}{listed}"

    def cells(self) -> list[tuple[str, ...]]:
        """Rows of the table as text: the energy, then coordinates."""
        rows = [] if self.energy is None else [("energy", *_row(self.energy, ()))]
        shape = self.coordinates.mean.shape
        for place in self.order():
            where = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), shape)) if shape else ()
            rows.append((f"x{list(where)}".replace(" ", "") if where else "x", *_row(self.coordinates, where)))
        return rows

    def order(self) -> list[int]:
        """Coordinates listed, flattened: all in their order, or, when too many, the worst first."""
        worst = torch.minimum(self.coordinates.bulk_ess, self.coordinates.tail_ess).flatten()
        if len(worst) <= self.rows:
            return list(range(len(worst)))
        # Not finite before all others, constants last: those may well be meant.
        broken = ~self.coordinates.mean.flatten().isfinite()
        worst = torch.where(broken, -1.0, worst.nan_to_num(math.inf))
        return worst.argsort(stable=True)[: self.rows].tolist()

    def _bad(self, limits: tuple[float, float]) -> list[bool]:
        ess, r_hat = limits
        m = self.coordinates
        per_place = ((torch.minimum(m.bulk_ess, m.tail_ess) < ess) | (m.r_hat > r_hat) | ~m.mean.isfinite()).flatten()
        first = [] if self.energy is None else [bool((self.energy.bulk_ess < ess) | (self.energy.r_hat > r_hat))]
        return first + [bool(per_place[i]) for i in self.order()]


def enough(chains: int) -> int:
    """Effective sample size below which errors and R-hat are themselves unreliable."""
    return min(ESS_PER_CHAIN * chains, ESS_IN_ALL)


def marginals(draws: Tensor, own: bool = False) -> Marginals:
    """Summarise each coordinate.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.
    own
        Whether these are this process's chains out of those of all; see `gibbsian.diagnostics.shared`.

    Raises
    ------
    ShapeError
        If there are too few draws.
    """
    if draws.ndim < 2 or len(draws) < 4:
        raise ShapeError(f"A summary needs four draws or more of each chain; got {tuple(draws.shape)}. Keep more.")
    flat = draws.detach().reshape(*draws.shape[:2], -1)
    # Large events in parts: every diagnostic holds several copies in float64.
    width = max(1, _CHUNK // max(1, draws.shape[0] * draws.shape[1] * (world().size if own else 1)))
    parts = []
    for x in flat.split(width, dim=2):
        if own:
            x = gathered_along(x, 1)
        mean, error = chain_mean(x)
        ordered = ordered_draws(x.to(torch.float64))
        quantiles = [quantile_of(ordered, p) for p in (0.05, 0.5, 0.95)]
        ess = (effective_sample_size(x), tail_effective_sample_size(x))
        parts.append((mean, error, chain_sd(x)[0], *quantiles, *ess, split_r_hat(x)))
    return Marginals(*(torch.cat(each).reshape(draws.shape[2:]) for each in zip(*parts)))


def summarise(
    draws: Tensor,
    *,
    acceptance: Tensor,
    nonfinite: Tensor,
    steps: int,
    kept: Mapping[str, Tensor] | None = None,
    adjusted: bool = True,
    rows: int = 10,
    title: str = "",
    own: bool = False,
) -> Summary:
    """Summarise a run of chains.

    Parameters
    ----------
    draws
        ``(draws, chains, *event)``, four draws or more.
    acceptance, nonfinite
        Mean acceptance probability and number of proposals that were not finite, ``(chains,)``.
    steps
        Steps made by each chain.
    kept
        ``(draws, chains)`` by name: ``energy``, ``hamiltonian`` and ``diverging`` are read.
    adjusted
        Whether acceptance means something: ``False`` for kernels that accept everything.
    rows
        Coordinates to list at most.
    title
        Kernel and run, in words.
    own
        Whether these are this process's chains out of those of all, who then have the summary of them together. Draws
        are collected some coordinates at a time.

    Raises
    ------
    ShapeError
        If there are too few draws.
    OptionError
        If ``rows`` is below 1.
    """
    if rows < 1:
        raise OptionError(f"rows counts the coordinates to list, 1 or more; got {rows}.")
    kept = kept or {}
    coordinates = marginals(draws, own)
    if own:
        acceptance, nonfinite = gathered(acceptance), gathered(nonfinite)
        kept = {name: gathered_along(value, 1) for name, value in kept.items()}
    energy = marginals(kept["energy"]) if "energy" in kept else None
    bfmi = energy_bfmi(kept["hamiltonian"]) if "hamiltonian" in kept else None
    n = len(acceptance) if own else draws.shape[1]
    warnings = [
        *_proposals(nonfinite, steps),
        *_divergences(kept.get("diverging")),
        *(_acceptance(acceptance) if adjusted else ()),
        *_values(coordinates),
        *_r_hats(coordinates, energy),
        *_sizes(coordinates, energy, n),
        *_bfmi(bfmi),
    ]
    return Summary(tuple(warnings), coordinates, energy, bfmi, acceptance, len(draws), n, rows, title)


def _proposals(nonfinite: Tensor, steps: int) -> list[str]:
    bad, total = int(nonfinite.sum()), steps * len(nonfinite)
    if not bad:
        return []
    if bad == total:
        return [
            "Every proposal was not finite: nothing was explored. The step size is far too large, or the energy is "
            "NaN or infinite around the start. Try a step size ten times smaller."
        ]
    chains = int((nonfinite > 0).sum())
    return [
        f"{plain(bad)} of {plain(total)} proposals were not finite ({_share(bad / total)}, in {plain(chains)} of "
        f"{plain(len(nonfinite))} chains). Try a smaller step size; check the energy far from the data."
    ]


def _acceptance(acceptance: Tensor) -> list[str]:
    mean = float(acceptance.mean())
    if not mean >= LOW_ACCEPTANCE:
        return [f"Acceptance is {plain(mean, 2)}: chains hardly move. Try a smaller step size, or tune()."]
    found = []
    if mean > HIGH_ACCEPTANCE:
        found.append(f"Acceptance is {plain(mean, 4)}: steps are needlessly small. Try a larger step size, or tune().")
    stuck = int((acceptance < LOW_ACCEPTANCE).sum())
    if stuck:
        found.append(
            f"{plain(stuck)} of {plain(len(acceptance))} chains hardly move (acceptance below {LOW_ACCEPTANCE}), while "
            "others do. Try a smaller step size, or other starting points."
        )
    return found


def _divergences(diverging: Tensor | None) -> list[str]:
    share = 0.0 if diverging is None else float((diverging > 0).to(torch.float64).mean())
    if diverging is None or not share:
        return []
    if share > 0.5:
        return [f"Almost everything diverged ({_share(share)} of the kept steps). Try a step size ten times smaller."]
    return [
        f"{plain(int((diverging > 0).sum()))} kept steps diverged ({_share(share)}): somewhere the energy bends more "
        "than the step size can follow, and draws miss that place. Try a smaller step size (a higher target "
        "acceptance), a scale, or other coordinates."
    ]


def _values(m: Marginals) -> list[str]:
    count = m.mean.numel()
    found, broken = [], int((~m.mean.isfinite()).sum())
    still = int((m.mean.isfinite() & (m.low == m.high) & m.r_hat.isnan()).sum())
    if broken:
        found.append(f"{plain(broken)} of {plain(count)} coordinates hold draws that are not finite.")
    if still:
        found.append(
            f"{plain(still)} of {plain(count)} coordinates never moved. Nothing is known about them, unless the "
            "energy fixes them."
        )
    return found


def _r_hats(m: Marginals, energy: Marginals | None) -> list[str]:
    high = int((m.r_hat > R_HAT_LIMIT).sum())
    of_energy = energy is not None and bool(energy.r_hat > R_HAT_LIMIT)
    if not high and not of_energy:
        return []
    remedy = (
        "the chains do not agree yet. Try more steps and a longer warm-up; if it stays, there may be separate modes: "
        "try tempering."
    )
    if not high:
        assert energy is not None
        return [f"R-hat of the energy is {_number(energy.r_hat, 4)}, above {R_HAT_LIMIT}: {remedy}"]
    of = f"{plain(high)} of {plain(m.r_hat.numel())} coordinates"
    return [f"R-hat is above {R_HAT_LIMIT} for {of} ({_number(m.r_hat.nan_to_num(0.0).max(), 4)} at most): {remedy}"]


def _sizes(m: Marginals, energy: Marginals | None, chains: int) -> list[str]:
    found, needed = [], enough(chains)
    for name, ess, of in (("Bulk", "bulk_ess", "means"), ("Tail", "tail_ess", "quantiles")):
        values = [getattr(m, ess).flatten()] + ([] if energy is None else [getattr(energy, ess).flatten()])
        sizes = torch.cat(values)
        low = int((sizes < needed).sum())
        if low:
            smallest = _number(sizes.nan_to_num(math.inf).min(), 3)
            places = f"{plain(low)} of {plain(len(sizes))} rows"
            found.append(
                f"{name} ESS is below {needed} for {places} ({smallest} at least): {of} and their errors are not "
                "reliable. Try more steps, or a kernel that moves further."
            )
    return found


def _bfmi(bfmi: Tensor | None) -> list[str]:
    low = 0 if bfmi is None else int((bfmi < BFMI_LIMIT).sum())
    if bfmi is None or not low:
        return []
    return [
        f"E-BFMI is below {BFMI_LIMIT} in {plain(low)} of {plain(len(bfmi))} chains "
        f"({_number(bfmi.nan_to_num(math.inf).min(), 2)} at least): they "
        "move slowly between energies, and tails may be missed. Try other coordinates, or longer runs."
    ]


def _row(m: Marginals, where: tuple[int, ...]) -> tuple[str, ...]:
    values = [float(value[where]) for value in m]
    mean, error, *rest, bulk, tail, r_hat = values
    numbers = _in_line((mean, error, *rest), error)
    return (*numbers, _whole(bulk), _whole(tail), f"{r_hat:.3f}" if r_hat < 1000 else plain(r_hat, 3))


def _in_line(values: tuple[float, ...], error: float) -> list[str]:
    """Write numbers of one unit to the second digit of the error, as `with_error` does."""
    size = max(map(abs, values))
    if not (0 < error < math.inf and 1e-4 <= size < 1e6) or error < 1e-7 * size:
        return [plain(v, 3) for v in values]
    decimals = max(1 - math.floor(math.log10(error)), 0)
    return [f"{v:.{decimals}f}".replace("-", "−") for v in values]


def _number(value: Tensor, digits: int) -> str:
    return plain(float(value), digits)


def _whole(size: float) -> str:
    return plain(round(size), 4) if math.isfinite(size) and size >= 10 else plain(size, 2)


def _share(value: float) -> str:
    return f"{plain(100 * value, 2)}%"
