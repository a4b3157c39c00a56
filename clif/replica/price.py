"""What the next piece of work will take, learnt from the engine's own ticks; and whether training may take it.

Free of torch. Training only gets what serving leaves (promise 5): may_train is asked before every slice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from clif.config import SloConfig
from clif.latency import LatencyModel
from clif.replica.scheduler import Sequence
from clif.types import Purpose


@dataclass
class Rate:
    """Running mean and mean absolute deviation of a rate. smoothing: weight of the newest observation."""

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
    def high(self) -> float:
        """What is rarely exceeded: the mean itself would be, half the time."""
        return self.mean + 2 * self.deviation


@dataclass
class Prices:
    """Predicted seconds of serving ticks and of training slices."""

    ticks: LatencyModel = field(default_factory=LatencyModel)
    """Seconds of a tick from its rows and from the cached tokens that they read, in thousands."""
    slices: dict[str, Rate] = field(default_factory=dict)
    """Seconds per token and layer, by kind of slice."""

    def observe_slice(self, kind: str, work: float, seconds: float) -> None:
        self.slices.setdefault(kind, Rate()).observe(seconds / max(work, 1.0))

    def slice_s(self, kind: str, work: float) -> float:
        """0 for a kind that was never run: the first one has to be tried."""
        rate = self.slices.get(kind)
        return 0.0 if rate is None else rate.high * max(work, 1.0)

    def observe_tick(self, rows: float, context: float, seconds: float) -> None:
        self.ticks.observe(rows, context / 1000, seconds)

    def tick_s(self, rows: float, context: float) -> float:
        return self.ticks.predict(rows, context / 1000)


def may_train(
    now: float, slice_s: float, tick_s: float, sequences: Iterable[Sequence], slo: SloConfig
) -> tuple[bool, str]:
    """May a slice of slice_s seconds run before the next serving tick of tick_s seconds?

    Only if every sequence still gets its next token in time: the first within its own TTFT promise, later ones
    within its TPOT promise (slo's where it has none), both less the margin. Returns (yes or no, the reason).
    """
    worst, reason = float("inf"), "nobody waits"
    for sequence in sequences:
        if sequence.request.purpose is Purpose.PROBE:
            continue
        first = sequence.last_s is None
        promised = sequence.request.slo.ttft_s if first else sequence.request.slo.tpot_s
        budget = ((slo.ttft_ms if first else slo.tpot_ms) / 1000 if promised is None else promised) * (1 - slo.margin)
        since = sequence.arrived_s if sequence.last_s is None else sequence.last_s
        slack = budget - (now - since) - tick_s - slice_s
        if slack < worst:
            kind = "first token" if first else "next token"
            worst, reason = slack, f"{kind} of request {sequence.request.id} has {slack * 1000:.0f} ms of slack"
    return worst >= 0, reason
