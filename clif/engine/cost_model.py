"""Predicted seconds of serving steps and training slices, fitted to measured ones; and the slack for training.

Free of torch. Training gets only what serving leaves (promise 5): a slice runs only if it fits into training_slack().
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from clif.config import SloConfig
from clif.engine.jobs import SliceKind
from clif.engine.scheduler import Sequence
from clif.latency import WINDOW, Fit, LatencyModel
from clif.types import Purpose, Regime, SlackLimit, TrainingSlack

UNLIMITED = 1 << 30
TRUSTED = 32
"""Measurements after which a fit is trusted; before, its predictions are multiplied by UNTRUSTED."""
UNTRUSTED = 1.25
MEASURED = 4
"""Measurements before which nothing is known of a regime of steps."""
STALL = 3.0
"""The largest factor that one measurement may add to the spread: a stall of the machine is no property of the work."""
STEP_PRIOR = Fit(0.002, 0.002, 0.02)
SLICE_PRIOR = Fit(0.02, 0.001, 0.0)


@dataclass
class Rate:
    """Running mean and mean absolute deviation. smoothing: weight of the newest observation."""

    mean: float = 0.0
    deviation: float = 0.0
    smoothing: float = 0.1
    seen: int = 0

    def observe(self, rate: float) -> None:
        self.seen += 1
        weight = max(self.smoothing, 1 / self.seen)
        self.deviation += weight * (abs(rate - self.mean) - self.deviation) if self.seen > 1 else 0.0
        self.mean += weight * (rate - self.mean)

    @property
    def upper_bound(self) -> float:
        """What is rarely exceeded; half of all observations exceed the mean."""
        return self.mean + 2 * self.deviation


@dataclass
class Cost:
    """Seconds of one kind of work: a fit, and the factor by which measurements exceed it. seen: measurements.

    A measurement is fitted when a prediction is asked for, and each as if it had been at once: where nothing trains
    none ever is. The latest ones wait for it; those that the fit's window would have lost meanwhile are dropped.
    """

    model: LatencyModel
    excess: Rate = field(default_factory=lambda: Rate(mean=1.0))
    seen: int = 0
    _waiting: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def observe(self, own: float, other: float, seconds: float) -> None:
        self.seen += 1
        self._waiting.append((own, other, seconds))

    def _fit_waiting(self) -> None:
        while self._waiting:
            own, other, seconds = self._waiting.popleft()
            if self.seen - len(self._waiting) > TRUSTED:
                # The first fits lean on the prior: their errors say nothing about the spread.
                self.excess.observe(min(STALL, seconds / max(self.model.predict(own, other), 1e-6)))
            self.model.observe(own, other, seconds)

    @property
    def fit(self) -> Fit:
        """The means of the work so far."""
        self._fit_waiting()
        return self.model.fit

    def upper_bound(self, own: float, other: float) -> float:
        """Seconds that are rarely exceeded."""
        self._fit_waiting()
        return self.model.predict(own, other) * self._factor

    def others_within(self, own_per_other: float, seconds: float) -> int:
        """The largest whole `other`, at least 0, for which own = own_per_other * other takes at most `seconds`."""
        self._fit_waiting()
        fit = self.model.fit
        each = fit.a * own_per_other + fit.b
        return int((seconds / self._factor - fit.c) / each) if each > 0 else UNLIMITED

    @property
    def _factor(self) -> float:
        return max(1.0, self.excess.upper_bound) if self.excess.seen else UNTRUSTED


@dataclass
class CostModel:
    """Predicted seconds of serving steps and of training slices, apart for each regime.

    steps: by regime and whether the step is a captured one that continues answers alone, from rows (FUSED: with those
    of the forward) and the cached tokens that they read (thousands). Such a step reads all weights for a few rows; any
    other one has prompts, or is hundreds of launches: they have nothing in common. slices: by kind, from tokens times
    units (thousands) and units: layers, or rows of the head.
    """

    steps: dict[tuple[Regime, bool], Cost] = field(default_factory=dict)
    slices: dict[SliceKind, Cost] = field(default_factory=dict)

    def observe_step(
        self, rows: float, context: float, seconds: float, regime: Regime = Regime.ALONE, captured: bool = False
    ) -> None:
        self._step(regime, captured).observe(rows, context / 1000, seconds)

    def step_s(self, rows: float, context: float, regime: Regime = Regime.ALONE, captured: bool = False) -> float:
        """Seconds that a step rarely exceeds. An unmeasured regime costs what ALONE does, with all rows; an unmeasured
        captured step what an eager one does. Beside a slice a step is never predicted to be faster than alone.
        """
        alone_s = self._alone(captured).upper_bound(rows, context / 1000)
        cost = self.steps.get((regime, captured))
        if cost is None or cost.seen < MEASURED:
            return alone_s
        own_s = cost.upper_bound(rows, context / 1000)
        return max(own_s, alone_s) if regime == Regime.CONCURRENT else own_s

    @property
    def captures(self) -> bool:
        """Whether captured steps have been measured."""
        return any(captured and cost.seen >= MEASURED for (_, captured), cost in self.steps.items())

    def batch_alone(self, tokens_per_s: float, context: float) -> float:
        """Requests that run at a time if serving alone gives them so many tokens/s, each with so much context cached.

        Infinite if it cannot.
        """
        fit = self._alone(captured=False).fit
        # A batch of n takes c + n (a + b context) seconds for n tokens.
        left = 1 - tokens_per_s * (fit.a + fit.b * context / 1000)
        return tokens_per_s * fit.c / left if left > 0 else math.inf

    def mean_slice_s(self, kind: SliceKind, tokens: int, units: int) -> float:
        """Predicted seconds of a slice; 0 while the kind has no measurement."""
        cost = self.slices.get(kind)
        return 0.0 if cost is None else cost.fit.predict(tokens * units / 1000, units)

    def _alone(self, captured: bool) -> Cost:
        cost = self.steps.get((Regime.ALONE, captured))
        return self._step(Regime.ALONE, False) if cost is None or cost.seen < MEASURED else cost

    def _step(self, regime: Regime, captured: bool) -> Cost:
        cost = self.steps.get((regime, captured))
        if cost is None:
            cost = self.steps[regime, captured] = Cost(LatencyModel(STEP_PRIOR))
        return cost

    def observe_slice(self, kind: SliceKind, tokens: int, units: int, seconds: float) -> None:
        cost = self.slices.setdefault(kind, Cost(LatencyModel(SLICE_PRIOR)))
        cost.observe(tokens * units / 1000, units, seconds)

    def units_within(self, kind: SliceKind, tokens: int, seconds: float) -> int:
        """Units of a slice that take at most `seconds`; one while the kind has no measurement."""
        cost = self.slices.get(kind)
        if cost is None:
            return int(seconds >= 0)
        return max(0, cost.others_within(tokens / 1000, seconds)) if seconds > 0 else 0

    def slice_tokens_within(self, kind: SliceKind, seconds: float) -> int:
        """Rows of a pass of which a layer takes at most `seconds`; UNLIMITED while the kind has no measurement."""
        cost = self.slices.get(kind)
        if cost is None or cost.seen < MEASURED:
            return UNLIMITED
        one_s = cost.upper_bound(0.0, 1.0)
        each_s = cost.upper_bound(1.0, 1.0) - one_s
        return int(1000 * (seconds - one_s) / each_s) if each_s > 0 else UNLIMITED

    def tokens_within(self, rows: float, context: float, seconds: float) -> int:
        """Training rows, at least 0, with which a fused step takes at most `seconds`."""
        base = self.step_s(rows, context, Regime.FUSED)
        per_row = self.step_s(rows + 1, context, Regime.FUSED) - base
        return UNLIMITED if per_row <= 0 else max(0, int((seconds - base) / per_row))


def training_slack(
    now: float,
    step_s: float,
    sequences: Iterable[Sequence],
    slo: SloConfig,
    later_s: float | None = None,
    first_steps: int = 1,
) -> TrainingSlack:
    """What training may take before the next serving step, which takes step_s; and which request allows no more.

    Every sequence then gets its next token in time: the first within its own TTFT promise, after first_steps steps at
    most, later ones within its TPOT promise (slo's where it has none), both less the margin; and a sequence with a
    deadline meets it if the steps after the next one take later_s each (by default step_s). Infinite when no sequence
    has a promise.
    """
    worst, limit, request = math.inf, SlackLimit.NO_REQUEST, -1
    for sequence in sequences:
        if sequence.request.purpose is Purpose.PROBE:
            continue
        first = sequence.last_s is None
        kind, steps = (SlackLimit.FIRST_TOKEN, first_steps) if first else (SlackLimit.NEXT_TOKEN, 1)
        slack = _budget(sequence, slo) * (1 - slo.margin) - (now - _since(sequence)) - steps * step_s
        deadline = _deadline_slack(now, step_s, step_s if later_s is None else later_s, sequence, slo)
        if deadline < slack:
            slack, kind = deadline, SlackLimit.DEADLINE
        if slack < worst:
            worst, limit, request = slack, kind, sequence.request.id
    return TrainingSlack(worst, limit, request)


def _budget(sequence: Sequence, slo: SloConfig) -> float:
    if sequence.last_s is None:
        return slo.ttft_ms / 1000 if sequence.request.slo.ttft_s is None else sequence.request.slo.ttft_s
    return slo.tpot_ms / 1000 if sequence.request.slo.tpot_s is None else sequence.request.slo.tpot_s


def _since(sequence: Sequence) -> float:
    return sequence.arrived_s if sequence.last_s is None else sequence.last_s


def _deadline_slack(now: float, step_s: float, later_s: float, sequence: Sequence, slo: SloConfig) -> float:
    own = sequence.request.slo.deadline_s
    if own is None and slo.deadline_ms is None:
        return float("inf")
    deadline = slo.deadline_ms / 1000 if own is None and slo.deadline_ms is not None else own or 0.0
    left = sequence.request.sampling.max_tokens - len(sequence.output_ids)
    slack = deadline * (1 - slo.margin) - (now - sequence.arrived_s) - step_s - (left - 1) * later_s
    # A deadline that is lost anyway does not hold training back: the token promises still do.
    return slack if slack >= 0 else float("inf")
