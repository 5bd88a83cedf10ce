"""Flows, what a learned tilt adds to them, and chains in a flow's noise beside plain HMC.

**Tilt.** A modest flow is trained by maximum likelihood, then a tilt on top of it by noise contrastive estimation with
that flow as the noise. Both stop where rows kept aside (a fifth of the training rows) are likeliest: flow and tilt are
trained in stretches, and the best end of a stretch is taken, none at all being the first of the tilt's. The
log-likelihood of held-out rows lies between the bounds that annealing gives log Z, forwards from the noise and
backwards from draws (by rejection in the plane, which are exact; by chains elsewhere), both in the flow's own space. It
is in nats per row. The difference is that of the means over the same held-out rows, and its error is over these. Digits
are pixels 0 to 16 with uniform noise of one step, scaled to [-1, 1]; breast-cancer is a table of 30 real columns,
standardised.

**Transport.** Chains in the noise of a flow that was trained on the energy alone, beside HMC that `warm_up` tunes, on
funnel-10 and the banana. Cost is gradients of the energy per effective draw: the least bulk effective size of all
coordinates of the points, after the warm-up. Gradients of the flow's training and of the warm-up are told apart, and
once more included.

    python benchmarks/flow_tilt.py                               # everything, about ten minutes of one core
    python benchmarks/flow_tilt.py --parts two-moons funnel-10 --budget 0.1
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gibbsian as gb
from common import RESULTS, circumstances, generator, table, write
from gibbsian.bridges.transport import fit_transport, sample_transported
from gibbsian.data import load
from gibbsian.diagnostics.summary import marginals
from gibbsian.energies.flows import Flow, inverse_autoregressive_flow, spline_flow
from gibbsian.energies.tilted import Tilted, tilted
from gibbsian.energies.toys import EightGaussians, Pinwheel, TwoMoons
from gibbsian.energies.transport import neural_transport
from gibbsian.objectives.maximum_likelihood import MaximumLikelihood
from gibbsian.partition.base import LogZ
from gibbsian.partition.bracket import bracket
from gibbsian.partition.importance import importance_sampling
from gibbsian.report.canvas import colour

PLANE = {"eight-gaussians": EightGaussians, "two-moons": TwoMoons, "pinwheel": Pinwheel}
ASIDE = 0.2
"""Part of the training rows by which training is stopped."""


@dataclass(frozen=True)
class Setting:
    """How a set is learned; none was chosen on the seed that is recorded."""

    transforms: int
    hidden: int
    bins: int
    width: int
    flow_steps: int
    tilt_steps: int
    stretches: int = 6
    flow_rate: float = 5e-3
    tilt_rate: float = 2e-3
    weight_decay: float = 0.0
    limit: float = 5.0
    frequencies: int = 0
    ratio: int = 1
    temperatures: int = 20
    chains: int = 500


SETTINGS = {
    **dict.fromkeys(PLANE, Setting(1, 16, 6, 64, 600, 1500, tilt_rate=1e-2, frequencies=2, chains=1500)),
    "digits": Setting(2, 64, 6, 256, 600, 600, weight_decay=0.1, limit=10.0, temperatures=30, chains=256),
    "breast-cancer": Setting(2, 32, 4, 64, 400, 400, 8, 2e-3, 2e-3, 1.0, 5.0, temperatures=20, chains=256),
}


@dataclass(frozen=True)
class Rows:
    """Training rows, those kept aside, held-out ones, and where a flow is centred and how wide."""

    train: Tensor
    aside: Tensor
    held: Tensor
    dequantise: float | None
    spread: Tensor


def rows_of(name: str, seed: int) -> Rows:
    """Read or draw a set."""
    rng = generator(seed, 1)
    step = None
    if name in PLANE:
        truth = PLANE[name]()
        train, held = truth.sample(2500, rng), truth.sample(4000, rng)
    elif name == "digits":
        digits = load("digits", seed=seed)
        step = 2.0 / 16.0
        train, held = ((x.flatten(1) / 8.0 - 1.0) for x in (digits.train, digits.held_out))
        held = held + step * (torch.rand(held.shape, generator=rng) - 0.5)
    else:
        data = load(name, seed=seed)
        scaling = data.scaling()
        train, held = scaling.forward(data.train), scaling.forward(data.held_out)
    order = torch.randperm(len(train), generator=rng)
    count = round(ASIDE * len(train))
    aside, train = train[order[:count]], train[order[count:]]
    spread = train
    if step is not None:
        aside = aside + step * (torch.rand(aside.shape, generator=rng) - 0.5)
        # Pixels of the edge hardly vary; a flow that is calibrated to some noise on them is wide enough for all rows.
        spread = train + 0.3 * torch.randn(train.shape, generator=rng)
    return Rows(train, aside, held, step, spread)


@torch.no_grad()
def mean_energy(energy: gb.Energy, x: Tensor) -> float:
    """Mean over rows."""
    return float(energy(x).double().mean())


def best_stretch(module: nn.Module, stretches: int, train: Callable[[int], None], loss: Callable[[], float]) -> int:
    """Train in stretches, and leave the module as it was after the one with the least loss; return which."""
    kept, least, at = copy.deepcopy(module.state_dict()), loss(), 0
    for i in range(stretches):
        train(i)
        if (now := loss()) < least:
            kept, least, at = copy.deepcopy(module.state_dict()), now, i + 1
    module.load_state_dict(kept)
    return at


def likelihood_of(rows: Rows) -> gb.Objective:
    """Maximum likelihood, of grey values with noise."""
    plain = MaximumLikelihood()
    return plain if rows.dequantise is None else gb.Augmented(plain, gb.UniformNoise(rows.dequantise))


def trained_flow(rows: Rows, setting: Setting, budget: float, seed: int) -> tuple[Flow, int]:
    """A flow by maximum likelihood."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dim = rows.train.shape[1]
        flow = spline_flow(dim, setting.transforms, (setting.hidden,), setting.bins, passes=2 if dim > 1 else None)
    flow.calibrate(rows.spread)
    steps = max(2, round(budget * setting.flow_steps / setting.stretches))
    options = {"steps": steps, "learning_rate": setting.flow_rate, "warmup_steps": 0, "batch_size": 256}
    options |= {"ema_decay": 0.98, "weight_decay": setting.weight_decay}

    def train(i: int) -> None:
        gb.fit(flow, rows.train, likelihood_of(rows), rng=generator(seed, 2, i), **options)

    return flow, best_stretch(flow, setting.stretches, train, lambda: mean_energy(flow, rows.aside))


