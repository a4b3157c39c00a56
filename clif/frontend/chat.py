"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from clif.data.load import slo_of
from clif.frontend.answering import DONE, Answer, Serving, events, fingerprint, model_name, usage, usage_field
from clif.frontend.asking import Asked, answer_tokens, check_count, check_ready, make_requests, tokenised
from clif.frontend.auth import caller_of
from clif.frontend.choices import Choices, Piece
from clif.frontend.errors import ApiError, invalid
from clif.frontend.logprobs import chat_logprobs
from clif.frontend.route_parts import Parts
from clif.frontend.sampling import Nothing, SamplingBody, Whole, check_enforceable
from clif.frontend.strict import Many, Strict, documented, read_body
from clif.tokenizer import ChatTokenizer, Message

AS_ROLE = {"developer": "system"}
"""Roles that templates know under another name."""


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[TextPart]
    refusal: None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    audio: None = None
    annotations: Nothing | None = None
    """Of answers that are sent back: without effect."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def plain(self) -> Message:
        return {"role": AS_ROLE.get(self.role, self.role), "content": self.text}


class ChatBody(SamplingBody):
    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    """As max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    store: Literal[False] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: tuple[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """Without effect."""
    NOT_OFFERED: ClassVar = {
        **SamplingBody.NOT_OFFERED,
        "store": "answers are not kept",
        "tools": "the model calls no tools",
        "tool_choice": "the model calls no tools",
        "functions": "the model calls no tools",
        "function_call": "the model calls no tools",
        "messages[].tool_calls": "the model calls no tools",
        "messages[].tool_call_id": "the model calls no tools",
        "messages[].function_call": "the model calls no tools",
        "messages[].audio": "text goes in and text comes out",
        "messages[].name": "chat templates know roles alone",
        "messages[].content[].type": "text goes in and text comes out, so a part must be of the type text",
        "modalities": "text goes in and text comes out",
        "audio": "text goes in and text comes out",
        "prediction": "an answer is computed token by token",
        "service_tier": "there is one: auto",
        "reasoning_effort": "it is the model's own",
        "verbosity": "it is the model's own",
        "web_search_options": "the model reaches nothing outside",
    }

    @property
    def longest(self) -> int | None:
        """Raises ApiError if two lengths are given."""
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise invalid("max_tokens and max_completion_tokens mean the same: give one", "max_completion_tokens")
        return given.pop() if given else None

    @property
    def reported(self) -> int | None:
        """Of how many tokens to report log-probabilities beside the chosen one. Raises ApiError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs belongs to logprobs=true: give both or neither", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def routes(parts: Parts) -> APIRouter:
    router = APIRouter()
    serving = Serving(parts.config.serve.http, parts.link, parts.tokenizer, parts.recent)

    @router.post("/v1/chat/completions", openapi_extra=documented(ChatBody), tags=["serving"])
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatBody)
        asked = await prepare(parts, request, body)
        return Answer(serving, asked, ChatForm(body, asked, parts.tokenizer), bool(body.stream))

    return router


async def prepare(parts: Parts, call: Request, body: ChatBody) -> Asked:
    """The requests of a call. Raises ApiError."""
    http, link, caller = parts.config.serve.http, parts.link, caller_of(call)
    check_ready(link.readiness)
    caller.check_model(body.model)
    check_count(body.choices, 1, http)
    messages = [message.plain for message in body.messages]
    characters = sum(len(message["content"]) for message in messages)
    ids = await tokenised(lambda: parts.tokenizer.encode_chat(messages), characters, "messages")
    names = "messages", "max_completion_tokens" if body.max_tokens is None else "max_tokens"
    most = answer_tokens(len(ids), body.longest, link.run, http, caller.max_tokens, names)
    sampling = body.sampling(most, body.reported, link.run.vocabulary)
    await check_enforceable(sampling, "response_format")
    requests = make_requests(link, [(ids, sampling)], body.choices, slo_of(parts.config.slo))
    return Asked(requests, body.model, caller.name, body.choices)


class ChatForm:
    """OpenAI's form of answers in a conversation."""

    def __init__(self, body: ChatBody, asked: Asked, tokenizer: ChatTokenizer) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._include_usage, self._with_logprobs = body.include_usage, bool(body.logprobs)
        self._usage_so_far = body.usage_so_far
        self._id, self._created = f"chatcmpl-{asked.requests[0].id:x}", int(time.time())
        self._head, self._opened = b"", set[int]()

    def whole(self, choices: Choices) -> bytes:
        shown = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text.sent, "refusal": None},
                "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if self._with_logprobs else None,
                "finish_reason": choice.finish,
            }
            for choice in choices.all
        ]
        body = {**self._top(choices, "chat.completion"), "choices": shown, "usage": usage(choices)}
        return msgspec.json.encode(body)

    def events(self, choices: Choices, pieces: list[Piece]) -> bytes:
        if not self._head:
            # All events begin alike.
            self._head = msgspec.json.encode(self._top(choices, "chat.completion.chunk"))[:-1] + b","
        so_far = usage_field(choices, self._include_usage, self._usage_so_far)
        return events(self._chunk(choice, so_far) for piece in pieces for choice in self._deltas(piece))

    def end(self, choices: Choices) -> bytes:
        if not self._include_usage:
            return DONE
        tail = msgspec.json.encode({"choices": [], "usage": usage(choices)})[1:]
        return events([self._head + tail]) + DONE

    def error(self, error: ApiError) -> bytes:
        return events([error.body])

    def _top(self, choices: Choices, kind: str) -> dict[str, Any]:
        version = choices.version
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": model_name(self._asked.model, version),
            "system_fingerprint": fingerprint(version),
        }

    def _deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        index = piece.choice.index
        if index not in self._opened:
            self._opened.add(index)
            opening = {"role": "assistant", "content": "", "refusal": None}
            yield {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
        if piece.text or piece.logprobs:
            logprobs = chat_logprobs(self._tokenizer, piece.logprobs) if self._with_logprobs else None
            yield {"index": index, "delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None}
        if piece.finish:
            yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": piece.finish}

    def _chunk(self, choice: dict[str, Any], so_far: dict[str, Any]) -> bytes:
        return self._head + msgspec.json.encode({"choices": [choice], **so_far})[1:]
