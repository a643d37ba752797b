"""ELBO errors, differences and their losses: every backend against float64, by formula, by hand and by identity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, check_case, value_and_grad

import fastgen
from fastgen import reference
from fastgen.cases import CASES, FAMILIES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def streams(shape, dtype=torch.float32, device="cpu", near=0.1):
    pred = torch.randn(shape, device=device)
    ref = pred + near * torch.randn(shape, device=device)
    return pred.to(dtype), ref.to(dtype), torch.randn(shape, device=device).to(dtype)


def flags(n, device="cpu"):
    return (torch.arange(n) % 3 != 1).to(device)


@pytest.mark.parametrize("case", ["elbo_error", "elbo_difference", "ddo_loss", "ddo_loss-mc", "diffusion_dpo_loss"])
@pytest.mark.parametrize("shape", [(2, 70_001), (4, 1), (4, 8), (66, 64), (2, 3, 128, 256)], ids=str)
def test_row_sizes(case, shape, backend, device):
    check_case(CASES[case], CASES[case].inputs(shape, device=device))


@pytest.mark.parametrize("corrupt", [torch.zeros_like, torch.neg, lambda g: g * 1.01], ids=["zero", "sign", "one %"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tolerance_bites(corrupt, dtype):
    p, q, y = streams((6, 50), dtype)
    exact = value_and_grad(lambda x: reference.ddo_loss(x, q.double(), y.double(), flags(6)), p.double())[1]
    eager = value_and_grad(lambda x: reference.ddo_loss(x, q, y, flags(6)), p)[1]
    wrong = corrupt(eager)
    if dtype == torch.bfloat16 and torch.equal(wrong, corrupt(eager)) and corrupt is not torch.zeros_like:
        wrong = wrong * 1.05  # one per cent is within a rounding of bfloat16; six are not
    assert_accurate(eager, eager, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(wrong, eager, exact)


def test_by_hand(backend, device):
    p = torch.tensor([[1.0, 2.0], [0.0, 1.0]], device=device)
    q = torch.tensor([[0.0, 2.0], [1.0, 1.0]], device=device)
    y = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device)
    # |p - y|² = 4, 1 and |q - y|² = 5, 0
    torch.testing.assert_close(fastgen.elbo_error(p, y, element_reduction="sum").cpu(), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(fastgen.elbo_difference(p, q, y).cpu(), torch.tensor([1.0, -1.0]))
    is_real = torch.tensor([True, False], device=device)
    loss, delta = fastgen.ddo_loss(p, q, y, is_real, alpha=3.0, beta=2.0, return_delta=True)
    expected = math.log1p(math.exp(-2)) + 3 * math.log1p(math.exp(-2))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert delta.tolist() == [1.0, -1.0]
    assert not delta.requires_grad
    dpo = fastgen.diffusion_dpo_loss(p, q, y, beta=0.5, element_reduction="sum")
    assert dpo.item() == pytest.approx(math.log1p(math.exp(-0.5 * 0.5 * 2)), rel=1e-6)
    ipo = fastgen.diffusion_dpo_loss(p, q, y, beta=0.5, element_reduction="sum", kind="ipo")
    assert ipo.item() == pytest.approx((2 - 1) ** 2, rel=1e-6)
    hinge = fastgen.diffusion_dpo_loss(p, q, y, beta=0.25, element_reduction="sum", kind="hinge")
    assert hinge.item() == pytest.approx(1 - 0.25 * 2, rel=1e-6)


def test_at_the_reference(backend, device):
    """pred == ref: delta 0, loss (1 + alpha) ln 2, and the gradient that pulls to reals and pushes from fakes."""
    p, _, y = streams((8, 40), device=device)
    is_real = flags(8, device)
    loss, grad = value_and_grad(lambda x: fastgen.ddo_loss(x, p, y, is_real, alpha=2.5, beta=0.3), p)
    assert loss.item() == pytest.approx(3.5 * math.log(2), rel=1e-6)
    n_real = is_real.sum()
    slope = torch.where(is_real, 1 / n_real, -2.5 / (8 - n_real)) * 0.3 * 0.5
    torch.testing.assert_close(grad, 2 * slope[:, None] * (p - y))


def test_mc_samples_average_inside_the_sigmoid(backend, device):
    p, q, y = streams((12, 30), device=device)
    is_real = flags(4, device)
    _, delta = fastgen.ddo_loss(p, q, y, is_real, mc_samples=3, return_delta=True)
    torch.testing.assert_close(delta, fastgen.elbo_difference(p, q, y).view(4, 3).mean(1))
    # Repeating each draw changes nothing.
    one = fastgen.ddo_loss(p, q, y, flags(12, device))
    three = fastgen.ddo_loss(*(t.repeat_interleave(3, 0) for t in (p, q, y)), flags(12, device), mc_samples=3)
    torch.testing.assert_close(three, one)


def test_small_differences_keep_their_digits(kernel_backend, device):
    p = torch.randn(16, 16384, device=device)
    q = p * (1 + 1e-4 * torch.randn_like(p))
    y = torch.randn_like(p)
    exact = reference.elbo_difference(p.double(), q.double(), y.double())
    factored = (fastgen.elbo_difference(p, q, y) - exact).norm()
    subtracted = ((q - y).square().sum(1) - (p - y).square().sum(1) - exact).norm()
    assert factored * 100 < subtracted


def test_half_precision_images_are_summed_in_float32(kernel_backend, device):
    for dtype in (torch.bfloat16, torch.float16):
        p, q, y = streams((6, 500), dtype, device)
        wide = [t.float() for t in (p, q, y)]
        narrow_loss, narrow_grad = value_and_grad(lambda x: fastgen.ddo_loss(x, q, y, flags(6, device)), p)
        wide_loss, wide_grad = value_and_grad(lambda x: fastgen.ddo_loss(x, *wide[1:], flags(6, device)), wide[0])
        assert torch.equal(narrow_loss, wide_loss)
        # The sums are the same to the bit; the gradient is then rounded once.
        torch.testing.assert_close(narrow_grad.float(), wide_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_is_right_for_any_cotangent_any_number_of_times(reduction, kernel_backend, device):
    p, q, y = streams((6, 40), device=device)
    p.requires_grad_()
    loss = fastgen.ddo_loss(p, q, y, flags(6, device), reduction=reduction)
    expected = reference.ddo_loss(p, q, y, flags(6, device), reduction=reduction)
    grads = []
    for scale in (1.0, -3.0, 0.0, 1.0):
        cotangent = torch.full_like(loss, scale)
        grads.append(torch.autograd.grad(loss, p, cotangent, retain_graph=True)[0])
        torch.testing.assert_close(grads[-1], torch.autograd.grad(expected, p, cotangent, retain_graph=True)[0])
    # What was handed out before has not changed since.
    torch.testing.assert_close(grads[0], grads[3])
    assert grads[1].abs().sum() > 0


def test_float16_gradients_survive_a_loss_scale(kernel_backend, device):
    """Gradients that float16 cannot hold at scale 1 come out right at scale 2^16: nothing is rounded before it."""
    p, q, y = streams((64, 8), torch.float16, device, near=1e-2)
    is_real, scale = flags(64, device), 2.0**16

    def scaled(x, *rest):
        return fastgen.ddo_loss(x, *rest, is_real, beta=2e-6) * scale

    _, grad = value_and_grad(lambda x: scaled(x, q, y), p)
    with fastgen.use_backend("reference"):
        _, exact = value_and_grad(lambda x: scaled(x, q.double(), y.double()), p.double())
    rounded_first = (exact / scale).half().double() * scale
    assert (rounded_first - exact).norm() / exact.norm() > 0.02
    assert (grad.double() - exact).norm() / exact.norm() < 1e-3


def test_layouts_are_read_in_place_and_kept(kernel_backend, device):
    p, q, y = streams((4, 3, 6, 5), device=device)
    base, base_grad = value_and_grad(lambda x: fastgen.ddo_loss(x, q, y, flags(4, device)), p)
    for arrange in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda t: torch.stack([t, t], 1)[:, 0],
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        pa, qa, ya = arrange(p), arrange(q), arrange(y)
        leaf = pa.detach().requires_grad_()
        loss = fastgen.ddo_loss(leaf, qa, ya, flags(4, device))
        (grad,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(loss, base)
        torch.testing.assert_close(grad, base_grad)
        assert grad.stride()[1:] == pa.stride()[1:]
    # One stream in another layout: copied, and right.
    mixed = fastgen.ddo_loss(p, q.to(memory_format=torch.channels_last), y, flags(4, device))
    torch.testing.assert_close(mixed, base)
    # Noise shared by all rows, as an expanded tensor.
    shared = torch.randn(1, 3, 6, 5, device=device).expand(4, -1, -1, -1)
    torch.testing.assert_close(fastgen.elbo_error(p, shared), reference.elbo_error(p, shared.contiguous()))


def test_dtypes_may_differ(kernel_backend, device):
    for dtypes in ((torch.bfloat16, torch.bfloat16, torch.float32), (torch.float16, torch.float32, torch.bfloat16)):
        tensors = CASES["ddo_loss"].inputs((4, 33), *dtypes, device=device)
        actual = check_case(CASES["ddo_loss"], tensors | {"weight": tensors["weight"].double()})
        assert actual["value"].dtype == torch.float32
        assert actual["gradient of pred"].dtype == dtypes[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batches_and_empty_groups(reduction, backend, device):
    empty = torch.zeros(0, 5, device=device, requires_grad=True)
    for loss in (
        fastgen.ddo_loss(empty, empty, empty, torch.zeros(0, dtype=torch.bool, device=device), reduction=reduction),
        fastgen.diffusion_dpo_loss(empty, empty, empty, reduction=reduction),
    ):
        assert loss.sum().item() == 0
        assert torch.autograd.grad(loss.sum(), empty)[0].shape == (0, 5)
    assert fastgen.elbo_error(empty, empty).shape == (0,)
    p, q, y = streams((3, 5), device=device)
    for value in (True, False):
        is_real = torch.full((3,), value, device=device)
        loss, grad = value_and_grad(lambda x, r=is_real: fastgen.ddo_loss(x, q, y, r, reduction=reduction), p)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_stay_alone(bad, backend, device):
    p, q, y = streams((6, 50), device=device)
    clean = value_and_grad(lambda x: fastgen.ddo_loss(x, q, y, flags(6, device), reduction="none"), p)
    dirty_p = p.clone()
    dirty_p[2, 7] = bad
    value, grad = value_and_grad(lambda x: fastgen.ddo_loss(x, q, y, flags(6, device), reduction="none"), dirty_p)
    others = torch.arange(6, device=device) != 2
    assert torch.equal(value[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])
    assert not grad[2].isfinite().all()
    mean_loss, mean_grad = value_and_grad(lambda x: fastgen.ddo_loss(x, q, y, flags(6, device)), dirty_p)
    assert mean_grad[others].isfinite().all()
    if math.isnan(bad):
        assert mean_loss.isnan()
        assert value[2].isnan()


def test_extreme_logits_stay_finite(backend, device):
    p, q, y = streams((6, 50), device=device, near=1.0)
    for beta in (1e-8, 1e6):
        loss, grad = value_and_grad(lambda x, b=beta: fastgen.ddo_loss(x, q, y, flags(6, device), beta=b), p)
        assert loss.isfinite()
        assert grad.isfinite().all()


P = torch.zeros(4, 3)
W = torch.ones(4)
R = torch.ones(4, dtype=torch.bool)
BAD_CALLS = {
    r"alpha must have shape \[4\]": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, alpha=torch.ones(3))),
    "alpha must be float32 or float64": (TypeError, lambda: fastgen.ddo_loss(P, P, P, R, alpha=torch.ones(4).half())),
    "return_delta and return_errors exclude": (
        ValueError,
        lambda: fastgen.diffusion_dpo_loss(P, P, P, return_delta=True, return_errors=True),
    ),
    "pred must be a torch.Tensor": (TypeError, lambda: fastgen.ddo_loss([1.0], P, P, R)),
    "pred must be float32": (TypeError, lambda: fastgen.ddo_loss(P.int(), P, P, R)),
    "target must be float32": (TypeError, lambda: fastgen.elbo_error(P, P.to(torch.complex64))),
    "ref_pred has shape": (ValueError, lambda: fastgen.ddo_loss(P, P[:2], P, R)),
    "target has shape": (ValueError, lambda: fastgen.elbo_difference(P, P, P[:, :2])),
    "target is on meta": (ValueError, lambda: fastgen.elbo_error(P, P.to("meta"))),
    "must have a batch dimension": (ValueError, lambda: fastgen.elbo_error(P[0, 0], P[0, 0])),
    "rows of no elements": (ValueError, lambda: fastgen.elbo_error(P[:, :0], P[:, :0])),
    "is_real must be a bool": (TypeError, lambda: fastgen.ddo_loss(P, P, P, R.float())),
    "is_real must be a torch.Tensor": (TypeError, lambda: fastgen.ddo_loss(P, P, P, [True] * 4)),
    r"is_real must have shape \[4\]": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R[:3])),
    r"is_real must have shape \[2\]": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, mc_samples=2)),
    "is_real is on": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R.to("meta"))),
    "weight must be float32": (TypeError, lambda: fastgen.ddo_loss(P, P, P, R, weight=W.bfloat16())),
    r"weight must have shape \[4\]": (ValueError, lambda: fastgen.elbo_error(P, P, weight=W[:, None])),
    "alpha must be >= 0": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, alpha=-1.0)),
    "alpha must be finite": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, alpha=math.nan)),
    "alpha must be a number": (TypeError, lambda: fastgen.ddo_loss(P, P, P, R, alpha="1")),
    "beta must be > 0": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, beta=0.0)),
    "beta must be finite": (ValueError, lambda: fastgen.diffusion_dpo_loss(P, P, P, beta=math.inf)),
    "mc_samples = 3 does not divide": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, mc_samples=3)),
    "mc_samples must be at least 1": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, mc_samples=0)),
    "mc_samples must be an int": (TypeError, lambda: fastgen.ddo_loss(P, P, P, R, mc_samples=2.0)),
    "reduction must be one of": (ValueError, lambda: fastgen.ddo_loss(P, P, P, R, reduction="avg")),
    "element_reduction must be one of": (ValueError, lambda: fastgen.elbo_error(P, P, element_reduction="none")),
    "loss must be one of": (ValueError, lambda: fastgen.elbo_error(P, P, loss="l3")),
    "kind must be one of": (ValueError, lambda: fastgen.diffusion_dpo_loss(P, P, P, kind="kto")),
    "as many losers": (ValueError, lambda: fastgen.diffusion_dpo_loss(P[:3], P[:3], P[:3])),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()


def arrange(t, layout):
    if layout == "slice":
        return torch.stack([t, -t], 1)[:, 0]
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "shared":
        return t[:1].expand_as(t)
    return t


@given(
    rows=st.integers(0, 3),
    inner=st.lists(st.integers(1, 9), max_size=3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.sampled_from(["plain", "slice", "channels_last", "shared"])] * 3),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    case=st.sampled_from(FAMILIES["elbo"][:-1]),
)
@settings(max_examples=60)
def test_any_shape_dtype_and_layout(rows, inner, dtypes, layouts, scale, case, kernel_backend, device):
    shape = (2 * rows, *inner)
    tensors = case.inputs(shape, device=device)
    streams = [name for name in ("pred", "ref_pred", "target") if name in tensors]
    for name, dtype, layout in zip(streams, dtypes, layouts, strict=False):
        tensors[name] = arrange((scale * tensors[name]).to(dtype), layout)
    check_case(case, tensors, f"{shape} {dtypes} {layouts} {scale}")


@pytest.mark.parametrize("case", [c for c in FAMILIES["elbo"] if c.name != "elbo_error-l1"], ids=lambda c: c.name)
def test_gradcheck_of_the_references(case):
    tensors = case.inputs((4, 6), torch.float64)
    for module in (reference, fastgen):
        assert torch.autograd.gradcheck(
            lambda x, m=module: case(m, **tensors | {"pred": x}), tensors["pred"].requires_grad_()
        )


def test_kto_by_hand(backend, device):
    p = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 1.0]], device=device)
    q = torch.tensor([[0.0, 2.0], [1.0, 1.0], [1.0, 3.0]], device=device)
    y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]], device=device)
    liked = torch.tensor([True, False, True], device=device)
    # |p - y|² = 4, 1, 1 and |q - y|² = 5, 0, 9: the differences are 1, -1, 8, and their mean is 8/3
    options = {"beta": 0.5, "desirable_weight": 3.0, "undesirable_weight": 2.0, "element_reduction": "sum"}

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def expected(z):
        return [3 * sigmoid(-0.5 * (1 - z)), 2 * sigmoid(0.5 * (-1 - z)), 3 * sigmoid(-0.5 * (8 - z))]

    given = fastgen.diffusion_kto_loss(p, q, y, liked, baseline=0.25, reduction="none", **options)
    torch.testing.assert_close(given.cpu(), torch.tensor(expected(0.25)))
    own = fastgen.diffusion_kto_loss(p, q, y, liked, **options)
    assert own.item() == pytest.approx(sum(expected(8 / 3)) / 3, rel=1e-6)
    # The mean difference of the others' order is negative, for which the baseline is 0.
    swapped = fastgen.diffusion_kto_loss(q, p, y, liked, reduction="sum", **options)
    negated = [3 * sigmoid(-0.5 * -1), 2 * sigmoid(0.5 * 1), 3 * sigmoid(-0.5 * -8)]
    assert swapped.item() == pytest.approx(sum(negated), rel=1e-6)
    # d/dp of w (1 - sigmoid(±beta (delta - z))), z without a gradient.
    _, grad = value_and_grad(lambda x: fastgen.diffusion_kto_loss(x, q, y, liked, reduction="sum", **options), p)
    rates = [0.5 * 3, -0.5 * 2, 0.5 * 3]
    slopes = [
        r * sigmoid(0.5 * (d - 8 / 3)) * sigmoid(-0.5 * (d - 8 / 3)) for r, d in zip(rates, (1, -1, 8), strict=True)
    ]
    torch.testing.assert_close(grad, 2 * torch.tensor(slopes, device=device)[:, None] * (p - y))


def test_alpha_of_each_image(backend, device):
    p, q, y = streams((6, 40), device=device)
    is_real = flags(6, device)
    alphas = torch.tensor([9.0, 0.0, 9.0, 9.0, 2.0, 9.0], device=device)  # of the fakes, 1 and 4
    loss, grad = value_and_grad(lambda x: fastgen.ddo_loss(x, q, y, is_real, alpha=alphas), p)
    both = fastgen.ddo_loss(p, q, y, is_real, reduction="none", alpha=1.0)
    torch.testing.assert_close(loss, both[is_real].mean() + 2 * both[4] / 2)
    assert not grad[1].any()
    alike = fastgen.ddo_loss(p, q, y, is_real, alpha=torch.full_like(alphas, 2.5))
    torch.testing.assert_close(alike, fastgen.ddo_loss(p, q, y, is_real, alpha=2.5))
    images = flags(3, device)
    several = fastgen.ddo_loss(p, q, y, images, alpha=alphas[:3].double(), mc_samples=2, reduction="none")
    torch.testing.assert_close(several[1].item(), 0.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_interleaved_pairs(reduction, backend, device):
    p, q, y = streams((6, 40), device=device)
    weight = torch.linspace(0.5, 1, 6, device=device)
    order = torch.tensor([0, 2, 4, 1, 3, 5], device=device)

    def loss(x, pick=slice(None), **options):
        given = (t[pick] for t in (x, q, y))
        return fastgen.diffusion_dpo_loss(*given, weight=weight[pick], beta=3.0, reduction=reduction, **options)

    mine, theirs = value_and_grad(lambda x: loss(x, interleaved=True), p), value_and_grad(lambda x: loss(x, order), p)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_of_a_preference(backend, device):
    p = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0], [3.0, 1.0]], device=device)
    q, y = torch.ones(4, 2, device=device), torch.zeros(4, 2, device=device)
    loss, errors = fastgen.diffusion_dpo_loss(p.requires_grad_(), q, y, beta=2.0, return_errors=True)
    assert errors.error.tolist() == [2.5, 0.5, 0.5, 5.0]
    assert errors.ref_error.tolist() == [1.0] * 4
    assert errors.margin.tolist() == [-2.0, 4.5]  # (1 - 2.5) - (1 - 0.5) and (1 - 0.5) - (1 - 5)
    assert errors.accuracy.item() == 0.5
    assert not any(t.requires_grad for t in errors)
    torch.testing.assert_close(loss, fastgen.diffusion_dpo_loss(p, q, y, beta=2.0))


def test_mapo_by_hand(backend, device):
    p = torch.tensor([[1.0, 2.0], [0.0, 1.0]], device=device)
    y = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device)
    options = {"beta": 0.3, "scale": 0.5, "timesteps": 2, "element_reduction": "sum"}
    f_winner, f_loser = 2 / math.expm1(2), 0.5 / math.expm1(0.5)  # of errors 4 and 1
    x = 2 * (f_loser - f_winner)
    loss, grad = value_and_grad(lambda t: fastgen.mapo_loss(t, y, **options), p)
    assert loss.item() == pytest.approx(4 + 0.3 * math.log1p(math.exp(x)), rel=1e-6)
    rate = 0.3 / (1 + math.exp(-x)) * 2 * 0.5
    falls = [(math.expm1(v) - v * math.exp(v)) / math.expm1(v) ** 2 for v in (2, 0.5)]
    slopes = torch.tensor([1 - rate * falls[0], rate * falls[1]], device=device)
    torch.testing.assert_close(grad, 2 * slopes[:, None] * (p - y))


def test_mapo_keeps_the_digits_of_small_errors(backend, device):
    """x / expm1(x), as the published code has it, is 1 for float32 where errors are small, and has no slope."""
    p, y = 1e-3 * torch.randn(6, 64, device=device), torch.zeros(6, 64, device=device)
    loss, grad = value_and_grad(lambda x: fastgen.mapo_loss(x, y, timesteps=10**6), p)
    error = p.double().square().mean(1)
    winner, loser = error.chunk(2)
    # f(x) is 1 - x/2 + x²/12 - x⁴/720 …
    logit = 10**6 * (0.25 * (loser - winner) + 0.25 / 12 * (winner.square() - loser.square()))
    expected = (winner - 0.1 * torch.nn.functional.logsigmoid(logit)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    rate = 0.1 * torch.sigmoid(-logit) * 10**6 * 0.5
    slopes = torch.cat([1 - rate * (-0.5 + winner / 12), rate * (-0.5 + loser / 12)]) / 3
    torch.testing.assert_close(grad.double(), slopes[:, None] * 2 * p.double() / 64, rtol=1e-5, atol=1e-9)
    assert fastgen.mapo_loss(p[:0], y[:0]).item() == 0


@pytest.mark.parametrize("pair", [0, 1])
def test_a_broken_image_stays_in_its_pair(pair, backend, device):
    p, y = torch.randn(4, 10, device=device), torch.randn(4, 10, device=device)
    broken = p.clone()
    broken[pair + 2, 3] = torch.nan
    loss, grad = value_and_grad(lambda x: fastgen.mapo_loss(x, y, reduction="none"), broken)
    exact_loss, exact_grad = value_and_grad(lambda x: fastgen.mapo_loss(x, y, reduction="none"), p)
    others = [1 - pair, 3 - pair]
    assert loss.isnan().tolist() == [pair == 0, pair == 1]
    torch.testing.assert_close(loss[1 - pair], exact_loss[1 - pair], rtol=0, atol=0)
    torch.testing.assert_close(grad[others], exact_grad[others], rtol=0, atol=0)
    assert grad[[pair, pair + 2]].isnan().any(1).all()
