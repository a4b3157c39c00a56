"""Host side of the kernels between a layer's products: checks, outputs, launches.

Every function is one launch, or none for zero rows. It waits for nothing and allocates what it returns, nothing more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from clif.kernels.elementwise_kernel import (
    add_rms_norm,
    rms_norm_grad,
    rotate_heads,
    rotate_heads_grad,
    swiglu,
    swiglu_grad,
)
from clif.kernels.kv_types import FP8

INTERPRET = not isinstance(swiglu, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were first imported)."""
TILE = 1024
"""Numbers of a program that may take any part of a row: enough for loads of 16 bytes by each of 128 threads."""
# Triton 3.10 no longer fuses products and sums by default: bitwise tests must not depend on the version.
OPTIONS = {"INTERPRET": INTERPRET, "enable_fp_fusion": True}


class HeadNorms(NamedTuple):
    """Norms of the heads of query and key. Weights: [head_dim]."""

    q_weight: torch.Tensor
    q_eps: float
    k_weight: torch.Tensor
    k_eps: float


def launch_add_rms_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden + added, that normalised); (hidden itself, it normalised) if there is nothing to add. [rows, n] each.

    Raises ValueError for tensors that the kernel cannot read, as all launches here do.
    """
    _check_rows(
        hidden.shape[1], hidden=hidden, weight=weight.unsqueeze(0), **({} if added is None else {"added": added})
    )
    normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    summed = hidden if added is None else torch.empty_like(normed)
    if len(hidden):
        add_rms_norm[(len(hidden),)](
            hidden, hidden if added is None else added, weight, summed, normed, eps, hidden.stride(0),
            0 if added is None else added.stride(0), ADDS=added is not None, **row_constants(hidden.shape[1]),
            **OPTIONS,
        )  # fmt: skip
    return summed, normed


def launch_rms_norm_grad(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, grad_normed: torch.Tensor, grad_summed: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of the norm's input `hidden` [rows, n], with that of its other readers, grad_summed, added."""
    grad_normed, grad_summed = _dense(grad_normed), None if grad_summed is None else _dense(grad_summed)
    others = {} if grad_summed is None else {"grad_summed": grad_summed}
    _check_rows(hidden.shape[1], hidden=hidden, weight=weight.unsqueeze(0), grad_normed=grad_normed, **others)
    grad = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if len(hidden):
        rms_norm_grad[(len(hidden),)](
            hidden, weight, grad_normed, grad_normed if grad_summed is None else grad_summed, grad, eps,
            hidden.stride(0), grad_normed.stride(0), 0 if grad_summed is None else grad_summed.stride(0),
            ADDS=grad_summed is not None, **row_constants(hidden.shape[1]), **OPTIONS,
        )  # fmt: skip
    return grad


