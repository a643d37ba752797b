"""The weighted L1 distance of features: values, gradients, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_accurate, value_and_grad
from test_adversarial import DTYPES, normal

import fastgen
from fastgen import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feature_distance(dtype: torch.dtype, kernel_backend: str) -> None:
    shapes, weights = [(4, 3, 5, 5), (4, 7), (4,)], [0.25, 2.0, 1.0]
    a, b = ([normal(*s, seed=k + j, dtype=torch.float32).to(dtype) for k, s in enumerate(shapes)] for j in (0, 9))

    def run(module: Any, wide: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in a]
        value = module.feature_distance(leaves, [t.double() if wide else t for t in b], weights)
        return value.detach(), list(torch.autograd.grad(value, leaves))

    actual, eager, exact = run(fastgen, False), run(reference, False), run(reference, True)
    assert_accurate(actual[0], eager[0], exact[0])
    for mine, theirs, truth in zip(actual[1], eager[1], exact[1], strict=True):
        assert_accurate(mine, theirs, truth, "gradient")
        for wrong in (torch.zeros_like(mine), -mine):
            with pytest.raises(AssertionError):
                assert_accurate(wrong, theirs, truth)
    hand = sum(w * (x.double() - y.double()).abs().mean() for w, x, y in zip(weights, a, b, strict=True))
    torch.testing.assert_close(exact[0], hand)


def test_feature_distance_of_unusual_tensors(kernel_backend: str) -> None:
    a = [normal(2, 3, 4, 4, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()]
    b = [normal(2, 3, 4, 8, seed=1, dtype=torch.float32)[..., ::2]]
    torch.testing.assert_close(fastgen.feature_distance(a, b), (a[0] - b[0]).abs().mean())
    empty = fastgen.feature_distance([a[0][:0]], [b[0][:0]])
    assert empty.item() == 0
    target = b[0].clone().requires_grad_()
    fastgen.feature_distance(a, [target]).backward()
    assert target.grad is None


# As they lie in memory: in pieces of many rows, of a part of a row, of none; a divisor of 32 alone; expanded targets.
LAYOUTS: dict[str, Any] = {
    "many rows": lambda: (normal(64, 2, 64), normal(64, 2, 64, seed=1)),
    "parts of rows": lambda: (normal(2, 3, 64, 64), normal(2, 3, 64, 64, seed=1)),
    "channels last": lambda: [normal(2, 32, 16, 8, seed=i).to(memory_format=torch.channels_last) for i in range(2)],
    "odd": lambda: (normal(3, 4001), normal(3, 4001, seed=1)),
    "one long row": lambda: (normal(1, 96 * 1024), normal(1, 96 * 1024, seed=1)),
    "gaps": lambda: (normal(4, 5, 2048)[:, 1:], normal(4, 5, 2048, seed=1)[:, :4]),
    "one target": lambda: (normal(4, 2048), normal(1, 2048, seed=1).expand(4, -1)),
    "turned": lambda: (normal(64, 64, 4).transpose(1, 2), normal(64, 4, 64, seed=1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_feature_distance_of_layouts(layout: str, dtype: torch.dtype, kernel_backend: str) -> None:
    a, b = (t.to(dtype) for t in LAYOUTS[layout]())

    def run(module: Any, *pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return value_and_grad(lambda x: 3.0 * module.feature_distance([x], [pair[1]], [0.7]), pair[0])

    actual, eager, exact = run(fastgen, a, b), run(reference, a, b), run(reference, a.double(), b.double())
    assert_accurate(actual[0], eager[0], exact[0])
    assert_accurate(actual[1], eager[1], exact[1])
    for wrong in (torch.zeros_like(actual[1]), -actual[1]):
        with pytest.raises(AssertionError):
            assert_accurate(wrong, eager[1], exact[1])


def test_feature_distance_gives_its_gradient_any_number_of_times(kernel_backend: str) -> None:
    a = [normal(4, 32, 32, seed=i, dtype=torch.float32).to(d) for i, d in enumerate(DTYPES)]
    b = [normal(4, 32, 32, seed=9, dtype=torch.float32) for _ in a]
    leaves = [t.requires_grad_(i != 1) for i, t in enumerate(a)]
    wanted = [t for t in leaves if t.requires_grad]
    loss = fastgen.feature_distance(leaves, b)
    expected = [torch.sign(x.double() - y) / x.numel() for x, y in zip(a, b, strict=True) if x.requires_grad]
    for scale in (1.0, 0.25, 1.0):  # powers of two: exact in every dtype but float16, whose smallest numbers are few
        grads = torch.autograd.grad(loss * scale, wanted, retain_graph=True)
        for grad, leaf, exact in zip(grads, wanted, expected, strict=True):
            assert grad.dtype == leaf.dtype
            torch.testing.assert_close(
                grad.double(), scale * exact, rtol=1e-3 if leaf.dtype == torch.float16 else 0, atol=0
            )
    with torch.no_grad():
        torch.testing.assert_close(fastgen.feature_distance(a, b), loss)
    torch.autograd.backward(torch.stack([loss, loss]).sum())
    assert leaves[1].grad is None


def test_feature_distance_is_the_same_for_any_number_of_threads(device: str) -> None:
    a, b = (normal(6, 3, 64, 64, seed=s, dtype=torch.float32).to(device) for s in range(2))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(value_and_grad(lambda x: fastgen.feature_distance([x, x[:, 1:]], [b, b[:, 1:]]), a))
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])
