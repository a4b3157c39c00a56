"""All replicas as the control process knows them, and the only place where their states change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from clif.config import Config
from clif.control.dispatcher import Send
from clif.control.policy.routing import RoutingView
from clif.control.policy.view import ClusterView, ReplicaTracker, ReplicaView
from clif.distributed.roles import role_of
from clif.states import ReplicaState, advance
from clif.wire.messages import Hello, Limits, Report, Welcome

OnTransition = Callable[[int, ReplicaState, ReplicaState, str], None]


class Loads(Protocol):
    """What the dispatcher knows of the replicas' loads."""

    def load_of(self, replica: int) -> tuple[int, int]:
        """(requests at the replica that have not ended, tokens that they may fill in its KV cache)."""
        ...

    def take_changed(self) -> set[int]:
        """Replicas whose load has changed since the last call."""
        ...


KNOWN_AFTER = 32
"""Measured serving steps, those of an answer or two, after which the latency of a replica is known."""
BREAK = 0.05
"""Part of control.lost_after_s: the most that a break between two messages, of any replicas, counts as silence."""


@dataclass(frozen=True)
class Tally:
    """Sums over all replicas. Of those that are alive, as they said last: running: requests in their batches; kv_used,
    kv_tokens: tokens in their caches, and the room.
    """

    states: Mapping[str, int]
    running: int = 0
    kv_used: int = 0
    kv_tokens: int = 0


