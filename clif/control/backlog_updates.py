"""Tells the members of a round how many requests wait at the dispatcher, so that training leaves them their time."""

from __future__ import annotations

from clif.control.dispatcher import Dispatcher
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.policy.backlog_updates import LISTED, Update, interval_s, update_due
from clif.wire.messages import Backlog


class BacklogUpdates:
    """Remembers the last update of each replica. Only members of a round get any: the others do not train."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, federation: Federation) -> None:
        self._fleet, self._dispatcher, self._federation = fleet, dispatcher, federation
        self._last: dict[int, Update] = {}
        self._next_s = 0.0

    def step(self, now: float) -> None:
        """Called after each dispatch; most of the time no update is due yet."""
        if now < self._next_s:
            return
        current = self._federation.current
        members = () if current is None else current.members
        self._next_s = now + interval_s(len(members))
        if not members:
            self._last.clear()
            return
        waiting, oldest = self._dispatcher.backlog(now, len(self._fleet.serving), LISTED)
        update = Update(waiting, tuple(request.id for request in oldest), now)
        for replica in filter(self._fleet.is_alive, members):
            due, _ = update_due(now, update, self._last.get(replica))
            if due:
                self._last[replica] = update
                self._fleet.send(replica, Backlog(waiting=waiting, oldest=oldest))
