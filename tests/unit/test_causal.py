"""Causal attention of packed sequences: both ways to compute it are one function, forward and backward."""

from __future__ import annotations

import pytest
import torch

from clif.models.causal import CausalSequences
from clif.models.causal_blocks import BLOCK_NUMBERS, LONG, SMALLEST_BLOCK, block_rows
from clif.models.scores import Scores
from tests.counted_bytes import CountedBytes

CPU = torch.device("cpu")
HEADS, KV_HEADS, D = 4, 2, 8
SINKS = torch.tensor([-1.0, 0.5, 2.0, 0.0])


def expected(lengths: list[int], scores: Scores, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence after the other, by the definition."""
    out, at = [], 0
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    for length in lengths:
        rows = slice(at, at + length)
        made = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * scores.scale
        if scores.softcap is not None:
            made = scores.softcap * torch.tanh(made / scores.softcap)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if scores.window is not None:
            hidden |= torch.ones(length, length, dtype=torch.bool).tril(-scores.window)
        made = made.masked_fill(hidden, -torch.inf)
        if scores.sinks is not None:
            made = torch.cat((made, scores.sinks.view(-1, 1, 1).expand(-1, length, 1).to(made)), -1)
        out.append(torch.einsum("hij,jhd->ihd", made.softmax(-1)[..., :length], v[rows]))
        at += length
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [[5], [7, 7], [3, 40, 5, 33, 1], [40, 7, 33]], ids=str)
@pytest.mark.parametrize(
    "scores",
    [Scores(0.3), Scores(0.3, 4), Scores(0.3, None, 0.5), Scores(0.3, 6, 0.5), Scores(0.3, 6, None, SINKS)],
    ids=["plain", "window", "cap", "window and cap", "window and sinks"],
)
@pytest.mark.parametrize("way", ["attend", "_fused", "blocks"])
def test_sequences_see_their_own_past_alone_forward_and_backward(
    lengths: list[int], way: str, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "_fused" and not scores.fusible:
        pytest.skip("torch's fused attention has neither caps nor sinks")
    if way == "blocks":
        monkeypatch.setattr("clif.models.causal.LONG", 6)
        monkeypatch.setattr("clif.models.causal_blocks.BLOCK_NUMBERS", 0)
    rng = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    inputs = [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
    wanted = expected(lengths, scores, *inputs)
    grad = torch.randn(wanted.shape, generator=rng, dtype=torch.float64)
    gradients = torch.autograd.grad(wanted, inputs, grad)
    plan = CausalSequences(lengths, CPU)
    found = plan.attend(0, *inputs, scores).view_as(wanted) if way != "_fused" else plan._fused(*inputs, scores)
    assert torch.allclose(found, wanted)
    # Blocks add what queries give to a key in float32.
    for got, want in zip(torch.autograd.grad(found, inputs, grad), gradients, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_a_long_sequence_never_has_all_its_probabilities_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    length, numbers = 2 * LONG, 1 << 18
    monkeypatch.setattr("clif.models.causal_blocks.BLOCK_NUMBERS", numbers)
    rng = torch.Generator().manual_seed(0)
    shapes = ((length, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    inputs = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    with CountedBytes() as counted:
        CausalSequences([length], CPU).attend(0, *inputs, Scores(0.3)).sum().backward()
    rows = length * (HEADS + 2 * KV_HEADS) * D * 4
    assert counted.most < 10 * rows + 4 * (numbers * 4) < HEADS * length**2, (
        "a block's probabilities and their gradients"
    )


@pytest.mark.parametrize(("sequences", "heads", "longest"), [(1, 4, 2048), (1, 9, 8192), (3, 32, 32768)])
def test_a_block_has_as_many_queries_as_its_numbers_allow(sequences: int, heads: int, longest: int) -> None:
    rows = block_rows(sequences, heads, longest)
    assert rows == SMALLEST_BLOCK or rows * sequences * heads * longest <= BLOCK_NUMBERS
