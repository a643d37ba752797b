"""Losses of logits whose vocabulary is divided among ranks.

Three steps, of the kernels that serve whole rows: each rank finds the normalizers of its columns; from all ranks'
normalizers, the sums of its columns; from all ranks' sums, the gradient of its columns. In between ranks exchange a few
float32 numbers a row, and add them up in the order of ranks, so that a row's result is the same to the bit on all of
them. The loss is a whole one on every rank, and its gradient counts once: neither has a factor of the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import FusedLoss, Gradients
from . import operators
from .layout import Layout, Slices, gathered, local_logits, ready, summed_later
from .operators import DivergenceOutputs, SparseOutputs, TokenOutputs

Arguments = Mapping[str, Any]

ROWS: dict[str, Any] = {"scale": None, "reduction": "none", "with_grad": False}  # how rows' own numbers are asked for


def normalizers(
    backend: str, slices: Slices, given: Arguments, labels: Tensor | None, *logits: Tensor, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """m and sum of whole rows, [2 n, ...] of n tensors, and the sum over ranks of `more` [...], one collective."""
    temperature, ignore_index = given["temperature"], given["ignore_index"]
    if labels is None:
        labels = torch.full(logits[0].shape[:-1], int(ignore_index == 0), device=logits[0].device)
    settings = {"tokens": labels, "temperature": temperature, "ignore_index": ignore_index}
    parts = [operators.token_logprob.operator(backend, logits=t, **settings).stats for t in logits]
    dtype = torch.promote_types(parts[0].dtype, parts[-1].dtype)
    parts = [t.to(dtype) for t in parts]
    if more is not None:
        parts.append(more.to(dtype).unsqueeze(0))
    stacked = torch.cat(parts)
    message = stacked.flatten()
    if slices.equal:
        message = torch.cat([message, message.new_full((1,), logits[0].shape[-1])])
    every = gathered(message, slices)
    if slices.equal:
        every = _of_equal_slices(every, logits[0].shape[-1])
    every = every.view(slices.ranks, *stacked.shape)
    count = 2 * len(logits)
    largest, sums = every[:, 0:count:2], every[:, 1:count:2]
    most = largest.amax(0)
    apart = torch.where(largest == most, 0.0, (largest - most) / temperature)  # not -inf minus -inf
    total = _sum(sums * apart.exp())
    return torch.stack([most, total], 1).flatten(0, 1), _sum(every[:, count:])


def _of_equal_slices(every: Tensor, size: int) -> Tensor:
    """The messages without the sizes at their ends. Where these differ nobody knows which columns are whose."""
    same = (every[:, -1] == size).all()
    if every.device.type == "cpu" and not torch.compiler.is_compiling():
        if not same:
            raise ValueError(
                f"ranks of vocab_group have {every[:, -1].int().tolist()} columns of the vocabulary: pass as many on"
                " each, or DTensors with Shard(-1)"
            )
        return every[:, :-1]
    return torch.where(same, every[:, :-1], math.nan)


def check_sizes(slices: Slices | None, weight: Tensor) -> None:
    """Raises on a CPU where ranks have slices of other sizes of a layer: by them they cut chunks, where they meet."""
    if slices is not None and slices.equal and weight.device.type == "cpu" and not torch.compiler.is_compiling():
        _of_equal_slices(gathered(weight.new_full((1,), weight.shape[0], dtype=torch.float32), slices), weight.shape[0])


def _sum(parts: Tensor) -> Tensor:
    """Over ranks, in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _own(ids: Tensor, slices: Slices, size: int) -> tuple[Tensor, Tensor]:
    """Ids of the whole vocabulary as columns of this rank's, and which of them are."""
    local = ids - slices.first
    return local, (local >= 0) & (local < min(size, max(slices.total - slices.first, 0)))


