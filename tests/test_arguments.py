"""Arguments that used to crash, to mislead or to give wrong numbers: the error names them, or they work."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICE

import fastgen
from fastgen.core import dispatch

X, Y, Z = (torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3))
ROW = torch.ones(2, device=DEVICE)
REAL = torch.tensor([True, False], device=DEVICE)
TOKENS = torch.tensor([0, 2], device=DEVICE)
IDS = torch.tensor([[0, 2], [1, 0]], device=DEVICE)
TIMES = torch.tensor([1, 2], device=DEVICE)
COST = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)).to(DEVICE)
SCHEDULE = fastgen.NoiseSchedule.linear(10)
STEP = fastgen.StepCoefficients(*[torch.ones(1, device=DEVICE)] * 6)
PAIR = fastgen.ScorePair(X, ROW, ROW, Y, Z)

# A call of each public function that takes streams or logits, by the names of its required tensors.
CALLS = {
    fastgen.elbo_error: {"pred": X, "target": Y},
    fastgen.elbo_difference: {"pred": X, "ref_pred": Y, "target": Z},
    fastgen.ddo_loss: {"pred": X, "ref_pred": Y, "target": Z, "is_real": REAL},
    fastgen.diffusion_dpo_loss: {"pred": X, "ref_pred": Y, "target": Z},
    fastgen.diffusion_kto_loss: {"pred": X, "ref_pred": Y, "target": Z, "is_desirable": REAL},
    fastgen.mapo_loss: {"pred": X, "target": Y},
    fastgen.diffusion_nft_loss: {
        **{"pred": X, "old_pred": Y, "x_t": Z, "x0": Y},
        **{"r": ROW, "alpha_t": ROW, "sigma_t": ROW},
    },
    fastgen.flow_sde_step: {"pred": X, "x_t": Y},
    fastgen.sds_loss: {"x": X, "pred_cond": Y, "noise": Z},
    fastgen.vsd_loss: {"x": X, "real_cond": Y, "fake": Z},
    fastgen.dmd_loss: {"x": X, "x_t": Y, "real_cond": Z, "fake": Y, "alpha_t": ROW, "sigma_t": ROW},
    fastgen.guidance: {"cond": X, "uncond": Y},
    fastgen.reverse_step: {"x_t": X, "cond": Y},
    fastgen.reverse_step_: {"x_t": X, "cond": Y},
    fastgen.langevin_step: {"x": X, "grad": Y},
    fastgen.langevin_step_: {"x": X, "grad": Y},
    fastgen.posterior_sample: {"x0": X, "x_t": Y, "t": TIMES},
    fastgen.add_noise: {"x0": X, "noise": Y, "alpha_t": ROW, "sigma_t": ROW},
    fastgen.prediction_to_x0: {"pred": X, "x_t": Y, "alpha_t": ROW, "sigma_t": ROW},
    fastgen.token_logprob: {"logits": X, "tokens": TOKENS},
    fastgen.sequence_ddo_loss: {
        "logits": X[:, None],
        "ref_logits": Y[:, None],
        "tokens": TOKENS[:, None],
        "is_real": REAL,
    },
    fastgen.generalized_jsd_loss: {"student_logits": X, "teacher_logits": Y},
    fastgen.sparse_divergence_loss: {"student_logits": X, "teacher_logprobs": -1 - Y.abs()[:, :2], "teacher_ids": IDS},
    fastgen.joint_energy_loss: {"logits_real": X, "labels": TOKENS, "logits_fake": Y},
    fastgen.fake_score_loss: {"pred": X, "x0": Y, "noise": Z, "alpha_t": ROW, "sigma_t": ROW},
    fastgen.optimal_trajectory: {"cost": COST},
}
OTHERS = {
    fastgen.flow_sde_step: {"t": 0.5, "t_next": 0.25, "sample": Z},
    fastgen.guidance: {"scale": 2.0},
    fastgen.reverse_step: {"coefficients": STEP},
    fastgen.reverse_step_: {"coefficients": STEP},
    fastgen.langevin_step: {"step_size": 0.5, "noise_scale": 0.0},
    fastgen.langevin_step_: {"step_size": 0.5, "noise_scale": 0.0},
    fastgen.posterior_sample: {"schedule": SCHEDULE, "noise": torch.zeros_like(X)},
    fastgen.prediction_to_x0: {"prediction_type": "epsilon"},
    fastgen.optimal_trajectory: {"num_steps": 2},
}


def call(function, **changed):
    # Copies: some functions write to what they are given.
    tensors = {name: value.clone() for name, value in CALLS[function].items()}
    return function(**{**tensors, **OTHERS.get(function, {}), **changed})


def nested(t):
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], dtype=torch.float32, device=t.device)


def jagged(t):
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], device=t.device, layout=torch.jagged)


STRANGE = [
    lambda t: None,
    lambda t: t.to_sparse(),
    lambda t: t.reshape(-1, t.shape[-1]).to_sparse_csr(),
    lambda t: t.float().cpu().to_mkldnn(),
    nested,
    jagged,
    lambda t: torch.quantize_per_tensor(t.float().cpu(), 0.1, 0, torch.qint8),
    lambda t: torch.complex(t.float(), t.float()).conj(),
]
ARGUMENTS = [(function, name) for function, tensors in CALLS.items() for name in tensors]


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested tensors|quantize)")
@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda v: getattr(v, "__name__", v))
def test_tensors_of_other_kinds_are_refused_by_name(function, name):
    for strange in STRANGE:
        with pytest.raises((TypeError, ValueError), match=rf"^{name} (must be|must hold|is on)"):
            call(function, **{name: strange(CALLS[function][name])})


def test_a_score_pair_that_lacks_a_tensor_is_refused_by_name():
    for name in fastgen.ScorePair._fields:
        with pytest.raises(TypeError, match=f"ca.{name} must be a torch.Tensor, got NoneType"):
            fastgen.decoupled_dmd_loss(X, PAIR, PAIR._replace(**{name: None}), guidance_scale=2.0)


def negated(t):
    """The same numbers, of which the memory holds the negatives."""
    return torch._neg_view(-t) if t.is_floating_point() else t


@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda v: getattr(v, "__name__", v))
def test_views_whose_memory_holds_the_negatives_count_as_what_they_show(function, name, backend):
    values = CALLS[function]
    view = negated(values[name].clone())
    got, wanted = call(function, **{name: view}), call(function)
    if function is fastgen.flow_sde_step:
        got, wanted = got.log_prob, wanted.log_prob
    if function is fastgen.optimal_trajectory:
        got, wanted = got.total_cost, wanted.total_cost
    torch.testing.assert_close(got, wanted)
    if function in (fastgen.reverse_step_, fastgen.langevin_step_):
        assert view.is_neg() == view.is_floating_point()
        if got is view:
            torch.testing.assert_close(view.clone(), wanted)


def test_the_imaginary_part_of_a_conjugate_is_a_stream(backend):
    view = torch.complex(X, -Y).conj().imag
    assert view.is_neg()
    torch.testing.assert_close(fastgen.elbo_error(view, X), fastgen.elbo_error(Y, X))


def test_what_no_memory_holds_is_refused_by_name():
    """Expanded tensors have as many elements as one likes: the bytes of an output like them overflow 64 bits."""
    rows = 2**62 + 2**20
    for function in CALLS.keys() - {fastgen.optimal_trajectory}:
        tensors = {n: t.new_empty(1).expand(rows, *[1] * (t.dim() - 1)) for n, t in CALLS[function].items()}
        if function is fastgen.posterior_sample:
            tensors["noise"] = tensors["x0"]
        if function is fastgen.flow_sde_step:
            tensors["sample"] = tensors["x_t"]
        with pytest.raises(ValueError, match=f"^{next(iter(tensors))} has too many elements"):
            call(function, **tensors)


@pytest.mark.skipif(dispatch.missing("guidance", "native", "cpu") is not None, reason="needs the compiled kernels")
def test_kernels_make_no_output_of_a_size_whose_bytes_overflow():
    """Called without the checks; an output of 4 MiB, what is left of its bytes in 64 bits, would be written past."""
    code = """
