"""Derivatives that the kernels do not have are refused, or the reference's: never a silent zero."""

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.autograd import forward_ad, functional

import fastgen
from fastgen import reference
from fastgen.cases import CASES
from fastgen.core import dispatch

SHAPE = (4, 3, 5)
LOSSES = [name for name, case in CASES.items() if case.differentiable]
MESSAGE = "use_backend\\('reference'\\)"


def scalar_of(case, leaves, name):
    """The case as a function of one input, reduced to a number in which every element counts for something else."""

    def f(x):
        value = case(fastgen, **{**leaves, name: x})
        return (value * torch.arange(1, value.numel() + 1, device=value.device).reshape(value.shape)).sum()

    return f


def with_reference(f, *args):
    with fastgen.use_backend("reference"):
        return f(*args)


def right_or_refused(call, exact):
    """The result of `call` is that of the reference, unless it raises the error that says what to do."""
    try:
        actual = call()
    except RuntimeError as error:
        if "use_backend('reference')" in str(error):
            return
        raise
    expected = with_reference(exact)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_right_or_refused(name, kernel_backend):
    case = CASES[name]
    tensors = case.inputs(SHAPE, torch.float64, device=DEVICE)
    for wrt in case.differentiable:
        f, x = scalar_of(case, tensors, wrt), tensors[wrt]

        def twice(f=f, x=x):
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(f(leaf) + 0.5 * leaf.square().sum(), leaf, create_graph=True)
            return torch.autograd.grad(grad.sum(), leaf)[0]

        right_or_refused(twice, twice)
        v = torch.ones_like(x)
        for transform in (functional.hvp, functional.vhp):
            right_or_refused(
                lambda f=f, x=x, t=transform, v=v: t(f, x, v)[1], lambda f=f, x=x, t=transform, v=v: t(f, x, v)[1]
            )


@pytest.mark.parametrize("name", ["ddo_loss", "generalized_jsd_loss-unlabelled", "dmd_loss", "token_logprob"])
def test_hessians_are_refused(name, kernel_backend):
    case = CASES[name]
    tensors = case.inputs((2, 3), device=DEVICE)
    (wrt,) = case.differentiable
    with pytest.raises(RuntimeError, match="once differentiable"):
        functional.hessian(scalar_of(case, tensors, wrt), tensors[wrt])


def test_meta_gradients_are_refused(kernel_backend):
    """One step of an inner loop, differentiated through."""
    case = CASES["ddo_loss"]
    tensors = case.inputs(SHAPE, device=DEVICE)
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    pred = tensors["pred"] * scale
    (grad,) = torch.autograd.grad(case(fastgen, **{**tensors, "pred": pred}), pred, create_graph=True)
    outer = (pred - 0.1 * grad).square().sum()
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(outer, scale)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.differentiable])
def test_forward_mode_derivatives_are_those_of_the_reference(name, kernel_backend):
    case = CASES[name]
    tensors = case.inputs(SHAPE, torch.float64, device=DEVICE)
    wrt = case.differentiable[0]

    def tangent() -> Tensor | None:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(tensors[wrt], torch.ones_like(tensors[wrt]))
            return forward_ad.unpack_dual(case(fastgen, **{**tensors, wrt: dual})).tangent

    actual, expected = tangent(), with_reference(tangent)
    assert actual is not None
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_batched_gradients_are_refused(name, kernel_backend):
    case = CASES[name]
    tensors = case.inputs(SHAPE, torch.float64, device=DEVICE)
    leaves = case.leaves(tensors)
    value = case(fastgen, **leaves)
    grads = torch.stack([torch.ones_like(value), torch.full_like(value, 2.0)])
    inputs = [leaves[n] for n in case.differentiable]

    def batched():
        return torch.autograd.grad(value, inputs, grads, is_grads_batched=True)

    def one_by_one():
        again = case(reference, **leaves)
        rows = [torch.autograd.grad(again, inputs, g, retain_graph=True) for g in grads]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    right_or_refused(batched, one_by_one)


def test_vectorized_jacobians_are_refused(kernel_backend):
    case = CASES["elbo_error"]
    tensors = case.inputs(SHAPE, device=DEVICE)
    with pytest.raises(RuntimeError, match=MESSAGE):
        functional.jacobian(lambda x: case(fastgen, **{**tensors, "pred": x}), tensors["pred"], vectorize=True)


def test_batched_gradients_name_the_way_out(kernel_backend):
    case = CASES["token_logprob"]
    leaves = case.leaves(case.inputs(SHAPE, device=DEVICE))
    value = case(fastgen, **leaves)
    if dispatch.backend_for("token_logprob", DEVICE) == "reference":
        pytest.skip("needs kernels")
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.grad(value, leaves["logits"], torch.stack([value, value]).detach(), is_grads_batched=True)
