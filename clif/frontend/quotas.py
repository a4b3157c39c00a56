"""What a key may use up: token buckets on an injected clock. Free of torch.

Sources: token bucket (Turner, "New directions in communications", IEEE Communications 24(10), 1986).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clif.storage.api_keys import ApiKey

Clock = Callable[[], float]
MINUTE_S, HOUR_S = 60.0, 3600.0


class Bucket:
    """Up to `most` units at once, and as many again in each period_s. It begins full."""

    def __init__(self, most: int, period_s: float, clock: Clock) -> None:
        self.most, self._per_s, self._clock = most, most / period_s, clock
        self._level, self._at = float(most), clock()

    @property
    def level(self) -> float:
        """Units at hand; less than zero after charge() of more than there were."""
        now = self._clock()
        # A clock that goes backwards gives nothing.
        self._level = min(self._level + max(now - self._at, 0.0) * self._per_s, float(self.most))
        self._at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until so many units are at hand; 0: they are now; infinite: never."""
        if amount > self.most:
            return math.inf
        return max(amount - self.level, 0.0) / self._per_s

    def charge(self, amount: float) -> None:
        """Take units, also such as are not at hand."""
        self._level = self.level - amount

    @property
    def full_in_s(self) -> float:
        return (self.most - self.level) / self._per_s


class KeyUse:
    """What one key has used up. Buckets are None where the key has no limit."""

    def __init__(self, key: ApiKey, clock: Clock) -> None:
        self.key = key
        self.requests = _bucket(key.requests_per_minute, MINUTE_S, clock)
        self.tokens = _bucket(key.tokens_per_minute, MINUTE_S, clock)
        self.feedback = _bucket(key.feedback_per_hour, HOUR_S, clock)
        self.running = 0

    @property
    def at_most(self) -> bool:
        """Whether as many of its requests run as may."""
        return self.key.max_running is not None and self.running >= self.key.max_running

    @contextmanager
    def one_running(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """x-ratelimit-*, as OpenAI's server sends them."""
        found = []
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found += [
                    (f"x-ratelimit-limit-{name}", str(bucket.most)),
                    (f"x-ratelimit-remaining-{name}", str(max(math.floor(bucket.level), 0))),
                    (f"x-ratelimit-reset-{name}", duration(bucket.full_in_s)),
                ]
        return [(name.encode(), value.encode()) for name, value in found]


def duration(seconds: float) -> str:
    """As OpenAI writes it: 850ms, 12s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


def _bucket(most: int | None, period_s: float, clock: Clock) -> Bucket | None:
    return None if most is None else Bucket(most, period_s, clock)
