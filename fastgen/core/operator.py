"""Operators, declared once.

A declaration is a function whose annotations give every argument and every result of an operator a name, a type and,
where it is a tensor, a *role*: a stream of rows, one number a row, one a group of rows, or something that belongs to
the whole batch. The schema, the shapes of the results, the encoding of options, the launcher of the Triton kernel, the
sharding rule and what a backward pass keeps follow from that, by name::

    class Outputs(NamedTuple):
        loss: Loss
        slope: PerRow
        grad_pred: Gradient

    @operator
    def some_loss(
        pred: Stream, target: Stream, weight: PerRow | None, kind: Literal["l2", "l1"], reduction: Reduction,
        with_grad: bool,
    ) -> Outputs:
        "What it computes."

An operator has one schema in two namespaces: ``torch.ops.fastgen`` holds the compiled kernels (CPU and CUDA) and
``torch.ops.fastgen_triton`` the Triton ones. Options that are one of a few words travel as integers, their position in
the annotation: torch's stable ABI leaks each string that an operator is called with.
"""

from __future__ import annotations

import enum
import functools
import importlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from torch import Tensor
from torch import library as torch_library

from ..triton_kernels.layout import arithmetic_dtype, new_output


class Role(enum.Enum):
    """What a tensor is to an operator that works row by row."""

    STREAM = "a row each, [B, ...]"
    WRITTEN = "a stream that the operator writes to"
    LOGITS = "a row each, [..., V]"
    ROW = "one number a row"
    ROW_OR_ALL = "one number a row, or one for all"
    STACKED = "several numbers a row, [n, rows]"
    GROUP = "one number a group of rows"
    STACKED_GROUP = "several numbers a group of rows, [n, groups]"
    WHOLE = "of the whole batch"
    LOSS = "one number a group of rows, or their sum"
    GRADIENT = "a row each, like the streams; empty where the option `with_grad` is off"
    OUTPUT = "a row each, like the streams"
    WIDE_OUTPUT = "a row each, like the streams, in the dtype of the arithmetic"


Stream = Annotated[Tensor, Role.STREAM]
Written = Annotated[Tensor, Role.WRITTEN]
Logits = Annotated[Tensor, Role.LOGITS]
PerRow = Annotated[Tensor, Role.ROW]
PerRowOrAll = Annotated[Tensor, Role.ROW_OR_ALL]
PerGroup = Annotated[Tensor, Role.GROUP]
Whole = Annotated[Tensor, Role.WHOLE]
Loss = Annotated[Tensor, Role.LOSS]
Gradient = Annotated[Tensor, Role.GRADIENT]  # has the dtype of the first stream, or that of an argument `dtype`
Output = Annotated[Tensor, Role.OUTPUT]
WideOutput = Annotated[Tensor, Role.WIDE_OUTPUT]

# The order is the kernels': csrc/runtime/options.h.
Reduction = Literal["mean", "sum", "none", "sum_per_batch"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]

_TYPES = {bool: "bool", int: "int", float: "float", torch.dtype: "ScalarType"}

# The namespaces are called after the package, so that two copies under two names can share a process.
PACKAGE = __name__.partition(".")[0]
NATIVE, TRITON = PACKAGE, f"{PACKAGE}_triton"
libraries = {name: torch_library.Library(name, "DEF") for name in (NATIVE, TRITON)}


@dataclass(frozen=True)
class Result:
    """One tensor that an operator returns."""

    role: Role
    count: int | None = None  # of stacked numbers


