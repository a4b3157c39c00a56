"""The table of a step: what one that is filled step after step says is what each row's own numbers say."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest
from helpers import cache_slots, request
from hypothesis import given, settings
from hypothesis import strategies as st

from clif.adapters.slots import SlotTable
from clif.config import EngineConfig
from clif.engine.scheduler import Chunk, Scheduler
from clif.engine.step_rows import KNOWN, NO_SLOT, StepRows
from clif.kernels.step_table import INITIAL_BLOCKS

CONFIG = EngineConfig(kv_tokens=120, block_size=4, max_batch=5, max_prefill_tokens=12)
CAPACITY = CONFIG.max_batch + CONFIG.max_prefill_tokens


def check(rows: StepRows, chunks: Seq[Chunk]) -> None:
    """Fill them, and compare with each row's own numbers, one row after the other."""
    rows.fill(chunks)
    table, row, sampled = rows.table, 0, list[int]()
    assert table.sequences == len(chunks) and table.rows == sum(chunk.stop - chunk.start for chunk in chunks)
    late = False
    for index, chunk in enumerate(chunks):
        sequence, slots = chunk.sequence, cache_slots(chunk.sequence.blocks, CONFIG.block_size, chunk.start, chunk.stop)
        for position in range(chunk.start, chunk.stop):
            known = position < len(sequence.tokens)
            late |= not known
            assert table.ids[row] == (sequence.tokens[position] if known else 0)
            assert table.positions[row] == position and table.context[row] == position + 1
            assert table.cache_slots[row] == slots[position - chunk.start] and table.sequence[row] == index
            assert table.adapters[row] == (NO_SLOT if sequence.slot is None else sequence.slot)
            assert not rows.late or rows.sources[row] == (KNOWN if known else sequence.sampled_at)
            row += 1
        needed = -(-chunk.stop // CONFIG.block_size)
        assert table.blocks[index, :needed].tolist() == sequence.blocks[:needed]
        if chunk.needs_sampling:
            sampled.append(row - 1)
    assert rows.late == late and rows.ends[: rows.sampling].tolist() == sampled
    assert table.adapted == any(chunk.sequence.slot is not None for chunk in chunks)


class Schedule:
    """Random requests before a scheduler; each step fills the same rows, and others that know nothing."""

    def __init__(self, seed: int, overlap: bool) -> None:
        self.random, self.overlap = random.Random(seed), overlap
        self.slots = SlotTable(3)
        self.scheduler = Scheduler(CONFIG, self.slots, (), lambda ids: "")
        self.rows = StepRows(CAPACITY, CONFIG.max_batch, CONFIG.block_size)
        self.added, self.under_way = 0, list[Chunk]()

    def add(self) -> None:
        # Few beginnings, so that blocks are shared.
        prompt = [self.random.randrange(2)] * self.random.randrange(1, 20)
        self.scheduler.add(request(self.added, prompt, max_tokens=self.random.randrange(1, 60), ignore_eos=True), 0.0)
        self.added += 1

    def cancel(self) -> None:
        self.scheduler.cancel(self.random.randrange(self.added + 1))

    def promote(self) -> None:
        slot = self.slots.free_slot()
        if slot is not None:
            self.slots.promote(self.slots.active + 1, slot)

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        if chunks:
            check(StepRows(CAPACITY, CONFIG.max_batch, CONFIG.block_size), chunks)
            check(self.rows, chunks)
        for i, chunk in enumerate(chunk for chunk in chunks if chunk.needs_sampling):
            chunk.sequence.sampled_at = i
        settled, self.under_way = (self.under_way, chunks) if self.overlap else (chunks, [])
        tokens = [self.random.randrange(90) for chunk in settled if chunk.needs_sampling]
        self.scheduler.settle(settled, tokens, 1.0)


ACTIONS = st.sampled_from(["step"] * 12 + ["add"] * 4 + ["cancel", "promote"])


@settings(deadline=None, max_examples=60)
@given(st.lists(ACTIONS, min_size=20, max_size=80), st.integers(0, 2**32), st.booleans())
def test_steps_filled_one_after_the_other_are_those_filled_from_nothing(actions, seed, overlap):
    schedule = Schedule(seed, overlap)
    for action in ("add", "add", *actions):
        getattr(schedule, action)()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_sequence_of_any_length_has_its_blocks_in_the_table_and_all_else_stays_in_its_place(overlap):
    schedule = Schedule(0, overlap)
    schedule.scheduler.add(request(0, [1, 2, 3], max_tokens=4 * INITIAL_BLOCKS + 9, ignore_eos=True), 0.0)
    table = schedule.rows.table
    places = [t.data_ptr() for t in (table.ids, table.positions, table.cache_slots, table.context, table.adapters)]
    while schedule.scheduler.running or schedule.scheduler.waiting:
        schedule.step()
    assert table.max_blocks == 2 * INITIAL_BLOCKS
    assert places == [
        t.data_ptr() for t in (table.ids, table.positions, table.cache_slots, table.context, table.adapters)
    ]
