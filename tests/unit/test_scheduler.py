"""Who runs in a step: first come first served, within blocks, capacity and the prompt budget."""

from __future__ import annotations

import msgspec
from helpers import request

from clif.adapters.slots import SlotTable
from clif.config import EngineConfig
from clif.engine.scheduler import Scheduler
from clif.types import FinishReason


def make(**config: int) -> Scheduler:
    fields = {"kv_tokens": 160, "block_size": 8, "max_batch": 4, "max_prefill_tokens": 16, **config}
    return Scheduler(EngineConfig(**fields), SlotTable(3), (0,), lambda ids: "".join(chr(97 + i % 26) for i in ids))


def step(scheduler: Scheduler, token: int = 5, now: float = 0.0):
    chunks = scheduler.schedule()
    return chunks, scheduler.settle(chunks, [token] * sum(c.needs_sampling for c in chunks), now)


def test_a_large_request_at_the_head_is_not_overtaken():
    scheduler = make()
    for i, size in enumerate((100, 100, 10)):
        scheduler.add(request(i, [i] * size, max_tokens=8), 0.0)
    step(scheduler)
    assert [s.request.id for s in scheduler.waiting] == [1, 2]


def test_long_prompts_go_in_chunks_beside_running_answers():
    scheduler = make()
    scheduler.add(request(0, [1] * 4, max_tokens=20), 0.0)
    step(scheduler)
    scheduler.add(request(1, [2] * 40, max_tokens=4), 0.0)
    sizes = []
    for _ in range(3):
        chunks, events = step(scheduler)
        sizes.append([c.stop - c.start for c in chunks])
    assert sizes == [[1, 16], [1, 16], [1, 8]]
    assert {e.request_id for e in events} == {0, 1}, "the last chunk gives the first token"


def test_a_step_that_only_continues_answers_is_foreseen():
    """What is known beforehand of each step is what it then has, while the pool has room."""
    scheduler, seen = make(kv_tokens=1600, max_batch=2), []
    for i, size in enumerate((4, 40, 6)):
        scheduler.add(request(i, [1] * size, max_tokens=6), 0.0)
    assert not make().next_decodes
    while scheduler.sequences:
        foreseen = scheduler.next_decodes
        chunks, _ = step(scheduler)
        assert foreseen == all(chunk.is_decode for chunk in chunks)
        seen.append(foreseen)
    assert True in seen and False in seen


def test_rows_of_one_adapter_lie_together_base_first():
    scheduler = make(kv_tokens=1600)
    for i, version in enumerate((0, 1, 1, 2)):
        if version > scheduler.slots.active:
            scheduler.slots.promote(version, version - 1)
        scheduler.add(request(i, [3, 4], max_tokens=9), 0.0)
        step(scheduler)
    scheduler.running.reverse()
    assert [c.sequence.slot for c in scheduler.schedule()] == [None, 0, 0, 1]


def pinned(id, version, prompt=(3, 4), **sampling):
    return msgspec.structs.replace(request(id, list(prompt), **sampling), version=version)


def test_a_pinned_request_reads_its_version_whatever_is_active_and_keeps_it_while_it_waits():
    scheduler = make(max_batch=1)
    scheduler.slots.keep((1, 2))
    for version in (1, 2):
        scheduler.slots.promote(version, version - 1)
    for i, version in enumerate((1, 0, None)):
        assert scheduler.add(pinned(i, version, max_tokens=2), 0.0) is None
    scheduler.slots.keep(())
    assert scheduler.slots.retiring == (1, 0), "both are read by requests that wait"
    found = {}
    while scheduler.sequences:
        found |= {e.request_id: e.version for e in step(scheduler)[1]}
    assert found == {0: 1, 1: 0, 2: 2} and scheduler.slots.retiring == ()


def test_a_pinned_request_whose_version_is_not_held_fails_with_a_sentence():
    scheduler = make()
    event = scheduler.add(pinned(0, 7), 0.0)
    assert event.finish is FinishReason.FAILED and not scheduler.sequences
    assert event.detail == "adapter version 7 is not kept any more: ask for another one"


def test_a_pinned_request_of_a_lost_replica_goes_on_only_under_its_own_version():
    scheduler = make(max_batch=2)
    scheduler.slots.keep((1,))
    for version in (1, 2):
        scheduler.slots.promote(version, version - 1)
    scheduler.add(pinned(0, 1), 0.0, output_ids=(5, 6), version=1)
    scheduler.add(pinned(1, 1), 0.0, output_ids=(5, 6), version=2)
    assert [(s.version, s.output_ids) for s in scheduler.sequences] == [(1, [5, 6]), (1, [])]


