"""Causal attention of packed sequences: both ways to compute it are one function, forward and backward."""

from __future__ import annotations

import pytest
import torch

from clif.models.causal import CausalSequences

CPU = torch.device("cpu")
HEADS, KV_HEADS, D, SCALE = 4, 2, 8, 0.3


def expected(lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence after the other, by the definition."""
    out, at = [], 0
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    for length in lengths:
        rows = slice(at, at + length)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * SCALE
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        out.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[rows]))
        at += length
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [[5], [7, 7], [3, 40, 5, 33, 1], [40, 7, 33]], ids=str)
@pytest.mark.parametrize("way", ["attend", "_fused"])
def test_sequences_see_their_own_past_alone_forward_and_backward(lengths: list[int], way: str) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    inputs = [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
    wanted = expected(lengths, *inputs)
    grad = torch.randn(wanted.shape, generator=rng, dtype=torch.float64)
    gradients = torch.autograd.grad(wanted, inputs, grad)
    plan = CausalSequences(lengths, CPU)
    found = plan.attend(0, *inputs, SCALE).view_as(wanted) if way == "attend" else plan._fused(*inputs, SCALE)
    assert torch.allclose(found, wanted)
    for got, want in zip(torch.autograd.grad(found, inputs, grad), gradients, strict=True):
        assert torch.allclose(got, want)
