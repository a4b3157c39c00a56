"""Calls of the C++ kernels with tensors in a CPU's memory: see clif_cpu.h for what each computes.

All take torch's number of threads. None is recorded by autograd.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch

from clif.kernels.cpu.library import TYPES, Heads, Scores, StepRows, load
from clif.kernels.step_table import StepTable


class HeadNorm(NamedTuple):
    """RMSNorm of each head: weight [head_dim] and epsilon."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class HeadShape:
    """How a row of the merged projection is laid out: query heads, KV heads of keys, as many of values.

    norms: of the heads of query and key; None: neither has one.
    """

    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[HeadNorm, HeadNorm] | None = None

    def as_struct(self) -> Heads:
        """For the library; the norms' weights have to live as long."""
        if self.norms is None:
            return Heads(self.heads, self.kv_heads, self.head_dim, None, None, 0.0, 0.0)
        query, key = self.norms
        pointers = query.weight.data_ptr(), key.weight.data_ptr()
        return Heads(self.heads, self.kv_heads, self.head_dim, *pointers, query.eps, key.eps)


def rows_of(table: StepTable) -> StepRows:
    """For the library: the rows of a table as they are until it is filled again."""
    return StepRows(
        table.rows,
        table.sequence.data_ptr(),
        table.context.data_ptr(),
        table.blocks.data_ptr(),
        table.max_blocks,
        table.block_size,
    )


def add_rms_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden and added [rows, n] -> their sum, or hidden without `added`, and that divided by the root of its mean
    square, times weight [n]."""
    hidden = hidden.contiguous()
    # Kept by its name until the call ends: a copy may be made.
    added = None if added is None else added.contiguous()
    summed = hidden if added is None else torch.empty_like(hidden)
    out = torch.empty_like(hidden)
    load().clif_rms_norm(
        TYPES[hidden.dtype],
        hidden.data_ptr(),
        None if added is None else added.data_ptr(),
        weight.data_ptr(),
        eps,
        summed.data_ptr(),
        out.data_ptr(),
        *hidden.shape,
        torch.get_num_threads(),
    )
    return summed, out


def rotate_(
    qkv: torch.Tensor,
    shape: HeadShape,
    angles: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """Rotate the heads of qkv [rows, (heads + 2 kv_heads) * head_dim] in place, and write keys and values to the cache.

    angles [some positions, 2, head_dim]; positions, slots [rows] int64; cache [2 kv_heads, all slots, head_dim].
    """
    load().clif_rotate(
        TYPES[qkv.dtype],
        ctypes.byref(shape.as_struct()),
        qkv.data_ptr(),
        angles.data_ptr(),
        positions.data_ptr(),
        None if cache is None else cache.data_ptr(),
        0 if cache is None else cache.shape[1],
        None if slots is None else slots.data_ptr(),
        len(qkv),
        torch.get_num_threads(),
    )


def swiglu(wide: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [rows, n] of [rows, gate | up]."""
    wide = wide.contiguous()
    out = wide.new_empty(len(wide), wide.shape[1] // 2)
    load().clif_swiglu(TYPES[wide.dtype], wide.data_ptr(), out.data_ptr(), *out.shape, torch.get_num_threads())
    return out


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first index of the largest number of each row [rows]; -1 where it is not finite, or the row has a NaN."""
    logits = logits.contiguous()
    best = torch.empty(len(logits), dtype=torch.int64)
    load().clif_argmax(TYPES[logits.dtype], logits.data_ptr(), best.data_ptr(), *logits.shape, torch.get_num_threads())
    return best


def scores_of(
    scale: float, window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None
) -> Scores:
    """For the library, of what clif/models/scores.py explains. sinks [heads], of the queries' type, has to live as
    long."""
    return Scores(scale, softcap or 0.0, window or 0, None if sinks is None else sinks.data_ptr())


def attention(
    query: torch.Tensor, shape: HeadShape, cache: torch.Tensor, table: StepTable, scores: Scores
) -> torch.Tensor:
    """query [rows, heads, head_dim], rows any distance apart -> [rows, heads * head_dim] over each row's context."""
    out = query.new_empty(len(query), shape.heads * shape.head_dim)
    load().clif_attention(
        TYPES[query.dtype],
        ctypes.byref(shape.as_struct()),
        query.data_ptr(),
        query.stride(0),
        cache.data_ptr(),
        cache.shape[1],
        ctypes.byref(rows_of(table)),
        ctypes.byref(scores),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
