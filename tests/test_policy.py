"""Post-training by reward: every backend against float64, by formula, by hand and by identity."""

import math

import pytest
import torch
from oracle import check_case, value_and_grad

import fastgen
from fastgen import reference
from fastgen.cases import FAMILIES


def nft_tensors(rows=4, size=30, device="cpu"):
    pred = torch.randn(rows, size, device=device)
    old, ref = (pred + 0.1 * torch.randn_like(pred) for _ in range(2))
    t = torch.linspace(0.2, 0.9, rows, device=device)
    r = torch.linspace(0, 1, rows, device=device)
    return {
        "pred": pred,
        "old_pred": old,
        "x_t": torch.randn_like(pred),
        "x0": torch.randn_like(pred),
        "r": r,
        "alpha_t": 1 - t,
        "sigma_t": t,
        "ref_pred": ref,
    }


@pytest.mark.parametrize("case", FAMILIES["policy"], ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(2, 70_001), (4, 1), (66, 64), (2, 3, 128, 256), (0, 5)], ids=str)
def test_row_sizes(case, shape, kernel_backend, device):
    check_case(case, case.inputs(shape, device=device))


def test_nft_by_hand(backend, device):
    v, old, x0 = (torch.tensor([row], device=device) for row in ([1.0, 3.0], [0.0, 1.0], [1.0, 1.0]))
    x_t, t, r = torch.tensor([[2.0, 2.0]], device=device), torch.full((1,), 0.5, device=device), torch.tensor([0.75])
    ref = torch.tensor([[1.0, 1.0]], device=device)
    options = {"alpha_t": 1 - t, "sigma_t": t, "beta": 0.5, "ref_pred": ref, "kl_weight": 0.1, "scale": 2.0}

    def loss(x):
        return fastgen.diffusion_nft_loss(x, old, x_t, x0, r.to(device), return_stats=True, **options)

    # v+ = (1/2, 2) and v- = (-1/2, 0): x0+ - x0 = (3/4, 0) and x0- - x0 = (5/4, 1), their mean sizes 3/8 and 9/8.
    value, stats = loss(v)
    positive, negative = (9 / 16 / 2) / (3 / 8), ((25 / 16 + 1) / 2) / (9 / 8)
    assert stats.positive.item() == pytest.approx(positive)
    assert stats.negative.item() == pytest.approx(negative)
    assert stats.normalizer[:, 0].tolist() == [3 / 8, 9 / 8]
    assert stats.kl.item() == 2
    assert value.item() == pytest.approx(2 * (0.75 * positive + 0.25 * negative) / 0.5 + 0.1 * 2)
    _, grad = value_and_grad(lambda x: loss(x)[0], v)
    # 2c/D t (-r (x0+ - x0)/n+ + (1 - r)(x0- - x0)/n-) + 2 λ (v - v_ref)/D
    expected = [0.5 * 2 * (-0.75 * p / (3 / 8) + 0.25 * n / (9 / 8)) for p, n in ((3 / 4, 5 / 4), (0, 1))]
    torch.testing.assert_close(grad.cpu(), torch.tensor([[expected[0], expected[1] + 0.1 * 2]]))


def test_nft_is_the_published_code(backend, device):
    """Its loss for a flow, with float64 temporaries for the normalisers."""
    given = nft_tensors(device=device)
    beta, clip, kl = 0.1, 5.0, 1e-2

    def published(pred):
        x_t, x0, old = given["x_t"], given["x0"], given["old_pred"]
        t, r = given["sigma_t"][:, None], given["r"]
        positive_x0 = x_t - t * (beta * pred + (1 - beta) * old)
        negative_x0 = x_t - t * ((1 + beta) * old - beta * pred)
        with torch.no_grad():
            n_positive = (positive_x0.double() - x0.double()).abs().mean(1, keepdim=True).clip(min=1e-5)
            n_negative = (negative_x0.double() - x0.double()).abs().mean(1, keepdim=True).clip(min=1e-5)
        positive = ((positive_x0 - x0) ** 2 / n_positive).mean(1)
        negative = ((negative_x0 - x0) ** 2 / n_negative).mean(1)
        policy = (r * positive / beta + (1 - r) * negative / beta).mean() * clip
        return policy + kl * ((pred - given["ref_pred"]) ** 2).mean()

    def ours(pred):
        return fastgen.diffusion_nft_loss(**given | {"pred": pred}, beta=beta, kl_weight=kl, scale=clip)

    (loss, grad), (theirs, their_grad) = value_and_grad(ours, given["pred"]), value_and_grad(published, given["pred"])
    torch.testing.assert_close(loss.double(), theirs.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, their_grad.to(grad.dtype), rtol=1e-4, atol=1e-6)


