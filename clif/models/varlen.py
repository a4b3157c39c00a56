"""Causal attention of packed sequences of any lengths in one launch: no padding, no mask, no matrix that is kept.

What torch.nn.attention.varlen.varlen_attn does in the two versions that CLIF meets:

* It is flash attention 2: float16 and bfloat16 only, compute capability 8.0, head_dim a multiple of 8 of at most 256
  (80 and 96 are computed as 96). Rows and heads may have any stride; the last dimension is contiguous.
* window_size=(-1, 0) is causal and aligned at the bottom right: the last query of a sequence sees all of its keys. So
  a prompt that is continued has fewer queries than keys, and nothing more is needed.
* cu_seq_q and cu_seq_k are int32 on the device and read there. max_q and max_k are bounds that size the launch. A
  sequence may have no query, no key, or neither: a captured graph reads other sequences from the same tensors.
* KV heads that several query heads share are computed by the kernel itself, forward and backward. 2.13 wants
  enable_gqa=True for it; 2.11 has no such argument, and checks nothing.
* num_splits, seqused_k and block_table are new in 2.13. A page must then hold a multiple of 256 tokens, each with all
  its heads; blocks of CLIF's cache are smaller and the cache lies head by head. So contexts are gathered.
* The forward of a sequence depends on that sequence alone. The backward adds the parts of a query's gradient in any
  order, so that two runs differ in roundings, unless torch.use_deterministic_algorithms(True).
* The backward takes a workspace of 512 * (rows + 128 * sequences) * heads bytes for a head_dim of 128, sequences
  without rows included: a capacity is a price.

Sources: FlashAttention-2 (Dao 2023); torch/nn/attention/varlen.py, _flash_attention_forward and mha_varlen_fwd of
PyTorch 2.11 and 2.13; grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from clif.kernels.staging import send_ints
from clif.models.scores import Scores

SAME = 0.02
"""Relative difference to the reference that is rounding: a bfloat16 has 8 bits."""


@dataclass(frozen=True)
class SequenceSpans:
    """Where sequences lie in packed rows: sequence i has queries [cu_q[i], cu_q[i+1]) and keys [cu_k[i], cu_k[i+1]).

    cu_q, cu_k: int32 [sequences + 1] on the device, from 0 to the number of rows; a capacity is filled up by repeating
    the last value, which makes sequences without rows. Every row belongs to a sequence, rows that only pad as well.
    max_q, max_k: upper bounds of the lengths; a bound that is too high costs launched blocks that end at once.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> SequenceSpans:
        """queries, keys: of each sequence, in row order. One transfer, for which the host does not wait."""
        words = cumulated(queries) + cumulated(keys)
        cu_q, cu_k = send_ints(words, device, torch.int32).chunk(2)
        return cls(cu_q, cu_k, max(queries, default=0), max(keys, default=0))


Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SequenceSpans, float], torch.Tensor]
"""(query [rows, heads, d], key and value [k_rows, kv_heads, d], spans, scale) -> [rows, heads, d].

A query sees the keys of its sequence up to its own place, counted from the end. What sees no key gives 0.
"""


@dataclass(frozen=True)
class VarlenSequences:
    """The plan of packed sequences that attend among themselves: each has as many queries as keys."""

    spans: SequenceSpans
    attention: Varlen

    def cache_rows(self, layer: int) -> None:
        """Nothing is kept of these rows."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """query [rows, heads, d], key and value [rows, kv_heads, d] -> [rows, heads * d]."""
        return self.attention(query, key, value, self.spans, scores.plain_scale).flatten(1)


def cumulated(lengths: Sequence[int], capacity: int | None = None) -> list[int]:
    """[0, l0, l0 + l1, ...] with a value for each end; capacity: sequences to fill up to with empty ones."""
    ends = list(accumulate(lengths, initial=0))
    return ends + ends[-1:] * ((capacity or 0) - len(lengths))


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: SequenceSpans, scale: float
) -> torch.Tensor:
    """torch's kernel, forward and backward; see Varlen."""
    attn, options = _varlen_attn()
    out: torch.Tensor = attn(
        query,
        key,
        value,
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        scale=scale,
        window_size=(-1, 0),
        **options,
    )
    return out


@cache
def _varlen_attn() -> tuple[Any, dict[str, bool]]:
    """The function of this torch, and what it must be told about KV heads that are shared."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def varlen_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: SequenceSpans, scale: float
) -> torch.Tensor:
    """The same function by a dense mask [rows, k_rows], for tests and for captures that are checked on a CPU.

    Shapes depend on shapes alone and the host reads nothing. A value that is not finite reaches the rows that see it
    and no other; in the backward it reaches all.
    """
    i, j = (torch.arange(len(x), device=x.device, dtype=torch.int32) for x in (query, key))
    (of_query, left_q), (of_key, left_k) = _placed(i, spans.cu_q), _placed(j, spans.cu_k)
    seen = (of_query[:, None] == of_key) & (left_k >= left_q[:, None])
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(wide).nan_to_num(0.0, 0.0, 0.0).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    weighted = sdpa(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
    # A weight of zero times NaN is NaN: what is not finite is left out of the products and put where it is seen.
    return (weighted + _poison(query, key, value, seen)).to(query.dtype)


def _placed(rows: torch.Tensor, cu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each row, and how many rows of it are left with this one. Sequences without rows have none."""
    ends = cu[1:]
    of = torch.bucketize(rows, ends, right=True)
    return of, ends.index_select(0, of) - rows


@torch.no_grad()
def _poison(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[rows, heads, 1]: NaN for heads of rows that see a key or value that is not finite, otherwise 0."""
    bad = ~(torch.isfinite(key) & torch.isfinite(value)).all(-1)
    reached = (seen.float() @ bad.float() > 0).repeat_interleave(query.shape[1] // key.shape[1], 1)
    reached |= ~torch.isfinite(query).all(-1)
    return torch.zeros_like(reached, dtype=torch.float32).masked_fill(reached, torch.nan).unsqueeze(-1)


@torch.enable_grad()
def varlen_fault(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What is wrong with torch's kernel on this device, forward or backward; None: nothing. Waits for the device.

    Tried are prompts that are continued, shared KV heads, sequences without rows and bounds that are too high.
    """
    queries, keys = [3, 0, 17, 1, 70, 0], [3, 0, 40, 9, 70, 0]
    spans = replace(SequenceSpans.of(queries, keys, device), max_q=128, max_k=128)
    rng = torch.Generator().manual_seed(0)
    shapes = ((sum(queries), 4), (sum(keys), 2), (sum(keys), 2), (sum(queries), 4))
    q, k, v, grad = (torch.randn(*shape, head_dim, generator=rng).to(device, dtype) for shape in shapes)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    results = []
    try:
        for attention in (varlen_attention, varlen_reference):
            out = attention(q, k, v, spans, head_dim**-0.5)
            results.append((out.detach(), *torch.autograd.grad(out, inputs, grad)))
    except (RuntimeError, ValueError) as error:
        return f"varlen_attn fails: {str(error).splitlines()[0]}"
    apart = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*results, strict=True)]
    names = ("result", "gradient of q", "gradient of k", "gradient of v")
    wrong = [f"{name} by {error:.2g}" for name, error in zip(names, apart, strict=True) if not error < SAME]
    return f"varlen_attn is wrong here: {', '.join(wrong)}" if wrong else None