def trained_tilt(flow: Flow, rows: Rows, setting: Setting, budget: float, seed: int) -> tuple[Tilted, int]:
    """A tilt by noise contrastive estimation against the flow."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = gb.MLP(rows.train.shape[1], (setting.width, setting.width), frequencies=setting.frequencies)
    model = tilted(flow, net, setting.limit)
    objective = gb.NoiseContrastiveEstimation(model.base, setting.ratio)
    steps = max(2, round(budget * setting.tilt_steps / setting.stretches))
    options = {"steps": steps, "learning_rate": setting.tilt_rate, "warmup_steps": 0, "batch_size": 256}
    options |= {"ema_decay": 0.98, "weight_decay": setting.weight_decay}

    def train(i: int) -> None:
        rng = generator(seed, 3, i)
        x = rows.train
        if rows.dequantise is not None:
            x = torch.cat([gb.UniformNoise(rows.dequantise)(x, rng) for _ in range(8)])
        gb.fit(model, x, objective, rng=rng, **options)

    def loss() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log_z = importance_sampling(
                model, model.base, rng=generator(seed, 4), draws=max(256, round(min(1.0, budget) * 8192))
            ).value
        return mean_energy(model, rows.aside) + float(log_z)

    return model, best_stretch(model.net, setting.stretches, train, loss)


def bounds(model: Tilted, name: str, setting: Setting, budget: float, seed: int) -> tuple[LogZ, list[str]]:
    """Log Z between bounds, by annealing in the flow's space; and what was warned of."""
    rng, moved = generator(seed, 5), neural_transport(model)
    base, chains = gb.Gaussian(model.base.event_shape.numel()), max(32, round(min(1.0, budget) * setting.chains))
    if name in PLANE:
        draws = moved.backward_points(model.sample(chains, rng))
    else:
        tuned = gb.tune(
            moved, gb.HMC(0.2, leapfrog=5), moved.start(chains, rng), rng=rng, steps=100 if budget == 1 else 8
        )
        draws = gb.sample(moved, tuned.kernel, tuned.state, steps=100 if budget == 1 else 5, rng=rng).x
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = bracket(moved, base, draws, rng=rng, temperatures=max(3, round(budget * setting.temperatures)))
    return found, [str(w.message) for w in said]


