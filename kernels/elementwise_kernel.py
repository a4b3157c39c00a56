"""What a decoder layer computes between its products, one launch for each part, forward and backward (Triton).

    add_rms_norm    hidden + added, and that normalised              rms_norm_grad    with the residual's gradient added
    rotate_heads    the heads of a merged projection, norm of each   rotate_heads_grad
                    head and rotation, written to the cache
    swiglu          silu(gate) * up                                  swiglu_grad      of gate and up, in one piece

`kernels/testing/elementwise_specification.py` is the specification. Arithmetic is float32; results are rounded where
transformers rounds a norm, and otherwise once, at the end.

Invariants: a program reads and writes its own row: a NaN stays in it. Nothing is read to decide what to launch, and
nothing is allocated: a captured graph can be replayed over other contents.

Sources: rotary embeddings (Su et al. 2021); RMSNorm (Zhang and Sennrich 2019); SwiGLU (Shazeer 2020); kernels that
write rotated keys to a paged cache (Kwon et al. 2023); norms that add the residual (Hsu et al. 2024, Liger).
"""

import triton
import triton.language as tl

from clif.kernels.numerics import rounded


@triton.jit
def add_rms_norm(
    hidden, added, weight, summed, normed, eps, hidden_row, added_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """summed = hidden + added if ADDS, and normed = the norm of that (of hidden), all [rows, WIDTH]; grid (rows,).

    summed and normed are contiguous. BLOCK: WIDTH padded to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    dtype: tl.constexpr = hidden.dtype.element_ty
    x = tl.load(hidden + row * hidden_row + cols, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added + row * added_row + cols, mask=inside, other=0.0).to(tl.float32)
        total = rounded(x, dtype, INTERPRET)
        tl.store(summed + row * WIDTH + cols, total, mask=inside)
        # The norm is that of the numbers that later layers see.
        x = total.to(tl.float32)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    unit = rounded(x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps), dtype, INTERPRET).to(tl.float32)
    tl.store(normed + row * WIDTH + cols, rounded(unit * w, dtype, INTERPRET), mask=inside)


@triton.jit
def rms_norm_grad(
    hidden, weight, grad_normed, grad_summed, grad, eps, hidden_row, normed_row, summed_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad = the gradient of the norm's input, `hidden`, plus grad_summed if ADDS, all [rows, WIDTH]; grid (rows,).

    The weight is frozen. grad is contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    x = tl.load(hidden + row * hidden_row + cols, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_normed + row * normed_row + cols, mask=inside, other=0.0).to(tl.float32) * w
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    unit = x * scale
    result = scale * (g - unit * (tl.sum(g * unit, 0) / WIDTH))
    if ADDS:
        result += tl.load(grad_summed + row * summed_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + row * WIDTH + cols, rounded(result, grad.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def _halves(source, inside, HEAD_DIM: tl.constexpr):
    """Both halves of heads, float32."""
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(source + HEAD_DIM // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _head_weights(q_weight, k_weight, is_query, cols, inside_half, HEAD_DIM: tl.constexpr):
    """Both halves of the weights that each head's norm has."""
    q_low, q_high = _halves(q_weight + cols, inside_half, HEAD_DIM)
    k_low, k_high = _halves(k_weight + cols, inside_half, HEAD_DIM)
    low = tl.where(is_query[:, None], q_low[None, :], k_low[None, :])
    return low, tl.where(is_query[:, None], q_high[None, :], k_high[None, :])


@triton.jit
def rotate_heads(
    qkv, cos, sin, q_weight, k_weight, query, key, cache, slots, q_eps, k_eps,
    qkv_row, cos_row, sin_row, cache_head, cache_slot,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_P: tl.constexpr, BLOCK: tl.constexpr,
    NORMS: tl.constexpr, CACHES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rotated query [rows, HEADS, HEAD_DIM] and key [rows, KV_HEADS, HEAD_DIM] of qkv [rows, (HEADS + 2 KV_HEADS) *
    HEAD_DIM], and if CACHES that key and the value in cache [2 * KV_HEADS, slots, HEAD_DIM] at slots [rows], rounded
    once more if it has fewer bits; grid (rows, blocks of BLOCK heads).

    cos, sin: [rows, HEAD_DIM], sin negative in its first half. NORMS: each head of query and key is normalised first,
    with weights [HEAD_DIM]. query and key are contiguous. HALF_P: half of HEAD_DIM, padded to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, HALF_P)
    inside_half = cols < HEAD_DIM // 2
    inside = (heads < HEADS + 2 * KV_HEADS)[:, None] & inside_half[None, :]
    is_query = heads < HEADS
    is_value = heads >= HEADS + KV_HEADS
    dtype: tl.constexpr = qkv.dtype.element_ty
    in_row = heads[:, None] * HEAD_DIM + cols[None, :]
    low, high = _halves(qkv + row * qkv_row + in_row, inside, HEAD_DIM)
    x_low, x_high = low, high
    if NORMS:
        w_low, w_high = _head_weights(q_weight, k_weight, is_query, cols, inside_half, HEAD_DIM)
        eps = tl.where(is_query, q_eps, k_eps)
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        x_low = rounded(rounded(low * scale, dtype, INTERPRET).to(tl.float32) * w_low, dtype, INTERPRET).to(tl.float32)
        x_high = rounded(rounded(high * scale, dtype, INTERPRET).to(tl.float32) * w_high, dtype, INTERPRET).to(
            tl.float32
        )
    cos_low, cos_high = _halves(cos + row * cos_row + cols, inside_half, HEAD_DIM)
    sin_low, sin_high = _halves(sin + row * sin_row + cols, inside_half, HEAD_DIM)
    # Values are chosen, not multiplied by one and zero: an infinite one would become a NaN.
    out_low = tl.where(is_value[:, None], low, x_low * cos_low[None, :] + x_high * sin_low[None, :])
    out_high = tl.where(is_value[:, None], high, x_high * cos_high[None, :] + x_low * sin_high[None, :])
    out_low = rounded(out_low, dtype, INTERPRET)
    out_high = rounded(out_high, dtype, INTERPRET)
    to_query = query + row * (HEADS * HEAD_DIM) + in_row
    tl.store(to_query, out_low, mask=inside & is_query[:, None])
    tl.store(to_query + HEAD_DIM // 2, out_high, mask=inside & is_query[:, None])
    of_key = inside & (heads >= HEADS)[:, None] & (heads < HEADS + KV_HEADS)[:, None]
    to_key = key + row * (KV_HEADS * HEAD_DIM) + (in_row - HEADS * HEAD_DIM)
    tl.store(to_key, out_low, mask=of_key)
    tl.store(to_key + HEAD_DIM // 2, out_high, mask=of_key)
    if CACHES:
        slot = tl.load(slots + row).to(tl.int64)
        # Values lie behind the keys in the cache as they do in the projection.
        offset = (heads - HEADS).to(tl.int64)[:, None] * cache_head + slot * cache_slot + cols[None, :]
        kept_low, kept_high = out_low, out_high
        if cache.dtype.element_ty != dtype:
            kept_low = rounded(out_low.to(tl.float32), cache.dtype.element_ty, INTERPRET)
            kept_high = rounded(out_high.to(tl.float32), cache.dtype.element_ty, INTERPRET)
        tl.store(cache + offset, kept_low, mask=inside & (heads >= HEADS)[:, None])
        tl.store(cache + offset + HEAD_DIM // 2, kept_high, mask=inside & (heads >= HEADS)[:, None])


@triton.jit
def rotate_heads_grad(
    qkv, cos, sin, q_weight, k_weight, grad_query, grad_key, grad_value, grad, q_eps, k_eps,
    qkv_row, cos_row, sin_row, query_row, query_head, key_row, key_head, value_row, value_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_P: tl.constexpr, BLOCK: tl.constexpr,
    NORMS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad = the gradient of qkv [rows, (HEADS + 2 KV_HEADS) * HEAD_DIM]; grid (rows, blocks of BLOCK heads).

    grad_query [rows, HEADS, HEAD_DIM]; grad_key, grad_value [rows, KV_HEADS, HEAD_DIM]; grad is contiguous. qkv is read
    if NORMS. The other arguments are those of rotate_heads.
    """
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, HALF_P)
    inside_half = cols < HEAD_DIM // 2
    inside = (heads < HEADS + 2 * KV_HEADS)[:, None] & inside_half[None, :]
    is_query = heads < HEADS
    is_value = heads >= HEADS + KV_HEADS
    of_query = inside & is_query[:, None]
    of_value = inside & is_value[:, None]
    of_key = inside & (heads >= HEADS)[:, None] & (heads < HEADS + KV_HEADS)[:, None]
    q_low, q_high = _halves(
        grad_query + row * query_row + heads[:, None] * query_head + cols[None, :], of_query, HEAD_DIM
    )
    k_low, k_high = _halves(
        grad_key + row * key_row + (heads - HEADS)[:, None] * key_head + cols[None, :], of_key, HEAD_DIM
    )
    v_low, v_high = _halves(
        grad_value + row * value_row + (heads - HEADS - KV_HEADS)[:, None] * value_head + cols[None, :], of_value,
        HEAD_DIM,
    )  # fmt: skip
    cos_low, cos_high = _halves(cos + row * cos_row + cols, inside_half, HEAD_DIM)
    sin_low, sin_high = _halves(sin + row * sin_row + cols, inside_half, HEAD_DIM)
    g_low = tl.where(is_query[:, None], q_low, k_low)
    g_high = tl.where(is_query[:, None], q_high, k_high)
    d_low = g_low * cos_low[None, :] + g_high * sin_high[None, :]
    d_high = g_high * cos_high[None, :] + g_low * sin_low[None, :]
    in_row = heads[:, None] * HEAD_DIM + cols[None, :]
    if NORMS:
        w_low, w_high = _head_weights(q_weight, k_weight, is_query, cols, inside_half, HEAD_DIM)
        eps = tl.where(is_query, q_eps, k_eps)
        low, high = _halves(qkv + row * qkv_row + in_row, inside, HEAD_DIM)
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        low *= scale
        high *= scale
        d_low *= w_low
        d_high *= w_high
        mean = ((tl.sum(d_low * low, 1) + tl.sum(d_high * high, 1)) / HEAD_DIM)[:, None]
        d_low = scale * (d_low - low * mean)
        d_high = scale * (d_high - high * mean)
    to = grad + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM) + in_row
    dtype: tl.constexpr = grad.dtype.element_ty
    tl.store(to, rounded(tl.where(is_value[:, None], v_low, d_low), dtype, INTERPRET), mask=inside)
    tl.store(to + HEAD_DIM // 2, rounded(tl.where(is_value[:, None], v_high, d_high), dtype, INTERPRET), mask=inside)


@triton.jit
def swiglu(wide, narrow, wide_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """narrow [rows, WIDTH] = silu(gate) * up of wide [rows, gate | up]; grid (rows, blocks of BLOCK columns).

    narrow is contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    gate = tl.load(wide + row * wide_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide + row * wide_row + WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(narrow + row * WIDTH + cols, rounded(result, narrow.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def swiglu_grad(
    wide, grad_narrow, grad, wide_row, narrow_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad [rows, gate | up] = the gradient of wide, given that of narrow; grid (rows, blocks of BLOCK columns).

    grad is contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    gate = tl.load(wide + row * wide_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide + row * wide_row + WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_narrow + row * narrow_row + cols, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    to = grad + row * (2 * WIDTH) + cols
    dtype: tl.constexpr = grad.dtype.element_ty
    tl.store(to, rounded(g * up * share * (1.0 + gate * (1.0 - share)), dtype, INTERPRET), mask=inside)
    tl.store(to + WIDTH, rounded(g * gate * share, dtype, INTERPRET), mask=inside)
