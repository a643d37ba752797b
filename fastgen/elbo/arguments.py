"""What the losses over ELBO differences do with the arguments that they share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import checks, distributed
from ..core.autograd import FusedLoss
from . import reference

REDUCTIONS = ("mean", "sum", "none")
ELEMENT_REDUCTIONS = ("mean", "sum")


def shared_of(
    pred: Tensor, ref_pred: Tensor, target: Tensor, weight: Tensor | None, element_reduction: str, reduction: str
) -> dict[str, Any]:
    """What all losses over ELBO differences take, checked."""
    checks.streams(pred=pred, ref_pred=ref_pred, target=target)
    checks.per_row("weight", weight, pred)
    checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    checks.choice("reduction", reduction, REDUCTIONS)
    return {
        "pred": pred,
        "ref_pred": ref_pred,
        "target": target,
        "weight": weight,
        "element_reduction": element_reduction,
        "reduction": reduction,
    }


def loss_of(op: FusedLoss, shared: dict[str, Any], terms: int, *, return_delta: bool = False, **own: Any) -> Any:
    """The loss `op`, or its reference, of what :func:`shared_of` gives and its own arguments.

    `terms` are the mean's, in the whole batch; one that divides by numbers of its own has 1.
    """
    backend = distributed.backend_of(op.name, shared["pred"])
    if backend == "reference":
        returned = {"return_delta": True} if return_delta else {}
        return getattr(reference, op.name)(**shared, **own, **returned)
    arguments = {name: value for name, value in shared.items() if name != "element_reduction"}
    scale = 1 / max(terms, 1) if shared["reduction"] == "mean" else 1.0
    element_mean = shared["element_reduction"] == "mean"
    loss, delta = op(backend, **arguments, element_mean=element_mean, scale=scale, **own)
    return (loss, delta) if return_delta else loss
