"""The channel of the control server in virtual time: replicas are objects in this process. Free of torch and sockets.

Every message is encoded and decoded as on the wire, so that a message that cannot be sent fails here, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from clif.simulate.virtual_time import VirtualTime
from clif.wire.channels import RECEIVE_MESSAGES, decode_down
from clif.wire.frontend import FRONTEND, FromFrontend, ToFrontend, decode_to_frontend
from clif.wire.messages import Down, Up

OnMessage = Callable[[Any], None]
"""Gets a decoded message: a Down, or a ToFrontend on the front end's line."""
LATENCY_S = 0.0001


class SimLine:
    """The side of a replica's leader or of the front end. It is open until it is closed or its owner connects again."""

    def __init__(self, channel: SimChannel, replica: int, on_message: OnMessage) -> None:
        self.replica, self.on_message = replica, on_message
        self._channel = channel

    def send(self, message: Up | FromFrontend) -> None:
        self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, payload: bytes) -> None:
        """Send bytes that may not be a valid message."""
        self._channel.carry_up(self.replica, payload)

    def close(self) -> None:
        """The replica's process is gone: no message reaches it. Its own messages still arrive."""
        self._channel.disconnect(self)


class SimChannel:
    """A Channel with virtual waiting: receive() advances the time to the next event instead of sleeping.

    latency_s: seconds that a message is under way. Messages of one sender arrive in the order in which they were sent.
    """

    def __init__(self, time: VirtualTime, latency_s: float = LATENCY_S) -> None:
        self._time, self._latency_s = time, latency_s
        self._arrived: deque[tuple[int, bytes]] = deque()
        self._lines: dict[int, SimLine] = {}

    def connect(self, replica: int, on_message: OnMessage) -> SimLine:
        """Connect a replica; on_message is called when a message reaches it."""
        self._lines[replica] = SimLine(self, replica, on_message)
        return self._lines[replica]

    def disconnect(self, line: SimLine) -> None:
        if self._lines.get(line.replica) is line:
            del self._lines[line.replica]

    def carry_up(self, replica: int, payload: bytes) -> None:
        self._time.after(self._latency_s, lambda: self._arrived.append((replica, payload)))

    def receive(self, timeout_s: float) -> Iterator[tuple[int, bytes]]:
        """Yield arrived messages, RECEIVE_MESSAGES at most; time passes until one arrives or timeout_s is over."""
        deadline = self._time() + timeout_s
        while not self._arrived and self._time.advance(deadline):
            pass
        while self._time.advance(self._time()):
            pass
        for _ in range(min(len(self._arrived), RECEIVE_MESSAGES)):
            yield self._arrived.popleft()

    def send(self, replica: int, message: Down | ToFrontend) -> bool:
        """Send to a replica, or to FRONTEND. False if it is not connected."""
        line = self._lines.get(replica)
        if line is None:
            return False
        payload = msgspec.msgpack.encode(message)
        self._time.after(self._latency_s, lambda: self._deliver(line, payload))
        return True

    def refused(self) -> int:
        return 0

    def _deliver(self, line: SimLine, payload: bytes) -> None:
        """Deliver a message; one to a process that is gone is lost."""
        if self._lines.get(line.replica) is line:
            line.on_message(decode_to_frontend(payload) if line.replica == FRONTEND else decode_down(payload))
