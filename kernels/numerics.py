"""Shared parts of the kernels: products, roundings, and sums of several programs in a fixed order.

Products and roundings are also right in Triton's interpreter, which multiplies bfloat16 as integers, truncates, and
knows no NaN and no subnormal number of eight bits.
"""

import triton
import triton.language as tl

FP8_MOST: tl.constexpr = tl.constexpr(448.0)
"""The largest number of float8_e4m3fn, which has no infinity."""


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """A float32 value in another type, to nearest even; one of eight bits saturates, and keeps a NaN."""
    if dtype == tl.float8e4nv:
        value = tl.where(value > FP8_MOST, FP8_MOST, tl.where(value < -FP8_MOST, -FP8_MOST, value))
    if INTERPRET and dtype == tl.float8e4nv:
        value = _fp8_of(value)
    elif INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        # An addition could carry a NaN's mantissa into its sign: NaNs only get a bit that survives truncation.
        bits = tl.where(value != value, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def widened(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """A value of eight bits in a type that has all of them; any other value is as it was."""
    if value.dtype == tl.float8e4nv:
        if INTERPRET:
            value = rounded(_of_fp8(value), dtype, INTERPRET)
        elif dtype == tl.bfloat16:
            # The direct conversion takes an instruction of a slow unit for each number (F2F, 144 of 888 in a step of
            # paged decode); this one none.
            value = value.to(tl.float16).to(tl.float32)
        value = value.to(dtype)
    return value


@triton.jit
def _of_fp8(value):
    """A float32 of eight bits."""
    byte = value.to(tl.uint8, bitcast=True).to(tl.uint32)
    # Exponent and mantissa in their places of a float32, whose bias is greater by 120: the product is exact.
    wide = ((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    wide = tl.where((byte & 0x7F) == 0x7F, float("nan"), wide)
    return tl.where(byte > 0x7F, -wide, wide)


@triton.jit
def _fp8_of(value):
    """A float32 value of at most FP8_MOST, or a NaN, in eight bits: sign, exponent of bias 7, three bits."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    # The last bit of this sum is the last one of a subnormal number.
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - (141 << 23)
    byte = tl.where(size > 0x7F800000, 0x7F, tl.where(size < (121 << 23), tiny, normal))
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


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
