"""One tensor in several places of a call: eager and compiled, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import fastgen

DDGAN = fastgen.NoiseSchedule.ddgan(4)
K = fastgen.step_coefficients(fastgen.NoiseSchedule.linear(10), 3, 5, device=DEVICE)
T, HALF = torch.tensor([1, 2], device=DEVICE), torch.full((2,), 0.5, device=DEVICE)

CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_noise": lambda a, b: fastgen.add_noise(a, a, HALF, HALF),
    "add_noise, coefficients": lambda a, b: fastgen.add_noise(a, b, HALF, HALF),
    "prediction_to_x0": lambda a, b: fastgen.prediction_to_x0(a, a, HALF, HALF),
    "diffuse_pair": lambda a, b: fastgen.diffuse_pair(DDGAN, a, T, noise=(b, b))[1],
    "diffuse_pair, all": lambda a, b: fastgen.diffuse_pair(DDGAN, a, T, noise=(a, a))[1],
    "guidance": lambda a, b: fastgen.guidance(a, a, HALF),
    "posterior_sample": lambda a, b: fastgen.posterior_sample(DDGAN, a, b, T, noise=b),
    "posterior_sample, all": lambda a, b: fastgen.posterior_sample(DDGAN, a, a, T, noise=a),
    "reverse_step": lambda a, b: fastgen.reverse_step(a, a, K, uncond=a, guidance_scale=HALF, noise=a),
    "langevin_step": lambda a, b: fastgen.langevin_step(a, a, HALF, HALF, noise=a),
    "langevin_step_": lambda a, b: fastgen.langevin_step_(a.detach().clone(), b, HALF, HALF, noise=b),
    "fake_score_loss": lambda a, b: fastgen.fake_score_loss(a, b, b, HALF, HALF, weight=HALF),
    "feature_distance": lambda a, b: fastgen.feature_distance([a, a], [b, b]),
    "feature_distance, both": lambda a, b: fastgen.feature_distance([a, b], [b, a]),
    "joint_energy_loss": lambda a, b: fastgen.joint_energy_loss(a, T, a),
}


@pytest.mark.parametrize("leaves", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_with_one_tensor_twice(name: str, leaves: tuple[bool, bool], kernel_backend: str) -> None:
    if kernel_backend == "triton" and leaves != (True, True):
        pytest.skip("the arguments of a Function are one and the same on every backend")
    torch._dynamo.reset()
    a, b = (torch.randn(2, 3, device=DEVICE).requires_grad_(leaf) for leaf in leaves)

    def run(f: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor | None]:
        out = f(a, b)
        wanted = [t for t in (a, b) if t.requires_grad]
        grads = torch.autograd.grad(out.sum(), wanted, allow_unused=True) if out.requires_grad else ()
        return [out, *grads]

    expected = run(CALLS[name])
    for got, value in zip(run(torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")), expected, strict=True):
        if value is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, value)
