"""The answers to the requests of one call, as they grow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from clif.frontend.asking import Asked
from clif.frontend.errors import ApiError
from clif.frontend.link import GONE
from clif.frontend.streams import Item, Restarted
from clif.text_stream import TextStream
from clif.tokenizer import ChatTokenizer
from clif.types import FinishReason, Request, TokenEvent, TokenLogprob

ENDS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""Reasons of an answer's end. The others are errors."""


@dataclass(frozen=True)
class Piece:
    """What an event adds to a choice. finish: set in its last piece."""

    choice: Choice
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None


@dataclass
class Choice:
    """One answer. index: among all of the call. shown: whether the client has been sent any of it.

    prompt_logprobs: of the prompt's tokens after the first, if they were asked for.
    """

    index: int
    request: Request
    text: TextStream
    version: int = 0
    tokens: int = 0
    finish: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    shown: bool = False
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def take(self, event: TokenEvent, eos_ids: tuple[int, ...]) -> Piece:
        """Raises ApiError for an end that is no answer."""
        if event.finish is not None:
            self.finish = ENDS.get(event.finish)
            if self.finish is None:
                raise failure(event)
        if event.tokens:
            self.version = event.version
            self.tokens += len(event.tokens)
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        logprobs = event.logprobs
        if logprobs and not self.request.sampling.prompt_logprobs:
            logprobs = of_text(event, eos_ids)
        self.logprobs += logprobs
        return Piece(self, self.text.take(event), logprobs, self.finish)


def of_text(event: TokenEvent, eos_ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    """Without that of the token that ends an answer: it is no part of its text.

    A request for those of the prompt gets every one: its tokens are counted.
    """
    ended = event.finish is FinishReason.STOP and event.logprobs[-1].token in eos_ids
    return event.logprobs[:-1] if ended else event.logprobs


class Choices:
    """All answers of one call. Takes events; every choice begins empty."""

    def __init__(self, asked: Asked, tokenizer: ChatTokenizer) -> None:
        self.asked, self._tokenizer = asked, tokenizer
        self._by_id: dict[int, Choice] = {}
        for index, request in enumerate(asked.requests):
            self._begin(index, request)

    @property
    def all(self) -> list[Choice]:
        return list(self._by_id.values())

    @property
    def ended(self) -> bool:
        return all(choice.finish is not None for choice in self._by_id.values())

    @property
    def version(self) -> int:
        """That answers: of the first choice with a token."""
        return next((choice.version for choice in self._by_id.values() if choice.tokens), 0)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.asked.prompts))

    @property
    def answer_tokens(self) -> int:
        return sum(choice.tokens for choice in self._by_id.values())

    def take(self, items: Iterable[Item]) -> list[Piece]:
        """Raises ApiError for an answer that fails, and for one that begins again after some of it was shown."""
        pieces = []
        for item in items:
            choice = self._by_id[item.request_id]
            if not isinstance(item, Restarted):
                pieces.append(choice.take(item, self._tokenizer.eos_ids))
            elif choice.shown:
                raise ApiError(
                    500, "the replica was lost, and another adapter version answers: ask again", code="restarted"
                )
            else:
                pieces = [piece for piece in pieces if piece.choice is not choice]
                self._begin(choice.index, choice.request)
        return pieces

    def _begin(self, index: int, request: Request) -> None:
        text = TextStream(self._tokenizer, request.sampling.stop)
        self._by_id[request.id] = Choice(index, request, text)


def failure(event: TokenEvent) -> ApiError:
    """Of an answer that did not come to its end."""
    if event.finish is FinishReason.REJECTED:
        return ApiError(400, event.detail or "no replica can answer this request", code="rejected")
    if event.finish is FinishReason.CANCELLED or event.detail.startswith(GONE):
        return ApiError(503, f"the server stopped this answer: {event.detail}", code="cancelled", retry_after_s=5.0)
    return ApiError(500, f"the answer failed: {event.detail}", code="failed")
