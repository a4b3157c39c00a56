"""What requests ask of a replica, and how far training may stretch its steps before its batch fills up.

Longer steps let requests pile up: with a gap of G seconds between two tokens, requests for D tokens/s form a batch of
D * G (Little's law). While serving alone would hardly fill the batch, training may take all that the promises leave.
Otherwise it may stretch each step by a factor only: every gap then grows by a little, instead of many by much until
the batch is full and no slice fits until the queue is gone.

Free of torch. Sources: Little, "A Proof for the Queuing Formula L = lambda W" (1961).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HORIZON_S = 10.0
"""Time constant of what is remembered of requests."""
STRETCH = 1.45
"""A step with its slice, as a multiple of the step, while the batch is in demand."""
IN_DEMAND = 0.4
"""The batch is in demand if serving alone keeps this share of it running."""
FULL_SHARE = 0.9
"""It also is if so much of it runs or waits."""
STEEPNESS = 4
"""With less demand the stretch grows by this power of how much less it is."""


@dataclass
class Demand:
    """Requests of about the last HORIZON_S seconds. Stamps are those of the engine's clock."""

    _requests: float = 0.0
    _max_tokens: float = 0.0
    _tokens: float = 0.0
    _ends: float = 0.0
    _seconds: float = 0.0
    _last_s: float | None = None

    def arrived(self, now: float, requests: int, max_tokens: int) -> None:
        """Requests have come. max_tokens: of all of them together."""
        self._forget(now)
        self._requests += requests
        self._max_tokens += max_tokens

    def answered(self, now: float, tokens: int, ends: int) -> None:
        """Answers have got so many tokens, and so many of them are complete."""
        self._forget(now)
        self._tokens += tokens
        self._ends += ends

    def tokens_per_s(self, now: float) -> float:
        """Answer tokens that requests ask for. An answer counts as long as those were that ended, at most as long as it
        may get."""
        if not self._requests:
            return 0.0
        length = self._max_tokens / self._requests
        if self._ends >= 1:
            length = min(length, self._tokens / self._ends)
        passed_s = now - self._last_s if self._last_s is not None else 0.0
        kept = math.exp(-passed_s / HORIZON_S)
        seconds = self._seconds * kept + HORIZON_S * (1 - kept)
        # Of the first second nothing is known yet.
        return self._requests * kept * length / max(1.0, seconds)

    def _forget(self, now: float) -> None:
        passed_s, self._last_s = 0.0 if self._last_s is None else now - self._last_s, now
        kept = math.exp(-passed_s / HORIZON_S)
        self._requests *= kept
        self._max_tokens *= kept
        self._tokens *= kept
        self._ends *= kept
        self._seconds = self._seconds * kept + HORIZON_S * (1 - kept)


def stretch_of(batch_alone: float, present: int, max_batch: int) -> float:
    """A step with its training slice, at most, as a multiple of the step.

    batch_alone: requests that would run if only serving did; present: requests that run or wait.
    """
    if present >= FULL_SHARE * max_batch:
        return STRETCH
    scarce = IN_DEMAND * max_batch / max(batch_alone, 1e-3)
    return STRETCH * max(1.0, scarce) ** STEEPNESS
