"""Numbers that a kernel is handed, and the scalar functions of epilogues, to the accuracy of the C++ ones."""

from __future__ import annotations

import os
import struct

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

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


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows nothing of libdevice


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
