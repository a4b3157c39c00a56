"""Promise 9: without a key of the run nothing is read at the control port; with one, no more in a turn than fits it."""

from __future__ import annotations

import itertools
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq

from clif.wire import channels
from clif.wire import messages as m
from clif.wire.channels import PART_BYTES, RECEIVE_MESSAGES, ControlChannel, LeaderChannel, decode_down, decode_up
from clif.wire.keys import KeyPair, Keys

KEYS = Keys(b"k" * 32)
STRANGE = KeyPair(*zmq.curve_keypair())
FORGED = m.Trouble(replica=1, error="forged")


@contextmanager
def control_port(**options: object) -> Iterator[ControlChannel]:
    control = ControlChannel(KEYS, 2, **options)  # type: ignore[arg-type]
    try:
        yield control
    finally:
        control.close()


@contextmanager
def leader_of(control: ControlChannel, replica: int) -> Iterator[LeaderChannel]:
    leader = LeaderChannel(control.address, KEYS, replica)
    try:
        yield leader
    finally:
        leader.close()


@contextmanager
def peer(control: ControlChannel, name: bytes = b"", server: bytes = b"", own: KeyPair | None = None) -> Iterator:
    """Somebody with a plain ZeroMQ socket, with CURVE if a server's key is given."""
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    if name:
        stranger.setsockopt(zmq.IDENTITY, name)
    if own is not None:
        stranger.setsockopt(zmq.CURVE_SERVERKEY, server)
        stranger.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
        stranger.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    stranger.connect(control.address)
    try:
        yield stranger
    finally:
        context.destroy(linger=0)


def hear(control: ControlChannel, count: int) -> list[tuple[int, m.Up]]:
    got: list[tuple[int, m.Up]] = []
    while len(got) < count:
        batch = [(sender, decode_up(payload)) for sender, payload in control.receive(20.0)]
        assert batch, "nothing came within twenty seconds"
        got += batch
    return got


def wait_refused(control: ControlChannel, count: int) -> None:
    for _ in range(1000):
        assert list(control.receive(0.05)) == [], "something was read from a stranger"
        count -= control.refused()
        if count <= 0:
            return
    raise AssertionError("nobody was refused")


CASES = {
    "no keys": (b"", None),
    "a key pair of its own": (STRANGE.public, STRANGE),
    "the control process's public key and a key pair of its own": (KEYS.control.public, STRANGE),
    "the keys of another start": (Keys(b"o" * 32).control.public, Keys(b"o" * 32).replica(1)),
    "the key of a replica that there is not": (KEYS.control.public, KEYS.replica(2)),
}


@pytest.mark.parametrize("server, own", CASES.values(), ids=CASES)
def test_nothing_is_read_from_whoever_has_not_the_runs_keys(server: bytes, own: KeyPair | None) -> None:
    with control_port() as control, peer(control, b"replica-1", server, own) as stranger:
        for _ in range(100):
            stranger.send(msgspec.msgpack.encode(FORGED))
        wait_refused(control, 1)
        # The stranger's connection has a leader's name. That keeps no leader out, and nothing is sent to it.
        with leader_of(control, 1) as leader:
            leader.send(m.Goodbye(replica=1))
            assert hear(control, 1) == [(1, m.Goodbye(replica=1))]
            assert control.send(1, m.Stop()) and [decode_down(x) for x in leader.receive(20.0)] == [m.Stop()]
            assert not stranger.poll(0)


def test_who_speaks_is_told_by_the_key_of_the_connection_and_not_by_its_name() -> None:
    with control_port() as control, peer(control, b"replica-0", KEYS.control.public, KEYS.replica(1)) as first:
        first.send(msgspec.msgpack.encode(m.Goodbye(replica=0)))
        assert hear(control, 1) == [(1, m.Goodbye(replica=0))]


