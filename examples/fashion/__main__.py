"""See the package's docstring."""

import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for `fashion` and `common`

from runner import Runner  # noqa: E402

INTRODUCTION = """# On real images

The methods on Fashion-MNIST (28x28, ten classes), each beside its control. All figures are against the test split,
which chose nothing: settings and checkpoints were chosen on the validation split. They are means over three seeds, ±
the standard deviation from seed to seed; pictures are of the first. Distances are Frechet distances between the 64
features of a small convolutional classifier, so they compare with one another, not with published FIDs. "floor" is
what as many training images score.

All scripts but those of GANs, pix2pix, JEM and tokens start from the base, a diffusion model of 0.7 million weights
([its training](weights/base.png)). `make fashion` runs them all and writes this page; one of them runs by its name, as
below, with `--seeds`, `--times 10` (ten times the training steps, for a GPU) and `--out`. What has not run in full yet
is not on the page.
"""
RUNNER = Runner(
    HERE, INTRODUCTION, "\ndef main(", ("__main__", "base"), shown="python examples/fashion {}", arguments=("", "{}")
)


def main(argv: list[str]) -> int:
    if argv and argv[0] in (*RUNNER.names(), "base"):
        import_module(f"fashion.{argv[0]}").main(argv[1:])
        return 0
    return RUNNER.main(argv[1:] if argv[:1] == ["page"] else argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
