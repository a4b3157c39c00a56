"""KV memory on demand: preempted requests go on where they were, equal beginnings are computed once, nobody starves.

The model is a stand-in: the KV of a token is (version, all tokens up to it), and each row checks what it reads.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from helpers import answer, cache_slots, request
from hypothesis import given, settings
from hypothesis import strategies as st

from clif.adapters.slots import SlotTable
from clif.config import EngineConfig
from clif.engine.scheduler import Chunk, Scheduler, Sequence
from clif.types import FinishReason, Request, TokenEvent

EOS = 0


def next_token(version: int, tokens: list[int]) -> int:
    number = hash((version, tuple(tokens)))
    return 1 + number % 90 if number % 13 else EOS


def expected(version: int, prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(version, tokens))
    return tokens[len(prompt) :]


class Bench:
    """A scheduler with the stand-in model, which checks at every step what must always hold.

    overlap: a step is settled only after the next one was scheduled and computed. window: tokens that a row sees.
    """

    def __init__(self, overlap: bool = False, window: int | None = None, **config: int) -> None:
        fields = {"kv_tokens": 64, "block_size": 4, "max_batch": 4, "max_prefill_tokens": 16, **config}
        self.config, self.slots = EngineConfig(**fields), SlotTable(3)
        self.scheduler = Scheduler(self.config, self.slots, (EOS,), lambda ids: "", window=window)
        self.cache: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[TokenEvent]] = {}
        self.rows = 0
        self.overlap = overlap
        self.under_way: tuple[list[Chunk], list[int]] = ([], [])
        self.in_flight: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, prompt: list[int], max_tokens: int, stops: bool = False) -> int:
        id = len(self.requests)
        self.requests[id], self.events[id] = request(id, prompt, max_tokens=max_tokens, ignore_eos=not stops), []
        self._take([self.scheduler.add(self.requests[id], 0.0)])
        return id

    def cancel(self, id: int) -> None:
        self._take([self.scheduler.cancel(id)])
        assert self.scheduler.cancel(id) is None

    def promote(self) -> None:
        slot = self.slots.free_slot()
        if slot is not None:
            self.slots.promote(self.slots.active + 1, slot)

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        self.check_memory()
        prefill = sum(c.stop - c.start for c in chunks if not c.is_decode)
        assert prefill <= self.config.max_prefill_tokens
        assert len({c.sequence.request.id for c in chunks}) == len(chunks)
        for chunk in chunks:
            self._write(chunk)
        for chunk in chunks:
            self._read(chunk)
        self.rows += sum(c.stop - c.start for c in chunks)
        sampling = [c.sequence for c in chunks if c.needs_sampling]
        chosen = [next_token(s.version, self.all_tokens(s)) for s in sampling]
        for sequence, token in zip(sampling, chosen, strict=True):
            self.in_flight[sequence.request.id].append(token)
        step = (chunks, chosen)
        if self.overlap:
            step, self.under_way = self.under_way, step
        self._settle(*step)
        return chunks

    def _settle(self, chunks: list[Chunk], chosen: list[int]) -> None:
        for chunk in chunks:
            if chunk.needs_sampling:
                self.in_flight[chunk.sequence.request.id].pop(0)
        self._take(self.scheduler.settle(chunks, chosen, 1.0))

    def all_tokens(self, sequence: Sequence) -> list[int]:
        """All tokens, those in flight included."""
        return [*sequence.tokens, *self.in_flight[sequence.request.id]]

    def drain(self) -> None:
        for _ in range(5000):
            if not (self.scheduler.running or self.scheduler.waiting or self.under_way[0]):
                return
            settled = self.under_way[0]
            assert self.step() or settled, "a step with requests and without work would be for ever"
        raise AssertionError("requests never end")

    def check_memory(self) -> None:
        pool, running, waiting = self.scheduler.pool, self.scheduler.running, self.scheduler.waiting
        ended = {c.sequence.request.id: c.sequence for c in self.under_way[0] if c.sequence.ended}
        held = Counter(block for s in (*running, *ended.values()) for block in s.blocks[s.released :])
        assert all(pool.ref_count(block) == held[block] for block in range(pool.total))
        assert sorted([*pool._free, *pool._cached, *held]) == list(range(pool.total))
        assert pool.used_tokens == len(held) * pool.block_size <= self.config.kv_tokens
        assert all(not s.blocks and not s.num_computed_tokens for s in waiting)
        ids = [s.request.id for s in (*running, *waiting)]
        assert ids == sorted(ids), "oldest first"
        readers = Counter(s.version for s in (*running, *waiting, *ended.values()) if s.version >= 0)
        assert all(entry.readers == readers[v] for v, entry in self.slots._versions.items())
        assert set(readers) <= set(self.slots._versions)

    def ended_well(self) -> None:
        """Every request got one terminal event, its last, and the tokens of one version until then."""
        self.check_memory()
        assert self.scheduler.pool.used_tokens == 0 and self.slots.retiring == ()
        for id, events in self.events.items():
            asked = self.requests[id]
            assert [e.finish is not None for e in events] == [False] * (len(events) - 1) + [True]
            (version,) = {e.version for e in events}
            got = answer(events)
            assert got == expected(version, asked.prompt, len(got))
            assert events[-1].finish is not FinishReason.LENGTH or len(got) == asked.sampling.max_tokens
            if not asked.sampling.ignore_eos:
                assert EOS not in got[:-1] and (events[-1].finish is FinishReason.STOP) == (got[-1:] == [EOS])

    def sequence(self, id: int) -> Sequence:
        both = (*self.scheduler.running, *self.scheduler.waiting)
        return next(s for s in both if s.request.id == id)

    def _cache_slots(self, chunk: Chunk) -> list[int]:
        return cache_slots(chunk.sequence.blocks, self.config.block_size, 0, chunk.stop)

    def _write(self, chunk: Chunk) -> None:
        sequence, pool = chunk.sequence, self.scheduler.pool
        assert chunk.stop == sequence.num_computed_tokens
        for i, slot in list(enumerate(self._cache_slots(chunk)))[chunk.start :]:
            block = slot // self.config.block_size
            assert pool.ref_count(block) == 1 and not pool._table.finds(block), "nobody writes what another may read"
            self.cache[slot] = (sequence.version, tuple(self.all_tokens(sequence)[: i + 1]))

    def _read(self, chunk: Chunk) -> None:
        first = 0 if self.scheduler.window is None else max(0, chunk.start + 1 - self.scheduler.window)
        for i, slot in list(enumerate(self._cache_slots(chunk)))[first:]:
            assert self.scheduler.pool.ref_count(slot // self.config.block_size)
            assert self.cache[slot] == (chunk.sequence.version, tuple(self.all_tokens(chunk.sequence)[: i + 1]))

    def _take(self, events: list[TokenEvent | None]) -> None:
        for event in events:
            if event is not None:
                self.events[event.request_id].append(event)


# --- on demand


def test_blocks_are_taken_as_tokens_are_computed():
    bench = Bench()
    bench.add([1] * 6, max_tokens=50)
    bench.step()
    used = [bench.scheduler.pool.used_tokens]
    for _ in range(3):
        bench.step()
        used.append(bench.scheduler.pool.used_tokens)
    assert used == [8, 8, 8, 12]


def test_requests_run_together_that_could_not_if_each_had_its_longest_answer_reserved():
    bench = Bench()
    for _ in range(4):
        bench.add([1, 2], max_tokens=60)
    bench.step()
    assert len(bench.scheduler.running) == 4


def test_a_prompt_is_admitted_when_there_is_room_for_it_beside_the_next_blocks_of_the_others():
    bench = Bench(kv_tokens=32)
    bench.add([1] * 12, max_tokens=12)
    bench.add([2] * 9, max_tokens=8)
    bench.step()
    assert len(bench.scheduler.running) == 2, "24 + 5 of the first, 9 + 3 of the second"
    bench.add([3] * 3, max_tokens=1)
    bench.step()
    assert bench.events[2] == [], "the one block that is left may be needed by the first two next"
    assert bench.scheduler.preemptions == 0
    bench.drain()
    bench.ended_well()


def test_admission_counts_what_admitted_prompts_have_still_to_take():
    bench = Bench(max_prefill_tokens=4)
    bench.add([1] * 40, max_tokens=4)
    bench.add([2] * 30, max_tokens=4)
    bench.drain()
    assert bench.scheduler.preemptions == 0


def test_a_request_that_fills_the_whole_cache_is_served_and_a_longer_one_is_rejected():
    bench = Bench()
    fits, long_prompt, long_answer = bench.add([1] * 63, 1), bench.add([1] * 64, 1), bench.add([1], 64)
    bench.drain()
    bench.ended_well()
    ends = [bench.events[i][-1].finish for i in (fits, long_prompt, long_answer)]
    assert ends == [FinishReason.LENGTH, FinishReason.REJECTED, FinishReason.REJECTED]
    assert "engine.kv_tokens is 64" in bench.events[long_prompt][0].detail


def test_blocks_that_no_layer_looks_back_to_are_given_back_and_are_found_by_others_until_they_are_needed():
    bench = Bench(window=6, kv_tokens=64)
    bench.add([1] * 30, max_tokens=30)
    used = []
    for _ in range(30):
        bench.step()
        used.append(bench.scheduler.pool.used_tokens)
    assert max(used[2:]) <= 16, "the window, and the blocks that it begins and ends in"
    bench.add([1] * 30, max_tokens=2)
    bench.drain()
    bench.ended_well()
    assert bench.scheduler.reused_tokens > 0


def test_a_model_of_which_a_layer_sees_the_whole_context_keeps_all_blocks():
    bench = Bench(kv_tokens=64)
    bench.add([1] * 30, max_tokens=30)
    for _ in range(30):
        bench.step()
    assert bench.scheduler.pool.used_tokens >= 56


# --- preemption


def crowded(**config: int) -> Bench:
    """Four requests of which two fit to their ends."""
    bench = Bench(**{"kv_tokens": 64, **config})
    for i in range(4):
        bench.add([i + 1] * 5, max_tokens=24)
    return bench


def run_until_preempted(bench: Bench) -> None:
    while not bench.scheduler.preemptions:
        bench.step()


def chunks_of(bench: Bench, sequence: Sequence) -> list[tuple[int, int, bool]]:
    """(start, size, is_decode) of the sequence's chunk in one step, if it has one."""
    seen: list[tuple[int, int, bool]] = []
    settle = bench.scheduler.settle

    def look(chunks, tokens, now):
        seen.extend((c.start, c.stop - c.start, c.is_decode) for c in chunks if c.sequence is sequence)
        return settle(chunks, tokens, now)

    bench.scheduler.settle = look
    bench.step()
    bench.scheduler.settle = settle
    return seen


