"""Distillation with guidance and with a reward: DMD, Decoupled DMD (arXiv 2511.22677) and DMDR (2511.13649).

    python examples/fashion dmd_guided

Guidance trades diversity for typical images: it raises the agreement with the class and the distance, in the teacher
too, which is the row to compare with. Decoupled DMD takes guidance at levels cleaner than the generator's input and
distribution matching at all levels. DMDR adds a reward to DMD's loss: here the classifier's log-probability of the
class asked for, so that its row shows what the term does, not that the images are better.
"""

from __future__ import annotations

from common import Table

from fashion.dmd import Method, compare
from fashion.study import Study, options


def main(argv: list[str] | None = None) -> dict[str, Table]:
    scale, steps = 2.0, 240
    methods = {
        f"DMD, s = {scale:g}": Method(steps=steps, guidance_scale=scale),
        f"Decoupled DMD, s = {scale:g}": Method(steps=steps, guidance_scale=scale, decoupled=True),
        "DMD": Method(steps=steps),
        "DMDR": Method(steps=steps, reward=0.01),
    }
    study = Study(options("Distil a diffusion model of Fashion-MNIST with guidance and with a reward."), argv)
    title = "One-step generators with guidance or a reward against the test split"
    return compare(study, methods, (1.0, scale), title, "dmd_guided")
