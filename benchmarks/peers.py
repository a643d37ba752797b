"""What other libraries have for the sequence family's losses: nothing where they are not installed, or on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Losses = dict[str, Callable[..., Tensor]]


def _there(*packages: str) -> bool:
    return os.environ.get("FASTGEN_TEST_DEVICE") == "cuda" and all(find_spec(name) for name in packages)


def of_logits(case: str) -> Losses:
    """By the name of a library, its function in place of the case of this name."""
    if not _there("liger_kernel"):
        return {}
    from liger_kernel.transformers import functional

    if case == "token_logprob":
        # It writes the gradient over the logits, which for a comparison of times does no harm.
        def logprob(logits: Tensor, tokens: Tensor) -> Tensor:
            losses: Any = functional.liger_cross_entropy(logits, tokens, reduction="none")
            return -losses

        return {"Liger-Kernel": logprob}
    _, _, beta = case.partition("generalized_jsd_loss-")
    if not beta:
        return {}

    def jsd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        logprobs = (logits.float().log_softmax(-1) for logits in (student_logits, teacher_logits))
        value: Tensor = functional.liger_jsd(*logprobs, beta=float(beta))
        return value

    return {"Liger-Kernel": jsd}


def of_hidden(beta: float = 0.5) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Functions of (hidden, head, teacher's hidden, teacher's head)."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {}
    if _there("liger_kernel"):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss: Any = LigerFusedLinearJSD(jsd_beta=beta)
        found["Liger-Kernel"] = lambda hidden, head, taught, teacher: loss(hidden, head, taught, teacher, None)
    if _there("trl", "datasets"):
        try:
            from trl.trainer.distillation_trainer import _chunked_divergence_loss
        except ImportError:
            return found

        def chunked(hidden: Tensor, head: Tensor, taught: Tensor, teacher: Tensor) -> Tensor:
            mask = torch.ones(1, len(hidden), dtype=torch.bool, device=hidden.device)
            value: Tensor = _chunked_divergence_loss(hidden[None], taught[None], head, teacher, mask, beta)[0]
            return value

        found["TRL, chunked"] = chunked
    return found
