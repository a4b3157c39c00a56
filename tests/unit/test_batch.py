"""The batch of a step: filled in place, with the ids, positions, cache slots and rows that the plan names."""

from __future__ import annotations

import pytest
import torch
from helpers import request

from clif.adapters.slots import SlotTable
from clif.config import EngineConfig
from clif.engine.batch import KNOWN, Batch, BatchBuilder
from clif.engine.scheduler import Scheduler
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.dual_lora_table import RowTables, row_pairs
from clif.kernels.paged_decode_table import DecodeRow, DecodeTables
from clif.kernels.staging import Staged

CPU = torch.device("cpu")
CONFIG = EngineConfig(kv_tokens=160, block_size=4, max_batch=3, max_prefill_tokens=8)


class Steps:
    """A scheduler and its batches; the model answers 7, 8, 9 and so on to each row that samples."""

    def __init__(self, step_tables: bool = False) -> None:
        self.slots = SlotTable(2)
        self.scheduler = Scheduler(CONFIG, self.slots, (), lambda ids: "")
        self.builder = BatchBuilder(CONFIG, 100, CPU, torch.float32, step_tables=step_tables)
        self.filled: list[Batch] = []

    def launch(self, paged: bool = False) -> Batch:
        self.filled.append(self.builder.fill(self.scheduler.schedule(), paged))
        return self.filled[-1]

    def settle(self) -> None:
        batch = self.filled.pop(0)
        self.scheduler.settle(list(batch.chunks), list(range(7, 7 + sum(c.needs_sampling for c in batch.chunks))), 0.0)


def addresses(batch: Batch) -> list[int]:
    return [t.data_ptr() for t in (batch.ids, batch.positions, batch.layout.slot_mapping)]


def test_rows_lie_chunk_behind_chunk_and_the_last_of_each_complete_chunk_samples() -> None:
    steps = Steps()
    steps.scheduler.add(request(0, [11, 12, 13], max_tokens=4), 0.0)
    steps.scheduler.add(request(1, [21, 22, 23, 24, 25, 26, 27], max_tokens=4), 0.0)
    batch = steps.launch()
    assert batch.ids.tolist() == [11, 12, 13, 21, 22, 23, 24, 25] and batch.positions.tolist() == [*range(3), *range(5)]
    assert batch.ends.tolist() == [2] and batch.sources is None and batch.rows.segments == ()
    first, second = (s.blocks for s in steps.scheduler.running)
    slots = [first[0] * 4 + i for i in range(3)] + [second[i // 4] * 4 + i % 4 for i in range(5)]
    assert batch.layout.slot_mapping.tolist() == slots
    steps.settle()
    batch = steps.launch()
    assert batch.ids.tolist() == [7, 26, 27] and batch.ends.tolist() == [0, 2]


def test_a_token_that_the_host_does_not_know_yet_is_named_by_where_the_last_step_has_it() -> None:
    steps = Steps()
    for i in range(2):
        steps.scheduler.add(request(i, [10 * i + 1, 10 * i + 2], max_tokens=4), 0.0)
    steps.launch()
    steps.scheduler.add(request(2, [31, 32, 33], max_tokens=4), 0.0)
    batch = steps.launch()
    assert batch.sources is not None and batch.sources.tolist() == [0, 1, KNOWN, KNOWN, KNOWN]
    assert batch.ids[2:].tolist() == [31, 32, 33] and batch.positions.tolist() == [2, 2, 0, 1, 2]
    steps.scheduler.cancel(0)
    steps.settle()
    batch = steps.launch()
    assert batch.sources is not None and batch.sources.tolist() == [1, 2], "rows of the step before, not of this one"


def test_every_step_fills_the_same_buffers() -> None:
    """A captured graph reads them at their addresses."""
    steps = Steps()
    steps.scheduler.add(request(0, [11, 12, 13], max_tokens=30), 0.0)
    known, tables = addresses(steps.launch(paged=True)), set()
    for _ in range(12):
        steps.settle()
        batch = steps.launch(paged=True)
        assert addresses(batch) == known and batch.layout.groups == () and batch.layout.table is not None
        tables.add(id(batch.layout.table))
        assert batch.layout.table.lengths[0] == batch.positions[0] + 1
    assert len(tables) == 1


def test_where_attention_reads_the_table_of_a_step_nothing_else_is_made_of_its_rows() -> None:
    steps = Steps(step_tables=True)
    steps.scheduler.add(request(0, [11, 12, 13], max_tokens=30), 0.0)
    steps.launch()
    steps.settle()
    steps.scheduler.add(request(1, [21, 22], max_tokens=30), 0.0)
    batch = steps.launch()
    layout = batch.layout
    assert layout.step is not None and (layout.table, layout.groups, layout.prompts) == (None, (), None)
    assert layout.step.rows == 3 and layout.step.context[:3].tolist() == [4, 1, 2]
    assert torch.equal(layout.slot_mapping, layout.step.cache_slots[:3])


def test_rows_that_all_sample_are_not_named() -> None:
    steps = Steps()
    steps.scheduler.add(request(0, [11, 12, 13], max_tokens=30), 0.0)
    assert steps.launch().ends.tolist() == [2]
    steps.settle()
    assert steps.launch().ends is None


def test_adapter_rows_are_cut_into_tiles_once_for_each_height_and_refilled_from_then_on() -> None:
    tables = RowTables(CPU)
    first, second = (Segment(1, 9, 0),), (Segment(0, 3, 1), Segment(3, 13, 0))
    tables.refill(first, 12)
    made = {height: tables.of(height, 3) for height in (4, 16)}
    tables.refill(second, 13)
    for height, table in made.items():
        firsts, found = row_pairs(second, 13, height, 3)
        assert tables.of(height, 3) is table and table.counts.tolist() == [len(found)]
        assert table.firsts[: len(firsts)].tolist() == firsts
        assert table.pairs[: len(found)].tolist() == [list(pair) for pair in found]
    tables.refill(first, 200)
    assert tables.of(4, 3) is not made[4], "a larger batch has larger tables"
    tables.refill(second, 13)
    assert tables.of(4, 3) is made[4]


def test_any_segments_of_a_batch_fit_the_tables_of_its_size() -> None:
    tables = RowTables(CPU)
    tables.refill((), 128)
    table = tables.of(16, 4)
    for sizes in ([1, 1, 1, 1], [17, 17, 17, 17], [33, 31, 1, 63], [0, 128, 0, 0]):
        stops = [sum(sizes[: i + 1]) for i in range(4)]
        segments = tuple(Segment(b - n, b, i) for i, (n, b) in enumerate(zip(sizes, stops, strict=True)) if n)
        tables.refill(segments, 128)
        assert tables.of(16, 4) is table


def test_decode_tables_are_made_for_powers_of_two() -> None:
    tables = DecodeTables(4, CPU)
    rows = [DecodeRow(i, 9 + i, range(30)) for i in range(5)]
    made = tables.refill(rows)
    assert tables.refill(rows[:6]) is made and tables.refill(rows[:4]) is not made
    assert tables.refill([DecodeRow(0, 100, range(30))] * 5) is not made
    with pytest.raises(ValueError, match="needs 3 blocks"):
        tables.refill([DecodeRow(0, 9, [1])])


def test_what_is_written_is_what_the_device_reads() -> None:
    staged = Staged.zeros(3, torch.int64, CPU)
    for value in (1, 2, 3):
        staged.write()[:] = value
        staged.send()
        assert staged.words.tolist() == [value] * 3
