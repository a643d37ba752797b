"""Images as tokens: 14x14 pixels of 16 grey levels, and a small transformer that writes them one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion.data import CLASSES, SIDE, Split

GRID, LEVELS = 14, 16
LENGTH = GRID * GRID
BEGIN = LEVELS  # the first class's token; a sequence starts with its class


def to_tokens(x: Tensor) -> Tensor:
    """Images [N, 1, 28, 28] -> tokens [N, 196]: means of 2x2 pixels, in 16 levels."""
    return ((F.avg_pool2d(x, 2).clamp(-1, 1) + 1) * (LEVELS - 1) / 2).round().long().flatten(1)


def to_images(tokens: Tensor) -> Tensor:
    """And back, in the size of the images."""
    x = tokens.float().view(-1, 1, GRID, GRID) * 2 / (LEVELS - 1) - 1
    return F.interpolate(x, size=SIDE, mode="bilinear")


def through_tokens(split: Split) -> Split:
    """What images look like that were tokens: what samples can at best be."""
    return Split(to_images(to_tokens(split.images)), split.labels)


class Layer(nn.Module):
    """Causal attention and an MLP; `past` holds keys and values of the tokens before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor, int] | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, dim=2)
        )
        if past is None:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values, at = past
            keys[:, :, at], values[:, :, at] = k[:, :, 0], v[:, :, 0]
            seen = F.scaled_dot_product_attention(q, keys[:, :, : at + 1], values[:, :, : at + 1])
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """Class and tokens -> logits of each next token."""

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(LEVELS + CLASSES, width)
        self.place = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.heads, self.layers = heads, nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, LEVELS))

    def forward(self, label: Tensor, tokens: Tensor) -> Tensor:
        """Logits [N, 196, 16] of `tokens` [N, 196]."""
        h = self.embed(torch.cat([label[:, None] + BEGIN, tokens[:, :-1]], 1)) + self.place
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

    @torch.no_grad()
    def write(self, label: Tensor, gen: torch.Generator, batch: int = 500) -> Tensor:
        """Tokens drawn one by one, at temperature 1."""
        return torch.cat([self._write(part, gen) for part in label.split(batch)])

    def _write(self, label: Tensor, gen: torch.Generator) -> Tensor:
        width = self.place.shape[1] // self.heads
        shape = (len(self.layers), 2, len(label), self.heads, LENGTH, width)
        cache, tokens, last = self.place.new_zeros(shape), [], label + BEGIN
        noise = torch.rand(LENGTH, len(label), LEVELS, generator=gen).to(label.device)
        for at in range(LENGTH):
            h = (self.embed(last) + self.place[at])[:, None]
            for layer, (keys, values) in zip(self.layers, cache, strict=True):
                h = layer(h, (keys, values, at))
            last = (self.head(h[:, 0]) - torch.log(-torch.log(noise[at]))).argmax(1)  # Gumbel's draw
            tokens.append(last)
        return torch.stack(tokens, 1)


def token_nll(model: Transformer, split: Split) -> float:
    """Nats a token."""
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(y, t).flatten(0, 1), t.flatten(), reduction="sum")
            for y, t in zip(split.labels.split(500), to_tokens(split.images).split(500), strict=True)
        ]
    return float(torch.stack(losses).sum()) / (len(split) * LENGTH)
