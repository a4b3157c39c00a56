"""Host side of the paged prefill kernel: checks and launch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton

from clif.kernels.cpu.host import HeadShape
from clif.kernels.kv_types import to_cache_type
from clif.kernels.paged_decode_config import power_of_two
from clif.kernels.paged_decode_host import LEAST_ROWS, check_tensors
from clif.kernels.paged_prefill_kernel import paged_prefill
from clif.kernels.paged_prefill_reference import PagedPrefillReference
from clif.kernels.paged_prefill_table import (
    PrefillConfig,
    PrefillTable,
    most_tiles,
    prefill_config,
    tile_parts,
    tile_words,
    write_tiles,
)

INTERPRET = not isinstance(paged_prefill, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1 when it was first imported)."""

SAME = 0.02
"""Relative difference to torch's products that is rounding: a bfloat16 has 8 bits."""
TRIED = ((0, 70), (0, 2), (33, 90))
"""Chunks of the check: a new prompt, a short one, one that continues."""


class PagedPrefill:
    """Launches the kernel; shared by all layers of a model. config: for every shape; None: the default of each."""

    def __init__(self, config: PrefillConfig | None = None) -> None:
        self._config = config

    def config(self, group: int, head_dim: int, itemsize: int) -> PrefillConfig:
        """How heads of this size are computed, `group` of which share a KV head."""
        return self._config or prefill_config(group, head_dim, itemsize)

    def tile_tokens(self, group: int, head_dim: int, itemsize: int) -> int:
        """Rows of a tile that the kernel takes."""
        return self.config(group, head_dim, itemsize).tile_tokens(group)

    def attend(
        self, q: torch.Tensor, cache: torch.Tensor, table: PrefillTable, scale: float, out: torch.Tensor
    ) -> None:
        """Fill the rows of the table's tiles in out [rows, heads * d]; the other rows are left as they are.

        q [rows, heads, d]; cache [2 * kv_heads, slots, d], keys first, with the new tokens written, of the type of q
        and out or float8_e4m3fn. One launch, no wait for the device. Raises ValueError for tensors that the kernel
        cannot read, and for tiles of another size than tile_tokens().
        """
        check_tensors(q, cache, scale, out)
        heads, d = q.shape[1:]
        kv_heads = len(cache) // 2
        group = heads // kv_heads
        config = self.config(group, d, q.itemsize)
        if table.tile_tokens != config.tile_tokens(group):
            raise ValueError(f"tiles of {table.tile_tokens} rows: make them of {config.tile_tokens(group)}")
        paged_prefill[(kv_heads, len(table.tiles))](
            q, cache, out, table.counts, table.tiles, table.blocks, scale * math.log2(math.e), table.blocks.shape[1],
            *q.stride()[:2], *cache.stride()[:2], out.stride(0),
            **constants(kv_heads, d, group, table.block_size, config), INTERPRET=INTERPRET,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip


def constants(kv_heads: int, head_dim: int, group: int, block_size: int, config: PrefillConfig) -> dict[str, Any]:
    """What the kernel is compiled for: heads of this size, `group` query heads for each KV head."""
    return {
        "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "HEAD_DIM_P": max(LEAST_ROWS, power_of_two(head_dim)),
        "GROUP": group, "ROWS": config.rows, "BLOCK_SIZE": block_size, "BLOCK_KV": config.block_kv,
    }  # fmt: skip


def prefill_fault(
    prefill: PagedPrefill,
    device: torch.device,
    dtype: torch.dtype,
    heads: HeadShape,
    kv_dtype: torch.dtype,
    block_size: int,
) -> str | None:
    """What is wrong with the kernel for such heads on this device; None: nothing. Waits for the device.

    Raises Triton's error for one that does not compile.
    """
    rng = torch.Generator().manual_seed(0)
    table = _tried(
        prefill.tile_tokens(heads.heads // heads.kv_heads, heads.head_dim, dtype.itemsize), block_size, device
    )
    rows, slots = sum(stop - start for start, stop in TRIED), table.blocks.numel() * block_size
    q = torch.randn(rows, heads.heads, heads.head_dim, generator=rng).to(device, dtype)
    cache = torch.randn(2 * heads.kv_heads, slots, heads.head_dim, generator=rng).to(device, dtype)
    cache, results = to_cache_type(cache, kv_dtype), []
    for kernel in (prefill, PagedPrefillReference(table.tile_tokens)):
        out = q.new_zeros(rows, heads.heads * heads.head_dim)
        kernel.attend(q, cache, table, heads.head_dim**-0.5, out)
        results.append(out.float())
    error = float((results[0] - results[1]).norm() / results[1].norm())
    return None if error < SAME else f"it is wrong here by {error:.2g}"


def _tried(tile_tokens: int, block_size: int, device: torch.device) -> PrefillTable:
    starts, stops = np.array(TRIED).T
    rows = (stops - starts).cumsum() - (stops - starts)
    capacity = most_tiles(int(sum(stops - starts)), len(TRIED), tile_tokens)
    words = np.zeros(tile_words(capacity), np.int32)
    write_tiles(tile_parts(words, capacity), rows, starts, stops, tile_tokens)
    counts, tiles = tile_parts(torch.from_numpy(words).to(device), capacity)
    blocks = torch.arange(len(TRIED) * -(-int(stops.max()) // block_size), dtype=torch.int32, device=device)
    return PrefillTable(counts, tiles, blocks.flip(0).view(len(TRIED), -1), tile_tokens, block_size)
