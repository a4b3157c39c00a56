"""The front end's side of the control port: requests out, answers in, over one connection for all clients.

Invariant: a request that is sent gets exactly one end, also when the control process dies, unless it is withdrawn.
Everything runs in one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from clif.types import FinishReason, Request, TokenEvent
from clif.wire.channels import PART_BYTES
from clif.wire.frontend import (
    Actions,
    Answers,
    Ask,
    Command,
    FromFrontend,
    Leave,
    Problem,
    Refused,
    Reply,
    Started,
    Status,
    ToFrontend,
    Withdraw,
    decode_to_frontend,
)
from clif.wire.keys import ADDRESS_FILE, Keys

RESTARTED = TokenEvent(request_id=0)
"""Marks that an answer begins again: what came before it does not count."""
GONE = "the control process ended"


@dataclass(frozen=True)
class Readiness:
    """Whether requests are accepted now, and why not. body: the latest status, JSON."""

    ready: bool = False
    reason: str = "the server is starting"
    body: bytes = b"{}"


class Stream:
    """The events of one request, in order. Ends with the event that has a finish reason."""

    def __init__(self) -> None:
        self._events: deque[TokenEvent] = deque()
        self._problem: Problem | None = None
        self._wake = asyncio.Event()
        self.ended = False

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self.ended = self.ended or event.finish is not None
        self._wake.set()

    def refuse(self, problem: Problem) -> None:
        self._problem, self.ended = problem, True
        self._wake.set()

    async def batch(self) -> list[TokenEvent]:
        """The events that have come since the last call, one at least. Raises Refused; RESTARTED is among them."""
        while not self._events and self._problem is None:
            self._wake.clear()
            await self._wake.wait()
        if self._problem is not None:
            raise Refused(self._problem.kind, self._problem.message, self._problem.param)
        events = [*self._events]
        self._events.clear()
        return events


class Link:
    """The connection to the control process. first_id: of the first request that it sends."""

    def __init__(self, run_dir: Path, first_id: int) -> None:
        keys = Keys.read(run_dir)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.control.public)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.frontend.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.frontend.secret)
        address = (run_dir / ADDRESS_FILE).read_text()
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._ids = itertools.count(first_id)
        self._commands = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self.readiness = Readiness()
        self.changed = asyncio.Event()
        """Set when readiness has changed; the task that waits for it clears it."""
        self.over = asyncio.Event()
        """Set once the control process has nothing more to send, or is gone."""

    @property
    def open_requests(self) -> int:
        return len(self._streams)

    def next_id(self) -> int:
        return next(self._ids)

    async def start(self) -> None:
        await self._send(Started(pid=os.getpid()))

    async def ask(self, request: Request, model: str, key: str = "") -> Stream:
        """Send a request, whose id is of next_id(). The caller calls withdraw() when it needs the stream no longer."""
        stream = self._streams[request.id] = Stream()
        await self._send(Ask(request=request, model=model, key=key))
        return stream

    async def withdraw(self, request_id: int, reason: str) -> None:
        """Cancel a request unless it has ended. Its stream gets no further event."""
        stream = self._streams.pop(request_id, None)
        if stream is not None and not stream.ended:
            await self._send(Withdraw(request_id=request_id, reason=reason))

    async def command(self, action: Actions, key: str = "") -> bytes:
        """Ask for an action; returns the reply, JSON. Raises Refused."""
        number = next(self._commands)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        await self._send(Command(id=number, action=action, key=key))
        try:
            return await reply
        finally:
            del self._replies[number]

    async def receive(self) -> None:
        """Take messages until the control process tells the front end to leave, or is gone."""
        parent = os.getppid()
        while not self.over.is_set():
            if await self._socket.poll(1000):
                while True:
                    try:
                        payload = await self._socket.recv(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    self._take(decode_to_frontend(payload))
            elif os.getppid() != parent:
                self._end()

    def close(self) -> None:
        self._socket.close(linger=1000)
        self._context.term()

    async def _send(self, message: FromFrontend) -> None:
        payload = self._encoder.encode(message)
        await self._socket.send_multipart([payload[at : at + PART_BYTES] for at in range(0, len(payload), PART_BYTES)])

    def _take(self, message: ToFrontend) -> None:
        match message:
            case Answers():
                self._deliver(message)
            case Reply():
                self._reply(message)
            case Status():
                self.readiness = Readiness(message.ready, message.reason, message.body)
                self.changed.set()
            case Leave():
                self._end()

    def _deliver(self, answers: Answers) -> None:
        for request_id in answers.restarted:
            if stream := self._streams.get(request_id):
                stream.put(RESTARTED)
        for event in answers.events:
            if stream := self._streams.get(event.request_id):
                stream.put(event)
        for refusal in answers.refused:
            if stream := self._streams.get(refusal.request_id):
                stream.refuse(refusal.problem)

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
            if not stream.ended:
                stream.put(TokenEvent(request_id=request_id, finish=FinishReason.FAILED, detail=GONE))
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(Refused("not_ready", GONE))
        self.changed.set()
        self.over.set()


async def events_of(stream: Stream) -> AsyncIterator[TokenEvent]:
    """The events of a stream, one by one, up to its end. Raises Refused."""
    while True:
        for event in await stream.batch():
            yield event
            if event.finish is not None:
                return
