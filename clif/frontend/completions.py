"""/v1/completions: texts, or token ids, go on."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from clif.data.load import slo_of
from clif.frontend.answering import DONE, Answer, Serving, events, fingerprint, model_name, usage, usage_field
from clif.frontend.asking import Asked, answer_tokens, check_count, check_ids, check_ready, make_requests, tokenised
from clif.frontend.auth import caller_of
from clif.frontend.choices import Choice, Choices, Piece
from clif.frontend.errors import ApiError, invalid
from clif.frontend.logprobs import plain_logprobs
from clif.frontend.route_parts import Parts
from clif.frontend.sampling import SamplingBody, Whole, check_enforceable
from clif.frontend.strict import Many, documented, read_body
from clif.tokenizer import ChatTokenizer
from clif.types import TokenLogprob

Prompts = list[str] | list[tuple[int, ...]]


class CompletionBody(SamplingBody):
    prompt: str | Many[str] | Many[Whole] | Many[Many[Whole]]
    """A text, token ids, or several of either."""
    logprobs: Annotated[Whole, Field(ge=0)] | None = None
    echo: bool | None = None
    """The text of the prompt comes first; with `logprobs`, so do the log-probabilities of its tokens, `null` for the
    first one, and that of the token that ends an answer is shown as well."""
    best_of: Whole | None = None
    suffix: None = None
    NOT_OFFERED: ClassVar = {
        **SamplingBody.NOT_OFFERED,
        "suffix": "the model writes what follows a text, and not what comes before one",
    }

    @property
    def prompts(self) -> Prompts:
        """Raises ApiError without any."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise invalid("prompt has no entries: give a text, or token ids", "prompt")
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]  # type: ignore[arg-type]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt]  # type: ignore[return-value, arg-type]

    def check(self) -> None:
        """Raises ApiError for what does not go together."""
        if self.best_of not in (None, self.choices):
            raise invalid("best_of is not offered: give n, and choose", "best_of", "unsupported_parameter")


def routes(parts: Parts) -> APIRouter:
    router = APIRouter()
    serving = Serving(parts.config.serve.http, parts.link, parts.tokenizer, parts.recent)

    @router.post("/v1/completions", openapi_extra=documented(CompletionBody), tags=["serving"])
    async def completions(request: Request) -> Response:
        """Go on with texts."""
        body = await read_body(request, CompletionBody)
        asked = await prepare(parts, request, body)
        return Answer(serving, asked, CompletionForm(body, asked, parts.tokenizer), bool(body.stream))

    return router


async def prepare(parts: Parts, call: Request, body: CompletionBody) -> Asked:
    """The requests of a call. Raises ApiError."""
    http, link, caller = parts.config.serve.http, parts.link, caller_of(call)
    check_ready(link.readiness)
    caller.check_model(body.model)
    body.check()
    prompts = body.prompts
    check_count(body.choices, len(prompts), http)
    ready = []
    for prompt in prompts:
        ids = await _ids(parts, prompt, link.run.vocabulary)
        most = answer_tokens(len(ids), body.max_tokens, link.run, http, caller.max_tokens, ("prompt", "max_tokens"))
        ready.append((ids, body.sampling(most, body.logprobs, link.run.vocabulary, bool(body.echo))))
    await check_enforceable(ready[0][1], "response_format")
    requests = make_requests(link, ready, body.choices, slo_of(parts.config.slo))
    return Asked(requests, body.model, caller.name, body.choices)


async def _ids(parts: Parts, prompt: str | tuple[int, ...], vocabulary: int) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return check_ids(prompt, vocabulary, "prompt")
    return await tokenised(lambda: parts.tokenizer.encode_text(prompt), len(prompt), "prompt")


class CompletionForm:
    """OpenAI's form of texts that go on."""

    def __init__(self, body: CompletionBody, asked: Asked, tokenizer: ChatTokenizer) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._include_usage, self._with_logprobs = body.include_usage, body.logprobs is not None
        self._usage_so_far = body.usage_so_far
        self._before = [_text(tokenizer, prompt) for prompt in body.prompts] if body.echo else []
        self._id, self._created = f"cmpl-{asked.requests[0].id:x}", int(time.time())
        self._head, self._opened = b"", set[int]()
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Choices) -> bytes:
        shown = [
            self._choice(choice, self._echoed(choice) + choice.text.sent, choice.logprobs, choice.finish, whole=True)
            for choice in choices.all
        ]
        return msgspec.json.encode({**self._top(choices), "choices": shown, "usage": usage(choices)})

    def events(self, choices: Choices, pieces: list[Piece]) -> bytes:
        if not self._head:
            # All events begin alike.
            self._head = msgspec.json.encode(self._top(choices))[:-1] + b","
        so_far = usage_field(choices, self._include_usage, self._usage_so_far)
        return events(
            self._chunk(piece, so_far)
            for piece in pieces
            if piece.text or piece.finish or piece.logprobs or self._new(piece)
        )

    def end(self, choices: Choices) -> bytes:
        if not self._include_usage:
            return DONE
        return events([self._head + msgspec.json.encode({"choices": [], "usage": usage(choices)})[1:]]) + DONE

    def error(self, error: ApiError) -> bytes:
        return events([error.body])

    def _top(self, choices: Choices) -> dict[str, Any]:
        version = choices.version
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": model_name(self._asked.model, version),
            "system_fingerprint": fingerprint(version),
        }

    def _new(self, piece: Piece) -> bool:
        return bool(self._before) and piece.choice.index not in self._opened

    def _echoed(self, choice: Choice) -> str:
        return self._before[choice.index // self._asked.each] if self._before else ""

    def _chunk(self, piece: Piece, so_far: dict[str, Any]) -> bytes:
        choice = piece.choice
        new = self._new(piece)
        text = self._echoed(choice) + piece.text if new else piece.text
        self._opened.add(choice.index)
        shown = self._choice(choice, text, piece.logprobs, piece.finish, new)
        return self._head + msgspec.json.encode({"choices": [shown], **so_far})[1:]

    def _choice(
        self,
        choice: Choice,
        text: str,
        logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...],
        finish: str | None,
        whole: bool = False,
    ) -> dict[str, Any]:
        """whole: it begins with the prompt, if that is wanted."""
        shown = None
        if self._with_logprobs:
            first = None
            if whole and choice.request.sampling.prompt_logprobs:
                first, logprobs = choice.request.prompt[0], [*choice.prompt_logprobs, *logprobs]
            shown = plain_logprobs(self._tokenizer, logprobs, self._offsets.get(choice.index, 0), first)
            self._offsets[choice.index] = shown.pop("end")
        return {"index": choice.index, "text": text, "logprobs": shown, "finish_reason": finish}


def _text(tokenizer: ChatTokenizer, prompt: str | tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
