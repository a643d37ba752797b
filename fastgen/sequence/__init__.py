"""Losses over the logits of token sequences: log-probabilities, DDO, and divergences for distillation."""

from .ddo import sequence_ddo_loss
from .divergence import generalized_jsd_loss
from .linear_losses import linear_generalized_jsd_loss, linear_token_logprob
from .linear_sparse import linear_sparse_divergence_loss
from .sparse import sparse_divergence_loss
from .tokens import token_logprob

__all__ = [
    "generalized_jsd_loss",
    "linear_generalized_jsd_loss",
    "linear_sparse_divergence_loss",
    "linear_token_logprob",
    "sequence_ddo_loss",
    "sparse_divergence_loss",
    "token_logprob",
]
