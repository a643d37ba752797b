"""What autograd Functions share: arguments that are told apart, backwards that cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def apart(*args: Any) -> tuple[Any, ...]:
    """A Function's arguments; while compiling, each tensor by a view of its own, as torch.compile takes none twice."""
    if not torch.compiler.is_compiling():
        return args
    return tuple(a.view_as(a) if isinstance(a, Tensor) else a for a in args)


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
        fail = torch._C._functions.DelayedError(
            b"this loss is once differentiable: for second derivatives use fastgen.use_backend('reference')", 1
        )
        # The error node wants an input that requires grad, but must not mark the tensor that backward hands out.
        return tuple(None if t is None else fail(t.detach().requires_grad_()) for t in outputs)

    return run
