"""Products with weights of 8 and 4 bits, which are widened in registers, and what these weights stand for (Triton).

    quantised_product    y = x W^T + bias for few rows: W is read once, as it is stored; or each row with its expert's W
    quantised_dense      W, or a part of it, in another type: for many rows, where torch's product reads it again

`QuantisedMatrix` and `Fp8Matrix` are the specification. Numbers with one scale for each output are multiplied as they
are, exactly, and the sum is scaled; those with scales of groups are scaled first, and rounded as `dense` rounds them.

Invariants: W is the left operand, so that a tile has 64 outputs or more however few rows there are. Partial sums are
added in a fixed order: equal input gives equal bits. Nothing is read to decide what to launch.

Sources: weights widened in the registers of a product (Marlin, Frantar et al. 2024); contraction in parts for few rows
(Stream-K, Osama et al. 2023).
"""

import triton
import triton.language as tl

from clif.kernels.numerics import dot, last_to_arrive, rounded, sum_of, widened


@triton.jit
def _eight(numbers, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Whole numbers of 8 bits, or FP8, in a type that has all of them."""
    if numbers.dtype == tl.int8:
        # The interpreter multiplies in float32.
        wide = numbers.to(tl.float32) if INTERPRET else numbers.to(dtype)
    else:
        wide = widened(numbers, dtype, INTERPRET)
    return wide


@triton.jit
def _scaled(whole, scale, added, dtype: tl.constexpr, ADDED: tl.constexpr, ZERO: tl.constexpr, INTERPRET: tl.constexpr):
    """(whole - zeros) * scale, or whole * scale + least, rounded once to dtype. whole: of 8 bits at most.

    ADDED: 0: `added` is nothing, all zeros are ZERO; 1: least numbers; 2: zeros.
    """
    if ADDED == 1:
        value = rounded(whole.to(tl.float32) * scale.to(tl.float32) + added.to(tl.float32), dtype, INTERPRET)
    else:
        less = whole.to(tl.int16) - (added.to(tl.int16) if ADDED == 2 else ZERO)
        if dtype == tl.bfloat16 and scale.dtype == tl.bfloat16 and ZERO == 8 and not INTERPRET:
            # Of 4 bits: a product of bfloat16 numbers is rounded once as well, two at a time.
            value = less.to(tl.int8).to(tl.bfloat16) * scale
        else:
            value = rounded(less.to(tl.float32) * scale.to(tl.float32), dtype, INTERPRET)
    return value


@triton.jit
def _group_tile(values, cols, k, row, out, end, EACH: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
                GROUPS: tl.constexpr):  # fmt: skip
    """Numbers of groups [out, groups] for a tile that begins at input k, each EACH times: [BLOCK_N, GROUPS * EACH]."""
    of = k // GROUP + tl.arange(0, GROUPS)
    inside = (cols[:, None] < out) & (of[None, :] * GROUP < end)
    found = tl.load(values + cols[:, None] * row + of[None, :], mask=inside, other=0)
    wide = tl.broadcast_to(found[:, :, None], [BLOCK_N, GROUPS, EACH])
    return tl.reshape(wide, [BLOCK_N, GROUPS * EACH])


@triton.jit
def _expert_tile(tile, ends, out, rows, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """First row of a row tile, the end of its expert's rows, and the expert's first output; no rows: an end of 0."""
    each = tl.arange(0, triton.next_power_of_2(EXPERTS))
    stops = tl.load(ends + each, mask=each < EXPERTS, other=0)
    starts = tl.load(ends + each - 1, mask=(each > 0) & (each < EXPERTS), other=0)
    tiles = tl.where(each < EXPERTS, tl.cdiv(stops - starts, BLOCK_M), 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(each < expert, tiles, 0), 0)
    own = each == expert
    row = tl.sum(tl.where(own, starts, 0), 0) + (tile - before) * BLOCK_M
    # Beyond the last expert nothing is its own.
    stop = tl.sum(tl.where(own & (each < EXPERTS), stops, 0), 0)
    return row, stop, tl.minimum(expert, EXPERTS - 1).to(tl.int64) * out


@triton.jit(do_not_specialize=["rows"])
def quantised_product(
    x, numbers, scales, added, bias, y, planes, tickets, ends, rows, out, depth, x_row, numbers_row, scales_row, y_row,
    BITS: tl.constexpr, BY_OUTPUT: tl.constexpr, GROUP: tl.constexpr, ADDED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One part of the contraction of a tile of y [rows, out]; the last one finishes it.

    x [rows, depth]; numbers [out, depth], of 4 bits [out, depth / 2] up to multiples of 32 inputs; scales and added
    [out, groups], see _scaled; BY_OUTPUT: scales [out]. BLOCK_K is a multiple of GROUP. Grid: parts of each tile, row
    tiles fastest, then parts, then column tiles.

    EXPERTS: how many matrices lie below each other in numbers and scales, each for the rows before its entry in `ends`
    [EXPERTS] that no other has; 0: one for all rows. Of row tiles there are as many as the rows may need, whatever the
    ends; those that are left over store nothing.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M) + EXPERTS
    program = tl.program_id(0)
    row = (program % row_tiles) * BLOCK_M
    # The first output of this matrix among all.
    first = tl.zeros([], dtype=tl.int64)
    if EXPERTS > 0:
        row, rows, first = _expert_tile(program % row_tiles, ends, out, rows, BLOCK_M, EXPERTS)
    part = (program // row_tiles) % SPLIT
    column_tile = program // (row_tiles * SPLIT)
    tile = column_tile * row_tiles + program % row_tiles
    cols = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = x.dtype.element_ty
    steps = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLIT)
    begin = part * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, depth)
    lines = numbers + (first + cols)[:, None] * numbers_row
    scales += first * scales_row
    added += first * scales_row
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    groups: tl.constexpr = 1 if BY_OUTPUT else BLOCK_K // GROUP
    zero: tl.constexpr = 8 if BITS == 4 else 0
    # In bytes: whole multiples of 32 inputs are stored in 4 bits. x is zero beyond the depth.
    stored = tl.cdiv(end, 32) * 16
    for k in range(begin, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        there = (at[:, None] < rows) & (ks[None, :] < end)
        right = tl.load(x + at[:, None] * x_row + ks[None, :], mask=there, other=0.0)
        if BITS == 8:
            w = tl.load(lines + ks[None, :], mask=(cols[:, None] < out) & (ks[None, :] < end), other=0.0)
            if BY_OUTPUT:
                left = _eight(w, dtype, INTERPRET)
            else:
                s = _group_tile(scales, cols, k, scales_row, out, end, GROUP, BLOCK_N, GROUP, groups)
                a = s
                if ADDED > 0:
                    a = _group_tile(added, cols, k, scales_row, out, end, GROUP, BLOCK_N, GROUP, groups)
                left = _scaled(w, s, a, dtype, ADDED, zero, INTERPRET)
            acc = dot(left, tl.trans(right), acc, INTERPRET)
        else:
            bytes_ = k // 2 + tl.arange(0, BLOCK_K // 2)
            w = tl.load(lines + bytes_[None, :], mask=(cols[:, None] < out) & (bytes_[None, :] < stored), other=0)
            s = _group_tile(scales, cols, k, scales_row, out, end, GROUP // 2, BLOCK_N, GROUP, groups)
            a = s
            if ADDED > 0:
                a = _group_tile(added, cols, k, scales_row, out, end, GROUP // 2, BLOCK_N, GROUP, groups)
            even, odd = tl.split(tl.reshape(right, [BLOCK_M, BLOCK_K // 2, 2]))
            acc = dot(_scaled(w & 15, s, a, dtype, ADDED, zero, INTERPRET), tl.trans(even), acc, INTERPRET)
            acc = dot(_scaled(w >> 4, s, a, dtype, ADDED, zero, INTERPRET), tl.trans(odd), acc, INTERPRET)
    if BY_OUTPUT:
        acc = acc * tl.load(scales + cols, mask=cols < out, other=0.0).to(tl.float32)[:, None]
    plane = planes + tile.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M)
    if SPLIT == 1:
        _finish(acc, bias, y, cols, at, rows, out, y_row, HAS_BIAS, INTERPRET)
    elif last_to_arrive(acc, plane, part, tickets + tile, BLOCK_N, BLOCK_M, SPLIT):
        total = sum_of(plane, BLOCK_N, BLOCK_M, SPLIT)
        _finish(total, bias, y, cols, at, rows, out, y_row, HAS_BIAS, INTERPRET)


@triton.jit
def _finish(acc, bias, y, cols, at, rows, out, y_row, HAS_BIAS: tl.constexpr, INTERPRET: tl.constexpr):
    """Add the bias and store a tile [outputs, rows]."""
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < out, other=0.0).to(tl.float32)[:, None]
    inside = (cols[:, None] < out) & (at[None, :] < rows)
    tl.store(y + at[None, :] * y_row + cols[:, None], rounded(acc, y.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit(do_not_specialize=["first_row", "first_column"])
def quantised_dense(
    numbers, scales, added, dense, first_row, first_column, rows, columns, numbers_row, scales_row,
    BITS: tl.constexpr, BY_OUTPUT: tl.constexpr, GROUP: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dense [rows, columns], contiguous: W from a row and a column on, which begins a group; grid (rows, tiles)."""
    row = tl.program_id(0).to(tl.int64)
    line = numbers + (first_row + row) * numbers_row
    of_row = (first_row + row) * scales_row
    dtype: tl.constexpr = dense.dtype.element_ty
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    ks = first_column + cols
    if BITS == 8:
        w = tl.load(line + ks, mask=inside, other=0.0)
    else:
        w = (tl.load(line + ks // 2, mask=inside, other=0) >> ((ks % 2) * 4).to(tl.uint8)) & 15
    if BY_OUTPUT:
        wide = _eight(w, tl.float32, INTERPRET) * tl.load(scales + of_row).to(tl.float32)
        value = rounded(wide, dtype, INTERPRET)
    else:
        s = tl.load(scales + of_row + ks // GROUP, mask=inside, other=0.0)
        a = s
        if ADDED > 0:
            a = tl.load(added + of_row + ks // GROUP, mask=inside, other=0)
        value = _scaled(w, s, a, dtype, ADDED, 8 if BITS == 4 else 0, INTERPRET)
    tl.store(dense + row * columns + cols, value, mask=inside)
