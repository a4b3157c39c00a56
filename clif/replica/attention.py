"""Attention of one packed batch: paged KV for serving rows, block-diagonal causal for training rows."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from clif.replica.blocks import places
from clif.replica.scheduler import Chunk


class KVCache:
    """Keys and values of all sequences, one pair of tensors [places, kv_heads, head_dim] per layer."""

    def __init__(
        self, layers: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (tokens, kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]


class PagedRows:
    """Attention of serving rows to the cache: decode rows as one padded batch, prompt chunks one by one.

    Row i of the batch is token rows[i] of its chunk's sequence; chunks lie one after the other.
    """

    def __init__(self, cache: KVCache, chunks: Seq[Chunk], block_size: int, device: torch.device) -> None:
        self._cache = cache
        written: list[int] = []
        decode_rows: list[int] = []
        contexts: list[list[int]] = []
        self._prefills: list[tuple[int, int, torch.Tensor, torch.Tensor | None]] = []
        row = 0
        for chunk in chunks:
            context = places(chunk.sequence.blocks, block_size, 0, chunk.stop)
            written += context[chunk.start :]
            size = chunk.stop - chunk.start
            if chunk.is_decode:
                decode_rows.append(row)
                contexts.append(context)
            else:
                self._prefills.append((row, row + size, _index(context, device), _past_mask(chunk, device)))
            row += size
        self._written = _index(written, device)
        self._decode_rows = _index(decode_rows, device)
        self._pad_decode(contexts, device)
        self.count = row

    def _pad_decode(self, contexts: list[list[int]], device: torch.device) -> None:
        longest = max(map(len, contexts), default=0)
        self._contexts = _index([p for c in contexts for p in (*c, *[0] * (longest - len(c)))], device)
        lengths = _index([len(c) for c in contexts], device)
        # [sequences, 1, 1, longest]: heads and the one query row broadcast.
        self._padding = (torch.arange(longest, device=device) < lengths.unsqueeze(1))[:, None, None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [heads, rows, d], k and v [kv_heads, rows, d] -> [rows, heads, d]. Writes k and v to the cache first."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._written, k.transpose(0, 1))
        values.index_copy_(0, self._written, v.transpose(0, 1))
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2], dtype=q.dtype, device=q.device)
        if len(self._decode_rows):
            out[self._decode_rows] = self._decode(keys, values, q[:, self._decode_rows], scale)
        for start, stop, context, mask in self._prefills:
            past_k, past_v = (t.index_select(0, context).transpose(0, 1).unsqueeze(0) for t in (keys, values))
            rows = q[None, :, start:stop]
            got = sdpa(rows, past_k, past_v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
            out[start:stop] = got[0].transpose(0, 1)
        return out

    def _decode(self, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, scale: float) -> torch.Tensor:
        """One query row per sequence. The query heads of a KV head stand in for rows: no copy of K and V per head."""
        heads, n, d = q.shape
        kv_heads = keys.shape[1]
        grouped = q.view(kv_heads, heads // kv_heads, n, d).permute(2, 0, 1, 3)
        k, v = (t.index_select(0, self._contexts).view(n, -1, kv_heads, d).transpose(1, 2) for t in (keys, values))
        return sdpa(grouped, k, v, attn_mask=self._padding, scale=scale).reshape(n, heads, d)


class PackedRows:
    """Causal attention within each of several packed samples, as one right-padded batch.

    Padding lies after a sample's last token, so causality alone keeps it from being seen.
    lengths: tokens per sample, in row order.
    """

    def __init__(self, lengths: Seq[int], device: torch.device) -> None:
        self.count = sum(lengths)
        self._shape = (len(lengths), max(lengths))
        self._rows = _index([i * self._shape[1] + j for i, n in enumerate(lengths) for j in range(n)], device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """As PagedRows.attend, without a cache."""
        out = sdpa(self._pad(q), self._pad(k), self._pad(v), is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(-1, q.shape[0], q.shape[2])[self._rows]

    def _pad(self, t: torch.Tensor) -> torch.Tensor:
        """[heads, rows, d] -> [samples, heads, longest, d]."""
        samples, longest = self._shape
        flat = t.new_zeros(samples * longest, t.shape[0], t.shape[2]).index_copy(0, self._rows, t.transpose(0, 1))
        return flat.view(samples, longest, t.shape[0], t.shape[2]).transpose(1, 2)


def _index(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _past_mask(chunk: Chunk, device: torch.device) -> torch.Tensor | None:
    """Boolean mask [rows, context] of a chunk that continues a prompt; None: plain causal."""
    if chunk.start == 0:
        return None
    size = (chunk.stop - chunk.start, chunk.stop)
    return torch.ones(size, dtype=torch.bool, device=device).tril(diagonal=chunk.start)
