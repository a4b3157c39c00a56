"""Captured decode steps, proved on a CPU: their region keeps to the rules, and its tokens are those of plain steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SMALL, Rig, make_rig, request
from scenarios import DRAWN, SCENARIOS, Scenario, crowd, outcome, recorded

from clif.engine import graphs
from clif.engine.checked_capture import CheckedRecorder
from clif.engine.decode_buffers import KNOWN, NO_SLOT, DecodeBuffers
from clif.engine.graphs import MOST_ROWS, decode_sizes
from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.dual_lora_reference import SHADOW, Segment, add_dual_lora, add_dual_lora_by_slot
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.kernels.paged_decode_table import StagedDecodeTable
from clif.kernels.staging import Staged
from clif.kernels.testing.paged_decode_specification import attend_by_torch, random_decode

CPU = torch.device("cpu")
CONTEXT = 256


def captured_rig(model: str, **sections: Any) -> tuple[Rig, CheckedRecorder]:
    """An engine whose decode steps are captured as far as a CPU can."""
    rig, recorder = make_rig(model, **sections), CheckedRecorder()
    rig.runner.paged = PagedDecodeReference()
    rig.runner.capture(recorder, CONTEXT)
    return rig, recorder


def replays(recorder: CheckedRecorder) -> int:
    return sum(region.replays for region in recorder.regions)


class Captured(Scenario):
    """The same requests and events, by captured steps."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(**vars(scenario))
        self.recorder = CheckedRecorder()

    def make(self, model: str, engine: dict[str, Any]) -> Rig:
        rig, self.recorder = captured_rig(model, engine=engine)
        # The shadow learns beside them, and may diverge: nothing that serves reads it.
        for layer in rig.bank.layers:
            layer.a[SHADOW].fill_(torch.nan)
            layer.b[SHADOW].fill_(torch.nan)
        return rig


LATE = ("cancellation", "preemption", "promotion under running requests")
"""Scenarios in which it matters that a step is settled behind the launch of the next one."""


@pytest.mark.parametrize(
    ("name", "overlap"), [*((name, False) for name in SCENARIOS), *((name, True) for name in LATE)]
)
def test_captured_steps_answer_token_for_token_as_plain_ones(tiny_config, name, overlap):
    """With promotions, preemption, freed and reused blocks, cancellation, draws, and NaN in the shadow."""
    captured = Captured(SCENARIOS[name])
    assert outcome(captured.run(f"random:{tiny_config}", overlap=overlap)) == recorded("random", name, overlap)
    assert (replays(captured.recorder) > 0) == (name != "ends at once")


def test_every_size_is_captured_once_the_largest_first_and_computes_its_batches(tiny_config):
    model, engine = f"random:{tiny_config}", {**SMALL, "max_batch": 20, "kv_tokens": 2048}
    rig, recorder = captured_rig(model, engine=engine)
    assert [region.result[1].shape[0] for region in recorder.regions] == [20, 16, 8, 4, 2, 1]
    requests = [request(i, [3 + i, 5, 7], max_tokens=4 + i, ignore_eos=True) for i in range(20)]
    expected = make_rig(model, engine=engine).run(requests)
    assert outcome(rig.run(requests)) == outcome(expected)
    assert all(region.replays for region in recorder.regions), "answers end one after the other"


def test_a_promotion_and_a_cancellation_between_replays_capture_nothing(tiny_config):
    rig, recorder = captured_rig(f"random:{tiny_config}")
    for i in range(3):
        rig.engine.scheduler.add(request(i, [5 + i, 2], max_tokens=40, ignore_eos=True), 0.0)
    for step in range(30):
        if step in (6, 12):
            rig.fill(version=step, seed=step)
            rig.engine.scheduler.add(request(step, [9, step], max_tokens=40, ignore_eos=True), 0.0)
        if step == 15:
            rig.engine.scheduler.cancel(1)
        rig.engine.serve()
    assert len(recorder.regions) == len(rig.runner.graphs.sizes) and replays(recorder) > 20