@dataclass(frozen=True)
class Operator:
    """One operator. Calling it takes a backend and every declared argument by name."""

    name: str
    family: str
    arguments: Mapping[str, Role | None]  # None: an option, no tensor
    results: Mapping[str, Result]
    order: tuple[tuple[str, Mapping[str, int] | None], ...]  # the arguments, and the codes of those that are words
    paired: bool  # groups are made of rows half a batch apart or, by an option `interleaved`, of neighbours
    outputs: Callable[..., Any] | None  # the NamedTuple of its results, where there are several
    native: Callable[..., Any] = field(repr=False)
    triton: Callable[..., Any] = field(repr=False)

    def __call__(self, backend: str, **arguments: Any) -> Any:
        return self.run(backend, arguments)

    def of(self, backend: str) -> Callable[..., Any]:
        """The operator on this backend."""
        return functools.partial(self, backend)

    def run(self, backend: str, arguments: Mapping[str, Any]) -> Any:
        """The operator's results; `arguments` are all that it declares, by name."""
        if len(arguments) != len(self.arguments):
            raise TypeError(f"{self.name} takes {', '.join(self.arguments)}; got {', '.join(arguments)}")
        values = [arguments[name] if codes is None else codes[arguments[name]] for name, codes in self.order]
        results = (self.native if backend == "native" else self.triton)(*values)
        return results if self.outputs is None else self.outputs(*results)

    def choose(self, backend: str, given: Mapping[str, Any], **changed: Any) -> Any:
        """Its results on what of `given` it declares; what is `changed` goes before."""
        return self.run(backend, {n: changed[n] if n in changed else given[n] for n in self.arguments})

    def bind(self, *values: Any, **named: Any) -> dict[str, Any]:
        """Names the arguments of a call of the schema, and turns integers back into the words that they stand for."""
        bound = dict(zip(self.arguments, values, strict=False)) | named
        for name, codes in self.order:
            if codes is not None:
                bound[name] = list(codes)[bound[name]]
        return bound


operators: dict[str, Operator] = {}


def operator(declaration: Callable[..., Any] | None = None, *, paired: bool = False) -> Any:
    """Defines the operator that a function declares.

    The function's body gives the results' shapes, as tensors; where it returns nothing, they follow from the roles. The
    Triton implementation is the function of the same name, with the same arguments, in
    ``fastgen.triton_kernels.<family>``, where the family is the declaring module's. It is imported when first called:
    importing Triton is slow. A parameter annotated with a NamedTuple stands for the fields of it, which operators may
    have in common; the body is then empty.

    Args:
        paired: whether row i and row i + B/2 form a group; with an option `interleaved` that is on, rows 2i and 2i + 1.
    """
    if declaration is None:
        return functools.partial(operator, paired=paired)
    name = declaration.__name__
    family = declaration.__module__.removesuffix(".operators").rpartition(".")[2]
    hints = typing.get_type_hints(declaration, include_extras=True)
    returned = hints.pop("return")
    outputs = returned if hasattr(returned, "_fields") else None
    if outputs is not None:
        results = {n: _result(t) for n, t in typing.get_type_hints(outputs, include_extras=True).items()}
    else:
        results = {} if returned is type(None) else {"": _result(returned)}
    shared = {n: typing.get_type_hints(t, include_extras=True) for n, t in hints.items() if hasattr(t, "_fields")}
    flat = [item for n, t in hints.items() for item in shared.get(n, {n: t}).items()]
    parameters = {n: _parameter(n, t) for n, t in flat}
    shapes = None if shared else declaration
    made = " ".join(["(" + ", ".join(f"Tensor {n}".strip() for n in results) + ")"]) if outputs else None
    result_schema = made or ("Tensor" if results else "()")
    defined: Operator
    schema = f"{name}({', '.join(text for text, _, _ in parameters.values())}) -> {result_schema}"
    for namespace, library in libraries.items():
        library.define(schema)
        # Derivatives are those of the Functions around operators. Without this, results of inputs that get no
        # gradient, such as targets and weights, would pass for differentiable, and torch would warn in backward.
        library.impl(name, torch_library.fallthrough_kernel, "Autograd")
        # What is_grads_batched=True and jacobian(vectorize=True) run a backward pass under.
        library.impl(name, _refuse_batches, "Batched")
        torch_library.register_fake(f"{namespace}::{name}", lambda *a, **k: _shapes(defined, shapes, a, k), lib=library)

    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"..triton_kernels.{family}", __package__), name)

    # On CPU tensors too: that is how the kernels are tested under Triton's interpreter.
    libraries[TRITON].impl(name, lambda *values: launcher()(**defined.bind(*values)), "CompositeExplicitAutograd")
    defined = Operator(
        name,
        family,
        {n: role for n, (_, role, _) in parameters.items()},
        results,
        tuple((n, codes or None) for n, (_, _, codes) in parameters.items()),
        paired,
        outputs,
        *(getattr(getattr(torch.ops, namespace), name).default for namespace in libraries),
    )
    operators[name] = defined
    return defined