def test_preempted_request_goes_on_with_the_same_tokens():
    for reuse in (True, False):
        bench = crowded(prefix_reuse=reuse)
        bench.drain()
        bench.ended_well()
        assert bench.scheduler.preemptions > 0
        assert all(len(answer(events)) == 24 for events in bench.events.values())


def test_the_youngest_is_preempted_and_waits_before_those_that_never_ran():
    bench = crowded()
    bench.step()
    bench.add([9], max_tokens=2)
    run_until_preempted(bench)
    assert [s.request.id for s in bench.scheduler.running] == [0, 1, 2]
    assert [s.request.id for s in bench.scheduler.waiting] == [3, 4]
    bench.drain()
    bench.ended_well()


def test_preempted_request_keeps_version_slot_and_last_token_time():
    bench = crowded()
    bench.promote()
    bench.step()
    sequence = bench.sequence(3)
    run_until_preempted(bench)
    bench.promote()
    assert (sequence.version, sequence.slot, sequence.last_s) == (1, 0, 1.0)
    assert bench.slots.retiring == (1,), "it reads its version while it waits"
    tokens = list(sequence.tokens)
    while sequence in bench.scheduler.waiting:
        bench.step()
    assert (sequence.version, sequence.slot) == (1, 0) and sequence.tokens[: len(tokens)] == tokens
    bench.drain()
    bench.ended_well()


