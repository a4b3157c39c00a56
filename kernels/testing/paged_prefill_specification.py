"""Attention of prompt tokens to a paged KV cache: a token is what paged decode specifies for a context that ends there.

Free of Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from clif.kernels.paged_decode_table import DecodeRow
from clif.kernels.paged_prefill_table import PrefillTable, most_tiles, tile_parts, tile_words, write_tiles
from clif.kernels.testing.paged_decode_specification import DecodeBatch, random_decode


@dataclass(frozen=True)
class PromptTokens:
    """Tokens [start, stop) of a sequence, in rows from `row` on; its blocks."""

    row: int
    start: int
    stop: int
    blocks: Sequence[int]


@dataclass(frozen=True, eq=False)
class PrefillBatch:
    """One layer's input. rows: a sequence for each token, as long as what the token sees: what is specified."""

    rows: DecodeBatch
    chunks: tuple[PromptTokens, ...]

    def table(self, tile_tokens: int, rows: int = 0, sequences: int = 0) -> PrefillTable:
        """rows, sequences: what the table has room for, by default those of the batch."""
        rows, sequences = rows or len(self.rows.q), sequences or len(self.chunks)
        capacity = most_tiles(rows, sequences, tile_tokens)
        words = np.zeros(tile_words(capacity), np.int32)
        columns = zip(*((c.row, c.start, c.stop) for c in self.chunks), strict=True)
        firsts, starts, stops = map(np.array, columns) if self.chunks else (np.zeros(0, int),) * 3
        write_tiles(tile_parts(words, capacity), firsts, starts, stops, tile_tokens)
        width = max((len(c.blocks) for c in self.chunks), default=1)
        blocks = torch.zeros(sequences, width, dtype=torch.int32)
        for i, chunk in enumerate(self.chunks):
            blocks[i, : len(chunk.blocks)] = torch.tensor(chunk.blocks)
        counts, tiles = tile_parts(torch.from_numpy(words).to(self.rows.q.device), capacity)
        return PrefillTable(counts, tiles, blocks.to(counts), tile_tokens, self.rows.block_size)


def random_prefill(
    chunks: Sequence[tuple[int, int]], heads: int, kv_heads: int, d: int, block_size: int, *, dtype: torch.dtype,
    device: str = "cpu", shared: int = 0, seed: int = 0, cache_dtype: torch.dtype | None = None,
) -> PrefillBatch:  # fmt: skip
    """Chunks (start, stop) of sequences in blocks that lie anywhere, as random_decode() has them; a row between two.

    A chunk of one token is not for the kernel: its row is left out of `rows`.
    """
    stops = [stop for _, stop in chunks]
    batch = random_decode(
        stops, heads, kv_heads, d, block_size, dtype=dtype, device=device, shared=shared, seed=seed,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    rng, row = torch.Generator().manual_seed(seed + 1), 0
    parts, rows = list[PromptTokens](), list[DecodeRow]()
    for (start, stop), sequence in zip(chunks, batch.sequences, strict=True):
        parts.append(PromptTokens(row, start, stop, sequence.blocks))
        if stop - start > 1:
            rows += [DecodeRow(row + i, start + i + 1, sequence.blocks) for i in range(stop - start)]
        row += stop - start + 1
    q = (2 * torch.randn(row, heads, d, generator=rng)).to(batch.q)
    return PrefillBatch(replace(batch, q=q, sequences=tuple(rows)), tuple(parts))
