"""Numbers that a kernel is handed, and the scalar functions of epilogues, to the accuracy of the C++ ones."""

from __future__ import annotations

import os
import struct

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # knows nothing of libdevice, nor of assembly
NEAR = tl.constexpr(0.175)  # how far from 0 series are used; elsewhere nothing cancels


def argument(value: float, dtype: torch.dtype) -> float | int:
    """A Python number as a kernel argument, which :func:`number` reads back.

    Triton passes a float as float32. For float64 arithmetic its bits travel as an integer, so that nothing is lost and
    a new value neither recompiles the kernel (as a constexpr would) nor copies to the device (as a tensor would).
    """
    return struct.unpack("q", struct.pack("d", value))[0] if dtype == torch.float64 else float(value)


@triton.jit
def number(value, T: tl.constexpr):
    if T == tl.float64:
        return value.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full((), value, T)  # the interpreter hands over a Python float


@triton.jit
def widened(x, T: tl.constexpr):
    """`x` in the arithmetic type. Of bfloat16, whose bits are the upper half of float32's, one instruction an element:
    of the upper of two in a register the compiler makes two."""
    if INTERPRETED or x.dtype != tl.bfloat16 or T != tl.float32:
        return x.to(T)
    else:
        both_halves: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(both_halves, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def rounded(value, D: tl.constexpr):
    """`value` in the dtype of an output. From float64 to 16 bits by way of float32, as in C++: there is no such
    instruction, and the interpreter gets it wrong."""
    if value.dtype == tl.float64 and D != tl.float64:
        value = value.to(tl.float32)
    return value.to(D)


@triton.jit
def divide(a, b):
    # `/` on float32 is an approximation, two ulp off.
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0. The hardware's 2^y alone would lose a relative 1e-7 for every unit of -x."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)  # exp is 0 from there; -inf would make the remainder NaN. NaN passes.
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        remainder = (x - n * 0.693359375) - n * -2.12194440e-4  # ln 2 in two parts: the first product is exact
        return tl.exp(remainder) * tl.exp2(n)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, also where 1 + x rounds x away."""
    u = 1.0 + x
    lost = u == 1.0
    return tl.where(lost, x, tl.log(u) * divide(x, tl.where(lost, 1.0, u - 1.0)))


@triton.jit
def enormous_from(T: tl.constexpr):
    """Half the last place of such a logarithm is 64, or more: what it may be rounded by is beyond any power."""
    return 2.0**60 if T == tl.float64 else 2.0**31


@triton.jit
def is_enormous(v, scale):
    """Of a finite logit, scaled."""
    return (tl.abs(v * scale) >= enormous_from(scale.dtype)) & (tl.abs(v) < float("inf"))


@triton.jit
def origin(largest, scale):
    """(scale, base, factor) with which 2^(v scale - base) factor is 2^((v - largest) scale) for all v of a row: one
    rounded operation a number, for what rounding the base loses is a factor of the whole row.

    Where that is enormous, the next smaller number is so far below the largest that only what equals it counts; then
    a power of two stands for the scale, for nothing to be lost.
    """
    WIDE: tl.constexpr = scale.dtype == tl.float64
    nothing = largest == float("-inf")
    beyond = tl.abs(largest * scale) >= enormous_from(scale.dtype)
    if WIDE:
        power = (scale.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    else:
        power = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power *= tl.where(tl.abs(largest * power) < 1e37, 1.0, 2.0**-40)
    scale = tl.where(beyond, power, scale)
    base = tl.where(nothing, -1e37, largest * scale)
    lost = tl.where(nothing, 0.0, tl.fma(largest, scale, -base)) * -0.6931471805599453
    # The series is of float32, but what float64 loses is smaller than its square.
    near = lost if WIDE else expm1_near(lost)
    return scale, base, tl.where(tl.abs(lost) < NEAR, 1.0 + near, tl.exp(lost))


@triton.jit
def log2_fast(x):
    """log2(x) by the hardware's instruction, to a relative 2^-22, between 1/2 and 2 to an absolute 2^-22; tl.log2 is a
    polynomial of a library."""
    if INTERPRETED or x.dtype == tl.float64:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def expm1_near(x):
    """exp(x) - 1 for |x| <= NEAR in float32, to 1 unit in the last place."""
    p = ((0.00834349357 * x + 0.0417202599) * x + 0.166666538) * x + 0.499999583
    return x * (x * p + 1.0)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, also where exp(x) rounds to 1."""
    u = exp_negative(x)
    # What x lost in u, log(u) lost too. Below -1 nothing cancels.
    near = (u < 1.0) & (u > 0.36)
    exact = divide((u - 1.0) * x, tl.log(tl.where(near, u, 0.5)))
    return tl.where(u == 1.0, x, tl.where(near, exact, u - 1.0))


@triton.jit
def softplus(x):
    return tl.where(x < 0.0, 0.0, x) + log1p(exp_negative(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = exp_negative(-tl.abs(x))
    return divide(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # false for NaN
