"""What all kernels here are written in beside Triton itself.

Triton's interpreter stores bfloat16 as integers, cuts where a card rounds and multiplies the bits:
`dot` and `rounded` say what is meant in both places.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, accumulator):
    """`a @ b + accumulator`, which is float32; float32 operands are not shortened to tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 in `dtype`: to the nearest, ties to even; beyond float8's largest is its largest."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            x = (bits & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        elif dtype == tl.float8e4nv:
            x = tl.minimum(tl.maximum(x, -448.0), 448.0)
            exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
            step = ((tl.maximum(exponent, 121) - 3) << 23).to(tl.float32, bitcast=True)
            x = (x + step * 12582912.0) - step * 12582912.0
    return x.to(dtype)


@triton.jit
def like(x, other):
    """As an operand beside `other`."""
    if x.dtype != other.dtype:
        x = x.to(tl.float32).to(other.dtype)
    return x
