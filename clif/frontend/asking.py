"""From the body of a call to the requests that the control process gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from clif.config import HttpConfig
from clif.errors import InputError
from clif.frontend.admission import Load, admit
from clif.frontend.auth import Caller
from clif.frontend.errors import ApiError, invalid
from clif.frontend.link import Link, Readiness, RunInfo
from clif.types import Request, Sampling, Slo

IN_THREAD = 16384
"""Characters from which on a text is tokenised in a thread, so that the other clients need not wait for it."""
HIGHEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Asked:
    """The requests of one call: `each` answers to each prompt, in the order of the prompts.

    key: name of the client's key.
    """

    requests: tuple[Request, ...]
    model: str
    key: str
    each: int = 1

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [request.prompt for request in self.requests[:: self.each]]


async def tokenised(encode: Callable[[], list[int]], characters: int, param: str) -> tuple[int, ...]:
    """Token ids. Raises ApiError for what the tokenizer, or the chat template, refuses."""
    try:
        return tuple(encode() if characters < IN_THREAD else await asyncio.to_thread(encode))
    except InputError as error:
        raise invalid(str(error), param, "invalid_value") from None


def check_ready(readiness: Readiness) -> None:
    """Raises ApiError while no request is accepted."""
    if not readiness.ready:
        raise ApiError(503, readiness.reason, code="not_ready", retry_after_s=2.0)


def check_ids(ids: Sequence[int], vocabulary: int, param: str) -> tuple[int, ...]:
    """Raises ApiError for ids that are none of the model's."""
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise invalid(f"{param} has a token id outside of the vocabulary, 0 to {vocabulary - 1}", param)
    return tuple(ids)


def answer_tokens(
    prompt: int, wanted: int | None, run: RunInfo, http: HttpConfig, most: int | None, names: tuple[str, str]
) -> int:
    """How long the answer to a prompt of so many tokens may be. Raises ApiError where that is impossible.

    most: what the client's key allows. names: of the prompt and of the length, in the client's protocol.
    """
    room = run.context - prompt
    limits = [limit for limit in (http.max_tokens, most) if limit is not None]
    if prompt == 0:
        raise invalid(f"{names[0]} has no tokens: give one at least", names[0])
    if wanted is not None and limits and wanted > min(limits):
        raise invalid(f"{names[1]} is {wanted}: this server allows {min(limits)}", names[1])
    if room < (wanted or 1):
        asked = f", and {wanted} are asked for as an answer" if wanted else ""
        raise invalid(
            f"this server's longest context is {run.context} tokens, prompt and answer together. {names[0]} has "
            f"{prompt}{asked}: shorten it, or ask for a shorter answer",
            names[0],
            "context_length_exceeded",
        )
    if wanted is None:
        wanted = min([room, *limits, *([http.default_max_tokens] if http.default_max_tokens else [])])
    return wanted


def check_count(choices: int, prompts: int, http: HttpConfig) -> None:
    """Raises ApiError for more answers than one call may ask for."""
    if choices > http.max_n:
        raise invalid(f"n is {choices}: this server allows {http.max_n}", "n")
    if prompts > http.max_n:
        raise invalid(f"prompt has {prompts} entries: this server allows {http.max_n} in a call", "prompt")


def make_requests(
    link: Link, prompts: Sequence[tuple[tuple[int, ...], Sampling]], choices: int, slo: Slo
) -> tuple[Request, ...]:
    """`choices` requests for each prompt. Each choice has a seed of its own where one is given.

    Nothing may be awaited from here to Link.ask(): the control process takes ids in their order alone.
    """
    return tuple(
        Request(id=link.next_id(), prompt=prompt, sampling=of_choice(sampling, index), slo=slo)
        for prompt, sampling in prompts
        for index in range(choices)
    )


def of_choice(sampling: Sampling, index: int) -> Sampling:
    if index == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) & HIGHEST_SEED)


def check_room(now: float, link: Link, http: HttpConfig, caller: Caller, asked: Asked) -> None:
    """The last check, right before the requests are sent. Raises ApiError."""
    load = Load(link.waiting_requests, link.open_requests, link.first_tokens.per_s(now), link.ends.per_s(now))
    wait_s, reason = admit(load, len(asked.requests), http)
    if wait_s is not None:
        raise ApiError(503, f"the server is busy: {reason}", code="overloaded", retry_after_s=wait_s)
    caller.charge_prompt(sum(map(len, asked.prompts)))
