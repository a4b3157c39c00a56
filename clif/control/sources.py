"""Where requests come from. A run may have several sources, and the control server asks each of them. Free of torch.

A source keeps what is to come and when; the dispatcher keeps what has come.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from clif.data.load import ScheduledRequest
from clif.types import Request


@dataclass(frozen=True)
class DueRequest:
    """A request that has come. at_s: seconds from the start of the load; arrival_s: stamp of the server's clock."""

    request: Request
    at_s: float
    arrival_s: float


class Source(Protocol):
    """Gives requests to the control server while the phase OPEN lasts. The time is an argument of every call."""

    @property
    def exhausted(self) -> bool:
        """Whether no further request will ever come. OPEN ends when every source is exhausted, or by a drain."""
        ...

    @property
    def remaining(self) -> int:
        """Requests that are known to come; 0 also for a source that cannot know."""
        ...

    def open(self, opened_s: float) -> None:
        """Requests may come from now on. opened_s: stamp at which the load's own time is 0."""
        ...

    def due(self, now: float) -> Sequence[DueRequest]:
        """The requests that have come since the last call, in order of arrival. Each is given once."""
        ...

    def wait_s(self, now: float) -> float:
        """Seconds until due() has something to give, as far as the source knows; inf if it does not."""
        ...


class TraceSource:
    """The load of a run: requests whose times are known before it begins, in order of arrival."""

    def __init__(self, load: Sequence[ScheduledRequest]) -> None:
        self._load = deque(load)
        self._opened_s = math.inf

    @property
    def exhausted(self) -> bool:
        return not self._load

    @property
    def remaining(self) -> int:
        return len(self._load)

    def open(self, opened_s: float) -> None:
        self._opened_s = opened_s

    def due(self, now: float) -> Sequence[DueRequest]:
        """The planned time counts as arrival, so that a late loop cannot flatter the latencies."""
        found: list[DueRequest] = []
        while self._load and self._opened_s + self._load[0].at_s <= now:
            next_ = self._load.popleft()
            found.append(DueRequest(next_.request, next_.at_s, self._opened_s + next_.at_s))
        return found

    def wait_s(self, now: float) -> float:
        return max(0.0, self._opened_s + self._load[0].at_s - now) if self._load else math.inf