def test_batch_bound_may_change_while_requests_run():
    scheduler = make(kv_tokens=1600)
    for i in range(4):
        scheduler.add(request(i, [3], max_tokens=3), 0.0)
    scheduler.max_batch = 1
    step(scheduler)
    assert len(scheduler.running) == 1
    scheduler.max_batch = 3
    step(scheduler)
    assert len(scheduler.running) == 3


def test_ends_are_stop_length_and_cancelled():
    scheduler = make(kv_tokens=1600)
    scheduler.add(request(0, [3], max_tokens=2), 0.0)
    scheduler.add(request(1, [3], max_tokens=5, ignore_eos=True), 0.0)
    _, events = step(scheduler, token=0)
    assert [(e.request_id, e.finish) for e in events] == [(0, FinishReason.STOP), (1, None)]
    scheduler.add(request(2, [3]), 0.0)
    assert scheduler.cancel(2).finish is FinishReason.CANCELLED, "also while it waits"
    assert scheduler.cancel(9) is None


def test_the_prompt_budget_is_shared_first_come_first_served():
    scheduler = make(kv_tokens=1600)
    for i in range(3):
        scheduler.add(request(i, [1] * 10, max_tokens=4), 0.0)
    assert [(c.sequence.request.id, c.stop - c.start) for c in scheduler.schedule()] == [(0, 10), (1, 6)]


def test_cancelling_a_waiting_request_takes_nothing_and_a_running_one_gives_all_back():
    scheduler = make(max_batch=1)
    for i in range(2):
        scheduler.add(request(i, [1] * 8, max_tokens=8), 0.0)
    step(scheduler)
    used = scheduler.pool.used_tokens
    scheduler.cancel(1)
    assert used > 0 and scheduler.pool.used_tokens == used and not scheduler.waiting
    scheduler.slots.promote(1, 0)
    event = scheduler.cancel(0)
    assert event.version == 0 and scheduler.pool.used_tokens == 0 and scheduler.slots.retiring == ()


def test_a_step_launched_past_a_stop_is_thrown_away_and_leaves_no_trace():
    """What it reads is held until it is settled, and no longer: blocks, and the version (promise 2)."""
    scheduler = make()
    scheduler.add(request(0, [3] * 15, max_tokens=9), 0.0)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [(c.start, c.stop, c.needs_sampling) for c in (*first, *second)] == [(0, 15, True), (15, 16, True)]
    scheduler.slots.promote(1, 0)
    (end,) = scheduler.settle(first, [0], 0.0)
    assert end.finish is FinishReason.STOP and not scheduler.running and scheduler.schedule() == []
    assert scheduler.pool.used_tokens == 16 and scheduler.slots.retiring == (0,)
    assert scheduler.settle(second, [7], 0.0) == []
    assert scheduler.pool.used_tokens == 0 and scheduler.slots.retiring == ()
    assert scheduler.pool.acquire_cached(0, [3] * 15 + [0, 5]) == [0], "its own block of the prompt, and no later one"


def test_a_request_cancelled_between_launch_and_settle_ends_at_once_and_gives_back_when_the_step_is_settled():
    scheduler = make()
    scheduler.add(request(0, [3] * 8, max_tokens=9), 0.0)
    chunks = scheduler.schedule()
    assert scheduler.cancel(0).finish is FinishReason.CANCELLED and scheduler.cancel(0) is None
    assert scheduler.pool.used_tokens == 8
    assert scheduler.settle(chunks, [7], 0.0) == [] and scheduler.pool.used_tokens == 0


def test_no_step_is_launched_past_the_last_token_that_a_request_may_have():
    scheduler = make()
    scheduler.add(request(0, [3] * 8, max_tokens=2), 0.0)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.schedule() == []
    events = scheduler.settle(first, [7], 0.0) + scheduler.settle(second, [8], 0.0)
    assert [(e.tokens, e.finish) for e in events] == [((7,), None), ((8,), FinishReason.LENGTH)]


def test_a_request_preempted_under_way_keeps_the_token_that_the_step_chose():
    scheduler = make(kv_tokens=48, max_batch=2)
    for i in range(2):
        scheduler.add(request(i, [i + 1] * 8, max_tokens=40), 0.0)
    before = scheduler.schedule()
    for _ in range(40):
        chunks = scheduler.schedule()
        if scheduler.preemptions:
            break
        scheduler.settle(before, [5, 5], 0.0)
        before = chunks
    (waiting,) = scheduler.waiting
    had = len(waiting.tokens)
    assert waiting.num_tokens_in_flight == 1 and not waiting.blocks
    scheduler.settle(before, [5, 6], 0.0)
    assert waiting.tokens[had:] == [6] and waiting.num_tokens_in_flight == waiting.num_computed_tokens == 0
