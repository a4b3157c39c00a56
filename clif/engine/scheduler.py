"""Iteration-level scheduling: which sequences take part in the next step, and what becomes of them. Free of torch.

Invariants: a sequence reads one adapter version from its first admission to its end, also when it is preempted in
between; that is the version which its request asks for, or no token is computed; running and waiting sequences together
are always in order of arrival, and only the youngest running one is preempted. Hence the oldest sequence always
progresses and none starves.

Sources: Orca (Yu et al., OSDI 2022), for iteration-level scheduling; PagedAttention (Kwon et al., SOSP 2023), for
preemption by recomputing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from clif.adapters.slots import SlotTable
from clif.config import EngineConfig
from clif.engine.blocks import BlockPool
from clif.engine.guide import Guide
from clif.errors import InputError
from clif.text_stream import cut_at_stop
from clif.types import NO_TOKEN, FinishReason, Request, TokenEvent, TokenLogprob


@dataclass(eq=False, slots=True)
class Sequence:
    """A request inside a replica. tokens: prompt and answer, as far as they are known.

    num_computed_tokens: how many have their KV in the cache, or get it in a step that is under way.
    num_tokens_in_flight: tokens that such steps choose; num_steps_in_flight: steps under way that hold a chunk of it.
    version: -1 until the first admission, unless it is given. admitted: it has been. blocks hold at least the computed
    tokens; both are empty while it waits. released: how many of the first blocks are given back: no layer looks back as
    far. arrived_s and last_s (time of the last token) are on the engine's clock.
    sampled_at: where its token is among those of the last step in which it took one. guide: changes the logits of its
    tokens. id, max_total_tokens: the request's. ends_early: a token or a text may end its answer. scored: what is known
    of the prompt's log-probabilities, None if they are not asked for, or once they are sent.

    What each step looks at lies here and not in the request: after a forward nothing of either is in the caches.
    """

    request: Request
    arrived_s: float
    tokens: list[int]
    version: int = -1
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    released: int = 0
    num_computed_tokens: int = 0
    last_s: float | None = None
    num_tokens_in_flight: int = 0
    num_steps_in_flight: int = 0
    sampled_at: int = -1
    ended: bool = False
    admitted: bool = False
    guide: Guide | None = None
    id: int = field(init=False)
    max_total_tokens: int = field(init=False)
    ends_early: bool = field(init=False)
    scored: list[TokenLogprob] | None = field(init=False)

    def __post_init__(self) -> None:
        self.id, self.max_total_tokens = self.request.id, self.request.max_total_tokens
        self.scored = [] if self.request.sampling.prompt_logprobs else None
        self.ends_early = not self.request.sampling.ignore_eos or bool(self.request.sampling.stop)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, those in flight included."""
        return len(self.tokens) + self.num_tokens_in_flight

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is not in the cache: 1 for an answer under way, more when there is a prefill to do."""
        return len(self.tokens) + self.num_tokens_in_flight - self.num_computed_tokens


class Chunk(NamedTuple):
    """Tokens [start, stop) of a sequence to be computed in a step; needs_sampling: its last logits choose a token."""

    sequence: Sequence
    start: int
    stop: int
    needs_sampling: bool

    @property
    def is_decode(self) -> bool:
        """One row that reads the whole cache of its sequence, whether its token is of the answer or of the prompt."""
        return self.needs_sampling and self.stop - self.start == 1


class Scheduler:
    """Waiting and running sequences of one replica, both oldest first.

    preemptions: how often a running sequence lost its blocks; its tokens are computed again, none is sent twice.
    reused_tokens: prompt tokens that were found in the cache when their request was first admitted. guide_of: makes the
    guide of a request, and raises InputError for one that cannot be enforced. window: tokens that any layer looks back
    over at most; None: one sees the whole context.
    """

    def __init__(
        self,
        config: EngineConfig,
        slots: SlotTable,
        eos_ids: tuple[int, ...],
        decode: Callable[[list[int]], str],
        guide_of: Callable[[Request], Guide | None] = lambda request: None,
        window: int | None = None,
    ) -> None:
        self.config, self.slots, self.guide_of, self.window = config, slots, guide_of, window
        self.max_batch = config.max_batch
        self.pool = BlockPool(config.num_kv_tokens, config.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.reused_tokens = 0
        self._eos_ids, self._decode, self._prefix_reuse = frozenset(eos_ids), decode, config.prefix_reuse

    def add(
        self, request: Request, now: float, output_ids: Iterable[int] = (), version: int | None = None
    ) -> TokenEvent | None:
        """Take a request in; returns the terminal event of one that the whole KV cache cannot hold, whose adapter
        version cannot be read here, or whose guide cannot be made.

        output_ids, version: what another replica has answered so far, and the adapter version that it read. The answer
        continues if that version can be read here as well; otherwise it starts over.
        """
        if request.max_total_tokens > self.config.num_kv_tokens:
            detail = f"needs {request.max_total_tokens} tokens: engine.kv_tokens is {self.config.num_kv_tokens}"
            return TokenEvent(request_id=request.id, finish=FinishReason.REJECTED, detail=detail)
        pinned = request.version
        if pinned is not None and not self.slots.holds(pinned):
            detail = f"adapter version {pinned} is not kept any more: ask for another one"
            return TokenEvent(request_id=request.id, finish=FinishReason.FAILED, detail=detail)
        try:
            guide = self.guide_of(request)
        except InputError as error:
            return TokenEvent(request_id=request.id, finish=FinishReason.FAILED, detail=str(error))
        sequence = Sequence(request, now, list(request.prompt), guide=guide)
        if version is not None and self.slots.holds(version) and pinned in (None, version):
            sequence.tokens += output_ids
            sequence.admitted = True
            self._read(sequence, version)
        elif pinned is not None:
            # From now on: it may wait for longer than the version is kept.
            self._read(sequence, pinned)
        self.waiting.append(sequence)
        return None

    def cancel(self, request_id: int) -> TokenEvent | None:
        """End a request now; returns its terminal event, None if it is not here."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request.id == request_id:
                return self._end(sequence, (), FinishReason.CANCELLED, "cancelled by the client")
        return None

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that run and wait, oldest first."""
        return (*self.running, *self.waiting)

    def limit_batch(self, max_batch: int) -> None:
        """Set how many requests run at the same time, from the next step on. Running ones continue."""
        self.max_batch = max_batch

    def next_step(self, arrivals: Iterable[Request] = ()) -> tuple[int, int]:
        """Rows and cached tokens of the next step: a token per answer, and prompts within the step's budget.

        arrivals: requests that are added before it.
        """
        answers, cached, prompts = 0, 0, sum(len(request.prompt) for request in arrivals)
        left = [sequence.num_uncomputed_tokens for sequence in self.waiting]
        for sequence in self.running:
            left.append(sequence.num_uncomputed_tokens)
            answers += left[-1] == 1
            cached += sequence.num_computed_tokens
        prompts += sum(tokens for tokens in left if tokens > 1)
        return answers + min(prompts, self.config.max_prefill_tokens), cached

    @property
    def next_decodes(self) -> bool:
        """Whether the next step only continues answers: nothing waits to be prefilled that could be."""
        waits = bool(self.waiting) and len(self.running) < self.max_batch
        return bool(self.running) and not waits and all(s.num_uncomputed_tokens <= 1 for s in self.running)

    def schedule(self) -> list[Chunk]:
        """Chunks of the next step: one token for each running answer, then tokens to prefill within the step's budget.

        Sorted by adapter slot, so that each adapter's rows lie together. Their blocks are taken, and their tokens count
        as computed: the step after it may be scheduled before this one is settled.
        """
        self._admit()
        chunks, budget = [], self.config.max_prefill_tokens
        # Preemption shortens the list from its end while the loop runs, so that no sequence with a chunk is preempted.
        for sequence in self.running:
            chunk = self._chunk(sequence, budget)
            if chunk is not None:
                chunks.append(chunk)
                size = chunk.stop - chunk.start
                if size > 1 or not chunk.needs_sampling:
                    budget -= size
        return _by_slot(chunks)

    def settle(self, chunks: list[Chunk], tokens: list[int], now: float) -> list[TokenEvent]:
        """Take a step's outcome: tokens holds one token, or NO_TOKEN, for each chunk that samples, in order.

        Steps are settled in the order in which they were scheduled, and at most one more is under way. What such a step
        computed for a sequence that has ended meanwhile is thrown away.
        """
        chosen, size = iter(tokens), self.pool.block_size
        events = []
        for sequence, start, stop, needs_sampling in chunks:
            sequence.num_steps_in_flight -= 1
            token = None
            if needs_sampling:
                sequence.num_tokens_in_flight -= 1
                token = next(chosen)
            if sequence.ended:
                self._release(sequence)
                continue
            if stop // size > start // size:
                self._register(sequence, start, stop)
                if self.window is not None and sequence.blocks:
                    sequence.released = self.pool.free_below(sequence.blocks, sequence.released, stop, self.window)
            if token is not None:
                events.append(self._append(sequence, token, now))
        return events

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch and self._start(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its version and the cached part of its tokens. False: there is no room."""
        free = sequence.version < 0
        # Rows that are not computed tell no log-probabilities.
        if self._prefix_reuse and sequence.scored is None:
            version = self.slots.active if free else sequence.version
            sequence.blocks = self.pool.acquire_cached(version, sequence.tokens)
        if sum(map(self._due, (*self.running, sequence))) > self.pool.available:
            self._free_blocks(sequence)
            return False
        sequence.num_computed_tokens = len(sequence.blocks) * self.pool.block_size
        if free:
            self._read(sequence, self.slots.active)
        if not sequence.admitted:
            self.reused_tokens += sequence.num_computed_tokens
            sequence.admitted = True
        return True

    def _read(self, sequence: Sequence, version: int) -> None:
        sequence.version = self.slots.acquire(version)
        sequence.slot = self.slots.slot_of(version)

    def _due(self, sequence: Sequence) -> int:
        """Blocks that a sequence needs soon: for its tokens, and for one block of answer more, if it gets that long."""
        soon = min(sequence.num_tokens + self.pool.block_size, sequence.max_total_tokens)
        return self.pool.blocks_for(soon) - len(sequence.blocks)

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk | None:
        start, end = sequence.num_computed_tokens, len(sequence.tokens) + sequence.num_tokens_in_flight
        if end == sequence.max_total_tokens:
            # Its last token is in flight.
            return None
        left = end - start
        size = 1 if left == 1 else min(left, budget)
        stop = start + size
        # Most answers go on in a block that they have.
        if not size or (stop > len(sequence.blocks) * self.pool.block_size and not self._make_room(sequence, stop)):
            return None
        sequence.num_computed_tokens = stop
        sequence.num_steps_in_flight += 1
        needs_sampling = stop == end
        sequence.num_tokens_in_flight += needs_sampling
        return Chunk(sequence, start, stop, needs_sampling)

    def _make_room(self, sequence: Sequence, stop: int) -> bool:
        """Blocks for tokens [0, stop), taken from the youngest if need be. False: the youngest is the sequence.

        At once, even from one in a step under way: the device does that step first, then this one.
        """
        while not self.pool.allocate(sequence.blocks, stop):
            youngest = self.running.pop()
            self._free_blocks(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True

    def _register(self, sequence: Sequence, start: int, stop: int) -> None:
        """Register the blocks that these tokens filled for others, unless the sequence has lost its blocks since."""
        if self._prefix_reuse and sequence.blocks:
            self.pool.register(sequence.version, sequence.tokens, sequence.blocks, start, stop)

    def _free_blocks(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks[sequence.released :])
        sequence.blocks, sequence.released, sequence.num_computed_tokens = [], 0, 0

    def _release(self, sequence: Sequence) -> None:
        """Give back what an ended sequence holds, once no step under way reads its blocks and its version."""
        if sequence.num_steps_in_flight:
            return
        self._free_blocks(sequence)
        if sequence.version >= 0:
            self.slots.release(sequence.version)

    def _append(self, sequence: Sequence, token: int, now: float) -> TokenEvent:
        if token == NO_TOKEN:
            why = "" if sequence.guide is None else sequence.guide.error
            detail = why or f"the logits are not finite under adapter version {sequence.version}"
            return self._end(sequence, (), FinishReason.FAILED, detail)
        sequence.tokens.append(token)
        sequence.last_s = now
        if sequence.ends_early:
            ended = self._early_end(sequence, token)
            if ended is not None:
                return ended
        if len(sequence.tokens) >= sequence.max_total_tokens:
            return self._end(sequence, (token,), FinishReason.LENGTH)
        return TokenEvent(request_id=sequence.id, tokens=(token,), version=sequence.version)

    def _early_end(self, sequence: Sequence, token: int) -> TokenEvent | None:
        """The end of an answer before its greatest length; None: it continues."""
        sampling = sequence.request.sampling
        if token in self._eos_ids and not sampling.ignore_eos:
            return self._end(sequence, (token,), FinishReason.STOP)
        if not sampling.stop:
            return None
        text = cut_at_stop(self._decode, sequence.output_ids, sampling.stop)
        return None if text is None else self._end(sequence, (token,), FinishReason.STOP, text=text)

    def _end(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        finish: FinishReason,
        detail: str = "",
        text: str | None = None,
    ) -> TokenEvent:
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        sequence.ended = True
        self._release(sequence)
        return TokenEvent(
            request_id=sequence.request.id,
            tokens=tokens,
            version=max(sequence.version, 0),
            finish=finish,
            detail=detail,
            text=text,
        )


def _by_slot(chunks: list[Chunk]) -> list[Chunk]:
    """Sorted by adapter slot; the rows of the base come first."""
    slots = [chunk.sequence.slot for chunk in chunks]
    if not chunks or slots.count(slots[0]) == len(slots):
        return chunks
    return sorted(chunks, key=lambda chunk: -1 if chunk.sequence.slot is None else chunk.sequence.slot)
