"""Operators of ``sequence``, and how its losses are differentiated.

Logits are [..., V]; what there is one of per row (tokens, labels, log-probabilities) has the shape before V. The last
dimension is dense or copied once; leading dimensions may have any strides, and a gradient is always contiguous. Scalars
of rows are float32 (float64 where logits are). The kernels are in ``csrc/sequence.h``, ``csrc/generalized_jsd.h``,
``csrc/sparse_divergence.h`` and ``triton_kernels/sequence.py``. With m the maximum of a row's logits, its ``stats``
are m and ``sum = Σ exp((logit - m) / temperature)``: m plus the logarithm of the sum would round what logits of 10 000
leave after the comma. Rows that are ignored are not read; their results, stats and gradients are 0.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.autograd import FusedLoss, differentiable
from ..core.operator import Gradient, Logits, Loss, PerGroup, PerRow, Reduction, Role, Stream, Whole, operator

IGNORE_INDEX = -100

TokenStats = Annotated[Tensor, Role.STACKED, 2]
DivergenceStats = Annotated[Tensor, Role.STACKED, 5]
SparseStats = Annotated[Tensor, Role.STACKED, 6]
Masses = Annotated[Tensor, Role.STACKED, 2]
Normals = Annotated[Tensor, Role.STACKED, 2]  # m and sum of rows of which the logits at hand are a slice
BothNormals = Annotated[Tensor, Role.STACKED, 4]  # the student's, the teacher's

# The order is the kernels': csrc/sparse_divergence.h.
Tail = Literal["bucket", "renormalize", "none"]


class TokenOutputs(NamedTuple):
    """Of :func:`token_logprob`."""

    logprob: PerRow
    stats: TokenStats


class SequenceOutputs(NamedTuple):
    """Of :func:`sequence_ddo_loss`."""

    loss: Loss
    delta: PerRow
    slope: PerRow


class DivergenceOutputs(NamedTuple):
    """Of :func:`generalized_jsd`."""

    loss: Loss
    cross_entropy: PerRow
    stats: DivergenceStats
    grad_student: Gradient


class SparseOutputs(NamedTuple):
    """Of :func:`sparse_divergence`."""

    loss: Loss
    masses: Masses
    stats: SparseStats
    grad_student: Gradient


@operator
def token_logprob_backward(
    grad: PerRow,
    logits: Logits,
    tokens: PerRow,
    stats: TokenStats,
    temperature: float,
    ignore_index: int,
    elsewhere: bool,
) -> Gradient:
    """``grad (onehot - softmax) / temperature`` per row.

    A token outside the vocabulary makes it 0, or if `elsewhere` its onehot: it is in another slice of the vocabulary.
    """


@differentiable(token_logprob_backward, "logits", returns=("logprob",), elsewhere=False)
@operator
def token_logprob(logits: Logits, tokens: PerRow, temperature: float, ignore_index: int) -> TokenOutputs:
    """``logprob = (logit_token - m) / temperature - log sum``; NaN outside the vocabulary."""


def _spread(grad: Tensor, logprob: Tensor) -> Tensor:
    """A sequence's gradient for each of its tokens."""
    return grad.unsqueeze(1).expand(logprob.shape)


@differentiable(_spread, "logprob", slope="slope", returns=("loss", "delta"))
@operator
def sequence_ddo_loss(
    logprob: Stream,
    ref_logprob: Stream,
    is_real: PerGroup,
    counts: Whole | None,
    alpha: float,
    beta: float,
    scale: float,
    reduction: Reduction,
) -> SequenceOutputs:
    """DDO's terms over ``delta_i = Σ_t logprob_it - ref_logprob_it``, times `scale`; slope is d term_i / d delta_i."""


@operator
def generalized_jsd_backward(
    grad: PerRow,
    student: Logits,
    teacher: Logits,
    labels: PerRow | None,
    stats: DivergenceStats,
    beta: float,
    temperature: float,
    ignore_index: int,
    cross_entropy_weight: float,
) -> Gradient:
    """The student's gradient from one number per row, which may be expanded; 0 in ignored rows."""


