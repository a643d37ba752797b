"""Evaluations of the network per second: the plain double loop, batched, and with stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import DiffusionClassifier, NoiseSchedule, reference

from .bench_trajectory import seconds

CLASSES, PAIRS = 10, 20
STAGES = {"every class": [(PAIRS, 1)], "stages": [(4, 3), (PAIRS, 1)]}
SHAPE = (3, 32, 32)


class Network(nn.Module):
    """A small convolutional stand-in, conditional on the class."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(CLASSES, 32)
        self.inp, self.out = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.out(torch.relu(self.inp(x) + self.classes(label)[..., None, None]))


def plain_loop(net: Network, schedule: NoiseSchedule, x0: Tensor, classifier: DiffusionClassifier) -> None:
    times = classifier.times.to(x0.device)
    noise = torch.randn(PAIRS, *SHAPE, device=x0.device)
    with torch.no_grad():
        reference.classify(
            net,
            x0,
            torch.arange(CLASSES, device=x0.device),
            times,
            schedule.alpha_t(times),
            schedule.sigma_t(times),
            noise,
            stages=[(PAIRS, 1)],
        )


@pytest.mark.parametrize("stages", STAGES)
def test_predict(stages: str, benchmark: Any, device: str) -> None:
    torch.manual_seed(0)
    net, schedule = Network().to(device), NoiseSchedule.linear()
    x0, conditions = torch.randn(32, *SHAPE, device=device), torch.arange(CLASSES, device=device)
    classifier = DiffusionClassifier(net, schedule, stages=STAGES[stages], batch_size=128)

    def predict() -> None:
        classifier.predict(x0, conditions)

    def network_alone() -> None:
        """As many rows of the network as predict evaluates, and nothing else."""
        rows = torch.randn(128, *SHAPE, device=device)
        t, labels = torch.zeros(128, device=device), torch.zeros(128, dtype=torch.long, device=device)
        with torch.no_grad():
            for _ in range(statistics.evaluations // 128):
                net(rows, t, labels)

    statistics = classifier.statistics(x0, conditions)
    classifier.predict(x0, conditions, statistics)

    def fastest(f: Callable[[], None], rounds: int) -> float:
        return min(seconds(f, device) for _ in range(rounds))

    full = len(x0) * CLASSES * PAIRS
    loop = fastest(lambda: plain_loop(net, schedule, x0[:1], classifier), 3) * len(x0)
    ours, alone = fastest(predict, 5), fastest(network_alone, 5)
    benchmark.extra_info.update(
        evaluations_per_second=statistics.evaluations / ours,
        of_full_grid=statistics.evaluations / full,
        times_plain_loop=loop / ours,
        times_network_alone=ours / alone,
    )
    benchmark.pedantic(predict, rounds=3, warmup_rounds=1)
