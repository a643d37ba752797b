"""Runs scripts and writes the page of their tables and pictures; `examples` and `examples/fashion` each have one.

A script takes `--out DIR` and `--smoke`, saves PNGs in DIR and prints tables as Markdown (`common.py` has the means).
Each has a folder in `results`, with its pictures and what it printed; only a run that succeeds replaces it. The page,
`README.md`, is written anew after each.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass
class Runner:
    """The scripts of one folder: those whose text has `mark`, but for the folder's own files in `besides`."""

    here: Path
    introduction: str
    mark: str
    besides: tuple[str, ...]
    shown: str  # the command that runs one, with {} for its name
    arguments: tuple[str, ...]  # the same for Python, in this folder

    def names(self) -> list[str]:
        """Every script, by its file."""
        found = {p.stem: p.read_text(encoding="utf-8") for p in self.here.glob("*.py")}
        return sorted(name for name, code in found.items() if name not in self.besides and self.mark in code)

    def run(self, name: str, folder: Path, smoke: bool, quiet: bool) -> bool:
        """Run one script aside; if it succeeds, its output and pictures take the place of those of the last run.
        A quiet one shows its progress only where it fails."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as aside:
            made = Path(aside, "results", name)
            made.mkdir(parents=True)
            first, *rest = (part.format(name) for part in self.arguments)
            done = subprocess.run(
                [sys.executable, str(self.here / first), *rest, "--out", f"results/{name}", *["--smoke"] * smoke],
                cwd=aside,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if quiet else None,
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
                print(done.stdout, done.stderr or "", sep="\n")
        return good

    def page(self, folder: Path) -> str:
        """All that was printed, script by script."""
        parts = [self.introduction]
        for name in self.names():
            output = folder / "results" / name / "output.md"
            if not output.exists():
                continue
            summary = re.match(r'"""(.*)', (self.here / f"{name}.py").read_text(encoding="utf-8"))
            assert summary is not None
            headline = summary[1].removesuffix('"""')
            parts.append(f"## {name}\n\n{headline}\n\n    {self.shown.format(name)}\n")
            parts.append(output.read_text(encoding="utf-8"))
            parts.extend(f"![{p.stem}](results/{name}/{p.name})\n" for p in sorted(output.parent.glob("*.png")))
        return "\n".join(parts)

    def main(self, argv: list[str] | None = None) -> int:
        parser = argparse.ArgumentParser(description="Run scripts and write the page of their tables and pictures.")
        parser.add_argument("names", nargs="*", help=f"which; all if none: {', '.join(self.names())}")
        parser.add_argument("--jobs", type=int, default=1, help="how many at once: a core each, as they come")
        parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in seconds")
        parser.add_argument("--folder", type=Path, default=self.here, help="where the page and its results go")
        args = parser.parse_args(argv)
        if unknown := set(args.names) - set(self.names()):
            parser.error(f"no such example: {', '.join(sorted(unknown))}; there are {', '.join(self.names())}")
        if args.jobs < 1:
            parser.error("--jobs must be at least 1")
        folder, failed = args.folder.resolve(), []
        if args.smoke and folder == self.here:
            parser.error("--smoke needs a --folder of its own: its numbers would replace the page's, and mean nothing")
        began = time.perf_counter()
        with ThreadPoolExecutor(args.jobs) as pool:
            names = args.names or self.names()
            runs = {pool.submit(self.run, name, folder, args.smoke, args.jobs > 1): name for name in names}
            for done in tqdm(as_completed(runs), total=len(runs), desc="scripts", disable=args.jobs == 1):
                if not done.result():
                    failed.append(runs[done])
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "README.md").write_text(self.page(folder), encoding="utf-8")
        print(f"{folder / 'README.md'} written, after {time.perf_counter() - began:.0f} s")
        if failed:
            print(f"failed: {', '.join(failed)}; the page has what they printed when they last succeeded, if ever")
        return 1 if failed else 0


def machine() -> str:
    import torch

    return f"Run on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}."


def markdown(text: str) -> str:
    """An example's output: Markdown as it is, and what is aligned by spaces in a code block."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(b if b.startswith("|") or not re.search(r"\S {3,}\S", b) else f"```\n{b}\n```" for b in blocks)
