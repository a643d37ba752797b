"""Diffusers' two scripts for Diffusion-DPO, train_diffusion_dpo.py and its SDXL variant, with our loss in their block.

Both losses train the same tiny networks on the same batches; in float64 ten steps agree to rounding.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastgen

pytest.importorskip("diffusers")

from diffusers import DDPMScheduler, UNet2DConditionModel

BETA_DPO, PAIRS = 2500.0, 2


def network(sdxl):
    torch.manual_seed(0)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    more |= {"projection_class_embeddings_input_dim": 32}
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(more if sdxl else {}),
    )


def batch(step, sdxl, dtype):
    """Latents of winners and then of losers; a pair shares noise, time and prompt."""
    generator = torch.Generator().manual_seed(step)

    def randn(*shape):
        return torch.randn(PAIRS, *shape, generator=generator, dtype=torch.float64).to(dtype)

    latents = torch.cat([randn(4, 8, 8), randn(4, 8, 8)])
    noise, times = randn(4, 8, 8).repeat(2, 1, 1, 1), torch.randint(1000, (PAIRS,), generator=generator).repeat(2)
    given = {"encoder_hidden_states": randn(5, 8).repeat(2, 1, 1)}
    if sdxl:
        given["added_cond_kwargs"] = {"time_ids": randn(6).repeat(2, 1), "text_embeds": randn(8).repeat(2, 1)}
    return latents, noise, times, given


def the_scripts(pred, ref_pred, target, kind, sdxl):
    """The loss and what is logged, by the formulas of the scripts, in float32 or, for float64, in that."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    error, ref_error = ((p.to(wide) - target.to(wide)).square().mean((1, 2, 3)) for p in (pred, ref_pred))
    (won, lost), (ref_won, ref_lost) = error.chunk(2), ref_error.chunk(2)
    margin = (ref_won - ref_lost) - (won - lost)
    loss = {
        "sigmoid": lambda: -F.logsigmoid((0.5 if sdxl else 1) * BETA_DPO * margin),
        "hinge": lambda: F.relu(1 - BETA_DPO * margin),
        "ipo": lambda: (margin - 1 / (2 * BETA_DPO)).square(),
    }[kind]().mean()
    accuracy = ((margin > 0).double() + 0.5 * (margin == 0).double()).mean()
    return loss, 0.5 * (won.mean() + lost.mean()), ref_error.mean(), accuracy


def ours(pred, ref_pred, target, kind, sdxl):
    beta = 2 * BETA_DPO if kind == "sigmoid" and not sdxl else BETA_DPO
    loss, seen = fastgen.diffusion_dpo_loss(pred, ref_pred, target, beta=beta, kind=kind, return_errors=True)
    ties = 0.5 * (seen.margin == 0).double().mean()
    return loss, seen.error.mean(), seen.ref_error.mean(), seen.accuracy.double() + ties


def trained(block, kind, sdxl, dtype, steps):
    model = network(sdxl).to(dtype)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2)
    scheduler, logs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), []
    for step in range(steps):
        latents, noise, times, given = batch(step, sdxl, dtype)
        noisy = scheduler.add_noise(latents, noise, times)
        pred = model(noisy, times, **given).sample
        with torch.no_grad():
            ref_pred = reference(noisy, times, **given).sample
        loss, *others = block(pred, ref_pred, noise, kind, sdxl)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logs.append(torch.stack([v.detach().double() for v in (loss, *others)]))
    return torch.stack(logs), torch.cat([p.detach().flatten() for p in model.parameters()])


VARIANTS = [("sigmoid", False), ("hinge", False), ("ipo", False), ("sigmoid", True)]


@pytest.mark.parametrize(("kind", "sdxl"), VARIANTS)
def test_ten_steps_are_the_scripts_own(kind, sdxl):
    (logs, weights), (expected, their_weights) = (
        trained(block, kind, sdxl, torch.float64, 10) for block in (ours, the_scripts)
    )
    torch.testing.assert_close(logs, expected, rtol=1e-8, atol=1e-15)
    torch.testing.assert_close(weights, their_weights, rtol=0, atol=1e-9)
    assert (expected[0, 0] - expected[1:, 0]).abs().max() > 0.1 * expected[0, 0]  # it did train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_is_the_scripts_own(dtype):
    for kind, sdxl in VARIANTS:
        (logs, weights), (expected, their_weights) = (
            trained(block, kind, sdxl, dtype, 1) for block in (ours, the_scripts)
        )
        torch.testing.assert_close(logs, expected, rtol=1e-5, atol=0)
        start = torch.cat([p.detach().flatten() for p in network(sdxl).to(dtype).parameters()]).double()
        way, apart = their_weights.double() - start, weights.double() - their_weights.double()
        assert way.norm() > 0
        assert apart.norm() < 0.1 * way.norm()  # Adam's first step is a sign, which rounding decides where nothing else