def tilt_part(name: str, budget: float, seed: int) -> tuple[dict[str, Any], Tilted]:
    """Flow against tilted model on one set."""
    rows, setting, began = rows_of(name, seed), SETTINGS[name], time.process_time()
    flow, flow_stop = trained_flow(rows, setting, budget, seed)
    model, tilt_stop = trained_tilt(flow, rows, setting, budget, seed)
    log_z, said = bounds(model, name, setting, budget, seed)
    with torch.no_grad():
        of_flow, of_tilt = flow(rows.held).double(), model(rows.held).double()
    gain = of_flow - of_tilt
    error = float(gain.std()) / math.sqrt(len(gain))
    result = {
        "set": name,
        "rows": [len(rows.train), len(rows.aside), len(rows.held)],
        "dim": rows.train.shape[1],
        "flow": -float(of_flow.mean()),
        "lower": -float(of_tilt.mean()) - float(log_z.upper),
        "value": -float(of_tilt.mean()) - float(log_z.value),
        "upper": -float(of_tilt.mean()) - float(log_z.lower),
        "error": error,
        "log_z": [float(log_z.lower), float(log_z.value), float(log_z.upper)],
        "ess": [float(log_z.ess), log_z.chains],
        "stretches": [flow_stop, tilt_stop, setting.stretches],
        "warnings": said,
        "cpu": time.process_time() - began,
    }
    if name in PLANE:
        result["truth"] = -mean_energy(PLANE[name](), rows.held)
    return result, model


@dataclass(frozen=True)
class Walk:
    """A target under chains, and how its flow is trained."""

    energy: Callable[[], Any]
    transforms: int
    hidden: int
    flow_steps: int
    batch: int
    leapfrog: int
    target: float
    plain_leapfrog: int
    steps: int


WALKS = {
    "funnel-10": Walk(gb.Funnel, 2, 32, 1500, 128, 4, 0.8, 10, 1500),
    "banana": Walk(gb.Rosenbrock, 2, 64, 2000, 128, 4, 0.9, 10, 1500),
}
CHAINS, WARM_UP = 32, 500


def judged(draws: Tensor, sampling: int, before: int, training: int) -> dict[str, Any]:
    """R-hat, effective size and gradients of chains."""
    m = marginals(draws)
    ess = float(m.bulk_ess.min())
    return {
        "r_hat": float(m.r_hat.max()),
        "ess": ess,
        "tail_ess": float(m.tail_ess.min()),
        "gradients": sampling,
        "warm_up": before,
        "training": training,
        "per_draw": sampling / ess,
        "per_draw_all": (sampling + before + training) / ess,
    }


