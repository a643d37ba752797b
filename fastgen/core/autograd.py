"""The one way in which a loss becomes differentiable.

A loss writes its gradient in the forward pass, while the rows are on chip. The first backward takes that buffer over
and scales it in place; a later one (``retain_graph``), or one whose buffer was not kept, makes the gradient again from
the inputs and a few saved numbers a row. Kernels have no second derivative: asking for one is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .gradient import scale_gradient_
from .operator import PACKAGE, Operator, Role

Gradients = tuple[Tensor | None, ...]


class Forward(NamedTuple):
    """What a forward pass leaves."""

    results: tuple[Tensor, ...]  # the first is differentiable
    named: Mapping[str, Any]  # arguments and results, of which the backward pass keeps what it names
    gradients: Gradients  # of the inputs, where they were written already
    scale: Tensor | None = None  # 0-dimensional: what these still lack


class Differentiable(Protocol):
    """What :func:`apply` differentiates."""

    # Names of what the backward pass needs.
    @property
    def tensors(self) -> Sequence[str]: ...
    @property
    def options(self) -> Sequence[str]: ...

    def forward(self, backend: str, keep: bool, needed: tuple[bool, ...], arguments: dict[str, Any]) -> Forward:
        """The forward pass, which writes the gradients if `keep`."""
        ...

    def backward(self, backend: str, needed: tuple[bool, ...], saved: Mapping[str, Any], grad: Tensor) -> Gradients:
        """The gradients from what was saved and the gradient of the first result."""
        ...


def can_keep(*inputs: Tensor | None) -> bool:
    """Whether the forward pass may write the gradients of these inputs.

    In float16 they would underflow before a loss scale reaches them; a subclass has rules of its own; and a compiled
    backward cannot take a buffer over.
    """
    if torch.compiler.is_compiling():
        return False
    for t in inputs:
        if t is not None and (t.dtype == torch.float16 or type(t) not in (Tensor, torch.nn.Parameter)):
            return False
    return True


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd wants to hear of a function of these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator would take several times as long
            if t is not None and t.requires_grad:
                return True
    return False


def apart(*args: Any) -> tuple[Any, ...]:
    """A Function's arguments; while compiling, each tensor by a view of its own, as torch.compile takes none twice."""
    if not torch.compiler.is_compiling():
        return args
    return tuple(a.view_as(a) if isinstance(a, Tensor) else a for a in args)


def apply(
    loss: Differentiable, backend: str, keep: bool, inputs: tuple[Tensor | None, ...], arguments: dict[str, Any]
) -> Any:
    """The results of `loss`, of which the first has a gradient for `inputs`; `arguments` are its forward pass's.

    The forward pass writes the gradients if `keep`, where there are any to write.
    """
    if not needs_grad(*inputs):
        results = loss.forward(backend, False, (False,) * len(inputs), arguments).results
    elif torch.compiler.is_compiling():
        arguments = {name: v.detach() if isinstance(v, Tensor) else v for name, v in arguments.items()}
        results = _Fused.apply(loss, backend, keep, arguments, *apart(*inputs))
    else:
        results = _Fused.apply(loss, backend, keep, arguments, *inputs)
    return results[0] if len(results) == 1 else results


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Differentiable, backend: str, keep: bool, arguments: dict[str, Any], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        results, named, gradients, scale = loss.forward(backend, keep, ctx.needs_input_grad[4:], arguments)
        tensors = [named[name] for name in loss.tensors]
        compiled = torch.compiler.is_compiling() and any(g is not None for g in gradients)
        # The inputs are kept for second derivatives alone, which have to reach them to be refused.
        ctx.save_for_backward(*inputs, *tensors, scale, *(gradients if compiled else ()))
        ctx.gradients = None if compiled else tuple(map(_like, gradients, inputs))
        ctx.scaled = scale is not None
        ctx.options = {name: named[name] for name in loss.options}
        ctx.loss, ctx.backend, ctx.compiled = loss, backend, compiled
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        if len(results) > 1:
            ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Any:
        count = len(ctx.dtypes)
        if grad is None:  # the loss was not used
            return (None,) * (4 + count)
        if not torch.is_grad_enabled():
            return None, None, None, None, *_gradients(ctx, grad)
        with torch.no_grad():
            gradients = _gradients(ctx, grad)
        return None, None, None, None, *once_differentiable(gradients, (*ctx.saved_tensors[:count], grad))


