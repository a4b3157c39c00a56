"""Attention of serving rows to the paged KV cache.

Sources: PagedAttention (Kwon et al., SOSP 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from clif.engine.prompt_rows import PromptRows
from clif.kernels.cpu.arena import Arena
from clif.kernels.cpu.host import HeadShape, scores_of
from clif.kernels.cpu.host import attention as cpu_attention
from clif.kernels.kv_types import read_slots
from clif.kernels.paged_decode_table import DecodeRow, DecodeTable
from clif.kernels.staging import send_ints
from clif.kernels.step_table import StepTable
from clif.models.layer_ops import CacheRows
from clif.models.scores import Scores, cap_

if TYPE_CHECKING:
    from clif.kernels.paged_decode_host import PagedDecode


class KVCache:
    """Keys and values of all sequences: one tensor [2 * kv_heads, slots, head_dim] per layer, keys first.

    One tensor, so that a step writes once and gathers once per layer. On a CPU those of bfloat16 lie in huge pages, if
    the system gives them: attention reads blocks from all over the cache.
    """

    def __init__(
        self, layers: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2 * kv_heads, tokens, head_dim)
        if device.type == "cpu" and dtype == torch.bfloat16:
            # Zeros that take no memory before they are touched.
            numbers = Arena.rounded(2 * kv_heads * tokens * head_dim)
            arena = Arena(layers * numbers)
            self.layers = [arena.cut(2 * kv_heads * tokens * head_dim).view(shape) for _ in range(layers)]
        else:
            self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def bytes(self) -> int:
        """Memory held, for all layers."""
        return sum(t.nbytes for t in self.layers)


class DecodeGroup(NamedTuple):
    """Decode rows of like context length: rows [n], cache slots [n * longest] of what they see, and what is added to
    the scores [n, 1, longest]: nothing, or minus infinity where a shorter context has ended."""

    rows: torch.Tensor
    context: torch.Tensor
    added: torch.Tensor


class WindowRows(NamedTuple):
    """What the rows of a step read in layers of one window: decode rows in groups, and those of prompts."""

    groups: Seq[DecodeGroup]
    prompts: PromptRows | None


@dataclass(frozen=True)
class PagedLayout:
    """Which cache slots the rows of a step write [rows] and read.

    Decode rows are one launch of the paged kernel over `table`, or without it one batched product for each of `groups`;
    prompts None: the step has no rows of a prompt. step: all rows of a step, where attention on a CPU reads them in the
    cache; then there is nothing of the others. windowed: by window, the same for layers that have one. padded: some
    rows attend to nothing, and get zeros.
    """

    count: int
    slot_mapping: torch.Tensor
    table: DecodeTable | None
    groups: Seq[DecodeGroup]
    prompts: PromptRows | None
    step: StepTable | None = None
    windowed: Mapping[int, WindowRows] = field(default_factory=dict)
    padded: bool = False

    def seen(self, window: int | None) -> WindowRows:
        """What the rows read in layers of this window."""
        return WindowRows(self.groups, self.prompts) if window is None else self.windowed[window]


class PagedRows:
    """The rows of one step before the cache. paged: the kernel that reads the layout's table."""

    def __init__(self, cache: KVCache, layout: PagedLayout, paged: PagedDecode | None = None) -> None:
        self._cache, self._layout, self._paged = cache, layout, paged

    def cache_rows(self, layer: int) -> CacheRows:
        """The slots of the step's rows."""
        return CacheRows(self._cache.layers[layer], self._layout.slot_mapping)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """query [rows, heads, d], key and value [rows, kv_heads, d] -> [rows, heads * d]. The cache has both."""
        layout, cache = self._layout, self._cache.layers[layer]
        if layout.step is not None:
            shape = HeadShape(query.shape[1], key.shape[1], query.shape[2])
            return cpu_attention(query, shape, cache, layout.step, scores_of(*scores))
        # What is left as it was, may not be a number.
        make = query.new_zeros if layout.padded else query.new_empty
        out = make(query.shape[0], query.shape[1] * query.shape[2])
        if self._paged is not None and layout.table is not None:
            self._paged.attend(query, cache, layout.table, scores.plain_scale, out)
        groups, prompts = layout.seen(scores.window)
        for group in groups:
            if len(group.rows) == layout.count:
                return _decode(query, cache, group, scores)
            out.index_copy_(0, group.rows, _decode(query.index_select(0, group.rows), cache, group, scores))
        if prompts is not None:
            return prompts.attend(query, key, value, cache, scores, out)
        return out


def make_decode_group(
    members: Seq[DecodeRow], block_size: int, dtype: torch.dtype, device: torch.device, window: int | None = None
) -> DecodeGroup:
    """Contexts padded to the longest one; with a window no more than the last tokens of each.

    Padding reads the last slot of the same sequence again: a NaN of one request must not reach another's products.
    """
    ends = np.array([member.length for member in members])
    lengths = ends if window is None else np.minimum(ends, window)
    at = (ends - lengths)[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
    block, offset = np.divmod(at, block_size)
    contexts = np.stack([np.asarray(m.blocks)[b] for m, b in zip(members, block, strict=True)]) * block_size + offset
    ended = torch.from_numpy(np.arange(lengths.max()) >= lengths[:, None]).unsqueeze(1).to(device)
    added = torch.zeros(ended.shape, dtype=dtype, device=device).masked_fill_(ended, -torch.inf)
    rows = send_ints([member.row for member in members], device)
    return DecodeGroup(rows, torch.from_numpy(contexts.reshape(-1)).to(device), added)


def _decode(query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup, scores: Scores) -> torch.Tensor:
    """One query row per sequence [n, heads, d] -> [n, heads * d].

    Products over a gathered, padded context; scores are rounded to the model's dtype before the softmax, as in
    transformers' eager attention.
    """
    n, heads, d = query.shape
    kv_heads = cache.shape[0] // 2
    grouped = (query * scores.scale).view(n, kv_heads, heads // kv_heads, d).transpose(0, 1)
    k, v = read_slots(cache, group.context, query.dtype).view(2 * kv_heads, n, -1, d).chunk(2)
    products = cap_(torch.matmul(grouped, k.transpose(-1, -2)), scores.softcap).add_(group.added)
    return torch.matmul(scores.softmax(products, 2, 0), v).transpose(0, 1).reshape(n, heads * d)
