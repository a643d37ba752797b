"""Run the examples and write the page of their tables and pictures.

    python examples                     # all of them, as `make examples`
    python examples ddo_digits          # some; the page keeps what the others printed when they last ran
    python examples --smoke --folder /tmp/x

An example is a file here that can be run, takes `--out DIR` and `--smoke`, saves PNGs in DIR and prints tables as
Markdown (`digits.print_table` does). Each has a folder in `results`, with its pictures and what it printed; the page
is `README.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
INTRODUCTION = """# Examples

Each method at work on data that come with scikit-learn or Python, or made up on the spot, on a CPU. `make examples`
runs all of them and writes this page: its tables and pictures are from those runs, by default settings and seed 0.
"""


def names() -> list[str]:
    """Every example, by its file."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem != "__main__" and "\nif __name__ ==" in p.read_text())


def run(name: str, folder: Path, smoke: bool) -> bool:
    """Run one example; keep its output and pictures if it succeeds."""
    results = folder / "results" / name
    results.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(results.relative_to(folder))]
    began = time.perf_counter()
    done = subprocess.run(
        command + ["--smoke"] * smoke, cwd=folder, stdout=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    print(f"{name}: {'done' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - began:.0f} s", flush=True)
    if done.returncode == 0:
        (results / "output.md").write_text(markdown(done.stdout) + f"\n\n{machine()}\n")
    return done.returncode == 0


def machine() -> str:
    import torch

    return f"Run on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}."


def markdown(text: str) -> str:
    """An example's output: Markdown as it is, and what is aligned by spaces in a code block."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(b if b.startswith("|") or not re.search(r"\S {3,}\S", b) else f"```\n{b}\n```" for b in blocks)


def page(folder: Path) -> str:
    """All that was printed, example by example."""
    parts = [INTRODUCTION]
    for name in names():
        output = folder / "results" / name / "output.md"
        if not output.exists():
            continue
        summary = re.match(r'"""(.*)', (HERE / f"{name}.py").read_text())
        assert summary is not None
        headline = summary[1].removesuffix('"""')
        parts.append(f"## {name}\n\n{headline}\n\n    python examples/{name}.py\n")
        parts.append(output.read_text())
        parts.extend(f"![{p.stem}](results/{name}/{p.name})\n" for p in sorted(output.parent.glob("*.png")))
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the examples and write the page of their tables and pictures.")
    parser.add_argument("names", nargs="*", help=f"which; all if none: {', '.join(names())}")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in seconds")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the page and the folder of results go")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names()):
        parser.error(f"no such example: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    folder = args.folder.resolve()
    began = time.perf_counter()
    failed = [name for name in args.names or names() if not run(name, folder, args.smoke)]
    (folder / "README.md").write_text(page(folder))
    print(f"{folder / 'README.md'} written, after {time.perf_counter() - began:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}; the page has what they printed when they last succeeded, if ever")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
