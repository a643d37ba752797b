"""The losses of ``sequence`` from hidden states and output weights: no [tokens, vocabulary] tensor is ever whole.

Rows are taken in chunks; the products are torch's (``head.py``), the row operators ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import Forward, FusedLoss, Gradients, apply
from ..core.distributed import is_dtensor
from ..core.operator import Operator
from . import operators, parallel
from .head import HeadGradients, LogitTransform, chunks_of, flat_head, linear_logits, no_autocast, wide
from .layout import Head, Layout


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
        parallel.check_sizes(arguments["slices"], arguments[f"{next(iter(self.logits.values()))}weight"])
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
        total = sum(row_bytes.values()) + (self.gradients_of_logits(arguments) if with_grad else 0) * row_bytes[first]
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

    def gradients_of_logits(self, arguments: Mapping[str, Any]) -> int:
        """How many there are at once, of a chunk."""
        return 1

    def of_logits(self, backend: str, given: Mapping[str, Any], with_grad: bool) -> Any:
        if given["slices"] is not None:
            return parallel.SLICED[self.loss.name].found(backend, given["slices"], given)
        how = {"normals": None, "scale": None, "reduction": "none", "with_grad": with_grad}
        return self.loss.operator.choose(backend, given, **how)

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


class Distillation(LinearLoss):
    """A divergence, and `cross_entropy_weight` times the cross-entropy of the labels from the same logits.

    The operator has it where both have one softmax, of rows that are whole. Elsewhere it is one of its own here, and
    the stats end with the token's.
    """

    def apart(self, arguments: Mapping[str, Any]) -> bool:
        """Whether there is a cross-entropy that the operator does not have."""
        if arguments["cross_entropy_weight"] == 0:
            return False
        student, teacher = (
            arguments[name].shape[-1] if name in arguments else arguments[f"{prefix}weight"].shape[0]
            for name, prefix in self.logits.items()
        )
        return not operators.has_cross_entropy(
            arguments["temperature"], student, teacher, arguments["slices"] is not None
        )

    def gradients_of_logits(self, arguments: Mapping[str, Any]) -> int:
        return 2 if self.apart(arguments) else 1

    def of_logits(self, backend: str, given: Mapping[str, Any], with_grad: bool) -> Any:
        if not self.apart(given):
            return super().of_logits(backend, given, with_grad)
        weight, tokens = given["cross_entropy_weight"], self._of_tokens(given)
        results = super().of_logits(backend, {**given, "cross_entropy_weight": 0.0}, with_grad)
        if given["slices"] is not None:
            found = parallel.token_logprob.found(backend, given["slices"], tokens)
        else:
            found = operators.token_logprob.operator.choose(backend, tokens)
        entropy = -found.logprob
        if with_grad:
            of_rows = results.stats.new_full(entropy.shape, -weight)
            results.grad_student.add_(self._token_gradient(backend, given, of_rows, found.stats))
        stats = torch.cat([results.stats, found.stats.to(results.stats.dtype)])
        return results._replace(loss=results.loss + weight * entropy, cross_entropy=entropy, stats=stats)

    def gradient(self, backend: str, given: Mapping[str, Any], grad: Tensor, stats: Tensor) -> Tensor:
        if not self.apart(given):
            return super().gradient(backend, given, grad, stats)
        plain = {**given, "cross_entropy_weight": 0.0}
        found = super().gradient(backend, plain, grad, stats[:-2])
        of_rows = -given["cross_entropy_weight"] * grad
        return found.add_(self._token_gradient(backend, given, of_rows, stats[-2:]))

    def _of_tokens(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `token_logprob`: a cross-entropy has no temperature."""
        name = next(iter(self.logits))
        return {
            "logits": given[name],
            "tokens": given["labels"],
            "temperature": 1.0,
            "ignore_index": given["ignore_index"],
        }

    def _token_gradient(self, backend: str, given: Mapping[str, Any], grad: Tensor, stats: Tensor) -> Tensor:
        arguments = {**self._of_tokens(given), "grad": grad, "stats": stats, "elsewhere": False}
        if given["slices"] is not None:
            return parallel.token_logprob.of_slice(backend, given["slices"], arguments)
        found = operators.token_logprob_backward.choose(backend, arguments)
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
generalized_jsd = Distillation(
    operators.jsd_and_cross_entropy, {"student": "student_", "teacher": "teacher_"}, ("labels", "weight")
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
    results = [found.view(rows) if reduction == "none" else found, *(t.view((*t.shape[:-1], *rows)) for t in others)]
    if layout is None:
        return results
    sums = reduction == "sum"
    return [
        layout.total(t) if sums and i == 0 else layout.rows(t, shape, stacked=t.dim() > len(shape))
        for i, t in enumerate(results)
    ]
