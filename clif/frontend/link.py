"""The front end's side of the control port: requests out, answers in, over one connection for all clients.

Invariant: a request that is sent gets exactly one end, also when the control process dies, unless it is withdrawn.
Everything runs in one event loop, and sending never waits: ZeroMQ keeps what the control process has not read.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from clif.frontend.streams import Rate, Stream, first_tokens_first
from clif.types import FinishReason, Request, TokenEvent
from clif.wire.channels import PART_BYTES
from clif.wire.frontend import (
    BEAT_S,
    Actions,
    Answers,
    Ask,
    Beat,
    Command,
    FromFrontend,
    Leave,
    Refused,
    Reply,
    Started,
    Status,
    ToFrontend,
    Withdraw,
    decode_to_frontend,
)
from clif.wire.keys import ADDRESS_FILE, Keys

GONE = "the control process ended"
AT_ONCE = 64
"""Messages that are taken before clients get their turn."""


@dataclass(frozen=True)
class Readiness:
    """Whether requests are accepted now, and why not. body: the latest status, JSON."""

    ready: bool = False
    reason: str = "the server is starting"
    body: bytes = b"{}"


class RunInfo(msgspec.Struct, frozen=True):
    """What requests are checked against. context: prompt and answer, tokens; vocabulary: ids are below it."""

    context: int = 0
    vocabulary: int = 0
    models: list[dict[str, Any]] = []


class Link:
    """The connection to the control process. first_id: of the first request that it sends.

    first_tokens, ends: how often requests begin and cease to be answered.
    """

    def __init__(self, run_dir: Path, first_id: int) -> None:
        self._context = zmq.Context()
        self._socket = connect(self._context, run_dir)
        self._encoder = msgspec.msgpack.Encoder()
        self._info = msgspec.json.Decoder(RunInfo)
        self._ids = itertools.count(first_id)
        self._commands = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._waiting: set[int] = set()
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.first_tokens, self.ends = Rate(), Rate()
        self.readiness, self.run = Readiness(), RunInfo()
        self.changed = asyncio.Event()
        """Set when readiness has changed; the task that waits for it clears it."""
        self.over = asyncio.Event()
        """Set once the control process has nothing more to send, or is gone."""

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def waiting_requests(self) -> int:
        """Requests without a first token."""
        return len(self._waiting)

    def next_id(self) -> int:
        return next(self._ids)

    def start(self) -> None:
        """Say that the front end answers, and take messages from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._readable)
        self._send(Started(pid=os.getpid()))

    def ask(self, requests: Sequence[Request], model: str, key: str = "") -> Stream:
        """Send requests, whose ids are of next_id(). The caller calls withdraw() when it needs the stream no longer."""
        stream = Stream(request.id for request in requests)
        for request in requests:
            # First: one that cannot be sent would be counted as open for ever.
            self._send(Ask(request=request, model=model, key=key))
            self._streams[request.id] = stream
            self._waiting.add(request.id)
        if self.over.is_set():
            stream.stop(Refused("not_ready", GONE))
        return stream

    def withdraw(self, stream: Stream, reason: str) -> None:
        """Cancel the requests of a stream that have not ended. It gets no further event."""
        for request_id in stream.ids:
            if self._streams.pop(request_id, None) is not None and not self.over.is_set():
                self._send(Withdraw(request_id=request_id, reason=reason))
            self._waiting.discard(request_id)

    async def command(self, action: Actions, key: str = "") -> bytes:
        """Ask for an action; returns the reply, JSON. Raises Refused."""
        if self.over.is_set():
            raise Refused("not_ready", GONE)
        number = next(self._commands)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        self._send(Command(id=number, action=action, key=key))
        try:
            return await reply
        finally:
            del self._replies[number]

    async def receive(self) -> None:
        """Return when the control process tells the front end to leave, or is gone. Raises what reading raised."""
        parent = os.getppid()
        while not self.over.is_set():
            try:
                await asyncio.wait_for(self.over.wait(), BEAT_S)
            except TimeoutError:
                if os.getppid() != parent:
                    self._end()
                else:
                    self._send(Beat())
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        assert self._loop is not None, "it was started"
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=1000)
        self._context.term()

    def _send(self, message: FromFrontend) -> None:
        payload = self._encoder.encode(message)
        parts = [payload[at : at + PART_BYTES] for at in range(0, len(payload), PART_BYTES)]
        self._socket.send_multipart(parts, zmq.NOBLOCK)
        if self._loop is not None and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            # ZeroMQ signals a message once: sending may have taken the signal.
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        """Take the messages that have come."""
        if self._socket.closed or self.over.is_set():
            return
        try:
            for _ in range(AT_ONCE):
                self._take(decode_to_frontend(self._socket.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return
        except (msgspec.DecodeError, UnicodeDecodeError, zmq.ZMQError) as error:
            self._failure = error
            self._end()
            return
        assert self._loop is not None
        self._loop.call_soon(self._readable)

    def _take(self, message: ToFrontend) -> None:
        match message:
            case Answers():
                self._deliver(message)
            case Reply():
                self._reply(message)
            case Status():
                self.readiness = Readiness(message.ready, message.reason, message.body)
                self.run = self._info.decode(message.body)
                self.changed.set()
            case Leave():
                self._end()

    def _deliver(self, answers: Answers) -> None:
        assert self._loop is not None
        now = self._loop.time()
        for request_id in answers.restarted:
            if stream := self._streams.get(request_id):
                stream.restart(request_id)
        for event in first_tokens_first(answers.events, self._waiting):
            if stream := self._streams.get(event.request_id):
                self._note(now, event)
                stream.put(event)
        for refusal in answers.refused:
            if stream := self._streams.pop(refusal.request_id, None):
                self._waiting.discard(refusal.request_id)
                problem = refusal.problem
                stream.stop(Refused(problem.kind, problem.message, problem.param))

    def _note(self, now: float, event: TokenEvent) -> None:
        if event.request_id in self._waiting:
            self._waiting.discard(event.request_id)
            self.first_tokens.note(now)
        if event.finish is not None:
            del self._streams[event.request_id]
            self.ends.note(now)

    def _reply(self, reply: Reply) -> None:
        waiting = self._replies.get(reply.id)
        if waiting is None or waiting.done():
            return
        if reply.problem is not None:
            problem = reply.problem
            waiting.set_exception(Refused(problem.kind, problem.message, problem.param))
        else:
            waiting.set_result(reply.body)

    def _end(self) -> None:
        """Nothing more will come: end all that waits."""
        self.readiness = Readiness(False, GONE, self.readiness.body)
        for request_id, stream in self._streams.items():
            stream.put(TokenEvent(request_id=request_id, finish=FinishReason.FAILED, detail=GONE))
        self._streams.clear()
        self._waiting.clear()
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(Refused("not_ready", GONE))
        self.changed.set()
        self.over.set()


def connect(context: zmq.Context[zmq.Socket[bytes]], run_dir: Path) -> zmq.Socket[bytes]:
    """To the control process, with the front end's key."""
    keys, address = Keys.read(run_dir), (run_dir / ADDRESS_FILE).read_text()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.control.public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.frontend.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.frontend.secret)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    socket.connect(address)
    return socket
