"""``fastgen.integrations.trl``: what it replaces in a trainer's module; where TRL is installed, a step's whole loss."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from test_conventions import agree, rows
from test_policy_gradients import batch, gathered, stand_in  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.core import dispatch
from fastgen.integrations import trl

SELF_DISTILLATION = [f"trl.experimental.{kind}.{kind}_trainer" for kind in ("sdpo", "sdft")]


@pytest.fixture(autouse=True)
def _restored():
    yield
    trl.restore()


def sampled(student_logits, teacher_logits, completion_ids, *, distillation_alpha):
    if distillation_alpha != 1:
        raise ValueError("Only reverse KL")
    log_q, log_p = (gathered(t, completion_ids) for t in (student_logits, teacher_logits))
    return (log_q - log_p).detach() * log_q


def full(student_logits, teacher_logits, *, distillation_alpha):
    return rows(student_logits, teacher_logits, distillation_alpha).sum(-1)


def top(student_logits, teacher_logits, *, distillation_topk, distillation_alpha, distillation_add_tail):
    ids = student_logits.topk(distillation_topk).indices
    log_q, log_p = (t.log_softmax(-1).gather(-1, ids) for t in (student_logits, teacher_logits))
    if distillation_add_tail:
        log_q, log_p = (torch.cat([t, torch.log1p(-t.exp().sum(-1, keepdim=True))], -1) for t in (log_q, log_p))
    return rows(log_q, log_p, distillation_alpha).sum(-1)  # whose softmax renormalises what has no bucket


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    picked = (logits / temperature).log_softmax(-1)
    if index.dim() == logits.dim():
        return picked.gather(-1, index)
    picked = picked.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return picked if row_mask is None else picked.masked_fill(row_mask == 0, 0.0)


@pytest.fixture(params=SELF_DISTILLATION)
def module(request, monkeypatch):
    """A trainer's module with its losses, by their formulas."""
    made = ModuleType(request.param)
    made.compute_sampled_token_self_distillation_loss = sampled
    made.compute_full_logit_self_distillation_loss = full
    made.compute_topk_self_distillation_loss = top
    made.selective_log_softmax = selective_log_softmax
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def calls(module, student, teacher, tokens, counted):
    """Losses of each token."""
    for alpha in (0.0, 0.3, 1.0):
        yield module.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
        for tail in (True, False):
            given = {"distillation_topk": 8, "distillation_alpha": alpha, "distillation_add_tail": tail}
            yield module.compute_topk_self_distillation_loss(student, teacher, **given)
    yield module.compute_sampled_token_self_distillation_loss(student, teacher, tokens, distillation_alpha=1.0)
    yield module.selective_log_softmax(student, tokens)
    yield module.selective_log_softmax(student, tokens, 2.0, row_mask=counted.long())
    yield module.selective_log_softmax(student, tokens.unsqueeze(-1).expand(2, 6, 3))


def test_self_distillation(module, batch):  # noqa: F811
    student, teacher, tokens, counted, _ = batch
    originals = dict(vars(module))
    theirs = list(calls(module, student, teacher, tokens, counted))
    replaced = trl.use_fastgen()
    for function in ("compute_sampled_token_self_distillation_loss", "selective_log_softmax"):
        assert f"{module.__name__}:{function}" in replaced
        assert getattr(module, function) is not originals[function]
    assert trl.use_fastgen() == replaced
    for mine, other in zip(calls(module, student, teacher, tokens, counted), theirs, strict=True):
        weight = torch.rand_like(other)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        agree((weight * mine).mean(), (weight * other).mean(), student)
    with pytest.raises(ValueError, match="Only reverse KL"):  # its own refusal
        module.compute_sampled_token_self_distillation_loss(student, teacher, tokens, distillation_alpha=0.5)
    trl.restore()
    assert dict(vars(module)) == originals


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["full_logits", "topk_logits", "sampled_token", "policy"])
@pytest.mark.parametrize("name", SELF_DISTILLATION)
def test_the_whole_loss_of_a_step(name, mode, batch):  # noqa: F811
    """With a local teacher no softmax is left to TRL, but for the top k's normalizer of the teacher."""
    pytest.importorskip("trl")
    module = importlib.import_module(name)
    trainer = getattr(module, "SDPOTrainer", None) or module.SDFTTrainer
    if mode == "policy" and not hasattr(trainer, "_compute_policy_loss"):
        pytest.skip("SDFT has no policy's loss")
    if dispatch.missing("token_logprob", "native", DEVICE) is not None:
        pytest.skip("the reference is made of softmaxes")
    student, teacher, tokens, counted, older = batch
    asked = stand_in(
        _log_self_distillation_metric=lambda *_: None,
        accelerator=SimpleNamespace(gather=lambda t: t),
        args=SimpleNamespace(
            distillation_mode=mode,
            distillation_topk=8,
            distillation_alpha=1.0,
            distillation_add_tail=True,
            distillation_is_clip=2.0,
        ),
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type="grpo",
    )
    inputs = {
        "completion_ids": tokens,
        "completion_mask": counted.long(),
        "advantages": torch.tensor([1.0, -0.5], device=DEVICE),
        "old_per_token_logps": older,
    }

    logits = SimpleNamespace(
        completion_ids=tokens,
        loss_mask=counted.long(),
        student_logits=student,
        teacher_logits=teacher,
    )

    def loss():
        if mode == "policy":
            return trainer._compute_policy_loss(asked, inputs, student)
        return trainer._compute_self_distillation_loss(asked, asked.model, inputs, logits)

    theirs = loss()
    trl.use_fastgen()
    with Operators() as seen:
        ours = loss()
    agree(ours, theirs, student)
    softmaxes = {"_log_softmax", "_softmax", "log_softmax", "logsumexp"}
    assert seen.names & softmaxes <= ({"logsumexp"} if mode == "topk_logits" else set())
