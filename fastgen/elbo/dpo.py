"""Diffusion-DPO and its relatives: preferences over pairs of images against a reference model."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..core import checks, distributed
from . import operators
from .arguments import loss_of, shared_of
from .errors import elbo_error

__all__ = ["PreferenceErrors", "diffusion_dpo_loss"]


class PreferenceErrors(NamedTuple):
    """What :func:`diffusion_dpo_loss` saw, as device tensors without a graph.

    `error` and `ref_error` [B] are the model's and the reference's own, in the order of the rows; `margin` [B/2] is m;
    `accuracy` the share of pairs with m > 0. A loss that stays at ln 2 has margins far below 1 / beta: look whether
    `error` changes at all.

    Example::

        >>> import torch, fastgen
        >>> y = torch.zeros(2, 4)
        >>> pred = torch.tensor([[1.0], [3.0]]).expand(2, 4)
        >>> fastgen.diffusion_dpo_loss(pred, pred + 1, y, return_errors=True)[1].error
        tensor([1., 9.])
    """

    error: Tensor
    ref_error: Tensor
    margin: Tensor
    accuracy: Tensor


@overload
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    beta: float = ...,
    kind: Literal["sigmoid", "ipo", "hinge"] = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    interleaved: bool = ...,
    return_delta: Literal[False] = ...,
    return_errors: Literal[False] = ...,
) -> Tensor: ...
@overload
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    beta: float = ...,
    kind: Literal["sigmoid", "ipo", "hinge"] = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    interleaved: bool = ...,
    return_delta: Literal[True],
    return_errors: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    beta: float = ...,
    kind: Literal["sigmoid", "ipo", "hinge"] = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    interleaved: bool = ...,
    return_delta: Literal[False] = ...,
    return_errors: Literal[True],
) -> tuple[Tensor, PreferenceErrors]: ...
@overload
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    beta: float = ...,
    kind: Literal["sigmoid", "ipo", "hinge"] = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    interleaved: bool = ...,
    return_delta: bool,
    return_errors: Literal[False] = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    beta: float = 5000.0,
    kind: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    element_reduction: Literal["mean", "sum"] = "mean",
    reduction: Literal["mean", "sum", "none"] = "mean",
    interleaved: bool = False,
    return_delta: bool = False,
    return_errors: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, PreferenceErrors]:
    """Diffusion-DPO (arXiv 2311.12908) and two relatives: preference losses over pairs of images.

    With Δ of :func:`elbo_difference` and the margin ``m_i = Δ_winner,i - Δ_loser,i``::

        "sigmoid"   -log sigmoid(beta m / 2)         the ½ is the published code's: diffusers' beta_dpo is beta / 2
        "ipo"       (m - 1/(2 beta))²                arXiv 2310.12036
        "hinge"     relu(1 - beta m)                 arXiv 2305.10425

    Args:
        pred, ref_pred, target: as in :func:`elbo_difference`, [B, …] with B even: the first half are winners, the
            second half the losers, in the same order. A pair shares t and noise.
        weight: float32 or float64 [B].
        beta: inverse temperature, > 0. 5000 is the published code's, with the mean over elements.
        kind: one of the three.
        element_reduction: ``"mean"`` over an image's elements (published code) or ``"sum"``.
        reduction: over the B/2 pairs; ``"none"`` returns [B/2].
        interleaved: rows 2i are winners and rows 2i + 1 their losers instead. A batch-sharded DTensor needs it, with an
            even number of rows in each shard, as B = 2 · ranks · n gives; it then stays where it is.
        return_delta: also return the margins m [B/2], detached.
        return_errors: also return :class:`PreferenceErrors`, which reads the streams twice more.

    Returns:
        The loss, float32 (float64 if an input is), ``(loss, margin)`` or ``(loss, errors)``. Gradients flow to `pred`
        alone, once differentiable. B = 0 gives 0. Non-finite elements make their own pair's term and gradients
        non-finite.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; also a DTensor in shards that part a pair.

    Example::

        >>> import torch, fastgen
        >>> pred = torch.zeros(4, 16, requires_grad=True)
        >>> loss = fastgen.diffusion_dpo_loss(pred, torch.zeros(4, 16), torch.randn(4, 16))
        >>> print(f"{loss:.4f}")
        0.6931
    """
    shared = shared_of(pred, ref_pred, target, weight, element_reduction, reduction)
    if pred.shape[0] % 2:
        raise ValueError(f"pred must hold winners and then as many losers, got {pred.shape[0]} rows")
    streams = {"pred": pred, "ref_pred": ref_pred, "target": target}
    if interleaved:
        distributed.check_groups(streams, 2, "pairs of neighbouring rows")
    else:
        instead = "put each pair into neighbouring rows and pass interleaved=True"
        distributed.check_groups(streams, max(pred.shape[0], 1), distributed.HALVES, instead)
    beta = checks.number("beta", beta, low=0, open_low=True)
    checks.choice("kind", kind, ("sigmoid", "ipo", "hinge"))
    if return_delta and return_errors:
        raise ValueError("return_delta and return_errors exclude each other: the errors hold the margins")
    pairs, own = pred.shape[0] // 2, {"beta": beta, "kind": kind, "interleaved": bool(interleaved)}
    result = loss_of(operators.diffusion_dpo_loss, shared, pairs, return_delta=return_delta or return_errors, **own)
    if not return_errors:
        return result
    with torch.no_grad():
        error, ref_error = (
            elbo_error(p, target, weight=weight, element_reduction=element_reduction) for p in (pred, ref_pred)
        )
        accuracy = (result[1] > 0).to(error.dtype).sum() / max(pairs, 1)
    return result[0], PreferenceErrors(error, ref_error, result[1], accuracy)
