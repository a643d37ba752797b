"""Losses of other libraries, by their own formulas, as calls of fastgen: see docs/conventions.md."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import fastgen
from fastgen.integrations.liger import LigerFusedLinearJSDLoss

TEMPERATURE = 2.0


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 40, generator=generator).to(DEVICE) for _ in range(2))
    labels = torch.randint(40, (2, 6), generator=generator)
    labels[:, ::3] = -100
    return student.requires_grad_(), teacher, labels.to(DEVICE)


def agree(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def rows(student, teacher, beta=0.0, temperature=1.0):
    """[..., V], elementwise, as ``torch.nn.functional.kl_div`` has it: what most of these libraries sum."""
    log_q, log_p = (t.div(temperature).log_softmax(-1) for t in (student, teacher))
    if beta in (0, 1):
        return F.kl_div(*((log_q, log_p) if beta == 0 else (log_p, log_q)), reduction="none", log_target=True)
    log_m = torch.logaddexp(log_q + torch.tensor(1 - beta).log(), log_p + torch.tensor(beta).log())
    to_p, to_q = (F.kl_div(log_m, t, reduction="none", log_target=True) for t in (log_p, log_q))
    return beta * to_p + (1 - beta) * to_q


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_generalized_jsd_loss(batch, beta):
    student, teacher, labels = batch
    theirs = rows(student, teacher, beta, TEMPERATURE)
    given = {"beta": beta, "temperature": TEMPERATURE}
    counted = theirs[labels != -100].sum()
    agree(fastgen.generalized_jsd_loss(student, teacher, labels, **given), counted / (labels != -100).sum(), student)
    # num_items_in_batch overrides any reduction; without labels "batchmean" divides by the batch alone.
    ours = fastgen.generalized_jsd_loss(student, teacher, labels, reduction="sum", num_items=7, **given)
    agree(ours, rows(student, teacher, beta, TEMPERATURE)[labels != -100].sum() / 7, student)
    ours = fastgen.generalized_jsd_loss(student, teacher, reduction="sum", num_items=len(student), **given)
    agree(ours, rows(student, teacher, beta, TEMPERATURE).sum() / len(student), student)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_chunked_divergence_loss(beta):
    hidden, teacher_hidden = torch.randn(2, 5, 8, device=DEVICE), torch.randn(2, 5, 12, device=DEVICE)
    weight, teacher_weight = torch.randn(30, 8, device=DEVICE), torch.randn(30, 12, device=DEVICE)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    mask = torch.arange(10, device=DEVICE).reshape(2, 5) % 3 > 0
    scale = 0.7  # of both models' logits: a temperature
    theirs = rows(hidden @ weight.T * scale, teacher_hidden @ teacher_weight.T * scale, beta, TEMPERATURE)
    loss, entropy = fastgen.linear_generalized_jsd_loss(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        mask=mask,
        beta=beta,
        temperature=TEMPERATURE / scale,
        return_entropy=True,
    )
    agree(loss, theirs[mask].sum() / mask.sum(), *leaves)
    student = torch.distributions.Categorical(logits=hidden @ weight.T * scale / TEMPERATURE)
    torch.testing.assert_close(entropy, torch.where(mask, student.entropy(), 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher_columns", [30, 33])
def test_liger_fused_linear_jsd_loss(teacher_columns):
    hidden, teacher_hidden = torch.randn(9, 8, device=DEVICE), torch.randn(9, 12, device=DEVICE)
    weight, teacher_weight = torch.randn(30, 8, device=DEVICE), torch.randn(teacher_columns, 12, device=DEVICE)
    bias, labels = torch.randn(30, device=DEVICE), torch.randint(30, (9,), device=DEVICE)
    labels[::4] = -100
    leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    logits = hidden @ weight.T + bias
    hard = F.cross_entropy(logits, labels)  # before the temperature
    padded = F.pad(logits / TEMPERATURE, (0, teacher_columns - 30))  # a wider teacher's columns: logit 0
    soft = (
        rows(padded, teacher_hidden @ teacher_weight.T / TEMPERATURE, 0.3)[labels != -100].sum() / (labels >= 0).sum()
    )
    module = LigerFusedLinearJSDLoss(0.2, 0.8, beta=0.3, temperature=TEMPERATURE, return_soft_hard_loss=True)
    loss, our_soft, our_hard = module(hidden, weight, teacher_hidden, teacher_weight, labels, bias)
    torch.testing.assert_close(our_soft, soft)
    torch.testing.assert_close(our_hard, hard)
    agree(loss, 0.2 * hard + 0.8 * soft, *leaves)


def test_temperature_squared(batch):
    """NeMo Automodel's ``KDLoss`` and ModelOpt: the forward KL times T²."""
    student, teacher, labels = batch
    theirs = TEMPERATURE**2 * rows(student, teacher, 0.0, TEMPERATURE)[labels != -100].sum(-1).mean()
    ours = TEMPERATURE**2 * fastgen.generalized_jsd_loss(student, teacher, labels, beta=0.0, temperature=TEMPERATURE)
    agree(ours, theirs, student)


def test_renormalised_top_k_and_mixed_kl(batch):
    """NeMo-RL: both distributions over the teacher's top k alone, "mixed" a sum of the two KL divergences."""
    student, teacher, _ = batch
    logits, ids = teacher.topk(8)
    chosen = student.gather(-1, ids)
    theirs = (0.3 * rows(chosen, logits, 0.0) + 0.7 * rows(chosen, logits, 1.0)).sum(-1).mean()
    given = student, teacher.log_softmax(-1).gather(-1, ids), ids
    forward, reverse = (
        fastgen.sparse_divergence_loss(*given, kind=k, tail="renormalize") for k in ("forward", "reverse")
    )
    agree(0.3 * forward + 0.7 * reverse, theirs, student)


