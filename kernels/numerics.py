"""Shared parts of the kernels: products, roundings, and sums of several programs in a fixed order.

Products and roundings are also right in Triton's interpreter, which multiplies bfloat16 as integers and truncates.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """A float32 value in another type, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        # An addition could carry a NaN's mantissa into its sign: NaNs only get a bit that survives truncation.
        bits = tl.where(value != value, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def last_to_arrive(acc, plane, part, ticket, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """Store a partial sum; whether all others of this tile had been stored before."""
    offsets = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(plane + part * (ROWS * COLS) + offsets, acc)
    # The stores of all threads must precede the ticket, which one thread draws.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == PARTS - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def sum_of(plane, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """All partial sums of a tile, in a fixed order; read past the first-level cache, which may hold older ones."""
    offsets = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i in tl.range(PARTS, num_stages=1):
        total += tl.load(plane + i * (ROWS * COLS) + offsets, cache_modifier=".cg")
    return total
