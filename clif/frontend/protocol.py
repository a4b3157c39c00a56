"""Connections of clients: so many, with heads of bounded length, and an end for those that stall. Free of torch.

uvicorn bounds none of it: a head could grow without end, and a client that sends half of one, or reads nothing of its
answer, would hold its connection for ever.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from clif.frontend.errors import ApiError

HEAD_BYTES = 2**15
"""Of the request line and all headers."""
CHECKS = 8
"""How often a connection is looked at in the time after which it counts as stalled."""
LINGER_S = 5.0
"""A client whose answer is complete before its request has so long to read it."""
SPARE = 512
"""Connections beside those of requests: idle ones, operators, uploads."""


def most_connections(max_running: int) -> int:
    """How many connections may be open. Raises this process's limit of descriptors for it, as far as that may be."""
    wanted = max_running + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * wanted:
        soft = 2 * wanted if hard == resource.RLIM_INFINITY else min(2 * wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # The other half is for uploads, each of which is a file too, and for the process itself.
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, soft // 2)


class Connection(HttpToolsProtocol):
    """One client's connection. most: that may be open."""

    most: int | None = None

    head_since: float | None = None
    """When the head of a request began to come that is not complete; None: none comes."""
    unread: tuple[int, float] = (0, 0.0)
    """Bytes that the client had not taken when it was looked at, and when that number changed last."""
    idle_since = 0.0
    """When it was opened, or its last answer was complete."""
    _head_bytes = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head_since = self.idle_since = time.monotonic()
        if self.most is not None and len(self.connections) > self.most:
            self._make_room()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _make_room(self) -> None:
        """Close the connection that has been idle for longest; if none is, this one."""
        connections: set[Any] = self.connections
        idle = [other for other in connections if other is not self and other.idle]
        if idle:
            min(idle, key=lambda other: other.idle_since).transport.close()
        else:
            self.refuse(ApiError(503, f"{self.most} connections are open, as many as may", code="overloaded"))

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded: the request is answered as it stands.
            pass
        except httptools.HttpParserError:
            self.refuse(ApiError(400, "this is not HTTP"))
        if self.head_since is not None and self._head_bytes > HEAD_BYTES:
            self.refuse(_too_long())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # Not with any byte: one that begins no request must not keep the connection.
        self._unset_keepalive_if_required()
        self._head_bytes, self.head_since = 0, time.monotonic()

    def on_headers_complete(self) -> None:
        self.head_since = None
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self.refuse(_too_long())
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since = time.monotonic()
        if self.timeout_keep_alive_task is not None and self.cycle.more_body:
            # Closed at once, it would lose an answer that the client reads only after it has sent all.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(LINGER_S, self.timeout_keep_alive_handler)

    def refuse(self, error: ApiError) -> None:
        """Answer a request that no route sees, unless an answer is under way, and close the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if self.cycle is None or self.cycle.response_complete:
            fields = {"content-type": "application/json", "content-length": str(len(error.body)), "connection": "close"}
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + error.body)
        self.transport.close()

    def check(self, now: float, stall_s: float) -> None:
        """End a connection that has stalled."""
        size = self.transport.get_write_buffer_size()
        if not size or size != self.unread[0]:
            self.unread = size, now
        elif now - self.unread[1] >= stall_s:
            # Also one that is closed: it would wait until the client takes the rest.
            self.transport.abort()
        if self.head_since is not None and now - self.head_since >= stall_s:
            self.refuse(ApiError(408, f"no whole request came within {stall_s:g} s (serve.http.stall_s)"))


async def end_stalled(connections: Iterable[Any], stall_s: float) -> None:
    """Look at the connections until it is cancelled."""
    while True:
        await asyncio.sleep(stall_s / CHECKS)
        now = time.monotonic()
        for connection in [*connections]:
            connection.check(now, stall_s)


def _too_long() -> ApiError:
    return ApiError(431, f"the request line and the headers exceed {HEAD_BYTES // 1024} KiB")
