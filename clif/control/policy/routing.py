"""Which replica answers a request: the least predicted finish time among those that meet its deadline.

The decision is taken for every request, so it must not cost more where there are more replicas than it has to. What it
reads of the replicas lies in columns: one pass of numpy over a thousand replicas takes some microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Union

import numpy as np

from clif.config import Config
from clif.control.policy.view import OVERCOMMIT, ReplicaView
from clif.states import ReplicaState
from clif.types import Request

TRAINING = 1.4
"""Time of an iteration of a replica that trains, as a multiple of one that does not."""


@dataclass(frozen=True)
class Dispatch:
    """Hand the request to this replica; predicted_s: seconds from now until its last token."""

    replica: int
    predicted_s: float


@dataclass(frozen=True)
class Reject:
    """End the request: no replica can meet its deadline and slo.late says reject."""

    predicted_s: float


@dataclass(frozen=True)
class Fail:
    """End the request: no replica holds the version that it asks for, and none is to hold it."""


@dataclass(frozen=True)
class PassOver:
    """Requests behind it need not wait for it: not every replica has loaded the version that it asks for."""


Route = Union[Dispatch, Reject, Fail, PassOver]


class RoutingView:
    """What routing needs of all replicas, as columns [replicas]. Its owner alone calls update(), for what has changed.

    iteration_s: predicted seconds of an iteration with one request more; ahead: requests whose prefill is still to
    come; reserved and room: tokens that requests may fill in the KV cache, and how many that may be. expected: versions
    that all replicas are to hold.
    """

    def __init__(self, replicas: Iterable[ReplicaView] = (), count: int = 0) -> None:
        """count: how many replicas there will be; one that was never updated gets no request."""
        known = tuple(replicas)
        size = max([count, *(r.replica + 1 for r in known)])
        self.serving, self.has_slot = np.zeros(size, bool), np.zeros(size, bool)
        self.iteration_s, self.room = np.zeros(size), np.zeros(size)
        self.ahead, self.outstanding, self.reserved = (np.zeros(size, np.int64) for _ in range(3))
        self.expected: frozenset[int] = frozenset()
        self._versions: list[frozenset[int]] = [frozenset()] * size
        self._holding: dict[int, np.ndarray] = {}
        for replica in known:
            self.update(replica)

    def update(self, replica: ReplicaView) -> None:
        """Bring the row of one replica up to date."""
        row = replica.replica
        self.serving[row] = replica.serving
        self.has_slot[row] = replica.outstanding < replica.max_batch
        # Not by how long its steps were beside training: it trains most where fewest requests are, and would look slow
        # for having few.
        longer = TRAINING if replica.state is ReplicaState.COMBINED else 1.0
        self.iteration_s[row] = longer * replica.serve.predict(replica.outstanding + 1)
        # Those it holds beyond the running batch have their prefill still to come.
        self.ahead[row] = max(0, replica.outstanding - replica.running)
        self.outstanding[row], self.reserved[row] = replica.outstanding, replica.reserved
        self.room[row] = OVERCOMMIT * replica.kv_tokens
        if replica.versions is not self._versions[row]:
            self._hold(row, replica.versions)

    def _hold(self, row: int, versions: frozenset[int]) -> None:
        for version in self._versions[row] - versions:
            self._holding[version][row] = False
        for version in versions - self._versions[row]:
            self._holding.setdefault(version, np.zeros(self.serving.size, bool))[row] = True
        self._versions[row] = versions
        self._holding = {version: rows for version, rows in self._holding.items() if rows.any()}

    def holding(self, version: int | None) -> np.ndarray:
        """Serving replicas [replicas] that can answer with this version; None: with their active one."""
        if not version:
            return self.serving
        return self.serving & self._holding.get(version, np.zeros(self.serving.size, bool))

    def with_room(self, tokens: int) -> np.ndarray:
        """Replicas [replicas] on which a request that may fill so many tokens can start at once, as far as is known.

        Most answers end before their longest, and a replica that runs out of blocks preempts: so more is handed out
        than there is.
        """
        return self.serving & self.has_slot & (self.reserved + tokens <= self.room)

    def predict_s(self, request: Request, config: Config) -> np.ndarray:
        """Predicted seconds [replicas] until the last token: prefill chunks and one iteration per token."""
        chunks = math.ceil(len(request.prompt) / config.engine.max_prefill_tokens)
        return (self.ahead + (chunks + request.sampling.max_tokens)) * self.iteration_s


def choose_replica(
    now: float, request: Request, arrival_s: float, view: RoutingView, config: Config
) -> tuple[Route | None, str]:
    """Decide about the request at the head of the queue. None: it waits until a replica has room.

    Never drops: a request is dispatched, waits, or is rejected with the reason.
    """
    alive = int(np.count_nonzero(view.serving))
    if not alive:
        return None, "no replica that serves is alive"
    able = view.holding(request.version)
    if request.version and not able.any():
        if request.version in view.expected:
            return PassOver(), f"adapter version {request.version} is being loaded"
        return Fail(), f"adapter version {request.version} is not kept any more: ask for another one"
    predicted = view.predict_s(request, config)
    room = view.with_room(request.max_total_tokens) & able
    ready = int(np.count_nonzero(room))
    best = float(predicted[room if ready else able].min())
    left = math.inf if request.slo.deadline_s is None else arrival_s + request.slo.deadline_s - now
    if best > left and config.slo.late == "reject":
        return Reject(best), f"needs {best:.2f} s but its deadline is in {left:.2f} s"
    if not ready:
        holders = int(np.count_nonzero(able))
        return PassOver() if holders < alive else None, f"none of {holders} replicas has room"
    equal = np.flatnonzero(room & (predicted == best))
    replica = int(equal[view.outstanding[equal].argmin()])
    if best <= left:
        return Dispatch(replica, best), f"least predicted finish of {ready} with room"
    return Dispatch(replica, best), f"deadline in {left:.2f} s cannot be met: served late"
