"""Causal attention within each of several packed sequences, forward and backward, as a few batched products.

Sequences of similar length share one right-padded batch. Padding lies after a sequence's last token, so the causal
mask alone hides it. On a CPU the query heads of a KV head become rows: K and V are not copied per head; long sequences
attend in blocks (clif/models/causal_blocks.py). On a GPU this is the way of what torch's varlen_attn does not compute
(clif/models/varlen.py), float32 above all.

Sources: grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from clif.kernels.staging import send_ints
from clif.models.causal_blocks import (
    LONG,
    attend_blocks,
    attend_blocks_backward,
    causal_mask,
    probabilities,
    score_gradients,
)
from clif.models.scores import Scores

SAVED_LENGTH = 256
"""Longest sequence whose L x L probabilities the backward keeps; those of longer ones are computed again."""
SMALLEST_BUCKET = 32


def bucket(length: int) -> int:
    """The power of two that a length belongs to: nothing is padded to twice its size or more."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


@dataclass(frozen=True)
class _Group:
    """Sequences of similar length. rows [tokens]: where they lie in the batch; slots [tokens]: where when padded.

    None: the whole batch as it lies, no padding.
    """

    sequences: int
    longest: int
    rows: torch.Tensor | None
    slots: torch.Tensor | None


class CausalSequences:
    """The plan of one packed batch. lengths: tokens of each sequence, in row order."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self._device = sum(lengths), device
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        by_size: dict[int, list[int]] = defaultdict(list)
        for i, length in enumerate(lengths):
            by_size[bucket(length)].append(i)
        self.groups = [self._group([(starts[i], lengths[i]) for i in members]) for members in by_size.values()]

    def _group(self, members: list[tuple[int, int]]) -> _Group:
        longest = max(length for _, length in members)
        if sum(length for _, length in members) == len(members) * longest == self.count:
            return _Group(len(members), longest, None, None)
        rows = [start + j for start, length in members for j in range(length)]
        slots = [i * longest + j for i, (_, length) in enumerate(members) for j in range(length)]
        return _Group(len(members), longest, self._index(rows), self._index(slots))

    def _index(self, values: list[int]) -> torch.Tensor:
        return send_ints(values, self._device)

    def mask(self, longest: int, window: int | None) -> torch.Tensor:
        """What is added to the scores of sequences padded to this length [longest, longest]; made once."""
        key = longest, None if window is None or window >= longest else window
        if key not in self._masks:
            self._masks[key] = causal_mask(0, longest, self._device, key[1])
        return self._masks[key]

    def cache_rows(self, layer: int) -> None:
        """Nothing is kept of these rows."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """query [rows, heads, d], key and value [rows, kv_heads, d] -> [rows, heads * d]."""
        if query.is_cuda and scores.fusible:
            return self._fused(query, key, value, scores).flatten(1)
        out: torch.Tensor = _Attend.apply(query, key, value, self, scores)
        return out.flatten(1)

    def _fused(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
        """[rows, heads, d] by torch's fused attention, whose backward holds no matrix of length x length."""
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in self.groups:
            q, k, v = (_pad(t, group).transpose(1, 2) for t in (query, key, value))
            causal = scores.window is None or scores.window >= group.longest
            mask = None if causal else self.mask(group.longest, scores.window).to(query.dtype)
            padded = sdpa(q, k, v, mask, is_causal=causal, scale=scores.scale, enable_gqa=True).transpose(1, 2)
            flat = padded.reshape(-1, *query.shape[1:])
            if group.rows is None or group.slots is None:
                return flat
            out.index_copy_(0, group.rows, flat.index_select(0, group.slots))
        return out


def _pad(x: torch.Tensor, group: _Group) -> torch.Tensor:
    """[rows, heads, d] -> [sequences, longest, heads, d]."""
    if group.rows is None or group.slots is None:
        return x.reshape(group.sequences, group.longest, *x.shape[1:])
    padded = x.new_zeros(group.sequences * group.longest, *x.shape[1:])
    padded.index_copy_(0, group.slots, x.index_select(0, group.rows))
    return padded.view(group.sequences, group.longest, *x.shape[1:])


def _put(padded: torch.Tensor, group: _Group, out: torch.Tensor) -> None:
    """Write [sequences, longest, heads, d] to the group's rows of out."""
    flat = padded.reshape(-1, *out.shape[1:])
    if group.rows is None or group.slots is None:
        out.copy_(flat)
    else:
        out.index_copy_(0, group.rows, flat.index_select(0, group.slots))


def _queries(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[s, longest, heads, d] -> [s, kv_heads, queries per KV head * longest, d]."""
    s, longest, heads, d = x.shape
    return x.view(s, longest, kv_heads, heads // kv_heads, d).permute(0, 2, 3, 1, 4).reshape(s, kv_heads, -1, d)


def _rows(x: torch.Tensor, longest: int) -> torch.Tensor:
    """The inverse of _queries: [s, kv_heads, g * longest, d] -> [s, longest, heads, d]."""
    s, kv_heads, _, d = x.shape
    return x.view(s, kv_heads, -1, longest, d).permute(0, 3, 1, 2, 4).reshape(s, longest, -1, d)


class _Attend(torch.autograd.Function):
    """Padding, products and unpadding in one node: it keeps rows, and probabilities of short sequences."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: CausalSequences, scores: Scores
    ) -> torch.Tensor:
        out, kept = torch.empty_like(query, memory_format=torch.contiguous_format), []
        for group in plan.groups:
            q, k, v = _queries(_pad(query, group), key.shape[1]), *_keys(key, value, group)
            whole = group.longest <= LONG
            p = probabilities(q, k, plan.mask(group.longest, scores.window), scores) if whole else None
            attended = attend_blocks(q, k, v, scores) if p is None else p @ v
            _put(_rows(attended, group.longest), group, out)
            kept.append(p if group.longest <= SAVED_LENGTH else None)
        ctx.plan, ctx.scores = plan, scores
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
        # The probabilities of a long sequence were not kept.
        for group, p in zip(ctx.plan.groups, kept, strict=True):
            q, k, v = _queries(_pad(query, group), key.shape[1]), *_keys(key, value, group)
            go = _queries(_pad(gradients[0], group), key.shape[1])
            mask = ctx.plan.mask(group.longest, ctx.scores.window) if group.longest <= LONG else None
            of_q, of_k, of_v = _backward(q, k, v, go, p, mask, ctx.scores)
            _put(_rows(of_q, group.longest), group, grads[0])
            _put(of_k.transpose(1, 2), group, grads[1])
            _put(of_v.transpose(1, 2), group, grads[2])
        return *grads, None, None


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    p: torch.Tensor | None,
    mask: torch.Tensor | None,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v of a group. p: the probabilities, if they were kept."""
    if mask is None:
        return attend_blocks_backward(q, k, v, grad, scores)
    p = probabilities(q, k, mask, scores) if p is None else p
    gs = score_gradients(p, grad, q, k, v, scores)
    return gs @ k, gs.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


def _keys(key: torch.Tensor, value: torch.Tensor, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as [s, kv_heads, longest, d]."""
    k, v = (_pad(t, group).transpose(1, 2) for t in (key, value))
    return k, v
