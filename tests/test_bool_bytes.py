"""Bool tensors whose bytes are any number: a view of other data may hold more than 0 and 1. All but 0 is true."""

import importlib

import pytest
import torch
from oracle import value_and_grad

import fastgen


def loosely(flags):
    """The same flags, with bytes other than 1 for true."""
    odd = torch.tensor([255, 2, 128, 254, 1], dtype=torch.uint8, device=flags.device)
    places = torch.arange(flags.numel(), device=flags.device).reshape(flags.shape)
    return torch.where(flags, odd[places % 5], 0).to(torch.uint8).view(torch.bool)


def images(device):
    return torch.randn(4, 6, 37, device=device).unbind()


def ddo(device, reduction):
    p, q, y, _ = images(device)
    return p, lambda x, flags: fastgen.ddo_loss(x, q, y, flags, alpha=3.0, beta=0.2, reduction=reduction)


def sequence_ddo(device, reduction):
    logits, ref = torch.randn(2, 6, 5, 11, device=device).unbind()
    tokens = torch.randint(11, (6, 5), device=device)
    return logits, lambda x, flags: fastgen.sequence_ddo_loss(x, ref, tokens, flags, alpha=3.0, reduction=reduction)


def sequence_ddo_mask(device, reduction):
    logits, ref = torch.randn(2, 6, 5, 11, device=device).unbind()
    tokens, real = torch.randint(11, (6, 5), device=device), torch.arange(6, device=device) % 2 == 0
    return logits, lambda x, flags: fastgen.sequence_ddo_loss(x, ref, tokens, real, mask=flags, reduction=reduction)


def dmd(device, reduction, **options):
    p, q, y, z = images(device)
    a = torch.full((6,), 0.6, device=device)
    return p, lambda x, flags: fastgen.dmd_loss(
        x, q, y, z, alpha_t=a, sigma_t=a + 0.2, mask=flags, reduction=reduction, **options
    )


def weighted_dmd(device, reduction):
    return dmd(device, reduction, weight=torch.rand(6, 37, device=device))


def decoupled_dmd(device, reduction):
    p, q, y, z = images(device)
    a = torch.full((6,), 0.6, device=device)
    pair = fastgen.ScorePair(q, a, a + 0.2, y, z)
    return p, lambda x, flags: fastgen.decoupled_dmd_loss(
        x, pair, pair, guidance_scale=2.0, mask=flags, reduction=reduction
    )


CASES = {
    "ddo is_real": (ddo, (6,)),
    "sequence ddo is_real": (sequence_ddo, (6,)),
    "sequence ddo mask": (sequence_ddo_mask, (6, 5)),
    "dmd mask": (dmd, (6, 37)),
    "dmd mask for all rows": (dmd, (1, 37)),
    "dmd mask and weight map": (weighted_dmd, (6, 37)),
    "decoupled dmd mask": (decoupled_dmd, (6, 37)),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES)
def test_every_byte_but_0_is_true(case, reduction, backend, device):
    make, shape = CASES[case]
    x, f = make(device, reduction)
    flags = torch.rand(shape, device=device) < 0.6
    flags.view(-1)[:2] = torch.tensor([True, False], device=device)
    assert loosely(flags).view(torch.uint8).max() > 1
    seed = torch.rand(6, device=device) if reduction == "none" else None
    expected = value_and_grad(lambda x: f(x, flags), x, seed)
    actual = value_and_grad(lambda x: f(x, loosely(flags)), x, seed)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_many_flags_are_counted_by_their_truth(backend, device, monkeypatch):
    """More than one kernel would count by itself; each row of an interpreted one takes long."""
    count = 5000
    if backend == "triton" and device == "cpu":
        count = 50
        monkeypatch.setattr(importlib.import_module("fastgen.triton_kernels.elbo"), "COUNTED_IN_KERNEL", 40)
    p, q, y = torch.randn(3, count, 2, device=device).unbind()
    flags = torch.rand(count, device=device) < 0.3
    assert torch.equal(fastgen.ddo_loss(p, q, y, loosely(flags)), fastgen.ddo_loss(p, q, y, flags))
