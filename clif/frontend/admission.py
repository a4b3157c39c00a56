"""Whether the server takes more requests of clients now, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from clif.config import HttpConfig

SOONEST_S, LATEST_S = 1.0, 60.0
"""Bounds of Retry-After: clients that come at once cost more than they gain, and rates change."""


@dataclass(frozen=True)
class Load:
    """Requests of clients, and how fast they go on. first_tokens_per_s, ends_per_s: over the last ones; 0: unknown."""

    waiting: int
    running: int
    first_tokens_per_s: float = 0.0
    ends_per_s: float = 0.0


def admit(load: Load, more: int, http: HttpConfig) -> tuple[float | None, str]:
    """None: `more` requests are taken. Otherwise seconds after which they likely will be, and why not now.

    The time is that of Little's law: as many requests must begin, or end, as there are too many, each at the rate at
    which they did of late.
    """
    for count, most, rate, name in (
        (load.waiting, http.max_waiting, load.first_tokens_per_s, "max_waiting"),
        (load.running, http.max_running, load.ends_per_s, "max_running"),
    ):
        excess = count + more - most
        # More than ever fit are taken once nothing is ahead of them: otherwise they would never be.
        if excess > 0 and count > 0:
            wait_s = excess / rate if rate else SOONEST_S
            reason = f"{count} requests are ahead, and serve.http.{name} is {most}"
            return min(max(wait_s, SOONEST_S), LATEST_S), reason
    return None, ""
