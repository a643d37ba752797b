"""Calling an autograd.Function without its overhead."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` with every argument given.

    Of a Function with ``setup_context`` (which ``torch.func`` needs), ``apply`` binds its arguments to the signature of
    ``forward``: 60 µs a call, more than all the rest of a small loss. Only a transform or the compiler needs that.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
