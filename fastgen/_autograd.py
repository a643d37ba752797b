"""Calling an autograd.Function without avoidable overhead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as torch_once_differentiable


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` with every argument given.

    Of a Function with ``setup_context`` (which ``torch.func`` needs), ``apply`` binds its arguments to the signature of
    ``forward``: 60 µs a call, more than all the rest of a small loss. Only a transform or the compiler needs that.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of the same name, at no cost where no graph of the backward is being built."""
    guarded = torch_once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
