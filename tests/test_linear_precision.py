"""Half-precision heads: what float32 logits keep, what float16 can hold, and what the products cost."""

import pytest
import sequences
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from benchmarks.logits_rounding import NOISES, study
from fastgen import reference
from fastgen.sequence import head, layout

backend, kernel_backend = sequences.backend, sequences.kernel_backend

HALF = [torch.bfloat16, torch.float16]
EXACT, OURS, ROUNDED = "float32 logits, eager", "fastgen", "rounded logits, eager"
SMALL = {"rows": 16, "width": 96, "vocabulary": 300}


def within_bar(mine, exact):
    """At most twice the error of exact logits in float32.

    Of one number these may have more digits by luck: some roundings are allowed, of logits and of what they differ by.
    """
    eps = torch.finfo(torch.float32).eps
    return (
        mine.value <= 2 * exact.value + 4 * eps / mine.noise
        and mine.hidden <= 2 * exact.hidden
        and mine.weight <= 2 * exact.weight
        and mine.logprob <= 2 * exact.logprob + 8 * eps
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_losses_and_gradients_are_as_accurate_as_of_float32_logits(dtype, beta, kernel_backend, device):
    scale = 65536.0 if dtype == torch.float16 else 1.0
    options = {"beta": beta, "dtype": dtype, "loss_scale": scale, "device": device, **SMALL}
    for noise in NOISES:
        exact, ours, rounded = study((noise,), (EXACT, OURS, ROUNDED), **options)
        assert within_bar(ours, exact), (ours, exact)
        assert not within_bar(rounded, exact), (rounded, exact)


def test_a_float16_gradient_whose_sum_over_tokens_exceeds_float16_is_right(backend, device):
    """65504 is float16's largest number: the sum over tokens is past it, their mean is not."""
    torch.manual_seed(0)
    rows, width, vocabulary = 64, 16, 40
    hidden, teacher = (torch.randn(rows, width) for _ in range(2))
    weight, other = (torch.randn(vocabulary, width) / 4 for _ in range(2))
    hidden[:, 0], weight[:, 0] = 16_000, 0
    teacher[:, 0], other[0, 0] = 1, 6  # the teacher prefers token 0
    tensors = [t.to(device, torch.float16) for t in (hidden, weight, teacher, other)]
    exact, actual = [t.double() for t in tensors], tensors
    tokens = torch.zeros(rows, dtype=torch.int64, device=device)
    for f in (
        lambda m, h, w, t, v: m.linear_generalized_jsd_loss(h, w, t, v, beta=0.0),
        lambda m, h, w, t, v: -m.linear_token_logprob(h, w, tokens).mean(),
    ):
        grads = []
        for module, given in ((reference, exact), (fastgen, actual)):
            h, w = (t.clone().requires_grad_() for t in given[:2])
            grads.append(torch.autograd.grad(f(module, h, w, *given[2:]), w)[0].double())
        assert (grads[1] - grads[0]).norm() / grads[0].norm() < 1e-3
    assert grads[0].abs().max() * rows > 2 * 65504


def test_a_loss_scale_keeps_float16_gradients_from_underflow(backend, device):
    """The elements of the logits' gradient are below 6e-8, the smallest that float16 has."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 16), torch.randn(3000, 16) / 8
    teacher, other = hidden + 0.01 * torch.randn(4, 16), weight + 0.01 * torch.randn(3000, 16) / 8
    tensors = [t.to(device, torch.float16) for t in (hidden, weight, teacher, other)]
    grads = []
    for module, given in ((reference, [t.double() for t in tensors]), (fastgen, tensors)):
        h, w = (t.clone().requires_grad_() for t in given[:2])
        loss = module.linear_generalized_jsd_loss(h, w, *given[2:])
        seed = torch.tensor(65536.0, device=device, dtype=loss.dtype)
        grads.append(torch.autograd.grad(loss, (h, w), seed))
    for exact, mine in zip(*grads, strict=True):
        assert (mine.double() - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_row_that_is_not_finite_leaves_the_others_alone(dtype, kernel_backend, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, device=device, dtype=dtype), torch.randn(30, 8, device=device, dtype=dtype)
    teacher = hidden + 0.1
    for bad in (float("nan"), float("inf")):
        broken = hidden.clone()
        broken[2, 3] = bad
        grads = []
        for given in (hidden, broken):
            h = given.clone().requires_grad_()
            fastgen.linear_generalized_jsd_loss(h, weight, teacher, weight, reduction="sum").backward()
            grads.append(h.grad)
        others = [0, 1, 3, 4]
        torch.testing.assert_close(grads[1][others], grads[0][others], rtol=2e-3, atol=1e-5)
        assert grads[1][2].isnan().any()


@pytest.mark.parametrize("largest", [1e-38, 1e-30, 1e-9, 1.0, 3e4, 1e30, 0.0], ids=str)
def test_a_float16_operand_is_scaled_to_the_range_that_float16_has(largest):
    grad = largest * torch.tensor([[1.0, -0.5], [0.25, 1e-3]])
    half, factor = head.narrowed(grad.clone(), torch.float16)
    assert half.dtype == torch.float16
    assert half.isfinite().all()
    assert factor.isfinite()
    assert factor > 0
    assert torch.frexp(factor).mantissa == 0.5  # a power of two
    if largest > 1e-30:
        torch.testing.assert_close(half.double() * factor.double(), grad.double(), rtol=2**-11, atol=0)


def test_rounded_logits_are_an_option(backend, device):
    tensors = [torch.randn(n, 8, device=device).bfloat16() for n in (6, 30, 6, 30)]
    tokens = torch.randint(30, (6,), device=device)
    for f in (
        lambda m, h, w, t, v, **o: m.linear_generalized_jsd_loss(h, w, t, v, **o),
        lambda m, h, w, t, v, **o: m.linear_token_logprob(h, w, tokens, **o).sum(),
    ):
        values = {o: f(fastgen, *tensors, round_logits=o) for o in (False, True)}
        torch.testing.assert_close(values[True], f(reference, *tensors, round_logits=True), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values[False], f(reference, *tensors), rtol=1e-5, atol=1e-6)
        assert values[True] != values[False]
        with torch.autocast(device, dtype=torch.bfloat16):
            wide = [t.float() for t in tensors]
            assert {o: f(fastgen, *wide, round_logits=o) for o in (False, True)} == values


def test_rounded_float16_logits_are_refused():
    h, w = torch.zeros(2, 3), torch.zeros(4, 3)
    for hidden, weight in ((h.half(), w.half()), (h, w)):
        with (
            torch.autocast("cpu", dtype=torch.float16, enabled=hidden is h),
            pytest.raises(ValueError, match="round_logits must be False where student_hidden is float16"),
        ):
            fastgen.linear_generalized_jsd_loss(hidden, weight, hidden, weight, round_logits=True)
    with pytest.raises(ValueError, match="round_logits must be False where hidden is float16"):
        fastgen.linear_token_logprob(h.half(), w.half(), torch.zeros(2, dtype=torch.int64), round_logits=True)
    with pytest.raises(TypeError, match="round_logits must be a bool, got dtype"):
        fastgen.linear_generalized_jsd_loss(h, w, h, w, round_logits=torch.bfloat16)


class Products(TorchDispatchMode):
    """Records matrix products and the bytes of the largest tensor made; stands in for a GPU's mixed product."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.dtype:
            a, b, dtype = args
            out = a.to(dtype) @ b.to(dtype)
        else:
            out = func(*args, **(kwargs or {}))
        given = [t for t in args if isinstance(t, torch.Tensor)]
        if "mm" in func.overloadpacket.__name__:
            self.products.add((str(func), *(t.dtype for t in given), out.dtype))
        memory = {t.untyped_storage().data_ptr() for t in given}
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in memory:
                self.largest = max(self.largest, t.nbytes)
        return out


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["as-on-a-gpu", "by-copies"])
def test_products_sum_in_float32_and_copy_a_part_of_the_weight_at_a_time(mixed, dtype, monkeypatch):
    monkeypatch.setattr(head, "has_mixed_products", lambda device: mixed)
    rows, width, vocabulary, budget = 48, 64, 3000, 1 << 18
    tensors = [torch.randn(n, width) / 8 for n in (rows, vocabulary, rows, vocabulary)]
    bias, tokens = torch.randn(vocabulary), torch.randint(vocabulary, (rows,))
    h, w, t, v, b = (x.to(dtype) for x in (*tensors, bias))
    h.requires_grad_(), b.requires_grad_()
    losses = {
        fastgen.linear_generalized_jsd_loss: lambda m, h, b, **o: m.linear_generalized_jsd_loss(
            h, w.to(h.dtype), t.to(h.dtype), v.to(h.dtype), student_bias=b, reduction="sum", **o
        ),
        fastgen.linear_token_logprob: lambda m, h, b, **o: m.linear_token_logprob(
            h, w.to(h.dtype), tokens, bias=b, **o
        ).sum(),
    }
    for loss in losses.values():
        with Products() as seen:
            value = loss(fastgen, h, b, max_chunk_bytes=budget)
            actual = value, *torch.autograd.grad(value, (h, b))
        products = {("aten.mm.dtype", dtype, dtype, torch.float32)}
        assert seen.products == (products if mixed else {("aten.mm.default", *[torch.float32] * 3)})
        assert seen.largest <= budget < w.numel() * 4
        wide = h.detach().double().requires_grad_(), b.detach().double().requires_grad_()
        value = loss(reference, *wide)
        for mine, exact in zip(actual, (value, *torch.autograd.grad(value, wide)), strict=True):
            assert (mine.double() - exact).norm() / exact.norm() < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_torch_has_a_mixed_product_for_gpus(dtype):
    """Of shapes alone, where there is no GPU."""
    with FakeTensorMode():
        a, b = (torch.empty(shape, device="cuda", dtype=dtype) for shape in ((3, 4), (4, 5)))
        assert head.has_mixed_products(a.device)
        assert not head.has_mixed_products(torch.device("cpu"))
        out = head.product(a, b, torch.float32)
    assert (out.shape, out.dtype) == ((3, 5), torch.float32)


@pytest.mark.parametrize("mixed", [True, False], ids=["as-on-a-gpu", "by-copies"])
def test_the_weight_gradient_is_made_in_parts(mixed, monkeypatch):
    monkeypatch.setattr(head, "has_mixed_products", lambda device: mixed)
    h, w, grad = torch.randn(16, 64).bfloat16(), torch.randn(3000, 64).bfloat16(), torch.randn(16, 3000)
    gradients = head.HeadGradients(layout.Head(h, w, None), (True, True, False), 1 << 16, None)
    expected = grad.bfloat16().float().t() @ h.float()
    with Products() as seen:
        gradients.add(slice(0, 16), grad)
    assert seen.largest <= max(1 << 16, grad.nbytes)
    torch.testing.assert_close(gradients.weight, expected, rtol=1e-5, atol=1e-5)
