"""Arguments that get no gradient, and results that do not pretend to have one, alike on every backend."""

import warnings

import pytest
import torch

import fastgen
from fastgen.cases import CASES

# One case for each set of inputs of a function; what runs in place refuses them all.
DISTINCT = {(case.function, *case.roles): name for name, case in CASES.items() if not case.function.endswith("_")}


@pytest.mark.parametrize("name", DISTINCT.values())
def test_only_the_documented_arguments_get_gradients(name, backend, device):
    case = CASES[name]
    tensors = case.inputs((2, 2, 6), device=device)
    others = {n: t.requires_grad_() for n, t in tensors.items() if t.is_floating_point()}
    inputs = [others.pop(n) for n in case.differentiable]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*autograd kernel was not registered")
        if inputs:
            case(fastgen, **tensors).square().sum().backward()
        assert not case(fastgen, **{**tensors, **{n: tensors[n].detach() for n in case.differentiable}}).requires_grad
    assert all(t.grad is not None and bool(t.grad.any()) for t in inputs)
    assert [n for n, t in others.items() if t.grad is not None] == []


def test_coefficients_of_a_reverse_step_get_gradients(backend, device):
    """For those who train a sampler: as soon as any input requires a gradient, plain PyTorch computes the step."""
    x, pred, uncond, noise = (torch.randn(4, 3, device=device) for _ in range(4))
    k = [(torch.rand(4, device=device) + 0.5).requires_grad_() for _ in range(6)]
    scale = torch.rand(4, device=device).requires_grad_()
    step = fastgen.StepCoefficients(*k)
    fastgen.reverse_step(x, pred, step, uncond=uncond, guidance_scale=scale, noise=noise).sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in (*k, scale))
    with pytest.raises(RuntimeError, match="reverse_step_ has no derivative"):
        fastgen.reverse_step_(x, pred, step)
