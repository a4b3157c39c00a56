"""Attention of one new token per sequence to a paged KV cache by torch's products: of a shape that never changes.

It reads the same table as the kernel (kernels/paged_decode_kernel.py) and nothing on the host, so that a step with it
keeps to the rules of captured graphs on any device. All of the table's blocks are gathered, needed or not: slow.

Sources: PagedAttention (Kwon et al., SOSP 2023).
"""

from __future__ import annotations

import torch

from clif.kernels.kv_types import read_slots
from clif.kernels.paged_decode_table import DecodeTable


class PagedDecodeReference:
    """Stands in for PagedDecode where there is no Triton."""

    def attend(self, q: torch.Tensor, cache: torch.Tensor, table: DecodeTable, scale: float, out: torch.Tensor) -> None:
        """Fill the table's rows of out [rows, heads * d]; others are left as they are. As PagedDecode.attend."""
        (rows, heads, d), kv_heads, n = q.shape, len(cache) // 2, table.capacity
        offsets = torch.arange(table.block_size, device=q.device)
        slots = (table.blocks.long()[:, :, None] * table.block_size + offsets).flatten()
        k, v = read_slots(cache, slots, q.dtype).view(2 * kv_heads, n, -1, d).chunk(2)
        ended = torch.arange(k.shape[2], device=q.device) >= table.lengths[:, None]
        # Values behind the end may hold a NaN of another request, and zero times NaN is NaN.
        v = v.masked_fill(ended[None, :, :, None], 0.0)
        sequences = torch.arange(n, device=q.device)
        present = (sequences < table.counts) & (table.lengths > 0)
        # Sequences that the table does not hold, or without a length, belong to a row behind the last one.
        at = torch.where(present, table.rows, rows).long()
        grouped = (
            (q.index_select(0, at.clamp_max(rows - 1)) * scale).view(n, kv_heads, heads // kv_heads, d).transpose(0, 1)
        )
        scores = torch.matmul(grouped, k.transpose(-1, -2)).masked_fill(ended[None, :, None], -torch.inf)
        attended = torch.matmul(scores.softmax(-1), v).transpose(0, 1).reshape(n, heads * d)
        of_row = sequences.new_full((rows + 1,), -1).scatter_(0, at, torch.where(present, sequences, -1))[:rows]
        out.copy_(torch.where((of_row >= 0)[:, None], attended.index_select(0, of_row.clamp_min(0)), out))