def test_raw_top_k_forward_kl(batch):
    """verl: no renormalisation; it floors log-probabilities at -10, which none here reaches."""
    student, teacher, labels = batch
    logprobs, ids = teacher.log_softmax(-1).topk(8)
    log_q = student.log_softmax(-1).gather(-1, ids)
    assert log_q.min() > -10
    theirs = (logprobs.exp() * (logprobs - log_q)).sum(-1)[labels != -100].mean()
    agree(fastgen.sparse_divergence_loss(student, logprobs, ids, tail="none", labels=labels), theirs, student)


def test_hard_targets(batch):
    """Hinton's: the cross-entropy with the labels, before the temperature, beside T² times the divergence."""
    student, teacher, labels = batch
    soft = F.kl_div((student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).softmax(-1), reduction="none").sum(
        -1
    )
    soft = torch.where(labels != -100, soft, 0.0).sum() / (labels != -100).sum()
    hard = F.cross_entropy(student.flatten(0, -2), labels.flatten())
    ours = TEMPERATURE**2 * fastgen.generalized_jsd_loss(
        student, teacher, labels, beta=0.0, temperature=TEMPERATURE, cross_entropy_weight=0.5 / TEMPERATURE**2
    )
    agree(ours, TEMPERATURE**2 * soft + 0.5 * hard, student)


def test_cross_entropy_with_the_teacher(batch):
    """torchtune and OpenRLHF: without the teacher's own entropy, so the value differs and the gradient does not."""
    student, teacher, labels = batch
    counted, p = labels != -100, teacher.softmax(-1)
    theirs = -(p * student.log_softmax(-1)).sum(-1)[counted].mean()
    entropy = -(p * teacher.log_softmax(-1)).sum(-1)[counted].mean()
    agree(fastgen.generalized_jsd_loss(student, teacher, labels, beta=0.0) + entropy, theirs, student)


def test_self_distillation_over_the_students_top_k(batch):
    """SDPO: the support is the student's, with a bucket for the rest."""
    student, teacher, _ = batch
    ids = student.detach().topk(8).indices
    log_q, log_p = (t.log_softmax(-1).gather(-1, ids) for t in (student, teacher))
    log_q, log_p = (torch.cat([t, torch.log1p(-t.exp().sum(-1, keepdim=True))], -1) for t in (log_q, log_p))
    log_m = torch.logaddexp(log_q, log_p) - torch.tensor(2.0).log()
    theirs = sum(F.kl_div(log_m, t, reduction="none", log_target=True).sum(-1).mean() / 2 for t in (log_q, log_p))
    logprobs = teacher.log_softmax(-1).gather(-1, ids)
    agree(fastgen.sparse_divergence_loss(student, logprobs, ids, kind="jsd"), theirs, student)


def test_a_jsd_that_tends_to_the_kl_divergences(batch):
    student, teacher, labels = batch
    ends = [fastgen.generalized_jsd_loss(student, teacher, labels, beta=beta) for beta in (0.0, 1.0)]
    near = [fastgen.generalized_jsd_loss(student, teacher, labels, beta=b, scaled=True) for b in (1e-4, 1 - 1e-4)]
    torch.testing.assert_close(near, ends, rtol=5e-3, atol=0)
    half = fastgen.generalized_jsd_loss(student, teacher, labels, scaled=True)
    agree(half, 4 * fastgen.generalized_jsd_loss(student, teacher, labels), student)


@pytest.fixture
def images():
    """Four tensors of two pairs, winners first: a model's predictions, a reference's, targets, a generator's images."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 5, 5, generator=generator).to(DEVICE) for _ in range(4)]


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_diffusers_beta_dpo(images, kind):
    """diffusers' script for Diffusion-DPO has no ½ beside its beta_dpo; the published code and ours have."""
    pred, ref_pred, target, _ = images
    pred.requires_grad_()
    beta_dpo = 1.5
    winner, loser = (F.mse_loss(pred, target, reduction="none") - (ref_pred - target) ** 2).mean((1, 2, 3)).chunk(2)
    margin = loser - winner  # of how much better than its reference the model is
    theirs = {
        "sigmoid": -F.logsigmoid(beta_dpo * margin),
        "hinge": F.relu(1 - beta_dpo * margin),
        "ipo": (margin - 1 / (2 * beta_dpo)) ** 2,
    }[kind].mean()
    beta = 2 * beta_dpo if kind == "sigmoid" else beta_dpo
    agree(fastgen.diffusion_dpo_loss(pred, ref_pred, target, beta=beta, kind=kind), theirs, pred)


def test_fastvideos_normaliser_of_the_batch(images):
    """FastVideo: the difference of x0-predictions over one mean for the batch; guided as in Self-Forcing."""
    x, real, uncond, fake = images
    x.requires_grad_()
    guided = real + 3.5 * (real - uncond)
    normalizer = (x - guided).abs().mean().detach()
    theirs = 0.5 * F.mse_loss(x, (x - (fake - guided) / normalizer).detach())
    given = {"prediction_type": "x0", "real_uncond": uncond, "guidance_scale": 4.5}
    weight = (1 / normalizer).expand(len(x))
    agree(fastgen.dmd_loss(x, None, real, fake, normalizer=None, weight=weight, **given), theirs, x)
    # Each sample's own normaliser gives other gradients, unless the batch is one sample.
    (own,) = torch.autograd.grad(fastgen.dmd_loss(x, None, real, fake, **given), x)
    assert not torch.allclose(own, (fake - guided) / normalizer / x.numel(), rtol=1e-2)