def walk_part(name: str, budget: float, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """HMC and transported HMC on one target."""
    walk = WALKS[name]
    energy, rng = walk.energy(), generator(seed, 6)
    dim = len(energy.sample(1, generator(0))[0])
    steps, warm = max(20, round(budget * walk.steps)), max(40, round(budget * WARM_UP))
    result: dict[str, Any] = {"target": name}
    drawn = {}
    began = time.process_time()
    start = torch.randn((CHAINS, dim), generator=rng)
    with Counted(energy) as counted:
        tuned = gb.warm_up(energy, gb.HMC(0.1, walk.plain_leapfrog), start, rng=rng, steps=warm)
        before = counted.rows
        plain = gb.sample(energy, tuned.kernel, tuned.state, steps=steps, rng=rng, thin=1)
        after = counted.rows
    assert plain.draws is not None
    result["HMC"] = judged(plain.draws, after - before, before, 0) | {"cpu": time.process_time() - began}
    drawn["HMC"], began = plain.draws, time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = inverse_autoregressive_flow(dim, walk.transforms, (walk.hidden,) * 2)
    made = fit_transport(energy, flow, rng=rng, steps=max(5, round(budget * walk.flow_steps)), batch_size=walk.batch)
    trained = time.process_time() - began
    moved = neural_transport(energy, flow)
    with Counted(energy) as counted:
        tuned = gb.warm_up(
            moved, gb.HMC(0.3, walk.leapfrog), moved.start(CHAINS, rng), rng=rng, steps=warm, target=walk.target
        )
        before = counted.rows
        there = sample_transported(moved, tuned.kernel, tuned.state, steps=steps, rng=rng, thin=1)
        after = counted.rows - CHAINS
    assert there.draws is not None
    result["transport"] = judged(there.draws, after - before, before, made.gradients) | {
        "cpu": time.process_time() - began,
        "cpu_training": trained,
        "elbo": made.elbo.value,
        "log_z": energy.log_z,
        "nonfinite": int(there.nonfinite.sum()),
    }
    drawn["transport"] = there.draws
    return result, drawn


class Counted:
    """Count the rows that an energy is evaluated at, each of which here is a gradient."""

    def __init__(self, energy: nn.Module) -> None:
        self.energy, self.rows = energy, 0

    def __enter__(self) -> Counted:
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.rows += len(inputs[0])

        self.hook = self.energy.register_forward_pre_hook(count)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def picture(models: dict[str, Tilted], drawn: dict[str, dict[str, Tensor]]) -> None:
    """Densities of flow and tilted model beside the truth; and the funnel's first two coordinates under chains."""
    columns = [*models, *drawn]
    if not columns:
        return
    figure = Figure(figsize=(2.3 * len(columns), 6.9), layout="constrained")
    axes = figure.subplots(3, len(columns), squeeze=False)
    for j, (name, model) in enumerate(models.items()):
        reach = 2.6 if name == "two-moons" else 4.5
        line = torch.linspace(-reach, reach, 160)
        grid = torch.cartesian_prod(line, line)
        for i, (title, energy) in enumerate((("truth", PLANE[name]()), ("flow", model.base), ("tilted", model))):
            with torch.no_grad():
                density = (-energy(grid)).exp().view(160, 160).T.numpy()
            axes[i, j].imshow(density, origin="lower", extent=(-reach, reach) * 2, cmap="Blues", aspect="equal")
            axes[i, j].set_title(f"{name}: {title}" if i == 0 else title, fontsize=9)
            axes[i, j].set(xticks=[], yticks=[])
    for j, (name, draws) in enumerate(drawn.items(), start=len(models)):
        energy, across = WALKS[name].energy(), (1, 0) if name.startswith("funnel") else (0, 1)
        exact = energy.sample(2000, generator(9))
        for i, (title, x) in enumerate((("exact draws", exact), *draws.items())):
            every = x.reshape(-1, x.shape[-1])
            shown = every[torch.randperm(len(every), generator=generator(8))[:2000]].numpy()
            tone = colour("data" if i == 0 else "samples")
            axes[i, j].scatter(shown[:, across[0]], shown[:, across[1]], s=1.5, color=tone, linewidth=0)
            axes[i, j].set_title(f"{name}: {title}" if i == 0 else title, fontsize=9)
            limits = ((-20, 20), (-10, 10)) if name.startswith("funnel") else ((-2.2, 4.2), (-1.5, 13.0))
            axes[i, j].set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "flow_tilt.png", dpi=150, facecolor="white")


