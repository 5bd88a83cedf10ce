"""`EBM`: an energy-based model behind scikit-learn's interface."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from gibbsian.building import build_objective, initial_weights
from gibbsian.data.scaling import identity_scaling, range_scaling, standard_scaling
from gibbsian.energies.units import BernoulliUnits
from gibbsian.errors import ModelFileError, OptionError
from gibbsian.models import Model, load_model, replace_file, save_model
from gibbsian.partition.base import LogZ
from gibbsian.recipes import choose
from gibbsian.training.fit import fit

ESTIMATOR = "estimator.json"


class EBM(OutlierMixin, BaseEstimator):
    """An energy-based model as a density estimator, a sampler and an outlier detector.

    The data are scaled, a recipe is chosen from their kind and size, and the energy is trained under a health monitor.
    Parameters left at ``None`` are the recipe's; see `gibbsian.recipes.choose`.

    Parameters
    ----------
    energy, objective
        Names of the network and of how it is fitted; see `gibbsian.recipes.Recipe`.
    steps, batch_size, learning_rate
        Of training.
    image_shape
        ``(channels, height, width)`` when the rows of X are flattened images.
    options
        Further fields of `gibbsian.recipes.Recipe` or `gibbsian.training.settings.TrainingSettings`, by name.
    contamination
        Part of the training rows that `predict` calls outliers, above 0 and up to 0.5.
    random_state
        Seed or generator, as in scikit-learn.
    progress
        Show training on the terminal.

    Attributes
    ----------
    model_
        The fitted `gibbsian.models.Model`.
    history_
        Records of the training run, rollbacks included.
    offset_
        Score below which `predict` says outlier.
    n_features_in_
        Columns of X.

    Examples
    --------
    >>> from gibbsian import EBM
    >>> from sklearn.datasets import make_moons
    >>> X, _ = make_moons(500, noise=0.1, random_state=0)
    >>> ebm = EBM(steps=50, random_state=0).fit(X)
    >>> ebm.sample(3).shape
    (3, 2)
    """

    model_: Model
    history_: list[dict[str, Any]]
    offset_: float
    n_features_in_: int

    def __init__(
        self,
        *,
        energy: str | None = None,
        objective: str | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        image_shape: Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
        contamination: float = 0.1,
        random_state: Any = None,
        progress: bool = False,
    ) -> None:
        self.energy = energy
        self.objective = objective
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.image_shape = image_shape
        self.options = options
        self.contamination = contamination
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> EBM:
        """Fit the density of the rows of X.

        Parameters
        ----------
        X
            ``(n, columns)``, two rows or more.
        y
            Ignored; there by convention.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        if not 0.0 < self.contamination <= 0.5:
            raise OptionError(f"contamination lies above 0 and up to 0.5; got {self.contamination}.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        shape, kind = self._event(X.shape[1])
        data = torch.tensor(X, dtype=torch.float32).reshape(-1, *shape)
        if kind == "image":
            low, high = float(data.min()), float(data.max())
            scaling = range_scaling(low, high, shape) if low < high else identity_scaling(shape)
        elif kind == "binary":
            BernoulliUnits(shape).check(data, "X")
            scaling = identity_scaling(shape)
        else:
            scaling = standard_scaling(data)
        given = {name: getattr(self, name) for name in ("energy", "objective", "steps", "batch_size", "learning_rate")}
        overrides = {**{k: v for k, v in given.items() if v is not None}, **(self.options or {}), "seed": seed}
        recipe = choose(kind, shape, len(data), overrides)
        scaled = scaling.forward(data)
        network = initial_weights(recipe, scaled)
        rng = torch.Generator().manual_seed(seed)
        objective = build_objective(recipe, scaled, network)
        run = fit(network, scaled, objective, rng=rng, settings=recipe.training, progress=self.progress)
        self.model_ = Model(network, recipe, scaling)
        self.history_ = run.history
        self._log_z = None
        self.offset_ = float(np.quantile(self.score_samples(X), self.contamination))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Unnormalised log-density of each row, ``(n,)`` in nats: higher is more likely; log Z is not subtracted."""
        rows = self._rows(X)
        # In double precision a row's score does not depend on the rows beside it, by rounding either.
        precise = dataclasses.replace(self.model_, energy=copy.deepcopy(self.model_.energy).double())
        return precise.log_density(rows).numpy()

    def log_prob(self, X: Any) -> np.ndarray:
        """Log-density of each row, ``(n,)`` in nats: `score_samples` minus the value of `log_z`."""
        return self.score_samples(X) - float(self.log_z().value)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-density of the rows of X, in nats."""
        return float(self.log_prob(X).mean())

    def log_z(self) -> LogZ:
        """Estimate log Z with its bracket, once: by quadrature up to two columns, else by annealing there and back."""
        check_is_fitted(self)
        if self._log_z is None:
            self._log_z = self.model_.log_z(self._generator(1))
        return self._log_z

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw rows, ``(n_samples, columns)``, in the units of X.

        Parameters
        ----------
        n_samples
            How many.
        random_state
            Seed or generator; the estimator's own seed when ``None``.
        """
        check_is_fitted(self)
        if random_state is None:
            rng = self._generator(2)
        else:
            rng = torch.Generator().manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))
        return self.model_.draw(n_samples, rng).flatten(1).double().numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """`score_samples` minus `offset_`: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """+1 for rows like the training data, -1 for outliers."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def save(self, folder: str | Path) -> Path:
        """Write the model's folder: ``model.safetensors``, ``recipe.json`` and ``estimator.json``."""
        check_is_fitted(self)
        home = save_model(folder, self.model_)
        kept = {"offset": self.offset_, "n_features_in": self.n_features_in_, "contamination": self.contamination}
        replace_file(home / ESTIMATOR, json.dumps(kept).encode())
        return home

    @classmethod
    def load(cls, folder: str | Path) -> EBM:
        """Rebuild what `save` or ``gibbsian train`` wrote.

        Raises
        ------
        ModelFileError
            If a file is missing, damaged or does not fit.
        """
        model = load_model(folder)
        shape = model.recipe.shape
        made = cls(image_shape=shape if model.recipe.is_image else None, random_state=model.recipe.seed)
        made.model_, made.history_, made._log_z = model, [], None
        made.n_features_in_, made.offset_ = math.prod(shape), -math.inf
        path = Path(folder) / ESTIMATOR
        if path.exists():
            try:
                kept = json.loads(path.read_text())
                made.offset_, made.contamination = float(kept["offset"]), float(kept["contamination"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelFileError(f"{path} is damaged: {error}. Save the estimator again.") from error
        return made

    def _event(self, columns: int) -> tuple[tuple[int, ...], Any]:
        # A machine on bits takes them as they are, whatever their shape.
        bits = self.energy == "rbm" and (self.options or {}).get("visible", "bernoulli") == "bernoulli"
        if self.image_shape is None:
            return (columns,), "binary" if bits else "table"
        shape = tuple(int(s) for s in self.image_shape)
        if math.prod(shape) != columns or len(shape) != 3:
            raise OptionError(
                f"image_shape is (channels, height, width) with as many values as X has columns, {columns}; got "
                f"{shape}."
            )
        return shape, "binary" if bits else "image"

    def _rows(self, X: Any) -> torch.Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return torch.tensor(X, dtype=torch.float64).reshape(-1, *self.model_.recipe.shape)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.model_.recipe.seed + 0x9E3779B9 * stream) % 2**63)

    _log_z: LogZ | None = None
