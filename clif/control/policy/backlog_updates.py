"""Which replicas are told now what waits at the dispatcher: those that train, and only as often as it helps them."""

from __future__ import annotations

from dataclasses import dataclass

INTERVAL_S = 0.05
"""The least time between two updates of a replica."""
REFRESH_S = 1.0
"""What has not changed is sent again after this time: a replica does not trust what it heard long ago. Also where its
batch has room: when it is full, the replica must know."""
MOST_PER_S = 2000.0
"""Updates a second of all replicas together, at most: with very many of them each gets fewer."""
LISTED = 32
"""Requests that an update lists, at most."""


@dataclass(frozen=True)
class Update:
    """What a replica is told: how many requests wait, and the ids of those listed. at_s: control's clock."""

    waiting: int = 0
    ids: tuple[int, ...] = ()
    at_s: float = 0.0

    def equals(self, other: Update) -> bool:
        return (self.waiting, self.ids) == (other.waiting, other.ids)


def update_due(now: float, update: Update, last: Update | None) -> tuple[bool, str]:
    """Whether a replica that trains gets the update. last: what it got last; None: nothing."""
    if last is None or not update.equals(last):
        return True, "the backlog has changed"
    if now - last.at_s >= REFRESH_S:
        return True, f"sent {now - last.at_s:.1f} s ago"
    return False, "nothing has changed"


def interval_s(replicas: int) -> float:
    """Seconds between two updates of so many replicas."""
    return max(INTERVAL_S, replicas / MOST_PER_S)
