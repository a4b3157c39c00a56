"""Service pressure: how loaded serving is, from outcomes, waiting and backlog."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

from clif.config import Config


class Pressure(enum.StrEnum):
    """What a round may take: low all idle replicas, medium a share of them, high none."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True)
class ServiceWindow:
    """What happened lately. finished / met: user requests that ended in the window, and those within their SLO.

    oldest_wait_s: age of the oldest request without a first token. queued: requests at the dispatcher.
    capacity: requests that all living replicas run at the same time.
    """

    finished: int = 0
    met: int = 0
    oldest_wait_s: float = 0.0
    queued: int = 0
    capacity: int = 1


def service_pressure(now: float, window: ServiceWindow, config: Config) -> tuple[Pressure, str]:
    """The highest pressure that any of the three signs indicates; the reason names the sign.

    Waiting: a first token later than the TTFT budget is high, later than half of it medium. Backlog: more than
    the replicas can run at once is high, any queue medium. Attainment: by control.high_below / medium_below.
    """
    attainment = window.met / window.finished if window.finished else 1.0
    budget = config.slo.ttft_ms / 1000.0
    control = config.control
    counted = f"{window.met} of {window.finished} requests of the last {control.window_s:g} s met their SLO"
    signs = (
        (Pressure.HIGH, attainment < control.high_below, counted),
        (Pressure.HIGH, window.oldest_wait_s > budget, f"first token overdue: waiting {window.oldest_wait_s:.2f} s"),
        (Pressure.HIGH, window.queued > window.capacity, f"backlog of {window.queued} for {window.capacity} places"),
        (Pressure.MEDIUM, attainment < control.medium_below, counted),
        (Pressure.MEDIUM, window.oldest_wait_s > budget / 2, f"first token late: {window.oldest_wait_s:.2f} s"),
        (Pressure.MEDIUM, window.queued > 0, f"{window.queued} requests queued"),
    )
    for pressure, holds, reason in signs:
        if holds:
            return pressure, reason
    return Pressure.LOW, counted if window.finished else "nothing finished lately, nothing waits"


class OutcomeWindow:
    """Outcomes of user requests within a sliding window of seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._outcomes: deque[tuple[float, bool]] = deque()

    def add(self, now: float, met: bool) -> None:
        self._outcomes.append((now, met))

    def count(self, now: float) -> tuple[int, int]:
        """(finished, met) within the window."""
        while self._outcomes and self._outcomes[0][0] < now - self._window_s:
            self._outcomes.popleft()
        return len(self._outcomes), sum(met for _, met in self._outcomes)
