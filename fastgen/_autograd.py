"""Calling an autograd.Function without avoidable overhead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` with every argument given.

    Of a Function with ``setup_context`` (which ``torch.func`` needs), ``apply`` binds its arguments to the signature of
    ``forward``: 60 µs a call, more than all the rest of a small loss. Only a transform or the compiler needs that.
    """
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    # The compiler refuses a Function that is given one tensor twice.
    return [a.view_as(a) if torch.is_tensor(a) and any(a is b for b in args[:i]) else a for i, a in enumerate(args)]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose result cannot be differentiated again: doing so raises.

    Stricter than torch's decorator of the same name, whose result passes for a constant where the incoming gradient is
    one, as that of ``loss.backward(create_graph=True)`` is: second derivatives would silently lose this loss.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        message = f"{type(ctx).__name__.removesuffix('Backward')} is once differentiable: use fastgen.reference instead"
        fail = torch._C._functions.DelayedError(message.encode(), 1)
        # The error node wants an input that requires grad, but must not mark the tensor that backward hands out.
        return tuple(None if t is None else fail(t.detach().requires_grad_()) for t in outputs)

    return run