@differentiable(generalized_jsd_backward, "student", slope="scale")
@operator
def generalized_jsd(
    student: Logits,
    teacher: Logits,
    labels: PerRow | None,
    normals: BothNormals | None,
    scale: Whole | None,
    beta: float,
    temperature: float,
    ignore_index: int,
    cross_entropy_weight: float,
    reduction: Reduction,
    with_grad: bool,
) -> DivergenceOutputs:
    """The divergence of each row, or their sum, and the gradients, all times the 0-dimensional `scale`.

    Where `cross_entropy_weight` is not 0 that times the cross-entropy of the labels is added to each row's divergence:
    at temperature 1, whose softmax is the same, and with a teacher of no fewer columns. It is also a result itself, 0
    elsewhere and in ignored rows.

    Where `normals` are given the logits are a slice of the vocabulary, and loss and center those sums over it of which
    those of all slices are the sums; there is no gradient without them, and no cross-entropy.

    The vocabularies may differ: columns that one of the two lacks are left out, and have gradient 0. stats [5, ...]:
    the student's m and sum, the teacher's, and the row's center: 0, KL(Q‖P) or KL(Q‖M) for
    beta = 0, 1 and between.
    """


# The same, where the caller wants to see the cross-entropy too: a second result costs the host ten microseconds.
jsd_and_cross_entropy = FusedLoss(
    generalized_jsd.operator,
    generalized_jsd_backward,
    "student",
    slope="scale",
    returns=("loss", "cross_entropy"),
)


def has_cross_entropy(temperature: float, student_size: int, teacher_size: int, divided: bool) -> bool:
    """Whether :func:`generalized_jsd` can add a cross-entropy: its softmax is the divergence's, of whole rows."""
    return temperature == 1 and student_size <= teacher_size and not divided


@operator
def sparse_divergence_backward(
    grad: PerRow,
    student: Logits,
    teacher_logprobs: Logits,
    teacher_ids: Logits,
    labels: PerRow | None,
    weight: PerRow | None,
    stats: SparseStats,
    beta: float,
    tail: Tail,
    temperature: float,
    ignore_index: int,
) -> Gradient:
    """The student's gradient from one number per row, which may be expanded; 0 in ignored rows."""


@differentiable(sparse_divergence_backward, "student", slope="scale", returns=("loss", "masses"))
@operator
def sparse_divergence(
    student: Logits,
    teacher_logprobs: Logits,
    teacher_ids: Logits,
    labels: PerRow | None,
    weight: PerRow | None,
    normals: Normals | None,
    scale: Whole | None,
    beta: float,
    tail: Tail,
    temperature: float,
    ignore_index: int,
    reduction: Reduction,
    with_grad: bool,
) -> SparseOutputs:
    """The divergence of each row from a teacher [..., K], or their sum, times `weight` and the 0-dimensional `scale`.

    A teacher's entry of a negative id is none. Where `normals` are given the student's columns are some of its
    vocabulary, and the ids are of those. masses [2, ...]: Q and P of the entries. stats [6, ...]: the student's m
    and sum; what renormalising takes from log Q and log P; and of the gradient the center and what is times Q outside
    the entries.
    """


def entropy(backend: str, logits: Tensor, labels: Tensor | None, temperature: float, ignore_index: int) -> Tensor:
    """Of each row's softmax(logits / τ), without gradient: log V - KL(Q‖U), U uniform; 0 in ignored rows."""
    logits = logits.detach()
    uniform = logits.new_zeros(logits.shape[-1]).expand(logits.shape)
    divergence = generalized_jsd.operator(
        backend,
        student=logits,
        teacher=uniform,
        labels=labels,
        normals=None,
        scale=None,
        beta=1.0,
        temperature=temperature,
        ignore_index=ignore_index,
        cross_entropy_weight=0.0,
        reduction="none",
        with_grad=False,
    ).loss
    entropy = math.log(logits.shape[-1]) - divergence
    return entropy if labels is None else torch.where(labels != ignore_index, entropy, 0)
