"""Prompt rows of a step: one launch for all of them is what the padded products are, on the same cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers import Rig, answer, make_rig, request
from torch._subclasses.fake_tensor import FakeTensorMode

from clif.engine import prompt_rows
from clif.engine.checked_capture import forbid_host_reads
from clif.engine.prompt_rows import PaddedPrompts, PromptChunk, VarlenPrompts
from clif.models import varlen
from clif.models.scores import Scores
from clif.models.varlen import SequenceSpans, varlen_attention, varlen_reference

CPU = torch.device("cpu")
HEADS, KV_HEADS, D, SCALE, BLOCK = 6, 2, 8, 0.3, 4


def drawn_chunks(rng: random.Random, past: bool) -> tuple[list[PromptChunk], int]:
    """Chunks, some behind a past, with rows of other kinds between them; and the rows of the step."""
    chunks, row, blocks = [], 0, list(range(40))
    rng.shuffle(blocks)
    for _ in range(rng.randint(1, 4)):
        row += rng.choice((0, 0, 1, 3))
        start, size = rng.choice((0, 0, rng.randint(1, 11))) if past else 0, rng.randint(2, 9)
        count = -(-(start + size) // BLOCK)
        chunks.append(PromptChunk(row, start, start + size, [blocks.pop() for _ in range(count)] + [39]))
        row += size
    return chunks, row + rng.choice((0, 2))


def step_of(chunks: list[PromptChunk], count: int, seed: int) -> tuple[torch.Tensor, ...]:
    """query, key and value of all rows, and a cache that holds the keys and values of the chunks and their past."""
    rng = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(count, heads, D, generator=rng, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    cache = torch.randn(2 * KV_HEADS, 160, D, generator=rng, dtype=torch.float64)
    for chunk in chunks:
        slots = torch.tensor(chunk.context(BLOCK)[chunk.start :])
        rows = slice(chunk.rows.start, chunk.rows.stop)
        cache[:, slots] = torch.cat((key[rows], value[rows]), 1).transpose(0, 1)
    return query, key, value, cache


@pytest.mark.parametrize("past", [False, True])
def test_one_launch_is_what_the_padded_products_are_and_writes_no_row_of_another_kind(past: bool) -> None:
    for seed in range(30):
        chunks, count = drawn_chunks(random.Random(seed), past)
        query, key, value, cache = step_of(chunks, count, seed)
        mine = torch.zeros(count, dtype=torch.bool)
        mine[[row for chunk in chunks for row in chunk.rows]] = True
        found = []
        for rows in (
            PaddedPrompts.of(chunks, BLOCK, CPU),
            VarlenPrompts.of(chunks, count, BLOCK, CPU, varlen_reference),
        ):
            out = torch.full((count, HEADS * D), 7.0, dtype=torch.float64)
            found.append(rows.attend(query, key, value, cache, Scores(SCALE), out))
            assert bool((found[-1][~mine] == 7).all())
        assert torch.allclose(*found)


def test_keys_are_gathered_only_where_a_prompt_has_a_past_and_rows_only_where_others_are_in_the_step() -> None:
    alone = VarlenPrompts.of([PromptChunk(0, 0, 5, [0, 1]), PromptChunk(5, 0, 2, [2])], 7, BLOCK, CPU, varlen_reference)
    assert alone.rows is None and alone.context is None
    assert alone.spans.cu_q.tolist() == alone.spans.cu_k.tolist() == [0, 5, 7]
    mixed = VarlenPrompts.of([PromptChunk(1, 0, 2, [0]), PromptChunk(3, 4, 7, [9, 5])], 6, BLOCK, CPU, varlen_reference)
    assert mixed.rows is not None and mixed.rows.tolist() == [1, 2, 3, 4, 5]
    assert mixed.context is not None and mixed.context.tolist() == [0, 1, 36, 37, 38, 39, 20, 21, 22]
    assert (mixed.spans.cu_q.tolist(), mixed.spans.cu_k.tolist()) == ([0, 2, 5], [0, 2, 9])
    assert (mixed.spans.max_q, mixed.spans.max_k) == (3, 7)


def test_what_is_not_finite_in_one_prompt_reaches_no_other() -> None:
    chunks = [PromptChunk(0, 0, 5, [0, 1]), PromptChunk(5, 4, 9, [4, 5, 6])]
    query, key, value, cache = step_of(chunks, 10, 0)
    rows = VarlenPrompts.of(chunks, 10, BLOCK, CPU, varlen_reference)
    out = torch.zeros(10, HEADS * D, dtype=torch.float64)
    clean = rows.attend(query, key, value, cache, Scores(SCALE), out)
    cache[:, 17] = torch.nan
    found = rows.attend(query, key, value, cache, Scores(SCALE), out)
    assert torch.equal(found[:5], clean[:5]) and bool(found[5:].isnan().all())


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of torch's kernel with tensors that a GPU would hold: they have no content, so a read raises."""

    def sent(values, device, dtype=torch.int64):
        return torch.empty(len(values), dtype=dtype, device=device)

    for module in (prompt_rows, varlen):
        monkeypatch.setattr(module, "send_ints", sent)
    chunks, gpu = [PromptChunk(1, 0, 5, [0, 1]), PromptChunk(6, 4, 9, [3, 4, 5])], torch.device("cuda")
    with torch.no_grad(), FakeTensorMode():
        rows = VarlenPrompts.of(chunks, 12, BLOCK, gpu, varlen_attention)
        query, key, value = (torch.empty(12, heads, D, dtype=torch.bfloat16, device=gpu) for heads in (6, 2, 2))
        cache = torch.empty(4, 160, D, dtype=torch.bfloat16, device=gpu)
        out = torch.empty(12, HEADS * D, dtype=torch.bfloat16, device=gpu)
        assert rows.attend(query, key, value, cache, Scores(SCALE), out) is out and out.is_cuda
    monkeypatch.undo()
    query, key, value, cache = step_of(chunks, 12, 0)
    rows = VarlenPrompts.of(chunks, 12, BLOCK, CPU, varlen_reference)
    with forbid_host_reads():
        rows.attend(query, key, value, cache, Scores(SCALE), torch.zeros(12, HEADS * D, dtype=torch.float64))