def tilt_table(rows: list[dict[str, Any]]) -> str:
    """The sets in a table."""
    lines = []
    for r in rows:
        width = r["upper"] - r["lower"]
        beaten = "yes" if r["lower"] - r["flow"] > width else "no"
        truth = f"{r['truth']:.3f}" if "truth" in r else ""
        gain = f"{r['value'] - r['flow']:.3f} ± {r['error']:.3f}"
        spans = f"{r['lower']:.3f} to {r['upper']:.3f}"
        stops = ", ".join(map(str, r["stretches"][:2]))
        figures = [f"{r['flow']:.3f}", spans, truth, gain, f"{width:.3f}", beaten, stops, f"{r['cpu']:.0f}"]
        lines.append([r["set"], r["dim"], *figures])
    head = ["set", "numbers", "flow", "tilted, between", "truth", "gain", "bracket", "beats it", "stops", "s CPU"]
    return table(head, lines)


def walk_table(rows: list[dict[str, Any]]) -> str:
    """The targets in a table."""
    lines = []
    for r in rows:
        for way in ("HMC", "transport"):
            m = r[way]
            counts = [f"{m[key]:,}" for key in ("gradients", "warm_up", "training")]
            costs = [f"{m[key]:.1f}" for key in ("per_draw", "per_draw_all")]
            lines.append(
                [r["target"], way, f"{m['r_hat']:.4f}", f"{m['ess']:,.0f}", *counts, *costs, f"{m['cpu']:.0f}"]
            )
    head = ["target", "chains", "R-hat", "ESS", "gradients", "warm-up", "training", "per ESS", "per ESS, all", "s CPU"]
    return table(head, lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*SETTINGS, *WALKS], choices=[*SETTINGS, *WALKS])
    parser.add_argument("--budget", type=float, default=1.0, help="part of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    began = time.process_time()
    tilts, walks, models, drawn = [], [], {}, {}
    for name in options.parts:
        if name in SETTINGS:
            row, model = tilt_part(name, options.budget, options.seed)
            tilts.append(row)
            print(row, flush=True)
            if name in PLANE:
                models[name] = model
        else:
            row, draws = walk_part(name, options.budget, options.seed)
            walks.append(row)
            drawn[name] = draws
            print(row, flush=True)
        report(tilts, walks, models, drawn, options, time.process_time() - began)
    return [*tilts, *walks]


def report(
    tilts: list[dict[str, Any]],
    walks: list[dict[str, Any]],
    models: dict[str, Tilted],
    drawn: dict[str, dict[str, Tensor]],
    options: argparse.Namespace,
    total: float,
) -> None:
    """Write what there is so far."""
    record = circumstances([options.seed], options.threads) | {"cpu": total, "budget": options.budget}
    record |= {"tilts": tilts, "walks": walks}
    intro = (
        f"Held-out log-likelihood in nats per row; gains with their standard errors over held-out rows. The tilt beats "
        f"its flow where its lower bound is above the flow by more than the bracket. Stops are the stretches, of six, "
        f"or of eight for the table, after which flow and tilt were best on rows kept aside: where that is the last, "
        f"more training would have helped. {CHAINS} chains on each target. No setting was chosen on this seed. "
        f"{total / 60:.1f} minutes of one core."
    )
    sections = [intro]
    sections += ["## A flow, and tilted\n\n" + tilt_table(tilts)] if tilts else []
    sections += ["## Chains in a flow's noise\n\n" + walk_table(walks)] if walks else []
    sections += ["![densities and draws](flow_tilt.png)"]
    picture(models, drawn)
    write("flow_tilt", "Flows, tilted and walked in", record, sections)


if __name__ == "__main__":
    main()
