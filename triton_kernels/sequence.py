"""Losses over the tokens of sequences: log-probabilities, DDO of their sums (arXiv 2503.01103), and the operators of
the divergences in ``divergence.py`` and ``sparse_divergence.py``. Logarithms inside kernels are base 2: the hardware's
2^x then takes one multiplication less, and its error does not grow with the exponent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scalar
from .divergence import generalized_jsd, generalized_jsd_backward
from .elbo import ddo_link, ddo_term
from .rowwise import Formula, Functions, Groups, Rows, run
from .scalar import divide, expm1, number
from .sparse_divergence import sparse_divergence, sparse_divergence_backward
from .sweep import LOG2E, LogitRows, SweepFormula, SweepFunctions, sweep, sweep_map

__all__ = [
    "generalized_jsd",
    "generalized_jsd_backward",
    "sequence_ddo_loss",
    "sparse_divergence",
    "sparse_divergence_backward",
    "token_logprob",
    "token_logprob_backward",
]


# -- Log-probabilities of tokens


class TokenArgs(NamedTuple):
    tokens: Tensor
    ignore: int
    size: int
    elsewhere: int  # 1 if a token outside these columns is one of another slice of the vocabulary
    grad: Tensor | None  # of the rows
    logprob: Tensor | None
    stats: Tensor  # [2, rows]: largest logit, sum
    slope: Any  # 1 / τ
    scale: Any  # log2(e) / τ: from differences of logits to base-2 logarithms of probabilities


def _token_args(
    rows: LogitRows,
    tokens: Tensor,
    ignore_index: int,
    grad: Tensor | None,
    logprob: Tensor | None,
    stats: Tensor,
    temperature: float,
    elsewhere: bool = False,
) -> TokenArgs:
    numbers = [scalar.argument(x / temperature, rows.dtype) for x in (1.0, LOG2E.value)]
    where = tokens.contiguous(), ignore_index, rows.size, int(elsewhere)
    return TokenArgs(*where, grad, logprob, stats.contiguous(), *numbers)


@triton.jit
def _ignored(args, row):
    return tl.load(args.tokens + row) == args.ignore


@triton.jit
def _token(args, row):
    return tl.load(args.tokens + row)


@triton.jit
def _row(args, rows, row, normals, read, T: tl.constexpr):
    return normals[0][0], normals[0][1], number(args.slope, T)


@triton.jit
def _epilogue(args, rows, row, constants, sums, read, T: tl.constexpr):
    tl.store(args.stats + row, tl.where(read, constants[0], 0.0))
    tl.store(args.stats + rows + row, tl.where(read, constants[1], 0.0))
    return constants


@triton.jit
def _pick(args, row, constants, v, read):
    """By way of halves: the difference of two logits may be beyond all numbers where over the temperature it is not."""
    largest, total, slope = constants
    half = v * 0.5 - largest * 0.5
    tl.store(args.logprob + row, tl.where(read, half * slope * 2.0 - tl.log(total), 0.0))


@triton.jit
def _ignored_backward(args, row):
    token = tl.load(args.tokens + row)
    return (token == args.ignore) | (((token < 0) | (token >= args.size)) & (args.elsewhere == 0))


@triton.jit
def _row_backward(args, rows, row, normals, read, T: tl.constexpr):
    """(largest logit, sum, what the onehot is times, that / sum negated, slope, scale)"""
    slope = number(args.slope, T)
    total = tl.where(read, tl.load(args.stats + rows + row), 1.0)
    factor = tl.where(read, tl.load(args.grad + row) * slope, 0.0)
    return tl.load(args.stats + row), total, factor, divide(-factor, total), slope, number(args.scale, T)


@triton.jit
def _element(constants, v):
    return (tl.exp2((v[0] - constants[0]) * constants[5]),), ()


@triton.jit
def _map(constants, parts):
    return parts[0] * constants[3]


@triton.jit
def _map_picked(constants, v):
    largest, total, factor, _, slope, _ = constants
    return -factor * expm1((v - largest) * slope - tl.log(total))  # 1 - softmax, which may be near 0


TOKEN_LOGPROB = SweepFormula(SweepFunctions(_ignored, _row, epilogue=_epilogue, picked=_token, pick=_pick))
TOKEN_LOGPROB_BACKWARD = SweepFormula(
    SweepFunctions(_ignored_backward, _row_backward, _element, map=_map, picked=_token, map_picked=_map_picked)
)


def token_logprob(logits: Tensor, tokens: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = LogitRows(logits)
    shape = logits.shape[:-1]
    logprob, stats = rows.new_vector(*shape), rows.new_vector(2, *shape)
    sweep(TOKEN_LOGPROB, rows, _token_args(rows, tokens, ignore_index, None, logprob, stats, temperature))
    return logprob, stats


def token_logprob_backward(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
    elsewhere: bool,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = LogitRows(logits, out=out)
    args = _token_args(rows, tokens, ignore_index, rows.scalars(grad), None, stats, temperature, elsewhere)
    sweep_map(TOKEN_LOGPROB_BACKWARD, rows, args)
    return out


# -- DDO over the sums of token log-probabilities


class DdoArgs(NamedTuple):
    link: Any
    scale: Any
    term: Tensor
    delta: Tensor
    slope: Tensor


@triton.jit
def _ddo_row(args, row, rank, T: tl.constexpr):
    return (tl.full((), 1.0, T),)


@triton.jit
def _accumulate_difference(constants, v):
    return (v[0] - v[1],)


@triton.jit
def _ddo_epilogue(args, group, sums, T: tl.constexpr):
    term, slope = ddo_term(args.link, group, sums[0], T)
    scale = number(args.scale, T)
    tl.store(args.delta + group, sums[0])
    tl.store(args.term + group, scale * term)
    tl.store(args.slope + group, scale * slope)
    return slope


SEQUENCE_DDO = Formula(Functions(_ddo_row, _accumulate_difference, _ddo_epilogue), sums=1)


def sequence_ddo_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    is_real: Tensor,
    counts: Tensor | None,
    alpha: float,
    beta: float,
    scale: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(logprob, ref_logprob)
    term, delta, slope = (rows.new_vector(rows.count) for _ in range(3))
    link = ddo_link(rows, is_real, counts, alpha, beta, 1.0, reduction)
    args = DdoArgs(link, scalar.argument(scale, rows.dtype), term, delta, slope)
    run(SEQUENCE_DDO, Groups(rows.count), rows, args)
    return term if reduction == "none" else term.sum(), delta, slope
