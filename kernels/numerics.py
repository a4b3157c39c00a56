"""Products and roundings for Triton's interpreter, too: it multiplies bfloat16 as integers and rounds by cutting."""

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
        # Adding could carry a NaN's mantissa into its sign: NaNs only get a bit that survives the cut.
        bits = tl.where(value != value, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)
