"""States and their allowed transitions, as data. Free of torch.

Invariant: states change only through advance(), which refuses transitions that TRANSITIONS does not list.
"""

from __future__ import annotations

import enum
from typing import TypeVar


class ReplicaState(enum.StrEnum):
    """SERVING only serves; IDLE has slack and may be asked to train; COMBINED serves and trains.

    FAILED is lost; it returns once it was rebuilt.
    """

    SERVING = "serving"
    IDLE = "idle"
    COMBINED = "combined"
    FAILED = "failed"


class RequestState(enum.StrEnum):
    """Life of a request as the dispatcher sees it."""

    QUEUED = "queued"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    FINISHED = "finished"


class RoundState(enum.StrEnum):
    """Life of a federated round as the coordinator sees it."""

    TRAINING = "training"
    AGGREGATING = "aggregating"
    SETTLING = "settling"
    COMMITTED = "committed"
    DISCARDED = "discarded"


S = TypeVar("S", ReplicaState, RequestState, RoundState)

TRANSITIONS: dict[enum.Enum, frozenset[enum.Enum]] = {
    ReplicaState.SERVING: frozenset({ReplicaState.IDLE, ReplicaState.FAILED}),
    ReplicaState.IDLE: frozenset({ReplicaState.SERVING, ReplicaState.COMBINED, ReplicaState.FAILED}),
    ReplicaState.COMBINED: frozenset({ReplicaState.SERVING, ReplicaState.IDLE, ReplicaState.FAILED}),
    ReplicaState.FAILED: frozenset({ReplicaState.SERVING}),
    # Back to QUEUED: its replica was lost.
    RequestState.QUEUED: frozenset({RequestState.DISPATCHED, RequestState.FINISHED}),
    RequestState.DISPATCHED: frozenset({RequestState.RUNNING, RequestState.QUEUED, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.QUEUED, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
    RoundState.TRAINING: frozenset({RoundState.AGGREGATING, RoundState.DISCARDED}),
    RoundState.AGGREGATING: frozenset({RoundState.SETTLING, RoundState.DISCARDED}),
    RoundState.SETTLING: frozenset({RoundState.COMMITTED, RoundState.DISCARDED}),
    RoundState.COMMITTED: frozenset(),
    RoundState.DISCARDED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A requested transition is not listed in TRANSITIONS."""


def advance(current: S, target: S) -> S:
    """Return target if current may become it; raise IllegalTransition otherwise."""
    if target not in TRANSITIONS[current]:
        allowed = ", ".join(sorted(t.value for t in TRANSITIONS[current])) or "nothing"
        raise IllegalTransition(f"{type(current).__name__} {current.value} may become {allowed}, not {target.value}")
    return target