def _token_logprob(backend: str, slices: Slices, given: Arguments) -> TokenOutputs:
    logits, tokens, temperature = given["logits"], given["tokens"], given["temperature"]
    counted = tokens != given["ignore_index"]
    local, own = _own(tokens, slices, logits.shape[-1])
    own = own & counted
    picked = logits.gather(-1, torch.where(own, local, 0).unsqueeze(-1)).squeeze(-1)
    picked = torch.where(own, picked.to(torch.promote_types(picked.dtype, torch.float32)), 0.0)
    normals, (picked,) = normalizers(backend, slices, given, tokens, logits, more=picked)
    base = torch.where(normals[0] == -math.inf, 0.0, normals[0])
    # By way of halves: the difference of two logits may be beyond all numbers where over the temperature it is not.
    logprob = (picked / 2 - base / 2) / temperature * 2 - normals[1].log()
    inside = (tokens >= 0) & (tokens < slices.total)
    logprob = torch.where(inside, logprob, math.nan)
    return TokenOutputs(torch.where(counted, logprob, 0.0), normals)


def _token_gradient(backend: str, slices: Slices, given: Arguments) -> Tensor:
    logits, tokens = given["logits"], given["tokens"]
    size = logits.shape[-1]
    local, own = _own(tokens, slices, size)
    inside = (tokens >= 0) & (tokens < slices.total) & (tokens != given["ignore_index"])
    tokens = torch.where(inside, torch.where(own, local, size), -1)
    return _tensor(
        operators.token_logprob_backward.choose(backend, given, tokens=tokens, ignore_index=-1, elsewhere=True)
    )


def _generalized_jsd(backend: str, slices: Slices, given: Arguments) -> DivergenceOutputs:
    normals, _ = normalizers(backend, slices, given, given["labels"], given["student"], given["teacher"])
    return _divergence_sums(backend, slices, given, normals)


def _divergence_sums(backend: str, slices: Slices, given: Arguments, normals: Tensor) -> DivergenceOutputs:
    given = {**given, "cross_entropy_weight": 0.0}
    own = operators.generalized_jsd.operator.choose(backend, given, normals=normals, **ROWS)
    loss, center = _sum(gathered(torch.stack([own.loss, own.stats[4]]), slices))
    stats = torch.cat([normals.to(center.dtype), center.unsqueeze(0)])
    return DivergenceOutputs(loss, own.cross_entropy, stats, own.grad_student)


def _jsd_gradient(backend: str, slices: Slices, given: Arguments) -> Tensor:
    return _tensor(operators.generalized_jsd_backward.choose(backend, given, cross_entropy_weight=0.0))


def _sparse_divergence(backend: str, slices: Slices, given: Arguments) -> SparseOutputs:
    student, ids = given["student"], given["teacher_ids"]
    local, own = _own(ids, slices, student.shape[-1])
    entries = student.gather(-1, torch.where(own, local, 0))
    entries = torch.where(own, entries.to(torch.promote_types(entries.dtype, torch.float32)), 0.0)
    entries = summed_later(entries, slices)  # of one rank's logit and zeros
    normals, _ = normalizers(backend, slices, given, given["labels"], student)
    entries = torch.where(ids < slices.total, ready(entries, slices), math.nan)
    places = torch.where(ids >= 0, torch.arange(ids.shape[-1], device=ids.device), -1)
    found: SparseOutputs = operators.sparse_divergence.operator.choose(
        backend, given, student=entries, teacher_ids=places, normals=normals, **ROWS
    )
    return found


def _sparse_gradient(backend: str, slices: Slices, given: Arguments) -> Tensor:
    ids = given["teacher_ids"]
    local, own = _own(ids, slices, given["student"].shape[-1])
    ids = torch.where(own, local, -1)
    return _tensor(operators.sparse_divergence_backward.choose(backend, given, teacher_ids=ids))


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


