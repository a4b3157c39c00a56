"""Captured steps with prompts, proved on a CPU: regions keep to the rules, and tokens are those of plain steps."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import SMALL, Rig, make_rig, request
from scenarios import DRAWN, SCENARIOS, Scenario, outcome, recorded

from clif.engine import build, prompt_graphs
from clif.engine.checked_capture import CheckedRecorder
from clif.engine.decode_buffers import KNOWN, NO_SLOT
from clif.engine.prompt_buffers import PromptBuffers
from clif.engine.prompt_graphs import MOST_ROWS, NEAR, STEPS, prompt_sizes
from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.dual_lora_reference import SHADOW, Segment
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.kernels.paged_prefill_reference import PagedPrefillReference
from clif.kernels.paged_prefill_table import most_tiles
from clif.types import FinishReason, Regime, Request

CPU = torch.device("cpu")
CONTEXT = 256


def captured_rig(model: str, **sections: Any) -> Rig:
    """An engine whose steps with prompts are captured, as far as a CPU can, all of them; others are plain."""
    rig, recorder = make_rig(model, **sections), CheckedRecorder()
    rig.runner.paged, rig.runner.prefill = PagedDecodeReference(), PagedPrefillReference()
    graphs = rig.runner.capture_prompts(recorder, CONTEXT)
    assert [region.result for region in recorder.regions] == [graphs.captured[n].result for n in graphs.sizes[::-1]]
    graphs.can_run = lambda chunks: not all(c.is_decode for c in chunks) and not graphs.obstacle(chunks)
    return rig


def replays(rig: Rig) -> int:
    """Of captured steps with prompts."""
    return sum(region.replays for region in rig.runner.prompt_graphs.captured.values())


class Captured(Scenario):
    """The same requests and events."""

    def make(self, model: str, engine: dict[str, Any]) -> Rig:
        self.rig = captured_rig(model, engine=engine)
        # The shadow learns beside them, and may diverge: nothing that serves reads it.
        for layer in self.rig.bank.layers:
            layer.a[SHADOW].fill_(torch.nan)
            layer.b[SHADOW].fill_(torch.nan)
        return self.rig


LATE = ("cancellation", "preemption", "promotion under running requests")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the steps of small prompts differ in."""
    monkeypatch.setattr(prompt_graphs, "STEPS", (8, 16, 32))


@pytest.mark.parametrize(
    ("name", "overlap"), [*((name, False) for name in SCENARIOS), *((name, True) for name in LATE)]
)
def test_captured_steps_answer_token_for_token_as_plain_ones(tiny_config, name, overlap):
    """Prompts beside answers, in chunks, behind a reused prefix; promotions, preemption, draws, NaN in the shadow."""
    captured = Captured(**vars(SCENARIOS[name]))
    found = outcome(captured.run(f"random:{tiny_config}", overlap=overlap))
    assert found == recorded("random", name, overlap) and replays(captured.rig) > 0


