"""What a decoder layer computes between its products, element by element or head by head: the torch reference.

It is the CPU path, and the specification of the faster kernels.

Sources: rotary embeddings (Su et al. 2021); RMSNorm (Zhang and Sennrich 2019); SwiGLU (Shazeer 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

from clif.kernels.kv_types import write_slots

Turned = Callable[[torch.Tensor], torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] divided by the root of its mean square, times weight [n]; sums in float32, rounded before the product.

    As transformers' norms of Llama, Mistral and Qwen compute it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin for x [rows, heads, d]; cos, sin: [rows, 1, d], sin negative in its first half."""
    # A roll swaps the halves.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_heads(
    qkv: torch.Tensor, heads: int, kv_heads: int, turn: Turned, norms: tuple[Turned, Turned] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv [rows, (heads + 2 kv_heads) * d] -> query [rows, heads, d], key and value [rows, kv_heads, d].

    Query and key are rotated by `turn`, behind the norm of each if there are norms.
    """
    head_dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    turned, value = qkv.split([(heads + kv_heads) * head_dim, kv_heads * head_dim], -1)
    turned = turned.unflatten(-1, (-1, head_dim))
    if norms is not None:
        query, key = turned.split([heads, kv_heads], 1)
        turned = torch.cat((norms[0](query), norms[1](key)), 1)
    query, key = turn(turned).split([heads, kv_heads], 1)
    return query, key, value.unflatten(-1, (-1, head_dim))


def write_rows(cache: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write key and value [rows, kv_heads, d] to slots [rows] of a cache [2 * kv_heads, slots, d], keys first.

    The cache has their type, or fewer bits.
    """
    write_slots(cache, slots.long(), torch.cat((key, value), 1).transpose(0, 1))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [rows, gate | up]: keeps its input alone, and its gradient is written in one piece."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(wide)
        gate, up = wide.chunk(2, -1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (wide,) = ctx.saved_tensors
        gate, up = wide.chunk(2, -1)
        grad = torch.empty_like(wide)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(silu(gate), gradients[0], out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(gradients[0] * up, gate))
        return grad
