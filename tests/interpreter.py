"""Triton's interpreter, corrected and made faster.

It truncates float32 to bfloat16, where every GPU rounds to nearest even, and gets subnormals wrong. With the GPU's
rounding the kernels can be held to the same tolerance as the others. Triton 3.6's also rounds twice in a fused
operation, returns NaN where the larger of NaN and a number is the number, and makes numbers of arrays of one element in
a way that NumPy 2.4 refuses.

Nearly all its time goes to checks and types rather than to numbers, in tiles as small as a test's. So the language is
replaced once for a process and not at every launch; types and shapes are made once; operands of one shape are not
broadcast to it; and no check for overflow repeats every addition of integers, whose sizes in tests are small.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_get_np_dtype = interpreter._get_np_dtype
_patch_lang = interpreter._patch_lang
_broadcast = interpreter.interpreter_semantic.broadcast_impl_value


@functools.cache
def _scalar_np_dtype(dtype):
    return _get_np_dtype(dtype)


def _np_dtype(dtype):
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _scalar_np_dtype(dtype.scalar)


@functools.cache
def _block_of(element_ty, sizes):
    return tl.block_type(element_ty, list(sizes))


def _block(element_ty, shape):
    # Pointer types have no hash.
    return tl.block_type(element_ty, shape) if element_ty.is_ptr() else _block_of(element_ty, tuple(shape))


@functools.cache
def _shape(sizes):
    return tl.core.constexpr(math.prod(sizes)), tl.core.tuple([tl.core.constexpr(s) for s in sizes])


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shape(tuple(type.shape.values) if type.is_block() else ())


def _broadcast_values(lhs, rhs):
    a, b = lhs.type, rhs.type
    if a is b or (a.is_block() and b.is_block() and a.shape.values == b.shape.values):
        return lhs, rhs
    return _broadcast(lhs, rhs)


def _convert_float(data, from_dtype, to_dtype, rounding_mode):
    if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
        return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).reshape(data.shape)
    if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, 0x7FC0, rounded).astype(np.uint16).reshape(data.shape)
    return _convert(data, from_dtype, to_dtype, rounding_mode)


def _fma(x, y, z):
    """Of float32 by way of float64, where the product is exact."""
    product = np.multiply(x.data, y.data, dtype=np.float64)
    return interpreter.TensorHandle((product + z.data).astype(z.data.dtype), z.dtype.scalar)


def _patch_attr(obj, name, member, builder, scope):
    def interpreted(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, interpreted)


def correct() -> None:
    # A kernel's module knows the language by the one name, the language's own library by the other.
    interpreter._patch_attr = _patch_attr
    _patch_lang(types.FunctionType(correct.__code__, {"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: types.SimpleNamespace(restore=lambda: None)
    interpreter._convert_float = _convert_float
    interpreter._get_np_dtype = _np_dtype
    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if not hasattr(interpreter._interpreter, "fma_fp32"):  # Triton 3.6
        builder.create_fma = _fma
        builder.create_maxnumf = lambda a, b: builder.binary_op(a, b, np.fmax)
        builder.create_minnumf = lambda a, b: builder.binary_op(a, b, np.fmin)
    builder.get_block_ty = _block
    semantic.broadcast_impl_value = _broadcast_values
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    tl.tensor.__init__ = _init_tensor
    tl.block_type.with_element_ty = lambda self, scalar_ty: _block(scalar_ty, self.shape)
    tl.block_type.to_ir = tl.dtype.to_ir = lambda self, builder: self
