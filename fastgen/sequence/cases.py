"""Cases of ``fastgen.sequence``, and of the joint energy loss, which sweeps logits like theirs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core.case import Draw, Role, case, flags, near, stream
from .layout import Slices

WIDTH = 8  # of hidden states


def tokens(draw: Draw) -> Tensor:
    """One a row of logits, of which one in five is ignored."""
    shape = draw.shape[:-1]
    ids = torch.arange(torch.Size(shape).numel(), device=draw.device).reshape(shape) * 7
    return (ids % draw.shape[-1]).masked_fill(ids % 5 == 1, -100)


def counted(draw: Draw) -> Tensor:
    return tokens(draw) % 3 != 0


def items(draw: Draw) -> Tensor:
    return torch.full((), 11.0, device=draw.device)


ENTRIES = 5  # of a teacher


def entries(draw: Draw) -> Tensor:
    """Log-probabilities of a teacher's entries, of which together it has most of its probability."""
    few = min(ENTRIES, draw.shape[-1])
    return (draw.placed(draw.normal(*draw.shape[:-1], few)).float().log_softmax(-1) - 0.3).to(draw.dtypes[-1])


def ids(draw: Draw) -> Tensor:
    """The entries' ids, of which one in seven is padding."""
    shape = (*draw.shape[:-1], min(ENTRIES, draw.shape[-1]))
    n = torch.arange(torch.Size(shape).numel(), device=draw.device).reshape(shape)
    return (n * 3 % draw.shape[-1]).masked_fill(n % 7 == 4, -1)


def row_weights(draw: Draw) -> Tensor:
    """Positive, one for each row of logits."""
    return (draw.normal(*draw.shape[:-1]).abs() + 0.1).to(draw.wide)


def hidden(model: int) -> Role:
    """Input of a model's output layer, in the dtype of the first or the second stream."""
    return lambda draw: draw.normal(*draw.shape[:-1], WIDTH).to(draw.dtypes[model % len(draw.dtypes)])


def head(model: int, *width: int) -> Role:
    return lambda draw: draw.normal(draw.shape[-1], *width).to(draw.dtypes[model % len(draw.dtypes)])


