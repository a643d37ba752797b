"""Run the examples and write the page of their tables and pictures.

    python examples                     # all of them, as `make examples`
    python examples ddo_digits          # some; the page keeps what the others printed when they last ran
    python examples --smoke --folder /tmp/x   # all in a minute or two; another page, as the numbers mean nothing

An example is a file here that can be run, takes `--out DIR` and `--smoke`, saves PNGs in DIR and prints tables as
Markdown (`common.py` has the means). Each has a folder in `results`, with its pictures and what it printed; only a run
that succeeds replaces it. The page, `README.md`, is written anew after each.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
INTRODUCTION = """# Examples

Each method at work on data that come with scikit-learn or Python, or made up on the spot, on a CPU. `make examples`
runs all of them and writes this page: its tables and pictures are from those runs, by default settings and seed 0.
"""


def names() -> list[str]:
    """Every example, by its file."""
    found = {p.stem: p.read_text(encoding="utf-8") for p in HERE.glob("*.py")}
    return sorted(name for name, code in found.items() if name != "__main__" and "\nif __name__ ==" in code)


def run(name: str, folder: Path, smoke: bool) -> bool:
    """Run one example aside; if it succeeds, its output and pictures take the place of those of the last run."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as aside:
        made = Path(aside, "results", name)
        made.mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), "--out", f"results/{name}", *["--smoke"] * smoke],
            cwd=aside,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
        good = done.returncode == 0
        print(f"{name}: {'done' if good else 'FAILED'} in {time.perf_counter() - began:.0f} s", flush=True)
        if good:
            (made / "output.md").write_text(f"{markdown(done.stdout)}\n\n{machine()}\n", encoding="utf-8")
            kept = folder / "results" / name
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(made, kept)
        else:
            print(done.stdout, end="")
    return good


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
        summary = re.match(r'"""(.*)', (HERE / f"{name}.py").read_text(encoding="utf-8"))
        assert summary is not None
        headline = summary[1].removesuffix('"""')
        parts.append(f"## {name}\n\n{headline}\n\n    python examples/{name}.py\n")
        parts.append(output.read_text(encoding="utf-8"))
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
    folder, failed = args.folder.resolve(), []
    if args.smoke and folder == HERE:
        parser.error("--smoke needs a --folder of its own: its numbers would replace the page's, and mean nothing")
    began = time.perf_counter()
    for name in args.names or names():
        if not run(name, folder, args.smoke):
            failed.append(name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(page(folder), encoding="utf-8")
    print(f"{folder / 'README.md'} written, after {time.perf_counter() - began:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}; the page has what they printed when they last succeeded, if ever")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
