"""What the text examples share: the data, a small character model, its training and sampling, and the report.

The data are the paragraphs of Python's own language reference that `help()` shows (`pydoc_data.topics`), each taken
once: about 330 000 characters, a fifth of the topics held out. They differ a little between versions of Python.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from common import Table, Trainer, print_table
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import token_logprob

RARE = 40  # characters seen less often than this in training become "?"


@dataclass(frozen=True)
class Corpus:
    """Text as indices of characters, [N], for training and held out; the words of the former."""

    alphabet: str
    train: Tensor
    held_out: Tensor
    words: frozenset[str]

    def decode(self, tokens: Tensor) -> list[str]:
        return ["".join(self.alphabet[i] for i in row) for row in tokens.tolist()]


def load_corpus() -> Corpus:
    """Many topics repeat parts of others: a paragraph counts where it occurs first, so none is in both parts."""
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        for block in re.split(r"\n\s*\n", topics[name]):
            paragraph = " ".join(re.sub(r"([*=~\-])\1{3,}", "", block).split())  # without lines under headings
            if paragraph not in seen:
                seen.add(paragraph)
                parts[number % 5 == 0].append(paragraph)
    train, held_out = ("\n".join(paragraphs) for paragraphs in parts)
    alphabet = "".join(sorted({c for c, count in Counter(train).items() if count >= RARE} | {"?"}))
    index = {c: i for i, c in enumerate(alphabet)}

    def encode(text: str) -> Tensor:
        return torch.tensor([index.get(c, index["?"]) for c in text])

    return Corpus(alphabet, encode(train), encode(held_out), frozenset(words(train)))


def words(text: str) -> list[str]:
    """Those of two letters and more, but for the first and the last of the text, which may be cut."""
    return re.findall(r"(?<=[^A-Za-z])[A-Za-z]{2,}(?=[^A-Za-z])", text)


@dataclass(frozen=True)
class Windows:
    """How sequences are cut: models read a prompt of real text and are scored on what follows."""

    prompt: int = 16
    length: int = 64
    batch: int = 32  # of them in a step of training

    def draw(self, text: Tensor, count: int, gen: torch.Generator) -> Tensor:
        """[count, prompt + length] from random places of the text."""
        size = self.prompt + self.length
        return text.unfold(0, size, 1)[torch.randint(len(text) - size + 1, (count,), generator=gen)]

    def all(self, text: Tensor) -> Tensor:
        """The whole text; the windows overlap by the prompt, so that no character is scored twice."""
        return text.unfold(0, self.prompt + self.length, self.length)


class CharModel(nn.Module):
    """A GRU over characters: [B, T] -> logits [B, T, V] of the character that comes next."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(tokens))[0])

    @torch.no_grad()
    def continue_(self, prompt: Tensor, length: int, gen: torch.Generator) -> Tensor:
        """The prompts [B, P] with `length` sampled characters after them, at temperature 1."""
        tokens, state, last = [prompt], None, prompt
        for _ in range(length):
            hidden, state = self.gru(self.embed(last), state)
            prob = self.head(hidden[:, -1]).softmax(1)
            last = torch.multinomial(prob, 1, generator=gen)
            tokens.append(last)
        return torch.cat(tokens, 1)


def continuation_logits(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """Logits [B, length, V] of ``tokens[:, prompt:]``: a view, which fastgen's losses take without a copy."""
    return model(tokens[:, :-1])[:, prompt - 1 :]


def nll(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """Mean negative log-likelihood of a character after the prompt."""
    return -token_logprob(continuation_logits(model, tokens, prompt), tokens[:, prompt:]).mean()


def train_nll(
    start: CharModel, text: Tensor, windows: Windows, gen: torch.Generator, *, steps: int, lr: float, desc: str
) -> CharModel:
    """Ordinary training by next characters; returns the running average of the weights."""
    trainer = Trainer(start, lr, warmup=min(50, steps // 3 + 1), ema_decay=0.98)
    for _ in tqdm(range(steps), desc=desc):
        trainer.step(nll(trainer.model, windows.draw(text, windows.batch, gen), windows.prompt))
    return trainer.ema


@dataclass(frozen=True)
class Recipe:
    """A model of real text: its size and its training."""

    width: int
    steps: int
    lr: float

    def train(self, corpus: Corpus, windows: Windows, gen: torch.Generator, desc: str) -> CharModel:
        model = CharModel(len(corpus.alphabet), self.width)
        return train_nll(model, corpus.train, windows, gen, steps=self.steps, lr=self.lr, desc=desc)


def known_words(tokens: Tensor, corpus: Corpus, prompt: int) -> tuple[float, int]:
    """Of the words after the prompts: the share that the training text has too, and how many of those are different."""
    found = [w for line in corpus.decode(tokens[:, prompt - 1 :]) for w in words(line)]
    return sum(w in corpus.words for w in found) / max(len(found), 1), len(corpus.words.intersection(found))


@torch.no_grad()
def model_figures(
    model: CharModel, judge: nn.Module, corpus: Corpus, windows: Windows, prompts: Tensor, seed: int
) -> dict[str, float]:
    """One row of a table: the NLL of the held-out text, and what samples after the prompts are like.

    In nats a character: how a larger model judges the samples, how likely they are to the model itself, which is its
    entropy, and the difference, which estimates KL(model‖judge).
    """
    tokens = model.continue_(prompts, windows.length, torch.Generator().manual_seed(seed))
    judged, entropy = (float(nll(m, tokens, windows.prompt)) for m in (judge, model))
    known, different = known_words(tokens, corpus, windows.prompt)
    return {
        "held-out NLL": float(nll(model, windows.all(corpus.held_out), windows.prompt)),
        "judge's NLL": judged,
        "entropy": entropy,
        "KL to judge": judged - entropy,
        "known words": known,
        "different ones": float(different),
    }


def report(
    models: dict[str, CharModel],
    judge: str,
    shown: Sequence[str],
    corpus: Corpus,
    windows: Windows,
    samples: int,
    seed: int,
) -> Table:
    """Measure the models, on `samples` prompts of held-out text; print the table, and what those `shown` write."""
    real = windows.draw(corpus.held_out, samples, torch.Generator().manual_seed(10 * seed + 2))
    prompts = real[:, : windows.prompt]
    table = {
        name: model_figures(model, models[judge], corpus, windows, prompts, 10 * seed + 3)
        for name, model in tqdm(models.items(), desc="measuring")
    }
    print(f"{len(corpus.train)} characters to train on, {len(corpus.held_out)} held out.")
    print_table(f"In nats a character (lower NLL is better); the {judge} rates the samples", table)
    known, different = known_words(real, corpus, windows.prompt)
    print(f"\nOf the held-out text's own words after those prompts {known:.3f} are known, {different} different ones.")
    show_samples({name: models[name] for name in shown}, corpus, prompts[0], 80, seed)
    return table


def show_samples(models: dict[str, CharModel], corpus: Corpus, prompt: Tensor, length: int, seed: int) -> None:
    """What each model makes of one prompt [P], by the same random numbers."""
    width = max(map(len, models))
    print("\nOne prompt, continued:\n")
    for name, model in models.items():
        tokens = model.continue_(prompt[None], length, torch.Generator().manual_seed(seed))
        text = corpus.decode(tokens)[0].replace("\n", " ")
        print(f"{name:<{width}}    {text[: len(prompt)]}|{text[len(prompt) :]}")
