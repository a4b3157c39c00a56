"""Host side of the paged decode kernel: checks, workspace, launch."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from clif.kernels.paged_decode_kernel import paged_decode
from clif.kernels.paged_decode_table import DecodeConfig, DecodeTable
from clif.kernels.workspace import Workspace, Workspaces

INTERPRET = not isinstance(paged_decode, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1 when it was first imported)."""
LEAST_ROWS = 16
"""Smallest number of rows, and of head dimensions, of a product on tensor cores."""


class PagedDecode:
    """Launches the kernel on one device; shared by all layers of a model."""

    def __init__(self, device: torch.device, config: DecodeConfig | None = None) -> None:
        self.device, self.config = device, config or DecodeConfig()
        self._workspaces = Workspaces(device)

    def workspace(self) -> Workspace:
        """That of the current stream."""
        return self._workspaces.current()

    def attend(self, q: torch.Tensor, cache: torch.Tensor, table: DecodeTable, scale: float, out: torch.Tensor) -> None:
        """Fill the table's rows of out [rows, heads * d]; the other rows are left as they are.

        q [rows, heads, d]; cache [2 * kv_heads, slots, d], keys first, with the new tokens written. One launch, no
        wait for the device. Raises ValueError for tensors that the kernel cannot read.
        """
        _check(q, cache, scale, out)
        heads, d = q.shape[1:]
        kv_heads, config = len(cache) // 2, self.config
        group = heads // kv_heads
        parts = config.most_parts(table.max_blocks * table.block_size)
        targets = table.capacity * kv_heads
        weighted = targets * parts * group * d
        space = self.workspace()
        planes = space.take_planes(weighted + targets * parts * 2 * group)
        paged_decode[(parts, kv_heads, table.capacity)](
            q, cache, out, table.counts, table.rows, table.lengths, table.blocks, planes, planes[weighted:],
            space.take_tickets(targets), scale * math.log2(math.e), table.max_blocks, *q.stride()[:2],
            *cache.stride()[:2], out.stride(0),
            **constants(d, group, table.block_size, config), INTERPRET=INTERPRET, num_warps=config.warps,
            # Triton 3.10 no longer fuses products and sums by default: bitwise tests must not depend on the version.
            num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip


def constants(head_dim: int, group: int, block_size: int, config: DecodeConfig) -> dict[str, Any]:
    """What the kernel is compiled for: heads of this size, `group` query heads for each KV head."""
    return {
        "HEAD_DIM": head_dim, "HEAD_DIM_P": max(LEAST_ROWS, triton.next_power_of_2(head_dim)), "GROUP": group,
        "ROWS": max(LEAST_ROWS, triton.next_power_of_2(group)), "BLOCK_SIZE": block_size, "BLOCK_KV": config.block_kv,
        "PARTS": config.parts, "LEAST": config.least,
    }  # fmt: skip


def _check(q: torch.Tensor, cache: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    (rows, heads, d), kv_heads = q.shape, len(cache) // 2
    fit = kv_heads > 0 and len(cache) % 2 == 0 and heads % kv_heads == 0 and cache.shape[2] == d
    if not fit or tuple(out.shape) != (rows, heads * d):
        raise ValueError(
            f"q {list(q.shape)}, cache {list(cache.shape)} and out {list(out.shape)} do not fit together: "
            "[rows, heads, d], [2 * kv_heads, slots, d] and [rows, heads * d] are needed"
        )
    if not q.dtype == cache.dtype == out.dtype:
        raise ValueError(f"q {q.dtype}, cache {cache.dtype} and out {out.dtype}: one type is needed")
    if not q.stride(-1) == cache.stride(-1) == out.stride(-1) == 1:
        raise ValueError("the last dimension of q, cache and out must be contiguous: call .contiguous()")
    if not scale > 0:
        raise ValueError(f"scale {scale} is not above 0")
