"""Rows that learn on a CPU: autograd's nodes over the C++ kernels, for bfloat16. Everything else takes torch's.

A node keeps what its backward reads and nothing else; gradients of LoRA factors are added in place, in float32, and
pass no node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clif.kernels.cpu import host
from clif.kernels.cpu.host import HeadShape, RmsNorm
from clif.kernels.cpu.training import TrainingKernels
from clif.kernels.staging import send_ints
from clif.models.layer_ops import CacheRows, Rope, TorchRotary
from clif.models.scores import Scores
from clif.models.varlen import cumulated


@dataclass(frozen=True, eq=False)
class LearningNorm:
    """RMSNorm of rows that learn, and the residual add before it."""

    kernels: TrainingKernels
    norm: RmsNorm

    def __call__(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        summed, normed = _AddNorm.apply(hidden, added, self)
        return summed, normed


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, added: torch.Tensor | None, learning: LearningNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed, normed = host.add_rms_norm(hidden, added, learning.norm)
        ctx.learning = learning
        ctx.save_for_backward(summed)
        ctx.set_materialize_grads(False)
        return summed, normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (summed,) = ctx.saved_tensors
        learning: LearningNorm = ctx.learning
        of_sum, of_normed = gradients
        grad = learning.kernels.rms_norm_backward(summed, learning.norm, of_normed, of_sum)
        return grad, grad if ctx.needs_input_grad[1] else None, None


@dataclass(frozen=True, eq=False)
class LearningRotary:
    """The rotation of heads of rows that learn, in the memory of the projection; torch's for what is not bfloat16."""

    kernels: TrainingKernels
    shape: HeadShape
    torchs: TorchRotary

    def __call__(
        self, qkv: torch.Tensor, rope: Rope, to: CacheRows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if qkv.dtype != torch.bfloat16 or self.shape.norms is not None or rope.both is None or to is not None:
            return self.torchs(qkv, rope, to)
        query, key, value = _Rotate.apply(qkv, rope.both, self)
        return query, key, value


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, angles: torch.Tensor, rotary: LearningRotary
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The product behind qkv does not read it again, and nothing else has it.
        rows, shape = qkv.detach().contiguous(), rotary.shape
        host.rotate_(rows, shape, angles, torch.arange(len(rows)))
        ctx.angles, ctx.rotary = angles, rotary
        heads = rows.view(len(rows), -1, shape.head_dim)
        query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        shape, kernels = ctx.rotary.shape, ctx.rotary.kernels
        grad = joined(gradients)
        kernels.rotate_backward_(grad, ctx.angles, shape.heads + shape.kv_heads)
        return grad.flatten(1), None, None


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts [rows, heads, d] side by side: as they lie, where they are parts of the same rows; otherwise copied."""
    rows, _, d = parts[0].shape
    heads = sum(part.shape[1] for part in parts)
    start = parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or part.storage_offset() != start or part.stride() != (heads * d, d, 1):
            return torch.cat(list(parts), 1)
        start += part.shape[1] * d
    return parts[0].as_strided((rows, heads, d), (heads * d, d, 1))


class PackedSequences:
    """The plan of packed sequences that attend among themselves, in bfloat16 on a CPU. lengths: tokens of each."""

    def __init__(self, lengths: Sequence[int], kernels: TrainingKernels) -> None:
        self._kernels = kernels
        self._ends = send_ints(cumulated(lengths), torch.device("cpu"), torch.int32)

    def cache_rows(self, layer: int) -> None:
        """Nothing is kept of these rows."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """query [rows, heads, d], key and value [rows, kv_heads, d] -> [rows, heads * d]."""
        parts = query, key, value
        if len({part.stride(0) for part in parts}) > 1 or any(p.stride(1) != p.shape[2] for p in parts):
            query, key, value = torch.cat(parts, 1).split([part.shape[1] for part in parts], 1)
        out: torch.Tensor = _Causal.apply(query, key, value, self._ends, scores, self._kernels)
        return out


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        scores: Scores,
        kernels: TrainingKernels,
    ) -> torch.Tensor:
        out, log_sums = kernels.causal(query, key, value, ends, host.scores_of(*scores))
        ctx.scores, ctx.kernels = scores, kernels
        ctx.save_for_backward(query, key, value, ends, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, ends, out, log_sums = ctx.saved_tensors
        scores = host.scores_of(*ctx.scores)
        found = ctx.kernels.causal_backward(query, key, value, ends, scores, out, log_sums, gradients[0])
        return *found, None, None, None


def learning_gate(wide: torch.Tensor, activation: int, kernels: TrainingKernels) -> torch.Tensor:
    """activation(gate) * up [rows, n] of [rows, gate | up], both bfloat16. activation: the kernels' code for it."""
    gated: torch.Tensor = _Gate.apply(wide, activation, kernels)
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor, activation: int, kernels: TrainingKernels) -> torch.Tensor:
        ctx.activation, ctx.kernels = activation, kernels
        ctx.save_for_backward(wide)
        return host.gated(wide, activation)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (wide,) = ctx.saved_tensors
        return ctx.kernels.gate_backward(wide, gradients[0], ctx.activation), None, None