def test_every_size_computes_its_steps_and_chunks_of_one_token(tiny_config):
    """A budget of 21 tokens cuts prompts anywhere, and leaves single tokens that choose nothing."""
    model, engine = f"random:{tiny_config}", {**SMALL, "max_prefill_tokens": 21}
    rig = captured_rig(model, engine=engine)
    assert rig.runner.prompt_graphs.sizes == [8, 16, 32]
    lengths = (3, 20, 41, 22, 43, 7, 2, 64, 1, 9)
    requests = [
        request(i, [*range(3 + i, 3 + i + n)], max_tokens=4 + i, ignore_eos=True) for i, n in enumerate(lengths)
    ]
    arrive = {i: 2 * i for i in range(len(lengths))}
    expected = make_rig(model, engine=engine).run(requests, arrive=arrive)
    assert outcome(rig.run(requests, arrive=arrive)) == outcome(expected)
    assert all(region.replays for region in rig.runner.prompt_graphs.captured.values())


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_versions_guides_draws_and_logprobs_are_those_of_plain_steps(tiny_config, kv_dtype):
    model, found = f"random:{tiny_config}", []
    system = [*range(30, 60)]
    kinds = (
        {},
        DRAWN,
        {"logprobs": 2},
        {"frequency_penalty": 0.7},
        {"logit_bias": ((9, 4.0),)},
        {"presence_penalty": 1.0},
    )
    requests = [
        request(i, [*system[: 7 * i], 5, 6 + i], max_tokens=8, seed=i, ignore_eos=True, **kinds[i % len(kinds)])
        for i in range(9)
    ]
    for make in (make_rig, captured_rig):
        rig = make(model, engine={**SMALL, "max_prefill_tokens": 24, "overlap": True, "kv_dtype": kv_dtype})
        events = []
        for step in range(60):
            if step in (3, 8):
                rig.fill(version=step, seed=step)
            if step % 2 == 0 and step // 2 < len(requests):
                rig.engine.scheduler.add(requests[step // 2], 0.0)
            events += rig.engine.serve()
        assert not rig.engine.serving and rig.engine.scheduler.reused_tokens > 0
        found.append([(e.request_id, e.version, e.tokens, e.finish) for e in events])
        logprobs = [one for e in events for one in e.logprobs or ()]
        found[-1].append([(one.token, round(one.logprob, 3)) for one in logprobs])
        assert logprobs
    assert found[0] == found[1] and replays(rig) > 5


def test_a_request_whose_adapter_is_not_finite_fails_alone(tiny_config):
    """NaN in the slot of one version: the rows of the other one in the same replay are not touched."""
    found = []
    for ill in (False, True):
        rig = captured_rig(f"random:{tiny_config}")
        rig.fill(version=1, seed=1)
        rig.engine.scheduler.add(request(0, [5, 6, 7], max_tokens=12, ignore_eos=True), 0.0)
        events = rig.engine.serve()
        rig.fill(version=2, seed=2)
        for layer in rig.bank.layers if ill else ():
            layer.b[rig.slots.slot_of(2)].fill_(torch.nan)
        rig.engine.scheduler.add(request(1, [8, 9, 4], max_tokens=12, ignore_eos=True), 0.0)
        while rig.engine.serving:
            events += rig.engine.serve()
        ends = [e.finish for e in events if e.request_id == 1 and e.finish]
        assert ends == [FinishReason.FAILED if ill else FinishReason.LENGTH]
        found.append([t for e in events if e.request_id == 0 for t in e.tokens])
    assert found[0] == found[1] and len(found[0]) == 12


def test_what_no_captured_step_computes_is_computed_plainly_and_the_log_says_why_once(tiny_config, caplog):
    rig = captured_rig(f"random:{tiny_config}", engine={**SMALL, "max_prefill_tokens": 24})
    graphs = rig.runner.prompt_graphs
    del graphs.can_run
    asks = Request(id=7, prompt=(1, 2, 3), sampling=request(0, [1], prompt_logprobs=True, logprobs=1).sampling)
    plain, scored = (Sequence(asked, 0.0, [1, 2, 3]) for asked in (request(0, [1, 2, 3]), asks))
    assert graphs.obstacle([Chunk(plain, 0, 3, True)]) == ""
    with caplog.at_level(logging.INFO):
        for chunks, why in (
            ([Chunk(scored, 0, 3, True)], "log-probabilities of a prompt are asked for"),
            ([Chunk(plain, 0, 33, False)], "more than 32 rows"),
            ([Chunk(plain, 0, 2, False)] * 9, "more than 8 requests"),
            ([Chunk(plain, CONTEXT - 1, CONTEXT + 1, True)], f"contexts of more than {CONTEXT} tokens"),
        ):
            assert not graphs.can_run(chunks) and not graphs.can_run(chunks) and graphs.obstacle(chunks) == why
            assert caplog.text.count(why) == 1
    rig.engine.scheduler.add(request(1, [5] * 9, max_tokens=2, ignore_eos=True), 0.0)
    chunks = rig.engine.scheduler.schedule()
    assert rig.runner.fill(chunks).captured is not None and rig.runner.fill(chunks, fused=True).captured is None


def test_without_a_kernel_for_prompts_no_step_with_prompts_is_captured(tiny_config):
    rig, recorder = make_rig(f"random:{tiny_config}"), CheckedRecorder()
    rig.runner.paged = PagedDecodeReference()
    assert rig.runner.capture_prompts(recorder, CONTEXT) is None and not recorder.regions


class Reading(PagedPrefillReference):
    """Breaks the rules of a capture."""

    def attend(self, q, cache, table, scale, out):
        int(table.counts)


def test_where_prompts_cannot_be_captured_other_steps_still_are(tiny_config, caplog):
    rig = make_rig(f"random:{tiny_config}")
    rig.runner.paged, rig.runner.prefill = PagedDecodeReference(), Reading()
    build._capture(rig.runner, CheckedRecorder(), CONTEXT)
    assert rig.runner.graphs is not None and rig.runner.prompt_graphs is None
    assert "no CUDA graphs of steps with prompts, which are launched kernel by kernel" in caplog.text
    assert [e.finish for e in rig.run([request(0, [5, 6, 7], max_tokens=3, ignore_eos=True)])[0]][-1] == "length"


def test_replays_with_prompts_are_no_measurements_of_steps_that_continue_answers(tiny_config):
    rig = captured_rig(f"random:{tiny_config}")
    rig.run([request(0, [5] * 9, max_tokens=3, ignore_eos=True)])
    assert replays(rig) == 1 and set(rig.engine.cost_model.steps) == {(Regime.ALONE, False)}


@pytest.mark.parametrize(("batch", "budget"), [(16, 512), (64, 2048), (1, 2), (8, 40), (256, 100_000)])
def test_sizes_are_few_and_hold_every_step(batch, budget, monkeypatch):
    monkeypatch.setattr(prompt_graphs, "STEPS", STEPS)
    sizes = prompt_sizes(batch, budget)
    assert sizes == sorted(set(sizes)) and len(sizes) <= 12
    assert min(batch + budget, MOST_ROWS) <= sizes[-1] <= MOST_ROWS
    assert all(b > NEAR * a for a, b in pairwise(sizes))


def sequence(tokens: int, blocks: list[int], slot: int | None = None, sampled_at: int = -1) -> Sequence:
    made = Sequence(request(0, list(range(100, 100 + tokens)), max_tokens=50), 0.0, list(range(100, 100 + tokens)))
    made.blocks, made.slot, made.sampled_at = blocks, slot, sampled_at
    return made


def test_a_fill_sends_rows_ends_tables_tiles_and_padding_in_one_tensor():
    buffers = PromptBuffers(16, 4, 3, 4, spare=9, slots=3, tile_tokens=2, device=CPU)
    adapters = buffers.adapters(8)
    adapters.of(16, 3)
    buffers.keep_used_heights()
    answers, prompt, late = sequence(6, [2, 5]), sequence(9, [3, 4, 7], slot=0), sequence(3, [8], slot=1, sampled_at=2)
    chunks = [Chunk(answers, 5, 6, True), Chunk(prompt, 4, 7, False), Chunk(late, 3, 4, True)]
    buffers.fill(chunks, [Segment(1, 4, 0), Segment(4, 5, 1)], 8)
    ids, positions, cache_slots, sources, slots = buffers.fields(8).tolist()
    assert ids[:5] == [105, 104, 105, 106, 0] and positions == [5, 4, 5, 6, 3, 0, 0, 0]
    assert cache_slots == [21, 16, 17, 18, 35, 36, 36, 36]
    assert sources == [KNOWN] * 4 + [2] + [KNOWN] * 3 and slots == [NO_SLOT, 0, 0, 0, 1] + [NO_SLOT] * 3
    assert buffers.ends(8).tolist() == [0, 4, 0, 0]
    decode, prefill = buffers.decode_table(8), buffers.prefill_table(8)
    assert decode.counts.tolist() == [3] and decode.rows.tolist()[:3] == [0, 1, 4]
    assert decode.lengths.tolist()[:3] == [6, 0, 4], "a prompt is no sequence of paged decode"
    assert prefill.counts.tolist() == [2] and prefill.tiles.tolist()[:2] == [[3, 1, 6, 1], [1, 2, 4, 1]]
    assert len(prefill.tiles) == most_tiles(8, 4, 2) and prefill.blocks.tolist()[1] == [3, 4, 7]
    assert adapters.tables[16].pairs.tolist()[:2] == [[1, 4, 0, 0], [4, 5, 1, 0]]
    buffers.fill(chunks[:1], [], 8)
    assert buffers.prefill_table(8).counts.tolist() == [0] and buffers.fields(8)[2].tolist() == [21] + [36] * 7