class Watched:
    """The reference in the place of torch's kernel, and the spans that it was asked for."""

    def __init__(self) -> None:
        self.seen: list[SequenceSpans] = []

    def __call__(self, query, key, value, spans, scale):
        self.seen.append(spans)
        return varlen_reference(query, key, value, spans, scale)


def served(rig: Rig) -> dict[int, list[int]]:
    """Prompts that arrive at different steps, longer than a step admits, with a common beginning, on two versions."""
    prompts = [[7, 3, 9], list(range(20, 75)), [5], [*range(20, 44), 9, 8, 7], [9, 9, 9, 1, 2, 3, 4], list(range(40))]
    requests = [request(i, p, max_tokens=10 + i, ignore_eos=True) for i, p in enumerate(prompts)]
    serve = rig.engine.serve
    steps = iter(range(10_000))

    def serve_and_promote():
        if next(steps) == 5:
            rig.fill(1, seed=4)
        return serve()

    rig.engine.serve = serve_and_promote
    events = rig.run(requests, arrive={i: 4 * (i // 3) for i in range(len(requests))})
    return {i: answer(got) for i, got in events.items()}


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_serves_the_same_tokens_with_one_launch_for_all_prompt_rows(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    engine = {"overlap": overlap, "cpu_kernels": "off"}
    expected = served(make_rig(f"random:{tiny_config}", engine=engine))
    watched = Watched()
    monkeypatch.setattr("clif.engine.base.choose_varlen", lambda *_: watched)
    rig = make_rig(f"random:{tiny_config}", engine=engine)
    layers = rig.runner.stack.num_layers
    watched.seen.clear()
    assert served(rig) == expected
    steps = watched.seen[::layers]
    assert [spans for spans in steps for _ in range(layers)] == watched.seen, "one launch for each layer of a step"
    assert any(len(spans.cu_q) > 2 for spans in steps), "several prompts in one launch"
    assert any(spans.max_q < spans.max_k for spans in steps), "a prompt that is continued"
