"""/v1/responses: text in, text out, and nothing kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from clif.data.load import slo_of
from clif.frontend.answering import Answer, Serving, model_name, usage
from clif.frontend.asking import Asked, answer_tokens, check_ready, make_requests, tokenised
from clif.frontend.auth import caller_of
from clif.frontend.choices import Choice, Choices, Piece
from clif.frontend.errors import ApiError
from clif.frontend.logprobs import chat_logprobs
from clif.frontend.responses_body import ResponsesBody
from clif.frontend.route_parts import Parts
from clif.frontend.sampling import check_enforceable
from clif.frontend.strict import documented, read_body
from clif.tokenizer import ChatTokenizer
from clif.types import TokenLogprob

TOKENS = ("input_tokens", "output_tokens")
COMPLETED, INCOMPLETE, IN_PROGRESS = "completed", "incomplete", "in_progress"


def routes(parts: Parts) -> APIRouter:
    router = APIRouter()
    serving = Serving(parts.config.serve.http, parts.link, parts.tokenizer, parts.recent)

    @router.post("/v1/responses", openapi_extra=documented(ResponsesBody), tags=["serving"])
    async def responses(request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's newer protocol."""
        body = await read_body(request, ResponsesBody)
        asked = await prepare(parts, request, body)
        return Answer(serving, asked, ResponseForm(body, asked, parts.tokenizer), bool(body.stream))

    return router


async def prepare(parts: Parts, call: Request, body: ResponsesBody) -> Asked:
    """The request of a call. Raises ApiError."""
    http, link, caller = parts.config.serve.http, parts.link, caller_of(call)
    check_ready(link.readiness)
    caller.check_model(body.model)
    messages = body.messages
    characters = sum(len(message["content"]) for message in messages)
    ids = await tokenised(lambda: parts.tokenizer.encode_chat(messages), characters, "input")
    names = "input", "max_output_tokens"
    most = answer_tokens(len(ids), body.max_output_tokens, link.run, http, caller.max_tokens, names)
    sampling = body.sampling(most)
    await check_enforceable(sampling, "text.format.schema")
    requests = make_requests(link, [(ids, sampling)], 1, slo_of(parts.config.slo))
    return Asked(requests, body.model, caller.name)


class ResponseForm:
    """OpenAI's form of responses. Each event has its number and its name."""

    def __init__(self, body: ResponsesBody, asked: Asked, tokenizer: ChatTokenizer) -> None:
        self._body, self._asked, self._tokenizer = body, asked, tokenizer
        number = f"{asked.requests[0].id:x}"
        self._id, self._item_id, self._created = f"resp_{number}", f"msg_{number}", int(time.time())
        self._events = 0

    def whole(self, choices: Choices) -> bytes:
        return msgspec.json.encode(self._response(choices))

    def events(self, choices: Choices, pieces: list[Piece]) -> bytes:
        opening = list(self._opening(choices)) if self._events == 0 else []
        deltas = [self._delta(piece) for piece in pieces if piece.text or piece.logprobs]
        return b"".join([*opening, *deltas])

    def end(self, choices: Choices) -> bytes:
        return b"".join(self._closing(choices))

    def error(self, error: ApiError) -> bytes:
        """Two events: clients of OpenAI's raise an exception for the second one."""
        failed = {**self._base("failed"), "error": {"code": "server_error", "message": error.message}}
        shown = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        return self._event("response.failed", response=failed) + self._event("error", **shown, error=shown)

    def _opening(self, choices: Choices) -> Iterator[bytes]:
        now = {**self._base(IN_PROGRESS), "model": model_name(self._asked.model, choices.version)}
        yield self._event("response.created", response=now)
        yield self._event("response.in_progress", response=now)
        item = {"id": self._item_id, "type": "message", "status": IN_PROGRESS, "role": "assistant", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._at, part=self._part("", ()))

    def _closing(self, choices: Choices) -> Iterator[bytes]:
        (choice,) = choices.all
        text, logprobs = choice.text.sent, self._logprobs(choice.logprobs)
        yield self._event("response.output_text.done", **self._at, text=text, logprobs=logprobs)
        yield self._event("response.content_part.done", **self._at, part=self._part(text, choice.logprobs))
        yield self._event("response.output_item.done", output_index=0, item=self._item(choice))
        response = self._response(choices)
        yield self._event(f"response.{response['status']}", response=response)

    def _delta(self, piece: Piece) -> bytes:
        logprobs = self._logprobs(piece.logprobs)
        return self._event("response.output_text.delta", **self._at, delta=piece.text, logprobs=logprobs)

    def _event(self, kind: str, **content: Any) -> bytes:
        number, self._events = self._events, self._events + 1
        data = msgspec.json.encode({"type": kind, "sequence_number": number, **content})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _response(self, choices: Choices) -> dict[str, Any]:
        (choice,) = choices.all
        cut = choice.finish == "length"
        return {
            **self._base(INCOMPLETE if cut else COMPLETED),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": model_name(self._asked.model, choices.version),
            "output": [self._item(choice)],
            "usage": {
                **usage(choices, TOKENS),
                # Neither is counted.
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }

    def _base(self, status: str) -> dict[str, Any]:
        """Without an answer."""
        body, sampling = self._body, self._asked.requests[0].sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._asked.model,
            "output": [],
            "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": self._format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_logprobs": sampling.logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def _format(self) -> dict[str, Any]:
        wanted = None if self._body.text is None else self._body.text.format
        return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)

    def _item(self, choice: Choice) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": INCOMPLETE if choice.finish == "length" else COMPLETED,
            "role": "assistant",
            "content": [self._part(choice.text.sent, choice.logprobs)],
        }

    def _part(self, text: str, logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = chat_logprobs(self._tokenizer, tokens)["content"]
        return found
