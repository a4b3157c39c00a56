"""Applies a trace's lengths: scaled, cut, and with shared beginnings of prompts as in the trace. Free of torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import msgspec
import numpy as np

from clif.config.load import TraceConfig
from clif.data.traces import BLOCK_TOKENS, Arrival, TraceError

log = logging.getLogger(__name__)

MOST_PROMPT_TOKENS = 400_000_000
"""Upper bound over a load, which is made before the run, at 8 bytes a token."""


def fit(arrivals: Sequence[Arrival], trace: TraceConfig) -> list[Arrival]:
    """The arrivals with their lengths scaled, then cut to the longest allowed; at least one token each.

    A trace may log 0 tokens, but a model needs one to start from, and a request that failed in the trace asks for one.
    Raises TraceError if all prompts together exceed the bound of a load.
    """
    fitted = [_fit(arrival, trace) for arrival in arrivals]
    _log_change(arrivals, fitted)
    total = sum(arrival.prompt_tokens or 0 for arrival in fitted)
    if total > MOST_PROMPT_TOKENS:
        raise TraceError(
            f"{trace.path}: the prompts of {len(fitted)} requests have {total:,} tokens together, more than "
            f"{MOST_PROMPT_TOKENS:,}: set load.trace.max_prompt_tokens, load.trace.prompt_scale or load.max_requests"
        )
    return fitted


def _log_change(arrivals: Sequence[Arrival], fitted: Sequence[Arrival]) -> None:
    pairs = list(zip(arrivals, fitted, strict=True))
    prompts = sum(max(1, old.prompt_tokens or 0) != new.prompt_tokens for old, new in pairs)
    answers = sum(max(1, old.answer_tokens or 0) != new.answer_tokens for old, new in pairs)
    if prompts or answers:
        log.info("load.trace: %d prompts and %d answers of %d were scaled or cut", prompts, answers, len(pairs))


def _fit(arrival: Arrival, trace: TraceConfig) -> Arrival:
    return msgspec.structs.replace(
        arrival,
        prompt_tokens=_length(arrival.prompt_tokens, trace.prompt_scale, trace.max_prompt_tokens),
        answer_tokens=_length(arrival.answer_tokens, trace.answer_scale, trace.max_answer_tokens),
    )


def _length(tokens: int | None, scale: float, longest: int | None) -> int:
    scaled = max(1, round((tokens or 0) * scale))
    return scaled if longest is None else min(scaled, longest)


class BlockText:
    """Prompts of a trace that names the blocks of each prompt: equal names, equal tokens.

    vocabulary: token ids to draw from, two different ones at least. scale: what a block of BLOCK_TOKENS shrinks to.
    """

    def __init__(self, vocabulary: Iterable[int], scale: float, seed: int) -> None:
        self._vocabulary, self._scale, self._seed = np.array(sorted(set(vocabulary))), scale, seed
        # Blocks that begin many prompts are drawn once; all blocks of a long trace would not fit into memory.
        self._of_block = lru_cache(4096)(self._drawn)

    def prompt(self, blocks: Sequence[int], length: int, own: int) -> tuple[int, ...]:
        """length tokens: those of the blocks in order, cut; own: names the block that follows if they are too few."""
        ids: list[int] = []
        for block, size in zip(blocks, self._sizes(), strict=False):
            if len(ids) >= length:
                break
            ids += self._of_block(block, own=False)[:size]
        if len(ids) < length:
            ids += self._drawn(own, own=True, tokens=length - len(ids))
        return tuple(ids[:length])

    def _sizes(self) -> Iterator[int]:
        """Tokens of the first, second, ... block; rounded at their borders, so that they add up to a scaled prompt."""
        index = 0
        while True:
            index += 1
            yield round(index * BLOCK_TOKENS * self._scale) - round((index - 1) * BLOCK_TOKENS * self._scale)

    def _drawn(self, name: int, own: bool, tokens: int | None = None) -> list[int]:
        size = int(BLOCK_TOKENS * self._scale) + 2 if tokens is None else tokens
        rng = np.random.default_rng([self._seed, 2 + own, name])
        drawn: list[int] = self._vocabulary[rng.integers(len(self._vocabulary), size=size)].tolist()
        return drawn
