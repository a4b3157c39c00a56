"""Failed replicas: their requests move to other replicas, and they may come back.

A replica that meets an error reports whether it rebuilds itself. A replica that was declared lost and reports again
must rebuild: its requests were reassigned. A replica that is not back in time is given up.
"""

from __future__ import annotations

import logging

from clif.config import Config
from clif.control.dispatcher import Dispatcher
from clif.control.durability.shutdown import ShutdownPolicy
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.policy.phases import Phase
from clif.control.quality import QualityCheck
from clif.control.run_state import RunState
from clif.states import ReplicaState
from clif.wire.messages import Hello, Rebuild, Stop, Trouble

log = logging.getLogger(__name__)


class FailureHandler:
    """Marks replicas as failed and takes them back."""

    def __init__(
        self,
        config: Config,
        state: RunState,
        fleet: Fleet,
        dispatcher: Dispatcher,
        federation: Federation,
        quality: QualityCheck,
        shutdown: ShutdownPolicy,
    ) -> None:
        self._config, self._state, self._fleet = config, state, fleet
        self._dispatcher, self._federation = dispatcher, federation
        self._quality, self._shutdown = quality, shutdown
        self._due: dict[int, float] = {}
        self._ignored: set[int] = set()

    @property
    def returning(self) -> tuple[int, ...]:
        """Replicas that are being rebuilt."""
        return tuple(sorted(self._due))

    @property
    def reachable(self) -> tuple[int, ...]:
        """Replicas that are alive or being rebuilt."""
        return (*self._fleet.alive, *self.returning)

    @property
    def all_silent_limit_s(self) -> float:
        """How long a silence of all replicas is tolerated, seconds; 0 if the launcher restarts the ranks sooner."""
        return 0.0 if self._shutdown.restarts_left else self._config.dist.timeout_s

    @property
    def serving(self) -> int:
        """How many replicas can answer requests, now or when they are rebuilt."""
        return len(self._fleet.serving) + sum(map(self._fleet.serves, self._due))

    def on_trouble(self, now: float, message: Trouble) -> None:
        if message.returning:
            self._expect(now, message.replica)
        else:
            self._due.pop(message.replica, None)
        self.mark_failed(now, message.replica, message.error, message.gone)

    def mark_left(self, now: float, replica: int) -> None:
        """The replica said goodbye before Stop was sent."""
        self._due.pop(replica, None)
        self.mark_failed(now, replica, "it left")

    def mark_failed(self, now: float, replica: int, reason: str, gone: bool = False) -> None:
        """Mark a replica as failed. gone: its process has ended.

        The state changes first, so that nothing that follows sends to it. Raises ControlError when the launcher is to
        restart all ranks, which loses less than to continue without the replica.
        """
        if gone:
            self._due.pop(replica, None)
        if not self._fleet.is_alive(replica):
            return
        log.error("replica %d is lost: %s", replica, reason)
        if replica not in self._due:
            self._shutdown.request_restart(self._state.phase, replica, reason, gone)
        self._fleet.set_state(now, replica, ReplicaState.FAILED, reason)
        self._dispatcher.requeue(now, replica, reason)
        self._federation.on_lost(now, replica, reason)
        self._quality.on_lost(replica)

    def on_message_from_failed(self, now: float, replica: int) -> None:
        """A failed replica, or one that never joined, sent something: its requests were reassigned."""
        if replica in self._due or replica in self._ignored:
            return
        if not self._fleet.was_here(replica):
            log.warning("replica %d speaks without a valid Hello: ignored", replica)
            self._ignored.add(replica)
        elif self._config.run.rebuilds and self._state.phase is not Phase.STOPPING:
            log.warning("replica %d speaks again after it was lost: it is to begin anew", replica)
            self._fleet.send(replica, Rebuild(reason="it was silent, and others have its requests"))
            self._expect(now, replica)
        else:
            log.warning("replica %d speaks again after it was lost: told to stop", replica)
            self._fleet.send(replica, Stop())
            self._ignored.add(replica)

    def mark_broken(self, now: float, replica: int, why: str) -> None:
        """The replica sent something impossible, so nothing of it can be trusted: it rebuilds or leaves."""
        if replica in self._due or replica in self._ignored:
            return
        again = bool(self._config.run.rebuilds) and self._state.phase is not Phase.STOPPING
        if again:
            self._expect(now, replica)
        else:
            self._ignored.add(replica)
        if self._fleet.is_alive(replica):
            self.mark_failed(now, replica, f"broken: {why}")
        else:
            log.error("replica %d is broken: %s", replica, why)
        self._fleet.send(replica, Rebuild(reason=why) if again else Stop())

    def join(self, now: float, hello: Hello) -> None:
        """Take in a replica that joins or returns."""
        if hello.replica in self._ignored and self._fleet.was_here(hello.replica):
            return
        if not self._fleet.join(now, hello):
            self.mark_broken(now, hello.replica, f"it says Hello again in incarnation {hello.incarnation}")
            return
        if self._due.pop(hello.replica, None) is not None:
            log.info("replica %d is back, incarnation %d", hello.replica, hello.incarnation)
        # An earlier Stop may have been dropped with the incarnation that failed.
        if self._state.phase is Phase.STOPPING:
            self._fleet.send(hello.replica, Stop())

    def step(self, now: float) -> None:
        """Give up replicas whose rebuild is overdue. Raises ControlError as mark_failed() does."""
        for replica in [r for r, due in self._due.items() if now > due]:
            del self._due[replica]
            reason = f"not rebuilt within {self._config.dist.timeout_s:g} s"
            log.error("replica %d is given up: %s", replica, reason)
            self._shutdown.request_restart(self._state.phase, replica, reason, gone=False)

    def _expect(self, now: float, replica: int) -> None:
        """Await the replica: its ranks have as long to meet again as for any collective."""
        self._due[replica] = now + self._config.dist.timeout_s
