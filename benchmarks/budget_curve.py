"""Accuracy over memory: what a budget chooses, against fixed ways of fine-tuning, from finished comparisons.

    lightning-bsr compare ... --output runs/fixed --methods full,bsr,last_blocks,head,bsr_auto
    lightning-bsr compare ... --output runs/24 --methods bsr_auto --method_options '{bsr_auto: {memory_budget: 24MiB}}'
    python benchmarks/budget_curve.py runs/fixed runs/24 --output budget_curve.png

The first folder has the fixed ways; ``bsr_auto`` of every folder is a point of the curve. Prints a Markdown table and
draws the figure.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_bsr.memory import MIB


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a comparison that have a result."""
    rows = json.loads((folder / "table.json").read_text())["rows"]
    return [row for row in rows if row["equal_length"]]


def kept(row: dict[str, Any]) -> float:
    """The most bytes an image that backward keeps at one moment."""
    return row["planned_activations_peak"] or row["measured_activations"]


def main() -> None:
    """Read the comparisons, print the table, draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of lightning-bsr compare")
    parser.add_argument("--output", type=Path, default=Path("budget_curve.png"))
    args = parser.parse_args()

    rows = [(folder, row) for folder in args.folders for row in rows_of(folder)]
    fixed = [row for folder, row in rows if folder == args.folders[0] and row["method"] != "bsr_auto"]
    chosen = sorted((row for _, row in rows if row["method"] == "bsr_auto"), key=kept)
    full = next(row for row in fixed if row["method"] == "full")

    print(
        "| method | activations at most, KiB / image | of full | compute, of full | learning rate | test accuracy, % |"
    )
    print("|---|---|---|---|---|---|")
    for row in sorted([*fixed, *chosen], key=kept):
        score = row["equal_length"]
        print(
            f"| {row['method']} | {kept(row) / 1024:.0f} | {kept(row) / kept(full):.1%} | "
            f"{row['flops'] / full['flops']:.0%} | {row['lr']:g} | "
            f"{100 * score['mean']:.1f} ± {100 * (score['deviation'] or 0):.1f} |"
        )

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [kept(row) / MIB for row in chosen],
        [100 * row["equal_length"]["mean"] for row in chosen],
        yerr=[100 * (row["equal_length"]["deviation"] or 0) for row in chosen],
        fmt="o-",
        capsize=3,
        color="C0",
        label="chosen by a budget",
    )
    for row in fixed:
        axes.errorbar(
            kept(row) / MIB,
            100 * row["equal_length"]["mean"],
            yerr=100 * (row["equal_length"]["deviation"] or 0),
            fmt="s",
            capsize=3,
            color="C1",
        )
        axes.annotate(
            row["method"], (kept(row) / MIB, 100 * row["equal_length"]["mean"]), (6, 6), textcoords="offset points"
        )
    axes.plot([], [], "s", color="C1", label="fixed ways")
    axes.set(xscale="log", xlabel="activations kept at most, MiB an image", ylabel="test accuracy, %")
    axes.margins(x=0.12)
    axes.legend(loc="upper left")
    figure.savefig(args.output, dpi=150)


if __name__ == "__main__":
    main()
