"""What a body says about how its answers are chosen, in the names of OpenAI's protocol."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field

from clif.constraints import check_schema
from clif.errors import InputError
from clif.frontend.errors import ApiError, invalid
from clif.frontend.strict import Strict
from clif.types import Constraint, Sampling

MOST_STOPS, LONGEST_STOP = 16, 256
LONGEST_ID = 10
"""Digits of a token id."""
DEFAULT_TEMPERATURE = 1.0
"""OpenAI's."""
StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP, pattern="^[^\ufffd]*$")]
"""Without U+FFFD, the sign for bytes that are no text: a search for it decodes the whole answer at each token."""
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With include_usage: each event has the usage so far, as vLLM's clients ask for it."""
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Strict):
    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """An answer follows the schema in both cases."""


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class SamplingBody(Strict):
    """What chat and plain completions share. Names of no effect are taken where clients send them by default."""

    model: Annotated[str, Field(max_length=256)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    """Not of OpenAI's protocol, as in other servers: so many of the likeliest tokens; 0 and -1: all."""
    min_p: float | None = None
    """As top_k: share of the likeliest token's probability that a token needs."""
    ignore_eos: bool | None = None
    """As top_k: the answer goes on after its end, for measurements."""
    seed: Whole | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: Format | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Without effect."""
    NOT_OFFERED: ClassVar = {
        "repetition_penalty": "use frequency_penalty or presence_penalty",
        "stop_token_ids": "give the texts as stop",
        "min_tokens": "use ignore_eos and max_tokens",
        "stream_options.include_obfuscation": "no padding is added to events",
    }

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_so_far(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self, max_tokens: int, logprobs: int | None, vocabulary: int, echo: bool = False) -> Sampling:
        """echo: log-probabilities are of the prompt, too. Raises ApiError for values that no answer can follow."""
        if self.stream_options and not self.stream:
            raise invalid("stream_options belong to stream=true: leave them out", "stream_options")
        given = {
            "top_p": self.top_p,
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "ignore_eos": self.ignore_eos,
        }
        return make_sampling(
            max_tokens=max_tokens,
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            seed=self.seed,
            stop=self.stops,
            logit_bias=biases(self.logit_bias or {}, vocabulary),
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
            constraint=constraint(self.response_format),
            **{name: value for name, value in given.items() if value is not None},
        )


def make_sampling(**given: Any) -> Sampling:
    """Raises ApiError: the sentence begins with the name of what is wrong."""
    try:
        return Sampling(**given)
    except ValueError as error:
        name = str(error).split(" ", 1)[0]
        raise invalid(str(error), name if name in given else None, "invalid_value") from None


def biases(given: dict[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    """Raises ApiError for what is no token id."""
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) <= LONGEST_ID) or int(name) >= vocabulary:
            raise invalid(f"logit_bias: {name[:20]!r} is no token id, 0 to {vocabulary - 1}", "logit_bias")
    return tuple((int(name), value) for name, value in given.items())


def constraint(wanted: TextFormat | ObjectFormat | SchemaFormat | None) -> Constraint | None:
    """Raises ApiError for a schema that is too long."""
    match wanted:
        case None | TextFormat():
            return None
        case ObjectFormat():
            return Constraint("json_object")
    return schema_constraint(wanted.json_schema.schema_)


def schema_constraint(schema: dict[str, Any] | None, param: str = "response_format") -> Constraint:
    """Without a schema any JSON object will do. Raises ApiError for one that is too long."""
    if schema is None:
        return Constraint("json_object")
    try:
        return Constraint("json_schema", msgspec.json.encode(schema).decode())
    except ValueError as error:
        raise ApiError(400, str(error), param, "invalid_schema") from None


async def check_enforceable(sampling: Sampling, param: str) -> None:
    """Raises ApiError for a schema that cannot be enforced.

    A long one takes half a second: it is read in a thread, so that streams go on.
    """
    if sampling.constraint is None or not sampling.constraint.schema:
        return
    try:
        await asyncio.to_thread(check_schema, sampling.constraint.schema)
    except InputError as error:
        raise ApiError(400, str(error), param, "invalid_schema") from None
