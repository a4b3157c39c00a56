"""Intervals of figures that are no shares, by drawing the answers again. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
DRAWS = 1000
LEVEL = (2.5, 97.5)


def bootstrap(statistics: Array, value: Callable[[Array], float], seed: int, draws: int = DRAWS) -> tuple[float, float]:
    """95 % interval of value(sum of all lines). statistics: [answers, k], a line for each answer.

    Each draw takes as many answers as there are, with replacement; the interval holds the middle 95 % of their values.
    The same arguments give the same interval.

    Sources: Efron, "Bootstrap Methods: Another Look at the Jackknife" (1979); Koehn, "Statistical Significance Tests
    for Machine Translation Evaluation" (2004).
    """
    count = len(statistics)
    taken = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    values = [value(total) for total in taken @ statistics]
    low, high = np.percentile(values, LEVEL)
    return float(low), float(high)