def _role(annotation: Any) -> tuple[Role | None, int | None, bool]:
    """The role of an annotated tensor, how many numbers are stacked in it, and whether it may be None."""
    optional = type(None) in get_args(annotation) and get_origin(annotation) is not Annotated
    if optional:
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is not Annotated:
        return None, None, optional
    _, role, *count = get_args(annotation)
    return role, count[0] if count else None, optional


def _result(annotation: Any) -> Result:
    role, count, _ = _role(annotation)
    if role is None:
        raise TypeError(f"a result of an operator needs a role, got {annotation}")
    return Result(role, count)


def _parameter(name: str, annotation: Any) -> tuple[str, Role | None, dict[str, int]]:
    """An argument's part of the schema, its role, and the codes of its words."""
    role, _, optional = _role(annotation)
    if role is not None:
        kind = "Tensor(a!)" if role is Role.WRITTEN else "Tensor?" if optional else "Tensor"
        return f"{kind} {name}", role, {}
    if get_origin(annotation) is Literal:
        return f"int {name}", None, {word: code for code, word in enumerate(get_args(annotation))}
    if annotation not in _TYPES:
        raise TypeError(f"argument {name} of an operator needs a role or one of the types {_TYPES}, got {annotation}")
    return f"{_TYPES[annotation]} {name}", None, {}


def _refuse_batches(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        f"{PACKAGE}'s kernels do not run on batched gradients (is_grads_batched=True, jacobian(vectorize=True)): use"
        f" {PACKAGE}.use_backend('reference') for the forward pass, or torch.func, which does so by itself"
    )


def _shapes(op: Operator, declaration: Callable[..., Any] | None, values: Any, named: Any) -> Any:
    """The results of an operator on fake tensors."""
    bound = op.bind(*values, **named)
    made = None if declaration is None else declaration(**bound)
    if made is not None or not op.results:
        return made
    streams = [
        t for n, t in bound.items() if op.arguments[n] in (Role.STREAM, Role.WRITTEN, Role.LOGITS) and t is not None
    ]
    first, of_logits = streams[0], Role.LOGITS in op.arguments.values()
    rows = first.shape[:-1] if of_logits else first.shape[:1]
    dtype = bound.get("dtype", first.dtype)
    wide = torch.float64 if dtype == torch.float64 else arithmetic_dtype(*streams)
    groups = rows
    if not of_logits:
        of_group = [t for n, t in bound.items() if op.arguments[n] is Role.GROUP and t is not None]
        together = 2 if op.paired else bound.get("group_rows", 1)
        groups = of_group[0].shape[:1] if of_group else (rows[0] // together,)

    def result(r: Result) -> Tensor:
        if r.role in (Role.GRADIENT, Role.OUTPUT):
            if not bound.get("with_grad", True):
                return first.new_empty((0,), dtype=dtype)
            if of_logits:
                return first.new_empty(first.shape)
            return new_output(*streams, dtype=dtype)
        if r.role is Role.WIDE_OUTPUT:
            return new_output(*streams, dtype=wide)
        summed = r.role is Role.LOSS and bound.get("reduction", "sum") != "none"
        shape = () if summed else rows if r.role in (Role.ROW, Role.STACKED) else groups
        return first.new_empty(shape if r.count is None else (r.count, *shape), dtype=wide)

    made = [result(r) for r in op.results.values()]
    return tuple(made) if op.outputs is not None else made[0]
