"""What other libraries have for the sequence family's losses: nothing where they are not installed.

On a CPU that is torch and TRL; Liger-Kernel's are for GPUs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Losses = dict[str, Callable[..., Tensor]]


Masked = dict[str, Callable[..., Tensor]]


def _there(*packages: str) -> bool:
    return os.environ.get("FASTGEN_TEST_DEVICE") == "cuda" and all(find_spec(name) for name in packages)


def _trl(module: str, name: str) -> Any:
    """One of TRL's own functions, or None."""
    try:
        return getattr(importlib.import_module(f"trl.{module}"), name, None)
    except ImportError:
        return None


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

    def whole(masked: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        return lambda *models: masked(*models, torch.ones_like(models[0][:, 0], dtype=torch.bool))

    return {name: whole(masked) for name, masked in of_masked_hidden(beta).items()} | found


def of_masked_tokens() -> Masked:
    """Functions of (hidden, head, tokens, mask): minus the mean log-probability of the tokens that count."""
    found: Masked = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13 has it
        chunks = torch.nn.LinearCrossEntropyOptions()

        def cross_entropy(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            labels = tokens.masked_fill(~mask, -100)
            return torch.nn.functional.linear_cross_entropy(hidden, head, labels, options=chunks)

        found["torch, chunked"] = cross_entropy
    function: Any = _trl("kernels.chunked_logprob", "ChunkedLogProbFunction")
    if function is not None:

        def logprob(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            if hidden.is_cuda:  # elsewhere TRL projects all tokens
                hidden, tokens, mask = hidden[mask], tokens[mask], mask[mask]
            logprobs = function.apply(hidden, head, None, tokens, 1.0, 32_768, None, 1.0, ())[0]
            return -logprobs[mask].mean()

        found["TRL, chunked"] = logprob
    if _there("liger_kernel"):
        from liger_kernel.transformers import functional

        def liger(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            value: Tensor = functional.liger_fused_linear_cross_entropy(hidden, head, tokens.masked_fill(~mask, -100))
            return value

        found["Liger-Kernel"] = liger
    return found


def of_masked_hidden(beta: float = 0.5) -> Masked:
    """Functions of (hidden, head, teacher's hidden, teacher's head, mask)."""
    found: Masked = {}
    function: Any = _trl("trainer.distillation_trainer", "_chunked_divergence_loss")
    if function is not None:

        def chunked(hidden: Tensor, head: Tensor, taught: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
            value: Tensor = function(hidden[None], taught[None], head, teacher, mask[None], beta)[0]
            return value

        found["TRL, chunked"] = chunked
    if _there("liger_kernel"):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss: Any = LigerFusedLinearJSD(jsd_beta=beta)

        def liger(hidden: Tensor, head: Tensor, taught: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
            value: Tensor = loss(hidden, head, taught, teacher, torch.where(mask, 0, -100))
            return value

        found["Liger-Kernel"] = liger
    return found
