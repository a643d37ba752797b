"""Distil a character model of real text into a smaller one: by NLL, sequence-level, supervised, on-policy and GKD.

    python examples/gkd_text.py            # the whole demo: some minutes on a quiet machine
    python examples/gkd_text.py --smoke    # the same path in seconds; its numbers mean nothing

The teacher is a GRU of 437 000 parameters, trained on 270 000 characters of Python's language reference; the student
has 36 000. It is first trained a little on the text itself, as in GKD (arXiv 2306.13649), and then, from there, for as
many steps by each of

- "NLL": more of the same, without the teacher: the control;
- "sequence-level KD": by NLL on continuations that the teacher wrote (`token_logprob`);
- `generalized_jsd_loss` to the teacher, on continuations of prompts that are, with probability λ, sampled by the
  student itself, otherwise the text's. λ = 0 is supervised, λ = 1 on-policy distillation; β = 0 is forward KL, which
  covers the teacher's modes, β = 1 reverse KL, which seeks them, between is the generalized Jensen-Shannon divergence;
- `sparse_divergence_loss`, forward KL on the text again, of a teacher that is known on its top K characters alone, the
  others in one bucket: what a server returns, or a file keeps.

For each it prints the NLL of held-out text; the teacher's NLL of the student's samples, their entropy, and the
difference, which estimates KL(student‖teacher): all in nats a character; the share of sampled words that the training
text has; and how many of those are different. Low is not good for the teacher's NLL alone: it falls with the entropy.

With seed 0 and two threads forward KL on the text gives the best likelihood of the students: 1.755 held out (1.779 by
NLL, 1.799 sequence-level, 1.842 at the start; the teacher 1.339). Reverse KL gives that up, at 1.92 supervised and 1.97
on-policy, for samples that the teacher likes: its NLL of them is 1.89 and 1.86, not 2.76 as by NLL, and 67 and 64 % of
their words are known, not 44 %. KL(student‖teacher) on the student's samples is 0.91 by NLL, 0.85 by supervised forward
KL, 0.59 by supervised and 0.54 by on-policy reverse KL, where it is lowest; for β of 0 and 0.5 λ changes little. The
top 64 of the teacher's 83 characters do all that the whole does; of what that gains over NLL in held-out likelihood,
the top 8 keep half: 1.766. All students are far from the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import Table, Trainer, argument_parser, farewell, plt, save_picture, start
from text import CharModel, Corpus, Recipe, Windows, continuation_logits, load_corpus, nll, report, train_nll
from torch import Tensor
from tqdm import tqdm

from fastgen import generalized_jsd_loss, sparse_divergence_loss


@dataclass(frozen=True)
class Config:
    """Every number one may want to change; the defaults are the demo's."""

    windows: Windows = Windows()
    teacher: Recipe = Recipe(width=256, steps=1000, lr=3e-3)
    student: Recipe = Recipe(width=64, steps=400, lr=4e-3)  # where all methods start
    steps: int = 200  # of each method
    lr: float = 2e-3
    lambdas: tuple[float, ...] = (0.0, 0.5, 1.0)
    betas: tuple[float, ...] = (0.0, 0.5, 1.0)
    entries: tuple[int, ...] = (8, 64)  # of a sparse teacher
    teacher_samples: int = 3200  # that sequence-level distillation learns from
    samples: int = 1000


SMOKE = Config(Windows(4, 12, 8), Recipe(24, 4, 3e-3), Recipe(16, 3, 4e-3), steps=2, teacher_samples=20, samples=20)


Loss = Callable[[Tensor, Tensor], Tensor]  # of the student's and the teacher's logits


def distil(
    begun: CharModel, teacher: CharModel, text: Tensor, cfg: Config, seed: int, lam: float, loss: Loss, name: str
) -> CharModel:
    """GKD: with probability `lam` a batch is the student's own continuations of the prompts, otherwise the text's."""
    gen = torch.Generator().manual_seed(seed)
    trainer = Trainer(begun, cfg.lr, warmup=20, ema_decay=0.98)
    for _ in tqdm(range(cfg.steps), desc=name):
        tokens = cfg.windows.draw(text, cfg.windows.batch, gen)
        if float(torch.rand((), generator=gen)) < lam:
            tokens = trainer.model.continue_(tokens[:, : cfg.windows.prompt], cfg.windows.length, gen)
        with torch.no_grad():
            target = continuation_logits(teacher, tokens, cfg.windows.prompt)
        student = continuation_logits(trainer.model, tokens, cfg.windows.prompt)
        trainer.step(loss(student, target))
    return trainer.ema


def sparse_loss(student: Tensor, teacher: Tensor, entries: int) -> Tensor:
    """Forward KL to what is known of the teacher: its most likely characters, and by them how likely the others are."""
    logprobs, ids = teacher.log_softmax(-1).topk(entries)
    return sparse_divergence_loss(student, logprobs, ids)


