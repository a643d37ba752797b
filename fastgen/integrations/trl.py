"""fastgen's losses in the distillation trainers of TRL: ``GKDTrainer``, ``DistillationTrainer``, ``GOLDTrainer``,
``SDPOTrainer`` and ``SDFTTrainer``. Needs that package: ``pip install trl``. By TRL 1.16 these losses over logits stay
TRL's:

- ``GOLDTrainer`` between two tokenizers (``use_uld_loss``): all of universal logit distillation. It compares sorted
  probabilities, and, of tokens that both vocabularies have, probabilities multiplied along merged tokens, which are no
  softmax of any logits. Between models of one tokenizer its loss is fastgen's.
- ``SDPOTrainer`` and ``SDFTTrainer`` whose teacher is a server (``teacher_model_kind="live"``), by its top k: the loss
  stands in the middle of a method. It is :func:`fastgen.sparse_divergence_loss`, for who writes that method anew. With
  a local teacher all is fastgen's: every ``distillation_mode``, the policy's loss, the importance ratio.
- ``IWOPDTrainer``: all. Its own loss is a few lines over :func:`fastgen.token_logprob`, which the recipes have.

>>> from fastgen.integrations import trl  # doctest: +SKIP
>>> trl.use_fastgen()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..sequence import generalized_jsd_loss, linear_generalized_jsd_loss, sparse_divergence_loss, token_logprob
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
    - ``SDPOTrainer``'s and ``SDFTTrainer``'s losses over logits: :func:`fastgen.generalized_jsd_loss`, for the
      student's top k :func:`fastgen.sparse_divergence_loss`, and for sampled tokens, those of the policy's loss too,
      :func:`fastgen.token_logprob`. Their values are float32, where TRL's have the logits' dtype.

    What stays TRL's: universal logit distillation (GOLD between two tokenizers), the divergence from a server's top k
    (SDPO and SDFT), and ``IWOPDTrainer``, whose loss the recipes have.

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


def _sampled_divergence(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(
        student_logits: Tensor, teacher_logits: Tensor, completion_ids: Tensor, *, distillation_alpha: float
    ) -> Tensor:
        if distillation_alpha != 1:  # which it refuses
            return original(student_logits, teacher_logits, completion_ids, distillation_alpha=distillation_alpha)
        log_q = token_logprob(student_logits, completion_ids)
        log_p = token_logprob(teacher_logits.detach(), completion_ids)
        return (log_q - log_p).detach() * log_q

    return loss


def _selected(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def logprobs(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
        if index.dim() == logits.dim():  # several tokens of each row
            return original(logits, index, temperature, row_mask)
        mask = None if row_mask is None else row_mask != 0
        return token_logprob(logits, index, mask=mask, temperature=temperature)

    return logprobs


_SELF_DISTILLATION: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "compute_topk_self_distillation_loss": _topk_divergence,
    "compute_full_logit_self_distillation_loss": _full_divergence,
    "compute_sampled_token_self_distillation_loss": _sampled_divergence,
    "selective_log_softmax": _selected,
}
_REPLACEMENTS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "trl.experimental.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss": _generalized_jsd,
    "trl.experimental.gold.gold_trainer:GOLDTrainer.generalized_jsd_loss": _generalized_jsd,
    "trl.trainer.distillation_trainer:_chunked_divergence_loss": _chunked_divergence,
    **{
        f"trl.experimental.{kind}.{kind}_trainer:{function}": make
        for kind in ("sdft", "sdpo")
        for function, make in _SELF_DISTILLATION.items()
    },
}
