"""Attention of one new token per sequence to a paged KV cache, one launch for all sequences and heads (Triton).

    out = softmax(scale * q K^T) V      over the sequence's own slots of the cache, for each of its query heads

`kernels/testing/paged_decode_specification.py` is the specification.

How: an item is one part of one sequence's context and one KV head, with all query heads that share it, so that K and V
are read once. Every program finds the parts of all sequences from their lengths, and takes each n-th item: n programs
fill the GPU, however few or many items there are, so that a captured graph can be replayed over a refilled table of
any lengths and starts no programs without work. An item keeps a running maximum, a running sum and the weighted values,
all float32. The last program to arrive at a sequence and head adds up its parts in a fixed order.

Invariants: only slots that hold a token of the sequence are loaded. Other slots, which may hold a NaN of another
request, are never read, not even to multiply them by zero. The parts depend only on the length of their own sequence,
and all sums have a fixed order: a sequence gets the same bits in any batch, and again in the next run.

Sources: Kwon et al. 2023 (PagedAttention); Dao et al. 2023 (Flash-Decoding: parts of a context in parallel);
Milakov and Gimelshein 2018 (online softmax).
"""

import triton
import triton.language as tl

from clif.kernels.numerics import dot, rounded, widened


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
        key = tl.load(keys + slot[:, None] + cols[None, :], mask=inside[:, None] & inside_head[None, :], other=0.0)
        key = widened(key, query.dtype, INTERPRET)
        scores = dot(query, tl.trans(key), tl.zeros([ROWS, BLOCK_KV], dtype=tl.float32), INTERPRET)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        # Scaled after the difference, which keeps rounding errors of the large weights small. Rounded before the sum,
        # so that the weights of the values add up to one.
        weights = rounded(tl.exp2((scores - above[:, None]) * scale), query.dtype, INTERPRET)
        shrink = tl.exp2((highest - above) * scale)
        value = tl.load(values + slot[:, None] + cols[None, :], mask=inside[:, None] & inside_head[None, :], other=0.0)
        total = total * shrink + tl.sum(weights.to(tl.float32), 1)
        value = widened(value, query.dtype, INTERPRET)
        if keys.dtype.element_ty != query.dtype:
            # It changes nothing: what is outside was loaded as zero. Behind a mask the compiler converts values as they
            # were loaded, 16 bytes at a time, instead of reading operands of the product byte by byte.
            value = tl.where(inside[:, None], value, 0.0)
        acc = dot(weights, value, acc * shrink[:, None], INTERPRET)
        highest = above
    return highest, total, acc