def test_oldest_request_always_finishes():
    """And is never slowed: a token at every step, however many others want its blocks."""
    bench = Bench(kv_tokens=32, block_size=4, max_batch=8)
    for i in range(8):
        bench.add([i + 1], max_tokens=31)
    for _ in range(31):
        bench.step()
    assert bench.events[0][-1].finish is FinishReason.LENGTH
    bench.drain()
    bench.ended_well()


def test_recomputing_is_prefill_within_the_budget_and_the_last_token_is_decode():
    bench = crowded(prefix_reuse=False, max_prefill_tokens=4)
    run_until_preempted(bench)
    sequence = bench.sequence(3)
    had = len(sequence.tokens)
    mine = []
    while len(sequence.tokens) < had + 2:
        mine += [(size, decode) for _, size, decode in chunks_of(bench, sequence)]
    assert sum(size for size, _ in mine) == had + 1
    assert all(size <= 4 for size, decode in mine if not decode) and mine[-1] == (1, True)


def test_one_recomputed_token_in_the_middle_is_prefill():
    bench = crowded(prefix_reuse=False, max_prefill_tokens=1)
    run_until_preempted(bench)
    sequence = bench.sequence(3)
    kinds = []
    had = len(sequence.tokens)
    while len(sequence.tokens) == had:
        kinds += [(start, decode) for start, _, decode in chunks_of(bench, sequence)]
    assert kinds == [(i, i == had - 1) for i in range(had)]


def test_cancelling_a_preempted_request_ends_it_once_and_releases_its_version():
    bench = crowded()
    run_until_preempted(bench)
    bench.promote()
    assert bench.sequence(3) in bench.scheduler.waiting
    bench.cancel(3)
    assert bench.events[3][-1].finish is FinishReason.CANCELLED and bench.events[3][-1].version == 0
    bench.drain()
    bench.ended_well()


