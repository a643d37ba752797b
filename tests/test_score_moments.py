"""The moments of noise predictions: the operator, the streaming sums, two ranks."""

import math

import numpy as np
import pytest
import torch
from oracle import assert_accurate
from ranks import spawn

from fastgen import NoiseSchedule, ScoreMoments, reference
from fastgen.analytic_dpm import moments as gathering

SCHEDULES = {
    "linear": NoiseSchedule.linear(1000),
    "cosine": NoiseSchedule.cosine(1000),
    "short": NoiseSchedule.linear(20, 1e-3, 0.4),
}


# -- The operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (2, 70_001), (5,), (4, 1), (0, 3)], ids=str)
def test_mean_square_matches_float64(shape, dtype, backend, device):
    p = torch.randn(shape, device=device).to(dtype)
    actual = gathering.row_mean_square(p)
    eager, exact = reference.mean_square(p), reference.mean_square(p.double())
    assert_accurate(actual, eager, exact)
    if len(p):
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(actual * 1.001, eager, exact)


def test_mean_square_reads_layouts_in_place(kernel_backend, device):
    p = torch.randn(4, 3, 6, 5, device=device)
    for view in (
        p.to(memory_format=torch.channels_last),
        p.transpose(2, 3),
        p[:, 1:],
        p[::2],
        p[:1].expand(4, -1, -1, -1),
    ):
        torch.testing.assert_close(gathering.row_mean_square(view), reference.mean_square(view))


def test_mean_square_keeps_non_finite_rows_apart_and_squares_in_float32(kernel_backend, device):
    p = torch.tensor([[300.0, 0.0], [math.nan, 1.0], [math.inf, 0.0]], device=device).half()
    assert gathering.row_mean_square(p).tolist()[0] == 45000.0  # 90000 is beyond float16
    assert gathering.row_mean_square(p)[1].isnan()
    assert gathering.row_mean_square(p)[2] == math.inf


# -- The moments


def test_moments_by_hand(backend, device):
    moments = ScoreMoments(3, device=device)
    moments.update(
        torch.tensor([0, 2, 0], device=device), torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 3.0]], device=device)
    )
    moments.update(torch.tensor([0], device=device), torch.tensor([[math.sqrt(2), 2.0]], device=device))
    assert moments.count.tolist() == [0, 3, 0, 1]
    means, errors = moments.ms_eps.cpu(), moments.standard_error.cpu()
    assert means.dtype == torch.float64
    torch.testing.assert_close(
        means[[0, 1, 3]], torch.tensor([0.0, 13 / 3, 2.0], dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert means[2].isnan()
    assert errors[1].item() == pytest.approx(math.sqrt(np.var([1, 9, 3], ddof=1) / 3), rel=1e-6)
    assert errors[0] == 0
    assert errors[2:].isnan().all()  # of one sample, and of none


def test_moments_are_sums_over_batches_in_float64(backend, device):
    t = torch.randint(7, (500,), device=device)
    pred = torch.randn(500, 3, 4, device=device)
    moments = ScoreMoments(7, device=device)
    for rows in torch.arange(500, device=device).split(64):
        moments.update(t[rows], pred[rows])
    square = reference.mean_square(pred.double())
    expected = torch.stack([square[t == i].mean() for i in range(7)])
    torch.testing.assert_close(moments.ms_eps[1:], expected, rtol=1e-6, atol=0)
    error = torch.stack([square[t == i].std() / (t == i).sum().sqrt() for i in range(7)])
    torch.testing.assert_close(moments.standard_error[1:], error, rtol=1e-5, atol=0)
    # Small terms beside a large one: a float32 sum would lose all of them.
    one = ScoreMoments(1, device=device)
    for value in (1e5, *[1.0] * 20):
        one.update(torch.zeros(1, dtype=torch.long, device=device), torch.full((1, 1), value, device=device))
    assert one.ms_eps[1].item() == pytest.approx((1e10 + 20) / 21, rel=1e-12)


def test_moments_take_no_gradient_and_compile(backend, device):
    pred = torch.randn(4, 6, device=device, requires_grad=True)
    t = torch.tensor([0, 1, 1, 0], device=device)
    eager, compiled = ScoreMoments(2, device=device), ScoreMoments(2, device=device)
    eager.update(t, pred)
    assert not eager.ms_eps.requires_grad
    torch._dynamo.reset()
    torch.compile(lambda t, p: compiled.update(t, p), fullgraph=True, backend="aot_eager")(t, pred)
    assert torch.equal(compiled.ms_eps, eager.ms_eps)
    assert eager.ms_eps[1] > 0


def test_moments_save_and_load():
    moments, other = ScoreMoments(3), ScoreMoments(3)
    moments.update(torch.tensor([0, 1, 2, 1]), torch.randn(4, 5))
    state = moments.state_dict()
    moments.update(torch.tensor([0]), torch.ones(1, 5))
    assert state["sums"][0, 0] == 1  # a copy
    other.load_state_dict(state)
    other.update(torch.tensor([0]), torch.ones(1, 5))
    assert torch.equal(other.ms_eps, moments.ms_eps)
    with pytest.raises(ValueError, match=r"float64 \[2, 3\].*got torch.float64 \[3, 3\]"):
        ScoreMoments(2).load_state_dict(state)
    with pytest.raises(ValueError, match="keys 'sums' and 'reduced'"):
        other.load_state_dict({})
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        other.load_state_dict({**state, "sums": 3})


def reduce_moments(rank, out):
    import torch.distributed as dist

    moments = ScoreMoments(4)
    t, pred = distributed_data()
    moments.update(t[rank::2], pred[rank::2])
    moments.all_reduce(dist.group.WORLD)
    with pytest.raises(RuntimeError, match="once, after all updates"):
        moments.all_reduce()
    resumed = ScoreMoments(4)
    resumed.load_state_dict(moments.state_dict())
    with pytest.raises(RuntimeError, match="once, after all updates"):  # it would count all samples twice
        resumed.all_reduce()
    torch.save((moments.ms_eps, moments.count, moments.standard_error), f"{out}/{rank}.pt")


def distributed_data():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, (21,), generator=generator), torch.randn(21, 5, generator=generator)


def test_two_ranks_have_the_moments_of_all(tmp_path):
    spawn(reduce_moments, str(tmp_path))
    whole = ScoreMoments(4)
    whole.update(*distributed_data())
    for rank in range(2):
        ms_eps, count, error = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(count, whole.count)
        torch.testing.assert_close(ms_eps, whole.ms_eps)
        torch.testing.assert_close(error, whole.standard_error)
