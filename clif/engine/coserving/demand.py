"""What requests ask of a replica. With it, costs say how many would run at a time if nothing trained.

Longer steps let requests pile up: with a gap of G seconds between two tokens, requests for D tokens/s form a batch of
D * G (Little's law), and a larger batch has longer steps again. So training has to know what gaps serving alone would
have, which it cannot see while it runs.

Free of torch. Sources: Little, "A Proof for the Queuing Formula L = lambda W" (1961).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HORIZON_S = 10.0
"""Time constant of what is remembered of requests."""


@dataclass(frozen=True)
class Asked:
    """tokens_per_s: answer tokens that requests ask for; prompt_tokens: of a request, on average."""

    tokens_per_s: float = 0.0
    prompt_tokens: float = 0.0


NOTHING_ASKED = Asked()


@dataclass
class Demand:
    """Requests of about the last HORIZON_S seconds. Stamps are those of the engine's clock."""

    _requests: float = 0.0
    _prompt_tokens: float = 0.0
    _max_tokens: float = 0.0
    _tokens: float = 0.0
    _ends: float = 0.0
    _seconds: float = 0.0
    _last_s: float | None = None

    def arrived(self, now: float, requests: int, prompt_tokens: int, max_tokens: int) -> None:
        """Requests have come. prompt_tokens, max_tokens: of all of them together."""
        self._forget(now)
        self._requests += requests
        self._prompt_tokens += prompt_tokens
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

    @property
    def prompt_tokens(self) -> float:
        """Of a request, on average; 0 while none is remembered."""
        return self._prompt_tokens / self._requests if self._requests else 0.0

    def _forget(self, now: float) -> None:
        passed_s, self._last_s = 0.0 if self._last_s is None else now - self._last_s, now
        kept = math.exp(-passed_s / HORIZON_S)
        self._requests *= kept
        self._prompt_tokens *= kept
        self._max_tokens *= kept
        self._tokens *= kept
        self._ends *= kept
        self._seconds = self._seconds * kept + HORIZON_S * (1 - kept)
