"""How long the steps of an emulated engine take: a fixed time, or times drawn from a measured run. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clif.errors import ConfigError
from clif.latency import WINDOW, Fit, LatencyModel
from clif.metrics.merged import load_merged
from clif.types import Regime

DEFAULT_MS = 10.0
NEAREST = 32
"""Measured steps, those nearest in size, from which one is drawn."""
NEVER = 1e9
"""Half-life of measurements that do not age, in measurements."""
Rows = np.ndarray[Any, Any]


class StepTimes(Protocol):
    """The duration of a step."""

    def step_s(self, decode_rows: int, prefill_tokens: int) -> float:
        """Seconds of a step that continues so many answers and computes so many tokens of prompts."""
        ...


class FixedTimes:
    """Every step takes the same time, seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def step_s(self, decode_rows: int, prefill_tokens: int) -> float:
        return self._seconds


class MeasuredTimes:
    """Times drawn from the rows of a table `ticks`: a fit over the size, times the error of a step of about that size.

    So sizes that were not measured have a plausible time, and equal sizes vary as they did. Steps with and without
    tokens of prompts are apart. Training beside them is left out. Raises ConfigError without such a row.
    """

    def __init__(self, ticks: Rows, name: str, seed: int = 0) -> None:
        alone = np.isin(ticks["regime"], [b"", Regime.ALONE.value.encode()]) & (ticks["seconds"] > 0)
        steps = ticks[alone & (ticks["decode_rows"] + ticks["prefill_tokens"] > 0)]
        if not len(steps):
            raise ConfigError(f"engine.emulated: {name} holds no serving step: name a run that has served")
        prefills = steps["prefill_tokens"] > 0
        parts = [steps[chosen] if chosen.any() else steps for chosen in (~prefills, prefills)]
        self._rng = np.random.default_rng(seed)
        self._decode, self._prefill = _SizedTimes(parts[0], "decode_rows"), _SizedTimes(parts[1], "prefill_tokens")

    def step_s(self, decode_rows: int, prefill_tokens: int) -> float:
        """Seconds of a step that continues so many answers and computes so many tokens of prompts."""
        draw = float(self._rng.random())
        if prefill_tokens:
            return self._prefill.draw(prefill_tokens, decode_rows, draw)
        return self._decode.draw(decode_rows, 0, draw)


class _SizedTimes:
    """The steps of one kind. column: of their size; the other one counts as work beside it."""

    def __init__(self, steps: Rows, column: str) -> None:
        other = "decode_rows" if column == "prefill_tokens" else "prefill_tokens"
        steps = steps[np.argsort(steps[column], kind="stable")]
        few = steps[np.linspace(0, len(steps) - 1, min(WINDOW, len(steps))).astype(int)]
        model = LatencyModel(Fit(0.0, 0.0, float(np.median(steps["seconds"]))), half_life=NEVER)
        model.observe_all((float(row[column]), float(row[other]), float(row["seconds"])) for row in few)
        self._fit = model.refit()
        self._sizes = steps[column].astype(float)
        predicted = self._fit.a * self._sizes + self._fit.b * steps[other] + self._fit.c
        self._errors = steps["seconds"] / np.maximum(predicted, 1e-6)

    def draw(self, own: float, other: float, draw: float) -> float:
        """draw: from 0 to 1, chooses the step whose error is taken."""
        count = len(self._sizes)
        first = int(np.searchsorted(self._sizes, own)) - NEAREST // 2
        first = max(0, min(first, count - NEAREST))
        chosen = min(first + int(draw * min(NEAREST, count)), count - 1)
        return max(self._fit.predict(own, other), 1e-6) * float(self._errors[chosen])


def step_times(emulated: str | float | Path, seed: int) -> StepTimes:
    """What engine.emulated asks for. Raises ConfigError for a run that cannot be read."""
    if emulated == "default":
        return FixedTimes(DEFAULT_MS / 1000)
    if isinstance(emulated, (int, float)):
        return FixedTimes(emulated / 1000)
    file = run_file(Path(emulated))
    if not file.is_file():
        raise ConfigError(f"engine.emulated: there is no {file}: name a run that `clif collect` has merged")
    return MeasuredTimes(load_merged(file).tables["ticks"], str(file), seed)


def run_file(path: Path) -> Path:
    """The run.h5 that a path names, by its folder or itself."""
    return path / "run.h5" if path.is_dir() else path
