"""The loop of a rank: receive, step its replica, until Stop. Free of torch."""

from __future__ import annotations

from typing import Protocol

from clif.rank.control_process import Control, control_ended
from clif.rank.signals import SignalWatcher
from clif.wire.channels import LeaderChannel
from clif.wire.messages import Signalled

ALONE_S = 60.0
"""Seconds for which a rank tries to reconnect to the control process; without a connection Stop never arrives."""


class Served(Protocol):
    """A replica, as its loop sees it. stopping: it was told to leave."""

    @property
    def id(self) -> int: ...

    @property
    def stopping(self) -> bool: ...

    def wait_s(self) -> float:
        """Seconds that the next step may wait for messages."""
        ...


class Supervisor(Protocol):
    """Steps the present incarnation of a replica."""

    @property
    def replica(self) -> Served: ...

    def step(self, payloads: list[bytes] | None) -> None: ...


def serve_until_stop(
    supervisor: Supervisor, channel: LeaderChannel | None, control: Control | None, signals: SignalWatcher
) -> None:
    """Step until the replica is told to leave, or nothing can tell it any more.

    channel: of a leader; None on its peers. control: the control process where this process has started it. Raises
    what control_ended() returns when that process ends first, and RuntimeError without a connection for ALONE_S.
    """
    signalled = False
    signals.serving = True
    while not supervisor.replica.stopping:
        if signals.signal and channel is not None:
            if not signalled:
                channel.send(Signalled(replica=supervisor.replica.id, signal=signals.signal))
                signalled = True
            # Stop can no longer arrive, or is overdue.
            if channel.lost_s is not None or signals.late:
                return
        if channel is not None and (channel.lost_s or 0.0) > ALONE_S:
            raise RuntimeError(f"no connection to the control process for {ALONE_S:.0f} s")
        supervisor.step(channel.receive(supervisor.replica.wait_s()) if channel is not None else None)
        # Without a control process Stop never arrives; torchrun ends the other ranks once this one fails.
        if control is not None and not supervisor.replica.stopping and control.poll() is not None:
            raise control_ended(control)
