"""A clock that moves from event to event: discrete-event simulation. Free of torch.

Invariant: events run in the order of their times, and events of the same time in the order in which they were planned.
So a simulation is reproducible if it reads no other clock and no unseeded random numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class VirtualTime:
    """The present time and the planned events. Called without arguments it is a clock: seconds."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s
        self._events: list[tuple[float, int, Action]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self._now

    def at(self, time_s: float, action: Action) -> None:
        """Plan an action. Raises ValueError for a time in the past."""
        if time_s < self._now:
            raise ValueError(f"an action is planned for {time_s:g} s, and it is {self._now:g} s already")
        heapq.heappush(self._events, (time_s, next(self._numbers), action))

    def after(self, delay_s: float, action: Action) -> None:
        """Plan an action in delay_s seconds."""
        self.at(self._now + delay_s, action)

    def advance(self, until_s: float) -> bool:
        """Advance to the next event up to until_s and run it. False if there is none: the time is then until_s."""
        if self._events and self._events[0][0] <= until_s:
            self._now, _, action = heapq.heappop(self._events)
            action()
            return True
        self._now = max(self._now, until_s)
        return False
