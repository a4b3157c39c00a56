"""Attention of prompt tokens to a paged KV cache, one launch for all prompts and heads (Triton).

    out = softmax(scale * q K^T) V      over the sequence's own slots of the cache, up to the token's own position

`kernels/testing/paged_prefill_specification.py` is the specification.

How: a tile is a few neighbouring tokens of one prompt and one KV head, with all query heads that share it, as the rows
of one product. Keys and values are read in the cache, which has those of the tokens themselves as well: a prompt that
continues or that begins with what others have computed is no other case than a new one. Tiles are data, so that a
captured graph can be replayed over other prompts; programs that have none end at once. A tile keeps a running maximum,
a running sum and the weighted values, all float32.

Invariants: only slots that hold a token of the sequence are loaded. A result depends on the sequence's own tokens and
on where the token lies in its tile: the same prompt, cut alike, gets the same bits in any batch.

Sources: FlashAttention-2 (Dao 2023); PagedAttention (Kwon et al. 2023); Milakov and Gimelshein 2018 (online softmax).
"""

import triton
import triton.language as tl

from clif.kernels.numerics import dot, rounded, widened


@triton.jit
def paged_prefill(
    q,
    cache,
    out,
    counts,
    tiles,
    blocks,
    scale,
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
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out [rows, heads * HEAD_DIM] of q [rows, heads, HEAD_DIM]; grid: (KV_HEADS, the most tiles).

    cache [2 * KV_HEADS, slots, HEAD_DIM], keys first. counts [1]: tiles; tiles [n, 4]: first row in q and out, rows (at
    most ROWS // GROUP), position of the first one in its sequence, and which of `blocks` [sequences, table_row] is the
    sequence's. GROUP query heads share a KV head. scale: the softmax's times log2(e), above 0.
    """
    head = tl.program_id(0)
    tile = tl.program_id(1)
    if tile < tl.load(counts):
        first = tl.load(tiles + 4 * tile)
        size = tl.load(tiles + 4 * tile + 1)
        start = tl.load(tiles + 4 * tile + 2)
        table = blocks + tl.load(tiles + 4 * tile + 3).to(tl.int64) * table_row
        members = tl.arange(0, ROWS)
        row = members // GROUP
        heads = head * GROUP + members % GROUP
        cols = tl.arange(0, HEAD_DIM_P)
        inside_head = cols < HEAD_DIM
        inside = (row < size)[:, None] & inside_head[None, :]
        at = (first + row)[:, None]
        query = tl.load(q + at * q_row + heads[:, None] * q_head + cols[None, :], mask=inside, other=0.0)
        keys = cache + head.to(tl.int64) * cache_head
        values = keys + cache_head.to(tl.int64) * KV_HEADS
        highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM_P], dtype=tl.float32)
        end = start + size
        for token in range(0, end, BLOCK_KV):
            tokens = token + tl.arange(0, BLOCK_KV)
            present = tokens < end
            block = tl.load(table + tokens // BLOCK_SIZE, mask=present, other=0)
            slot = (block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * cache_slot
            loaded = present[:, None] & inside_head[None, :]
            key = tl.load(keys + slot[:, None] + cols[None, :], mask=loaded, other=0.0)
            key = widened(key, query.dtype, INTERPRET)
            scores = dot(query, tl.trans(key), tl.zeros([ROWS, BLOCK_KV], dtype=tl.float32), INTERPRET)
            # Every row sees the first token: no maximum is ever minus infinity.
            scores = tl.where(tokens[None, :] <= (start + row)[:, None], scores, float("-inf"))
            above = tl.maximum(highest, tl.max(scores, 1))
            # As in paged_decode: scaled after the difference, rounded before the sum.
            weights = rounded(tl.exp2((scores - above[:, None]) * scale), query.dtype, INTERPRET)
            shrink = tl.exp2((highest - above) * scale)
            value = tl.load(values + slot[:, None] + cols[None, :], mask=loaded, other=0.0)
            total = total * shrink + tl.sum(weights.to(tl.float32), 1)
            value = widened(value, query.dtype, INTERPRET)
            if keys.dtype.element_ty != query.dtype:
                value = tl.where(present[:, None], value, 0.0)
            acc = dot(weights, value, acc * shrink[:, None], INTERPRET)
            highest = above
        result = rounded(acc / total[:, None], out.dtype.element_ty, INTERPRET)
        tl.store(out + at * out_row + heads[:, None] * HEAD_DIM + cols[None, :], result, mask=inside)