def test_nft_normalizers_have_a_floor(backend, device):
    given = nft_tensors(device=device)
    given |= {"pred": given["old_pred"], "x0": given["x_t"] - given["sigma_t"][:, None] * given["old_pred"]}
    loss, stats = fastgen.diffusion_nft_loss(**given, return_stats=True, normalizer_min=0.5)
    assert stats.normalizer.tolist() == [[0.5] * 4] * 2
    assert loss.item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("name", ["pred", "old_pred", "x_t", "x0", "ref_pred", "r"])
def test_a_broken_sample_stays_alone(name, backend, device):
    given = nft_tensors(device=device)
    broken = given | {name: given[name].clone()}
    broken[name][1] = math.nan
    options = {"reduction": "none", "kl_weight": 0.1}

    def run(tensors):
        return value_and_grad(lambda x: fastgen.diffusion_nft_loss(**tensors | {"pred": x}, **options), tensors["pred"])

    (loss, grad), (exact, exact_grad) = run(broken), run(given)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad[1].isnan().all()
    sound = [0, 2, 3]
    torch.testing.assert_close(loss[sound], exact[sound], rtol=0, atol=0)
    torch.testing.assert_close(grad[sound], exact_grad[sound], rtol=0, atol=0)


def test_optimality_probability():
    advantages = torch.tensor([-20.0, -5.0, 0.0, 2.5, 5.0, 7.0, math.nan])
    wanted = torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0, math.nan])
    torch.testing.assert_close(fastgen.optimality_probability(advantages), wanted, equal_nan=True)
    assert fastgen.optimality_probability(torch.tensor(1.0), clip=1.0).item() == 1


X, ROW = torch.randn(2, 3), torch.ones(2)


def nft(**changed):
    given = {"pred": X, "old_pred": X, "x_t": X, "x0": X, "r": ROW, "alpha_t": ROW, "sigma_t": ROW}
    return fastgen.diffusion_nft_loss(**{**given, **changed})


BAD_CALLS = {
    "old_pred has shape": (ValueError, lambda: nft(old_pred=X[:1])),
    "ref_pred is on": (ValueError, lambda: nft(ref_pred=X.to("meta"))),
    r"r must have shape \[2\]": (ValueError, lambda: nft(r=ROW[:1])),
    "r must be float32 or float64": (TypeError, lambda: nft(r=ROW.bfloat16())),
    "sigma_t must be a torch.Tensor": (TypeError, lambda: nft(sigma_t=0.5)),
    "beta must be > 0": (ValueError, lambda: nft(beta=0.0)),
    "normalizer_min must be > 0": (ValueError, lambda: nft(normalizer_min=0)),
    "kl_weight must be >= 0": (ValueError, lambda: nft(ref_pred=X, kl_weight=-1)),
    "kl_weight = 0.5 needs ref_pred": (ValueError, lambda: nft(kl_weight=0.5)),
    "prediction_type must be one of": (ValueError, lambda: nft(prediction_type="x")),
    "reduction must be one of": (ValueError, lambda: nft(reduction="batch")),
    "advantages must be float32 or float64": (TypeError, lambda: fastgen.optimality_probability(ROW.half())),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("case", [c for c in FAMILIES["policy"] if "nft" in c.name], ids=lambda c: c.name)
def test_gradcheck_of_the_references(case):
    """But for the normalisers, which have no gradient: a tiny step does not move them where they are at their floor."""
    tensors = case.inputs((4, 6), torch.float64)
    for module in (reference, fastgen):
        assert torch.autograd.gradcheck(
            lambda x, m=module: case(m, **tensors | {"pred": x}, normalizer_min=1e3), tensors["pred"].requires_grad_()
        )