def test_preempted_request_finds_what_is_left_of_its_own_blocks_also_after_a_promotion():
    bench = crowded()
    run_until_preempted(bench)
    sequence = bench.sequence(3)
    had = len(sequence.tokens)
    bench.promote()
    for id in range(3):
        bench.cancel(id)
    ((start, size, _),) = chunks_of(bench, sequence)
    assert start > 0 and start + size == had and bench.scheduler.reused_tokens == 0
    bench.drain()
    bench.ended_well()


# --- reuse


def test_a_known_beginning_is_not_computed_again():
    bench = Bench(kv_tokens=128)
    system = list(range(1, 14))
    bench.add([*system, 50], max_tokens=2)
    bench.drain()
    before = bench.rows
    bench.add([*system, 60], max_tokens=2)
    bench.drain()
    assert bench.scheduler.reused_tokens == 12 and bench.rows - before == 14 + 1 - 12
    bench.ended_well()


def test_the_next_turn_of_a_conversation_finds_prompt_and_answer():
    bench = Bench(kv_tokens=128)
    first = bench.add([1] * 6, max_tokens=7)
    bench.drain()
    bench.add([*[1] * 6, *answer(bench.events[first]), 8], max_tokens=3)
    bench.drain()
    assert bench.scheduler.reused_tokens == 12
    bench.ended_well()


def test_an_equal_prompt_computes_its_last_token_only_and_that_is_decode():
    bench = Bench(kv_tokens=128)
    bench.add([1] * 9, max_tokens=2)
    bench.drain()
    bench.add([1] * 9, max_tokens=2)
    (chunk,) = bench.scheduler.schedule()
    assert (chunk.start, chunk.stop, chunk.is_decode) == (8, 9, True)


def test_running_requests_share_blocks_and_the_memory_counts_once():
    bench = Bench(kv_tokens=128)
    for _ in range(3):
        bench.add([1] * 13, max_tokens=4)
        bench.step()
    shared = [tuple(s.blocks[:3]) for s in bench.scheduler.running]
    assert len(set(shared)) == 1 and bench.scheduler.pool.used_tokens == 4 * (3 + 3)
    bench.drain()
    bench.ended_well()


def test_a_prefix_is_reused_by_requests_of_its_own_version_only():
    bench = Bench(kv_tokens=256)
    reused = []
    for _ in range(3):
        for _ in range(2):
            bench.add([1] * 13, max_tokens=3)
            bench.drain()
            reused.append(bench.scheduler.reused_tokens)
        bench.promote()
    assert reused == [0, 12, 12, 24, 24, 36]
    bench.ended_well()


def test_reuse_can_be_switched_off():
    bench = Bench(kv_tokens=128, prefix_reuse=False)
    for _ in range(2):
        bench.add([1] * 13, max_tokens=3)
        bench.drain()
    assert bench.scheduler.reused_tokens == 0 and len(bench.scheduler.pool._free) == bench.scheduler.pool.total


def test_cached_blocks_never_keep_a_request_out():
    bench = Bench()
    for i in range(10):
        bench.add([i + 1] * 40, max_tokens=20)
        bench.drain()
    bench.ended_well()


# --- everything together

Prompt = st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(0, 3)).map(
    # Long common beginnings, a few different ends.
    lambda p: [10 + p[0]] * p[1] + [p[2]]
)
Step = st.one_of(
    st.tuples(st.just("add"), Prompt, st.integers(1, 20), st.booleans()),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("promote")),
    st.tuples(st.just("batch"), st.integers(1, 6)),
)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(Step, max_size=40),
    blocks=st.integers(3, 24),
    block_size=st.sampled_from([1, 3, 4]),
    budget=st.integers(1, 20),
    reuse=st.booleans(),
    overlap=st.booleans(),
    window=st.sampled_from([None, 1, 2, 5, 9, 30]),
)
def test_every_request_ends_once_with_its_own_tokens_whatever_happens(
    steps, blocks, block_size, budget, reuse, overlap, window
):
    memory = {"kv_tokens": blocks * block_size, "block_size": block_size}
    bench = Bench(overlap, window, **memory, max_prefill_tokens=budget, prefix_reuse=reuse)
    for step, *args in steps:
        if step == "add":
            bench.add(*args)
        elif step == "step":
            for _ in range(args[0]):
                bench.step()
        elif step == "cancel" and args[0] < len(bench.requests):
            bench.cancel(args[0])
        elif step == "promote":
            bench.promote()
        elif step == "batch":
            bench.scheduler.max_batch = args[0]
        bench.check_memory()
    bench.drain()
    bench.ended_well()
