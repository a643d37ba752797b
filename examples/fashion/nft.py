"""DiffusionNFT (arXiv 2509.16117): the base, sampled without a class, taught by reward to draw bags.

    python examples/fashion nft

The reward is the probability that a critic, a classifier trained here, gives to the class that is wanted; the scores
are another's, the classifier of all scripts. In a round the old network draws, advantages become the weights r of
`diffusion_nft_loss`, and the old network moves towards the new one. Beside it the same without a reward (r = 0.5 for
all), which shows what the rounds do on their own, and with a divergence from the base in the loss ("tied").
"""

from __future__ import annotations

import copy

import torch
from common import Table, Trainer
from torch import Tensor
from tqdm import tqdm

from fashion.base import train_classifier
from fashion.data import NAMES
from fashion.networks import NO_CLASS, Classifier, Denoiser, noised
from fashion.study import IN_PICTURES, Judge, Panels, Study, options
from fastgen import diffusion_nft_loss, optimality_probability

WANTED = NAMES.index("bag")
ROUNDS, DRAWS, STEPS, BATCH, LR, KEEP, CLIP = 8, 250, 20, 64, 3e-4, 0.5, 1.0
METHODS = {"without reward, r = 0.5": (False, 0.0), "DiffusionNFT": (True, 0.0), "DiffusionNFT, tied": (True, 0.3)}
TITLE = f"Samples without a class, rewarded for being a {NAMES[WANTED]}; against test images of that class"


def post_train(study: Study, critic: Classifier, rewarded: bool, kl_weight: float, seed: int, desc: str) -> Denoiser:
    """The network that would draw next after all rounds."""
    gen, base, batch = torch.Generator().manual_seed(seed), study.base, study.batch(BATCH)
    trainer, old = Trainer(base, LR, 1, 0.0), copy.deepcopy(base)
    nothing = torch.full((study.count(DRAWS),), NO_CLASS, device=study.device)
    bar = tqdm(range(study.count(ROUNDS, 2)), desc=desc)
    for _ in bar:
        drawn = study.sample(old, nothing, gen)
        with torch.no_grad():
            reward = critic(drawn).softmax(1)[:, WANTED]
        bar.set_postfix(reward=f"{float(reward.mean()):.3f}")
        advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
        r = optimality_probability(advantages, clip=CLIP) if rewarded else torch.full_like(reward, 0.5)
        for _ in range(study.steps(STEPS)):
            rows = torch.randint(len(drawn), (batch,), generator=gen)
            x_t, sigma, _ = noised(drawn[rows], gen)
            label = nothing[:1].expand(batch)
            with torch.no_grad():
                old_pred = old(x_t, sigma, label)
                ref_pred = base(x_t, sigma, label) if kl_weight else None
            loss = diffusion_nft_loss(
                trainer.model(x_t, sigma, label),
                old_pred,
                x_t,
                drawn[rows],
                r[rows],
                alpha_t=torch.ones_like(sigma),  # EDM's forward process: x_t = x0 + sigma noise
                sigma_t=sigma,
                beta=1.0,
                ref_pred=ref_pred,
                kl_weight=kl_weight,
                scale=CLIP,
                prediction_type="sample",
            )
            trainer.step(loss)
        with torch.no_grad():
            torch._foreach_lerp_(list(old.parameters()), list(trainer.model.parameters()), 1 - KEEP)
    return old


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study, panels = Study(options("Teach a diffusion model of Fashion-MNIST by reward."), argv), Panels()
    judge = Judge(study.data.test[study.data.test.labels == WANTED], study.classifier)
    critic = train_classifier(study.data, study.steps(1000), seed=1).to(study.device)
    count = study.count(500, 50)

    def scores(x: Tensor) -> dict[str, float]:
        with torch.no_grad():
            reward = float(critic(x).softmax(1)[:, WANTED].mean())
        found = judge.scores(x, torch.full((len(x),), WANTED, device=x.device))
        return {
            "reward": reward,
            "wanted class": found["class"],
            "distance": found["distance"],
            "coverage": found["coverage"],
        }

    def run(seed: int) -> dict[str, Table]:
        models = {"base": study.base}
        for name, (rewarded, kl_weight) in METHODS.items():
            models[name] = post_train(study, critic, rewarded, kl_weight, 100 * seed, name)

        def draws(n: int, noise: int) -> Panels:
            def by(model: Denoiser, label: int) -> Tensor:
                return study.sample(model, torch.full((n,), label, device=study.device), noise)

            told = {"base, told the class": by(study.base, WANTED)}
            return {name: by(model, NO_CLASS) for name, model in models.items()} | told

        if not panels:
            panels.update(draws(len(IN_PICTURES), 0))
        return {TITLE: {name: scores(x) for name, x in draws(count, 100 * seed + 9).items()}}

    tables = study.over_seeds(run)
    study.finish(panels, "nft")
    return tables
