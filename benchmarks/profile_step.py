"""Where the time of a training step goes, against the time that its matrix products take alone.

    python benchmarks/profile_step.py --model vit_base_patch16_224 --batch-size 8

Runs rows of ``step.py`` under PyTorch's profiler and sums the operators' own times by what they are for; then runs the
matrix products of the step alone, with the same shapes on fresh tensors. Prints a Markdown table; ``--document`` puts
it into a page, where ``<!-- profile MODEL PRECISION -->`` stands.
"""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import lightning_bsr.models  # noqa: F401 - registers the micro ViT with timm
from documents import put_table
from step import AUTOCAST, CLASSES, ROWS, YARDSTICK, processor

SHOWN = ["full", YARDSTICK, "BSR 3,7,11 / 3,6,9 @ 0.5, lightning-bsr", "+ exact, skip_unread, fold_norms"]
PARTS = {
    "matrix products": ("addmm", "mm", "bmm", "baddbmm", "convolution", "linear"),
    "fused attention": ("scaled_dot_product",),
    "GELU": ("gelu",),
    "norms": ("layer_norm",),
    "copies and gathers": ("copy", "cat", "index", "gather", "clone", "contiguous", "fill", "zero", "_to_copy"),
    "sums, scaling, softmax, sorting": ("add", "mul", "sum", "div", "softmax", "sort", "mean", "sub", "neg", "log"),
    "optimizer": ("Optimizer", "_foreach"),
}
REST = "the rest (Python, dispatch, autograd, memory)"


def part_of(operator: str) -> str:
    name = operator.removeprefix("aten::").removeprefix("mkldnn_").removeprefix("_")
    for part, beginnings in PARTS.items():
        if any(name.startswith(beginning) or name.startswith(f"native_{beginning}") for beginning in beginnings):
            return part
        if part == "fused attention" and "scaled_dot_product" in name:
            return part
        if part == "optimizer" and any(beginning in operator for beginning in beginnings):
            return part
    return REST


def products_alone(shapes: Counter[tuple[str, tuple[tuple[int, ...], ...]]], dtype: torch.dtype, turns: int) -> float:
    """Time the matrix products of a step, each with the shapes that it has there, in seconds."""
    total = 0.0
    for (operator, sizes), count in shapes.items():
        tensors = [torch.randn(size, dtype=dtype) for size in sizes]
        product = {"aten::addmm": torch.addmm, "aten::mm": torch.mm, "aten::bmm": torch.bmm}[operator]
        seconds = []
        for _ in range(turns + 1):
            started = time.perf_counter()
            product(*tensors)
            seconds.append(time.perf_counter() - started)
        total += count * statistics.median(seconds[1:])
    return total


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT of depth 12 with a class token")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="32-true", choices=AUTOCAST)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=SHOWN, choices=ROWS)
    parser.add_argument("--document", type=Path, help="put the table into this page")
    args = parser.parse_args()

    torch.manual_seed(0)
    lower = AUTOCAST[args.precision]
    images = torch.randn(args.batch_size, *timm.get_pretrained_cfg(args.model).input_size)
    labels = torch.randint(CLASSES, (args.batch_size,))
    columns: dict[str, dict[str, float]] = {}
    for row in args.rows:
        model = ROWS[row](args.model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

        def step(model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast("cpu", lower, enabled=lower is not None):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        seconds = []
        for _ in range(args.turns):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            for _ in range(args.turns):
                step()
        spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for event in profiled.key_averages():
            if (part := part_of(event.key)) != REST:
                spent[part] += event.self_cpu_time_total / args.turns / 1e3
        whole = statistics.median(seconds) * 1e3
        spent[REST] = max(0.0, whole - sum(spent.values()))
        shapes: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = Counter()
        for event in profiled.key_averages(group_by_input_shape=True):
            if event.key in ("aten::addmm", "aten::mm", "aten::bmm"):
                sizes = tuple(tuple(size) for size in event.input_shapes if size)
                shapes[event.key, sizes] += event.count // args.turns
        spent["**step**"] = whole
        spent["its matrix products, run alone"] = products_alone(shapes, lower or torch.float32, args.turns) * 1e3
        columns[row] = spent

    lines = [
        f"{args.model}, batch {args.batch_size}, {args.precision}, torch {torch.__version__}, {processor()}, "
        f"{torch.get_num_threads()} threads:",
        "",
        f"| ms a step | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for part in next(iter(columns.values())):
        cells = [f"{spent[part]:.0f} ({spent[part] / spent['**step**']:.0%})" for spent in columns.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.document:
        put_table(args.document, f"profile {args.model} {args.precision}", lines)


if __name__ == "__main__":
    main()