def distil_sequences(begun: CharModel, samples: Tensor, cfg: Config, seed: int) -> CharModel:
    """Sequence-level distillation: ordinary training, on continuations that the teacher wrote."""
    gen = torch.Generator().manual_seed(seed)
    trainer = Trainer(begun, cfg.lr, warmup=20, ema_decay=0.98)
    for _ in tqdm(range(cfg.steps), desc="sequence-level"):
        rows = torch.randint(len(samples), (cfg.windows.batch,), generator=gen)
        trainer.step(nll(trainer.model, samples[rows], cfg.windows.prompt))
    return trainer.ema


def train_all(corpus: Corpus, seed: int, cfg: Config) -> dict[str, CharModel]:
    text, windows = corpus.train, cfg.windows
    torch.manual_seed(seed)  # for the initial weights; all else draws from explicit generators
    gen = torch.Generator().manual_seed(10 * seed)
    teacher = cfg.teacher.train(corpus, windows, gen, "teacher")
    begun = cfg.student.train(corpus, windows, gen, "student")
    prompts = windows.draw(text, cfg.teacher_samples, gen)[:, : windows.prompt]
    written = teacher.continue_(prompts, windows.length, gen)
    own = 10 * seed + 1  # every method sees the same windows in the same order, as far as it looks at them
    models = {
        "teacher": teacher,
        "student, start": begun,
        "NLL": train_nll(
            begun, text, windows, torch.Generator().manual_seed(own), steps=cfg.steps, lr=cfg.lr, desc="NLL"
        ),
        "sequence-level KD": distil_sequences(begun, written, cfg, own),
    }
    for lam in cfg.lambdas:
        for beta in cfg.betas:
            name, loss = row_name(lam, beta), partial(generalized_jsd_loss, beta=beta)
            models[name] = distil(begun, teacher, text, cfg, own, lam, loss, name)
    for entries in cfg.entries:
        name, loss = sparse_name(entries), partial(sparse_loss, entries=entries)
        models[name] = distil(begun, teacher, text, cfg, own, 0.0, loss, name)
    return models


def row_name(lam: float, beta: float) -> str:
    kind = {0.0: "supervised", 1.0: "on-policy"}.get(lam, "mixed")
    return f"{kind}, λ={lam:g} β={beta:g}"


def sparse_name(entries: int) -> str:
    return f"supervised, top {entries}"


def draw(table: Table, cfg: Config, path: Path) -> None:
    """What is gained in the samples against what is lost in likelihood and in diversity."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    colours = {lam: f"C{k}" for k, lam in enumerate(cfg.lambdas)}
    for ax, column in zip(axes, ("held-out NLL", "entropy"), strict=True):
        for lam, colour in colours.items():
            rows = [table[row_name(lam, beta)] for beta in cfg.betas]
            ax.plot([r[column] for r in rows], [r["judge's NLL"] for r in rows], "o-", color=colour, label=f"λ = {lam}")
            for beta, row in zip(cfg.betas, rows, strict=True) if lam == cfg.lambdas[-1] else ():
                ax.annotate(f"β={beta:g}", (row[column], row["judge's NLL"]), xytext=(4, 4), textcoords="offset points")
        for name, marker in (("student, start", "s"), ("NLL", "D"), ("sequence-level KD", "^"), ("teacher", "*")):
            row = table[name]
            ax.plot(row[column], row["judge's NLL"], marker, color="black", label=name)
        for entries, marker in zip(cfg.entries, ("x", "+"), strict=True):
            row = table[sparse_name(entries)]
            ax.plot(row[column], row["judge's NLL"], marker, color="C0", ms=9, label=f"λ = 0.0, top {entries}")
        ax.set(xlabel=column, ylabel="teacher's NLL of the samples")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_picture(fig, path)


def main(argv: list[str] | None = None) -> Table:
    """Run the demo; return the table as {row: {column: number}}."""
    args = start(argument_parser("Distil a character model of real text.", threads=2), argv)
    cfg = SMOKE if args.smoke else Config()
    corpus = load_corpus()
    models = train_all(corpus, args.seed, cfg)
    sizes = [sum(p.numel() for p in models[name].parameters()) for name in ("teacher", "student, start")]
    print(f"The teacher has {sizes[0]} parameters, the student {sizes[1]}.")
    shown = ["student, start", "NLL", row_name(0.0, 0.0), row_name(1.0, 1.0), "teacher"]
    table = report(models, "teacher", shown, corpus, cfg.windows, cfg.samples, args.seed)
    picture = args.out / "gkd_text.png"
    draw(table, cfg, picture)
    farewell(args, picture)
    return table


if __name__ == "__main__":
    main()
