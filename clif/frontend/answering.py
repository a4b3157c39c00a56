"""Answers a call: as one JSON object, or as a stream of server-sent events. One task of the event loop per call.

Headers go out with the first event, so that the status of a call is that of its outcome, and the version that answers
is known. A wait that proxies would not endure is the exception: then they go out with a comment. A client that leaves,
or stops to read, cancels its requests at once.

A response of its own, and not sse-starlette's: that one starts four tasks for each stream and cannot wait for the first
event, which is most of the work for a short answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request as Call
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from clif import __version__
from clif.config import HttpConfig
from clif.frontend.asking import Asked, check_room
from clif.frontend.auth import caller_of
from clif.frontend.choices import Choices, Piece
from clif.frontend.errors import ApiError, of_problem
from clif.frontend.link import Link
from clif.frontend.recent_answers import RecentAnswers
from clif.frontend.streams import ClientLeft, Stream, joined
from clif.tokenizer import ChatTokenizer
from clif.wire.frontend import Refused

KEEP_ALIVE_S = 10.0
"""A stream without an event for up to twice as long gets a comment: proxies end connections on which nothing is sent
for 30 s."""
KEEP_ALIVE = b": keep-alive\n\n"
EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # A proxy (nginx) passes events on at once.
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
JSON = (b"content-type", b"application/json")
VERSION_HEADER = b"x-clif-version"


class Form(Protocol):
    """The form of an answer in one of the protocols. Its methods return encoded JSON, or encoded events."""

    def whole(self, choices: Choices) -> bytes: ...

    def events(self, choices: Choices, pieces: list[Piece]) -> bytes:
        """May be empty. The first call opens the stream, with no piece if need be."""
        ...

    def end(self, choices: Choices) -> bytes: ...

    def error(self, error: ApiError) -> bytes: ...


@dataclass(frozen=True)
class Serving:
    """What all calls are answered with."""

    http: HttpConfig
    link: Link
    tokenizer: ChatTokenizer
    recent: RecentAnswers | None = None


class Answer(Response):
    """The answer to one call, once its requests are made. streams: as events."""

    def __init__(self, serving: Serving, asked: Asked, form: Form, streams: bool) -> None:
        self.background = None
        self._http, self._link = serving.http, serving.link
        self._asked, self._form, self._streams = asked, form, streams
        self._choices = Choices(asked, serving.tokenizer)
        self._recent = serving.recent
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError or Refused before anything is sent."""
        loop, caller = asyncio.get_running_loop(), caller_of(Call(scope))
        check_room(loop.time(), self._link, self._http, caller, self._asked)
        stream = self._link.ask(self._asked.requests, self._asked.model, self._asked.key)
        watching = loop.create_task(watch(receive, stream))
        late = ApiError(
            504, f"no whole answer within {self._http.timeout_s:g} s (serve.http.timeout_s)", code="timeout"
        )
        timer = loop.call_later(self._http.timeout_s, stream.stop, late)
        reason = "the answer was not needed any more"
        try:
            await (self._stream(stream, send) if self._streams else self._whole(stream, send))
        except ClientLeft as left:
            reason = str(left)
        except ApiError as error:
            reason = error.message
            raise
        finally:
            timer.cancel()
            watching.cancel()
            self._link.withdraw(stream, reason)
            caller.charge_answer(self._choices.answer_tokens)
            if self._recent is not None:
                self._recent.remember(self._choices, self._asked.key)

    async def _whole(self, stream: Stream, send: Send) -> None:
        self._choices.take(joined(await stream.whole()))
        body = self._form.whole(self._choices)
        headers = [JSON, (b"content-length", str(len(body)).encode()), self._version]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, stream: Stream, send: Send) -> None:
        loop = asyncio.get_running_loop()

        def nudge() -> None:
            self._nudges = loop.call_later(KEEP_ALIVE_S, nudge)
            stream.nudge()

        self._nudges = loop.call_later(KEEP_ALIVE_S, nudge)
        try:
            while not self._choices.ended:
                await self._send_batch(stream, send)
            await self._send(send, self._form.end(self._choices), more=False)
        except Refused as refused:
            await self._fail(send, of_problem(refused.problem))
        except ApiError as error:
            await self._fail(send, error)
        finally:
            self._nudges.cancel()

    async def _send_batch(self, stream: Stream, send: Send) -> None:
        items = await stream.batch()
        if not items:
            await self._send(send, KEEP_ALIVE)
            return
        pieces = self._choices.take(items)
        chunk = self._form.events(self._choices, pieces)
        if chunk:
            for piece in pieces:
                piece.choice.shown = True
            await self._send(send, chunk)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        """Wait while the client reads slowly. The connection of one that does not read is ended elsewhere."""
        if not self._started:
            self._started = True
            headers = [*EVENTS, *([self._version] if self._choices.answer_tokens else [])]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, send: Send, error: ApiError) -> None:
        """An error after the status was sent is the last event."""
        if not self._started:
            raise error
        await self._send(send, self._form.error(error), more=False)

    @property
    def _version(self) -> tuple[bytes, bytes]:
        return VERSION_HEADER, str(self._choices.version).encode()


async def watch(receive: Receive, stream: Stream) -> None:
    """Stop the stream when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.stop(ClientLeft("the client left"))


def model_name(asked: str, version: int) -> str:
    """Of the version that answers, as a client may name it."""
    return f"{asked.partition('@')[0]}@v{version:04d}" if version else "base"


def fingerprint(version: int) -> str:
    """What answers are computed with: equal ones, with a seed, are reproducible."""
    return f"clif-{__version__}-v{version:04d}"


def usage(choices: Choices, names: tuple[str, str] = ("prompt_tokens", "completion_tokens")) -> dict[str, Any]:
    """names: of prompt and answer, in the client's protocol."""
    prompt, answer = choices.prompt_tokens, choices.answer_tokens
    return {names[0]: prompt, names[1]: answer, "total_tokens": prompt + answer}


def usage_field(choices: Choices, included: bool, so_far: bool) -> dict[str, Any]:
    """What an event of a stream says of usage: nothing, that its end will, or what it was so far."""
    if not included:
        return {}
    return {"usage": usage(choices) if so_far else None}


def events(data: Iterable[bytes]) -> bytes:
    """Server-sent events without names, of encoded JSON."""
    return b"".join(b"data: " + one + b"\n\n" for one in data)
