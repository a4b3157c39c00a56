"""Add low-rank products to a finished base product, one launch for the rows of all adapters (Triton).

    y[rows of a pair] += h B_s^T

It is the last launch of the forms that begin with torch's base product. h comes from dual_lora_linear, and so do the
tables: a pair is the rows of one adapter within one row tile. With A and B swapped it is the gradient of x.

Invariants: every program writes rows of one pair, and the adapter is chosen by pointer, so that a NaN of one adapter
reaches no row of another and rows in no pair keep their bits. y is read once and rounded once. Nothing is summed by
atomics: equal input gives equal bits. Programs beyond the pairs of a batch leave at once, as a captured graph demands.

Sources: Chen et al. 2023 (Punica) and Sheng et al. 2023 (S-LoRA): segmented products.
"""

import triton
import triton.language as tl

from clif.kernels.numerics import dot, rounded


@triton.jit(do_not_specialize=["n_columns"])
def dual_lora_expand(
    hidden,
    b,
    y,
    counts,
    pairs,
    col_tiles,
    n_columns,
    b_slot,
    b_out,
    b_rank,
    y_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACKED: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of y [rows, out]: the columns of one column tile, of the rows of one pair.

    hidden [rows, BLOCKS * RANK] is h; b [slots, out, BLOCKS * RANK], any strides. counts [1]: pairs. pairs [n, 4]:
    first row, end, slot, row tile. col_tiles [n_columns, 4]: first column, end, first block of h that they read, end.
    PACKED: b_out is BLOCKS * RANK. EARLY: the launch before it, which makes h, may still be running.
    """
    if PACKED:
        # A constant stride: with a rank of 8, too, 16 bytes are loaded at a time.
        b_out = BLOCKS * RANK
    pair = tl.program_id(0) // n_columns
    column = col_tiles + 4 * (tl.program_id(0) % n_columns)
    block_first = tl.load(column + 2)
    block_stop = tl.load(column + 3)
    # Columns of a layer without adapter have no block.
    if (pair < tl.load(counts)) & (block_first < block_stop):
        row = tl.load(pairs + 4 * pair)
        stop = tl.load(pairs + 4 * pair + 1)
        slot = tl.load(pairs + 4 * pair + 2)
        col = tl.load(column)
        col_stop = tl.load(column + 1)
        if ALIGNED:
            # This lets elements of y be loaded and stored 16 bytes at a time.
            col = tl.multiple_of(col, 16)
            col_stop = tl.multiple_of(col_stop, 16)
        rows = row + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, RANK_P)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # Not pipelined: h must not be fetched before it is complete, and one block or three need no buffers.
        for block in tl.range(block_first, block_stop, num_stages=1):
            of_h = block * RANK + ranks
            inside = (ranks[:, None] < RANK) & (cols[None, :] < col_stop)
            right = tl.load(b + slot * b_slot + cols[None, :] * b_out + of_h[:, None] * b_rank, mask=inside, other=0.0)
            if EARLY and not INTERPRET:
                tl.extra.cuda.gdc_wait()
            inside = (rows[:, None] < stop) & (ranks[None, :] < RANK)
            left = tl.load(hidden + rows[:, None] * (BLOCKS * RANK) + of_h[None, :], mask=inside, other=0.0)
            acc = dot(left, right, acc, INTERPRET)
        inside = (rows[:, None] < stop) & (cols[None, :] < col_stop)
        address = y + rows[:, None] * y_row + cols[None, :]
        acc += tl.load(address, mask=inside, other=0.0).to(tl.float32)
        tl.store(address, rounded(acc, y.dtype.element_ty, INTERPRET), mask=inside)
    if EARLY and not INTERPRET:
        # Also a program without work: what comes after this launch must come after the one before it, too.
        tl.extra.cuda.gdc_wait()
