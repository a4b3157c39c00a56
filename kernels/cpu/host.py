"""Calls of the C++ kernels with tensors in a CPU's memory: see clif_cpu.h for what each computes.

All take torch's number of threads. None is recorded by autograd.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch

from clif.kernels.cpu.library import SILU, TYPES, Heads, Norm, Scores, StepRows, load
from clif.kernels.step_table import StepTable


class RmsNorm(NamedTuple):
    """weight [n], and epsilon. A weight in float32 multiplies rows of bfloat16 before they are rounded."""

    weight: torch.Tensor
    eps: float

    def as_struct(self) -> Norm:
        """For the library; the weight has to live as long."""
        return Norm(self.weight.data_ptr(), self.eps, int(self.weight.dtype == torch.float32))


@dataclass(frozen=True)
class HeadShape:
    """How a row of the merged projection is laid out: query heads, KV heads of keys, as many of values.

    norms: of the heads of query and key; None: neither has one. rotary_dim: numbers at the front of each head that are
    rotated; None: all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[RmsNorm, RmsNorm] | None = None
    rotary_dim: int | None = None

    @property
    def turned(self) -> int:
        """Numbers of each head that are rotated."""
        return self.rotary_dim or self.head_dim

    def as_struct(self) -> Heads:
        """For the library; the norms' weights have to live as long."""
        norms = (Norm(), Norm()) if self.norms is None else (norm.as_struct() for norm in self.norms)
        return Heads(self.heads, self.kv_heads, self.head_dim, self.turned, *norms)


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


def add_rms_norm(hidden: torch.Tensor, added: torch.Tensor | None, norm: RmsNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden and added [rows, n] -> their sum, or hidden without `added`, and that divided by the root of its mean
    square, times the weight."""
    hidden = hidden.contiguous()
    # Kept by its name until the call ends: a copy may be made.
    added = None if added is None else added.contiguous()
    summed = hidden if added is None else torch.empty_like(hidden)
    out = torch.empty_like(hidden)
    load().clif_rms_norm(
        TYPES[hidden.dtype],
        hidden.data_ptr(),
        None if added is None else added.data_ptr(),
        ctypes.byref(norm.as_struct()),
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

    angles [some positions, 2, rotary_dim]; positions, slots [rows] int64; cache [2 kv_heads, all slots, head_dim].
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


def gated(wide: torch.Tensor, activation: int = SILU) -> torch.Tensor:
    """activation(gate) * up [rows, n] of [rows, gate | up]."""
    wide = wide.contiguous()
    out = wide.new_empty(len(wide), wide.shape[1] // 2)
    threads = torch.get_num_threads()
    load().clif_gate(TYPES[wide.dtype], activation, wide.data_ptr(), out.data_ptr(), *out.shape, threads)
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