import torch, fastgen
x = torch.empty(1).expand(2**62 + 2**20, 1)
torch.ops.fastgen.guidance(x, x, torch.ones(1))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "RuntimeError" in run.stderr


def test_the_shapes_of_results_are_known_without_data():
    """On the meta device losses and steps give tensors there. (A solver needs values.)"""
    for function, tensors in CALLS.items():
        meta = {name: t.to("meta") for name, t in tensors.items()}
        if function is not fastgen.optimal_trajectory and function not in OTHERS:
            assert call(function, **meta).device.type == "meta"


# ---------------------------------------------------------------- numbers

# Calls of one option each.
NUMBERS = {
    "alpha": lambda v: call(fastgen.ddo_loss, alpha=v),
    "beta": lambda v: call(fastgen.ddo_loss, beta=v),
    "desirable_weight": lambda v: call(fastgen.diffusion_kto_loss, desirable_weight=v),
    "undesirable_weight": lambda v: call(fastgen.diffusion_kto_loss, undesirable_weight=v),
    "baseline": lambda v: call(fastgen.diffusion_kto_loss, baseline=v),
    "noise_level": lambda v: call(fastgen.flow_sde_step, noise_level=v).log_prob,
    "advantage_clip": lambda v: fastgen.grpo_loss(ROW, ROW, ROW, advantage_clip=v),
    "kl_weight": lambda v: call(fastgen.diffusion_nft_loss, ref_pred=Z, kl_weight=v),
    "clip": lambda v: fastgen.optimality_probability(X, clip=v),
    "guidance_scale": lambda v: call(fastgen.sds_loss, pred_uncond=Y, guidance_scale=v),
    "grad_clip": lambda v: call(fastgen.sds_loss, grad_clip=v),
    "normalizer_eps": lambda v: call(fastgen.dmd_loss, normalizer_eps=v),
    "normalizer_min": lambda v: call(fastgen.dmd_loss, normalizer_min=v),
    "temperature": lambda v: call(fastgen.token_logprob, temperature=v),
    "scale": lambda v: call(fastgen.guidance, scale=v),
    "step_size": lambda v: call(fastgen.langevin_step, step_size=v, noise=Z),
    "noise_scale": lambda v: call(fastgen.langevin_step_, noise_scale=v, noise=Z),
    "clamp": lambda v: call(fastgen.reverse_step, clamp=(0.0, v)),
    "energy_weight": lambda v: call(fastgen.joint_energy_loss, energy_weight=v),
    "l1_weight": lambda v: fastgen.pix2pix_loss(X, X, Y, l1_weight=v),
    "sigma_data": lambda v: fastgen.NoiseSchedule.edm(sigma_data=v),
}
POSITIVE = ("advantage_clip", "beta", "clip", "grad_clip", "noise_level", "temperature", "sigma_data")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_outside_float32_are_refused_by_name(name):
    for value in (10**400, -(10**400), 1e46, 3.5e38):
        with pytest.raises(ValueError, match=rf"^{name} must be from -3.4e\+38 to 3.4e\+38, the range of float32, got"):
            NUMBERS[name](value)
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^{name} must be finite, got {value}"):
            NUMBERS[name](value)


