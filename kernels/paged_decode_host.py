"""Host side of the paged decode kernel: checks, workspace, launch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import triton

from clif.kernels.kv_types import FP8
from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape, default_config
from clif.kernels.paged_decode_kernel import paged_decode
from clif.kernels.paged_decode_table import DecodeTable
from clif.kernels.workspace import Workspace, Workspaces

INTERPRET = not isinstance(paged_decode, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1 when it was first imported)."""
LEAST_ROWS = 16
"""Smallest number of rows, and of head dimensions, of a product on tensor cores."""
SEQUENCES = 256
"""Sequences of a launch at most: every program looks at the lengths of all of them, two for each of 128 threads."""
FEW_PROGRAMS = 3
"""Programs where no multiprocessors are: fewer than there are items, so that tests see a program take several."""


class PagedDecode:
    """Launches the kernel on one device; shared by all layers of a model.

    config: for every shape; None: the measured one of a shape, or otherwise the default. A shape has one configuration,
    whatever the batch: it decides the bits of a result.
    """

    def __init__(
        self,
        device: torch.device,
        config: DecodeConfig | None = None,
        measured: Mapping[DecodeShape, DecodeConfig] | None = None,
    ) -> None:
        self.device = device
        self._config, self._configs = config, dict(measured or {})
        self._workspaces = Workspaces(device)

    def config(self, shape: DecodeShape) -> DecodeConfig:
        """How this shape is computed."""
        if self._config is not None:
            return self._config
        if shape not in self._configs:
            self._configs[shape] = default_config(shape)
        return self._configs[shape]

    def workspace(self) -> Workspace:
        """That of the current stream."""
        return self._workspaces.current()

    @cached_property
    def _multiprocessors(self) -> int:
        """0 where there are none."""
        return torch.cuda.get_device_properties(self.device).multi_processor_count if self.device.type == "cuda" else 0

    def attend(self, q: torch.Tensor, cache: torch.Tensor, table: DecodeTable, scale: float, out: torch.Tensor) -> None:
        """Fill the table's rows of out [rows, heads * d]; the other rows are left as they are.

        q [rows, heads, d]; cache [2 * kv_heads, slots, d], keys first, with the new tokens written, of the type of q
        and out or float8_e4m3fn. One launch for each SEQUENCES that the table can hold, no wait for the device. Raises
        ValueError for tensors that the kernel cannot read.
        """
        check_tensors(q, cache, scale, out)
        heads, d = q.shape[1:]
        kv_heads = len(cache) // 2
        group, config = heads // kv_heads, self.config(DecodeShape(heads, kv_heads, d, cache.itemsize))
        targets = min(table.capacity, SEQUENCES) * kv_heads
        items = targets * config.most_parts(table.max_blocks * table.block_size)
        space = self.workspace()
        planes = space.take_planes(items * (d + 2) * group)
        tickets = space.take_tickets(targets)
        programs = min(items, self._multiprocessors * config.programs or FEW_PROGRAMS)
        for first in range(0, table.capacity, SEQUENCES):
            paged_decode[(programs,)](
                q, cache, out, table.counts, table.rows, table.lengths, table.blocks, planes,
                planes[items * d * group :], tickets, scale * math.log2(math.e), first, table.capacity,
                table.max_blocks, *q.stride()[:2], *cache.stride()[:2], out.stride(0),
                **constants(kv_heads, d, group, table.block_size, config), INTERPRET=INTERPRET,
                # Triton 3.10 no longer fuses products and sums by default: bitwise tests must not depend on it.
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip


def constants(kv_heads: int, head_dim: int, group: int, block_size: int, config: DecodeConfig) -> dict[str, Any]:
    """What the kernel is compiled for: heads of this size, `group` query heads for each KV head."""
    return {
        "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "HEAD_DIM_P": max(LEAST_ROWS, triton.next_power_of_2(head_dim)),
        "GROUP": group, "ROWS": max(LEAST_ROWS, triton.next_power_of_2(group)), "SEQUENCES": SEQUENCES,
        "BLOCK_SIZE": block_size, "BLOCK_KV": config.block_kv, "PARTS": config.parts, "LEAST": config.least,
    }  # fmt: skip


def check_tensors(q: torch.Tensor, cache: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    (rows, heads, d), kv_heads = q.shape, len(cache) // 2
    fit = kv_heads > 0 and len(cache) % 2 == 0 and heads % kv_heads == 0 and cache.shape[2] == d
    if not fit or tuple(out.shape) != (rows, heads * d):
        raise ValueError(
            f"q {list(q.shape)}, cache {list(cache.shape)} and out {list(out.shape)} do not fit together: "
            "[rows, heads, d], [2 * kv_heads, slots, d] and [rows, heads * d] are needed"
        )
    if not q.dtype == out.dtype or cache.dtype not in (q.dtype, FP8):
        raise ValueError(f"q {q.dtype}, cache {cache.dtype} and out {out.dtype}: one type is needed, or {FP8} of cache")
    if not q.stride(-1) == cache.stride(-1) == out.stride(-1) == 1:
        raise ValueError("the last dimension of q, cache and out must be contiguous: call .contiguous()")
    if not scale > 0:
        raise ValueError(f"scale {scale} is not above 0")
