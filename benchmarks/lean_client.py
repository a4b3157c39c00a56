"""An HTTP client that only stamps the pieces that come in; they are taken apart after the measurement."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

END = b"\r\n0\r\n\r\n"


@dataclass
class Exchange:
    """A request and what came back. sent_s: when it was written. error: of the connection."""

    number: int
    sent_s: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""

    @property
    def status(self) -> int:
        head = b"".join(piece for _, piece in self.pieces[:20])[:20]
        return int(head.split(b" ")[1]) if head.startswith(b"HTTP/1.1 ") else 0

    def events(self) -> list[tuple[float, Any]]:
        """The events of the answer and the time of the piece that completed each; `[DONE]` is left out."""
        raw = b"".join(piece for _, piece in self.pieces)
        ends = list(itertools.accumulate(len(piece) for _, piece in self.pieces))
        found = []
        rest = b""
        for end, payload in _chunks(raw, raw.index(b"\r\n\r\n") + 4):
            *whole, rest = (rest + payload).replace(b"\r\n", b"\n").split(b"\n\n")
            stamp = self.pieces[min(bisect_left(ends, end), len(ends) - 1)][0]
            found += [(stamp, event[6:]) for event in whole if event.startswith(b"data: ")]
        return [(stamp, json.loads(data)) for stamp, data in found if data != b"[DONE]"]

    def token_stamps(self) -> list[float]:
        """Stamps of the events with text."""
        return [stamp for stamp, event in self.events() if has_text(event)]


def has_text(event: Any) -> bool:
    return any(choice.get("delta", {}).get("content") for choice in event.get("choices", ()))


def _chunks(raw: bytes, at: int) -> Any:
    """The chunks of a body: (offset of the end in raw, payload)."""
    while True:
        line_end = raw.find(b"\r\n", at)
        size = int(raw[at:line_end] or b"0", 16) if line_end > 0 else 0
        if not size:
            return
        yield line_end + 2 + size, raw[line_end + 2 : line_end + 2 + size]
        at = line_end + 2 + size + 2


def _is_whole(pieces: list[tuple[float, bytes]]) -> bool:
    """Whether an answer with a length is complete: errors have one."""
    if b"chunked" in pieces[0][1]:
        return False
    head, _, body = b"".join(piece for _, piece in pieces).partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return length is not None and len(body) >= int(length[1])


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[None] | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self._exchange is not None:
            self._exchange.pieces.append((now, data))
            # The end may come in a piece of its own, and a head may end like it: "max=100", of another's server.
            self._tail = (self._tail + data)[-len(END) :]
            whole = self._tail == END or _is_whole(self._exchange.pieces)
            if whole and self._ended is not None and not self._ended.done():
                self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._exchange is not None and self._ended is not None and not self._ended.done():
            self._exchange.error = f"connection lost: {error}"
            self._ended.set_result(None)

    async def ask(self, exchange: Exchange, request: bytes) -> Exchange:
        """Send a request and wait for the end of its answer, which must be chunked."""
        assert self._transport is not None
        self._tail = b""
        self._exchange, self._ended = exchange, asyncio.get_running_loop().create_future()
        exchange.sent_s = time.monotonic()
        self._transport.write(request)
        await self._ended
        return exchange

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    _, protocol = await asyncio.get_running_loop().create_connection(Connection, parts.hostname, parts.port)
    return protocol


def chat_request(url: str, number: int, max_tokens: int, model: str = "clif", **more: Any) -> bytes:
    """The bytes of a streamed chat completion. number: its seed, by which the engine's stamps are found."""
    body = {
        "model": model, "messages": [{"role": "user", "content": f"question {number} of a benchmark"}],
        "max_tokens": max_tokens, "stream": True, "seed": number, "temperature": 0, "ignore_eos": True, **more,
    }  # fmt: skip
    data = json.dumps(body).encode()
    host = urlsplit(url).netloc
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
