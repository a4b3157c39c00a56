"""Connections of clients: heads of bounded length, and an end for those that stall. Free of torch.

uvicorn bounds neither: a head could grow without end, and a client that sends half of one, or reads nothing of its
answer, would hold its connection for ever.
"""

from __future__ import annotations

import asyncio
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


class Connection(HttpToolsProtocol):
    """One client's connection."""

    head_since: float | None = None
    """When the head of a request began to come that is not complete; None: none comes."""
    unread: tuple[int, float] = (0, 0.0)
    """Bytes that the client had not taken when it was looked at, and when that number changed last."""
    _head_bytes = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
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
