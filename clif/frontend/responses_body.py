"""The body of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from clif.frontend.chat import AS_ROLE
from clif.frontend.errors import invalid
from clif.frontend.sampling import (
    DEFAULT_TEMPERATURE,
    Nothing,
    ObjectFormat,
    StreamOptions,
    TextFormat,
    Whole,
    make_sampling,
    schema_constraint,
)
from clif.frontend.strict import Many, Strict
from clif.tokenizer import Message
from clif.types import Constraint, Sampling

STATELESS = "nothing is kept between calls: send the whole conversation as input"
NO_TOOLS = "the model calls no tools"
TEXT_ALONE = "text goes in and text comes out"


class InputText(Strict):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    """Of answers that are sent back: without effect."""


class InputMessage(Strict):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    """Of answers that are sent back: without effect."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class NamedSchema(Strict):
    type: Literal["json_schema"]
    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    format: Annotated[TextFormat | ObjectFormat | NamedSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(Strict):
    """Stateless: names that would need a state are taken with their harmless values alone."""

    model: Annotated[str, Field(max_length=256)]
    input: str | Annotated[Many[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None
    include: Many[Literal["message.output_text.logprobs"]] | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    ignore_eos: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    reasoning: None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Whole | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    NOT_OFFERED: ClassVar = {
        "store": STATELESS,
        "background": "answer and connection belong together",
        "previous_response_id": STATELESS,
        "conversation": STATELESS,
        "prompt": "there are no stored prompts: send the text",
        "reasoning": "it is the model's own",
        "tools": NO_TOOLS,
        "tool_choice": NO_TOOLS,
        "truncation": "what does not fit is refused",
        "service_tier": "there is one: auto",
        "text.verbosity": "it is the model's own",
        "input[].type": f"{TEXT_ALONE}, so an item must be of the type message",
        "input[].content[].type": f"{TEXT_ALONE}, so a part must be of the type input_text",
        "include[]": "what can be included is message.output_text.logprobs",
        "stream_options.include_obfuscation": "no padding is added to events",
        "stream_options.include_usage": "the last event has the usage",
    }

    @property
    def messages(self) -> list[Message]:
        """The conversation, as chat templates take it."""
        given = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        first = [] if self.instructions is None else [InputMessage(role="system", content=self.instructions)]
        return [{"role": AS_ROLE.get(m.role, m.role), "content": m.text} for m in (*first, *given)]

    @property
    def with_logprobs(self) -> bool:
        return bool(self.include) or self.top_logprobs is not None

    def sampling(self, max_tokens: int) -> Sampling:
        """Raises ApiError for values that no answer can follow."""
        if self.stream_options and self.stream_options.include_usage is not None:
            raise invalid("the last event has the usage: leave include_usage out", "stream_options.include_usage")
        return make_sampling(
            max_tokens=max_tokens,
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            ignore_eos=bool(self.ignore_eos),
            logprobs=(self.top_logprobs or 0) if self.with_logprobs else None,
            constraint=self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None or isinstance(wanted, TextFormat):
            return None
        if isinstance(wanted, ObjectFormat):
            return Constraint("json_object")
        return schema_constraint(wanted.schema_, "text.format.schema")
