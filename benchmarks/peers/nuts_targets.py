"""Targets of the comparison of NUTS, as NumPy arrays, so that workers on torch and on JAX share them."""

from __future__ import annotations

import numpy as np

DIM = 100
CONDITION = 1e4
FUNNEL_DIM = 10
TARGETS = ("gaussian100", "funnel10")


def precision() -> np.ndarray:
    """Precision matrix of the Gaussian: variances from 1 down to 1 / CONDITION, turned at random."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(DIM, DIM)))
    variances = np.logspace(0.0, -np.log10(CONDITION), DIM)
    return ((turn / variances) @ turn.T).astype(np.float32)


def start(target: str, chains: int) -> np.ndarray:
    """Standard normal starting positions for a target."""
    d = DIM if target == "gaussian100" else FUNNEL_DIM
    return np.random.default_rng(1).normal(size=(chains, d)).astype(np.float32)