@triton.jit(do_not_specialize=["first", "capacity"])
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
    first,
    capacity,
    table_row,
    q_row,
    q_head,
    cache_head,
    cache_slot,
    out_row,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_P: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out [rows, heads * HEAD_DIM] of q [rows, heads, HEAD_DIM]; grid: any number of programs.

    Computes sequences `first` to `capacity` of the table, SEQUENCES at most. cache [2 * KV_HEADS, slots, HEAD_DIM],
    keys first. counts [1]: sequences; rows, lengths [capacity]: each one's row in q and out, and its tokens; blocks
    [capacity, table_row]: its blocks of the cache. GROUP query heads share a KV head, ROWS is GROUP padded. A context
    has a part for each LEAST tokens, at least one and at most PARTS, equal to within BLOCK_KV tokens. planes, sums:
    workspace of [parts of all sequences, KV_HEADS] times [GROUP, HEAD_DIM] and [2, GROUP]; tickets [sequences,
    KV_HEADS]: zero before and after. scale: the softmax's times log2(e), above 0.
    """
    index = first + tl.arange(0, SEQUENCES)
    # Both loads start at once: the number of sequences decides what is used, not what is read.
    every = tl.load(lengths + index, mask=index < capacity, other=0)
    every = tl.where(index < tl.load(counts), every, 0)
    ends = tl.cumsum(tl.where(every > 0, tl.minimum(tl.maximum(every // LEAST, 1), PARTS), 0), 0)
    for item in range(tl.program_id(0), tl.max(ends, 0) * KV_HEADS, tl.num_programs(0)):
        head = item % KV_HEADS
        unit = item // KV_HEADS
        # The sequence whose parts this one is among, and the number of the first of them.
        before = ends <= unit
        own = tl.sum(before.to(tl.int32), 0)
        start = tl.max(tl.where(before, ends, 0), 0)
        length = tl.load(lengths + first + own)
        parts = tl.minimum(tl.maximum(length // LEAST, 1), PARTS)
        steps = tl.cdiv(length, BLOCK_KV)
        begin = (unit - start) * steps // parts * BLOCK_KV
        end = tl.minimum((unit - start + 1) * steps // parts * BLOCK_KV, length)
        projections = tl.arange(0, ROWS)
        cols = tl.arange(0, HEAD_DIM_P)
        inside_head = cols < HEAD_DIM
        inside = (projections[:, None] < GROUP) & inside_head[None, :]
        row = tl.load(rows + first + own)
        heads = head * GROUP + projections
        query = tl.load(q + row * q_row + heads[:, None] * q_head + cols[None, :], mask=inside, other=0.0)
        keys = cache + head.to(tl.int64) * cache_head
        highest, total, acc = _part_of_context(
            query, keys, keys + cache_head.to(tl.int64) * KV_HEADS, blocks + (first + own) * table_row, begin, end,
            scale, cache_slot, inside_head, ROWS, HEAD_DIM_P, BLOCK_SIZE, BLOCK_KV, INTERPRET,
        )  # fmt: skip
        address = out + row * out_row + heads[:, None] * HEAD_DIM + cols[None, :]
        if parts == 1:
            tl.store(address, rounded(acc / total[:, None], out.dtype.element_ty, INTERPRET), mask=inside)
        else:
            plane = planes + (start * KV_HEADS + head) * (GROUP * HEAD_DIM) + projections[:, None] * HEAD_DIM + cols
            partial = sums + (start * KV_HEADS + head) * (2 * GROUP) + projections
            part = (unit - start) * KV_HEADS
            tl.store(plane + part * (GROUP * HEAD_DIM), acc, mask=inside)
            tl.store(partial + part * (2 * GROUP), highest, mask=projections < GROUP)
            tl.store(partial + part * (2 * GROUP) + GROUP, total, mask=projections < GROUP)
            # The stores of all threads must precede the ticket, which one thread draws.
            tl.debug_barrier()
            ticket = tickets + own * KV_HEADS + head
            if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
                # The maximum comes first: then no load waits for the arithmetic of the previous one.
                highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
                for i in range(parts):
                    at = partial + i * (2 * KV_HEADS * GROUP)
                    one = tl.load(at, mask=projections < GROUP, other=0.0, cache_modifier=".cg")
                    highest = tl.maximum(highest, one)
                total = tl.zeros([ROWS], dtype=tl.float32)
                acc = tl.zeros([ROWS, HEAD_DIM_P], dtype=tl.float32)
                for i in range(parts):
                    at = partial + i * (2 * KV_HEADS * GROUP)
                    one = tl.load(at, mask=projections < GROUP, other=0.0, cache_modifier=".cg")
                    many = tl.load(at + GROUP, mask=projections < GROUP, other=1.0, cache_modifier=".cg")
                    weight = tl.exp2((one - highest) * scale)
                    total += weight * many
                    plane_i = plane + i * (KV_HEADS * GROUP * HEAD_DIM)
                    acc += weight[:, None] * tl.load(plane_i, mask=inside, other=0.0, cache_modifier=".cg")
                tl.store(address, rounded(acc / total[:, None], out.dtype.element_ty, INTERPRET), mask=inside)
                tl.store(ticket, 0)
