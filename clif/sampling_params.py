"""How the tokens of an answer are chosen: what a request may ask for. Free of torch.

clif/types.py has these names, too, beside the request that holds them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-8, 1000.0
"""A temperature outside of these bounds is a mistake: answers would be greedy, or all tokens equally likely."""


MOST_BIASED, MOST_LOGPROBS = 1024, 20
"""Token ids in logit_bias, and alternatives of each token in logprobs."""
LONGEST_SCHEMA = 2**14
"""Characters. A replica serves nothing else while it reads one: 0.1 s for the worst of this length."""


class Constraint(msgspec.Struct, frozen=True):
    """What the text of an answer must be: a JSON object, or JSON that a schema allows.

    schema: of a json_schema, as JSON. Raises ValueError for impossible values; clif/constraints.py says whether a
    schema can be enforced.
    """

    kind: Literal["json_object", "json_schema"]
    schema: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_object", "json_schema"):
            raise ValueError(f"constraint.kind is {self.kind!r}: it must be json_object or json_schema")
        if (self.kind == "json_schema") != bool(self.schema):
            raise ValueError("constraint.schema belongs to the kind json_schema, and to no other: give both or neither")
        if len(self.schema) > LONGEST_SCHEMA:
            raise ValueError(
                f"constraint.schema has {len(self.schema)} characters, {LONGEST_SCHEMA} are allowed: shorten it"
            )


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch the filters off.

    Order: the logits get logit_bias and the penalties, and lose what the constraint forbids; then come temperature,
    top_k, top_p, min_p. A greedy token is the likeliest after the first of these steps.

    min_p: share of the likeliest token's probability that a token needs. logit_bias: (token id, -100 to 100). The
    penalties, -2 to 2, are subtracted from the logits of tokens of the answer: presence_penalty once, frequency_penalty
    for each time. logprobs: how many of the likeliest tokens to report for each token, besides it; None: no report.
    Log-probabilities are the model's own, before all of these steps, so that they do not depend on what is asked.
    prompt_logprobs: the prompt's tokens have theirs reported as well, except the first; the whole prompt is computed.
    constraint: its answer ends when it is complete; one that max_tokens ends is a beginning of it.

    Raises ValueError for impossible values.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: ask for at least 1")
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature <= HIGHEST_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}: it must be 0 (greedy) or from {LOWEST_TEMPERATURE:g} to "
                f"{HIGHEST_TEMPERATURE:g}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (off) or more")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be from 0 to 2^63 - 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be in [0, 1]")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from -2 to 2")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs is {self.logprobs}: it must be from 0 to {MOST_LOGPROBS}, or None")
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs is without logprobs: give how many of the likeliest tokens to report")
        if self.logit_bias:
            _check_bias(self.logit_bias)
        if self.constraint is not None and self.ignore_eos:
            raise ValueError("a constraint says where an answer ends, and ignore_eos that it goes on: give one of them")

    @property
    def guided(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalised = self.frequency_penalty or self.presence_penalty
        return bool(self.logit_bias or penalised) or self.constraint is not None


def _check_bias(logit_bias: tuple[tuple[int, float], ...]) -> None:
    if not isinstance(logit_bias, tuple):
        kind = type(logit_bias).__name__
        raise ValueError(f"logit_bias is a {kind}: give a tuple of pairs of a token id and a number")
    if len(logit_bias) > MOST_BIASED:
        raise ValueError(f"logit_bias names {len(logit_bias)} tokens: {MOST_BIASED} are allowed")
    if len({token for token, _ in logit_bias}) < len(logit_bias):
        raise ValueError("logit_bias names a token twice: give each one value")
    for token, value in logit_bias:
        if not -100 <= value <= 100:
            raise ValueError(f"logit_bias of token {token} is {value}: it must be from -100 to 100")
