"""Argument checks: each names the argument, what came and what was expected. None of them looks at tensor data."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
STRIDED = torch.strided

# Kernels compute in float32 whatever the options are in Python, and divide by some of them.
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).smallest_normal

MOST_ELEMENTS = 2**59  # of 16 bytes; more overflow the count of bytes, which an expanded tensor can have for nothing
INT64 = 2**63
LAST_SEED = 2**64 - 1  # that torch.Generator takes


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not STRIDED or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, got a {kind} one")


def streams(**tensors: Tensor) -> None:
    """Floating-point tensors of one shape [B, …] on one device; dtypes may differ."""
    rest = iter(tensors.values())
    first = next(rest)
    if type(first) is Tensor and first.layout is STRIDED and first.dtype in FLOATING:
        try:
            if first.dim() != 0 and 0 < first.numel() < MOST_ELEMENTS:
                shape, device = first.shape, first.device
                for t in rest:
                    if type(t) is not Tensor or t.shape != shape or t.device != device or t.dtype not in FLOATING:
                        break
                    if t.layout is not STRIDED:
                        break
                else:  # as nearly always; what follows says what is wrong
                    return
        except RuntimeError:  # nested tensors have no shape
            pass
    first_name = next(iter(tensors))
    for name, value in tensors.items():
        floating(name, value)
        if value.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but {first_name} has {tuple(first.shape)}")
        if value.device != first.device:
            raise ValueError(f"{name} is on {value.device}, but {first_name} is on {first.device}")
        if type(value) is not type(first) and _is_dtensor(value) != _is_dtensor(first):
            raise TypeError(f"{name} and {first_name} must both be DTensors or both plain tensors")
    if first.dim() == 0:
        raise ValueError(f"{first_name} must have a batch dimension [B, ...], got a 0-dimensional tensor")
    if first.shape[0] != 0 and first.numel() == 0:
        raise ValueError(f"{first_name} has rows of no elements: shape {tuple(first.shape)}")
    _addressable(first_name, first)


def _addressable(name: str, value: Tensor) -> None:
    if value.numel() >= MOST_ELEMENTS:
        raise ValueError(f"{name} has too many elements for any memory: shape {list(value.shape)}")


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The optional ones that are there."""
    return {name: t for name, t in tensors.items() if t is not None}


def floating(name: str, value: Tensor) -> None:
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def function(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def tensors(name: str, value: object) -> list[Tensor]:
    """A list or tuple: one tensor would pass for the list of its rows."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, got {type(value).__name__}")
    return list(value)


def _is_dtensor(value: object) -> bool:
    return type(value).__name__ == "DTensor"


def local(name: str, value: Tensor) -> None:
    """No DTensor: the operators at hand have no sharding rules, or what it belongs to is plain.

    The advice must be right however it is sharded: a rank's local part may be some columns, or a summand.
    """
    if _is_dtensor(value):
        raise TypeError(
            f"{name} is a DTensor: pass {name}.full_tensor(), and all else whole too, so that every rank computes the"
            " same; or plain tensors of the rank's own rows"
        )


def per_row(name: str, value: Tensor | None, like: Tensor) -> None:
    """One float32 or float64 number per row. Half precision is refused: it is a known source of wrong weights."""
    if value is None:
        return
    tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64 whatever the images are, got {value.dtype}")
    _vector(name, value, like.shape[0], like)


def per_frame(name: str, value: Tensor, like: Tensor) -> None:
    """As :func:`per_row`, or one number for each frame of a video [B, F, …]."""
    tensor(name, value)
    if value.dim() != 2:
        return per_row(name, value, like)
    if like.dim() < 3 or value.shape != like.shape[:2]:
        raise ValueError(f"{name} must have shape [B] or, for a video [B, F, ...], [B, F]; got {list(value.shape)}")
    per_row(name, value[:, 0], like)


def mask(name: str, value: Tensor, like: Tensor, shape: torch.Size | None = None) -> None:
    """A bool tensor that broadcasts to `shape`, by default that of `like`."""
    shape = like.shape if shape is None else shape
    tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {value.dtype}")
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or any(m not in (1, n) for m, n in sizes):
        raise ValueError(f"{name} of shape {list(value.shape)} does not broadcast to {list(shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the batch is on {like.device}")


def flags(name: str, value: Tensor, length: int, like: Tensor) -> None:
    tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {value.dtype}")
    _vector(name, value, length, like)


def real(name: str, value: Tensor) -> None:
    """A tensor of integers or of floating-point numbers."""
    tensor(name, value)
    if value.dtype not in (*INTEGERS, *FLOATING):
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")


def integers(name: str, value: object) -> Tensor:
    """A tensor of integers, as int64: with others arithmetic wraps, and one of uint8 is a mask where it is an index."""
    tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    return value.to(torch.int64)


def indices(name: str, value: object, like: Tensor) -> Tensor:
    """One integer per row, as int64; their range is not looked at."""
    index = integers(name, value)
    _vector(name, index, like.shape[0], like)
    return index


def _vector(name: str, value: Tensor, length: int, like: Tensor) -> None:
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape [{length}], got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the batch is on {like.device}")


def number(name: str, value: float, *, low: float = -LARGEST, open_low: bool = False) -> float:
    """A finite number in float32's range, at least `low`; if `open_low`, so much more that float32 divides by the rest.

    NumPy's numbers pass for Python's.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        value = float(value)
    # False for NaN; math.isfinite would break a graph with dynamic floats.
    if not (low + SMALLEST if open_low else low) <= value <= LARGEST:
        raise ValueError(f"{name} must be {_expected(value, low, open_low)}, got {_brief(value)}")
    return float(value)


def scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a 0-dimensional tensor, as a tensor beside `like` that has no gradient."""
    if not isinstance(value, Tensor):
        return like.new_full((), number(name, value), dtype=torch.float64)  # kernels round it to their arithmetic
    real(name, value)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-dimensional tensor, got shape {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the batch is on {like.device}")
    if _is_dtensor(value) != _is_dtensor(like):
        raise TypeError(f"{name} and the batch must both be DTensors or both plain tensors")
    return value.detach()


def _expected(value: float, low: float, open_low: bool) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    if not -LARGEST <= value <= LARGEST:
        return f"from {-LARGEST:.2g} to {LARGEST:.2g}, the range of float32"
    if open_low and value > low:
        return f"at least {low + SMALLEST:.2g}, the least that float32 divides by"
    return f"{'>' if open_low else '>='} {low:g}"


def _brief(value: float) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # Python does not print very long ones
        return f"an int of {value.bit_length()} bits"
    return f"{value}"


def share(name: str, value: float) -> float:
    """A number from 0 to 1."""
    value = number(name, value, low=0)
    if value > 1:
        raise ValueError(f"{name} must be <= 1, got {value}")
    return value


def integer(name: str, value: int, *, low: int = -INT64, high: int = INT64 - 1) -> int:
    """An integer from `low` to `high`, by default any of int64's. NumPy's pass for Python's."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        value = operator.index(value)
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {_brief(value)}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}, got {_brief(value)}")
    return value


