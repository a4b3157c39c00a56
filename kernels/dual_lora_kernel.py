"""A linear layer with the low-rank parts of several adapters, one launch for all rows (Triton).

    y = x W^T + bias + h B_s^T,   h = scale * x A_s^T,   s: the adapter slot of each row's tile

and, with W, A and B transposed, the gradient with respect to x of rows that learn. The specification is
`kernels/dual_lora_reference.py`.

How: a row tile is BLOCK_M rows of any slots, so that W is read once for all of them; a pair is the rows of one segment
within one tile. The first programs of a launch, the *shrinkers*, compute h pair by pair, split over the contraction;
the last to arrive at a pair adds the partial sums in a fixed order, rounds once and raises the pair's flag. All other
programs compute tiles of y. They look at the flags only after their own contraction, long after these were raised, and
add one more product of depth r for each pair. With few rows a tile's contraction is split, too, so that every
multiprocessor reads a part of W.

No deadlock: shrinkers wait for no other program, and programs start in the order of their numbers (or all at once, if
the GPU has room for all), so that a program only waits for programs that have started. Nothing needs to be cleared
between launches, as a captured graph demands: the last program to arrive resets the tickets, and a flag holds the
number of its launch, which every program derives from the count of programs that have left before.

Invariants: the low-rank product of a pair is computed for all rows of its tile, and *selected* for the pair's own,
never multiplied by a mask: a NaN of one adapter changes no bit of other rows. Rows of no adapter compute exactly what
they would compute in a launch without adapters. All sums have a fixed order: equal input gives equal bits.

Sources: Chen et al. 2023 (Punica) and Sheng et al. 2023 (S-LoRA): segmented products; Osama et al. 2023 (Stream-K):
split contractions that the last program to arrive completes.
"""

import triton
import triton.language as tl

from clif.kernels import tiles
from clif.kernels.dual_lora_shrink_kernel import shrink, tile_of_x
from clif.kernels.numerics import dot, last_to_arrive, rounded, sum_of

FUSED, SHRINK, BASE = 0, 1, 2
"""Forms: all in one launch, or two launches, the second of which may start before the first has ended."""
PIECE = tl.constexpr(tiles.PIECE)


