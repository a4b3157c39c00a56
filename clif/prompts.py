"""What the library is asked to answer: texts, token ids and conversations, one or many. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from clif.errors import InputError, plain
from clif.tokenizer import ChatTokenizer

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or a conversation, to which the model's chat template is applied."""


def as_list(prompts: object) -> list[Any]:
    """Prompts as a list; a single prompt becomes a list of one. Raises InputError for other types."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InputError(f"prompts is a {type(prompts).__name__}: give a text, token ids, messages, or a list of these")
    one = all(_is_id(item) for item in prompts) or all(isinstance(item, Mapping) for item in prompts)
    return [prompts] if prompts and one else list(prompts)


def one_for_each(given: Any, count: int, name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """One value for each prompt. Raises InputError."""
    values = [given] * count if given is None or isinstance(given, kind) else given
    if not isinstance(values, Sequence) or not all(value is None or isinstance(value, kind) for value in values):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{name} is {plain(repr(given), 80)}: give a {kinds}, None, or a list, one for each prompt")
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} entries for {count} prompts: give one for all, or one for each")
    return list(values)


def prompt_ids(tokenizer: ChatTokenizer, prompt: Any, index: int) -> list[int]:
    """Token ids of a prompt. index: of the prompt, for the sentence. Raises InputError."""
    if isinstance(prompt, str):
        return tokenizer.encode_text(prompt)
    if isinstance(prompt, Sequence) and all(_is_id(item) for item in prompt):
        return [int(item) for item in prompt]
    if isinstance(prompt, Sequence) and all(_is_message(item) for item in prompt):
        return tokenizer.encode_chat([dict(message) for message in prompt])
    raise InputError(
        f"prompt {index} is none: give a text, a list of token ids, or a list of messages with role and content, texts"
    )


def _is_id(item: object) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and all(isinstance(item.get(key), str) for key in ("role", "content"))
