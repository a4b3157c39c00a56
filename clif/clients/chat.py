"""A chat in the terminal with any OpenAI server. It also answers lines that are piped into it."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx

from clif.clients.endpoint import CONNECT_S, Endpoint, message_of, said
from clif.clients.stream import DONE, Events, StreamError, chunk_of
from clif.errors import InputError

SILENT_S = 300.0
"""Seconds without a byte after which an answer is given up."""
HELP = """/reset        forget the conversation
/model        the models that the server has, and the present one
/model NAME   go on with this model
/quit         end, as Ctrl-D does. Ctrl-C ends an answer."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that change the direction of what follows; not tab and line feed."""
Message = dict[str, str]


class ChatFailed(InputError):
    """The server does not answer, or with an error."""


@dataclass
class Chat:
    """A conversation. options: further fields of each request. history: messages so far, the system's first."""

    endpoint: Endpoint
    model: str
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    history: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.history[:] = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the pieces of the answer. What was answered until then stays in the history if it is left early.

        Raises ChatFailed; the question is then forgotten unless a part of the answer came.
        """
        self.history.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.history.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.history.pop()

    def _stream(self) -> Iterator[str]:
        body = {"model": self.model, "messages": self.history, "stream": True, **self.options}
        timeout = httpx.Timeout(SILENT_S, connect=CONNECT_S)
        url = f"{self.endpoint.url}/chat/completions"
        try:
            with httpx.stream("POST", url, json=body, headers=self.endpoint.headers, timeout=timeout) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise ChatFailed(message_of(answer.status_code, answer.read()))
                yield from _texts(answer)
        except httpx.HTTPError as error:
            raise ChatFailed(f"{self.endpoint.url} does not answer ({said(error)})") from error
        except StreamError as error:
            raise ChatFailed(str(error)) from error


def _texts(answer: httpx.Response) -> Iterator[str]:
    events, ended = Events(), False
    for piece in answer.iter_bytes():
        for data in events.feed(piece):
            if data == DONE:
                return
            chunk = chunk_of(data)
            ended = ended or chunk.ended
            if chunk.text:
                yield chunk.text
    if not ended:
        raise StreamError("the server has broken the connection off within the answer")


class Terminal:
    """Reads questions and commands, writes answers. piped: no terminal asks, so there is no prompt, and errors end."""

    def __init__(self, chat: Chat, source: TextIO | None = None, target: TextIO | None = None) -> None:
        self.chat = chat
        self._source, self._target = source or sys.stdin, target or sys.stdout
        self.piped = not self._source.isatty()

    def run(self) -> None:
        """Until the end of the input or /quit. Raises InputError at an error if the input is piped."""
        self._say(f"{self.chat.endpoint.url}, model {self.chat.model}. /help shows commands.")
        while (line := self._read()) is not None:
            try:
                if line.startswith("/"):
                    if not self._obey(line.split()):
                        return
                elif line:
                    self._answer(line)
            except InputError as error:
                if self.piped:
                    raise
                self._say(f"error: {error}")

    def _read(self) -> str | None:
        """The next line; None at the end. Ctrl-C at the prompt discards what was typed."""
        if self.piped:
            return line.strip() if (line := self._source.readline()) else None
        while True:
            try:
                return input("> ").strip()
            except EOFError:
                self._write("\n")
                return None
            except KeyboardInterrupt:
                self._write("\n")

    def _answer(self, question: str) -> None:
        answer = self.chat.ask(question)
        try:
            for piece in answer:
                self._write(printable(piece))
        except KeyboardInterrupt:
            # Close the connection now: that cancels the request at the server.
            with suppress(KeyboardInterrupt):
                answer.close()
            if self.piped:
                raise
            self._write(" [ended]")
        finally:
            self._write("\n")

    def _obey(self, words: list[str]) -> bool:
        """Carry a command out. False: it ends the chat."""
        match words:
            case ["/quit"] | ["/exit"]:
                return False
            case ["/reset"]:
                self.chat.reset()
                self._say("forgotten")
            case ["/model", name]:
                self.chat.model = name
                self._say(f"goes on with {name}")
            case ["/model"]:
                for name in self.chat.endpoint.models():
                    self._write(f"{'*' if name == self.chat.model else ' '} {printable(name)}\n")
            case _:
                self._write(f"{HELP}\n")
        return True

    def _say(self, line: str) -> None:
        """What is no answer: not into a pipe."""
        if not self.piped:
            self._write(f"{printable(line)}\n")

    def _write(self, text: str) -> None:
        self._target.write(text)
        self._target.flush()


def printable(text: str) -> str:
    """Without control characters, which could change the terminal or hide what was answered."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
