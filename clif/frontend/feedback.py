"""/v1/feedback: better answers, which become samples to train on, where the run allows it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from clif.config import Config
from clif.errors import InputError
from clif.frontend.auth import Caller, take
from clif.frontend.chat import ChatMessage
from clif.frontend.errors import ApiError, invalid
from clif.frontend.listing import check_query
from clif.frontend.recent_answers import RecentAnswers, Remembered
from clif.frontend.route_parts import Parts
from clif.frontend.strict import Many, Strict, documented, read_body
from clif.jobs.screening import objection
from clif.tokenizer import ChatTokenizer
from clif.types import CLIF, TrainSample
from clif.wire.frontend import GiveFeedback

LONGEST_ANSWER = 2**18
"""Characters; the tokens of a sample are bounded besides."""


class FeedbackBody(Strict):
    """An answer by its id, or a conversation, with a better answer; or an answer by its id, with a rating."""

    response_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Id of an answer of this server, as long as it is kept (jobs.feedback_answers, jobs.feedback_ttl_s)."""
    choice: Annotated[int, Field(ge=0, le=1023)] = 0
    """Which of its choices is meant."""
    messages: Annotated[Many[ChatMessage], Field(min_length=1)] | None = None
    answer: Annotated[str, Field(max_length=LONGEST_ANSWER)] | None = None
    rating: Literal["up", "down"] | None = None
    """up makes the answer that was given a sample. down is counted, and trains nothing."""


class FeedbackObject(BaseModel):
    object: Literal["feedback"] = "feedback"
    kept: bool
    """Whether it became a sample."""
    reason: str
    """Why not."""
    waiting: int | None
    """Samples that wait for a job, of all clients."""


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["jobs"])
    jobs, link = parts.config.jobs, parts.link

    @router.post("/v1/feedback", openapi_extra=documented(FeedbackBody))
    async def give_feedback(request: Request) -> FeedbackObject:
        """Send a better answer, or rate one. What is kept trains the adapter clif in a job of its own."""
        caller = check_query(request)
        body = await read_body(request, FeedbackBody)
        if not (jobs.allow_feedback and parts.config.train.enabled):
            raise ApiError(403, "this run takes no feedback: it needs jobs.allow_feedback=true", code="no_feedback")
        caller.check_model(CLIF)
        check_kind(body)
        answer = None if body.response_id is None else found(parts.recent, body, caller)
        take(caller.use.feedback, 1, f"rows of feedback of the key {caller.name} in an hour")
        if body.rating is not None:
            parts.recent.ratings[body.rating] += 1
        if body.rating == "down" and body.answer is None:
            return FeedbackObject(
                kept=False, reason="it is counted; without a better answer it trains nothing", waiting=None
            )
        # In a thread: other clients need not wait while a long one is read.
        sample = await asyncio.to_thread(make_sample, body, answer, parts.config, parts.tokenizer)
        action = GiveFeedback(digest=digest(sample), sample=sample, source=body.response_id or "", owner=caller.name)
        done = msgspec.json.decode(await link.command(action, caller.name))
        reason = "" if done["kept"] else "it is known already"
        return FeedbackObject(kept=done["kept"], reason=reason, waiting=done["waiting"])

    return router


def check_kind(body: FeedbackBody) -> None:
    """Raises ApiError for a body that is not of one of the kinds."""
    if (body.response_id is None) == (body.messages is None):
        raise invalid("give response_id or messages, one of them", "response_id")
    if body.answer is None and body.rating is None:
        raise invalid("give answer, the better one, or rating", "answer")
    if body.messages is not None and (body.answer is None or body.rating is not None):
        raise invalid("messages need answer, the better one, and no rating", "answer")
    if body.messages is not None and body.messages[-1].role == "assistant":
        raise invalid("messages end before the answer: leave out the last one", "messages")
    if body.rating == "up" and body.answer is not None:
        raise invalid("rating=up says that the answer was good: leave answer out", "answer")


def found(recent: RecentAnswers, body: FeedbackBody, caller: Caller) -> Remembered:
    """The answer that is meant. Raises ApiError."""
    answer = recent.find(body.response_id or "")
    if answer is None or not caller.may_see(answer.owner):
        raise ApiError(404, "there is no such answer, or it is not kept any more: send messages instead", "response_id")
    if body.choice >= len(answer.texts):
        raise invalid(f"the answer has {len(answer.texts)} choices", "choice")
    adapter = answer.model.partition("@")[0]
    if adapter not in (CLIF, "base"):
        raise invalid(f"{adapter} gave this answer, and feedback trains {CLIF}: create a job instead", "response_id")
    return answer


def make_sample(body: FeedbackBody, answer: Remembered | None, config: Config, tokenizer: ChatTokenizer) -> TrainSample:
    """Raises ApiError for what cannot be a sample, or is not to be one."""
    given = None if answer is None else answer.texts[body.choice]
    wanted = given if body.answer is None else body.answer
    assert wanted is not None
    problem = objection(wanted, None if body.answer is None else given)
    if problem:
        raise invalid(problem, "answer", "not_kept")
    try:
        messages = [message.plain for message in body.messages or ()]
        prompt = tokenizer.encode_chat(messages) if answer is None else answer.prompts[body.choice]
        ids = (*prompt, *tokenizer.encode_answer(wanted))
    except InputError as error:
        raise invalid(str(error), "messages" if answer is None else "answer") from error
    most = min(config.data.max_sample_tokens, config.model.max_context)
    if not len(prompt) or len(ids) < len(prompt) + 2:
        raise invalid("the prompt or the answer encodes to nothing", "answer")
    if len(ids) > most:
        raise invalid(f"{len(ids)} tokens exceed {most} (data.max_sample_tokens): shorten the answer", "answer")
    return TrainSample(id=0, ids=ids, target_start=len(prompt))


def digest(sample: TrainSample) -> str:
    """Equal for equal content."""
    return hashlib.sha256(msgspec.msgpack.encode((sample.ids, sample.target_start))).hexdigest()
