"""Liger-Kernel's fused linear distillation loss, by fastgen. It does not need the package ``liger-kernel``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks
from ..sequence import linear_generalized_jsd_loss, linear_token_logprob

__all__ = ["LigerFusedLinearJSDLoss"]


class LigerFusedLinearJSDLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``, with its arguments and what they mean.

    ``weight_hard_loss · CE + weight_soft_loss · JSD``, each a sum over the tokens that count, divided by their number:
    the cross-entropy of the student at temperature 1, and :func:`fastgen.linear_generalized_jsd_loss` at the
    temperature given, without its square. Logits of half-precision heads are float32, where Liger rounds them. Both
    losses are of the same logits, which are projected once, but where a wider teacher pads the student's.

    Args:
        weight_hard_loss, weight_soft_loss: of the two losses. The first is not computed where it is 0 and is not
            returned either.
        beta: in [0, 1]; weighs the teacher. 0 is KL(P‖Q), 1 is KL(Q‖P).
        ignore_index: tokens with this label do not count.
        temperature: > 0.
        compiled: of no effect.
        chunk_size: of no effect: the memory for logits is bounded in bytes.
        return_soft_hard_loss: return ``(loss, soft, hard)``; the last two are for logging.

    Example::

        >>> import torch
        >>> from fastgen.integrations.liger import LigerFusedLinearJSDLoss
        >>> student, teacher = torch.nn.Linear(8, 50, bias=False), torch.nn.Linear(16, 50, bias=False)
        >>> s, t, labels = torch.randn(6, 8), torch.randn(6, 16), torch.randint(50, (6,))
        >>> loss = LigerFusedLinearJSDLoss(beta=0.5)(s, student.weight, t, teacher.weight, labels)
        >>> loss.backward()
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = checks.number("weight_hard_loss", weight_hard_loss)
        self.weight_soft_loss = checks.number("weight_soft_loss", weight_soft_loss)
        self.beta = checks.share("beta", beta)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        self.temperature = checks.number("temperature", temperature, low=0, open_low=True)
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of tokens [N, H] with the teacher's [N, H'].

        A teacher of more columns is one whose embedding was padded: as in Liger, the student has logit 0 in them, for
        which its weight is copied. (:func:`fastgen.linear_generalized_jsd_loss` itself leaves such columns out.)
        """
        missing = teacher_weight.shape[0] - student_weight.shape[0]
        together = missing <= 0 and self.weight_hard_loss > 0 and self.weight_soft_loss > 0
        hard = None if together else self._hard(student_input, student_weight, true_labels, student_bias)
        if missing > 0:
            student_weight = F.pad(student_weight, (0, 0, 0, missing))
            student_bias = None if student_bias is None else F.pad(student_bias, (0, missing))
        ratio = self.weight_hard_loss / self.weight_soft_loss if together else 0.0
        found = linear_generalized_jsd_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            beta=self.beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            cross_entropy_weight=ratio,
            return_cross_entropy=together,
        )
        both, rows = found if together else (found, None)
        loss, soft = self.weight_soft_loss * both, both.detach()
        if rows is not None:
            hard = self._mean(rows, true_labels)
            soft = soft - ratio * hard
        elif hard is not None:
            loss = loss + self.weight_hard_loss * hard
        return (loss, soft, hard.detach()) if self.return_soft_hard_loss and hard is not None else loss

    def _mean(self, rows: Tensor, labels: Tensor) -> Tensor:
        return rows.sum() / (labels != self.ignore_index).sum().clamp(min=1)

    def _hard(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor | None:
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight_hard_loss != 0):
            logprob = linear_token_logprob(hidden, weight, labels, bias=bias, ignore_index=self.ignore_index)
        return self._mean(-logprob, labels)