def _sequence_ddo(
    m: ModuleType,
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    is_real: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    # [B, T, V], whatever lies between the first dimension and the vocabulary.
    logits, ref_logits = (t.reshape(len(t), -1, t.shape[-1]) for t in (logits, ref_logits))
    tokens, mask = tokens.reshape(len(logits), -1), None if mask is None else mask.reshape(len(logits), -1)
    return m.sequence_ddo_loss(logits, ref_logits, tokens, is_real, mask=mask, **options)


def _joint_energy(m: ModuleType, logits_real: Tensor, labels: Tensor, logits_fake: Tensor) -> Tensor:
    real, fake = logits_real.flatten(0, -2), logits_fake.flatten(0, -2)
    return m.joint_energy_loss(real, labels.flatten(), fake, energy_weight=0.5)


TOKENS = {"logits": stream, "tokens": tokens}
DDO = {"logits": stream, "ref_logits": near, "tokens": tokens, "is_real": flags}
MODELS = {"student_logits": stream, "teacher_logits": stream}
SPARSE = {"student_logits": stream, "teacher_logprobs": entries, "teacher_ids": ids}
LABELLED = MODELS | {"labels": tokens}
WEIGHTED = {"mask": counted, "weight": row_weights}
STUDENT = {"student_hidden": hidden(0), "student_weight": head(0, WIDTH), "student_bias": head(0)}
HEAD = {"hidden": hidden(0), "weight": head(0, WIDTH), "bias": head(0)}
TEACHER = {"teacher_hidden": hidden(1), "teacher_weight": head(1, WIDTH), "teacher_bias": head(1)}


def divided(function: str) -> Callable[..., Tensor]:
    """A call with all the steps that a vocabulary divided among ranks takes, on one rank."""

    def run(module: ModuleType, **arguments: Any) -> Tensor:
        logits = arguments["logits" if "logits" in arguments else "student_logits"]
        if not module.__name__.endswith(".reference"):
            arguments["vocab_group"] = Slices.alone(logits.shape[-1])
        found: Tensor = getattr(module, function)(**arguments)
        return found

    return run


CASES = (
    case("token_logprob", TOKENS, "logits"),
    case("token_logprob-divided", TOKENS, "logits", divided("token_logprob"), temperature=2.0),
    case("token_logprob-masked", TOKENS | {"mask": counted}, "logits"),
    case("token_logprob-hot", TOKENS, "logits", temperature=4.0),
    case("token_logprob-cold", TOKENS, "logits", temperature=0.5),
    case("sequence_ddo_loss", DDO, "logits", _sequence_ddo, alpha=2.0, beta=0.05),
    case(
        "sequence_ddo_loss-masked",
        DDO | {"mask": counted},
        "logits",
        _sequence_ddo,
        alpha=3.0,
        normalize=True,
        reduction="sum",
    ),
    case("sequence_ddo_loss-none", DDO, "logits", _sequence_ddo, beta=0.01, reduction="none"),
    *(
        case(f"generalized_jsd_loss-{beta}", LABELLED, "student_logits", beta=beta, temperature=temperature)
        for beta, temperature in ((0, 0.5), (0.1, 1.0), (0.5, 2.0), (0.9, 4.0), (1, 1.5))
    ),
    case("generalized_jsd_loss-unlabelled", MODELS, "student_logits", beta=0.3, reduction="sum"),
    case("generalized_jsd_loss-none", LABELLED, "student_logits", beta=0.7, reduction="none"),
    case("generalized_jsd_loss-forward-none", LABELLED, "student_logits", beta=0.0, reduction="none"),
    case("generalized_jsd_loss-reverse-none", LABELLED, "student_logits", beta=1.0, reduction="none"),
    case("generalized_jsd_loss-reverse-sum", LABELLED, "student_logits", beta=1.0, reduction="sum"),
    case(
        "generalized_jsd_loss-mean",
        LABELLED | {"num_items": items},
        "student_logits",
        temperature=0.7,
        reduction="mean",
    ),
    *(
        case(
            f"generalized_jsd_loss-divided-{beta}",
            LABELLED,
            "student_logits",
            divided("generalized_jsd_loss"),
            beta=beta,
            temperature=2.0,
        )
        for beta in (0.0, 0.3)
    ),
    *(
        case(f"generalized_jsd_loss-hard-{beta}", LABELLED, "student_logits", beta=beta, cross_entropy_weight=0.7)
        for beta in (0.0, 0.3, 1.0)
    ),
    case(
        "generalized_jsd_loss-hard-none",
        LABELLED | {"weight": row_weights},
        "student_logits",
        beta=0.8,
        scaled=True,
        reduction="none",
        cross_entropy_weight=2.0,
    ),
    case(
        "generalized_jsd_loss-hard-hot",
        LABELLED,
        "student_logits",
        beta=0.0,
        temperature=4.0,
        cross_entropy_weight=0.5,
    ),
    case("generalized_jsd_loss-weighted", MODELS | WEIGHTED, "student_logits", scaled=True, reduction="sum"),
    *(
        case(
            f"sparse_divergence_loss-{kind}-{tail}", SPARSE | {"labels": tokens}, "student_logits", kind=kind, tail=tail
        )
        for kind in ("forward", "reverse", "jsd")
        for tail in ("bucket", "renormalize", "none")
    ),
    case(
        "sparse_divergence_loss-weighted",
        SPARSE | WEIGHTED | {"num_items": items},
        "student_logits",
        temperature=2.0,
        reduction="sum",
    ),
    case(
        "sparse_divergence_loss-divided",
        SPARSE | {"labels": tokens},
        "student_logits",
        divided("sparse_divergence_loss"),
        kind="jsd",
    ),
    case(
        "sparse_divergence_loss-each",
        SPARSE | WEIGHTED,
        "student_logits",
        kind="jsd",
        beta=0.2,
        scaled=True,
        temperature=0.7,
        reduction="none",
    ),
    case(
        "linear_token_logprob",
        HEAD | {"tokens": tokens},
        "hidden weight bias",
        temperature=2.0,
    ),
    case(
        "linear_generalized_jsd_loss",
        STUDENT | TEACHER | {"labels": tokens},
        "student_hidden student_weight student_bias",
        beta=0.5,
    ),
    case(
        "linear_generalized_jsd_loss-each",
        STUDENT | TEACHER | {"mask": counted, "token_weight": row_weights},
        "student_hidden student_weight student_bias",
        beta=0.3,
        scaled=True,
        temperature=2.0,
        reduction="none",
    ),
    case(
        "linear_generalized_jsd_loss-hard",
        STUDENT | TEACHER | {"labels": tokens},
        "student_hidden student_weight student_bias",
        beta=0.2,
        cross_entropy_weight=0.7,
    ),
    case(
        "linear_generalized_jsd_loss-weighted",
        STUDENT | TEACHER | {"token_weight": row_weights},
        "student_hidden student_weight student_bias",
        beta=1.0,
    ),
    case(
        "linear_generalized_jsd_loss-capped",
        STUDENT | TEACHER,
        "student_hidden student_weight student_bias",
        logit_scale=1.5,
        softcap=5.0,
        teacher_logit_scale=0.5,
    ),
    case(
        "linear_sparse_divergence_loss",
        HEAD | {"teacher_logprobs": entries, "teacher_ids": ids, "mask": counted, "token_weight": row_weights},
        "hidden weight bias",
        temperature=8.0,  # else the entries may have all of a row, and float64 too loses what is left
    ),
    case(
        "linear_sparse_divergence_loss-each",
        HEAD | {"teacher_logprobs": entries, "teacher_ids": ids, "labels": tokens},
        "hidden weight bias",
        kind="jsd",
        tail="renormalize",
        temperature=2.0,
        reduction="none",
    ),
    case(
        "joint_energy_loss",
        {"logits_real": stream, "labels": tokens, "logits_fake": stream},
        "logits_real logits_fake",
        _joint_energy,
    ),
)