class Fleet:
    """Trackers by replica id. expected: how many replicas the run has. send: a message to one of them.

    Every change of what routing reads of a replica is noted in _changed, and routing_view() takes in what changed.
    """

    def __init__(self, config: Config, replicas: int, send: Send, loads: Loads, on_transition: OnTransition) -> None:
        self._config = config
        self.send = send
        self._loads = loads
        self._on_transition = on_transition
        self.expected = replicas
        self._trackers: dict[int, ReplicaTracker] = {}
        # Known until a state changes: they are asked for in every step of the loop.
        self._alive: tuple[int, ...] | None = None
        self._serving: tuple[int, ...] | None = None
        self._held_by_all: frozenset[int] | None = None
        self._spoken_s, self._heard_s = 0.0, 0.0
        self._routing, self._changed = RoutingView(count=replicas), set[int]()
        self._drained: dict[int, str] = {}

    @property
    def missing(self) -> tuple[int, ...]:
        """Replicas that have not said Hello."""
        if len(self._trackers) == self.expected:
            return ()
        return tuple(r for r in range(self.expected) if r not in self._trackers)

    @property
    def alive(self) -> tuple[int, ...]:
        if self._alive is None:
            self._alive = tuple(r for r in sorted(self._trackers) if self.is_alive(r))
        return self._alive

    @property
    def serving(self) -> tuple[int, ...]:
        """Replicas that are alive and answer requests."""
        if self._serving is None:
            self._serving = tuple(r for r in self.alive if self._trackers[r].role.serves)
        return self._serving

    @property
    def latency_known(self) -> bool:
        """Whether serving was measured often enough on the replicas that are alive and may also train.

        That is: on at least one of them, and on each that has requests. Under light load one replica may get all of
        them. The measure is their number and not the confidence: on a busy host measurements scatter all the time.
        """
        both = [r for r in self.alive if self._trackers[r].role.serves and self._trackers[r].role.trains]
        known = [r for r in both if self._trackers[r].serve.seen >= KNOWN_AFTER]
        return not both or (bool(known) and all(r in known or self._loads.load_of(r)[0] == 0 for r in both))

    @property
    def hellos(self) -> tuple[Hello, ...]:
        return tuple(self._trackers[r].hello for r in sorted(self._trackers))

    def hello_of(self, replica: int) -> Hello:
        return self._trackers[replica].hello

    def version_of(self, replica: int) -> int:
        """The version that the replica answers new requests with."""
        return self._trackers[replica].version

    def newest_of(self, replica: int) -> int:
        """The newest version that the replica ever answered with in this incarnation."""
        return self._trackers[replica].newest_version

    def versions_of(self, replica: int) -> frozenset[int]:
        """Versions that requests may ask the replica for, besides the base."""
        return self._trackers[replica].versions

    def held_by_any(self, version: int) -> bool:
        """Whether a serving replica holds a version."""
        return version in self.held_by_all or any(version in self.versions_of(r) for r in self.serving)

    def expect(self, versions: Iterable[int]) -> None:
        """All replicas are to hold these versions: a request for one of them waits until a replica does."""
        self._routing.expected = frozenset(versions)

    @property
    def held_by_all(self) -> frozenset[int]:
        """Versions that every serving replica holds, besides the base."""
        if self._held_by_all is None:
            held = [self.versions_of(r) for r in self.serving]
            self._held_by_all = frozenset.intersection(*held) if held else frozenset()
        return self._held_by_all

    def is_alive(self, replica: int) -> bool:
        tracker = self._trackers.get(replica)
        return tracker is not None and tracker.state is not ReplicaState.FAILED

    def was_here(self, replica: int) -> bool:
        """Whether the replica ever joined, alive or not now."""
        return replica in self._trackers

    def serves(self, replica: int) -> bool:
        """Whether the replica answers requests while it is alive."""
        return self._trackers[replica].role.serves

    def join(self, now: float, hello: Hello) -> bool:
        """Take in a leader, also of a failed replica that was rebuilt. False: a Hello was not due."""
        former = self._trackers.get(hello.replica)
        if former is not None:
            return self._return(now, former, hello)
        role = role_of(hello.replica, self.expected, self._config.run)
        self._trackers[hello.replica] = ReplicaTracker(now, hello, self._config, role)
        self._alive = self._serving = self._held_by_all = None
        self._changed.add(hello.replica)
        self.on_message(now, hello.replica)
        who = f"rank {hello.rank}, process {hello.pid} on {hello.host}, {hello.dtype}, loaded in {hello.load_s:.1f} s"
        self._on_transition(hello.replica, ReplicaState.SERVING, ReplicaState.SERVING, f"joined: {who}")
        return True

    def _return(self, now: float, former: ReplicaTracker, hello: Hello) -> bool:
        if former.state is not ReplicaState.FAILED or hello.incarnation <= former.hello.incarnation:
            return False
        self._trackers[hello.replica] = former.rebuilt(now, hello)
        self.on_message(now, hello.replica)
        # The first message to the new incarnation.
        self.send(hello.replica, Welcome(incarnation=hello.incarnation))
        self.set_state(now, hello.replica, ReplicaState.SERVING, f"rebuilt, incarnation {hello.incarnation}")
        return True

    def on_message(self, now: float, replica: int) -> None:
        """Any message is a sign of life. A break in which all replicas were silent says nothing about a single one."""
        control = self._config.control
        self._spoken_s += min(now - self._heard_s, max(BREAK * control.lost_after_s, 2 * control.report_s))
        self._heard_s = now
        self._trackers[replica].last_seen = now
        self._trackers[replica].spoken_before_s = self._spoken_s

    def report(self, now: float, report: Report) -> None:
        self._changed.add(report.replica)
        self._trackers[report.replica].observe(now, report, self._loads.load_of(report.replica)[0])

    def installed(self, replica: int, version: int) -> None:
        """The replica answers new requests with this version from now on."""
        self._trackers[replica].switched(version)

    def holds(self, replica: int, versions: Iterable[int]) -> None:
        """Requests may ask the replica for exactly these versions from now on, besides the base."""
        self._trackers[replica].versions = frozenset(versions)
        self._changed.add(replica)
        self._held_by_all = None

    def set_state(self, now: float, replica: int, state: ReplicaState, reason: str) -> None:
        """Change a state. Raises IllegalTransition for what the table does not list."""
        tracker = self._trackers[replica]
        before, tracker.state = tracker.state, advance(tracker.state, state)
        if ReplicaState.FAILED in (before, state):
            self._alive = self._serving = self._held_by_all = None
        tracker.state_since = now
        self._changed.add(replica)
        if state is ReplicaState.COMBINED:
            tracker.rounds_joined += 1
        self._on_transition(replica, before, state, reason)

    def set_limits(self, replica: int, max_batch: int | None = None, micro_batch: int | None = None) -> bool:
        """Set the batch bounds (None: as configured) and send them; False if nothing changes."""
        tracker = self._trackers[replica]
        wanted = (max_batch or tracker.hello.max_batch, micro_batch or self._config.train.micro_batch)
        if wanted == (tracker.max_batch, tracker.micro_batch):
            return False
        tracker.max_batch, tracker.micro_batch = wanted
        self._changed.add(replica)
        self.send(replica, Limits(max_batch=wanted[0], micro_batch=wanted[1]))
        return True

    def refit(self) -> None:
        self._changed |= {replica for replica, tracker in self._trackers.items() if tracker.refit()}

    def view_of(self, replica: int) -> ReplicaView:
        drained = self._drained.get(replica, "")
        return self._trackers[replica].view(*self._loads.load_of(replica), self._spoken_s, drained)

    @property
    def drained(self) -> Mapping[int, str]:
        """Replicas that get no request and join no round, with the reasons. Those that are rebuilt stay drained."""
        return self._drained

    def drain(self, replica: int, reason: str) -> None:
        """No request goes to the replica from now on, and it joins no round; what it has begun goes on."""
        self._drained[replica] = reason
        self._changed.add(replica)

    def undrain(self, replica: int) -> None:
        self._drained.pop(replica, None)
        self._changed.add(replica)

    def tally(self) -> Tally:
        """Costs far less than the views of all replicas."""
        states: Counter[str] = Counter()
        running = used = room = 0
        for tracker in self._trackers.values():
            states[tracker.state.value] += 1
            if tracker.state is not ReplicaState.FAILED:
                if tracker.report is not None:
                    running += tracker.report.running
                    used += tracker.report.kv_used
                room += tracker.hello.kv_tokens
        return Tally(states, running, used, room)

    def routing_view(self) -> RoutingView:
        """What routing needs of all replicas at this moment. Costs what has changed since the last call."""
        changed, self._changed = self._changed | self._loads.take_changed(), set()
        for replica in changed & self._trackers.keys():
            self._routing.update(self.view_of(replica))
        return self._routing

    def view(self, queued: int) -> ClusterView:
        """Everything at this moment; all replicas must have joined."""
        return ClusterView(tuple(self.view_of(r) for r in range(self.expected)), queued)
