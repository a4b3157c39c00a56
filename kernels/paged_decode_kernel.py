"""Attention of one new token per sequence to a paged KV cache, one launch for all sequences and heads (Triton).

    out = softmax(scale * q K^T) V      over the sequence's own slots of the cache, for each of its query heads

`kernels/testing/paged_decode_specification.py` is the specification.

How: a program takes one part of one sequence's context and one KV head, with all query heads that share it, so that
K and V are read once. It keeps a running maximum, a running sum and the weighted values, all float32. The last program
to arrive at a sequence and head adds up its parts in a fixed order. The grid is that of the table's capacity. The
number of sequences and their lengths are read from the device, so that a captured graph can be replayed over a refilled
table. Programs without work leave at once.

Invariants: only slots that hold a token of the sequence are loaded. Other slots, which may hold a NaN of another
request, are never read, not even to multiply them by zero. The parts depend only on the length of their own sequence,
and all sums have a fixed order: a sequence gets the same bits in any batch, and again in the next run.

Sources: Kwon et al. 2023 (PagedAttention); Dao et al. 2023 (Flash-Decoding: parts of a context in parallel);
Milakov and Gimelshein 2018 (online softmax).
"""

import triton
import triton.language as tl

from clif.kernels.numerics import dot, rounded


@triton.jit
def _part_of_context(
    query, keys, values, table, begin, end, scale, cache_slot, inside_head,
    ROWS: tl.constexpr, HEAD_DIM_P: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_KV: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Maximum and sum [ROWS] and weighted values [ROWS, HEAD_DIM_P] over tokens begin..end, at least one."""
    cols = tl.arange(0, HEAD_DIM_P)
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM_P], dtype=tl.float32)
    for token in range(begin, end, BLOCK_KV):
        tokens = token + tl.arange(0, BLOCK_KV)
        inside = tokens < end
        block = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0)
        slot = (block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * cache_slot
        key = tl.load(keys + slot[None, :] + cols[:, None], mask=inside[None, :] & inside_head[:, None], other=0.0)
        scores = dot(query, key, tl.zeros([ROWS, BLOCK_KV], dtype=tl.float32), INTERPRET)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        # Scaled after the difference, which keeps rounding errors of the large weights small. Rounded before the sum,
        # so that the weights of the values add up to one.
        weights = rounded(tl.exp2((scores - above[:, None]) * scale), keys.dtype.element_ty, INTERPRET)
        shrink = tl.exp2((highest - above) * scale)
        value = tl.load(values + slot[:, None] + cols[None, :], mask=inside[:, None] & inside_head[None, :], other=0.0)
        total = total * shrink + tl.sum(weights.to(tl.float32), 1)
        acc = dot(weights, value, acc * shrink[:, None], INTERPRET)
        highest = above
    return highest, total, acc


@triton.jit
def paged_decode(
    q,
    cache,
    out,
    counts,
    rows,
    lengths,
    blocks,
    planes,
    sums,
    tickets,
    scale,
    table_row,
    q_row,
    q_head,
    cache_head,
    cache_slot,
    out_row,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_P: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out [rows, heads * HEAD_DIM] of q [rows, heads, HEAD_DIM]; grid (parts, KV heads, capacity of the table).

    cache [2 * KV heads, slots, HEAD_DIM], keys first. counts [1]: sequences; rows, lengths [capacity]: each one's row
    in q and out, and its tokens; blocks [capacity, table_row]: its blocks of the cache. GROUP query heads share a KV
    head, ROWS is GROUP padded. A part has at least LEAST tokens, and there are at most PARTS. planes, sums: workspace
    of [capacity, KV heads, parts] times [GROUP, HEAD_DIM] and [2, GROUP]; tickets: zero before and after. scale: the
    softmax's times log2(e), above 0.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    length = tl.load(lengths + sequence, mask=sequence < tl.load(counts), other=0)
    depth = tl.maximum(tl.cdiv(tl.cdiv(length, PARTS), BLOCK_KV) * BLOCK_KV, LEAST)
    begin = part * depth
    if begin < length:
        projections = tl.arange(0, ROWS)
        cols = tl.arange(0, HEAD_DIM_P)
        inside_head = cols < HEAD_DIM
        inside = (projections[:, None] < GROUP) & inside_head[None, :]
        row = tl.load(rows + sequence)
        heads = head * GROUP + projections
        query = tl.load(q + row * q_row + heads[:, None] * q_head + cols[None, :], mask=inside, other=0.0)
        keys = cache + head.to(tl.int64) * cache_head
        values = keys + kv_heads.to(tl.int64) * cache_head
        highest, total, acc = _part_of_context(
            query, keys, values, blocks + sequence * table_row, begin, tl.minimum(begin + depth, length), scale,
            cache_slot, inside_head, ROWS, HEAD_DIM_P, BLOCK_SIZE, BLOCK_KV, INTERPRET,
        )  # fmt: skip
        address = out + row * out_row + heads[:, None] * HEAD_DIM + cols[None, :]
        parts = tl.cdiv(length, depth)
        if parts == 1:
            tl.store(address, rounded(acc / total[:, None], out.dtype.element_ty, INTERPRET), mask=inside)
        else:
            target = sequence * kv_heads + head
            plane = planes + target * tl.num_programs(0) * (GROUP * HEAD_DIM) + projections[:, None] * HEAD_DIM + cols
            partial = sums + target * tl.num_programs(0) * (2 * GROUP) + projections
            tl.store(plane + part * (GROUP * HEAD_DIM), acc, mask=inside)
            tl.store(partial + part * (2 * GROUP), highest, mask=projections < GROUP)
            tl.store(partial + part * (2 * GROUP) + GROUP, total, mask=projections < GROUP)
            # The stores of all threads must precede the ticket, which one thread draws.
            tl.debug_barrier()
            if tl.atomic_add(tickets + target, 1, sem="acq_rel") == parts - 1:
                # The maximum comes first: then no load waits for the arithmetic of the previous one.
                highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
                for i in range(parts):
                    one = tl.load(partial + i * (2 * GROUP), mask=projections < GROUP, other=0.0, cache_modifier=".cg")
                    highest = tl.maximum(highest, one)
                total = tl.zeros([ROWS], dtype=tl.float32)
                acc = tl.zeros([ROWS, HEAD_DIM_P], dtype=tl.float32)
                for i in range(parts):
                    one = tl.load(partial + i * (2 * GROUP), mask=projections < GROUP, other=0.0, cache_modifier=".cg")
                    many = tl.load(
                        partial + i * (2 * GROUP) + GROUP, mask=projections < GROUP, other=1.0, cache_modifier=".cg"
                    )
                    weight = tl.exp2((one - highest) * scale)
                    total += weight * many
                    values_i = tl.load(plane + i * (GROUP * HEAD_DIM), mask=inside, other=0.0, cache_modifier=".cg")
                    acc += weight[:, None] * values_i
                tl.store(address, rounded(acc / total[:, None], out.dtype.element_ty, INTERPRET), mask=inside)
                tl.store(tickets + target, 0)
