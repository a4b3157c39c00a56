"""What a load test sends, and when: made before the first request, so that no answer changes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from clif.config import LoadConfig
from clif.data.lines import json_object, read_lines
from clif.data.load import read_arrivals
from clif.data.traces import Arrival
from clif.errors import InputError

Messages = tuple[dict[str, str], ...]
WORDS = (
    "the", "a", "of", "to", "in", "and", "is", "it", "on", "as", "at", "by", "we", "can", "how", "what", "when",
    "light", "door", "window", "room", "time", "day", "water", "small", "large", "first", "second", "open", "close",
    "set", "make", "list", "give", "show", "write", "explain", "short", "long", "more", "less", "same", "other",
)  # fmt: skip
"""Words of generated prompts: common ones, about one token each."""
FOREVER_S = 1e9


class PromptError(InputError):
    """The file of prompts cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Planned:
    """A request. at_s: when it is sent, seconds after the start. max_tokens: of its answer."""

    at_s: float
    messages: Messages
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """What is to be planned. prompts: a file of JSON lines; without it words are drawn, prompt_tokens of them or as
    many as the arrival has in a trace. max_tokens: of each answer, unless the trace knows its length.
    """

    load: LoadConfig
    prompts: Path | None = None
    prompt_tokens: int = 128
    max_tokens: int = 128
    seed: int = 0

    def plan(self) -> list[Planned]:
        """All requests in order of time. Raises InputError for a trace or prompts that cannot be used."""
        arrivals = read_arrivals(self.load, self.seed)
        given = None if self.prompts is None else read_prompts(self.prompts)
        rng = np.random.default_rng([self.seed, 2])
        picks = rng.permutation(len(given)) if given else ()
        plan = []
        for number, arrival in enumerate(arrivals):
            if given is not None:
                messages: Messages = given[int(picks[number % len(given)])]
            else:
                messages = self._words(arrival, rng)
            plan.append(Planned(arrival.at_s, messages, arrival.answer_tokens or self.max_tokens))
        return plan

    def _words(self, arrival: Arrival, rng: np.random.Generator) -> Messages:
        count = arrival.prompt_tokens or self.prompt_tokens
        text = " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))
        return ({"role": "user", "content": text},)


def arrivals_config(
    rate: float | None, duration_s: float | None, requests: int | None, trace: Any = None
) -> LoadConfig:
    """The arrivals of a load test, as the configuration of a run describes them. trace: a TraceConfig, or its fields.

    rate: requests a second, Poisson. Without duration and number of requests it lasts a minute, a trace to its end.
    Raises InputError.
    """
    bounds: dict[str, Any] = {"duration_s": duration_s or FOREVER_S, "max_requests": requests}
    if trace is None and duration_s is None and requests is None:
        bounds["duration_s"] = 60.0
    kind = {"kind": "poisson", "rate_rps": 1.0 if rate is None else rate} if trace is None else {"kind": "trace"}
    try:
        return LoadConfig.model_validate({**kind, "trace": trace, **bounds})
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"the load cannot be made: {said}") from error


def read_prompts(path: Path) -> list[Messages]:
    """Prompts from JSON lines of `messages`, `prompt`, or `instruction` with or without `input`.

    Answers in them are left out. Raises PromptError.
    """
    prompts = []
    for number, line in read_lines(path, PromptError):
        try:
            prompts.append(tuple(_messages(json_object(line))))
        except (ValueError, LookupError, TypeError) as error:
            raise PromptError(f"{path}, line {number}: {error}: write messages, prompt or instruction") from error
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write JSON lines of messages, prompt or instruction")
    return prompts


def _messages(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    if "messages" in row:
        messages = list(row["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("no message of a user")
        yield from ({"role": str(m["role"]), "content": str(m["content"])} for m in messages)
        return
    text = row.get("prompt", row.get("instruction"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no prompt")
    added = row.get("input") if "prompt" not in row else None
    yield {"role": "user", "content": f"{text}\n{added}" if added else text}
