"""A small ASGI server that speaks OpenAI's streams, well or badly as the model's name asks. For tests of clients."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

WORDS = ("one", " two", " three", " four")
MODELS = ("good", "other")


@dataclass
class OpenAiServer:
    """An ASGI application. seen: bodies of requests. gone: how many clients left before the end of their answer.
    delay_s, waits_for: an answer begins after this time, and once so many requests have been open at a time.

    Models: `good`; `no-usage`; `http503`; `stalls` after a word; `breaks` the connection after a word; `cut`: ends the
    response without a last event; `error-event`; `garbage`: an event that is no JSON; `split`: bytes come one by one.
    """

    url: str = ""
    key: str | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    open_now: int = 0
    most_open: int = 0
    delay_s: float = 0.0
    waits_for: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.key is not None and given != f"Bearer {self.key}":
            await self._json(send, 401, {"error": {"message": "no such key", "type": "authentication_error"}})
        elif scope["path"] == "/v1/models":
            await self._json(send, 200, {"object": "list", "data": [{"id": name} for name in MODELS]})
        elif scope["path"] == "/v1/chat/completions":
            self.seen.append(json.loads(body))
            await self._chat(send, receive, self.seen[-1])
        else:
            await self._json(send, 404, {"error": {"message": "no such route"}})

    async def _json(self, send: Any, status: int, tree: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(tree).encode()})

    async def _chat(self, send: Any, receive: Any, asked: dict[str, Any]) -> None:
        model = asked["model"]
        if model == "http503":
            await self._json(send, 503, {"error": {"message": "come back later", "type": "overloaded"}})
            return
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            await asyncio.sleep(self.delay_s)
            while self.most_open < self.waits_for:
                await asyncio.sleep(0.01)
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._events(send, receive, model, asked)
        finally:
            self.open_now -= 1

    async def _events(self, send: Any, receive: Any, model: str, asked: dict[str, Any]) -> None:
        async def event(data: str, more: bool = True) -> None:
            raw = f"data: {data}\n\n".encode()
            pieces = [raw[i : i + 1] for i in range(len(raw))] if model == "split" else [raw]
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if not more:
                await send({"type": "http.response.body", "body": b""})

        await send({"type": "http.response.body", "body": b": a comment\n\n", "more_body": True})
        await event(chunk({"role": "assistant"}))
        for number, word in enumerate(WORDS):
            if number == 1 and await self._misbehaves(event, receive, send, model):
                return
            await event(chunk({"content": word}))
        await event(chunk({}, "stop"))
        if model != "no-usage" and asked.get("stream_options", {}).get("include_usage"):
            await event(json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}))
        await event("[DONE]", more=False)

    async def _misbehaves(self, event: Any, receive: Any, send: Any, model: str) -> bool:
        """After the first word: whether the answer is over."""
        if model == "stalls":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone += 1
            return True
        if model == "breaks":
            raise ConnectionResetError
        if model == "cut":
            await send({"type": "http.response.body", "body": b""})
            return True
        if model == "error-event":
            await event(json.dumps({"error": {"message": "the engine is gone"}}), more=False)
            return True
        if model == "garbage":
            await event("{", more=False)
            return True
        return False


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"object": "chat.completion.chunk", "model": "good", "choices": [choice]})


@contextmanager
def running(server: OpenAiServer) -> Iterator[OpenAiServer]:
    """The server on a free port of this host, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = uvicorn.Config(server, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    runner = uvicorn.Server(settings)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join()
