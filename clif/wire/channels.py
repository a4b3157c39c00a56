"""Channels for the messages: ZeroMQ sockets and MessagePack (msgspec). Free of torch; no pickle.

The control process binds one ROUTER; each leader connects one DEALER. ZeroMQ keeps the order of a sender's
messages, reconnects, and never blocks a sender here: high-water marks are off, because a lost token event
would be a lost request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from clif.addresses import in_url
from clif.wire.messages import Down, Up

DRAIN_MS = 5000


class ControlChannel:
    """The control process's end: receives Up from all leaders, sends Down to one by its replica id."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        # An unknown peer is an error for the caller, not a silent drop.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        port = self._socket.bind_to_random_port(f"tcp://{in_url(host)}")
        self.address = f"tcp://{in_url(host)}:{port}"
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Up)

    def receive(self, timeout_s: float) -> Iterator[Up]:
        """Yield every message at hand, waiting up to timeout_s for the first.

        Raises msgspec.DecodeError at one that is none of ours; those behind it come with the next call.
        """
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                raise msgspec.DecodeError(f"a message of {len(frames)} frames; leaders send one beside their name")
            yield self._decoder.decode(frames[1])

    def send(self, replica: int, message: Down) -> bool:
        """Send to a replica's leader. False when it is not connected (any more)."""
        try:
            self._socket.send_multipart([leader_name(replica), self._encoder.encode(message)])
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def close(self) -> None:
        self._socket.close(linger=DRAIN_MS)
        self._context.term()


class LeaderChannel:
    """A replica leader's end."""

    def __init__(self, address: str, replica: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.IDENTITY, leader_name(replica))
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECTED)
        self._lost_s: float | None = None
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def lost_s(self) -> float | None:
        """Seconds since the connection broke, if it was not made again; None while it stands."""
        while self._monitor.poll(0):
            broke = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
            self._lost_s = time.monotonic() if broke else None
        return None if self._lost_s is None else time.monotonic() - self._lost_s

    def receive(self, timeout_s: float) -> list[bytes]:
        """Every encoded message at hand, waiting up to timeout_s for the first. Bytes, to be passed to TP peers."""
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return []
        received: list[bytes] = []
        while True:
            try:
                received.append(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return received

    def send(self, message: Up) -> None:
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        """Close; what was sent gets a moment to be delivered, unless the other end is gone."""
        lost = self.lost_s is not None
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0 if lost else DRAIN_MS)
        self._context.term()


def leader_name(replica: int) -> bytes:
    """ZeroMQ identity of a replica's leader."""
    return f"replica-{replica}".encode()


_DOWN = msgspec.msgpack.Decoder(Down)


def decode_down(payload: bytes) -> Down:
    """Decode a control-to-leader message. Raises msgspec.DecodeError on anything else."""
    return _DOWN.decode(payload)
