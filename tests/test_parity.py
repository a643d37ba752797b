"""Other libraries' losses over logits, in their own arithmetic, and ours: values and gradients against float64.

Far from the teacher all agree. Where the student is within 1 % of it, what they round before they subtract is as large
as the difference, and ours have to be closer. The formulas are written from the libraries' code; where a library is
installed, its function takes the formula's place in a second test. On a CPU alone: a GPU takes exponentials from the
hardware, for which the operators' own bounds allow. Two seconds in all.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import sequences
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor

import fastgen
from benchmarks.logits_rounding import operands, relative

pytestmark = sequences.native
BETAS = (0.0, 0.5, 1.0)
ROWS, WIDTH, VOCABULARY, TOP = 32, 64, 500, 16
NEAR = 0.01  # the noise that parts the student from its teacher, relative to the latter


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the formula is to be exact."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- of logits


def trl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """TRL 1.16's ``generalized_jsd_loss`` (GKD, GOLD, IW-OPD), Liger-Kernel's too: everything in the logits' dtype."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    divergence = partial(F.kl_div, reduction="none", log_target=True)
    if beta == 0:
        return divergence(log_q, log_p).sum(-1)
    if beta == 1:
        return divergence(log_p, log_q).sum(-1)
    share = torch.tensor(beta, dtype=log_q.dtype)
    log_m = torch.stack([log_q + torch.log1p(-share), log_p + share.log()]).logsumexp(0)
    return (share * divergence(log_m, log_p) + (1 - share) * divergence(log_m, log_q)).sum(-1)


def automodel(student: Tensor, teacher: Tensor) -> Tensor:
    """NeMo Automodel's ``KDLoss``: ``Σ P (log P - log Q)`` in float32."""
    log_q, log_p = (F.log_softmax(t, -1, dtype=wide(t.dtype)) for t in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def torchtune(student: Tensor, teacher: Tensor) -> Tensor:
    """torchtune's ``ForwardKLLoss``, also OpenRLHF's and MiniLLM's: ``-Σ P log Q`` in float32."""
    p = F.softmax(teacher, -1, dtype=wide(teacher.dtype))
    return -(p * F.log_softmax(student, -1, dtype=wide(student.dtype))).sum(-1)


def modelopt(student: Tensor, teacher: Tensor) -> Tensor:
    """ModelOpt's ``LogitsDistillationLoss``: log-probabilities against probabilities, in the logits' dtype."""
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)


