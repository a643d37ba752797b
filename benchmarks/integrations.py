"""The drop-ins in the libraries that they are for: ``make integrations`` installs these and runs this file.

First each replaced function against the library's own, values and gradients; then trainers, 20 steps on random tiny
models that are made from configurations, with their own loss and with fastgen's, in processes of their own: the two
curves, and what CPU time and memory each takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

STEPS, VOCABULARY = 20, 32000
TRAINERS = ("GKDTrainer", "DistillationTrainer")


def _close(what: str, losses: Iterable[Callable[..., Tensor]], *leaves: Tensor) -> None:
    values, gradients = [], []
    for loss in losses:
        value = loss()
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), leaves))
    torch.testing.assert_close(*values, rtol=2e-5, atol=1e-6)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6 * other.abs().max().item() + 1e-9)
    print(f"  {what}: same value and gradients")


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def check_functions() -> None:
    """Each function that is replaced, as installed, and what replaces it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.sdpo import sdpo_trainer
    from trl.trainer import distillation_trainer

    from fastgen.integrations import liger, trl

    student, teacher = _rows(2, 9, 300), _rows(2, 9, 300).detach()
    hidden, weight, teacher_hidden = _rows(2, 9, 16), _rows(300, 16), torch.randn(2, 9, 24)
    teacher_weight, labels = torch.randn(300, 24), torch.randint(300, (2, 9))
    labels[:, ::3] = -100
    mask = labels != -100

    def both(call: Callable[[], Tensor]) -> tuple[Callable[..., Tensor], ...]:
        def ours() -> Tensor:
            trl.use_fastgen()
            try:
                return call()
            finally:
                trl.restore()

        return ours, call

    for beta in (0.0, 0.3, 1.0):
        for options in ({}, {"num_items_in_batch": 5}, {"reduction": "sum"}, {"reduction": "none"}):
            call = lambda beta=beta, options=options: GKDTrainer.generalized_jsd_loss(  # noqa: E731
                student, teacher, labels, beta=beta, temperature=1.5, **options
            )
            _close(f"GKDTrainer.generalized_jsd_loss β = {beta} {options}", both(call), student)
        chunked = lambda beta=beta: distillation_trainer._chunked_divergence_loss(  # noqa: E731
            *(hidden, teacher_hidden, weight, teacher_weight, mask, beta),
            student_logit_scale=0.5,
            student_final_logit_softcapping=2.0,
            teacher_logit_scale=0.7,
            teacher_final_logit_softcapping=3.0,
        )
        for part in (0, 1):
            call = lambda chunked=chunked, part=part: chunked()[part].requires_grad_(part == 0)  # noqa: E731
            if part == 0:
                _close(f"DistillationTrainer β = {beta}", both(call), hidden, weight)
            else:
                torch.testing.assert_close(*(loss() for loss in both(call)), rtol=1e-4, atol=1e-4)
        for tail in (True, False):
            call = lambda beta=beta, tail=tail: sdpo_trainer.compute_topk_self_distillation_loss(  # noqa: E731
                student, teacher, distillation_topk=20, distillation_alpha=beta, distillation_add_tail=tail
            )
            _close(f"SDPOTrainer's top k α = {beta}, bucket {tail}", both(call), student)
        whole = lambda beta=beta: sdpo_trainer.compute_full_logit_self_distillation_loss(  # noqa: E731
            student, teacher, distillation_alpha=beta
        )
        _close(f"SDPOTrainer's full logits α = {beta}", both(whole), student)
        flat = [t.flatten(0, 1) for t in (hidden, teacher_hidden)]
        for teacher_columns in (weight.shape[0], weight.shape[0] + 7):
            wide = torch.randn(teacher_columns, 24)
            given = {"beta": beta, "temperature": 1.5, "compiled": False}
            arguments = flat[0], weight, flat[1], wide, labels.flatten()
            pair = [
                lambda kind=kind, given=given, arguments=arguments: kind(**given)(*arguments)
                for kind in (liger.LigerFusedLinearJSDLoss, LigerFusedLinearJSDLoss)
            ]
            _close(f"LigerFusedLinearJSDLoss β = {beta}, {teacher_columns} columns", pair, hidden, weight)
    taken = student, teacher, labels.abs()

    def sampled() -> Tensor:
        return sdpo_trainer.compute_sampled_token_self_distillation_loss(*taken, distillation_alpha=1.0)

    _close("SDPOTrainer's sampled tokens", both(sampled), student)
    _close("its log-probabilities", both(lambda: sdpo_trainer.selective_log_softmax(student, labels.abs())), student)


def train(trainer: str, steps: int) -> dict[str, Any]:
    """The losses of a trainer's steps, and what they took; in the process's only run."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def model(seed: int, width: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config)

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, VOCABULARY, (n,), generator=generator).tolist())

    common = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    student, teacher = model(1, 64), model(2, 96)
    messages = [[{"role": "user", "content": text(8)}, {"role": "assistant", "content": text(56)}] for _ in range(64)]
    if trainer == "GKDTrainer":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        run = GKDTrainer(
            student,
            teacher,
            args=GKDConfig(**common, lmbda=0.0, beta=0.5, max_length=64),
            train_dataset=Dataset.from_dict({"messages": messages}),
            processing_class=tokenizer,
        )
    else:
        run = trl.DistillationTrainer(
            student,
            teacher,
            args=trl.DistillationConfig(**common, beta=0.5, max_completion_length=56, temperature=1.0),
            train_dataset=Dataset.from_dict({"prompt": [text(8) for _ in range(64)]}),
            processing_class=tokenizer,
        )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    run.train()
    taken, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return {"losses": losses, "cpu_seconds": taken, "megabytes": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", choices=TRAINERS, help="run one trainer, and print its figures as JSON")
    parser.add_argument("--fastgen", action="store_true", help="with fastgen's loss")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if options.train:
        if options.fastgen:
            from fastgen.integrations import trl

            trl.use_fastgen()
        print(json.dumps(train(options.train, options.steps)))
        return
    torch.manual_seed(0)
    check_functions()
    for trainer in TRAINERS:
        command = [sys.executable, "-m", "benchmarks.integrations", "--train", trainer, "--steps", str(options.steps)]
        found = []
        for which in ([], ["--fastgen"]):
            done = subprocess.run([*command, *which], check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        theirs, ours = found
        apart = max(abs(a - b) / abs(a) for a, b in zip(theirs["losses"], ours["losses"], strict=True))
        ratios = [ours[what] / theirs[what] for what in ("cpu_seconds", "megabytes")]
        print(f"{trainer}: {options.steps} losses from {theirs['losses'][0]:.4f} to {theirs['losses'][-1]:.4f}")
        print(f"  apart by {apart:.1e} at most; CPU time {ratios[0]:.2f} and memory {ratios[1]:.2f} of its own loss's")
        assert apart < 1e-3, f"{trainer} has another curve"


if __name__ == "__main__":
    main()
