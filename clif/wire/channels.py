"""Channels for the messages: ZeroMQ sockets and MessagePack (msgspec). Free of torch; no pickle.

The control process binds one ROUTER; each leader connects one DEALER. ZeroMQ keeps the order of a sender's messages and
reconnects. High-water marks are off where a message would be dropped, because a lost token event would be a lost
request; the control process's own makes a sender's queue grow instead of its.

Invariant: the sender of a message is known by the key (CURVE) of its connection, and by nothing in the message. Nothing
is read from a connection without one of the run's keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

import msgspec
import zmq
from zmq.auth import Authenticator
from zmq.utils.monitor import recv_monitor_message

from clif.distributed.addresses import in_url
from clif.wire.frontend import FRONTEND, ToFrontend
from clif.wire.keys import Keys
from clif.wire.messages import Down, Up

DRAIN_MS = 5000
PART_BYTES = 2**20
"""Longer messages travel in parts. A larger part ends the connection: no peer can make this process hold it."""
OVERHEAD_BYTES = 1024
"""More than encryption adds to a part."""
HANDSHAKE_MS = 5000
QUEUE_MESSAGES = 1000
"""Messages of one sender that wait here; more wait at the sender."""
RECEIVE_MESSAGES = 512
RECEIVE_BYTES = 2**24
RECEIVE_S = 0.05
RECEIVE_STRANGERS = 512


class Channel(Protocol):
    """The control process's end of the messages, whatever carries them."""

    def receive(self, timeout_s: float) -> Iterator[tuple[int, bytes]]:
        """Yield (sender, encoded message) for what is at hand, waiting up to timeout_s for the first.

        sender: a replica, or FRONTEND.
        """
        ...

    def send(self, replica: int, message: Down | ToFrontend) -> bool:
        """Send to a replica's leader, or to FRONTEND. False when it is not connected (any more)."""
        ...

    def refused(self) -> int:
        """How many connections without a key have been refused since the last call."""
        ...


