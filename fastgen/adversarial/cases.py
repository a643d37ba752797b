"""Cases of ``fastgen.adversarial`` that have a kernel."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..core.case import case, near, per_row, stream


def _layers(m: ModuleType, first: Tensor, second: Tensor, first_target: Tensor, second_target: Tensor) -> Tensor:
    return m.feature_distance([first, second], [first_target, second_target], [0.7, 1.0])


def _turned(m: ModuleType, feature: Tensor, target: Tensor) -> Tensor:
    return m.feature_distance([feature.transpose(0, -1)], [target.transpose(0, -1)])


def _pix2pix(m: ModuleType, fake_logits: Tensor, output: Tensor, target: Tensor, feature: Tensor) -> Tensor:
    return m.pix2pix_loss(fake_logits, output, target, features=[feature], target_features=[target])


PAIR = {"feature": stream, "target": near}
LAYERS = {"first": stream, "second": stream, "first_target": near, "second_target": stream}

CASES = (
    case("feature_distance", LAYERS, "first second", _layers),
    case("feature_distance-turned", PAIR, "feature", _turned),
    case(
        "pix2pix_loss",
        {"fake_logits": per_row, "output": stream, "target": stream, "feature": stream},
        "fake_logits output feature",
        _pix2pix,
    ),
)
