"""Losses over sampled tokens, by their papers' and other libraries' formulas, as compositions of fastgen's functions.

docs/recipes.md has them as users write them. Where TRL is installed, its methods are compared besides.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from test_conventions import agree, rows

import fastgen

VOCABULARY = 40


@pytest.fixture
def batch():
    """Logits of a student and a teacher, sampled tokens, which of them count, and their log-probabilities by an older
    student."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, VOCABULARY, generator=generator).to(DEVICE) for _ in range(2))
    tokens = torch.randint(VOCABULARY, (2, 6), generator=generator).to(DEVICE)
    counted = torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
    counted[0, 4:] = False
    older = gathered(student, tokens) + 0.5 * torch.randn(2, 6, generator=generator).to(DEVICE)
    return student.requires_grad_(), teacher, tokens, counted, older


def gathered(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def logprobs(student, teacher, tokens):
    """The student's and the teacher's, and the reward: how much likelier a token is to the teacher."""
    log_q, log_p = (fastgen.token_logprob(t, tokens) for t in (student, teacher))
    return log_q, log_p, (log_p - log_q).detach()


def sampled_tokens(student, teacher, tokens, older, clip):
    log_q, _, reward = logprobs(student, teacher, tokens)
    weight = (log_q.detach() - older).clamp(-20, 20).exp().clamp(max=clip)
    return -weight * reward * log_q


def iw_opd(student, teacher, tokens, counted, older, gamma):
    log_q, log_p, _ = logprobs(student, teacher, tokens)
    reward = torch.where(counted, log_p - older, 0)
    size = reward.abs()
    before = (size.cumsum(1) - size) / size.sum(1, keepdim=True).clamp(min=1e-8)
    return -((1 + gamma * (1 - before)) * reward * log_q).sum() / counted.sum()


def grpo(student, teacher, tokens, counted, older, advantage, beta):
    """The clipped ratio, and k3 of the divergence from the reference, each sequence's mean and theirs."""
    log_q, log_p, _ = logprobs(student, teacher, tokens)
    ratio, x = (log_q - older).exp(), log_p - log_q
    loss = beta * (x.exp() - x - 1) - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return ((loss * counted).sum(1) / counted.sum(1)).mean()


def test_sampled_tokens(batch):
    """TRL's SDPO: the reverse KL's policy gradient over sampled tokens, times a ratio that is clipped above."""
    student, teacher, tokens, counted, older = batch
    log_q, log_p = gathered(student, tokens), gathered(teacher, tokens)
    ratio = (log_q - older).detach().clamp(-20, 20).exp().clamp(max=1.2)
    theirs = (ratio * (log_q - log_p).detach() * log_q)[counted].mean()
    agree(sampled_tokens(student, teacher, tokens, older, 1.2)[counted].mean(), theirs, student)


def test_a_weighted_divergence(batch):
    """SDPO over the vocabulary: the same ratio, as the weight of a token's divergence."""
    student, teacher, tokens, counted, older = batch
    ratio = (gathered(student, tokens) - older).exp().clamp(max=2.0)
    theirs = (ratio.detach() * rows(student, teacher, 1.0).sum(-1))[counted].mean()
    weight = (fastgen.token_logprob(student, tokens) - older).exp().clamp(max=2.0)
    agree(fastgen.generalized_jsd_loss(student, teacher, mask=counted, weight=weight, beta=1.0), theirs, student)


def test_iw_opd(batch):
    """IW-OPD (2606.22600), as TRL has it: a token's reward counts the more, the less went wrong before it."""
    student, teacher, tokens, counted, older = batch
    theirs = torch.zeros((), device=DEVICE)
    for b in range(len(tokens)):
        length = int(counted[b].sum())
        reward = (gathered(teacher, tokens) - older)[b, :length]
        for t in range(length):
            share = reward[:t].abs().sum() / reward.abs().sum()
            theirs = theirs - (1 + 0.5 * (1 - share)) * reward[t] * gathered(student, tokens)[b, t]
    agree(iw_opd(student, teacher, tokens, counted, older, 0.5), theirs / counted.sum(), student)


def test_grpo_and_its_penalty(batch):
    """TRL's GRPO: PPO's clipped ratio, and Schulman's k3, which verl's ``low_var_kl`` clamps at 10."""
    student, teacher, tokens, counted, older = batch
    advantage = torch.tensor([[1.0], [-0.5]], device=DEVICE)
    log_q, log_p = gathered(student, tokens), gathered(teacher, tokens)
    ratio = (log_q - older).exp()
    penalty = log_p.exp() / log_q.exp() - 1 + log_q - log_p
    assert 0 <= penalty.min() <= penalty.max() < 10
    clipped = torch.where(
        advantage > 0, advantage * ratio.clamp(max=1.2), advantage * ratio.clamp(min=0.8)
    )  # what the smaller of the two is
    theirs = torch.stack([(0.04 * penalty - clipped)[b, counted[b]].mean() for b in range(2)]).mean()
    agree(grpo(student, teacher, tokens, counted, older, advantage, 0.04), theirs, student)


def test_minillm():
    """MiniLLM (2306.08543): its two parts are the gradient of the whole sequences' reverse KL.

    Over all 27 sequences of three tokens, with the student's probabilities; logits depend on what went before.
    """
    torch.manual_seed(0)
    tokens = torch.cartesian_prod(*[torch.arange(3, device=DEVICE)] * 3)
    prefixes = torch.stack([0 * tokens[:, 0], 1 + tokens[:, 0], 4 + 3 * tokens[:, 0] + tokens[:, 1]], 1)
    table, other = (torch.randn(13, 3, device=DEVICE, dtype=torch.float64) for _ in range(2))
    student, teacher = table.requires_grad_()[prefixes], other[prefixes]

    log_q, _, reward = logprobs(student, teacher, tokens)
    q = log_q.sum(1).exp()
    later = reward.flip(1).cumsum(1).flip(1) - reward
    single = fastgen.generalized_jsd_loss(student, teacher, beta=1.0, reduction="none")
    ours = (q.detach() * (single - later * log_q).sum(1)).sum()
    exact = (q * (gathered(student, tokens) - gathered(teacher, tokens)).sum(1)).sum()
    mine, truth = (torch.autograd.grad(loss, table, retain_graph=True)[0] for loss in (ours, exact))
    torch.testing.assert_close(mine, truth)
    # Without what comes after, the first tokens' gradient is another.
    (alone,) = torch.autograd.grad((q.detach() * single.sum(1)).sum(), table, retain_graph=True)
    assert not torch.allclose(alone[0], truth[0], rtol=0.1)


# ---------------------------------------------------------------- the same, by TRL where it is installed


def stand_in(**attributes):
    """What a method of a trainer asks of it."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True), _metrics=defaultdict(partial(defaultdict, list)), **attributes
    )


def test_trls_iw_opd(batch):
    trainer = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer").IWOPDTrainer
    student, teacher, tokens, counted, older = batch
    theirs = trainer._compute_iw_opd_loss(
        stand_in(temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8),
        student,
        tokens,
        tokens.masked_fill(~counted, -100),
        gathered(teacher, tokens),
        older,
    )
    agree(iw_opd(student, teacher, tokens, counted, older, 0.5), theirs, student)


def test_trls_sampled_tokens(batch):
    utils = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    student, teacher, tokens, counted, older = batch
    loss = utils.compute_sampled_token_self_distillation_loss(student, teacher, tokens, distillation_alpha=1.0)
    loss = utils.apply_importance_sampling_clipping(loss, gathered(student, tokens), older, 1.2)
    agree(sampled_tokens(student, teacher, tokens, older, 1.2)[counted].mean(), loss[counted].mean(), student)


def test_trls_grpo(batch):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    student, teacher, tokens, counted, older = batch
    advantage = torch.tensor([[1.0], [-0.5]], device=DEVICE)
    log_q, log_p = gathered(student, tokens), gathered(teacher, tokens)
    asked = stand_in(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_q, torch.zeros_like(log_q), None),
        accelerator=SimpleNamespace(gather=lambda t: t, reduce=lambda t, **_: t, num_processes=1),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        beta=0.04,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type="grpo",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    inputs = {
        "prompt_ids": tokens,
        "prompt_mask": counted,
        "completion_ids": tokens,
        "completion_mask": counted.long(),
        "advantages": advantage,
        "old_per_token_logps": older,
        "ref_per_token_logps": log_p,
    }
    theirs = trainer._compute_loss(asked, None, inputs)
    agree(grpo(student, teacher, tokens, counted, older, advantage, 0.04), theirs, student)
