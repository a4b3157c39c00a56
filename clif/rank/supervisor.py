"""Rebuilds a replica that failed: its next incarnation begins in the same process, on the same weights.

Invariants: an incarnation begins from what is on disk, as after a restart; messages sent before Welcome were addressed
to an earlier incarnation and are dropped; all ranks of a replica go from one incarnation to the next together.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable

import torch

from clif.distributed.collectives import PeersLost
from clif.distributed.topology import Topology
from clif.replica.replica import Replica
from clif.wire.channels import decode_down
from clif.wire.messages import Stop, Trouble, Up, Welcome

log = logging.getLogger(__name__)
WINDOW_S = 600.0
"""Seconds over which run.rebuilds are counted."""
Build = Callable[[int, int], Replica]


class ReplicaSupervisor:
    """The current replica. build: makes it for (incarnation, steps so far). send: to the control process.

    rebuilds: how many are allowed within WINDOW_S. on_built: called with each replica once it is built.
    """

    def __init__(
        self,
        topology: Topology,
        build: Build,
        send: Callable[[Up], None],
        rebuilds: int,
        on_built: Callable[[Replica, int], None],
    ) -> None:
        self._topology, self._build, self._send, self._on_built = topology, build, send, on_built
        self._rebuilds, self._rebuilt_s = rebuilds, list[float]()
        self.incarnation, self._welcome = 0, True
        self._replica: Replica | None = build(0, 0)
        on_built(self.replica, 0)

    @property
    def replica(self) -> Replica:
        if self._replica is None:
            raise RuntimeError("the replica could not be rebuilt")
        return self._replica

    def step(self, payloads: list[bytes] | None) -> None:
        """One step of the replica; an error that a rebuild can cure begins the next incarnation, others are raised.

        payloads: messages that the leader received; None on the other ranks.
        """
        try:
            self.replica.step(None if payloads is None else self._of_this_incarnation(payloads))
            return
        except Exception as error:
            log.exception("replica %d failed in incarnation %d", self.replica.id, self.incarnation)
            why = f"{type(error).__name__}: {error}"
            # First of all: the peers wait for this rank, and its requests wait for another replica.
            self._topology.tp_group.leave(why)
            if not self._curable(error):
                raise
        self._send(Trouble(replica=self.replica.id, error=why, returning=True))
        # Outside of the except clause: the error holds the frames of the failure, and these hold its memory.
        self._rebuild()

    def close(self) -> None:
        """Wait for pending writes of the replica."""
        if self._replica is not None:
            self._replica.close()

    def _curable(self, error: Exception) -> bool:
        """Whether a rebuild can cure this failure: one must be left, and no peer may be gone."""
        self._rebuilt_s = [at for at in self._rebuilt_s if time.monotonic() - at < WINDOW_S]
        allowed = len(self._rebuilt_s) < self._rebuilds
        return allowed and self._topology.can_rebuild_group and not isinstance(error, PeersLost)

    def _rebuild(self) -> None:
        started, former = time.monotonic(), self.replica
        self._rebuilt_s.append(started)
        self.incarnation += 1
        former.abandon()
        replica, steps = former.id, former.steps
        del former
        self._replica = None
        gc.collect()
        if self._topology.device.type == "cuda":
            torch.cuda.empty_cache()
        self._topology.rebuild_group(self.incarnation)
        self._replica = self._build(self.incarnation, steps)
        self._welcome = False
        log.warning(
            "replica %d begins incarnation %d after %.1f s", replica, self.incarnation, time.monotonic() - started
        )
        self._on_built(self.replica, self.incarnation)

    def _of_this_incarnation(self, payloads: list[bytes]) -> list[bytes]:
        """On the leader: without the messages that were sent to an earlier incarnation."""
        if self._welcome:
            return payloads
        orders = [decode_down(payload) for payload in payloads]
        for index, order in enumerate(orders):
            if isinstance(order, Welcome) and order.incarnation == self.incarnation:
                self._welcome = True
                return payloads[index + 1 :]
        return [payload for payload, order in zip(payloads, orders, strict=True) if isinstance(order, Stop)]
