"""Where the memory and the operations of a training step go, for every way of fine-tuning, block by block.

    python benchmarks/alternatives.py --plot figures
    python benchmarks/alternatives.py --model vit_micro_patch4_32 --batch-size 64 --time

All but the time is planned on fake tensors, by ``lightning_bsr.memory.plan``: that takes seconds, also for a model that
this machine could not train. The methods are those of ``lightning_bsr.methods.METHODS`` with their defaults, but for
``bsr_auto``, which chooses by training batches and so has no plan without data. The step is Lightning's: AdamW, and the
gradients of the step before are alive during the forward pass. With ``--time`` the methods take turns, so that a
machine that slows down slows all of them; the time is the median of the ratios to full fine-tuning of the same turn.

Prints Markdown, writes JSON and, with ``--plot``, two figures as PNG and SVG.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

import lightning_bsr.models  # noqa: F401 - registers the micro ViT with timm
from lightning_bsr.memory import MIB, BlockReport, MemoryReport, plan
from lightning_bsr.memory._step import AUTOCAST
from lightning_bsr.methods import METHODS, apply_method_

CLASSES = 10
PLANNED = [name for name in METHODS if name != "bsr_auto"]

# What is alive at the peak: label, the report's parts, Okabe and Ito's colour.
PEAK_PARTS = [
    ("parameters", ("parameters", "buffers"), "#999999"),
    ("autocast's copies of weights", ("weight_copies",), "#CC79A7"),
    ("gradients", ("gradients",), "#56B4E9"),
    ("optimizer state", ("optimizer_state",), "#009E73"),
    ("activations and images", ("activations", "inputs"), "#D55E00"),
    ("temporaries", ("temporaries",), "#F0E442"),
]
ATTENTION, MLP, OTHER, TRAINED = "#0072B2", "#E69F00", "#999999", "#009E73"


def build(name: str, method: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    handle = apply_method_(model.train(), method)
    handle.eval_frozen()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def trained(report: MemoryReport) -> int:
    return sum(line.trained for line in report.by_block)


def time_steps(name: str, methods: Sequence[str], batch_size: int, precision: str, turns: int) -> dict[str, Any]:
    """Time a training step of each method, in turns."""
    images = torch.randn(batch_size, *timm.get_pretrained_cfg(name).input_size)
    parts = {method: build(name, method) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(turns + 1):
        for method, (model, optimizer) in parts.items():
            started = time.perf_counter()
            with torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST):
                loss = loss_of(model(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if turn:
                seconds[method].append(time.perf_counter() - started)
    return {
        method: {
            "seconds": statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, seconds[methods[0]], strict=True)),
        }
        for method, mine in seconds.items()
    }


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(header)} |")
    print(f"|---{'|---:' * (len(header) - 1)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_methods(reports: dict[str, MemoryReport], times: dict[str, Any]) -> None:
    full = reports["full"]

    def both(report: MemoryReport) -> tuple[int, int, int]:
        return (*report.flops, sum(report.flops))

    def related(value: float, whole: float, text: str) -> str:
        share = 100 * value / whole
        return f"{text} ({'< 1' if 0 < share < 0.5 else f'{share:.0f}'} %)"

    def row(method: str, report: MemoryReport) -> list[str]:
        size = MIB * report.batch_size
        fixed = report.gradients + report.optimizer_state
        cells = [
            method,
            related(trained(report), trained(full), f"{trained(report):,}"),
            related(report.activations, full.activations, f"{report.activations / size:.2f}"),
            related(report.activations_peak, full.activations_peak, f"{report.activations_peak / size:.2f}"),
            related(fixed, full.gradients + full.optimizer_state, f"{fixed / MIB:.1f}"),
            related(report.peak, full.peak, f"{report.peak / MIB:.0f}"),
            *(
                related(mine, whole, f"{mine / report.batch_size / 1e9:.{1 if sum(full.flops) > 1e11 else 2}f}")
                for mine, whole in zip(both(report), both(full), strict=True)
            ),
        ]
        return cells + ([f"{times[method]['ratio']:.2f}"] if times else [])

    header = ["method", "trained parameters", "kept, MiB / image", "kept at most, MiB / image"]
    header += ["gradients and optimizer state, MiB", "peak of the step, MiB"]
    header += ["GFLOP / image, forward", "backward", "both", *(["step time, ratio to full"] if times else [])]
    print_rows(header, [row(*item) for item in reports.items()])


def print_peaks(reports: dict[str, MemoryReport]) -> None:
    there = peak_parts(reports)
    rows = [
        [
            method,
            *(f"{bytes_of(report, parts) / MIB:.0f}" for _, parts, _ in there),
            f"{report.peak / MIB:.0f}",
            report.peak_moment,
        ]
        for method, report in reports.items()
    ]
    print_rows(["at the peak, MiB", *(label for label, _, _ in there), "sum", "when"], rows)


def peak_parts(reports: dict[str, MemoryReport]) -> list[tuple[str, tuple[str, ...], str]]:
    return [part for part in PEAK_PARTS if any(bytes_of(report, part[1]) for report in reports.values())]


def bytes_of(report: MemoryReport, parts: Sequence[str]) -> int:
    return sum(report.peak_parts.get(part, 0) for part in parts)


def print_blocks(reports: dict[str, MemoryReport], title: str, value: Callable[[BlockReport], float]) -> None:
    lines = next(iter(reports.values())).by_block
    top = max(value(line) for report in reports.values() for line in report.by_block)
    rows = [
        [method, *(f"{value(line):.{2 if top > 0.5 else 3}f}" if value(line) else "-" for line in report.by_block)]
        for method, report in reports.items()
    ]
    print_rows([title, *(line.name for line in lines)], rows)


def style() -> dict[str, Any]:
    return {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "alternatives"}


def plot_blocks(reports: dict[str, MemoryReport], name: str) -> Any:
    """Draw what each block keeps, one small panel a method, all on one scale."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    full, columns = reports["full"], 3
    rows = -(-len(reports) // columns)
    figure = Figure(figsize=(9.0, 2.1 * rows + 1.0), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    names = [{"embed": "e", "head": "h"}.get(line.name, line.name) for line in full.by_block]
    whole = [line.activations / MIB / full.batch_size for line in full.by_block]
    for axes, (method, report) in zip(panels, reports.items(), strict=False):
        lines, bottoms = report.by_block, [0.0] * len(whole)
        for part, colour in enumerate((ATTENTION, MLP, OTHER)):
            # Of a side network, what it keeps stands under the blocks that feed it.
            beside = method == "side_network"
            values = [
                (0, 0, line.activations)[part] if beside else (line.attn, line.mlp, outside(line))[part]
                for line in lines
            ]
            heights = [value / MIB / report.batch_size for value in values]
            axes.bar(range(len(lines)), heights, 0.8, bottoms, color=colour, zorder=2)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        edges = [position - 0.5 for position in range(len(whole) + 1)]
        axes.stairs(whole, edges, color="black", linewidth=1.1, linestyle=":", zorder=3)
        for position, line in enumerate(lines):
            if line.trained:
                axes.axvspan(position - 0.5, position + 0.5, color=TRAINED, alpha=0.16, lw=0, zorder=0)
        scale = MIB * report.batch_size
        text = f"{report.activations / scale:.1f} MiB, {100 * report.activations / full.activations:.0f} %"
        if report.activations_peak > report.activations:
            text += f" (at most {report.activations_peak / scale:.1f} MiB)"
        axes.set_title(method, loc="left", fontweight="bold", fontsize=10.5, pad=17)
        axes.annotate(text, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=9)
        axes.set_xticks(range(len(names)), names, fontsize=8 if len(names) < 16 else 5)
        axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 1.04 * max(max(whole), max(bottoms))))
    for axes in panels[len(reports) :]:
        axes.axis("off")
    for axes in panels[len(reports) - columns : len(reports)]:
        axes.tick_params(labelbottom=True)
    legend = [
        Patch(color=ATTENTION, label="attention half"),
        Patch(color=MLP, label="MLP half"),
        Patch(color=OTHER, label="beside the blocks"),
        Line2D([], [], color="black", linestyle=":", linewidth=1.1, label="full fine-tuning"),
        Patch(color=TRAINED, alpha=0.16, label="something trains here"),
    ]
    if len(reports) % columns:
        panels[-1].legend(handles=legend, loc="center", frameon=False, fontsize=10)
    else:
        figure.legend(handles=legend, loc="outside lower center", ncols=5, frameon=False)
    figure.supylabel("kept for backward, MiB an image", fontsize=10.5)
    figure.supxlabel("block (e: embedding, h: after the last block)", fontsize=10.5)
    figure.suptitle(f"What each block keeps for backward: {name}", fontweight="bold", fontsize=12)
    return figure