@pytest.mark.parametrize("name", POSITIVE)
def test_positive_numbers_that_float32_cannot_divide_by_are_refused_by_name(name):
    for value in (1e-46, 1e-40, 1e-320):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1.2e-38"):
            NUMBERS[name](value)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_real_number_is_refused_by_name(name):
    for value in (True, np.bool_(True), 1j, np.complex64(1), "1"):
        with pytest.raises(TypeError, match=f"^{name} must be a number, got {type(value).__name__}"):
            NUMBERS[name](value)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_count_as_pythons(name, backend):
    for value in (np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(2), 2):
        results = [NUMBERS[name](v) for v in (value, float(value))]
        if isinstance(results[0], torch.Tensor):
            torch.testing.assert_close(*results)


# ---------------------------------------------------------------- integers

INTEGERS = {
    "timesteps": lambda v: call(fastgen.mapo_loss, timesteps=v),
    "mc_samples": lambda v: call(fastgen.ddo_loss, is_real=REAL[:1], mc_samples=v),
    "ignore_index": lambda v: call(fastgen.token_logprob, ignore_index=v),
    "num_steps": lambda v: call(fastgen.optimal_trajectory, num_steps=v).steps,
    "steps": lambda v: fastgen.langevin_sample(lambda x: x, X, steps=v, noise_scale=0.0),
    "max_chunk_bytes": lambda v: fastgen.linear_token_logprob(X, Y, TOKENS % 2, max_chunk_bytes=v),
    "every": lambda v: fastgen.r1_penalty(IMAGES.square().sum(1), IMAGES, gamma=1.0, every=v),
    "num_timesteps": lambda v: fastgen.NoiseSchedule.linear(v).alphas_cumprod,
    "capacity": lambda v: fastgen.ReplayBuffer(v, (3,), device=DEVICE).samples,
    r"shape\[0\]": lambda v: fastgen.ReplayBuffer(4, (v,), device=DEVICE).samples,
    "seed": lambda v: fastgen.ReplayBuffer(4, (3,), seed=v, device=DEVICE).samples,
    "s": lambda v: fastgen.step_coefficients(SCHEDULE, v, 5).x0,
    "t": lambda v: fastgen.reverse_variance(SCHEDULE, MOMENTS, 1, v),
    "levels": lambda v: fastgen.variational_bound(SCHEDULE, MOMENTS, NODES, levels=v).total,
}
IMAGES = X.clone().requires_grad_()
MOMENTS, NODES = torch.ones(11, device=DEVICE), torch.tensor([1, 10], device=DEVICE)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_numpy_count_as_pythons(name, backend):
    for kind in (np.int64, np.int32, np.uint8):
        torch.testing.assert_close(INTEGERS[name](kind(2)), INTEGERS[name](2))


