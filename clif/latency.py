"""Online latency models: seconds of an iteration, given its own work and concurrent work.

T = a * own + b * other + c, in seconds, with a, b, c >= 0. For serving, own is running requests and other the
samples of the micro-batch under way; for training it is the reverse. Free of torch.

Sources: Huber 1964 (robust estimation); Lawson and Hanson 1974 (non-negative least squares).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOW = 256
HALF_LIFE = 64.0
REFIT_EVERY = 16
PRIOR_SAMPLES = 0.2
TRUSTED_SAMPLES = 8.0
MIN_NOISE = 0.02
"""Relative noise that is always granted to measurements."""
HUBER = 2.0
"""Residuals beyond this many robust standard deviations have a constant influence."""


@dataclass(frozen=True)
class Fit:
    """One state of a model: seconds per unit of own work (a), of other work (b), and fixed seconds (c).

    confidence: 0 (only the prior) to 1 (many samples, small residuals).
    """

    a: float
    b: float
    c: float
    confidence: float = 0.0

    def predict(self, x_own: float, x_other: float = 0.0) -> float:
        """Predicted seconds."""
        return self.a * x_own + self.b * x_other + self.c


class LatencyModel:
    """Windowed, forgetting, robust least squares with non-negative coefficients and a prior.

    The prior acts like PRIOR_SAMPLES observations: it dominates at first, and later determines only what the data
    leave open (say, the effect of training before any training).
    """

    def __init__(self, prior: Fit = Fit(0.002, 0.002, 0.02), half_life: float = HALF_LIFE) -> None:
        self.prior = prior
        self.fit = Fit(prior.a, prior.b, prior.c)
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._forget = 0.5 ** (1.0 / half_life)
        self._fresh = 0

    @property
    def seen(self) -> int:
        """Measurements in the window."""
        return len(self._samples)

    def predict(self, x_own: float, x_other: float = 0.0) -> float:
        """Predicted seconds, by the latest fit."""
        return self.fit.predict(x_own, x_other)

    def observe(self, x_own: float, x_other: float, seconds: float) -> None:
        """Add one measurement; refit at intervals. Measurements that are not finite or negative are ignored."""
        sample = x_own, x_other, seconds
        if not all(map(math.isfinite, sample)) or min(sample) < 0:
            return
        self._samples.append(sample)
        self._fresh += 1
        if self._fresh >= min(REFIT_EVERY, len(self._samples)):
            self.refit()

    def observe_all(self, samples: Iterable[tuple[float, float, float]]) -> None:
        for x_own, x_other, seconds in samples:
            self.observe(x_own, x_other, seconds)

    def refit(self) -> Fit:
        """Fit to the window. It costs well under a millisecond, and nothing without new measurements."""
        if not self._fresh:
            return self.fit
        self._fresh = 0
        data = np.asarray(self._samples, dtype=np.float64)
        features, seconds = np.column_stack([data[:, :2], np.ones(len(data))]), data[:, 2]
        age = self._forget ** np.arange(len(data) - 1, -1, -1, dtype=np.float64)
        theta = self._robust(features, seconds, age)
        residual = np.abs(seconds - features @ theta)
        noise = _weighted_median(residual, age) / max(_weighted_median(seconds, age), 1e-9)
        count = float(age.sum())
        confidence = count / (count + TRUSTED_SAMPLES) / (1.0 + noise)
        self.fit = Fit(float(theta[0]), float(theta[1]), float(theta[2]), confidence)
        return self.fit

    def _robust(self, features: Floats, seconds: Floats, age: Floats) -> Floats:
        """Huber's estimate by iteratively reweighted least squares, started from a clipped first pass."""
        prior = np.array([self.prior.a, self.prior.b, self.prior.c])
        scale = np.maximum(np.sqrt((features**2).mean(axis=0)), 1.0)
        ridge = PRIOR_SAMPLES * scale**2
        # A stall of hundreds of steps would bias even the first pass, from which the weights come.
        clipped = np.minimum(seconds, 4.0 * np.quantile(seconds, 0.75))
        theta = _nonnegative(features, clipped, age, ridge, prior)
        # Without a floor, data that fit perfectly would count less than a prior that disagrees with them.
        floor = MIN_NOISE * max(_weighted_median(seconds, age), 1e-9)
        for _ in range(4):
            residual = np.abs(seconds - features @ theta)
            sigma = max(1.4826 * _weighted_median(residual, age), floor)
            weight = age * np.minimum(1.0, HUBER * sigma / np.maximum(residual, 1e-12))
            theta = _nonnegative(features, seconds, weight, ridge, prior)
        return theta


_SUPPORTS = np.array([[i in s for i in range(3)] for size in (1, 2, 3) for s in combinations(range(3), size)])
_WITHIN = _SUPPORTS[:, :, None] & _SUPPORTS[:, None, :]
_REST = np.array([np.diag(1.0 - support) for support in _SUPPORTS.astype(np.float64)])


def _nonnegative(features: Floats, seconds: Floats, weight: Floats, ridge: Floats, prior: Floats) -> Floats:
    """argmin over theta >= 0 of sum w (y - theta x)^2 + sum ridge (theta - prior)^2.

    The problem is strictly convex, so its solution is the best of the feasible solutions over all supports; with three
    coefficients there are eight of them. All but the empty one are solved at once, the rest of each being the identity.
    """
    weighted = (features * weight[:, None]).T
    gram = weighted @ features + np.diag(ridge)
    rights = np.where(_SUPPORTS, weighted @ seconds + ridge * prior, 0.0)
    thetas = np.linalg.solve(np.where(_WITHIN, gram, _REST), rights[:, :, None])[:, :, 0]
    # At the solution of a support the objective is -right.theta (up to a constant); 0 is that of the empty one.
    values = np.where((thetas >= 0).all(axis=1), -(rights * thetas).sum(axis=1), 0.0)
    best = int(values.argmin())
    return thetas[best] if values[best] < 0 else np.zeros(3)


def _weighted_median(values: Floats, weight: Floats) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, 0.5 * total[-1])])
