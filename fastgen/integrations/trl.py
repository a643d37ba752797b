"""fastgen's losses in the distillation trainers of TRL: ``GKDTrainer``, ``DistillationTrainer``, ``GOLDTrainer`` and
``SDPOTrainer``. Needs that package: ``pip install trl``.

>>> from fastgen.integrations import trl  # doctest: +SKIP
>>> trl.use_fastgen()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..sequence import generalized_jsd_loss, linear_generalized_jsd_loss, sparse_divergence_loss
from ..sequence.options import Reduction

__all__ = ["restore", "use_fastgen"]

_originals: dict[str, tuple[Any, str, Any]] = {}


def use_fastgen() -> list[str]:
    """Makes the trainers that are there use fastgen's losses, in this process, from now on; :func:`restore` undoes it.

    - ``GKDTrainer.generalized_jsd_loss`` and ``GOLDTrainer``'s: :func:`fastgen.generalized_jsd_loss`, with TRL's
      reductions: `num_items_in_batch` divides the sum whatever the reduction, and without labels ``"batchmean"``
      divides by the batch. What it does not have stays TRL's: ``reduction="none"``, which there is elementwise, and
      probabilities in the place of logits.
    - ``DistillationTrainer``'s ``_chunked_divergence_loss``: :func:`fastgen.linear_generalized_jsd_loss`, which
      projects the tokens that count alone.
    - ``SDPOTrainer``'s losses over logits: :func:`fastgen.generalized_jsd_loss`, and for the student's top k
      :func:`fastgen.sparse_divergence_loss`.

    Returns:
        The names of what was replaced. Called again it replaces nothing that is replaced already.

    Raises:
        ImportError: if TRL has none of these, or is not installed.
    """
    for name, make in _REPLACEMENTS.items():
        module, _, attribute = name.rpartition(":")
        owner_name, _, function = attribute.rpartition(".")
        try:
            owner: Any = importlib.import_module(module)
        except ImportError:  # one trainer's own dependencies may lack
            continue
        owner = getattr(owner, owner_name, None) if owner_name else owner
        original = None if owner is None else owner.__dict__.get(function)
        if original is None or name in _originals:
            continue
        _originals[name] = owner, function, original
        replacement = make(original.__func__ if isinstance(original, staticmethod) else original)
        setattr(owner, function, staticmethod(replacement) if isinstance(original, staticmethod) else replacement)
    if not _originals:
        raise ImportError("found none of TRL's distillation trainers (pip install trl)")
    return sorted(_originals)


def restore() -> None:
    """Gives the trainers their own losses back."""
    while _originals:
        _, (owner, function, original) = _originals.popitem()
        setattr(owner, function, original)


def _generalized_jsd(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if (reduction not in ("batchmean", "sum", "mean") and num_items_in_batch is None) or any(others.values()):
            others |= {"temperature": temperature, "reduction": reduction, "num_items_in_batch": num_items_in_batch}
            return original(student_logits, teacher_logits, labels, beta, **others)
        items = num_items_in_batch
        if items is None and labels is None and reduction == "batchmean":
            items = max(student_logits.shape[0], 1)
        return generalized_jsd_loss(
            student_logits,
            teacher_logits,
            labels,
            beta=beta,
            temperature=temperature,
            reduction=cast(Reduction, "sum" if items is not None else reduction),
            num_items=items,
        )

    return loss


def _chunked_divergence(original: Callable[..., Any]) -> Callable[..., Any]:
    def loss(
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        *arguments: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher = (
            (student_hidden_states, student_lm_head_weight),
            (teacher_hidden_states, teacher_lm_head_weight),
        )
        models = {"": "student", "teacher_": "teacher"}
        transforms: dict[str, Any] = {
            f"{p}logit_scale": options.get(f"{m}_logit_scale", 1.0) for p, m in models.items()
        }
        transforms |= {f"{p}softcap": options.get(f"{m}_final_logit_softcapping") or None for p, m in models.items()}
        if arguments or min(transforms["logit_scale"], transforms["teacher_logit_scale"]) <= 0:
            hidden, weights = zip(student, teacher, strict=True)
            return original(*hidden, *weights, completion_mask, beta, *arguments, **options)
        valid = completion_mask != 0
        count = valid.sum()
        divergence, entropy = linear_generalized_jsd_loss(
            *student,
            *teacher,
            student_bias=options.get("student_lm_head_bias"),
            teacher_bias=options.get("teacher_lm_head_bias"),
            mask=valid,
            num_valid=int(count),  # TRL's own selection of these tokens waits for the device too
            beta=beta,
            temperature=options.get("temperature", 1.0),
            num_items=options.get("num_items_in_batch"),
            return_entropy=True,
            **transforms,
        )
        return divergence, entropy.sum(), count

    return loss


def _topk_divergence(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        distillation_topk: int,
        distillation_alpha: float,
        distillation_add_tail: bool,
    ) -> Tensor:
        ids = student_logits.detach().topk(distillation_topk, dim=-1).indices
        with torch.no_grad():
            teacher = teacher_logits.float()
            logprobs = teacher.gather(-1, ids) - teacher.logsumexp(-1, keepdim=True)
        return sparse_divergence_loss(
            student_logits,
            logprobs,
            ids,
            kind="forward" if distillation_alpha == 0 else "reverse" if distillation_alpha == 1 else "jsd",
            beta=distillation_alpha,
            tail="bucket" if distillation_add_tail else "renormalize",
            reduction="none",
        )

    return loss


def _full_divergence(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float) -> Tensor:
        return generalized_jsd_loss(student_logits, teacher_logits, beta=distillation_alpha, reduction="none")

    return loss


_SDPO = "trl.experimental.sdpo.sdpo_trainer"
_REPLACEMENTS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "trl.experimental.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss": _generalized_jsd,
    "trl.experimental.gold.gold_trainer:GOLDTrainer.generalized_jsd_loss": _generalized_jsd,
    "trl.trainer.distillation_trainer:_chunked_divergence_loss": _chunked_divergence,
    f"{_SDPO}:compute_topk_self_distillation_loss": _topk_divergence,
    f"{_SDPO}:compute_full_logit_self_distillation_loss": _full_divergence,
}
