"""Arguments that get no gradient, and results that do not pretend to have one, alike on every backend."""

import warnings

import pytest
import torch
from torch import Tensor

import fastgen


def cases(device: str):
    """Per function: a call, the arguments that gradients flow to, those that get none."""
    x, y, z = (torch.randn(4, 3, device=device) for _ in range(3))
    w, a, s = (torch.rand(4, device=device) + 0.1 for _ in range(3))
    real = torch.tensor([True, False, True, False], device=device)
    logits, other = torch.randn(2, 3, 5, device=device), torch.randn(2, 3, 5, device=device)
    hidden, head, bias = (torch.randn(*n, device=device) for n in ((2, 3, 4), (5, 4), (5,)))
    tokens, items = torch.randint(5, (2, 3), device=device), torch.tensor(3.0, device=device)
    of_teacher = {"th": hidden.flip(0), "tw": head.flip(0), "tb": bias.flip(0)}
    return {
        "elbo_error": (lambda p, y, w: fastgen.elbo_error(p, y, weight=w), {"p": x}, {"y": y, "w": w}),
        "elbo_difference": (
            lambda p, q, y, w: fastgen.elbo_difference(p, q, y, weight=w), {"p": x}, {"q": z, "y": y, "w": w}
        ),
        "ddo_loss": (
            lambda p, q, y, w: fastgen.ddo_loss(p, q, y, real, weight=w), {"p": x}, {"q": z, "y": y, "w": w}
        ),
        "diffusion_dpo_loss": (
            lambda p, q, y, w: fastgen.diffusion_dpo_loss(p, q, y, weight=w, beta=5.0),
            {"p": x}, {"q": z, "y": y, "w": w},
        ),
        "add_noise": (fastgen.add_noise, {"x0": x, "noise": y}, {"alpha_t": a, "sigma_t": s}),
        "prediction_to_x0": (fastgen.prediction_to_x0, {"pred": x, "x_t": y}, {"alpha_t": a, "sigma_t": s}),
        "fake_score_loss": (
            fastgen.fake_score_loss, {"pred": z},
            {"x0": x, "noise": y, "alpha_t": a, "sigma_t": s, "weight": w},
        ),
        "sds_loss": (fastgen.sds_loss, {"x": x}, {"pred_cond": y, "noise": z, "weight": w}),
        "vsd_loss": (fastgen.vsd_loss, {"x": x}, {"real_cond": y, "fake": z, "weight": w}),
        "dmd_loss": (
            fastgen.dmd_loss, {"x": x},
            {"x_t": x + 1, "real_cond": y, "fake": z, "alpha_t": a, "sigma_t": s, "weight": w},
        ),
        "sequence_ddo_loss": (
            lambda p, q: fastgen.sequence_ddo_loss(p, q, tokens, real[:2]), {"p": logits}, {"q": other}
        ),
        "generalized_jsd_loss": (
            lambda p, q, n: fastgen.generalized_jsd_loss(p, q, num_items=n), {"p": logits}, {"q": other, "n": items}
        ),
        "linear_generalized_jsd_loss": (
            lambda h, w, b, th, tw, tb: fastgen.linear_generalized_jsd_loss(
                h, w, th, tw, student_bias=b, teacher_bias=tb
            ),
            {"h": hidden, "w": head, "b": bias}, of_teacher,
        ),
        "guidance": (fastgen.guidance, {"cond": x, "uncond": y}, {"scale": w}),
        "feature_distance": (lambda p, q: fastgen.feature_distance([p], [q]), {"p": x}, {"q": y}),
    }  # fmt: skip


def leaves(tensors: dict[str, Tensor], requires_grad: bool) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_(requires_grad) for name, t in tensors.items()}


@pytest.mark.parametrize("name", cases("cpu"))
def test_only_the_documented_arguments_get_gradients(name, backend, device):
    f, differentiable, constant = cases(device)[name]
    inputs, others = leaves(differentiable, True), leaves(constant, True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*autograd kernel was not registered")
        f(**inputs, **others).sum().backward()
        assert not f(**leaves(differentiable, False), **others).requires_grad
    assert [n for n, t in inputs.items() if t.grad is None or not t.grad.any()] == []
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