def _gradients(ctx: Any, grad: Tensor) -> Gradients:
    gradients, ctx.gradients = ctx.gradients, None
    count, names = len(ctx.dtypes), ctx.loss.tensors
    if ctx.compiled:
        scale, *kept = ctx.saved_tensors[count + len(names) :]
        factor = grad if scale is None else grad * scale
        gradients = [None if g is None else g * factor for g in kept]
    elif gradients is not None and any(g is not None for g in gradients):
        scale = ctx.saved_tensors[count + len(names)] if ctx.scaled else None
        factor = grad if scale is None else grad * scale
        for g in gradients:
            if g is not None:
                scale_gradient_(ctx.backend, grad=g, scale=factor)
    else:
        tensors = ctx.saved_tensors  # unpacked once: hooks may have moved them elsewhere
        saved = dict(zip(names, tensors[count:], strict=False)) | ctx.options
        gradients = ctx.loss.backward(ctx.backend, ctx.needs_input_grad[4:], saved, grad)
        gradients = tuple(map(_like, gradients, tensors))
    return tuple(
        [g if g is None or g.dtype is dtype else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
    )


def _like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The gradient as that of `x`, of which the operator may have seen another view of the same memory."""
    return grad if grad is None or x is None or grad.shape == x.shape else grad.as_strided(x.shape, x.stride())


def once_differentiable(gradients: Gradients, sources: tuple[Tensor | None, ...]) -> Gradients:
    """The gradients as functions of `sources` that cannot be differentiated: trying to raises.

    torch's decorator of that name lets the result pass for a constant where the incoming gradient is one, as that of
    ``loss.backward(create_graph=True)`` is, and second derivatives would silently lose this loss.
    """
    edges = [t for t in sources if t is not None and t.requires_grad]
    if not edges:
        return gradients
    fail = torch._C._functions.DelayedError(
        f"this loss is once differentiable: for second derivatives use {PACKAGE}.use_backend('reference')".encode(),
        1 + len(edges),
    )
    return tuple(None if g is None else fail(g, *edges)[0] for g in gradients)


class FusedLoss:
    """A loss whose operator writes the gradient of one of its arguments, and another operator makes it again.

    What the backward pass keeps follows from the names of the second operator's arguments: those that it shares with
    the first one's arguments or results, and constants. The one that is left is the gradient of each row's number.

    Args:
        forward: the loss's operator.
        backward: the operator that makes the gradient again.
        wrt: the argument that has a gradient; None where the operator does not read what has one.
        slope: what a row's number is multiplied by in the loss: the name of a result or an argument, or a number.
        returns: the results that the caller sees; the first is the loss.
        group_rows: the option that says how many consecutive rows share a term.
        unused: arguments that a call's backward does not need after all.
        constants: options of `backward`.
    """

    def __init__(
        self,
        forward: Operator,
        backward: Operator | Callable[..., Tensor],
        wrt: str | None = None,
        *,
        slope: str | float = 1.0,
        returns: tuple[str, ...] = ("loss",),
        group_rows: str | None = None,
        unused: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None,
        **constants: Any,
    ) -> None:
        self.operator, self.gradient = forward, backward
        self.wrt: str = wrt or ""
        self.slope, self.returns, self.group_rows, self.unused = slope, returns, group_rows, unused
        self.constants = constants
        self.name = forward.name
        given = {*forward.arguments, *forward.results, *constants}
        wanted = list(backward.arguments if isinstance(backward, Operator) else inspect.signature(backward).parameters)
        (self.row_grad,) = (name for name in wanted if name not in given)
        self.shared = [name for name in wanted if name not in constants and name != self.row_grad]
        grouped = "interleaved" if "interleaved" in forward.arguments else group_rows
        kept = dict.fromkeys(self.shared + [n for n in (slope, grouped) if isinstance(n, str)])
        roles = {**forward.arguments, **{n: r.role for n, r in forward.results.items()}}
        self.tensors = tuple(n for n in kept if roles[n] is not None)
        self.options = tuple(n for n in kept if roles[n] is None)
        self.buffer = next((n for n, r in forward.results.items() if r.role is Role.GRADIENT), None)

    def returned(self, results: Any) -> tuple[Tensor, ...]:
        """What the caller sees of the operator's results."""
        return tuple([getattr(results, name) for name in self.returns])

    def __call__(self, backend: str, source: Tensor | None = None, /, **arguments: Any) -> Any:
        """The results named by `returns`; `source` has the gradient where that is not the argument `wrt` itself.

        `arguments` are the operator's but `with_grad`.
        """
        x = arguments[self.wrt] if source is None else source
        if not needs_grad(x):
            results = self._results(backend, False, arguments)
            if self.operator.outputs is None:
                return results
            returned = self.returned(results)
            return returned[0] if len(returned) == 1 else returned
        keep = self.buffer is not None and arguments.get("reduction") != "none" and can_keep(x)
        return apply(self, backend, keep, (x,), arguments)

    def forward(self, backend: str, keep: bool, needed: tuple[bool, ...], arguments: dict[str, Any]) -> Forward:
        results = self._results(backend, keep, arguments)
        if self.operator.outputs is None:
            return Forward((results,), arguments, (None,))
        named = arguments | dict(zip(self.operator.results, results, strict=True))
        if self.unused is not None:
            named.update(dict.fromkeys(self.unused(arguments)))
        return Forward(self.returned(results), named, (named[self.buffer] if keep and self.buffer else None,))

    def _results(self, backend: str, keep: bool, arguments: dict[str, Any]) -> Any:
        if self.buffer is not None:
            arguments["with_grad"] = keep
        return self.operator.run(backend, arguments)

    def backward(self, backend: str, needed: tuple[bool, ...], saved: Mapping[str, Any], grad: Tensor) -> Gradients:
        arguments = {name: saved[name] for name in self.shared} | self.constants
        arguments[self.row_grad] = self.of_rows(saved, grad)
        if isinstance(self.gradient, Operator):
            return (self.gradient.run(backend, arguments),)
        return (self.gradient(**arguments),)

    def of_rows(self, saved: Mapping[str, Any], grad: Tensor) -> Tensor:
        """The gradient of each row's number."""
        if grad.dim() == 1:  # one number a group
            if self.operator.paired:
                neighbours = saved.get("interleaved", False)
                grad = _repeated(grad, 2) if neighbours else grad.expand(2, -1).reshape(-1)
            elif self.group_rows is not None and saved[self.group_rows] > 1:
                grad = _repeated(grad, saved[self.group_rows])
        slope = saved[self.slope] if isinstance(self.slope, str) else self.slope
        if slope is not None and not (isinstance(slope, float) and slope == 1.0):
            grad = grad * slope
        if grad.dim() == 0:
            of_logits = self.operator.arguments[self.wrt] is Role.LOGITS
            grad = grad.expand(saved[self.wrt].shape[: -1 if of_logits else 1])
        return grad


def _repeated(grad: Tensor, times: int) -> Tensor:
    """Each element so many times in a row."""
    # A copy, then a view: the strides of a DTensor and of its local part differ where the gradient is an expanded one,
    # and reshape, which goes by the former, may take for a view what is none.
    return grad.unsqueeze(1).expand(-1, times).contiguous().view(-1)


def differentiable(
    backward: Operator | Callable[..., Tensor], wrt: str | None = None, **options: Any
) -> Callable[[Operator], FusedLoss]:
    """A decorator of operators: :class:`FusedLoss` of the operator below it, with these arguments."""
    return lambda forward: FusedLoss(forward, backward, wrt, **options)
