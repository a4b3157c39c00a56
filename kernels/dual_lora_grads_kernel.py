"""Gradients of both factors of an adapter, one launch (Triton).

    grad_A = g_h^T x   [R, d_in],   with g_h = scale * g B   (dual_lora_linear makes it beside the gradient of x)
    grad_B = g^T h     [d_out, r],  with h = scale * x A^T   (kept from the forward)

Both are a thin matrix times a wide one over the rows that learn, so one launch computes both. The rows are split; the
last program to arrive at a tile adds the partial sums in a fixed order. Results need no atomics: equal input gives
equal bits.
"""

import triton
import triton.language as tl

from clif.kernels.numerics import dot, last_to_arrive, sum_of


@triton.jit
def _over_rows(
    thin, wide, wide_row, part, rows, block, col, col_stop, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK: tl.constexpr, RANK_P: tl.constexpr, BLOCKS: tl.constexpr, SLICES: tl.constexpr, TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """thin^T wide [RANK_P, BLOCK_C] over one slice of the rows."""
    ranks = tl.arange(0, RANK_P)
    cols = col + tl.arange(0, BLOCK_C)
    depth = tl.cdiv(tl.cdiv(rows, SLICES), BLOCK_R) * BLOCK_R
    begin = part * depth
    end = tl.minimum(begin + depth, rows)
    acc = tl.zeros([RANK_P, BLOCK_C], dtype=tl.float32)
    for row in range(begin, end, BLOCK_R):
        at = row + tl.arange(0, BLOCK_R)
        inside = (ranks[:, None] < RANK) & (at[None, :] < end)
        left = tl.load(thin + at[None, :] * (BLOCKS * RANK) + block * RANK + ranks[:, None], mask=inside, other=0.0)
        if TMA:
            # Columns from col_stop on are of another projection; they are not stored.
            right = wide.load([row, col])
        else:
            inside = (at[:, None] < end) & (cols[None, :] < col_stop)
            right = tl.load(wide + at[:, None] * wide_row + cols[None, :], mask=inside, other=0.0)
        acc = dot(left, right, acc, INTERPRET)
    return acc


@triton.jit(do_not_specialize=["rows"])
def dual_lora_grads(
    x,
    grad,
    hidden,
    grad_hidden,
    grad_a,
    grad_b,
    col_tiles,
    planes,
    tickets,
    rows,
    d_in,
    x_row,
    grad_row,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of one gradient over one slice of the rows.

    x [rows, d_in], grad [rows, d_out], hidden and grad_hidden [rows, BLOCKS * RANK]; grad_a [BLOCKS * RANK, d_in] and
    grad_b [adapted outputs, RANK], float32. col_tiles [n, 4]: first column of grad, end, its block, row of grad_b.
    The first cdiv(d_in, BLOCK_C) * BLOCKS tiles are of grad_a. tickets: zero before and after. ALIGNED: all columns
    and rows of col_tiles are multiples of 16. x, grad: pointers, or with TMA tensor descriptors.
    """
    part = tl.program_id(0) % SLICES
    tile = tl.program_id(0) // SLICES
    of_a = tl.cdiv(d_in, BLOCK_C) * BLOCKS
    ranks = tl.arange(0, RANK_P)
    if tile < of_a:
        block = tile % BLOCKS
        col = (tile // BLOCKS) * BLOCK_C
        col_stop = d_in
        acc = _over_rows(
            grad_hidden, x, x_row, part, rows, block, col, col_stop, BLOCK_C, BLOCK_R, RANK, RANK_P, BLOCKS, SLICES,
            TMA, INTERPRET,
        )  # fmt: skip
    else:
        entry = col_tiles + 4 * (tile - of_a)
        col = tl.load(entry)
        col_stop = tl.load(entry + 1)
        block = tl.load(entry + 2)
        if ALIGNED:
            # This lets numbers be loaded and stored 16 bytes at a time.
            col = tl.multiple_of(col, 16)
            col_stop = tl.multiple_of(col_stop, 16)
        acc = _over_rows(
            hidden, grad, grad_row, part, rows, block, col, col_stop, BLOCK_C, BLOCK_R, RANK, RANK_P, BLOCKS, SLICES,
            TMA, INTERPRET,
        )  # fmt: skip
    plane = planes + tile * (SLICES * RANK_P * BLOCK_C)
    if last_to_arrive(acc, plane, part, tickets + tile, RANK_P, BLOCK_C, SLICES):
        total = sum_of(plane, RANK_P, BLOCK_C, SLICES)
        cols = col + tl.arange(0, BLOCK_C)
        inside = (ranks[:, None] < RANK) & (cols[None, :] < col_stop)
        # Here and not above, where the addresses would take registers beside the sums.
        if tile < of_a:
            tl.store(grad_a + (block * RANK + ranks[:, None]) * d_in + cols[None, :], total, mask=inside)
        else:
            first = tl.load(col_tiles + 4 * (tile - of_a) + 3)
            if ALIGNED:
                first = tl.multiple_of(first, 16)
            at = first + tl.arange(0, BLOCK_C)
            tl.store(grad_b + at[None, :] * RANK + ranks[:, None], total, mask=inside)
