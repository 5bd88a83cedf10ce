"""How images are judged: Frechet distance in the features of a classifier, and the draws of a Gaussian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common import Stopwatch, generator
from gibbsian.data import Dataset
from gibbsian.diagnostics.two_sample import frechet_distance


class Judge:
    """A small convolutional classifier of the training rows; its last hidden layer gives the features."""

    def __init__(self, dataset: Dataset, steps: int, seed: int) -> None:
        assert dataset.labels is not None
        assert dataset.held_out_labels is not None
        x, y = self.prepared(dataset.train), dataset.labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()]
            self.body = nn.Sequential(*layers, nn.Linear(64 * 49, 64), nn.ReLU())
            self.head = nn.Linear(64, int(y.max()) + 1)
        weights = [*self.body.parameters(), *self.head.parameters()]
        rng = generator(seed, 3)
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            picked = torch.randint(len(x), (128,), generator=rng)
            loss = nn.functional.cross_entropy(self.head(self.body(x[picked])), y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = self.classes(dataset.held_out)
        self.accuracy = float((found == dataset.held_out_labels).float().mean())
        self.reference = self.features(dataset.held_out)

    @staticmethod
    def prepared(x: Tensor) -> Tensor:
        """Pixels in [0, 1]."""
        return x.clamp(0.0, 255.0) / 255.0

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Activations ``(n, 64)`` of pixels."""
        return torch.cat([self.body(self.prepared(part)) for part in x.split(1000)])

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """The likeliest class of each row."""
        return self.head(self.features(x)).argmax(1)

    def distance(self, x: Tensor) -> list[float]:
        """Frechet distance to the test rows, with its error."""
        return list(frechet_distance(self.features(x), self.reference))


def gaussian_draws(rows: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw from a Gaussian with the rows' mean and covariance."""
    x = rows.flatten(1).double()
    values, axes = torch.linalg.eigh(x.T.cov())
    noise = torch.randn((n, len(values)), generator=rng, dtype=torch.float64)
    return (x.mean(0) + (noise * values.clamp(min=0.0).sqrt()) @ axes.T).float().view(n, *rows.shape[1:])


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Keep the wall time of a block."""
    with Stopwatch() as watch:
        yield
    seconds[name] = watch.wall