def test_a_replica_that_connects_again_is_answered_on_its_new_connection() -> None:
    with control_port() as control, leader_of(control, 0) as old:
        old.send(m.Goodbye(replica=0))
        hear(control, 1)
        with leader_of(control, 0) as new:
            for leader in (new, old):
                # What the old one has left to be read comes after what the new one says.
                leader.send(m.Goodbye(replica=0))
                hear(control, 1)
            assert control.send(0, m.Ping())
            assert [decode_down(x) for x in new.receive(20.0)] == [m.Ping()] and not old.receive(0.0)


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x1b]0;owned\x07" * 20_000,
        b"\xff" + bytes(8) + b"\x01\x7f\x03\x00CURVE" + bytes(48) + b"\x06" + struct.pack(">Q", 2**62),
    ],
    ids=["http", "escape codes", "a frame of 2^62 bytes"],
)
def test_what_is_no_zeromq_harms_nobody(words: bytes) -> None:
    with control_port() as control:
        host, port = control.address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as stranger, leader_of(control, 0) as leader:
            stranger.sendall(words)
            leader.send(m.Goodbye(replica=0))
            assert hear(control, 1) == [(0, m.Goodbye(replica=0))]


def test_a_message_of_many_parts_arrives_whole_and_one_too_large_part_does_not_arrive() -> None:
    weights = bytes(range(256)) * (3 * PART_BYTES // 256) + b"end"
    adapter = m.Published(replica=0, version=1, round_id=1, config_json="{}", weights=weights)
    with control_port() as control, leader_of(control, 0) as leader:
        leader.send(adapter)
        leader.send(m.Goodbye(replica=0))
        assert hear(control, 2) == [(0, adapter), (0, m.Goodbye(replica=0))]
        with peer(control, b"", KEYS.control.public, KEYS.replica(1)) as liar:
            thrown_out = liar.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            liar.send(msgspec.msgpack.encode(m.Trouble(replica=1, error="x" * 2 * PART_BYTES)))
            for _ in range(1000):
                assert list(control.receive(0.02)) == []
                if thrown_out.poll(0):
                    break
            else:
                raise AssertionError("the connection stands")
            liar.disable_monitor()
            leader.send(m.Goodbye(replica=0))
            assert hear(control, 1) == [(0, m.Goodbye(replica=0))]


def flooded(control: ControlChannel, leader: LeaderChannel, messages: list[m.Up]) -> list[int]:
    """How many messages came in each turn."""
    for message in messages:
        leader.send(message)
    received: list[int] = []
    while sum(received) < len(messages):
        received.append(len(hear(control, 1)))
    return received


def test_one_turn_takes_so_many_messages_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "RECEIVE_S", 1e9)
    with control_port() as control, leader_of(control, 0) as leader:
        received = flooded(control, leader, [m.Goodbye(replica=0)] * (5 * RECEIVE_MESSAGES))
        assert max(received) <= RECEIVE_MESSAGES and len(received) >= 5


def test_one_turn_takes_so_many_bytes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "RECEIVE_BYTES", 1000)
    monkeypatch.setattr(channels, "RECEIVE_S", 1e9)
    with control_port() as control, leader_of(control, 0) as leader:
        received = flooded(control, leader, [m.Trouble(replica=0, error="x" * 600)] * 20)
        assert max(received) <= 2


def test_one_turn_takes_so_long_and_no_longer() -> None:
    clock = itertools.count(0.0, 2 * channels.RECEIVE_S)
    with control_port(clock=lambda: next(clock)) as control, leader_of(control, 0) as leader:
        received = flooded(control, leader, [m.Goodbye(replica=0)] * 20)
        assert max(received) == 1, "after each message the time of the turn is over"


CROWD = """
import resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 600))
from clif.control.__main__ import allow_connections, open_channel
from clif.wire.keys import Keys
allow_connections()
channel = open_channel("127.0.0.1", Keys(b"k" * 32), 1)
host, port = channel.address.removeprefix("tcp://").split(":")
crowd = [socket.create_connection((host, int(port))) for _ in range(200)]
while list(channel.receive(0.2)):
    pass
open("/dev/null").close()
print("files are left")
"""


def test_a_crowd_of_strangers_leaves_the_run_files_to_open() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", CROWD], capture_output=True, text=True, timeout=60)
    assert done.stdout == "files are left\n", done.stderr
