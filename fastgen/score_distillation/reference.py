"""Score-distillation losses in plain PyTorch: a method is a gradient field G, its loss a number with that gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule.reference import prediction_to_x0, widened

__all__ = ["DistillationStats", "ScorePair", "decoupled_dmd_loss", "dmd_loss", "sds_loss", "vsd_loss"]


class ScorePair(NamedTuple):
    """Two x0-scores at one noise level, for :func:`fastgen.decoupled_dmd_loss`.

    `x_t` [B, …] is the noisy image that both networks saw, `alpha_t` and `sigma_t` ([B], or [B, F] for video) its
    coefficients. `real` is the real network's conditional output, `contrast` what it is compared with: the fake
    network's output for distribution matching (DM), the real network's unconditional one for guidance (CA).

    Example::

        >>> import torch, fastgen
        >>> x_t, alpha_t, sigma_t = torch.zeros(2, 3), torch.full((2,), 0.6), torch.full((2,), 0.8)
        >>> dm = fastgen.ScorePair(x_t, alpha_t, sigma_t, real=torch.ones(2, 3), contrast=torch.zeros(2, 3))
        >>> dm.real.shape
        torch.Size([2, 3])
    """

    x_t: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    real: Tensor
    contrast: Tensor


class DistillationStats(NamedTuple):
    """What happened in a loss, as device tensors without a graph; reading them is up to the caller.

    `loss` as returned; `grad_abs` the mean of \\|G\\| over the elements that the loss averages (0-dimensional);
    `normalizer` of each sample [B], or of each frame [B, F]; `skipped` the number of samples (frames) whose G was not
    finite, which contribute 0 to all else. Of each sample or frame too, to find what a spike came from: `grad_norm`,
    the sum of \\|G\\| over it, and `skips`, bool, whether it was skipped. For the decoupled loss `grad_abs` is [2], and
    `normalizer` and `grad_norm` have a leading 2: the DM and the CA term.

    All come from the pass that computes the loss: what they cost is a few operations on [B] tensors.

    Example::

        >>> import torch, fastgen
        >>> x, pred = torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [torch.inf, 0.0]])
        >>> loss, stats = fastgen.sds_loss(x, pred, torch.zeros(2, 2), return_stats=True)
        >>> stats.skipped, stats.grad_abs
        (tensor(1), tensor(1.))
        >>> stats.skips, stats.grad_norm
        (tensor([False,  True]), tensor([4., 0.]))
    """

    loss: Tensor
    grad_abs: Tensor
    normalizer: Tensor
    skipped: Tensor
    grad_norm: Tensor
    skips: Tensor


def sds_loss(
    x: Tensor,
    pred_cond: Tensor,
    noise: Tensor,
    *,
    pred_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "sum_per_batch",
    grad_clip: float | None = None,
    return_stats: bool = False,
) -> Any:
    """``G = w (e_cfg - noise)``."""
    e = guided(pred_cond, pred_uncond, guidance_scale)
    G = weighted(e - widened(noise.detach()), weight)
    finite = elements(G.isfinite(), 1).all(-1)
    if grad_clip is not None:
        G = G.clamp(-grad_clip, grad_clip)
    return loss_with_gradient(x, G, finite, torch.ones_like(finite, dtype=G.dtype), None, reduction, return_stats)


def vsd_loss(
    x: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "sum_per_batch",
    grad_clip: float | None = None,
    return_stats: bool = False,
) -> Any:
    """``G = w (e_real_cfg - e_fake)``: SDS with the fake network's prediction in the place of the noise."""
    return sds_loss(
        x,
        real_cond,
        fake,
        pred_uncond=real_uncond,
        guidance_scale=guidance_scale,
        weight=weight,
        reduction=reduction,
        grad_clip=grad_clip,
        return_stats=return_stats,
    )


