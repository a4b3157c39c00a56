"""Attention of prompt tokens to a paged KV cache by torch's products: of a shape that never changes.

It reads the same tiles as the kernel (kernels/paged_prefill_kernel.py) and nothing on the host, so that a step with it
keeps to the rules of captured graphs on any device. All of a sequence's blocks are gathered for each row: slow.

Sources: PagedAttention (Kwon et al., SOSP 2023).
"""

from __future__ import annotations

import torch

from clif.kernels.kv_types import read_slots
from clif.kernels.paged_prefill_table import PrefillTable


class PagedPrefillReference:
    """Stands in for PagedPrefill where there is no Triton. tokens: rows of a tile."""

    def __init__(self, tokens: int = 4) -> None:
        self._tokens = tokens

    def tile_tokens(self, group: int, head_dim: int, itemsize: int) -> int:
        """As PagedPrefill.tile_tokens."""
        return self._tokens

    def attend(
        self, q: torch.Tensor, cache: torch.Tensor, table: PrefillTable, scale: float, out: torch.Tensor
    ) -> None:
        """Fill the rows of the table's tiles in out [rows, heads * d]; others are left as they are. As PagedPrefill."""
        (rows, heads, d), kv_heads = q.shape, len(cache) // 2
        sequence, position = _of_rows(table, rows)
        k, v = (_by_sequence(part, table, q.dtype) for part in cache.chunk(2))
        unseen = torch.arange(k.shape[2], device=q.device) > position[:, None]
        for_row = sequence.clamp_min(0)
        grouped = (q * scale).view(rows, kv_heads, heads // kv_heads, d).transpose(0, 1)
        # Values that a token does not see may hold a NaN of another request, and zero times NaN is NaN.
        seen_v = v.index_select(1, for_row).masked_fill(unseen[None, :, :, None], 0.0)
        scores = torch.matmul(grouped, k.index_select(1, for_row).transpose(-1, -2))
        weights = scores.masked_fill(unseen[None, :, None], -torch.inf).softmax(-1)
        attended = torch.matmul(weights, seen_v).transpose(0, 1).reshape(rows, heads * d)
        out.copy_(torch.where((sequence >= 0)[:, None], attended, out))


def _of_rows(table: PrefillTable, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each row, -1 for those of no tile, and its position in it."""
    first, size, start, sequence = table.tiles.long().unbind(1)
    within = torch.arange(table.tile_tokens, device=first.device)
    tile = torch.arange(len(first), device=first.device)
    mine = (within < size[:, None]) & (tile < table.counts)[:, None]
    # What no tile holds belongs to a row behind the last one.
    at = torch.where(mine, first[:, None] + within, rows).flatten()
    of_row, position = first.new_full((rows + 1,), -1), first.new_zeros(rows + 1)
    of_row.scatter_(0, at, torch.where(mine, sequence[:, None], -1).flatten())
    position.scatter_(0, at, torch.where(mine, start[:, None] + within, 0).flatten())
    return of_row[:rows], position[:rows]


def _by_sequence(part: torch.Tensor, table: PrefillTable, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [kv_heads, slots, d] of the cache -> [kv_heads, sequences, tokens, d]."""
    offsets = torch.arange(table.block_size, device=part.device)
    slots = (table.blocks.long()[:, :, None] * table.block_size + offsets).flatten()
    return read_slots(part, slots, dtype).unflatten(1, (len(table.blocks), -1))
