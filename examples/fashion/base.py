"""Train what the scripts start from: a classifier for its features, the base, and a transformer over tokens.

    python examples/fashion base --out run     # an hour on two cores; stopped, it goes on where it was

Their weights are here (`weights`), in half precision, with the log of the run that made them; this makes them anew.
The base is EDM's denoiser (arXiv 2206.00364), a tenth of its rows without a class, its weights averaged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Table, Trainer, accuracy, argument_parser, farewell, plt, print_table, save_picture, start
from tqdm import tqdm

from fashion.data import Data, Split, load
from fashion.networks import NO_CLASS, Classifier, Denoiser, Network, denoising_loss, load_weights, noised, save_weights
from fashion.tokens import Transformer, to_tokens, token_nll

BATCH = 128


def train_classifier(data: Data, steps: int, seed: int = 0) -> Classifier:
    """Adam, its learning rate lowered to zero along a cosine; images are moved by up to two pixels."""
    torch.manual_seed(seed)
    model, gen = Classifier(), torch.Generator().manual_seed(seed)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in tqdm(range(steps), desc="classifier"):
        rows = data.train.draw(BATCH, gen)
        dy, dx = torch.randint(0, 5, (2,), generator=gen).tolist()
        x = F.pad(rows.images, (2, 2, 2, 2), value=-1.0)[:, :, dy : dy + 28, dx : dx + 28]
        opt.zero_grad()
        F.cross_entropy(model(x), rows.labels).backward()
        opt.step()
        rate.step()
    return model.eval().requires_grad_(False)


def train_tokens(data: Data, steps: int) -> Transformer:
    """A transformer over image tokens, by NLL; its weights averaged."""
    torch.manual_seed(0)
    gen = torch.Generator().manual_seed(0)
    trainer = Trainer(Transformer(), 2e-3, warmup=100, ema_decay=0.99, betas=(0.9, 0.99), decay_steps=steps)
    bar = tqdm(range(steps), desc="tokens")
    for _ in bar:
        rows = data.train.draw(BATCH // 2, gen)
        tokens = to_tokens(rows.images)
        loss = F.cross_entropy(trainer.model(rows.labels, tokens).flatten(0, 1), tokens.flatten())
        trainer.step(loss)
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return trainer.ema.eval()


def weighted_error(model: Denoiser, split: Split) -> float:
    """The base's loss on 2000 images of a split, with one draw of noise and levels for all who ask."""
    gen, total = torch.Generator().manual_seed(1), 0.0
    rows = split[:2000]
    parts = (part.split(500) for part in (rows.images, rows.labels, *noised(rows.images, gen)))
    with torch.no_grad():
        for x, y, noisy, sigma, noise in zip(*parts, strict=True):
            total += float(denoising_loss(model(noisy, sigma, y), x, noise, sigma)) * len(x)
    return total / len(rows)


def train_base(
    data: Data, steps: int, every: int, saved: Path, lr: float = 1e-3
) -> tuple[Denoiser, list[dict[str, float]]]:
    """The averaged model and its log; `saved` holds the state of a run that was stopped."""
    torch.manual_seed(0)
    gen, log, began = torch.Generator().manual_seed(0), [], time.perf_counter()
    trainer = Trainer(Denoiser(), lr, warmup=200, ema_decay=0.999, betas=(0.9, 0.99), decay_steps=steps)
    if saved.exists():
        state: dict[str, Any] = torch.load(saved, weights_only=True)
        trainer.load_state_dict(state["trainer"])
        gen.set_state(state["generator"])
        log, began = state["log"], began - state["log"][-1]["seconds"]
    bar, losses = tqdm(range(trainer.steps, steps), desc="base", initial=trainer.steps, total=steps), []
    for step in bar:
        rows = data.train.draw(BATCH, gen)
        label = rows.labels.masked_fill(torch.rand(BATCH, generator=gen) < 0.1, NO_CLASS)
        noisy, sigma, noise = noised(rows.images, gen)
        loss = denoising_loss(trainer.model(noisy, sigma, label), rows.images, noise, sigma)
        trainer.step(loss)
        losses.append(loss.detach())
        if (step + 1) % every == 0:
            row = {"step": step + 1, "training loss": float(torch.stack(losses).mean())}
            row |= {
                "validation loss": weighted_error(trainer.ema, data.validation),
                "seconds": time.perf_counter() - began,
            }
            log.append(row)
            losses = []
            bar.set_postfix(validation=f"{row['validation loss']:.4f}")
            state = {"trainer": trainer.state_dict(), "generator": gen.get_state(), "log": log}
            torch.save(state, saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
    return trainer.ema, log


def draw(log: list[dict[str, float]], path: Path) -> None:
    fig, ax = plt.subplots(figsize=(6.0, 3.5), layout="constrained")
    for name in ("training loss", "validation loss"):
        ax.plot([row["step"] for row in log], [row[name] for row in log], label=name)
    ax.set(xlabel="step", ylabel="weighted error", title="the base")
    ax.legend()
    save_picture(fig, path)


def main(argv: list[str] | None = None) -> dict[str, Table]:
    """Train those that are not in --out yet; return how they do on the three splits."""
    parser = argument_parser("Train the base, the classifier and the transformer of the fashion examples.", threads=2)
    parser.add_argument("--steps", type=int, default=8000, help="of the base; the others take half and a quarter")
    args = start(parser, argv)
    data, steps = load(args.smoke), 4 if args.smoke else args.steps
    args.out.mkdir(parents=True, exist_ok=True)

    def once(name: str, model: Network, train: Callable[[], Network]) -> Network:
        path = args.out / f"{name}.safetensors"
        if not path.exists():
            save_weights(train(), path)
        return load_weights(model, path)

    def base() -> Denoiser:
        model, log = train_base(data, steps, max(1, steps // 32), args.out / "base.pt")
        (args.out / "base.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        return model

    classifier = once("classifier", Classifier(), lambda: train_classifier(data, steps // 2))
    tokens = once("tokens", Transformer(), lambda: train_tokens(data, steps // 4))
    denoiser = once("base", Denoiser(), base)
    picture = args.out / "base.png"
    draw(json.loads((args.out / "base.json").read_text(encoding="utf-8")), picture)
    splits = {"training": data.train[: len(data.test)], "validation": data.validation, "test": data.test}
    table: Table = {}
    for name, split in splits.items():
        table[name] = {
            "classifier: accuracy": accuracy(classifier(split.images), split.labels),
            "transformer: NLL": token_nll(tokens, split),
            "base: weighted error": weighted_error(denoiser, split),
        }
    print_table("What all scripts start from", table)
    farewell(args, picture)
    return {"networks": table}
