"""DDO for autoregressive models (arXiv 2503.01103): a transformer over image tokens, beside as many steps of its NLL.

    python examples/fashion ddo_tokens

Images are 14x14 tokens of 16 grey levels. In a round of self-play the frozen model from the round's start is the
reference: it writes the fakes and supplies the other half of the likelihood ratio, which for such a model is exact.
Nothing is guided and all is drawn at temperature 1. Of each round the weights at the half and at the end are
candidates, chosen by the distance to the validation split; where neither is nearer, the round is given up. The
control takes as many steps of NLL at the same learning rate, on twice as many real images a step, with the same
choice among its checkpoints. Distances are between images that were tokens.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from common import Table, Trainer
from torch import Tensor
from tqdm import tqdm

from fashion.ddo import Round
from fashion.networks import WEIGHTS, load_weights
from fashion.study import IN_PICTURES, Judge, Panels, Study, options
from fashion.tokens import Transformer, through_tokens, to_images, to_tokens, token_nll
from fastgen import sequence_ddo_loss

ROUNDS = (Round(50, 2e-4, 1.0, alpha=1.0), Round(50, 1e-4, 1.0, alpha=1.0))
FAKES, HALF, EMA = 1500, 64, 0.95
NLL = "Nats a token of the test split"
TITLE = "Samples against test images that were tokens"


def control(start: Transformer, study: Study, steps: int, lr: float, seed: int) -> list[Transformer]:
    """More of the base's training: the averaged model at the half and at the end."""
    gen, half, found = torch.Generator().manual_seed(seed), study.batch(HALF), []
    trainer = Trainer(start, lr, 10, EMA, betas=(0.9, 0.99), decay_steps=steps)
    for step in tqdm(range(steps), desc="NLL"):
        rows = study.data.train.draw(2 * half, gen)
        tokens = to_tokens(rows.images)
        trainer.step(F.cross_entropy(trainer.model(rows.labels, tokens).flatten(0, 1), tokens.flatten()))
        if step + 1 in (steps // 2, steps):
            found.append(copy.deepcopy(trainer.ema))
    return found


def self_play(ref: Transformer, study: Study, settings: Round, seed: int, desc: str) -> list[Transformer]:
    """A round of DDO: the averaged model at the half and at the end."""
    gen, half, found = torch.Generator().manual_seed(seed), study.batch(HALF), []
    steps = study.steps(settings.steps)
    labels = study.data.train.draw(study.count(FAKES), gen).labels
    written = ref.write(labels, gen)
    trainer = Trainer(ref, settings.lr, 10, EMA, betas=(0.9, 0.99), decay_steps=steps)
    is_real = (torch.arange(2 * half) < half).to(study.device)
    bar = tqdm(range(steps), desc=desc)
    for step in bar:
        real, j = study.data.train.draw(half, gen), torch.randint(len(written), (half,), generator=gen)
        tokens, label = torch.cat([to_tokens(real.images), written[j]]), torch.cat([real.labels, labels[j]])
        with torch.no_grad():
            ref_logits = ref(label, tokens)
        loss = sequence_ddo_loss(
            trainer.model(label, tokens), ref_logits, tokens, is_real, alpha=settings.alpha, beta=settings.beta
        )
        trainer.step(loss)
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if step + 1 in (steps // 2, steps):
            found.append(copy.deepcopy(trainer.ema))
    return found


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study, panels = Study(options("Fine-tune a transformer over image tokens by self-play."), argv), Panels()
    base = load_weights(Transformer(), WEIGHTS / "tokens.safetensors").to(study.device)
    test, validation = (Judge(through_tokens(s), study.classifier) for s in (study.data.test, study.data.validation))
    wanted, few, rounds = study.wanted(), study.wanted(1000), ROUNDS[: 1 if study.smoke else None]

    def drawn(model: Transformer, labels: Tensor, seed: int) -> Tensor:
        return to_images(model.write(labels, torch.Generator().manual_seed(seed)))

    def best(candidates: list[Transformer], seed: int, desc: str) -> Transformer:
        distances = [
            validation.distance(drawn(model, few, 100 * seed + 10)) for model in tqdm(candidates, desc="validation")
        ]
        print(f"- Seed {seed}, {desc}: {', '.join(f'{d:.3f}' for d in distances)} in validation.")
        return candidates[min(range(len(candidates)), key=distances.__getitem__)]

    def run(seed: int) -> dict[str, Table]:
        steps = sum(study.steps(r.steps) for r in rounds)
        models = {"base": base}
        models["as many NLL steps"] = best(control(base, study, steps, ROUNDS[0].lr, 100 * seed), seed, "NLL")
        model = base
        for k, settings in enumerate(rounds, 1):
            candidates = self_play(model, study, settings, 100 * seed + k, f"DDO round {k}")
            model = best([model, *candidates], seed, f"round {k}")
            models[f"DDO, round {k}"] = model
        real = through_tokens(study.data.train.draw(len(wanted), torch.Generator().manual_seed(seed)))
        table: Table = {"floor: training images": test.scores(real.images, real.labels)}
        for name, made in models.items():
            table[name] = test.scores(drawn(made, wanted, 100 * seed + 11), wanted)
        for row in table.values():
            del row["256 greys"]  # all of these images have 16
        if not panels:
            panels["test images"] = to_images(to_tokens(study.real_panel()))
            panels.update({name: drawn(made, IN_PICTURES.to(study.device), 0) for name, made in models.items()})
        return {TITLE: table, NLL: {name: {"NLL": token_nll(made, study.data.test)} for name, made in models.items()}}

    tables = study.over_seeds(run)
    study.finish(panels, "ddo_tokens")
    return tables