class ControlChannel:
    """A Channel over ZeroMQ: receives from all leaders and the front end, sends to one of them.

    keys, replicas: who may connect. clock: seconds.
    """

    def __init__(
        self, keys: Keys, replicas: int, host: str = "127.0.0.1", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._names = {keys.replica(r).public: r for r in range(replicas)} | {keys.frontend.public: FRONTEND}
        self._routes: dict[int, bytes] = {}
        self._connections: set[bytes] = set()
        self._context = zmq.Context()
        # Decides which connections are admitted, in this thread: there is no other one.
        self._authenticator = Authenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, PART_BYTES + OVERHEAD_BYTES)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.control.secret)
        # An unknown peer is an error for the caller, not a silent drop.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        self._refusals = self._watch_refusals()
        try:
            port = self._socket.bind_to_random_port(f"tcp://{in_url(host)}")
        except zmq.ZMQError:
            # A context that is left open would hold up whatever collects it as garbage.
            self.close()
            raise
        self.address = f"tcp://{in_url(host)}:{port}"
        self._poller = zmq.Poller()
        for socket in (self._authenticator.zap_socket, self._socket):
            self._poller.register(socket, zmq.POLLIN)
        self._encoder = msgspec.msgpack.Encoder()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a connection has one of the run's keys. Called by the authenticator."""
        return key in self._names

    def receive(self, timeout_s: float) -> Iterator[tuple[int, bytes]]:
        """Yield (sender, encoded message) for what is at hand, waiting up to timeout_s for the first.

        One call yields no more than RECEIVE_MESSAGES, RECEIVE_BYTES and RECEIVE_S allow, the caller's own time
        included; the next call yields the rest. ZeroMQ serves the senders fairly.
        """
        if not self._wait(timeout_s):
            return
        began, room = self._clock(), RECEIVE_BYTES
        for _ in range(RECEIVE_MESSAGES):
            try:
                route, *parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            # ZeroMQ knows it from the key of the connection.
            sender = self._names[str(parts[-1].get("User-Id")).encode()]
            if route.bytes not in self._connections:
                # The newest connection of a key is its owner's, even if a broken older one has left messages to read.
                self._connections.add(route.bytes)
                self._routes[sender] = route.bytes
            payload = b"".join(part.buffer for part in parts)
            room -= len(payload)
            yield sender, payload
            if room <= 0 or self._clock() - began >= RECEIVE_S:
                return

    def refused(self) -> int:
        """How many connections without a key have been refused since the last call."""
        count = 0
        while count < RECEIVE_STRANGERS and self._refusals.poll(0):
            self._refusals.recv_multipart()
            count += 1
        return count

    def send(self, replica: int, message: Down | ToFrontend) -> bool:
        """Send to a replica's leader, or to FRONTEND. False when it is not connected (any more)."""
        if replica not in self._routes:
            return False
        try:
            self._socket.send_multipart([self._routes[replica], self._encoder.encode(message)])
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def close(self) -> None:
        self._socket.disable_monitor()
        self._refusals.close(linger=0)
        self._socket.close(linger=DRAIN_MS)
        self._authenticator.stop()
        self._context.term()

    def _wait(self, timeout_s: float) -> bool:
        """Wait for a message, and admit or refuse new connections meanwhile. False: no message came."""
        deadline = self._clock() + timeout_s
        while ready := dict(self._poller.poll(max(0, int((deadline - self._clock()) * 1000)))):
            if self._authenticator.zap_socket in ready:
                # A coroutine that never waits, as callback() does not.
                with suppress(StopIteration):
                    self._authenticator.handle_zap_message(self._authenticator.zap_socket.recv_multipart()).send(None)
            if self._socket in ready:
                return True
        return False

    def _watch_refusals(self) -> zmq.Socket[bytes]:
        address = f"inproc://refused-{id(self)}"
        failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._socket.monitor(address, failures | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        watch = self._context.socket(zmq.PAIR)
        # ZeroMQ would wait for room with all connections.
        watch.setsockopt(zmq.RCVHWM, 0)
        watch.connect(address)
        return watch


class LeaderChannel:
    """A replica leader's end."""

    def __init__(self, address: str, keys: Keys, replica: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        mine = keys.replica(replica)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.control.public)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, mine.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, mine.secret)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._lost_s: float | None = None
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def lost_s(self) -> float | None:
        """Seconds since the connection broke; None while it stands, also if it was made again with the same process."""
        while self._monitor.poll(0):
            broke = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
            since = time.monotonic() if self._lost_s is None else self._lost_s
            self._lost_s = since if broke else None
        return None if self._lost_s is None else time.monotonic() - self._lost_s

    def receive(self, timeout_s: float) -> list[bytes]:
        """The encoded messages at hand, waiting up to timeout_s for the first. Bytes, to be passed to TP peers."""
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return []
        received: list[bytes] = []
        while True:
            try:
                received.append(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return received

    def send(self, message: Up) -> None:
        payload = self._encoder.encode(message)
        self._socket.send_multipart([payload[at : at + PART_BYTES] for at in range(0, len(payload), PART_BYTES)])

    def close(self) -> None:
        """Close. What was sent gets DRAIN_MS to be delivered, unless the other end is gone."""
        lost = self.lost_s is not None
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0 if lost else DRAIN_MS)
        self._context.term()


_DOWN = msgspec.msgpack.Decoder(Down)
_UP = msgspec.msgpack.Decoder(Up)


def decode_down(payload: bytes) -> Down:
    """Decode a control-to-leader message. Raises msgspec.DecodeError on anything else."""
    return _DOWN.decode(payload)


def decode_up(payload: bytes) -> Up:
    """Decode a leader-to-control message. Raises msgspec.DecodeError on anything else."""
    return _UP.decode(payload)
