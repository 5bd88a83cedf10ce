"""Times forward and backward of score matching losses, in the environment and with the loss of one library.

A case is ``loss:dim:rows``, as in ``sliced:32:256``; the energy is the multilayer perceptron ``dim-128-128-1`` of
`targets`, with the same weights for all.  Each line of standard input is answered with one JSON line.  Losses are
called as each library's documentation shows, with one projection per row where the default is another number.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable

import torch
from harness import CLOCKS
from targets import MLP
from torch import Tensor

Run = Callable[[], Tensor]
LOSSES = ("regression", "exact", "sliced", "reduced", "differences", "denoising")
SIGMA = 0.1


def network(dim: int) -> MLP:
    """The energy, the same weights in every process."""
    torch.manual_seed(20_240_607)
    return MLP((dim, 128, 128))


def regression(energy: MLP, x: Tensor) -> Run:
    """The yardstick: mean squared error of the network's output."""
    y = torch.randn(len(x), generator=torch.Generator().manual_seed(2))
    return lambda: (energy(x) - y).square().mean()


def of_gibbsian(loss: str, net: MLP, x: Tensor) -> Run:
    """Losses of gibbsian."""
    import gibbsian as gb
    from gibbsian.objectives.score_matching import FiniteDifferenceScoreMatching, ScoreMatching, SlicedScoreMatching

    objectives = {
        "exact": ScoreMatching,
        "sliced": SlicedScoreMatching,
        "reduced": lambda: SlicedScoreMatching(variance_reduction=True),
        "differences": FiniteDifferenceScoreMatching,
        "denoising": lambda: gb.DenoisingScoreMatching(SIGMA),
    }
    objective, energy, batch = objectives[loss](), gb.Energy.of(net), gb.Batch(x)
    rng = torch.Generator().manual_seed(0)
    return lambda: objective(energy, batch, rng).value


def of_ebmkit(loss: str, net: MLP, x: Tensor) -> Run:
    """Losses of ebmkit."""
    from ebm import losses

    made = {
        "exact": losses.ExactScoreMatching,
        "sliced": lambda: losses.SlicedScoreMatching(n_projections=1, vr=False),
        "reduced": lambda: losses.SlicedScoreMatching(n_projections=1, vr=True),
        "denoising": lambda: losses.DenoisingScoreMatching(sigma=SIGMA),
    }
    if loss not in made:
        raise NotImplementedError(f"ebmkit has no {loss}")
    objective = made[loss]()
    return lambda: objective(net, x).loss


def of_torchebm(loss: str, net: MLP, x: Tensor) -> Run:
    """Losses of torchebm."""
    from torchebm import losses
    from torchebm.core import BaseModel

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    made = {
        "exact": lambda model: losses.ScoreMatching(model, hessian_method="exact"),
        "sliced": lambda model: losses.SlicedScoreMatching(model, n_projections=1),
        "denoising": lambda model: losses.DenoisingScoreMatching(model, noise_scale=SIGMA),
    }
    if loss not in made:
        raise NotImplementedError(f"torchebm has no {loss}")
    objective = made[loss](Model())
    return lambda: objective(x)


LIBRARIES = {"gibbsian": of_gibbsian, "ebmkit": of_ebmkit, "torchebm": of_torchebm}


def measure(run: Run, net: MLP, seconds: float, clock: str) -> tuple[float, bool]:
    """Best of several stretches of equal length, in microseconds of one forward and backward; and if all is finite."""

    def once() -> None:
        net.zero_grad()
        run().backward()

    now = CLOCKS[clock]
    for _ in range(3):
        once()
    began = time.perf_counter()
    once()
    # At least a few in a stretch, and five stretches.
    count = max(1, int(seconds / 5 / max(time.perf_counter() - began, 1e-6)))
    best = float("inf")
    for _ in range(5):
        start = now()
        for _ in range(count):
            once()
        best = min(best, (now() - start) / count)
    return 1e6 * best, all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def main() -> None:
    """Answer cases until the input closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one measurement")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    told = {"version": importlib.metadata.version(options.library)} if options.library != "gibbsian" else {}
    if not told:
        import gibbsian

        told = {"version": gibbsian.__version__}
    prepared: dict[str, tuple[Run, MLP]] = {}
    for line in sys.stdin:
        case = line.strip()
        try:
            if case not in prepared:
                loss, dim, rows = case.split(":")
                net = network(int(dim))
                x = torch.randn((int(rows), int(dim)), generator=torch.Generator().manual_seed(1))
                build = regression if loss == "regression" else lambda net, x: LIBRARIES[options.library](loss, net, x)  # noqa: B023
                prepared[case] = build(net, x), net
            figure, finite = measure(*prepared[case], options.seconds, options.clock)
            answer = {"repeats": [figure], "finite": finite}
        except Exception as error:  # a loss that one library lacks must not end the comparison
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"torch": torch.__version__, **told, **answer}), flush=True)


if __name__ == "__main__":
    main()
