"""Brings the replicas to the versions that they are to keep, and to the active one.

Invariant: whenever a replica joins, is rebuilt, or anything is chosen, it gets what it lacks, once per incarnation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.versions import Versions
from clif.types import CLIF, AdapterVersion
from clif.wire.messages import Activate, Install, Keep

log = logging.getLogger(__name__)


@dataclass
class _Orders:
    """What an incarnation of a replica was sent. keep: None before the first Keep; sent: versions that are on the way
    or there."""

    incarnation: int
    keep: tuple[int, ...] | None = None
    sent: set[int] = field(default_factory=set)


class VersionUpdates:
    """Sends Keep, Install and Activate. Replicas that have slots for nothing but the active version need no Keep."""

    def __init__(self, fleet: Fleet, federation: Federation, versions: Versions) -> None:
        self._fleet, self._federation, self._versions = fleet, federation, versions
        self._orders: dict[int, _Orders] = {}
        self._weights: dict[int, bytes | None] = {}
        self._revision = -1
        self._alive: tuple[int, ...] | None = None

    def step(self) -> None:
        """Called in each step of the server; does nothing unless versions or replicas have changed."""
        alive = self._fleet.alive
        if self._revision == self._versions.revision and self._alive is alive:
            return
        self._revision, self._alive = self._versions.revision, alive
        for replica in alive:
            self._update(replica)
        # Large, and the next change needs others.
        self._weights.clear()

    def correct(self, replica: int) -> None:
        """Make a replica that serves a stored version which is not the active one go to that one."""
        active, serves = self._versions.active(), self._fleet.version_of(replica)
        # What a round has promoted is not stored yet; what is on its way becomes active by itself.
        waits = self._federation.installing(replica) is not None or not self._versions.knows(serves)
        if serves != active and not waits and (not active or active in self._fleet.versions_of(replica)):
            self._fleet.send(replica, Activate(version=active))

    def _update(self, replica: int) -> None:
        kept, orders = self._versions.kept, self._orders_of(replica)
        alone = orders.keep is None and not self._versions.keeps_newest and set(kept) <= {self._versions.active()}
        if orders.keep != kept and not alone:
            orders.keep, orders.sent = kept, orders.sent & set(kept)
            self._fleet.send(replica, Keep(versions=kept))
        for number in kept:
            version = self._versions.get(number)
            if version is not None and self._lacks(replica, number, orders):
                self._send(replica, version, orders)
        self.correct(replica)

    def _orders_of(self, replica: int) -> _Orders:
        incarnation = self._fleet.hello_of(replica).incarnation
        orders = self._orders.get(replica)
        if orders is None or orders.incarnation != incarnation:
            orders = self._orders[replica] = _Orders(incarnation)
        return orders

    def _lacks(self, replica: int, version: int, orders: _Orders) -> bool:
        if version in self._fleet.versions_of(replica) or version in orders.sent:
            return False
        current = self._federation.current
        made_it = current is not None and replica in current.members and version == current.version
        return not made_it and version != self._federation.installing(replica)

    def _send(self, replica: int, version: AdapterVersion, orders: _Orders) -> None:
        weights = self._weights_of(version.number)
        if weights is None:
            return
        orders.sent.add(version.number)
        if version.number == self._versions.active():
            self._federation.install(replica, version, weights)
        else:
            install = Install(
                version=version.number,
                weights=weights,
                round_id=version.round_id,
                activate=False,
                adapter=version.adapter,
            )
            self._fleet.send(replica, install)

    def _weights_of(self, number: int) -> bytes | None:
        if number not in self._weights:
            try:
                self._weights[number] = self._versions.store.weights(number)
            except OSError as error:
                if number == self._versions.active(CLIF):
                    raise
                log.error("version %d cannot be read (%s): it is not kept", number, error)
                self._versions.mark_unreadable(number)
                self._weights[number] = None
        return self._weights[number]
