"""torch's varlen_attn on a GPU is the reference of the unit tests: both directions, captured, and in an engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import Rig, answer, finish, make_rig, random_state, request

from clif.config import TrainConfig
from clif.engine.capture import CudaRecorder
from clif.engine.prompt_rows import PaddedPrompts, PromptChunk, VarlenPrompts
from clif.models.scores import Scores
from clif.models.varlen import SequenceSpans, cumulated, varlen_attention, varlen_fault, varlen_reference
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
DEVICE, SCALE = torch.device("cuda"), 0.1
ROUNDING = 0.01
"""Relative difference of a result in bfloat16 to one in float32."""
MIXED = [0, 300, 1, 64, 0, 129], [0, 300, 1, 1000, 77, 2048]
"""Queries and keys: fresh and continued prompts, one token, keys without a query, nothing at all."""


def drawn(rows: int, keys: int, heads: int, kv_heads: int, d: int, seed: int = 0) -> list[torch.Tensor]:
    """query, key and value as a merged projection and the cache have them, views of wider tensors; and a gradient."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, heads + 3, d, generator=rng).to(DEVICE, torch.bfloat16)
    cache = torch.randn(2 * kv_heads, keys, d, generator=rng).to(DEVICE, torch.bfloat16)
    grad = torch.randn(rows, heads, d, generator=rng).to(DEVICE, torch.bfloat16)
    return [wide[:, 1 : heads + 1], *cache.transpose(0, 1).chunk(2, 1), grad]


def results(attention, inputs: Sequence[torch.Tensor], spans: SequenceSpans) -> list[torch.Tensor]:
    """The result and the gradients of query, key and value."""
    q, k, v, grad = inputs
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, spans, SCALE)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def apart(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 192, 256])
def test_nothing_is_wrong_with_the_kernel_here(dtype: torch.dtype, head_dim: int) -> None:
    assert varlen_fault(DEVICE, dtype, head_dim) is None


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(32, 8, 64), (14, 2, 64), (21, 7, 80), (16, 16, 96), (8, 1, 128)])
def test_results_and_gradients_are_those_of_the_reference(heads: int, kv_heads: int, d: int) -> None:
    queries, keys = MIXED
    inputs, spans = drawn(sum(queries), sum(keys), heads, kv_heads, d), SequenceSpans.of(queries, keys, DEVICE)
    wide = [t.float() for t in inputs]
    assert apart(results(varlen_attention, inputs, spans), results(varlen_reference, wide, spans)) < ROUNDING


def test_a_query_without_keys_gives_zero_and_keys_without_queries_have_no_gradient() -> None:
    spans = SequenceSpans.of([3, 5, 0], [0, 5, 4], DEVICE)
    out, _, grad_key, grad_value = results(varlen_attention, drawn(8, 9, 4, 2, 64), spans)
    assert not out[:3].any() and not grad_key[5:].any() and not grad_value[5:].any()


def test_a_prompt_alone_is_bit_for_bit_the_same_prompt_among_others() -> None:
    queries, keys = [300, 64, 129], [300, 1000, 2048]
    q, k, v, _ = drawn(sum(queries), sum(keys), 32, 8, 64)
    together = varlen_attention(q, k, v, SequenceSpans.of(queries, keys, DEVICE), SCALE)
    alone = varlen_attention(q[300:364], k[300:1300], v[300:1300], SequenceSpans.of([64], [1000], DEVICE), SCALE)
    assert torch.equal(together[300:364], alone)


def test_what_is_not_finite_stays_within_its_sequence() -> None:
    spans = SequenceSpans.of([40, 60, 30], [40, 200, 30], DEVICE)
    q, k, v, _ = drawn(130, 270, 8, 2, 64)
    clean = varlen_attention(q, k, v, spans, SCALE)
    v[100] = torch.nan
    k[110] = torch.inf
    found = varlen_attention(q, k, v, spans, SCALE)
    assert torch.equal(found[:40], clean[:40]) and torch.equal(found[100:], clean[100:])
    assert bool(not found[40:100].isfinite().all())


