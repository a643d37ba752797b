"""Run the examples and write the page of their tables and pictures.

    python examples                     # all of them, as `make examples`
    python examples ddo_digits          # some; the page keeps what the others printed when they last ran
    python examples --smoke --folder /tmp/x   # all in a minute or two; another page, as the numbers mean nothing

An example is a file here that can be run.
"""

import sys
from pathlib import Path

from runner import Runner

INTRODUCTION = """# Examples

Each method at work on data that come with scikit-learn or Python, or made up on the spot, on a CPU. `make examples`
runs all of them and writes this page: its tables and pictures are from those runs, by default settings and seed 0.
"""
HERE = Path(__file__).resolve().parent
RUNNER = Runner(
    HERE, INTRODUCTION, "\nif __name__ ==", ("__main__",), shown="python examples/{}.py", arguments=("{}.py",)
)

if __name__ == "__main__":
    sys.exit(RUNNER.main())
