"""Attention of serving rows to the paged KV cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from clif.engine.blocks import cache_slots
from clif.engine.scheduler import Chunk
from clif.kernels.paged_decode_table import DecodeRow, DecodeTable
from clif.models.causal import CausalSequences, bucket

if TYPE_CHECKING:
    from clif.kernels.paged_decode_host import PagedDecode


class KVCache:
    """Keys and values of all sequences: one tensor [2 * kv_heads, slots, head_dim] per layer, keys first.

    One tensor, so that a step writes once and gathers once per layer.
    """

    def __init__(
        self, layers: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2 * kv_heads, tokens, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def bytes(self) -> int:
        """Memory held, for all layers."""
        return sum(t.nbytes for t in self.layers)


class PagedRows:
    """Which cache slots the rows of one step write and read.

    Chunks lie one after the other. Decode rows are one launch of the kernel `paged`, or without it one batched product
    for all whose contexts are of like length; prompts without a past attend among themselves; prompt chunks with a
    past (continued, or behind a reused prefix) go one by one.
    """

    def __init__(
        self,
        cache: KVCache,
        chunks: Seq[Chunk],
        block_size: int,
        device: torch.device,
        paged: PagedDecode | None = None,
    ) -> None:
        self._cache, self._device, self._paged = cache, device, paged
        written: list[int] = []
        decoding: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        launched: list[DecodeRow] = []
        fresh: list[tuple[int, int]] = []
        self._continued: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        row = 0
        for chunk in chunks:
            blocks, size = chunk.sequence.blocks, chunk.stop - chunk.start
            written += cache_slots(blocks, block_size, chunk.start, chunk.stop)
            if size == 1 and paged is not None:
                launched.append(DecodeRow(row, chunk.stop, blocks))
            elif size == 1:
                decoding[bucket(chunk.stop)].append((row, cache_slots(blocks, block_size, 0, chunk.stop)))
            elif chunk.start == 0:
                fresh.append((row, row + size))
            else:
                context = self._index(cache_slots(blocks, block_size, 0, chunk.stop))
                self._continued.append((row, row + size, context, _past_mask(chunk, device)))
            row += size
        self.count = row
        self._written = self._index(written)
        self._table = DecodeTable.make(launched, block_size, device) if launched else None
        self._decodes = [self._decode_group(members) for members in decoding.values()]
        self._fresh_rows = self._index([r for start, stop in fresh for r in range(start, stop)])
        self._fresh = CausalSequences([stop - start for start, stop in fresh], device) if fresh else None

    def _decode_group(self, members: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [n], cache slots [n * longest] and what to add to the scores [n, 1, longest].

        Padding reads a slot of the same sequence again: a NaN of one request must not reach another's products.
        """
        longest = max(len(context) for _, context in members)
        contexts = [p for _, context in members for p in (*context, *context[-1:] * (longest - len(context)))]
        lengths = self._index([len(context) for _, context in members])
        padding = torch.arange(longest, device=self._device) >= lengths.unsqueeze(1)
        added = torch.zeros(padding.shape, device=self._device, dtype=self._cache.layers[0].dtype)
        rows = self._index([row for row, _ in members])
        return rows, self._index(contexts), added.masked_fill_(padding, -torch.inf).unsqueeze(1)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [rows, heads, d], key and value [rows, kv_heads, d] -> [rows, heads * d]. Writes to the cache first."""
        cache = self._cache.layers[layer]
        cache.index_copy_(1, self._written, torch.cat((key, value), 1).transpose(0, 1))
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        if self._paged is not None and self._table is not None:
            self._paged.attend(query, cache, self._table, scale, out)
        for rows, context, added in self._decodes:
            got = _decode(
                query if len(rows) == self.count else query.index_select(0, rows), cache, context, added, scale
            )
            if len(rows) == self.count:
                return got
            out.index_copy_(0, rows, got)
        if self._fresh is not None:
            q, k, v = (t.index_select(0, self._fresh_rows) for t in (query, key, value))
            out.index_copy_(0, self._fresh_rows, self._fresh.attend(layer, q, k, v, scale))
        for start, stop, context, mask in self._continued:
            past_k, past_v = cache.index_select(1, context).unsqueeze(0).chunk(2, 1)
            rows = query[start:stop].transpose(0, 1).unsqueeze(0)
            got = sdpa(rows, past_k, past_v, attn_mask=mask, scale=scale, enable_gqa=True)
            out[start:stop] = got[0].transpose(0, 1).flatten(1)
        return out

    def _index(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _decode(
    query: torch.Tensor, cache: torch.Tensor, context: torch.Tensor, added: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query row per sequence [n, heads, d] -> [n, heads * d].

    Products over a gathered, padded context; scores are rounded to the model's dtype before the softmax, as in
    transformers' eager attention.
    """
    n, heads, d = query.shape
    kv_heads = cache.shape[0] // 2
    grouped = (query * scale).view(n, kv_heads, heads // kv_heads, d).transpose(0, 1)
    k, v = cache.index_select(1, context).view(2 * kv_heads, n, -1, d).chunk(2)
    scores = torch.matmul(grouped, k.transpose(-1, -2)).add_(added)
    return torch.matmul(scores.softmax(-1), v).transpose(0, 1).reshape(n, heads * d)


def _past_mask(chunk: Chunk, device: torch.device) -> torch.Tensor:
    """Boolean mask [rows, context] of a chunk that continues a prompt."""
    size = (chunk.stop - chunk.start, chunk.stop)
    return torch.ones(size, dtype=torch.bool, device=device).tril(diagonal=chunk.start)