def launch_rotate_heads(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, norms: HeadNorms | None = None,
    cache: torch.Tensor | None = None, slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """qkv [rows, (heads + 2 kv_heads) * d] -> rotated query [rows, heads, d] and key [rows, kv_heads, d], and the value
    [rows, kv_heads, d], which is a view of qkv. Key and value are also written to `cache`, if there is one.

    cos, sin: [rows, d], sin negative in its first half. cache [2 * kv_heads, slots, d], keys first, of the type of qkv
    or FP8, of any strides between heads and slots; slots [rows], of any integer type: where each row belongs.
    """
    rows, d = len(qkv), _head_dim(qkv, heads, kv_heads)
    _check_heads(qkv, cos, sin, norms, d)
    if cache is not None and slots is not None:
        _check_cache(qkv, cache, slots, kv_heads, d)
    query, key = qkv.new_empty(rows, heads, d), qkv.new_empty(rows, kv_heads, d)
    made = head_constants(heads, kv_heads, d, norms is not None)
    if rows:
        weights = (cos, 0.0, cos, 0.0) if norms is None else norms
        rotate_heads[(rows, triton.cdiv(heads + 2 * kv_heads, made["BLOCK"]))](
            qkv, cos, sin, weights[0], weights[2], query, key, qkv if cache is None else cache,
            cos if slots is None else slots, weights[1], weights[3], qkv.stride(0), cos.stride(0), sin.stride(0),
            *((0, 0) if cache is None else cache.stride()[:2]), CACHES=cache is not None, **made, **OPTIONS,
        )  # fmt: skip
    return query, key, qkv[:, (heads + kv_heads) * d :].unflatten(-1, (kv_heads, d))


def launch_rotate_heads_grad(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], cos: torch.Tensor, sin: torch.Tensor,
    norms: HeadNorms | None = None, qkv: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gradient of qkv [rows, (heads + 2 kv_heads) * d], given those of query, key and value. qkv: needed by `norms`."""
    query, key, value = (_dense(grad) for grad in grads)
    (rows, heads, d), kv_heads = query.shape, key.shape[1]
    grad = query.new_empty(rows, (heads + 2 * kv_heads) * d)
    if norms is not None and qkv is None:
        raise ValueError("the norms' gradient needs qkv")
    qkv = grad if qkv is None else qkv
    _check_heads(qkv, cos, sin, norms, d)
    made = head_constants(heads, kv_heads, d, norms is not None)
    if rows:
        weights = (cos, 0.0, cos, 0.0) if norms is None else norms
        rotate_heads_grad[(rows, triton.cdiv(heads + 2 * kv_heads, made["BLOCK"]))](
            qkv, cos, sin, weights[0], weights[2], query, key, value, grad, weights[1], weights[3], qkv.stride(0),
            cos.stride(0), sin.stride(0), *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], **made,
            **OPTIONS,
        )  # fmt: skip
    return grad


def launch_swiglu(wide: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [rows, n] of wide [rows, gate | up]."""
    _check_rows(wide.shape[1], wide=wide)
    rows, width = len(wide), wide.shape[1] // 2
    narrow = wide.new_empty(rows, width)
    made = tile_constants(width)
    if rows:
        swiglu[(rows, triton.cdiv(width, made["BLOCK"]))](wide, narrow, wide.stride(0), **made, **OPTIONS)
    return narrow


def launch_swiglu_grad(wide: torch.Tensor, grad_narrow: torch.Tensor) -> torch.Tensor:
    """Gradient of wide [rows, gate | up], given that of the result [rows, n]."""
    grad_narrow, width = _dense(grad_narrow), wide.shape[1] // 2
    _check_rows(wide.shape[1], wide=wide)
    _check_rows(width, grad_narrow=grad_narrow)
    grad, made = torch.empty_like(wide, memory_format=torch.contiguous_format), tile_constants(width)
    if len(wide):
        swiglu_grad[(len(wide), triton.cdiv(width, made["BLOCK"]))](
            wide, grad_narrow, grad, wide.stride(0), grad_narrow.stride(0), **made, **OPTIONS
        )
    return grad


def row_constants(width: int) -> dict[str, Any]:
    """What the kernels of whole rows are compiled for, and threads: up to 32 numbers for each."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def head_constants(heads: int, kv_heads: int, head_dim: int, norms: bool) -> dict[str, Any]:
    """What the kernels of heads are compiled for."""
    half = triton.next_power_of_2(head_dim // 2)
    block = max(1, min(triton.next_power_of_2(heads + 2 * kv_heads), TILE // (2 * half)))
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "HALF_P": half, "BLOCK": block, "NORMS": norms,
        "num_warps": 4,
    }  # fmt: skip


def tile_constants(width: int) -> dict[str, Any]:
    """What the kernels of any part of a row are compiled for."""
    return {"WIDTH": width, "BLOCK": min(TILE, triton.next_power_of_2(width)), "num_warps": 4}


def _dense(grad: torch.Tensor) -> torch.Tensor:
    """As autograd gives gradients, they may be expanded."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _head_dim(qkv: torch.Tensor, heads: int, kv_heads: int) -> int:
    d, rest = divmod(qkv.shape[1], heads + 2 * kv_heads)
    if rest or d % 2:
        raise ValueError(f"{qkv.shape[1]} numbers are not {heads} + 2 x {kv_heads} heads of an even size")
    return d


def _check_rows(width: int, **tensors: torch.Tensor) -> None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.shape != (1 if name == "weight" else len(first), width):
            raise ValueError(f"{name} {list(tensor.shape)}: [{len(first)}, {width}] is needed")
        _check_alike(name, tensor, first)


def _check_heads(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None, head_dim: int
) -> None:
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.shape != (len(qkv), head_dim):
            raise ValueError(f"{name} {list(tensor.shape)}: [{len(qkv)}, {head_dim}] is needed")
        _check_alike(name, tensor, qkv)
    for tensor in () if norms is None else (norms.q_weight, norms.k_weight):
        if tensor.shape != (head_dim,):
            raise ValueError(f"a norm of heads has weights {list(tensor.shape)}: [{head_dim}] is needed")
        _check_alike("the norm", tensor, qkv)


def _check_cache(qkv: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, kv_heads: int, head_dim: int) -> None:
    if cache.shape[::2] != (2 * kv_heads, head_dim) or slots.shape != (len(qkv),) or slots.stride() != (1,):
        raise ValueError(
            f"cache {list(cache.shape)} and slots {list(slots.shape)} do not fit: [{2 * kv_heads}, slots, {head_dim}] "
            f"and [{len(qkv)}] are needed"
        )
    if cache.dtype != FP8:
        _check_alike("cache", cache, qkv)
    elif cache.stride(-1) != 1:
        raise ValueError("the last dimension of cache must be contiguous: call .contiguous()")


def _check_alike(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, another is {like.dtype}: one type is needed")
    if tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous: call .contiguous()")
