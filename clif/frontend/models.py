"""/v1/models, /tokenize, /detokenize, and what a load balancer asks: /health, /ready, /version."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse

from clif import __version__
from clif.frontend.asking import check_ids, tokenised
from clif.frontend.auth import Caller, caller_of
from clif.frontend.chat import ChatMessage
from clif.frontend.errors import ApiError, invalid
from clif.frontend.route_parts import Parts
from clif.frontend.sampling import Whole
from clif.frontend.strict import Many, Strict, documented, read_body

OWNER = "clif"


class TokenizeBody(Strict):
    """Give a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Many[ChatMessage], Field(min_length=1)] | None = None


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: Many[Whole]


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """What a request may name as its model. Old versions stay for as long as replicas keep them."""
        caller = caller_of(request)
        return {"object": "list", "data": [shown(row, caller) for row in parts.link.run.models]}

    @router.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        """One model."""
        found = next((row for row in parts.link.run.models if row["id"] == model), None)
        if found is None:
            message = f"there is no model {model}: GET /v1/models lists them"
            raise ApiError(404, message, "model", "model_not_found")
        return shown(found, caller_of(request))

    @router.post("/tokenize", openapi_extra=documented(TokenizeBody))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a text, or of a conversation up to where the assistant answers."""
        body = await read_body(request, TokenizeBody)
        ids = await _tokenise(parts, body)
        return {"tokens": ids, "count": len(ids), "max_model_len": parts.link.run.context}

    @router.post("/detokenize", openapi_extra=documented(DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of token ids, without special tokens."""
        body = await read_body(request, DetokenizeBody)
        vocabulary = parts.tokenizer.tokenizer.get_vocab_size(with_added_tokens=True)
        return {"prompt": parts.tokenizer.decode(check_ids(body.tokens, vocabulary, "tokens"))}

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The front end answers."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are accepted; otherwise the status is 503."""
        now = parts.link.readiness
        return JSONResponse({"ready": now.ready, "reason": now.reason}, 200 if now.ready else 503)

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Of the server; engine: emulated where no model computes the answers."""
        emulated = parts.config.engine.emulated is not None
        return {"version": __version__, "engine": "emulated" if emulated else "clif"}

    return router


def shown(row: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """A model in OpenAI's form, with what the control server says of it. Its job is for its owner and for admins."""
    fields = {name: value for name, value in row.items() if name != "owner"}
    if not caller.may_see(row["owner"]):
        fields["job"] = ""
    return {**fields, "object": "model", "created": int(row.get("created", 0)), "owned_by": OWNER}


async def _tokenise(parts: Parts, body: TokenizeBody) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.prompt is not None:
        prompt = body.prompt
        return await tokenised(lambda: parts.tokenizer.encode_text(prompt), len(prompt), "prompt")
    messages = [message.plain for message in body.messages or ()]
    characters = sum(len(message["content"]) for message in messages)
    return await tokenised(lambda: parts.tokenizer.encode_chat(messages), characters, "messages")
