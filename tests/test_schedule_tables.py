"""A schedule's tables are numbers, whatever traced it first; integer times of any dtype are those times."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastgen
from fastgen import NoiseSchedule

X, T = torch.arange(6.0, device=DEVICE).reshape(2, 3), torch.tensor([1, 3], device=DEVICE)


def use(schedule: NoiseSchedule, x: Tensor, t: Tensor) -> Tensor:
    """Of all tables."""
    x_s, x_t = fastgen.diffuse_pair(schedule, x, t, noise=(x, x))
    return schedule.add_noise(x, x, t) + x_s + x_t


class Net(torch.nn.Module):
    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return use(self.schedule, x, t)


def fake(schedule: NoiseSchedule) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        use(schedule, torch.empty(2, 3, device=DEVICE), torch.tensor([1, 3], device=DEVICE))


def export(schedule: NoiseSchedule, strict: bool = False) -> None:
    exported = torch.export.export(Net(schedule), (X, T), strict=strict).module()
    torch.testing.assert_close(exported(X, T), use(NoiseSchedule.linear(10), X, T))


def compiled(schedule: NoiseSchedule, recompute: bool = False) -> None:
    torch._dynamo.reset()
    run: Callable[..., Tensor] = lambda x, t: use(schedule, x, t)  # noqa: E731
    f = (lambda x, t: checkpoint(run, x, t, use_reentrant=False)) if recompute else run
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(X.clone().requires_grad_(recompute), T)
    torch.testing.assert_close(got, use(NoiseSchedule.linear(10), X, T))


TRACES: dict[str, Callable[[NoiseSchedule], object]] = {
    "FakeTensorMode": fake,
    "torch.export": export,
    "strict torch.export": lambda schedule: export(schedule, strict=True),
    "torch.compile": compiled,
    "torch.compile of a checkpoint": lambda schedule: compiled(schedule, recompute=True),
    "torch.func.grad": lambda schedule: torch.func.grad(lambda x: use(schedule, x, T).sum())(X),
    "torch.func.jvp": lambda schedule: torch.func.jvp(lambda x: use(schedule, x, T), (X,), (X,)),
    "torch.func.vmap": lambda schedule: torch.func.vmap(lambda x: use(schedule, x, T))(X[None]),
    "inference_mode": torch.inference_mode()(lambda schedule: use(schedule, X, T)),
}


def tables(value: object) -> list[Tensor]:
    """All tensors that a schedule keeps."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, NoiseSchedule):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [t for part in parts for t in tables(part)]


@pytest.mark.parametrize("name", TRACES)
def test_a_schedule_traced_first_is_the_schedule_used_first(name: str, backend: str) -> None:
    expected = use(NoiseSchedule.linear(10), X, T)
    schedule = NoiseSchedule.linear(10)
    TRACES[name](schedule)
    for _ in range(2):
        result = use(schedule, X.clone().requires_grad_(), T)
        assert type(result) is Tensor
        assert torch.equal(result.detach(), expected)
    assert {type(value) for value in tables(schedule)} == {Tensor}
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in tables(schedule))
    assert not any(value.is_inference() for value in tables(schedule))
    assert copy.deepcopy(schedule).alpha_t(T).tolist() == pickle.loads(pickle.dumps(schedule)).alpha_t(T).tolist()


def test_one_compiled_function_of_two_schedules(kernel_backend: str) -> None:
    torch._dynamo.reset()
    f = torch.compile(use, fullgraph=True, backend="aot_eager")
    for make in (NoiseSchedule.linear, NoiseSchedule.cosine, NoiseSchedule.linear):
        torch.testing.assert_close(f(make(10), X, T), use(make(10), X, T))


def test_tables_are_made_once() -> None:
    schedule = NoiseSchedule.linear(10)
    use(schedule, X, T)
    before = [value.data_ptr() for value in tables(schedule)]
    use(schedule, X, T)
    assert len(before) == 4  # with alphas_cumprod
    assert [value.data_ptr() for value in tables(schedule)] == before


# ---------------------------------------------------------------- integer times

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
SCHEDULE = NoiseSchedule.linear(300)


def of_times(t: Tensor) -> dict[str, object]:
    """Whatever takes integer times: t holds 0 and 3."""
    moments = fastgen.ScoreMoments(300, device=DEVICE)
    moments.update(t, X)
    buffer = fastgen.ReplayBuffer(5, (3,), device=DEVICE)
    buffer.update(t, X)
    ms_eps = torch.linspace(0, 0.9, 301, dtype=torch.float64, device=DEVICE)
    s, later = torch.tensor([-1, 2], device=DEVICE), torch.tensor([2, 4], device=DEVICE)
    return {
        "coefficients": (SCHEDULE.alpha_t(t), SCHEDULE.sigma_t(t)),
        "add_noise": SCHEDULE.add_noise(X, X, t),
        "prediction_to_x0": SCHEDULE.prediction_to_x0(X, X, t, "flow_prediction"),
        "diffuse_pair": fastgen.diffuse_pair(SCHEDULE, X, t, noise=(X, X)),
        "posterior_sample": fastgen.posterior_sample(SCHEDULE, X, X + 1, t, noise=X),
        "posterior_sample, s": fastgen.posterior_sample(SCHEDULE, X, X + 1, t, s=s, noise=X),
        "step_coefficients": tuple(fastgen.step_coefficients(SCHEDULE, s, t)),
        "ScoreMoments": moments.count,
        "ReplayBuffer": buffer.samples,
        "reverse_variance": fastgen.reverse_variance(SCHEDULE, ms_eps, t, later),
        "pixel_reverse_variance": fastgen.pixel_reverse_variance(SCHEDULE, X, t, later),
        "sample": fastgen.sample(lambda x, t: x, SCHEDULE, X, method="ddim", steps=t, progress=False),
    }


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_of_any_dtype_are_those_integers(dtype: torch.dtype, backend: str) -> None:
    t = torch.tensor([0, 3], device=DEVICE)
    for (name, got), expected in zip(of_times(t.to(dtype)).items(), of_times(t).values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64], ids=str)
def test_times_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    t = torch.tensor([0, 1], device=DEVICE).to(dtype)
    calls = {
        "t": [
            lambda: SCHEDULE.alpha_t(t),
            lambda: fastgen.diffuse_pair(SCHEDULE, X, t),
            lambda: fastgen.posterior_sample(SCHEDULE, X, X, t),
            lambda: fastgen.ScoreMoments(300, device=DEVICE).update(t, X),
        ],
        "index": [lambda: fastgen.ReplayBuffer(5, (3,), device=DEVICE).update(t, X)],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(TypeError, match=f"{name} must hold integers, got {dtype}"):
                call()
