"""Clients that no server wishes for: they stall, leave, send garbage, too much, or with wrong keys; and honest ones.

Each is a coroutine that misbehaves once. Raw sockets, because libraries refuse to send such things.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MOST_STALLED_S = 20.0
GARBAGE = (
    b"\x00\xff\xfe\x01" * 300, b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 5000, b"POST /v1/chat/completions\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
)  # fmt: skip
BODIES = (
    b"{", b"null", b"[]", b"\xff\xfe{}", b'{"model": 3}', b"[" * 5000, b'{"messages": "\\ud83d"}', b"{}" * 1000, b"",
    b'{"model": "clif", "messages": []}', b'{"model": "no-such-model", "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "clif", "messages": [{"role": "user", "content": "a"}], "max_tokens": 999999999}',
    b'{"model": "clif", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"model": "clif", "messages": [{"role": "user", "content": "a"}], "no_such_field": 1}',
    b'{"model": "clif", "messages": [{"role": "user", "content": "a"}], "n": 100000}',
)  # fmt: skip
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/files",
    "/v1/feedback",
    "/admin/pause",
    "/tokenize",
    "/nowhere",
)


@dataclass
class Crowd:
    """All clients of a soak. key: the honest ones'. seen: what they met; failures: what must not happen."""

    url: str
    key: str
    rng: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def bad(self) -> tuple[Callable[[], Awaitable[None]], ...]:
        return (
            self.stall_reading, self.stall_sending, self.leave, self.leave_before_the_answer, self.garbage,
            self.bad_body, self.oversize, self.endless_chunks, self.bad_key, self.reset,
        )  # fmt: skip

    async def honest(self) -> None:
        """A whole answer is expected, streamed or not."""
        tokens, stream = self.rng.randint(1, 60), self.rng.random() < 0.5
        reader, writer = await self._connect()
        try:
            writer.write(self._post(self._chat(tokens, stream)))
            answer = await asyncio.wait_for(reader.read(), 120)
        except (OSError, TimeoutError) as error:
            self.failures.append(f"honest: {type(error).__name__} {error}")
            return
        finally:
            await self._close(writer)
        self.seen["honest"] += 1
        whole = b'"usage"' in answer and f'"completion_tokens":{tokens}'.encode() in answer.replace(b": ", b":")
        if not answer.startswith(b"HTTP/1.1 200") or not whole or (stream and b"data: [DONE]" not in answer):
            self.failures.append(f"honest, {tokens} tokens, stream {stream}: {answer[:150]!r} ... {answer[-250:]!r}")

    async def stall_reading(self) -> None:
        """Ask for a long stream and read nothing, with small buffers."""
        host = urlsplit(self.url)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.setblocking(False)
        with raw, suppress(OSError):
            await asyncio.get_running_loop().sock_connect(raw, (host.hostname, host.port))
            await asyncio.get_running_loop().sock_sendall(raw, self._post(self._chat(400, True)))
            await asyncio.sleep(self.rng.uniform(1, MOST_STALLED_S))

    async def stall_sending(self) -> None:
        """Send half of a request and wait."""
        whole = self._post(self._chat(5, False))
        await self._send(whole[: self.rng.randrange(1, len(whole) - 1)], self.rng.uniform(1, MOST_STALLED_S))

    async def leave(self) -> None:
        """Leave in the midst of an answer."""
        await self._send(self._post(self._chat(400, True)), self.rng.uniform(0, 1))

    async def leave_before_the_answer(self) -> None:
        await self._send(self._post(self._chat(400, False)), self.rng.uniform(0, 0.3))

    async def reset(self) -> None:
        """Leave with a reset instead of an end."""
        reader, writer = await self._connect()
        writer.write(self._post(self._chat(400, True)))
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(reader.read(200), 5)
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def garbage(self) -> None:
        await self._refused(self.rng.choice(GARBAGE), "garbage", wait_s=2)

    async def bad_body(self) -> None:
        body = self.rng.choice(BODIES)
        if self.rng.random() < 0.5:
            body = bytes(b ^ (self.rng.random() < 0.02) * self.rng.randrange(256) for b in self._chat(5, False))
        answer = await self._refused(self._post(body, self.rng.choice(PATHS)), "bad body", wait_s=30)
        if answer.startswith(b"HTTP/1.1 5"):
            self.failures.append(f"a server's error for a bad body {body[:100]!r}: {answer[:300]!r}")

    async def oversize(self) -> None:
        """A body longer than is allowed, announced or not."""
        announced = 2**40 if self.rng.random() < 0.5 else 2**24
        head = self._head("/v1/chat/completions", f"Content-Length: {announced}")
        await self._refused(head + b'{"a": "' + b"x" * 2**20, "oversize", wait_s=5, more=b"x" * 2**20, times=16)

    async def endless_chunks(self) -> None:
        head = self._head("/v1/chat/completions", "Transfer-Encoding: chunked")
        chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
        await self._refused(head, "endless chunks", wait_s=5, more=chunk, times=300)

    async def bad_key(self) -> None:
        key = self.rng.choice(["", "no-such-model", self.key[:-1], self.key + "x", "\u00e9", "x" * 5000])
        answer = await self._refused(self._post(self._chat(5, False), key=key), "bad key", wait_s=10)
        if answer.startswith(b"HTTP/1.1 200"):
            self.failures.append(f"the key {key[:20]!r} was taken")

    # --- how they do it --------------------------------------------------------------------------

    def _chat(self, tokens: int, stream: bool) -> bytes:
        body: dict[str, Any] = {
            "model": "clif", "messages": [{"role": "user", "content": f"question {self.rng.random()}"}],
            "max_tokens": tokens, "ignore_eos": True, "stream": stream,
        }  # fmt: skip
        if stream:
            body["stream_options"] = {"include_usage": True}
        return json.dumps(body).encode()

    def _head(self, path: str, more: str, key: str | None = None) -> bytes:
        lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(self.url).netloc}", "Content-Type: application/json", more]
        given = self.key if key is None else key
        return "\r\n".join([*lines, f"Authorization: Bearer {given}", "Connection: close", "", ""]).encode()

    def _post(self, body: bytes, path: str = "/v1/chat/completions", key: str | None = None) -> bytes:
        return self._head(path, f"Content-Length: {len(body)}", key) + body

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host = urlsplit(self.url)
        return await asyncio.open_connection(host.hostname, host.port, limit=2**24)

    async def _send(self, data: bytes, wait_s: float) -> None:
        """Send, read what comes for a while, and leave."""
        reader, writer = await self._connect()
        writer.write(data)
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(reader.read(2**24), wait_s)
        await self._close(writer)

    async def _refused(self, data: bytes, what: str, wait_s: float, more: bytes = b"", times: int = 0) -> bytes:
        """Send, go on sending while it is taken, and count the status of the answer."""
        reader, writer = await self._connect()
        answer = b""
        with suppress(OSError, TimeoutError):
            writer.write(data)
            for _ in range(times):
                writer.write(more)
                await asyncio.wait_for(writer.drain(), wait_s)
        with suppress(OSError, TimeoutError):
            answer = await asyncio.wait_for(reader.read(4096), wait_s)
        await self._close(writer)
        status = answer[9:12].decode(errors="replace") if answer.startswith(b"HTTP/1.1 ") else "no answer"
        self.seen[f"{what}: {status}"] += 1
        return answer

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(writer.wait_closed(), 5)
