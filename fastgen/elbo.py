"""ELBO errors and losses over their differences: DDO and Diffusion-DPO.

Every loss here reduces a row to one number and hands it to a scalar function, so all of them share one operator shape:
``(loss, delta, error_slope, grad_pred)`` from one pass, where ``error_slope`` is d loss / d error of each row. The
kernels are ``ElboDifferenceLoss`` in ``csrc/formulas/elbo.h`` and ``triton_kernels/elbo.py``.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _backend, _checks, _distributed, _layout, reference
from ._autograd import once_differentiable
from ._gradient import scale_gradient

REDUCTIONS = ("mean", "sum", "none")
ELEMENT_REDUCTIONS = ("mean", "sum")
LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor]


@_backend.operator(
    "elbo_error(Tensor pred, Tensor target, Tensor? weight, str loss, bool element_mean) -> Tensor",
)
def _elbo_error(pred: Tensor, target: Tensor, weight: Tensor | None, loss: str, element_mean: bool) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=_layout.arithmetic_dtype(pred, target))


@_backend.operator(
    "elbo_error_backward(Tensor grad, Tensor pred, Tensor target, Tensor? weight, str loss, bool element_mean)"
    " -> Tensor"
)
def _elbo_error_backward(
    grad: Tensor, pred: Tensor, target: Tensor, weight: Tensor | None, loss: str, element_mean: bool
) -> Tensor:
    return _layout.new_output(pred, target, dtype=pred.dtype)


@_backend.operator(
    "elbo_difference(Tensor pred, Tensor ref_pred, Tensor target, Tensor? weight, bool element_mean) -> Tensor"
)
def _elbo_difference(
    pred: Tensor, ref_pred: Tensor, target: Tensor, weight: Tensor | None, element_mean: bool
) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=_layout.arithmetic_dtype(pred, ref_pred, target))


def _loss_outputs(
    pred: Tensor, ref_pred: Tensor, target: Tensor, terms: int, reduction: str, with_grad: bool
) -> LossOutputs:
    dtype = _layout.arithmetic_dtype(pred, ref_pred, target)
    return (
        pred.new_empty((terms,) if reduction == "none" else (), dtype=dtype),
        pred.new_empty((terms,), dtype=dtype),
        pred.new_empty(pred.shape[:1], dtype=dtype),
        _layout.new_output(pred, target, ref_pred, dtype=pred.dtype) if with_grad else pred.new_empty((0,)),
    )


_LOSS_STREAMS = (
    "Tensor pred, Tensor ref_pred, Tensor target, Tensor? weight, bool element_mean, str reduction, bool with_grad"
)


@_backend.operator(
    f"ddo_loss({_LOSS_STREAMS}, Tensor is_real, Tensor? counts, float alpha, float beta, int mc_samples)"
    " -> (Tensor loss, Tensor delta, Tensor error_slope, Tensor grad_pred)"
)
def _ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    with_grad: bool,
    is_real: Tensor,
    counts: Tensor | None,
    alpha: float,
    beta: float,
    mc_samples: int,
) -> LossOutputs:
    return _loss_outputs(pred, ref_pred, target, is_real.shape[0], reduction, with_grad)


@_backend.operator(
    f"diffusion_dpo_loss({_LOSS_STREAMS}, float beta, str kind)"
    " -> (Tensor loss, Tensor delta, Tensor error_slope, Tensor grad_pred)"
)
def _diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    with_grad: bool,
    beta: float,
    kind: str,
) -> LossOutputs:
    return _loss_outputs(pred, ref_pred, target, pred.shape[0] // 2, reduction, with_grad)


class _RowError(torch.autograd.Function):
    """``elbo_error``, and with a reference ``elbo_difference``, which is the reference's error minus this one."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        pred: Tensor,
        ref_pred: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        loss: str,
        mean: bool,
    ) -> Tensor:
        ctx.backend, ctx.loss, ctx.mean, ctx.negate = backend, loss, mean, ref_pred is not None
        ctx.save_for_backward(pred, target, weight)
        if ref_pred is None:
            return _elbo_error.on(backend)(pred, target, weight, loss, mean)
        return _elbo_difference.on(backend)(pred, ref_pred, target, weight, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, weight = ctx.saved_tensors
        row_grad = -grad if ctx.negate else grad
        grad_pred = _elbo_error_backward.on(ctx.backend)(row_grad, pred, target, weight, ctx.loss, ctx.mean)
        return None, grad_pred, None, None, None, None, None


class _DifferenceLoss(torch.autograd.Function):
    """A loss over ELBO differences: `name` is its operator, `args` what that takes after the streams.

    Where `keep_grad`, the pass that computes the loss writes the gradient too, while the row is on chip. The first
    backward takes that buffer over and scales it in place; a later one (retain_graph) recomputes into a fresh one, as
    every backward does where `keep_grad` is off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        backend: str,
        keep_grad: bool,
        slope_shape: tuple[int, int],
        reduction: str,
        mean: bool,
        pred: Tensor,
        ref_pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        run = _backend.operators[name].on(backend)
        loss, delta, error_slope, grad_pred = run(pred, ref_pred, target, weight, mean, reduction, keep_grad, *args)
        ctx.save_for_backward(pred, target, weight, error_slope)
        ctx.mark_non_differentiable(delta)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.mean, ctx.slope_shape = backend, mean, slope_shape if reduction == "none" else None
        ctx.grad_pred = grad_pred if keep_grad else None
        ctx.unused = (None,) * (3 + len(args))  # the gradients of what comes after pred
        return loss, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        grad_pred, ctx.grad_pred = ctx.grad_pred, None
        if grad_loss is None:  # the loss was not used
            grad_pred = None
        elif grad_pred is not None:
            scale_gradient(grad_pred, grad_loss, ctx.backend)
        else:
            grad_pred = _DifferenceLoss.recompute(ctx, grad_loss)
        return (None,) * 6 + (grad_pred, *ctx.unused)

    @staticmethod
    def recompute(ctx: Any, grad_loss: Tensor) -> Tensor:
        pred, target, weight, error_slope = ctx.saved_tensors
        if ctx.slope_shape is not None:  # one number a term: spread it over the term's rows
            error_slope = error_slope.view(ctx.slope_shape)
            grad_loss = grad_loss.view((-1, 1) if ctx.slope_shape[0] == -1 else (1, -1))
        row_grad = (error_slope * grad_loss).reshape(-1)
        return _elbo_error_backward.on(ctx.backend)(row_grad, pred, target, weight, "l2", ctx.mean)


def _difference_loss(
    op: _backend.Operator,
    backend: str,
    slope_shape: tuple[int, int],
    reduction: str,
    element_reduction: str,
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    mean = element_reduction == "mean"
    if not (torch.is_grad_enabled() and pred.requires_grad):
        loss, delta, _, _ = op.on(backend)(pred, ref_pred, target, weight, mean, reduction, False, *args)
        return loss, delta
    # float16 would underflow before a loss scale reaches it; a compiled backward cannot take the buffer over.
    keep_grad = (
        reduction != "none"
        and pred.dtype != torch.float16
        and type(pred) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )
    loss, delta = _DifferenceLoss.apply(
        op.name,
        backend,
        keep_grad,
        slope_shape,
        reduction,
        mean,
        pred,
        ref_pred,
        target,
        weight,
        *args,
    )
    return loss, delta


def _backend_of(op: _backend.Operator, pred: Tensor) -> str:
    if _distributed.is_dtensor(pred):
        _distributed.register_sharding_rules()
    return _backend.backend_for(op.name, pred.device.type)


def elbo_error(
    pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    loss: Literal["l2", "l1", "huber"] = "l2",
    element_reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The weighted error of each row: ``error_i = w_i · red_D penalty(pred - target)``.

    This is the denoising loss before its mean over the batch, and the quantity that a Diffusion Classifier compares.

    Args:
        pred: predictions [B, …] in float32, bfloat16, float16 or float64. Gradients flow to it, and to it alone.
        target: like `pred`; its dtype may differ.
        weight: float32 or float64 [B]; 1 if None.
        loss: ``"l2"``: d²; ``"l1"``: abs(d); ``"huber"``: d²/2 where abs(d) < 1, else abs(d) - 1/2.
        element_reduction: how a row's D elements are reduced.

    Returns:
        [B], float32 (float64 if an input is), summed in that precision whatever the dtype of the images. A non-finite
        element makes its own row non-finite and touches no other.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> fastgen.elbo_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), element_reduction="sum")
        tensor([5.])
    """
    _checks.streams(pred=pred, target=target)
    _checks.per_row("weight", weight, pred)
    _checks.choice("loss", loss, ("l2", "l1", "huber"))
    _checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    backend = _backend_of(_elbo_error, pred)
    if backend == "reference":
        return reference.elbo_error(pred, target, weight=weight, loss=loss, element_reduction=element_reduction)
    if torch.is_grad_enabled() and pred.requires_grad:
        return _RowError.apply(backend, pred, None, target, weight, loss, element_reduction == "mean")
    return _elbo_error.on(backend)(pred, target, weight, loss, element_reduction == "mean")


def elbo_difference(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    element_reduction: Literal["mean", "sum"] = "sum",
) -> Tensor:
    """How much better than a reference a model predicts each row: a one-sample estimate of a log-likelihood ratio.

    .. math:: Δ_i = -w_i (red_D (p - y)^2 - red_D (q - y)^2) = w_i · red_D (q - p)(q + p - 2y)

    computed in the factored form on the right: the difference of the two sums cancels when p is near q, as it is early
    in training.

    Args:
        pred: the model's predictions p [B, …] in float32, bfloat16, float16 or float64. Gradients flow to it alone:
            ``∂Δ_i/∂p = -2 w_i (p - y)``, divided by D for the mean.
        ref_pred: the frozen reference's predictions q at the same noisy inputs; same shape, any of those dtypes.
        target: what both predict, y.
        weight: w, float32 or float64 [B]; 1 if None. For a likelihood ratio use the ELBO's weight of such errors, e.g.
            :meth:`fastgen.NoiseSchedule.edm_weight` on x0-predictions.
        element_reduction: ``"sum"`` (a log-likelihood ratio) or ``"mean"``.

    Returns:
        Δ [B], float32 (float64 if an input is). Positive where the model is better than the reference. Non-finite
        elements make their own row non-finite and touch no other.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> y = torch.zeros(1, 4)
        >>> fastgen.elbo_difference(torch.full((1, 4), 0.5), torch.ones(1, 4), y)
        tensor([3.])
    """
    _checks.streams(pred=pred, ref_pred=ref_pred, target=target)
    _checks.per_row("weight", weight, pred)
    _checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    backend = _backend_of(_elbo_difference, pred)
    if backend == "reference":
        return reference.elbo_difference(pred, ref_pred, target, weight=weight, element_reduction=element_reduction)
    if torch.is_grad_enabled() and pred.requires_grad:
        return _RowError.apply(backend, pred, ref_pred, target, weight, "l2", element_reduction == "mean")
    return _elbo_difference.on(backend)(pred, ref_pred, target, weight, element_reduction == "mean")


@overload
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    mc_samples: int = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[False] = ...,
    group: Any = ...,
) -> Tensor: ...
@overload
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    mc_samples: int = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[True],
    group: Any = ...,
) -> tuple[Tensor, Tensor]: ...
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.05,
    mc_samples: int = 1,
    element_reduction: Literal["mean", "sum"] = "sum",
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_delta: bool = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Direct Discriminative Optimization (arXiv 2503.01103): fine-tunes a likelihood-based model as its own GAN.

    .. math:: L = mean_{real} softplus(-βΔ) + α · mean_{fake} softplus(βΔ)

    with Δ of :func:`elbo_difference`: the model against its frozen reference is the discriminator's logit, real images
    are data, fake ones samples of the reference. The optimum is ``p ∝ p_ref^(1-1/β) p_data^(1/β)``; at
    ``pred == ref_pred`` the loss is ``(1 + α) ln 2``.

    Args:
        pred, ref_pred, target: as in :func:`elbo_difference`, [B·mc_samples, …]: the model's and the reference's
            predictions at the same noisy inputs, and what they predict. Share t and noise between the two models, and
            between the real and the fake half. Fakes must be the reference's samples as they come, unclamped.
        is_real: bool [B], True for data, False for samples of the reference.
        weight: w, float32 or float64 [B·mc_samples]; for EDM's x0-errors
            :meth:`fastgen.NoiseSchedule.edm_weight`.
        alpha: weight of the fakes, ≥ 0; the paper uses 0.5 to 50.
        beta: inverse temperature, > 0; the paper uses 0.01 to 0.1 with sums over an image.
        mc_samples: M, draws of (t, noise) per image, in consecutive rows. Δ is averaged over them inside the sigmoid;
            by Jensen's inequality the bound is tighter than at M = 1, the paper's.
        element_reduction: ``"sum"`` over an image's elements (the paper) or ``"mean"``.
        reduction: ``"mean"``: each group's own mean, an absent group contributing 0; ``"sum"``; or ``"none"``: the
            terms [B], with α applied to the fakes.
        return_delta: also return Δ [B] (after the mean over M), detached, for logging.
        group: a ``torch.distributed`` process group over which the two means are taken. Averaging over its ranks, as
            DDP and FSDP do to gradients, then gives the loss and the gradients of the whole batch in one process, also
            where a rank has no fakes. Batch-sharded DTensors need no group: their loss is global as it is.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, delta)``. Gradients flow to `pred` alone, once
        differentiable. B = 0 gives 0. A non-finite element makes its own row's term and gradient non-finite, and no
        other row's gradient.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> pred = torch.zeros(4, 3, 8, 8, requires_grad=True)
        >>> is_real = torch.tensor([True, True, False, False])
        >>> loss = fastgen.ddo_loss(pred, torch.zeros(4, 3, 8, 8), torch.randn(4, 3, 8, 8), is_real, alpha=2.0)
        >>> loss.backward()
        >>> print(f"{loss:.4f}")
        2.0794
    """
    _checks.streams(pred=pred, ref_pred=ref_pred, target=target)
    _checks.positive_int("mc_samples", mc_samples)
    if pred.shape[0] % mc_samples:
        raise ValueError(f"mc_samples = {mc_samples} does not divide the {pred.shape[0]} rows of pred")
    _checks.flags("is_real", is_real, pred.shape[0] // mc_samples, pred)
    _checks.per_row("weight", weight, pred)
    alpha = _checks.number("alpha", alpha, low=0)
    beta = _checks.number("beta", beta, low=0, open_low=True)
    _checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    backend = _backend_of(_ddo_loss, pred)
    if backend == "reference":
        return reference.ddo_loss(
            pred, ref_pred, target, is_real, weight=weight, alpha=alpha, beta=beta, mc_samples=mc_samples,
            element_reduction=element_reduction, reduction=reduction, return_delta=return_delta, group=group,
        )  # fmt: skip
    counts = _distributed.loss_counts(is_real, group) if reduction == "mean" else None
    loss, delta = _difference_loss(
        _ddo_loss, backend, (-1, mc_samples), reduction, element_reduction, pred, ref_pred, target, weight,
        is_real, counts, alpha, beta, mc_samples,
    )  # fmt: skip
    return (loss, delta) if return_delta else loss


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
    return_delta: Literal[False] = ...,
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
    return_delta: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    return_delta: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Diffusion-DPO (arXiv 2311.12908) and two relatives: preference losses over pairs of images.

    With Δ of :func:`elbo_difference` and the margin ``m_i = Δ_winner,i - Δ_loser,i``::

        "sigmoid"   -log sigmoid(beta m / 2)         the ½ is the published code's
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
        return_delta: also return the margins m [B/2], detached.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, margin)``. Gradients flow to `pred` alone, once
        differentiable. B = 0 gives 0. Non-finite elements make their own pair's term and gradients non-finite.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> pred = torch.zeros(4, 16, requires_grad=True)
        >>> loss = fastgen.diffusion_dpo_loss(pred, torch.zeros(4, 16), torch.randn(4, 16))
        >>> print(f"{loss:.4f}")
        0.6931
    """
    _checks.streams(pred=pred, ref_pred=ref_pred, target=target)
    if pred.shape[0] % 2:
        raise ValueError(f"pred must hold winners and then as many losers, got {pred.shape[0]} rows")
    _checks.per_row("weight", weight, pred)
    beta = _checks.number("beta", beta, low=0, open_low=True)
    _checks.choice("kind", kind, ("sigmoid", "ipo", "hinge"))
    _checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    backend = _backend_of(_diffusion_dpo_loss, pred)
    if backend == "reference":
        return reference.diffusion_dpo_loss(
            pred, ref_pred, target, weight=weight, beta=beta, kind=kind, element_reduction=element_reduction,
            reduction=reduction, return_delta=return_delta,
        )  # fmt: skip
    loss, margin = _difference_loss(
        _diffusion_dpo_loss, backend, (2, -1), reduction, element_reduction, pred, ref_pred, target, weight, beta, kind,
    )  # fmt: skip
    return (loss, margin) if return_delta else loss