def outside(line: BlockReport) -> int:
    return line.activations - line.attn - line.mlp


def plot_peaks(reports: dict[str, MemoryReport], name: str) -> Any:
    """Draw what is alive at each method's peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 0.36 * len(reports) + 1.7), layout="constrained")
    axes = figure.subplots()
    lefts = [0.0] * len(reports)
    scale, unit = (2**30, "GiB") if max(report.peak for report in reports.values()) > 8 * 2**30 else (MIB, "MiB")
    there = peak_parts(reports)
    for label, parts, colour in there:
        widths = [bytes_of(report, parts) / scale for report in reports.values()]
        axes.barh(range(len(reports)), widths, 0.74, lefts, color=colour, label=label, edgecolor="white", linewidth=0.4)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for position, (left, report) in enumerate(zip(lefts, reports.values(), strict=True)):
        share = 100 * report.peak / reports["full"].peak
        text = f" {left:.1f} ({share:.0f} %)" if unit == "GiB" else f" {left:.0f} ({share:.0f} %)"
        axes.text(left, position, text, va="center", fontsize=9.5)
    axes.set_yticks(range(len(reports)), list(reports))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set(xlabel=f"alive at the peak of the step, {unit}", xlim=(0, 1.13 * max(lefts)))
    figure.suptitle(f"What the peak consists of: {name}", fontweight="bold", fontsize=12)
    figure.legend(loc="outside lower center", ncols=len(there), frameon=False)
    return figure


def plot(reports: dict[str, MemoryReport], folder: Path, name: str, batch_size: int, precision: str) -> None:
    import matplotlib as mpl

    shown = {"32-true": "fp32"}.get(precision, precision)
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(style()):
        figures = {
            f"kept_by_block_{name}": plot_blocks(reports, f"{name}, {shown}"),
            f"peak_{name}_batch{batch_size}": plot_peaks(reports, f"{name}, batch {batch_size}, {shown}, AdamW"),
        }
        for stem, figure in figures.items():
            figure.savefig(folder / f"{stem}.png", dpi=84, pil_kwargs={"optimize": True})
            figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a ViT that timm knows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="32-true", choices=["32-true", *AUTOCAST])
    parser.add_argument("--methods", nargs="+", default=PLANNED, choices=PLANNED, help="full is always among them")
    parser.add_argument("--time", action="store_true", help="run steps on the CPU too, and time them")
    parser.add_argument("--turns", type=int, default=7, help="timed turns, after one that is not timed")
    parser.add_argument("--threads", type=int, help="of torch; its own default otherwise")
    parser.add_argument("--json", type=Path, default=Path("alternatives.json"))
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for the figures; needs matplotlib")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    methods = ["full", *(method for method in args.methods if method != "full")]
    shape = (args.batch_size, *timm.get_pretrained_cfg(args.model).input_size)
    reports = {}
    for method in methods:
        model, optimizer = build(args.model, method)
        reports[method] = plan(model, shape, loss=loss_of, optimizer=optimizer, precision=args.precision)
    timed = time_steps(args.model, methods, args.batch_size, args.precision, args.turns) if args.time else {}

    machine = f", {platform.processor() or 'CPU'}, {torch.get_num_threads()} thread(s)" if args.time else ""
    print(f"{args.model}, batch {args.batch_size}, {args.precision}, AdamW, torch {torch.__version__}{machine}")
    print("\nIn brackets: relative to full. bsr_auto is left out: it chooses by training batches.")
    print_methods(reports, timed)
    print_peaks(reports)
    per_image = MIB * args.batch_size
    print_blocks(reports, "kept, MiB / image", lambda line: line.activations / per_image)
    print_blocks(reports, "of it the attention half", lambda line: line.attn / per_image)
    print_blocks(reports, "GFLOP / image, forward", lambda line: line.flops.forward / args.batch_size / 1e9)
    print_blocks(reports, "GFLOP / image, backward", lambda line: line.flops.backward / args.batch_size / 1e9)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    found = {method: report.to_dict() | timed.get(method, {}) for method, report in reports.items()}
    args.json.write_text(json.dumps({"arguments": arguments, "torch": torch.__version__, "methods": found}, indent=2))
    if args.plot:
        plot(reports, args.plot, args.model, args.batch_size, args.precision)


if __name__ == "__main__":
    main()
