"""The losses of ``sequence`` from hidden states and output weights: no [tokens, vocabulary] tensor is ever whole.

Rows are taken in chunks whose logits, and their gradient, stay within a budget of bytes; the products are torch's, the
row operators ours. Logits of half-precision operands are float32: what bfloat16 rounds off a logit is more than the
difference between a student and a teacher who are close. Gradients accumulate over the chunks in float32 (float64 for
float64), are scaled there by what comes in, and are then rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from ..core.autograd import Forward, FusedLoss, Gradients, apply
from ..core.distributed import is_dtensor
from ..core.operator import Operator
from . import operators, parallel
from .layout import Head, Layout, Slices, ready, summed_later
from .reference import autocast_head

# On an H200 chunks of 96 MiB took five times as long as what other libraries do in larger ones: a thousand rows of a
# large vocabulary, and large parts of a gradient, keep a GPU's matrix units busy.
CHUNK_BYTES = {"cpu": 96 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30


class LogitTransform(NamedTuple):
    """What a model does with its head's output: ``softcap tanh(scale z / softcap)``, or ``scale z`` without a cap."""

    scale: float
    softcap: float | None

    def apply_(self, z: Tensor) -> Tensor:
        z = z if self.scale == 1 else z.mul_(self.scale)
        # Not times scale / softcap, whose rounding would scale all logits alike: a temperature that nobody asked for.
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def chain_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of z from that of the logits, which it overwrites as well: who needs it has used them."""
        if self.softcap is not None:
            grad.mul_(logits.div_(self.softcap).square_().neg_().add_(1))
        return grad if self.scale == 1 else grad.mul_(self.scale)


def flat_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """A linear layer and its input as rows, in the dtype that autocast gives them."""
    return Head(*autocast_head(hidden.reshape(-1, hidden.shape[-1]), weight, bias))


def chunk_bytes(max_chunk_bytes: int | None, hidden: Tensor) -> int:
    """The budget that was asked for, or that of the device."""
    if max_chunk_bytes is None:
        return CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES_ELSEWHERE)
    return checks.positive_int("max_chunk_bytes", max_chunk_bytes)


def no_autocast(t: Tensor) -> torch.autocast:
    """Around all products: autocast, on around a ``backward()`` too, would round float32 operands to half precision."""
    return torch.autocast(t.device.type, enabled=False)


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def chunks(rows: int, row_bytes: int, max_bytes: int) -> Iterator[slice]:
    """As many rows at a time as fit, and as evenly as can be: the last chunk is no splinter."""
    count = -(-rows // max(1, max_bytes // row_bytes))
    size = -(-rows // max(1, count)) or 1
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))  # one empty chunk of no rows


def chunks_of(head: Head, logits_bytes: int, max_bytes: int) -> Iterator[slice]:
    """Chunks of a head's rows, of which each has `logits_bytes` and a copy of its hidden state."""
    hidden = head.hidden
    return chunks(hidden.shape[0], logits_bytes + hidden.shape[1] * wide(hidden).itemsize, max_bytes)