def positive_int(name: str, value: int) -> int:
    return integer(name, value, low=1)


def choice(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")


def logits(**tensors: Tensor) -> None:
    """Floating-point tensors [..., V] on one device whose rows agree; V and dtypes may differ."""
    first_name, first = next(iter(tensors.items()))
    for name, value in tensors.items():
        floating(name, value)
        if _is_dtensor(value) != _is_dtensor(first):
            raise TypeError(f"{name} and {first_name} must both be DTensors or both plain tensors")
        if value.dim() == 0 or value.shape[-1] == 0:
            raise ValueError(f"{name} must have shape [..., V] with V > 0, got {list(value.shape)}")
        _addressable(name, value)
        if value.shape[:-1] != first.shape[:-1]:
            raise ValueError(f"{name} has rows {list(value.shape[:-1])}, but {first_name} has {list(first.shape[:-1])}")
        if value.device != first.device:
            raise ValueError(f"{name} is on {value.device}, but {first_name} is on {first.device}")


def row_indices(name: str, value: Tensor, like: Tensor) -> None:
    """One int64 for each row of `like` [..., N]."""
    tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if value.shape != like.shape[:-1]:
        raise ValueError(f"{name} must have shape {list(like.shape[:-1])}, got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the batch is on {like.device}")


def head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """An output layer and its input: hidden [..., H], weight [V, H], bias [V]; one dtype, except under autocast.

    The layer's parameters may be DTensors, of which ``sequence/layout.py`` makes a rank's part, as may all.
    """
    floating(f"{prefix}hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden must have shape [..., H] with H > 0, got {list(hidden.shape)}")
    _addressable(f"{prefix}hidden", hidden)
    size = hidden.shape[-1]
    for name, value, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if value is None:
            continue
        floating(f"{prefix}{name}", value)
        vocabulary = weight.shape[0] if name == "bias" else value.shape[0] if value.dim() else 0
        expected = (vocabulary, size)[:dims]
        if value.shape != expected or vocabulary == 0:
            wanted = f"[V, {size}] with V > 0" if dims == 2 else str(list(expected))
            raise ValueError(f"{prefix}{name} must have shape {wanted}, got {list(value.shape)}")
        if value.device != hidden.device:
            raise ValueError(f"{prefix}{name} is on {value.device}, but {prefix}hidden is on {hidden.device}")
        # Autocast takes no float64 along.
        cast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (value.dtype, hidden.dtype)
        if value.dtype != hidden.dtype and not cast:
            raise TypeError(f"{prefix}{name} is {value.dtype}, but {prefix}hidden is {hidden.dtype}")
