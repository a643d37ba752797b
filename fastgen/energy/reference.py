"""The joint energy model's loss, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedule.reference import widened

__all__ = ["joint_energy_loss"]


def joint_energy_loss(
    logits_real: Tensor,
    labels: Tensor,
    logits_fake: Tensor,
    *,
    energy_weight: float = 1.0,
    ignore_index: int = -100,
    return_energies: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``mean CE(real, labels) + w (mean E(real) - mean E(fake))`` with ``E = -logsumexp logits``."""
    real, fake = widened(logits_real), widened(logits_fake)
    real, fake = (t.to(torch.promote_types(real.dtype, fake.dtype)) for t in (real, fake))
    labelled = labels != ignore_index
    inside = labelled & (labels >= 0) & (labels < real.shape[1])
    logprob = F.log_softmax(real, 1).gather(1, torch.where(inside, labels, 0)[:, None]).squeeze(1)
    logprob = torch.where(labelled & ~inside, torch.nan, torch.where(inside, logprob, 0))
    energy_real, energy_fake = -real.logsumexp(1), -fake.logsumexp(1)
    cross_entropy = -logprob.sum() / labelled.sum().clamp(min=1)
    gap = energy_real.sum() / max(len(real), 1) - energy_fake.sum() / max(len(fake), 1)
    loss = cross_entropy + energy_weight * gap
    return (loss, energy_real.detach(), energy_fake.detach()) if return_energies else loss