@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_is_refused_by_name(name):
    for value in (True, np.bool_(True), 2.0, np.float64(2), 2j, "2"):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must be an int"):
            INTEGERS[name](value)


def test_a_number_of_steps_is_no_none():
    with pytest.raises(TypeError, match="num_steps must be an int, got NoneType"):
        INTEGERS["num_steps"](None)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_out_of_range_are_refused_by_name(name):
    for value in (2**64, -(2**63) - 1, 10**5000):
        with pytest.raises(ValueError, match=rf"^({name}) must be at (least|most)"):
            INTEGERS[name](value)


def test_ignore_index_takes_all_of_int64():
    with pytest.raises(ValueError, match="ignore_index must be at most 9223372036854775807"):
        INTEGERS["ignore_index"](2**63)
    assert INTEGERS["ignore_index"](2**63 - 1).shape == (2,)


def test_num_items_is_a_real_number():
    for value, kind in ((torch.tensor(2 + 1j), "complex"), (torch.tensor(True), "bool")):
        with pytest.raises(TypeError, match=f"num_items must hold real numbers, got torch.{kind}"):
            call(fastgen.generalized_jsd_loss, num_items=value.to(DEVICE))


# ---------------------------------------------------------------- the solver


def test_a_cost_without_timesteps_is_refused():
    for shape in ((0, 0), (3, 0, 0), (1, 1)):
        with pytest.raises(ValueError, match="cost must have at least 2 timesteps"):
            fastgen.optimal_trajectory(torch.zeros(shape, device=DEVICE), 1)


@pytest.mark.parametrize("value", [2.5e38, -2.5e38])
@pytest.mark.parametrize("num_steps", [3, [1, 3], "all"], ids=str)
def test_a_total_that_overflows_is_not_called_a_forbidden_edge(value, num_steps, backend):
    cost = torch.full((2, 4, 4), 1.0, device=DEVICE)
    cost[1] = value
    cost[1, 0, 2] = math.inf
    with pytest.raises(ValueError, match="cost is too large in problem 1 of 2: the total of num_steps = 3 steps"):
        fastgen.optimal_trajectory(cost, num_steps).steps[3]
    total = fastgen.optimal_trajectory(cost.double(), 3).total_cost
    torch.testing.assert_close(total, total.new_tensor([3, 3 * value]))


def test_forbidden_edges_are_called_that(backend):
    cost = torch.full((4, 4), 2.5e38, device=DEVICE)
    cost[0, 1] = math.inf
    with pytest.raises(ValueError, match=r"no path of num_steps = 3 avoids the forbidden \(inf\) edges"):
        fastgen.optimal_trajectory(cost, 3)
