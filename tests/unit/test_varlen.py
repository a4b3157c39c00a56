"""Attention of packed sequences of any lengths: the reference is CausalSequences and the definition, and the call of
torch's kernel is one that torch accepts and that reads nothing on the host."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as sdpa

from clif.engine.checked_capture import CheckedRecorder
from clif.models.causal import CausalSequences
from clif.models.scores import Scores
from clif.models.varlen import SequenceSpans, cumulated, varlen_attention, varlen_reference

CPU = torch.device("cpu")
HEADS, KV_HEADS, D, SCALE = 6, 2, 8, 0.3
CASES = [
    ([5], [5]),
    ([7, 7], [7, 7]),
    ([3, 40, 5, 33, 1], [3, 40, 5, 33, 1]),
    ([0, 4, 0, 0, 1, 0], [0, 4, 0, 0, 1, 0]),
    ([4, 7, 2, 1], [4, 20, 33, 9]),
    ([0, 3, 2], [5, 3, 2]),
    ([3, 2, 4], [0, 2, 2]),
]


def drawn(queries: list[int], keys: list[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((sum(queries), HEADS), (sum(keys), KV_HEADS), (sum(keys), KV_HEADS))
    return [torch.randn(*shape, D, generator=rng).to(dtype).requires_grad_() for shape in shapes]


def by_definition(
    queries: list[int], keys: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """One sequence after the other; its last query sees all keys, and a query without keys gives 0."""
    out = torch.zeros_like(q)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    at_q = at_k = 0
    for n, m in zip(queries, keys, strict=True):
        rows, past = slice(at_q + max(0, n - m), at_q + n), slice(at_k, at_k + m)
        mask = torch.ones(min(n, m), m, dtype=torch.bool).tril(m - min(n, m))
        heads = (t.transpose(0, 1) for t in (q[rows], k[past], v[past]))
        out = out.slice_scatter(sdpa(*heads, attn_mask=mask, scale=SCALE).transpose(0, 1), 0, rows.start, rows.stop)
        at_q, at_k = at_q + n, at_k + m
    return out


def check(queries: list[int], keys: list[int], spans: SequenceSpans, inputs: list[torch.Tensor]) -> None:
    wanted = by_definition(queries, keys, *inputs)
    found = varlen_reference(*inputs, spans, SCALE)
    assert torch.allclose(found, wanted)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    for got, want in zip(*(torch.autograd.grad(t, inputs, grad) for t in (found, wanted)), strict=True):
        assert torch.allclose(got, want)


@pytest.mark.parametrize(("queries", "keys"), CASES, ids=str)
def test_the_reference_is_the_definition_forward_and_backward(queries: list[int], keys: list[int]) -> None:
    check(queries, keys, SequenceSpans.of(queries, keys, CPU), drawn(queries, keys))


def test_the_reference_is_the_definition_for_random_lengths() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        queries = [rng.choice((0, 1, 2, rng.randint(0, 12))) for _ in range(rng.randint(1, 6))] + [1]
        keys = [n + rng.choice((0, 0, 1, rng.randint(0, 20))) for n in queries]
        check(queries, keys, SequenceSpans.of(queries, keys, CPU), drawn(queries, keys, seed=seed))


@pytest.mark.parametrize("lengths", [[5], [7, 7], [3, 40, 5, 33, 1], [1, 1, 2]], ids=str)
def test_the_reference_is_what_causal_sequences_compute(lengths: list[int]) -> None:
    inputs = drawn(lengths, lengths)
    found = varlen_reference(*inputs, SequenceSpans.of(lengths, lengths, CPU), SCALE).flatten(1)
    wanted = CausalSequences(lengths, CPU).attend(0, *inputs, Scores(SCALE))
    assert torch.allclose(found, wanted)
    for got, want in zip(*(torch.autograd.grad(t.square().sum(), inputs) for t in (found, wanted)), strict=True):
        assert torch.allclose(got, want)


def test_a_capacity_is_filled_up_with_sequences_without_rows_and_bounds_may_be_too_high() -> None:
    lengths, capacity, bucket = [5, 9, 2], 8, 32
    padded = [*lengths, bucket - sum(lengths)]
    cu = torch.tensor(cumulated(padded, capacity), dtype=torch.int32)
    assert cu.tolist() == [0, 5, 14, 16, 32, 32, 32, 32, 32]
    check(padded, padded, SequenceSpans(cu, cu, bucket, bucket), drawn(padded, padded))


def test_a_captured_region_follows_sequences_that_are_put_in_the_place_of_others() -> None:
    """Forward and backward over a bucket of rows with a capacity of sequences; the launch reads cu anew each time."""
    capacity, bucket = 6, 24
    cu = torch.zeros(capacity + 1, dtype=torch.int32)
    spans = SequenceSpans(cu, cu, bucket, bucket)
    static = drawn([bucket], [bucket])
    grad = torch.randn(bucket, HEADS, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def refill(lengths: list[int], seed: int) -> list[int]:
        padded = [*lengths, bucket - sum(lengths)]
        cu.copy_(torch.tensor(cumulated(padded, capacity), dtype=torch.int32))
        with torch.no_grad():
            for tensor, new in zip(static, drawn([bucket], [bucket], seed=seed), strict=True):
                tensor.copy_(new)
        return padded

    def region() -> tuple[torch.Tensor, ...]:
        out = varlen_reference(*static, spans, SCALE)
        return out, *torch.autograd.grad(out, static, grad)

    refill([bucket], 0)
    captured = CheckedRecorder().capture(region)
    for seed, lengths in enumerate(([5, 9, 2], [24], [1, 1, 1, 1, 1], [0, 20]), start=1):
        padded = refill(lengths, seed)
        captured.replay()
        wanted = by_definition(padded, padded, *static)
        expected = (wanted, *torch.autograd.grad(wanted, static, grad))
        assert all(torch.allclose(got, want) for got, want in zip(captured.result, expected, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_stays_within_its_sequence(which: int, value: float) -> None:
    lengths, spans = [4, 6, 3], SequenceSpans.of([4, 6, 3], [4, 6, 3], CPU)
    inputs = [t.detach() for t in drawn(lengths, lengths)]
    clean = varlen_reference(*inputs, spans, SCALE)
    inputs[which][6, 1] = value
    found = varlen_reference(*inputs, spans, SCALE)
    others = [row for row in range(13) if not 6 <= row < 10]
    assert torch.equal(found[others], clean[others])
    assert not found[6].isfinite().all()


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    inputs = drawn([30, 11], [30, 50], torch.bfloat16)
    spans = SequenceSpans.of([30, 11], [30, 50], CPU)
    found, wanted = (
        varlen_reference(*inputs, spans, SCALE),
        varlen_reference(*(t.float() for t in inputs), spans, SCALE),
    )
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


@pytest.mark.parametrize("attention", [varlen_attention, varlen_reference])
def test_the_host_reads_nothing(attention) -> None:
    """Tensors without content: a read raises. torch's kernel is asked for nothing but its shapes."""
    with FakeTensorMode():
        spans = SequenceSpans.of([4, 7, 0], [4, 20, 0], CPU)
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            spans.cu_q[1].item()
        inputs = [torch.empty(n, h, 16, dtype=torch.bfloat16).requires_grad_() for n, h in ((11, 6), (24, 2), (24, 2))]
        out = attention(*inputs, spans, SCALE)
        assert (out.shape, out.dtype) == (inputs[0].shape, torch.bfloat16)
        gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
        assert [g.shape for g in gradients] == [t.shape for t in inputs]


def test_the_call_of_torchs_kernel_is_causal_and_tells_of_shared_kv_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both signatures: with enable_gqa, which must be set, and without, as in torch 2.11."""
    import torch.nn.attention.varlen as module

    from clif.models import varlen

    seen: list[dict[str, object]] = []

    def newer(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        seen.append({"window": window_size, "gqa": enable_gqa, "max": (max_q, max_k)})
        return q

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        seen.append({"window": window_size, "max": (max_q, max_k)})
        return q

    monkeypatch.setattr(varlen, "_varlen_attn", varlen._varlen_attn.__wrapped__)
    inputs = drawn([2, 3], [2, 9])
    for function in (newer, older):
        monkeypatch.setattr(module, "varlen_attn", function)
        varlen_attention(*inputs, SequenceSpans.of([2, 3], [2, 9], CPU), SCALE)
    assert seen == [{"window": (-1, 0), "gqa": True, "max": (3, 9)}, {"window": (-1, 0), "max": (3, 9)}]