def has_mixed_products(device: torch.device) -> bool:
    """Whether torch multiplies half-precision matrices into a float32 one there: tensor cores sum in float32 anyway."""
    return device.type == "cuda"


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` of two matrices of one dtype, summed and returned in `dtype`, which is theirs or a wider one.

    Devices without mixed products get copies, which are exact; who calls keeps them small (:func:`blocks`).
    """
    if a.dtype == dtype:
        return torch.mm(a, b)
    if has_mixed_products(a.device):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> None:
    """``out += factor a b``."""
    if factor is not None:
        out.addcmul_(product(a, b, out.dtype), factor)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(product(a, b, out.dtype))


def blocks(weight: Tensor, rows: int, dtype: torch.dtype, max_bytes: int, whole: bool) -> Iterator[slice]:
    """The vocabulary: all of it if `whole`, else as much at a time as fits into `max_bytes` in `dtype`, of the weight
    [V, H] and of logits [rows, V] together."""
    size, width = weight.shape
    return iter((slice(None),)) if whole else chunks(size, (width + rows) * dtype.itemsize, max_bytes)


def linear_logits(head: Head, rows: slice, dtype: torch.dtype, max_bytes: int) -> Tensor:
    """``hidden weightᵀ + bias`` in `dtype`, with copies of at most `max_bytes`."""
    hidden, weight, bias = head.hidden[rows], head.weight, head.bias
    if dtype == hidden.dtype:
        return F.linear(hidden, weight, bias)
    if has_mixed_products(weight.device):
        logits = product(hidden, weight.t(), dtype)
    else:
        logits = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype)
        for block in blocks(weight, hidden.shape[0], dtype, max_bytes, whole=False):
            logits[:, block] = product(hidden, weight[block].t(), dtype)
    return logits if bias is None else logits.add_(bias)


def narrowed(grad_logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A gradient of logits as the operand of products with a head of `dtype`, and what to multiply these by.

    The products need one dtype, and in half precision they are several times as fast and a chunk's gradient is half as
    large. Rounding it is as harmless as rounding logits is not: it changes each element by at most one part in 2⁸
    (2¹¹ in float16), independently, where rounding a logit changes the difference from the teacher's by an amount that
    does not shrink with that difference. The errors average out over a product's sum, so that they add to a gradient
    about what rounding the gradient itself to `dtype` does.

    float16 has no exponents for most elements of a softmax: there the largest element of the chunk becomes almost
    2¹⁵. Its power of two is exact, and is taken out again in float32. One factor does for all rows: what underflows
    beside the largest element would do so in the float16 gradients of the head as well.
    """
    if grad_logits.dtype == dtype:
        return grad_logits, None
    if dtype != torch.float16:
        return grad_logits.to(dtype), None
    largest = torch.linalg.vector_norm(grad_logits, torch.inf, 1)
    # A row that is not finite has no say in the others' factor.
    largest = torch.where(largest < torch.inf, largest, 0).amax()
    exponent = torch.frexp(largest).exponent.clamp(min=-100) - 15  # its negative is an exponent of float32 too
    return grad_logits.mul_(torch.ldexp(torch.ones_like(largest), -exponent)).to(dtype), torch.ldexp(
        torch.ones_like(largest), exponent
    )


class HeadGradients:
    """Gradients of ``logits = hidden weightᵀ + bias``, accumulated chunk by chunk in float32 (float64 for float64), for
    whose range and precision no scale is wrong; None for what needs none."""

    def __init__(self, head: Head, needed: tuple[bool, ...], max_bytes: int, slices: Slices | None) -> None:
        hidden, weight, bias = head
        self.inputs, self.dtype, self.max_bytes = (hidden, weight), wide(weight), max_bytes
        self.slices = slices
        self.sums: list[tuple[slice, Tensor]] = []  # on their way: other ranks' columns make gradients of hidden too
        self.hidden = hidden.new_zeros(hidden.shape, dtype=self.dtype) if needed[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=self.dtype) if needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=self.dtype) if needed[2] and bias is not None else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """Overwrites `grad_logits`."""
        hidden, weight = self.inputs
        count = grad_logits.shape[0]
        if count == 0:
            return
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.dtype))
        grad, factor = narrowed(grad_logits, weight.dtype)
        one_dtype = weight.dtype == self.dtype
        no_copy = one_dtype or has_mixed_products(weight.device)
        if self.hidden is not None:
            for block in blocks(weight, count, self.dtype, self.max_bytes, whole=no_copy):
                add_product(self.hidden[rows], grad[:, block], weight[block], factor)
            if self.slices is not None:
                self.sums.append((rows, summed_later(self.hidden[rows], self.slices)))
        if self.weight is not None:  # a mixed product cannot add to what is there: it makes a part of the gradient
            for block in blocks(weight, count, self.dtype, self.max_bytes, whole=one_dtype):
                add_product(self.weight[block], grad[:, block].t(), hidden[rows], factor)

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        for rows, total in self.sums:
            assert self.hidden is not None
            self.hidden[rows] = ready(total)
        return self.hidden, self.weight, self.bias


class LinearLoss:
    """A loss of rows of logits, from the heads that make them.

    Each row's number (reduction ``"none"``), where the backward pass computes each chunk's logits once more; or their
    sum, whose gradients are made while a chunk's logits are there.

    Args:
        loss: the operator over logits; the first of `logits` has a gradient.
        logits: the operator's arguments that heads make, each by the prefix of the head's tensors.
        per_row: its arguments that have one entry a row, or a row of several.
    """

    def __init__(self, loss: FusedLoss, logits: Mapping[str, str], per_row: tuple[str, ...]) -> None:
        self.loss, self.logits, self.per_row = loss, logits, per_row
        declared = loss.operator.arguments
        self.settings = tuple(n for n, role in declared.items() if role is None and n not in ("reduction", "with_grad"))
        # What the operator's row numbers are not times already.
        self.weighs = "weight" in per_row and "weight" not in declared
        heads = [f"{prefix}{name}" for prefix in logits.values() for name in Head._fields]
        self.tensors = (*heads, *per_row, "scale", "stats")
        self.options = (*self.settings, "reduction", "transform", "round_logits", "max_chunk_bytes", "slices")

    def forward(self, backend: str, keep: bool, needed: tuple[bool, ...], arguments: dict[str, Any]) -> Forward:
        summed, weight = arguments["reduction"] == "sum", arguments["weight"] if self.weighs else None
        gradients = self.gradients(needed, arguments) if summed and any(needed) else None
        found: list[tuple[Tensor, ...]] = []
        for rows, given in self.chunks(arguments, gradients is not None):
            # Columns of several ranks have a gradient when all have told each other their sums.
            at_once = gradients is not None and weight is None and arguments["slices"] is None
            entropy = (self.entropy(backend, given),) if arguments.get("entropy") else ()
            results = self.of_logits(backend, given, at_once)
            grad_logits = getattr(results, self.loss.buffer) if at_once and self.loss.buffer else None
            if gradients is not None and not at_once:
                stats = results.stats
                of_rows = stats.new_ones(stats.shape[1]) if weight is None else weight[rows].to(stats.dtype)
                grad_logits = self.gradient(backend, given, of_rows, stats)
            if grad_logits is not None:
                grad_logits = self.of_head(grad_logits, given, arguments)
            found.append((results.stats, *self.loss.returned(results), *entropy))
            given.clear()  # the logits, before anything else is made
            del results
            if gradients is not None and grad_logits is not None:
                gradients.add(rows, grad_logits)
            del grad_logits
        stats, value, *others = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
        if weight is not None:
            value = value * weight.to(value.dtype)
        value, scale = value.sum() if summed else value, arguments["scale"]
        results = (value if scale is None else value * scale, *others)
        made = gradients.all() if gradients is not None else (None,) * len(Head._fields)
        return Forward(results, arguments | {"stats": stats}, made, scale)

    def backward(self, backend: str, needed: tuple[bool, ...], saved: Mapping[str, Any], grad: Tensor) -> Gradients:
        grad = grad if saved["scale"] is None else grad * saved["scale"]
        grad = grad * saved["weight"].to(grad.dtype) if self.weighs and saved["weight"] is not None else grad
        gradients, stats = self.gradients(needed, saved), saved["stats"]
        grad = grad.expand(stats.shape[1])
        for rows, given in self.chunks(saved, True):
            grad_logits = self.gradient(backend, given, grad[rows], stats[:, rows])
            grad_logits = self.of_head(grad_logits, given, saved)
            given.clear()
            gradients.add(rows, grad_logits)
            del grad_logits
        return gradients.all()

    def head(self, arguments: Mapping[str, Any], prefix: str) -> Head:
        return Head(*(arguments[f"{prefix}{name}"] for name in Head._fields))

    def gradients(self, needed: tuple[bool, ...], arguments: Mapping[str, Any]) -> HeadGradients:
        prefix = next(iter(self.logits.values()))
        return HeadGradients(
            self.head(arguments, prefix), needed, arguments["max_chunk_bytes"] // 4, arguments["slices"]
        )

    def chunks(self, arguments: Mapping[str, Any], with_grad: bool) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Chunks of rows, and what the operator takes of each: who has it clears it when it is done with the logits."""
        heads = {name: self.head(arguments, prefix) for name, prefix in self.logits.items()}
        dtypes = {name: logits_dtype(head, arguments) for name, head in heads.items()}
        first, max_bytes, slices = next(iter(heads)), arguments["max_chunk_bytes"], arguments["slices"]
        # Ranks take the same chunks: they meet at each.
        columns = {n: head.weight.shape[0] if slices is None else slices.most for n, head in heads.items()}
        row_bytes = {name: columns[name] * dtypes[name].itemsize for name in heads}
        total = sum(row_bytes.values()) + (row_bytes[first] if with_grad else 0)
        for rows in chunks_of(heads[first], total, max_bytes):
            with no_autocast(heads[first].weight):
                given: dict[str, Any] = {
                    n: arguments["transform"][self.logits[n]].apply_(
                        linear_logits(head, rows, dtypes[n], max_bytes // 4)
                    )
                    for n, head in heads.items()
                }
                for name in self.per_row:
                    given[name] = None if arguments[name] is None else arguments[name][rows]
                given.update({name: arguments[name] for name in (*self.settings, "slices")})
                yield rows, given

    def of_logits(self, backend: str, given: Mapping[str, Any], with_grad: bool) -> Any:
        if given["slices"] is not None:
            return parallel.SLICED[self.loss.name].found(backend, given["slices"], given)
        operator, how = (
            self.loss.operator,
            {"normals": None, "scale": None, "reduction": "none", "with_grad": with_grad},
        )
        return operator.run(backend, {name: how[name] if name in how else given[name] for name in operator.arguments})

    def of_head(self, grad_logits: Tensor, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Tensor:
        """The gradient of a head's output from that of its logits. It overwrites both."""
        name, prefix = next(iter(self.logits.items()))
        transform: LogitTransform = arguments["transform"][prefix]
        return transform.chain_(grad_logits, given[name])

    def entropy(self, backend: str, given: Mapping[str, Any]) -> Tensor:
        logits, labels = given[next(iter(self.logits))], given["tokens" if "tokens" in given else "labels"]
        return parallel.entropy(backend, given["slices"], logits, labels, given["temperature"], given["ignore_index"])

    def gradient(self, backend: str, given: Mapping[str, Any], grad: Tensor, stats: Tensor) -> Tensor:
        operator, of_rows = self.loss.gradient, {"grad": grad, "stats": stats, **self.loss.constants}
        assert isinstance(operator, Operator)
        if given["slices"] is not None:
            return parallel.SLICED[self.loss.name].of_slice(backend, given["slices"], {**given, **of_rows})
        found = operator.choose(backend, given, **of_rows)
        assert isinstance(found, Tensor)
        return found


def logits_dtype(head: Head, options: Mapping[str, Any]) -> torch.dtype:
    return head.hidden.dtype if options["round_logits"] else wide(head.hidden)


def run(loss: LinearLoss, backend: str, *heads: Head, **arguments: Any) -> Any:
    """`loss` of heads, differentiable in the first one's tensors where one of them needs it."""
    for prefix, head in zip(loss.logits.values(), heads, strict=True):
        arguments.update({f"{prefix}{name}": value for name, value in head._asdict().items()})
    return apply(loss, backend, True, heads[0], arguments)


token_logprob = LinearLoss(operators.token_logprob, {"logits": "student_"}, ("tokens",))
generalized_jsd = LinearLoss(
    operators.generalized_jsd, {"student": "student_", "teacher": "teacher_"}, ("labels", "weight")
)
sparse_divergence = LinearLoss(
    operators.sparse_divergence, {"student": "student_"}, ("teacher_logprobs", "teacher_ids", "labels", "weight")
)


def valid_rows(hidden: Tensor, mask: Tensor | None, num_valid: int | None) -> tuple[Tensor | None, int | None]:
    """The mask beside `hidden`, and how many rows count where that is known on the host."""
    if num_valid is not None:
        num_valid = checks.integer("num_valid", num_valid, low=0)
    if mask is None or not isinstance(mask, Tensor) or mask.device == hidden.device or mask.device.type != "cpu":
        return mask, num_valid
    if num_valid is None and not torch.compiler.is_compiling():
        checks.mask("mask", mask, mask)
        num_valid = int(mask.expand(hidden.shape[:-1]).sum())
    return mask.to(hidden.device, non_blocking=True), num_valid


def row_weights(weight: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """The weights of rows, of which those of ignored rows may be anything."""
    if weight is None or labels is None:
        return None if weight is None else weight.detach()
    return torch.where(labels != ignore_index, weight.detach(), 0)


def run_counted(
    loss: LinearLoss,
    backend: str,
    heads: list[Head],
    per_row: dict[str, Tensor | None],
    counted: Tensor | None,
    num_valid: int | None,
    dims: int,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The results of `loss` over the rows that count, as far as it is known without a sync which ones do.

    `dims`: the leading dimensions of `per_row` that are rows.
    """
    rows = heads[0].hidden.shape[0]
    flat = {n: None if t is None else t.reshape(rows, *t.shape[dims:]) for n, t in per_row.items()}
    if counted is not None and num_valid is None and type(counted) is Tensor and counted.device.type == "cpu":
        num_valid = None if torch.compiler.is_compiling() else int(counted.sum())
    if counted is None or num_valid is None or num_valid >= rows:
        results = run(loss, backend, *heads, **flat, **options)
        return results if isinstance(results, tuple) else (results,)
    # Those that count first, in their order: the sort takes no sync, and too large a number does no harm.
    index = counted.flatten().logical_not().to(torch.uint8).argsort(stable=True)[:num_valid]
    heads = [head._replace(hidden=head.hidden.index_select(0, index)) for head in heads]
    flat = {name: None if t is None else t.index_select(0, index) for name, t in flat.items()}
    results = run(loss, backend, *heads, **flat, **options)
    value, *others = results if isinstance(results, tuple) else (results,)
    if options["reduction"] == "none":
        value = value.new_zeros(rows).index_copy(0, index, value)
    return value, *(t.new_zeros(*t.shape[:-1], rows).index_copy(-1, index, t) for t in others)


def run_divided(
    loss: LinearLoss,
    backend: str,
    layout: Layout | None,
    parts: list[Head],
    per_row: dict[str, Tensor | None],
    labels: Tensor | None,
    num_valid: int | None,
    shape: torch.Size,
    *,
    scale: Tensor | None,
    ignore_index: int,
    reduction: str,
    **options: Any,
) -> list[Tensor]:
    """``run_counted`` of a rank's parts, and its results as the rows of `shape` and their sum lie."""
    if layout is not None:
        per_row = {name: layout.local(name, t) for name, t in per_row.items()}
        labels = layout.local("labels", labels)
        scale = scale.full_tensor() if is_dtensor(scale) else scale  # type: ignore[union-attr]
    found, *others = run_counted(
        loss,
        backend,
        [flat_head(*part) for part in parts],
        per_row,
        None if labels is None else labels != ignore_index,
        num_valid,
        len(shape),
        scale=scale,
        ignore_index=ignore_index,
        reduction=reduction,
        slices=None if layout is None else layout.slices,
        **options,
    )
    rows = parts[0].hidden.shape[:-1]
    results = [found.view(rows) if reduction == "none" else found, *(t.view(*t.shape[:-1], *rows) for t in others)]
    if layout is None:
        return results
    sums = reduction == "sum"
    return [
        layout.total(t) if sums and i == 0 else layout.rows(t, shape, stacked=t.dim() > len(shape))
        for i, t in enumerate(results)
    ]