def test_a_request_whose_adapter_is_not_finite_fails_alone(tiny_config):
    """NaN in the slot of one version: the rows of the other one in the same replay are not touched."""
    rig, recorder = captured_rig(f"random:{tiny_config}")
    quiet = make_rig(f"random:{tiny_config}")
    for one in (rig, quiet):
        one.fill(version=1, seed=1)
    healthy = request(0, [5, 6, 7], max_tokens=12, ignore_eos=True)
    rig.engine.scheduler.add(healthy, 0.0)
    rig.engine.serve()
    rig.fill(version=2, seed=2)
    ill = request(1, [8, 9], max_tokens=12, ignore_eos=True)
    rig.engine.scheduler.add(ill, 0.0)
    events = [event for _ in range(3) for event in rig.engine.serve()]
    for layer in rig.bank.layers:
        layer.b[rig.slots.slot_of(2)].fill_(torch.nan)
    while rig.engine.serving:
        events += rig.engine.serve()
    assert [e.finish for e in events if e.request_id == 1][-1] == "failed"
    found = [t for e in events if e.request_id == 0 for t in e.tokens]
    assert found == [t for e in quiet.run([healthy])[0] for t in e.tokens][-len(found) :] and len(found) > 8
    assert replays(recorder) > 8


def test_a_step_that_no_graph_holds_is_computed_plainly(tiny_config):
    """Prompts, more rows than the largest size, longer contexts than the tables hold, and training in the products."""
    rig, recorder = captured_rig(f"random:{tiny_config}")
    rig.engine.scheduler.add(request(0, [5] * 9, max_tokens=3, ignore_eos=True), 0.0)
    rig.engine.serve()
    assert replays(recorder) == 0, "a prompt"
    chunks = rig.engine.scheduler.schedule()
    assert rig.runner.graphs.can_run(chunks)
    assert rig.runner.fill(chunks).captured is not None and rig.runner.fill(chunks, fused=True).captured is None
    sequence = chunks[0].sequence
    assert not rig.runner.graphs.can_run([Chunk(sequence, CONTEXT, CONTEXT + 1, needs_sampling=True)])
    assert not rig.runner.graphs.can_run(chunks * (SMALL["max_batch"] + 1))


def test_a_batch_beyond_the_largest_size_is_computed_plainly_until_enough_answers_have_ended(tiny_config, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 4)
    rig, recorder = captured_rig(f"random:{tiny_config}")
    assert rig.runner.graphs.sizes == [1, 2, 4] and rig.config.engine.max_batch == 8
    requests = [request(i, [3 + i, 5, 7], max_tokens=4 + 2 * i, ignore_eos=True) for i in range(7)]
    assert outcome(rig.run(requests)) == outcome(make_rig(f"random:{tiny_config}").run(requests))
    assert 0 < replays(recorder) < 15


@pytest.mark.parametrize("most", [1, 3, 7, 8, 16, 20, 64, 70])
def test_sizes_are_few_and_hold_every_batch(most):
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
    assert all(min(s for s in sizes if s >= n) - n < 8 for n in range(1, most + 1))
    assert decode_sizes(10 * MOST_ROWS)[-1] == MOST_ROWS


def sequence(tokens: int, blocks: list[int], slot: int | None = None, sampled_at: int = -1) -> Sequence:
    made = Sequence(request(0, list(range(100, 100 + tokens)), max_tokens=50), 0.0, list(range(100, 100 + tokens)))
    made.blocks, made.slot, made.sampled_at = blocks, slot, sampled_at
    return made


def test_a_fill_sends_rows_tables_and_padding_in_one_tensor():
    buffers = DecodeBuffers(4, 3, 4, spare=9, slots=3, device=CPU)
    tables = buffers.tables(4)
    tables.of(16, 3)
    buffers.keep_used_heights()
    known, late = sequence(6, [2, 5], slot=None), sequence(3, [7], slot=1, sampled_at=2)
    chunks = [Chunk(known, 5, 6, needs_sampling=True), Chunk(late, 3, 4, needs_sampling=True)]
    buffers.fill(chunks, [Segment(1, 2, 1)], 4)
    ids, positions, cache_slots, sources, slots = buffers.fields(4).tolist()
    assert ids[:2] == [105, 0] and positions == [5, 3, 0, 0] and cache_slots == [21, 31, 36, 36]
    assert sources == [KNOWN, 2, KNOWN, KNOWN] and slots == [NO_SLOT, 1, NO_SLOT, NO_SLOT]
    table = buffers.decode_table(4)
    assert table.counts.tolist() == [4] and table.rows.tolist() == [0, 1, 2, 3]
    assert table.lengths.tolist() == [6, 4, 1, 1]
    assert [row[0] for row in table.blocks.tolist()] == [2, 7, 9, 9] and table.blocks[0, 1] == 5
    found = tables.tables[16]
    assert found.counts.tolist() == [1] and found.firsts.tolist() == [0, 1]
    assert found.pairs.tolist()[0] == [1, 2, 1, 0]
    assert table.blocks.data_ptr() == buffers.decode_table(2).blocks.data_ptr()


