"""Iteration-level scheduling: which sequences take part in the next tick, and what becomes of them. Free of torch.

Invariants: a sequence reads one adapter version from its admission to its end; all the KV blocks that it can
ever need are reserved at admission, so that a running sequence never has to stop for memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clif.adapters.slots import SlotTable
from clif.config import EngineConfig
from clif.replica.blocks import BlockPool
from clif.types import FinishReason, Request, TokenEvent


@dataclass
class Sequence:
    """A request inside a replica. tokens: prompt and answer; computed: how many have their KV in the cache.

    arrived_s and last_s (time of the last token) are on the engine's clock.
    """

    request: Request
    arrived_s: float
    tokens: list[int]
    version: int = -1
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    last_s: float | None = None
    rng: Any = None

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a sequence to be computed in a tick; samples: its last logits choose a token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.sequence.tokens)

    @property
    def is_decode(self) -> bool:
        return self.stop - self.start == 1 and self.start >= len(self.sequence.request.prompt)


class Scheduler:
    """Waiting and running sequences of one replica."""

    def __init__(
        self, config: EngineConfig, slots: SlotTable, eos_ids: tuple[int, ...], decode: Callable[[list[int]], str]
    ) -> None:
        self.config, self.slots = config, slots
        self.max_batch = config.max_batch
        self.pool = BlockPool(config.kv_tokens, config.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._eos_ids, self._decode = frozenset(eos_ids), decode

    def add(self, request: Request, now: float) -> None:
        self.waiting.append(Sequence(request, now, list(request.prompt)))

    def cancel(self, request_id: int) -> TokenEvent | None:
        """End a request now. None if it is not here (any more)."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request.id == request_id:
                return self._end(sequence, (), FinishReason.CANCELLED, "cancelled by the client")
        return None

    def schedule(self) -> list[Chunk]:
        """Chunks of the next tick: one token for each running answer, then prompt tokens within the tick's budget.

        Sorted by adapter slot, so that each adapter's rows lie together.
        """
        self._admit()
        chunks, budget = [], self.config.max_prefill_tokens
        for sequence in self.running:
            left = len(sequence.tokens) - sequence.computed
            if left > 1 or sequence.computed < len(sequence.request.prompt):
                left = min(left, budget)
                budget -= left
            if left:
                chunks.append(Chunk(sequence, sequence.computed, sequence.computed + left))
        return sorted(chunks, key=lambda c: (c.sequence.slot is not None, c.sequence.slot or 0))

    def settle(self, chunks: list[Chunk], tokens: list[int], now: float) -> list[TokenEvent]:
        """Take the tick's outcome: tokens holds one token for each chunk that samples, in order."""
        chosen = iter(tokens)
        events = []
        for chunk in chunks:
            chunk.sequence.computed = chunk.stop
            if chunk.samples:
                events.append(self._append(chunk.sequence, next(chosen), now))
        return events

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            blocks = self.pool.take(len(sequence.request.prompt) + sequence.request.sampling.max_tokens)
            if blocks is None:
                return
            sequence.blocks = blocks
            sequence.version = self.slots.acquire()
            sequence.slot = self.slots.slot_of(sequence.version)
            self.running.append(self.waiting.popleft())

    def _append(self, sequence: Sequence, token: int, now: float) -> TokenEvent:
        sequence.tokens.append(token)
        sequence.last_s = now
        sampling = sequence.request.sampling
        if token in self._eos_ids and not sampling.ignore_eos:
            return self._end(sequence, (token,), FinishReason.STOP)
        if sampling.stop:
            text = self._decode(sequence.answer)
            cuts = [at for at in (text.find(stop) for stop in sampling.stop) if at >= 0]
            if cuts:
                return self._end(sequence, (token,), FinishReason.STOP, text=text[: min(cuts)])
        if len(sequence.answer) >= sampling.max_tokens:
            return self._end(sequence, (token,), FinishReason.LENGTH)
        return TokenEvent(request_id=sequence.request.id, tokens=(token,), version=sequence.version)

    def _end(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        finish: FinishReason,
        detail: str = "",
        text: str | None = None,
    ) -> TokenEvent:
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.give_back(sequence.blocks)
            self.slots.release(sequence.version)
        else:
            self.waiting.remove(sequence)
        return TokenEvent(
            request_id=sequence.request.id,
            tokens=tokens,
            version=max(sequence.version, 0),
            finish=finish,
            detail=detail,
            text=text,
        )
