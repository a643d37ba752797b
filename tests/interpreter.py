"""Triton's interpreter, corrected: it truncates float32 to bfloat16, where every GPU rounds to nearest even, and gets
subnormals wrong. With the GPU's rounding the kernels can be held to the same tolerance as the others. Triton 3.6's also
makes numbers of arrays of one element in a way that NumPy 2.4 refuses. And it is made faster: at every call of a device
function it looks through all of the language for what the kernel's launch has replaced already."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor
_patch_lang = interpreter._patch_lang


def _convert_float(data, from_dtype, to_dtype, rounding_mode):
    if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
        return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).reshape(data.shape)
    if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, 0x7FC0, rounded).astype(np.uint16).reshape(data.shape)
    return _convert(data, from_dtype, to_dtype, rounding_mode)


def _patch_tensor(tensor, *scope):
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


class _Launch:
    """The modules of the language that are replaced, from the start of a launch to its end."""

    replaced: set[object] | None = None


def _patch_once(fn):
    modules = {id(v) for v in fn.__globals__.values() if v is tl or v is tl.core}
    if _Launch.replaced is not None and modules <= _Launch.replaced:
        return None  # a device function's: nobody restores it
    scope = _patch_lang(fn)
    if _Launch.replaced is None:  # the launch itself
        restore, _Launch.replaced = scope.restore, set()

        def end() -> None:
            _Launch.replaced = None
            restore()

        scope.restore = end
    _Launch.replaced |= modules
    return scope


def correct() -> None:
    interpreter._patch_lang = _patch_once
    interpreter._convert_float = _convert_float
    interpreter._patch_lang_tensor = _patch_tensor
