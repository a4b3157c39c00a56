"""The events of a streamed answer (SSE), from the pieces in which its bytes come."""

from __future__ import annotations

import re
from typing import Any

import msgspec

DONE = b"[DONE]"
LONGEST = 2**24
"""Bytes of one event; more is no answer."""
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")


class StreamError(ValueError):
    """The stream is no answer of an OpenAI server, or one that reports an error."""


class Events:
    """Cuts a stream of bytes into the data of its events. Comments and events without data are left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that are complete with this piece. Raises StreamError for an event without end."""
        *whole, self._rest = _END.split(self._rest + piece)
        if len(self._rest) > LONGEST:
            raise StreamError(f"an event of more than {LONGEST} bytes")
        return [data for event in whole if (data := _data(event))]


def _data(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return event[6:]
    lines = (line for line in _LINE.split(event) if line.startswith(b"data:"))
    return b"\n".join(line.removeprefix(b"data:").removeprefix(b" ") for line in lines)


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta = msgspec.field(default_factory=Delta)
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """One event of a chat completion. error: of a server that reports one within the stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    model: str = ""
    error: Any = None

    @property
    def text(self) -> str:
        """What the event adds to the answer, thoughts included."""
        return "".join((c.delta.reasoning_content or "") + (c.delta.content or "") for c in self.choices)

    @property
    def ended(self) -> bool:
        return any(choice.finish_reason for choice in self.choices)


_CHUNK = msgspec.json.Decoder(Chunk)


def chunk_of(data: bytes) -> Chunk:
    """The event's content. Raises StreamError if it is none of a chat completion, or reports an error."""
    try:
        chunk = _CHUNK.decode(data)
    except msgspec.DecodeError as error:
        raise StreamError(f"an event that is no chat completion ({error})") from error
    if chunk.error is not None:
        message = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
        raise StreamError(f"the server ends the answer: {message}")
    return chunk
