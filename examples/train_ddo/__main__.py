"""See the package's docstring."""

import sys

from .settings import parse
from .training import train


def main(argv: list[str] | None = None) -> int:
    train(parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