@triton.jit
def _wait_for_hidden(
    first, last, block_first, block_stop, flags, launch, BLOCKS: tl.constexpr, FORM: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return when h is complete for these pairs and blocks."""
    if FORM == 2 and not INTERPRET:  # noqa: SIM102 - known to the compiler, unlike the other one
        if first < last:
            tl.extra.cuda.gdc_wait()
    if FORM == 0:
        for pair in tl.range(first, last, num_stages=1):
            for block in tl.range(block_first, block_stop, num_stages=1):
                raised = tl.atomic_add(flags + pair * BLOCKS + block, 0, sem="acquire")
                while raised != launch:
                    raised = tl.atomic_add(flags + pair * BLOCKS + block, 0, sem="acquire")


@triton.jit
def _selected(mine, added, acc):
    """Rows that are `mine` of one, the others of the other. A product with a mask would spread a NaN to all rows."""
    return tl.where(mine[:, None], added, acc)


@triton.jit
def _finish(
    acc,
    b,
    hidden,
    bias,
    y,
    pairs,
    first,
    last,
    row,
    rows,
    col,
    col_stop,
    block_first,
    block_stop,
    b_slot,
    b_out,
    b_rank,
    y_row,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add the low-rank products of the pairs of a row tile to WIDTH columns of its base product, and store them."""
    at = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, WIDTH)
    ranks = tl.arange(0, RANK_P)
    # Not pipelined: h must not be fetched before its flag was seen.
    for pair in tl.range(first, last, num_stages=1):
        start = tl.load(pairs + 4 * pair)
        stop = tl.load(pairs + 4 * pair + 1)
        slot = tl.load(pairs + 4 * pair + 2)
        mine = (at >= start) & (at < stop)
        for block in tl.range(block_first, block_stop, num_stages=1):
            of_h = block * RANK + ranks
            inside = mine[:, None] & (ranks[None, :] < RANK)
            left = tl.load(
                hidden + at[:, None] * (BLOCKS * RANK) + of_h[None, :], mask=inside, other=0.0, cache_modifier=".cg"
            )
            if TMA:
                # Beyond RANK it reads zeros, or values that meet the zeros of `left`.
                if TRANSPOSED:
                    right = b.load([block * RANK, col])
                else:
                    right = b.load([slot * b_slot + col, block * RANK]).T
            else:
                inside = (ranks[:, None] < RANK) & (cols[None, :] < col_stop)
                right = tl.load(
                    b + slot * b_slot + cols[None, :] * b_out + of_h[:, None] * b_rank, mask=inside, other=0.0
                )
            acc = _selected(mine, dot(left, right, acc, INTERPRET), acc)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < col_stop, other=0.0).to(tl.float32)[None, :]
    if STORE_TMA:
        y.store([row, col], rounded(acc, y.dtype, INTERPRET))
    else:
        value = rounded(acc, y.dtype.element_ty, INTERPRET)
        tl.store(y + at[:, None] * y_row + cols[None, :], value, mask=(at[:, None] < rows) & (cols[None, :] < col_stop))


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _tile_of_y(
    item,
    n_tiles,
    n_columns,
    x,
    w,
    bias,
    b,
    hidden,
    y,
    firsts,
    pairs,
    col_tiles,
    sums,
    sum_tickets,
    flags,
    launch,
    rows,
    depth,
    x_row,
    w_out,
    w_k,
    b_slot,
    b_out,
    b_rank,
    y_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    FORM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The base product of one tile of y, or part of its contraction; the program with the whole sum completes it."""
    tile = item // SPLIT
    # Tiles that share rows of x or of W run close together, so that the second reads the cache.
    width = GROUP_M * n_columns
    first = (tile // width) * GROUP_M
    height = tl.minimum(n_tiles - first, GROUP_M)
    m = first + (tile % width) % height
    n = (tile % width) // height
    row = m * BLOCK_M
    col = tl.load(col_tiles + 4 * n)
    col_stop = tl.load(col_tiles + 4 * n + 1)
    block_first = tl.load(col_tiles + 4 * n + 2)
    block_stop = tl.load(col_tiles + 4 * n + 3)
    if ALIGNED:
        # This lets elements of y be stored 16 bytes at a time.
        col = tl.multiple_of(col, 16)
        col_stop = tl.multiple_of(col_stop, 16)
    cols = col + tl.arange(0, BLOCK_N)
    begin = 0
    end = depth
    if SPLIT > 1:
        share = tl.cdiv(tl.cdiv(depth, SPLIT), BLOCK_K) * BLOCK_K
        begin = (item % SPLIT) * share
        end = tl.minimum(begin + share, depth)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        left = tile_of_x(x, row, k, rows, depth, x_row, BLOCK_M, BLOCK_K, TMA)
        if TMA:
            right = w.load([k, col]) if TRANSPOSED else w.load([col, k]).T
        else:
            ks = k + tl.arange(0, BLOCK_K)
            inside = (ks[:, None] < depth) & (cols[None, :] < col_stop)
            right = tl.load(w + cols[None, :] * w_out + ks[:, None] * w_k, mask=inside, other=0.0)
        acc = dot(left, right, acc, INTERPRET)
    whole = True
    if SPLIT > 1:
        plane = sums + tile * (SPLIT * BLOCK_M * BLOCK_N)
        whole = last_to_arrive(acc, plane, item % SPLIT, sum_tickets + tile, BLOCK_M, BLOCK_N, SPLIT)
        if whole:
            acc = sum_of(plane, BLOCK_M, BLOCK_N, SPLIT)
    if whole:
        first = tl.load(firsts + m)
        last = tl.load(firsts + m + 1)
        _wait_for_hidden(first, last, block_first, block_stop, flags, launch, BLOCKS, FORM, INTERPRET)
        # Wide tiles in pieces: a selection has two values of each sum, which would not fit in the registers.
        if BLOCK_M * BLOCK_N > 2 * PIECE:
            left, right = _halves(acc, BLOCK_M, BLOCK_N)
            one, two = _halves(left, BLOCK_M, BLOCK_N // 2)
            three, four = _halves(right, BLOCK_M, BLOCK_N // 2)
            pieces = (one, two, three, four)
        elif BLOCK_M * BLOCK_N > PIECE:
            pieces = _halves(acc, BLOCK_M, BLOCK_N)
        else:
            pieces = (acc,)
        WIDTH: tl.constexpr = BLOCK_N // len(pieces)
        for i in tl.static_range(len(pieces)):
            _finish(
                pieces[i], b, hidden, bias, y, pairs, first, last, row, rows, col + i * WIDTH, col_stop, block_first,
                block_stop, b_slot, b_out, b_rank, y_row, BLOCK_M, WIDTH, RANK, RANK_P, BLOCKS, TRANSPOSED, HAS_BIAS,
                TMA, STORE_TMA, INTERPRET,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "n_columns", "shrinkers"])
def dual_lora_linear(
    x,
    w,
    bias,
    a,
    b,
    hidden,
    y,
    counts,
    firsts,
    pairs,
    col_tiles,
    blocks,
    planes,
    sums,
    tickets,
    sum_tickets,
    flags,
    left,
    scale,
    rows,
    n_columns,
    shrinkers,
    depth,
    x_row,
    w_out,
    w_k,
    a_slot,
    a_rank,
    a_k,
    b_slot,
    b_out,
    b_rank,
    y_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICES: tl.constexpr,
    FORM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACKED: tl.constexpr,
    EARLY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y [rows, out] of x [rows, depth]; hidden [rows, BLOCKS * RANK] is h.

    counts [1]: pairs. firsts [row tiles + 1]: where each row tile's pairs begin. pairs [n, 4]: first row, end,
    slot, row tile. col_tiles [n_columns, 4]: first column, end, first block of h that they read, end. blocks
    [BLOCKS, 2]: range of the contraction that makes each block of h. planes, sums: room for partial sums. tickets,
    sum_tickets: zero before and after. flags: one per pair and block. left: programs that have left, 65536 for a
    whole launch. The first `shrinkers` programs compute h, the others y. x, w, a, b: pointers, or with TMA tensor
    descriptors; then a_slot and b_slot are rows, not elements. y: a pointer, or with STORE_TMA a descriptor, which
    all column tiles must fill. PACKED: in the factor that has numbers of one rank side by side (B, or A if TRANSPOSED),
    BLOCKS * RANK of them lie from one row to the next. EARLY: the next launch may begin before this one has ended, for
    which compute capability 9.0 has an instruction.
    """
    if PACKED:
        # A constant stride: with a rank of 8, too, 16 bytes are loaded at a time.
        if TRANSPOSED:
            a_k = BLOCKS * RANK
        else:
            b_out = BLOCKS * RANK
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    n_tiles = tl.cdiv(rows, BLOCK_M)
    # The same for all programs of a launch: fewer than 65536 have left until the last one leaves.
    launch = (tl.load(left) >> 16) + 1
    if EARLY and not INTERPRET:
        tl.extra.cuda.gdc_launch_dependents()
    # A form is compiled without the work of the other launch, which would take registers.
    if FORM != 2 and program < shrinkers:
        for item in range(program, tl.load(counts) * (BLOCKS * SLICES), shrinkers):
            shrink(
                item, x, a, hidden, pairs, blocks, planes, tickets, flags, launch, scale, x_row, a_slot, a_rank,
                a_k, BLOCK_M, BLOCK_K, RANK, RANK_P, BLOCKS, SLICES, FORM, TRANSPOSED, ALIGNED, TMA, INTERPRET,
            )  # fmt: skip
    if FORM != 1 and program >= shrinkers:
        for item in range(program - shrinkers, n_tiles * n_columns * SPLIT, programs - shrinkers):
            _tile_of_y(
                item, n_tiles, n_columns, x, w, bias, b, hidden, y, firsts, pairs, col_tiles, sums, sum_tickets, flags,
                launch, rows, depth, x_row, w_out, w_k, b_slot, b_out, b_rank, y_row, BLOCK_M, BLOCK_N, BLOCK_K,
                GROUP_M, SPLIT, RANK, RANK_P, BLOCKS, FORM, TRANSPOSED, ALIGNED, HAS_BIAS, TMA, STORE_TMA, INTERPRET,
            )  # fmt: skip
    if FORM == 0:
        # No program waits for it. The first program makes the total of a launch the same for any number of programs.
        share = tl.where(program == 0, 65537 - programs, 1)
        tl.atomic_add(left, share.to(tl.int64), sem="relaxed")
    if FORM == 2 and not INTERPRET:
        # Also if no tile has an adapter: work after this launch must come after the shrink launch, too.
        tl.extra.cuda.gdc_wait()
