"""What a request may cost before its route sees it: pure ASGI, so that nothing of a stream is held back. Free of torch.

Counted are bytes that came, not those that a header announces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from clif.config import HttpConfig
from clif.frontend.auth import OPEN, SCOPE, Access, Caller, take
from clif.frontend.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
MIB = 2**20
FILES = "/v1/files"
FORM_BYTES = 2**16
"""Of an upload beside the file."""
COME_AGAIN_S = 1.0
"""When one of the key's requests may have ended."""
MOST_BODIES = 64
"""As many bytes as so many of the longest bodies have are held at a time, of all clients."""


class Guard:
    """Middleware: the caller, its quotas, and the length and pace of bodies."""

    def __init__(self, app: App, access: Access, http: HttpConfig) -> None:
        self._app, self._access, self._http = app, access, http
        self._held = Held(MOST_BODIES * http.max_body_mib * MIB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = self._access.caller(scope)
            admit(caller, scope)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        scope[SCOPE] = caller
        held = Held(self._http.max_file_mib * MIB + FORM_BYTES) if uploads(scope) else self._held
        body = Body(receive, most_bytes(scope, self._http), self._http.stall_s, held)
        with caller.use.one_running() if scope["method"] == "POST" else nullcontext():
            try:
                await self._app(scope, body.receive, body.releasing(with_quota(send, caller)))
            finally:
                body.release()


def admit(caller: Caller, scope: Scope) -> None:
    """Count a request. Raises ApiError when the key's quota is used up."""
    if scope["path"] in OPEN:
        return
    if scope["method"] == "POST" and caller.use.at_most:
        message = f"{caller.use.running} requests of the key {caller.name} run already, as many as may"
        raise ApiError(429, message, code="too_many_running", retry_after_s=COME_AGAIN_S)
    take(caller.use.requests, 1, f"requests of the key {caller.name} in a minute")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = error.response()
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)


def uploads(scope: Scope) -> bool:
    """Whether the body is a file, which goes to the disk."""
    return bool(scope["path"] == FILES and scope["method"] == "POST")


def most_bytes(scope: Scope, http: HttpConfig) -> int:
    """Of this request's body."""
    if uploads(scope):
        return http.max_file_mib * MIB + FORM_BYTES
    return http.max_body_mib * MIB


@dataclass
class Held:
    """Bytes of bodies that are held; most: that may be."""

    most: int
    now: int = 0


class Body:
    """Receives the body of one request. Raises ApiError when it is too long, when no byte comes for stall_s, or when
    too much is held of all bodies.
    """

    def __init__(self, receive: Receive, most: int, stall_s: float, held: Held) -> None:
        self._receive, self._most, self._stall_s, self._held = receive, most, stall_s, held
        self._holds = 0
        self._bytes = 0
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:
            # What comes now is that the client leaves, however late.
            return await self._receive()
        try:
            async with asyncio.timeout(self._stall_s):
                message = await self._receive()
        except TimeoutError:
            self._whole = True
            reason = f"no byte of the body came for {self._stall_s:g} s (serve.http.stall_s)"
            raise ApiError(408, reason, code="stalled") from None
        if message["type"] != "http.request":
            return message
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._most:
            self._whole = True
            raise ApiError(413, f"the body exceeds {self._most / MIB:g} MiB", code="body_too_long")
        self._hold(len(message.get("body", b"")))
        return message

    def _hold(self, size: int) -> None:
        self._holds += size
        self._held.now += size
        if self._held.now > self._held.most:
            self._whole = True
            reason = "too many long requests come at the same time"
            raise ApiError(503, reason, code="overloaded", retry_after_s=COME_AGAIN_S)

    def release(self) -> None:
        """The body is not in memory any more."""
        self._held.now -= self._holds
        self._holds = 0

    def releasing(self, send: Send) -> Send:
        """Release it once the answer begins: a stream may last for long."""

        async def sending(message: Message) -> None:
            if self._holds:
                self.release()
            await send(message)

        return sending


def with_quota(send: Send, caller: Caller) -> Send:
    """Adds what is left of the key's quota to the headers of the answer."""
    if caller.use.requests is None and caller.use.tokens is None:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *caller.use.headers]}
        await send(message)

    return sending