def test_blocks_that_a_host_copy_has_already_are_not_written_again_and_others_are():
    """Two host copies in turn: each lacks what the other one got."""
    buffers = DecodeBuffers(3, 8, 4, spare=30, slots=3, device=CPU)
    words = buffers._staged.words
    buffers._staged = Staged(words, [torch.zeros_like(words) for _ in range(2)])
    buffers._hosts = {host.data_ptr(): type(next(iter(buffers._hosts.values())))() for host in buffers._staged.hosts}
    rng = torch.Generator().manual_seed(0)
    live = [sequence(4, [i]) for i in range(3)]
    for step in range(60):
        action = int(torch.randint(5, (1,), generator=rng))
        chosen = live[int(torch.randint(len(live), (1,), generator=rng))]
        if action < 3 and len(chosen.blocks) < 8:
            chosen.blocks.append(100 + step)
        elif action == 3:
            chosen.blocks = [200 + step]
        else:
            live = [*live[1:], live[0]] if step % 2 else [*live[:2], sequence(4, [300 + step])]
        chunks = [Chunk(s, 4 * len(s.blocks) - 1, 4 * len(s.blocks), needs_sampling=True) for s in live]
        buffers.fill(chunks[: 1 + step % 3], (), 3)
        table = buffers.decode_table(3)
        for row, one in enumerate(live[: 1 + step % 3]):
            assert table.blocks[row, : len(one.blocks)].tolist() == one.blocks
        assert table.blocks[1 + step % 3 :, 0].tolist() == [30] * (2 - step % 3)


def test_slots_as_data_give_what_segments_give_and_a_nan_stays_in_its_slot():
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(7, 12, generator=rng), torch.randn(7, 20, generator=rng)
    a, b = torch.randn(3, 4, 12, generator=rng), torch.randn(3, 20, 4, generator=rng)
    segments = [Segment(1, 3, 2), Segment(3, 6, 0)]
    slots = torch.tensor([-1, 2, 2, 0, 0, 0, -1])
    expected, found = y.clone(), y.clone()
    add_dual_lora(expected, x, segments, lambda slot: (a[slot], b[slot]), 0.5)
    add_dual_lora_by_slot(found, x, slots, a, b, 0.5)
    assert torch.allclose(found, expected, atol=1e-5) and torch.equal(found[[0, 6]], y[[0, 6]])
    ill, clean = y.clone(), found
    add_dual_lora_by_slot(ill, x, slots, torch.where(torch.arange(3)[:, None, None] == 2, torch.nan, a), b, 0.5)
    assert ill[1:3].isnan().all() and torch.equal(ill[[0, 3, 4, 5, 6]], clean[[0, 3, 4, 5, 6]])


def test_the_reference_of_paged_attention_reads_the_kernels_table():
    batch = random_decode((3, 17, 1, 40), 6, 2, 16, 4, dtype=torch.float32)
    sequences = [row._replace(row=at) for row, at in zip(batch.sequences, (5, 0, 3, 2), strict=True)]
    table = StagedDecodeTable.make(sequences, 4, CPU, capacity=7)
    q, out = torch.randn(6, 6, 16), torch.full((6, 6 * 16), 7.0)
    for row, source in zip(sequences, batch.q, strict=True):
        q[row.row] = source
    # Slots behind the end of a context hold NaN of other requests.
    PagedDecodeReference().attend(q, batch.cache, table, batch.scale, out)
    expected = attend_by_torch(batch.q, batch.cache, batch.sequences, batch.block_size, batch.scale)
    assert torch.allclose(out[[5, 0, 3, 2]], expected, atol=1e-5)
    assert out[[1, 4]].eq(7.0).all(), "rows of no sequence"


def test_drawn_rows_are_chosen_from_what_a_graph_left(tiny_config):
    rig, recorder = captured_rig(f"random:{tiny_config}")
    requests = [*crowd(20)[:2], request(2, [5, 6], max_tokens=20, seed=4, ignore_eos=True, **DRAWN)]
    expected = make_rig(f"random:{tiny_config}").run(requests)
    assert outcome(rig.run(requests)) == outcome(expected) and replays(recorder) > 15