def entries(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """What a server returns of a teacher, in float32 whatever it is: the most likely tokens' log-probabilities."""
    logprobs, ids = teacher.float().log_softmax(-1).topk(TOP)
    return logprobs.to(wide(teacher.dtype)), ids


def verl(student: Tensor, teacher: Tensor) -> Tensor:
    """verl's forward KL over the top k: the student's log-probabilities in its logits' dtype."""
    log_p, ids = entries(teacher)
    return (log_p.exp() * (log_p - student.log_softmax(-1).gather(-1, ids))).sum(-1)


def sparse(student: Tensor, teacher: Tensor) -> Tensor:
    return fastgen.sparse_divergence_loss(student, *entries(teacher), tail="none", reduction="none")


def dense(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(fastgen.generalized_jsd_loss, beta=beta, reduction="none")


class Peer(NamedTuple):
    """`theirs` and `ours`: losses of each row. `closer`: how many times closer to float64 ours are at least, near the
    teacher, of the value and of the gradients, in float32 and in bfloat16; measured were more. Below 1
    it is no closer: the same operations, or the same roundings of operands and results."""

    theirs: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    closer: dict[torch.dtype, tuple[float | None, float]]


def closer(float32: tuple[float | None, float], bfloat16: tuple[float | None, float]) -> dict:
    return {torch.float32: float32, torch.bfloat16: bfloat16}


OF_LOGITS = {
    "TRL-0.0": Peer(partial(trl, beta=0.0), dense(0.0), closer((50, 1.2), (1e5, 30))),
    "TRL-0.5": Peer(partial(trl, beta=0.5), dense(0.5), closer((50, 20), (1e5, 50))),
    "TRL-1.0": Peer(partial(trl, beta=1.0), dense(1.0), closer((50, 20), (1e5, 30))),
    "NeMo-Automodel": Peer(automodel, dense(0.0), closer((50, 1.2), (50, 0.9))),
    "torchtune": Peer(torchtune, dense(0.0), closer((None, 1.2), (None, 0.9))),  # the value has the teacher's entropy
    "ModelOpt": Peer(modelopt, dense(0.0), closer((50, 1.2), (1e5, 30))),
    "verl": Peer(verl, sparse, closer((0.9, 1.1), (1e3, 4))),  # a raw sum, whose value cancels for all
}


def results(loss: Callable[..., Tensor], leaves: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The loss of each row, and the gradients of their mean."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    value = loss(*leaves, *others)
    return [value.detach(), *torch.autograd.grad(value.mean(), leaves)]


def check(peer: Peer, theirs: Callable[..., Tensor], leaves: list[Tensor], others: list[Tensor], noise: float) -> None:
    exact = results(peer.theirs, [t.double() for t in leaves], [t.double() for t in others])
    value, gradient = peer.closer[leaves[0].dtype]
    compared = zip(results(peer.ours, leaves, others), results(theirs, leaves, others), exact, strict=True)
    for part, (mine, other, truth) in enumerate(compared):
        factor = gradient if part else value
        if factor is None:
            continue
        error, bar, rounding = (relative(t, truth) for t in (mine, other, truth.to(mine.dtype)))
        if noise == NEAR:
            assert error * factor <= bar, f"part {part}: {error:.1e}, theirs {bar:.1e}"
        else:
            assert error <= 1.5 * bar + rounding, f"part {part}: {error:.1e}, theirs {bar:.1e}"
            assert bar < 0.03, f"part {part}: theirs is another function, apart by {bar:.1e}"


def logits(noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher, change = (3 * torch.randn(ROWS, VOCABULARY, generator=generator) for _ in range(2))
    return (teacher + noise * change).to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("noise", [1.0, NEAR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_LOGITS)
def test_losses_of_logits(name: str, dtype: torch.dtype, noise: float) -> None:
    student, teacher = logits(noise, dtype)
    check(OF_LOGITS[name], OF_LOGITS[name].theirs, [student], [teacher], noise)


# ---------------------------------------------------------------- of hidden states and output layers


def liger(hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Liger-Kernel 0.8's fused linear JSD, its soft part: a layer's logits, rounded to its dtype."""
    return trl(hidden @ weight.t(), taught @ teacher.t(), beta)


class Chunked(torch.autograd.Function):
    """TRL 1.16's chunked divergence: float32 logits; the divergence of a row by its normalizers' difference, its
    gradient by hand and rounded to the operands' dtype before the products."""

    @staticmethod
    def forward(ctx, hidden, weight, taught, teacher, beta):
        dtype = wide(hidden.dtype)
        student, target = hidden.to(dtype) @ weight.to(dtype).t(), taught.to(dtype) @ teacher.to(dtype).t()
        normal, other = student.logsumexp(-1), target.logsumexp(-1)
        log_q, log_p = student - normal[:, None], target - other[:, None]
        q, p = log_q.exp(), log_p.exp()
        if beta == 0:
            value = (p * (target - student)).sum(-1) - other + normal
            grad = q - p
        elif beta == 1:
            value = (q * (student - target)).sum(-1) - normal + other
            grad = q * (log_q - log_p - value[:, None])
        else:
            share = torch.tensor(beta, dtype=dtype)
            log_m = torch.logaddexp(log_q + torch.log1p(-share), log_p + share.log())
            to_q = (q * (log_q - log_m)).sum(-1)
            value = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * to_q
            grad = (1 - beta) * q * (log_q - log_m - to_q[:, None])
        ctx.save_for_backward(grad, hidden, weight)
        return value

    @staticmethod
    def backward(ctx, cotangent):
        grad, hidden, weight = ctx.saved_tensors
        grad = (grad * cotangent[:, None]).to(hidden.dtype).to(grad.dtype)
        found = grad @ weight.to(grad.dtype), grad.t() @ hidden.to(grad.dtype)
        return *(t.to(hidden.dtype) for t in found), None, None, None


def chunked(*operands: Tensor, beta: float) -> Tensor:
    return Chunked.apply(*operands, beta)


def linear(*operands: Tensor, beta: float) -> Tensor:
    return fastgen.linear_generalized_jsd_loss(*operands, beta=beta, reduction="none")


OF_HIDDEN = {
    f"{name}-{beta}": Peer(partial(theirs, beta=beta), partial(linear, beta=beta), factors)
    for name, theirs, factors in (
        ("Liger", liger, closer((3, 0.9), (1e5, 50))),
        ("TRL-chunked", chunked, closer((3, 0.9), (4, 0.9))),  # whose logits are of float32 too
    )
    for beta in BETAS
}


@pytest.mark.parametrize("noise", [1.0, NEAR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_HIDDEN)
def test_losses_of_hidden_states(name: str, dtype: torch.dtype, noise: float) -> None:
    given = operands(ROWS, WIDTH, VOCABULARY, noise, dtype, 0, DEVICE)
    check(OF_HIDDEN[name], OF_HIDDEN[name].theirs, given[:2], given[2:], noise)


# ---------------------------------------------------------------- the libraries themselves


def of_trl(beta: float) -> Callable[..., Tensor]:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        return trainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)

    return rows


def of_trl_chunked(beta: float) -> Callable[..., Tensor]:
    kernel = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def rows(hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor) -> Tensor:
        given = hidden, weight, None, taught, teacher, None, beta, 1.0, 1.0, None, 1.0, None
        return kernel.apply(*given)[0]

    return rows


def of_liger(beta: float) -> Callable[..., Tensor]:
    module = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    loss = module(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)

    def mean(hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor) -> Tensor:
        return loss(hidden, weight, taught, teacher, torch.zeros(len(hidden), dtype=torch.int64))

    return mean


@pytest.mark.parametrize("noise", [1.0, NEAR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_the_libraries_themselves(beta: float, dtype: torch.dtype, noise: float) -> None:
    student, teacher = logits(noise, dtype)
    check(OF_LOGITS[f"TRL-{beta}"], of_trl(beta), [student], [teacher], noise)
    given = operands(ROWS, WIDTH, VOCABULARY, noise, dtype, 0, DEVICE)
    check(OF_HIDDEN[f"TRL-chunked-{beta}"], of_trl_chunked(beta), given[:2], given[2:], noise)
    # Liger's has no losses of rows: gradients alone, as the mean of a few numbers may be right by luck.
    exact = results(partial(liger, beta=beta), [t.double() for t in given[:2]], [t.double() for t in given[2:]])
    compared = zip(
        results(partial(linear, beta=beta), given[:2], given[2:]),
        results(of_liger(beta), given[:2], given[2:]),
        exact,
        strict=True,
    )
    factor = OF_HIDDEN[f"Liger-{beta}"].closer[dtype][1] if noise == NEAR else 0.6
    for mine, other, truth in list(compared)[1:]:
        assert relative(mine, truth) * factor <= relative(other, truth)
