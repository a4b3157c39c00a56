"""The first product of the dual LoRA kernels, h = scale * x A_s^T, pair by pair (Triton). See dual_lora_kernel.py."""

import triton
import triton.language as tl

from clif.kernels.numerics import dot, last_to_arrive, rounded, sum_of


@triton.jit
def tile_of_x(x, row, k, stop, end, stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Rows row.. and columns k.. of x; zero from row `stop` and column `end` on (TMA: zero outside of x only)."""
    if TMA:
        tile = x.load([row, k])
    else:
        rows = row + tl.arange(0, BLOCK_M)
        ks = k + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < stop) & (ks[None, :] < end)
        tile = tl.load(x + rows[:, None] * stride + ks[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def shrink(
    item,
    x,
    a,
    hidden,
    pairs,
    blocks,
    planes,
    tickets,
    flags,
    launch,
    scale,
    x_row,
    a_slot,
    a_rank,
    a_k,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICES: tl.constexpr,
    FORM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One slice of the contraction of one pair's rows with one block of A; the last one finishes h."""
    part = item % SLICES
    target = item // SLICES
    block = target % BLOCKS
    pair = pairs + 4 * (target // BLOCKS)
    row = tl.load(pair)
    stop = tl.load(pair + 1)
    slot = tl.load(pair + 2)
    low = tl.load(blocks + 2 * block)
    high = tl.load(blocks + 2 * block + 1)
    if ALIGNED:
        # This lets numbers of x and A be loaded 16 bytes at a time.
        low = tl.multiple_of(low, 16)
        high = tl.multiple_of(high, 16)
    depth = tl.cdiv(tl.cdiv(high - low, SLICES), BLOCK_K) * BLOCK_K
    begin = low + part * depth
    end = tl.minimum(begin + depth, high)
    ranks = tl.arange(0, RANK_P)
    if not TMA:
        a_columns = a + slot * a_slot + (block * RANK + ranks) * a_rank
    acc = tl.zeros([BLOCK_M, RANK_P], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        left = tile_of_x(x, row, k, stop, end, x_row, BLOCK_M, BLOCK_K, TMA)
        if TMA:
            # Beyond the block it reads B's zeros or nothing; only RANK of h's columns are stored.
            if TRANSPOSED:
                right = a.load([k, block * RANK])
            else:
                right = a.load([slot * a_slot + block * RANK, k]).T
        else:
            ks = k + tl.arange(0, BLOCK_K)
            inside = (ks[:, None] < end) & (ranks[None, :] < RANK)
            right = tl.load(a_columns[None, :] + ks[:, None] * a_k, mask=inside, other=0.0)
        acc = dot(left, right, acc, INTERPRET)
    plane = planes + target * (SLICES * BLOCK_M * RANK_P)
    if last_to_arrive(acc, plane, part, tickets + target, BLOCK_M, RANK_P, SLICES):
        total = sum_of(plane, BLOCK_M, RANK_P, SLICES)
        rows = row + tl.arange(0, BLOCK_M)
        out = hidden + rows[:, None] * (BLOCKS * RANK) + block * RANK + ranks[None, :]
        value = rounded(total * scale, hidden.dtype.element_ty, INTERPRET)
        tl.store(out, value, mask=(rows[:, None] < stop) & (ranks[None, :] < RANK))
        if FORM == 0:
            tl.debug_barrier()
            tl.atomic_xchg(flags + target, launch, sem="release")
