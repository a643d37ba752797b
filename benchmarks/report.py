"""``python -m benchmarks.report RESULTS.json``: a Markdown table and a plot beside the results of a benchmark run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Comparison = dict[str, dict[str, float]]


def comparisons(results: dict[str, Any]) -> list[tuple[str, Comparison, dict[str, Any]]]:
    """(benchmark, variant -> figures, extra information) of every benchmark that compares variants."""
    found = []
    for benchmark in results["benchmarks"]:
        extra = benchmark["extra_info"]
        if "comparison" in extra:
            found.append((benchmark["name"].removeprefix("test_"), extra["comparison"], extra))
    return found


def machine(results: dict[str, Any]) -> str:
    info = results["machine_info"]
    facts = [info.get("gpu") or info["cpu"].get("brand_raw", info["machine"]), f"{info['cpu'].get('count')} CPU cores"]
    facts += [f"{k} {info[k]}" for k in ("torch", "triton", "fastgen") if k in info]
    return ", ".join(facts) + f"; {results['datetime'][:10]}"


def markdown(results: dict[str, Any]) -> str:
    """One line a variant: time, ratio to fastgen's, share of the copy bandwidth, and on GPUs launches and memory."""
    lines = [f"# {machine(results)}", ""]
    lines += [
        "Medians of interleaved rounds in one process. *share of copy*: bytes at the floor over the time, as a part"
    ]
    lines += ["of what a copy reached in the same rounds.", ""]
    for name, comparison, extra in comparisons(results):
        gpu = extra["device"] == "cuda"
        lines += [
            f"### {name}",
            "",
            f"Floor {extra['floor_bytes'] / 1e6:.1f} MB, copy {extra['copy_gb_per_s']:.0f} GB/s.",
            "",
        ]
        lines += ["| variant | µs | × fastgen | share of copy |" + (" launches | peak MB |" if gpu else "")]
        lines += ["| --- | ---: | ---: | ---: |" + (" ---: | ---: |" if gpu else "")]
        for variant, figures in comparison.items():
            row = f"| {variant} | {figures['median_us']:.1f} | {figures['times_fastgen']:.2f} |"
            row += f" {100 * figures['share_of_copy']:.0f} % |"
            if gpu:
                row += f" {figures['launches']:.0f} | {figures['peak_extra_bytes'] / 1e6:.1f} |"
            lines.append(row)
        if extra.get("left_out"):
            lines += ["", f"Out of memory: {', '.join(extra['left_out'])}."]
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: how many times fastgen's time the others take. Right: shares of the copy bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = comparisons(results)
    names = [name for name, _, _ in found]
    variants = list(dict.fromkeys(v for _, comparison, _ in found for v in comparison))
    figure, axes = plt.subplots(1, 2, figsize=(13, 2 + 0.2 * len(names)), sharey=True, layout="constrained")
    for k, variant in enumerate(variants):
        rows = [(i, c[variant]) for i, (_, c, _) in enumerate(found) if variant in c]
        places = [i for i, _ in rows]
        for axis, values in zip(
            axes, ([f["times_fastgen"] for _, f in rows], [100 * f["share_of_copy"] for _, f in rows]), strict=True
        ):
            axis.scatter(values, places, s=28, marker="os^vDP*X"[k % 8], label=variant, zorder=2)
    for axis, line in zip(axes, (1, 100), strict=True):
        axis.axvline(line, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].set(xscale="log", xlabel="time relative to fastgen (log scale)")
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.3, -0.7)
    axes[1].set(xlabel="% of the copy bandwidth, counting each stream once", xlim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(machine(results), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what pytest wrote with --benchmark-json")
    path = parser.parse_args(argv).results
    results = json.loads(path.read_text())
    text = markdown(results)
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    plot(results, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