def dmd_loss(
    x: Tensor,
    x_t: Tensor | None,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor | None = None,
    sigma_t: Tensor | None = None,
    prediction_type: str = "epsilon",
    fake_prediction_type: str | None = None,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    normalizer: str | None = "x0_l1",
    normalizer_eps: float = 0.0,
    normalizer_min: float = 0.0,
    normalizer_dims: str = "sample",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Any:
    """``G = w (f - r_cfg) / n``, with ``n = mean |x - r_cfg|`` over the sample or the frame."""
    noisy = widened((x if x_t is None else x_t).detach())
    one = noisy.new_ones(noisy.shape[:1])  # predictions of x0 itself need no coefficients
    alpha_t, sigma_t = (one if t is None else t for t in (alpha_t, sigma_t))
    r = prediction_to_x0(guided(real_cond, real_uncond, guidance_scale), noisy, alpha_t, sigma_t, prediction_type)
    f = prediction_to_x0(widened(fake.detach()), noisy, alpha_t, sigma_t, fake_prediction_type or prediction_type)
    n = normalizer_of(widened(x.detach()) - r, normalizer, normalizer_eps, normalizer_min, normalizer_dims)
    G = selected(weighted(f - r, weight) / trailing(n, f), mask)
    finite = usable(n) & elements(G.isfinite(), n.dim()).all(-1)
    return loss_with_gradient(x, G, finite, n, mask, reduction, return_stats)


def decoupled_dmd_loss(
    x: Tensor,
    dm: ScorePair,
    ca: ScorePair,
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    fake_prediction_type: str | None = None,
    normalizer: str | None = "x0_l1",
    normalizer_eps: float = 0.0,
    normalizer_min: float = 0.0,
    normalizer_dims: str = "sample",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Any:
    """``G = w (f - r_cond)|DM / n_DM - w (s - 1) (r_cond - r_uncond)|CA / n_CA``, with ``n = mean |x - r_cond|``."""

    def x0(pair: ScorePair, pred: Tensor, kind: str) -> Tensor:
        return prediction_to_x0(widened(pred.detach()), widened(pair.x_t.detach()), pair.alpha_t, pair.sigma_t, kind)

    def norm(r: Tensor) -> Tensor:
        return normalizer_of(widened(x.detach()) - r, normalizer, normalizer_eps, normalizer_min, normalizer_dims)

    r_dm, r_ca = x0(dm, dm.real, prediction_type), x0(ca, ca.real, prediction_type)
    f, u = x0(dm, dm.contrast, fake_prediction_type or prediction_type), x0(ca, ca.contrast, prediction_type)
    n_dm, n_ca = norm(r_dm), norm(r_ca)
    G_dm = selected(weighted(f - r_dm, weight) / trailing(n_dm, f), mask)
    G_ca = selected(weighted(-(guidance_scale - 1) * (r_ca - u), weight) / trailing(n_ca, f), mask)
    G, n = G_dm + G_ca, torch.stack([n_dm, n_ca])
    finite = usable(n).all(0) & elements(G.isfinite(), n_dm.dim()).all(-1)
    return loss_with_gradient(x, G, finite, n, mask, reduction, return_stats, (G_dm, G_ca))


def guided(cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """``uncond + s (cond - uncond)``."""
    c = widened(cond.detach())
    return c if uncond is None else widened(uncond.detach()) + scale * (c - widened(uncond.detach()))


def weighted(G: Tensor, weight: Tensor | None) -> Tensor:
    """G times the weight of its sample [B], its frame [B, F] or its element; nothing weighs nothing, even infinity."""
    if weight is None:
        return G
    weight = weight.detach()
    if weight.shape == G.shape:
        return torch.where(weight == 0, 0, weight.to(G.dtype) * G)
    return trailing(weight.to(G.dtype), G) * G


def selected(G: Tensor, mask: Tensor | None) -> Tensor:
    return G if mask is None else torch.where(mask, G, 0)


def trailing(values: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, F] with the dimensions that broadcast it over `like`."""
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))


def elements(t: Tensor, kept: int) -> Tensor:
    """The first `kept` dimensions, and all others as one."""
    return t.unsqueeze(-1).flatten(kept)


def normalizer_of(residual: Tensor, kind: str | None, eps: float, minimum: float, dims: str) -> Tensor:
    """``max(mean |x - r|, min) + eps`` per sample [B] or frame [B, F]; 1 if `kind` is None."""
    kept = 2 if dims == "frame" else 1
    if kind is None:
        return torch.ones(residual.shape[:kept], dtype=residual.dtype, device=residual.device)
    return elements(residual.abs(), kept).mean(-1).clamp(min=minimum) + eps


def usable(n: Tensor) -> Tensor:
    return n.isfinite() & n.reciprocal().isfinite()


class _GivenGradient(torch.autograd.Function):
    """Terms [B] or [B, F] whose gradients with respect to x are the rows of G."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, terms: Tensor, G: Tensor) -> Tensor:
        return terms.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, G = inputs
        ctx.save_for_backward(G)
        ctx.save_for_forward(G)
        ctx.dtype, ctx.dims = x.dtype, output.dim()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = ctx.saved_tensors
        return (trailing(grad, G) * G).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: Any) -> Tensor:
        (G,) = ctx.saved_tensors
        return elements(G * x_tangent, ctx.dims).sum(-1)


def loss_with_gradient(
    x: Tensor,
    G: Tensor,
    finite: Tensor,
    normalizer: Tensor,
    mask: Tensor | None,
    reduction: str,
    return_stats: bool,
    parts: tuple[Tensor, ...] = (),
) -> Any:
    """½ΣG², reduced, with the gradient G, reduced likewise; where not `finite`, G counts as 0."""
    keep = trailing(finite, G)
    G, parts = torch.where(keep, G, 0), tuple(torch.where(keep, part, 0) for part in parts)
    count = torch.as_tensor(G.numel()) if mask is None else mask.expand_as(G).sum()
    count = count.clamp(min=1).to(G.device, G.dtype)
    terms = _GivenGradient.apply(x, 0.5 * elements(G.square(), finite.dim()).sum(-1), G)
    if reduction == "none":
        loss = terms.flatten(1).sum(1) if terms.dim() > 1 else terms
    elif reduction == "sum_per_batch":
        loss = terms.sum() / max(len(G), 1)
    else:
        loss = terms.sum() / (count if reduction == "mean" else 1)
    if not return_stats:
        return loss
    norms = [elements(part.abs(), finite.dim()).sum(-1) for part in parts or (G,)]
    norm = torch.stack(norms) if parts else norms[0]
    size = norm.flatten(1).sum(1) / count if parts else norm.sum() / count
    return loss, DistillationStats(loss.detach(), size, normalizer, (~finite).sum(), norm, ~finite)