class SlicedLoss(FusedLoss):
    """A loss of rows, one number each, from slices of their logits.

    Args:
        whole: the loss of whole rows.
        found: the operator's results of the whole rows, the gradient aside, from what it is called with.
        slope: the gradient of a rank's columns, from what the backward operator is called with.
    """

    def __init__(
        self,
        whole: FusedLoss,
        found: Callable[[str, Slices, Arguments], Any],
        gradient: Callable[[str, Slices, Arguments], Tensor],
    ) -> None:
        super().__init__(whole.operator, whole.gradient, whole.wrt, returns=whole.returns, **whole.constants)
        self.found, self.of_slice = found, gradient
        self.buffer = None  # the gradient waits for what other ranks have found
        self.options = (*self.options, "slices")

    def _results(self, backend: str, keep: bool, arguments: dict[str, Any]) -> Any:
        return self.found(backend, arguments["slices"], arguments)

    def backward(self, backend: str, needed: tuple[bool, ...], saved: Mapping[str, Any], grad: Tensor) -> Gradients:
        arguments = {name: saved[name] for name in self.shared} | self.constants
        arguments[self.row_grad] = self.of_rows(saved, grad)
        return (self.of_slice(backend, saved["slices"], arguments),)


token_logprob = SlicedLoss(operators.token_logprob, _token_logprob, _token_gradient)
generalized_jsd = SlicedLoss(operators.generalized_jsd, _generalized_jsd, _jsd_gradient)
sparse_divergence = SlicedLoss(operators.sparse_divergence, _sparse_divergence, _sparse_gradient)

SLICED = {loss.name: loss for loss in (token_logprob, generalized_jsd, sparse_divergence)}


def entropy(
    backend: str, slices: Slices | None, logits: Tensor, labels: Tensor | None, temperature: float, ignore_index: int
) -> Tensor:
    """``operators.entropy`` of rows that may be divided."""
    if slices is None:
        return operators.entropy(backend, logits, labels, temperature, ignore_index)
    logits = logits.detach()
    column = 0.0 if slices.first < slices.total else -math.inf  # a rank without columns has one of no probability
    uniform = logits.new_full((logits.shape[-1],), column).expand(logits.shape)
    given: dict[str, Any] = {"student": logits, "teacher": uniform, "labels": labels}
    given |= {"beta": 1.0, "temperature": temperature, "ignore_index": ignore_index}
    normals, _ = normalizers(backend, slices, given, labels, logits)
    of_uniform = torch.stack([torch.zeros_like(normals[0]), torch.full_like(normals[0], slices.total)])
    divergence = _divergence_sums(backend, slices, given, torch.cat([normals, of_uniform])).loss
    found = math.log(slices.total) - divergence
    return found if labels is None else torch.where(labels != ignore_index, found, 0)


def of_rows(
    loss: FusedLoss, backend: str, layout: Layout, logits: Mapping[str, Tensor], rows: Mapping[str, Any], **options: Any
) -> Any:
    """`loss` of each row: of the operator's arguments `logits`, which lie as `layout` says, and `rows`."""
    shape = next(iter(logits.values())).shape[:-1]
    given: dict[str, Any] = {n: local_logits(t) for n, t in logits.items()}
    given |= {n: layout.local(n, t) for n, t in rows.items()}
    if layout.slices is None:
        how = {"normals": None, "scale": None, "reduction": "none"}
        known = loss.operator.arguments
        found = loss(backend, **given, **options, **{n: v for n, v in how.items() if n in known})
    else:
        found = SLICED[loss.name](backend, **given, **options, slices=layout.slices)
    results = found if isinstance(found, tuple) else (found,)
    spread = [layout.rows(t, shape, stacked=t.dim() > len(shape)) for t in results]
    return tuple(spread) if isinstance(found, tuple) else spread[0]


def entropy_of_rows(
    backend: str, layout: Layout, logits: Tensor, labels: Tensor | None, temperature: float, ignore_index: int
) -> Tensor:
    """The entropy of each row of logits that lie as `layout` says."""
    labels = layout.local("labels", labels)
    found = entropy(backend, layout.slices, local_logits(logits.detach()), labels, temperature, ignore_index)
    return layout.rows(found, logits.shape[:-1])
