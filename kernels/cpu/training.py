"""Calls of the C++ kernels of training with tensors in a CPU's memory, bfloat16: see training.h for what each computes.

None is recorded by autograd: clif/models/cpu_training.py does that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clif.kernels.cpu.host import RmsNorm, scores_of
from clif.kernels.cpu.library import SILU, Learning, Scores, Sequences, level, load


@dataclass(frozen=True, eq=False)
class LearningFactors:
    """What a layer multiplies its learning rows with, a [k r, in] and b [out, k r], and where their gradients go.

    outputs: (start, stop) of each of the k adapted modules; r: of each. gradients: float32, a [k r, in], and b [outputs
    of all modules, r], one module below the other.
    """

    a: torch.Tensor
    b: torch.Tensor
    r: int
    scale: float
    outputs: Sequence[tuple[int, int]]
    gradients: tuple[torch.Tensor, torch.Tensor]


class TrainingKernels:
    """The kernels at this machine's level, with scratch that is kept: fresh memory would cost its first touch.

    One call at a time. Raises Absent where the machine cannot run them.
    """

    def __init__(self) -> None:
        self._library, self._level = load(), level()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def _memory(self, size: int) -> int:
        """The address of so many bytes."""
        if len(self._scratch) < size:
            # The old one goes first: both at a time would count twice.
            del self._scratch
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch.data_ptr()

    def linear_backward(self, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Given grad [rows, out] of y = x W^T: that of x [rows, in]. Widths are multiples of 32."""
        grad = _rows(grad)
        grad_x = grad.new_empty(len(grad), weight.shape[1])
        struct = Learning(weight.shape[1], weight.shape[0], weight.data_ptr())
        self._linear_backward(struct, grad, (None, 0, None, 0), grad_x, (None, None))
        return grad_x

    def learning_backward(
        self,
        weight: torch.Tensor,
        factors: LearningFactors,
        grad: torch.Tensor,
        x: torch.Tensor,
        low: torch.Tensor,
        down: bool,
    ) -> torch.Tensor | None:
        """Given grad [rows, out] of y = x W^T + scale * low B^T, where low = x A^T [rows, at least k r].

        Adds to the factors' gradients, and returns that of x [rows, in], None unless down. Widths as above.
        """
        grad, x = _rows(grad), _rows(x)
        outputs = torch.tensor([at for pair in factors.outputs for at in pair], dtype=torch.int64)
        sizes = len(factors.a), factors.r, len(factors.outputs)
        pointers = (one.data_ptr() for one in (outputs, factors.a, factors.b))
        struct = Learning(weight.shape[1], weight.shape[0], weight.data_ptr(), *sizes, *pointers, factors.scale)
        grad_x = grad.new_empty(len(grad), weight.shape[1]) if down else None
        inputs = x.data_ptr(), x.stride(0), low.data_ptr(), low.stride(0)
        self._linear_backward(struct, grad, inputs, grad_x, tuple(one.data_ptr() for one in factors.gradients))
        return grad_x

    def _linear_backward(
        self,
        struct: Learning,
        grad: torch.Tensor,
        inputs: tuple[int | None, int, int | None, int],
        grad_x: torch.Tensor | None,
        gradients: tuple[int | None, ...],
    ) -> None:
        """inputs: addresses and strides of x and low; gradients: addresses."""
        by, threads = ctypes.byref(struct), torch.get_num_threads()
        memory = self._memory(self._library.clif_linear_backward_scratch(by, len(grad), threads))
        to = None if grad_x is None else grad_x.data_ptr()
        self._library.clif_linear_backward(
            *(by, grad.data_ptr(), grad.stride(0), *inputs, to, *gradients, len(grad), memory, self._level, threads)
        )

    def causal(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [rows, heads, d], key and value [rows, kv_heads, d], all parts of the same rows -> out [rows, heads *
        d], log_sums [heads, rows] float32. ends [sequences + 1]: int32, the first row of each, and the last's end."""
        heads, struct, threads = query.shape[1], _sequences(query, key, value, ends, scores), torch.get_num_threads()
        out = query.new_empty(len(query), heads * query.shape[2])
        log_sums = query.new_empty(heads, len(query), dtype=torch.float32)
        memory = self._memory(self._library.clif_causal_scratch(ctypes.byref(struct), 0, threads))
        self._library.clif_causal(
            ctypes.byref(struct), out.data_ptr(), log_sums.data_ptr(), memory, self._level, threads
        )
        return out, log_sums

    def causal_scratch(self, heads: int, kv_heads: int, head_dim: int, length: int) -> int:
        """Bytes that the backward of a sequence of this length works in."""
        query, key, value = torch.empty(1, heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16).split(
            (heads, kv_heads, kv_heads), 1
        )
        ends = torch.tensor([0, length], dtype=torch.int32)
        struct = _sequences(query, key, value, ends, scores_of(1.0))
        return int(self._library.clif_causal_scratch(ctypes.byref(struct), 1, torch.get_num_threads()))

    def causal_backward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        scores: Scores,
        out: torch.Tensor,
        log_sums: torch.Tensor,
        grad: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Given grad [rows, heads * d]: those of query, key and value, parts of the same fresh rows, in this order."""
        struct, threads, grad = _sequences(query, key, value, ends, scores), torch.get_num_threads(), grad.contiguous()
        sizes = [query.shape[1], key.shape[1], value.shape[1]]
        rows = query.new_empty(len(query), sum(sizes), query.shape[2])
        grads = rows.split(sizes, 1)
        self._library.clif_causal_backward(
            ctypes.byref(struct),
            out.data_ptr(),
            log_sums.data_ptr(),
            grad.data_ptr(),
            *(one.data_ptr() for one in grads),
            rows.stride(0),
            self._memory(self._library.clif_causal_scratch(ctypes.byref(struct), 1, threads)),
            self._level,
            threads,
        )
        return grads[0], grads[1], grads[2]

    def rms_norm_backward(
        self, x: torch.Tensor, norm: RmsNorm, grad: torch.Tensor, grad_sum: torch.Tensor | None
    ) -> torch.Tensor:
        """Given grad [rows, n] of x normalised, and grad_sum of what else reads x: that of x."""
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        other = None if grad_sum is None else grad_sum.contiguous()
        self._library.clif_rms_norm_backward(
            x.data_ptr(),
            ctypes.byref(norm.as_struct()),
            grad.data_ptr(),
            None if other is None else other.data_ptr(),
            grad_x.data_ptr(),
            *x.shape,
            torch.get_num_threads(),
        )
        return grad_x

    def gate_backward(self, wide: torch.Tensor, grad: torch.Tensor, activation: int = SILU) -> torch.Tensor:
        """Given grad [rows, n] of activation(gate) * up: that of wide [rows, gate | up]."""
        grad, grad_wide = grad.contiguous(), torch.empty_like(wide)
        self._library.clif_gate_backward(
            activation, wide.data_ptr(), grad.data_ptr(), grad_wide.data_ptr(), *grad.shape, torch.get_num_threads()
        )
        return grad_wide

    def rotate_backward_(self, grad: torch.Tensor, angles: torch.Tensor, heads: int) -> None:
        """Turn the first heads of grad [rows, all heads, d] back, in place. angles [rows, 2, rotary_dim]: of the
        rotation."""
        rows, all_heads, head_dim = grad.shape
        self._library.clif_rotate_backward(
            *(grad.data_ptr(), angles.data_ptr(), heads, all_heads, head_dim, angles.shape[2], rows),
            torch.get_num_threads(),
        )

    def cross_entropy_(self, logits: torch.Tensor, targets: torch.Tensor, divisor: float | None) -> torch.Tensor:
        """Losses [rows] in nats, float64, of targets [rows] int64.

        logits [rows, n] become the gradient of (their sum / divisor); they stay as they are without a divisor.
        """
        losses = torch.empty(len(logits), dtype=torch.float64)
        self._library.clif_cross_entropy(
            logits.data_ptr(),
            targets.data_ptr(),
            divisor or 0.0,
            losses.data_ptr(),
            *logits.shape,
            torch.get_num_threads(),
        )
        return losses


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [rows, n] with the numbers of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scores: Scores
) -> Sequences:
    """The struct. Raises ValueError for rows in different distances."""
    if not query.stride(0) == key.stride(0) == value.stride(0) or not query.stride(1) == query.shape[2]:
        raise ValueError("query, key and value are not parts of the same rows")
    pointers = (one.data_ptr() for one in (ends, query, key, value))
    return Sequences(query.shape[1], key.shape[1], query.shape[2], len(ends) - 1, *pointers, query.stride(0), scores)