def test_a_captured_graph_follows_sequences_that_are_put_in_the_place_of_others() -> None:
    """Forward and backward of a bucket with a capacity: replays read other lengths and other rows."""
    bucket, capacity = 512, 16
    cu = torch.zeros(capacity + 1, dtype=torch.int32, device=DEVICE)
    spans, static = SequenceSpans(cu, cu, bucket, bucket), drawn(bucket, bucket, 32, 8, 64)

    def refill(lengths: list[int], seed: int) -> None:
        cu.copy_(torch.tensor(cumulated([*lengths, bucket - sum(lengths)], capacity), dtype=torch.int32))
        for tensor, new in zip(static, drawn(bucket, bucket, 32, 8, 64, seed), strict=True):
            tensor.copy_(new)

    refill([bucket], 0)
    captured = CudaRecorder(torch.cuda.Stream()).capture(lambda: results(varlen_attention, static, spans))
    for seed, lengths in enumerate(([100, 7, 300], [512], [1] * 15, [0, 200, 0, 311]), start=1):
        refill(lengths, seed)
        captured.replay()
        eager = results(varlen_attention, static, spans)
        assert torch.equal(captured.result[0], eager[0])
        assert apart(captured.result, results(varlen_reference, [t.float() for t in static], spans)) < ROUNDING


def test_prompt_rows_of_a_step_are_those_of_the_padded_way_and_nothing_waits() -> None:
    chunks = [
        PromptChunk(1, 0, 40, range(3)),
        PromptChunk(41, 130, 150, range(3, 13)),
        PromptChunk(63, 0, 20, [14, 13]),
    ]
    rng = torch.Generator().manual_seed(0)
    cache = torch.randn(4, 256, 64, generator=rng).to(DEVICE, torch.bfloat16)
    query, key, value = (torch.randn(90, n, 64, generator=rng).to(DEVICE, torch.bfloat16) for n in (6, 2, 2))
    for chunk in chunks:
        slots = torch.tensor(chunk.context(16)[chunk.start :], device=DEVICE)
        rows = slice(chunk.rows.start, chunk.rows.stop)
        cache[:, slots] = torch.cat((key[rows], value[rows]), 1).transpose(0, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [
            rows.attend(
                query, key, value, cache, Scores(SCALE), torch.zeros(90, 6 * 64, dtype=torch.bfloat16, device=DEVICE)
            )
            for rows in (
                VarlenPrompts.of(chunks, 90, 16, DEVICE, varlen_attention),
                PaddedPrompts.of(chunks, 16, DEVICE),
            )
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert apart(found[:1], found[1:]) < ROUNDING


@pytest.fixture
def both(model: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Rig, Rig]:
    """An engine in bfloat16 with the kernel, and one with padded products."""
    half = {"dtype": "bfloat16"}
    found = make_rig(model, device="cuda", model=half)
    monkeypatch.setattr("clif.engine.base.choose_varlen", lambda *_: None)
    padded = make_rig(model, device="cuda", model=half)
    assert (found.runner.stack.varlen, padded.runner.stack.varlen) == (varlen_attention, None)
    return found, padded


def test_an_engine_takes_the_kernel_and_answers(both: tuple[Rig, Rig]) -> None:
    """Longer prompts than a step admits, with a common beginning. Tokens of bfloat16 may differ where logits are close;
    so what is compared is the first one, which no other follows."""
    prompts = [[7, 3, 9], list(range(20, 75)), [5], [*range(20, 44), 9, 8, 7], list(range(40))]
    requests = [request(i, p, max_tokens=10, ignore_eos=True) for i, p in enumerate(prompts)]
    found, padded = ({i: answer(got) for i, got in rig.run(requests).items()} for rig in both)
    assert all(len(tokens) == 10 for tokens in found.values())
    assert sum(found[i][0] == padded[i][0] for i in found) >= 4


def test_training_is_as_near_to_float32_as_the_padded_way(model: str, both: tuple[Rig, Rig]) -> None:
    samples = [TrainSample(id=i, ids=tuple(range(5, 5 + n)), target_start=2) for i, n in enumerate((20, 9, 50, 3))]
    gradients = []
    for rig in (*both, make_rig(model, device="cuda")):
        rig.bank.set_shadow(random_state(rig.bank, 5))
        finish(ShadowTrainer(rig.train_runner, rig.bank, samples, TrainConfig(clip_norm=1e9)).step(4, 1))
        gradients.append(rig.bank.gradient.clone())
    found, padded, exact = gradients
    assert exact.norm() > 0 and apart([found], [exact]) < 1.5 * apart([padded], [exact])
    assert both[0].train_runner.activations.square == 0
