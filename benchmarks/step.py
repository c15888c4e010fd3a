"""Time and memory of a training step, every way of fine-tuning in one run.

    python benchmarks/step.py --model vit_base_patch16_224 --batch-size 8

The methods take turns, so that a machine that slows down slows all of them; times are medians, and each is also given
as the median of its ratios to the plain module of the same turn. Bytes and operations are measured by
``lightning_bsr.memory.measure``; on CUDA the allocator's own peak is given beside them. Prints a Markdown table; with
``--output`` it writes JSON, and with ``--document docs/benchmarks.md`` it puts the table into that page, where
``<!-- step MODEL PRECISION -->`` stands.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import lightning_bsr.models  # noqa: F401 - registers the micro ViT with timm
from documents import put_table
from lightning_bsr.functional import (
    LeanPolicy,
    install_attention_by_products,
    install_lean_activations,
    install_prefix_cache,
    install_token_drop,
    install_unread_skip,
    quantize_frozen_,
    select_blocks_,
)
from lightning_bsr.memory import MIB, measure
from lightning_bsr.methods import METHODS, apply_method_
from plain_bsr import plain_bsr

CLASSES = 10
BLOCKS = [3, 7, 11]
YARDSTICK = "BSR 3,7,11 / 3,6,9 @ 0.5, plain module"
UNCACHED, CACHED = "BSR 3,7,11 / 2,5,8 @ 0.5, lightning-bsr", "+ 2,5,8, cached prefix"
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16}


def _bsr(
    *,
    drop: Sequence[int] = (3, 6, 9),
    lean: LeanPolicy | None = None,
    skip_unread: bool = False,
    fold_norms: bool = False,
    products: bool = False,
    quantize: bool = False,
    cache: bool = False,
) -> Callable[[str], nn.Module]:
    def build(name: str) -> nn.Module:
        model = timm.create_model(name, num_classes=CLASSES)
        selection = select_blocks_(model.train(), BLOCKS)
        if drop:
            install_token_drop(model, drop, 0.5)
        if lean:
            install_lean_activations(model, lean, fold_norms=fold_norms)
        if products:
            install_attention_by_products(model)
        if skip_unread:
            install_unread_skip(model)
        if quantize:
            quantize_frozen_(model)
        if cache:
            selection.eval_frozen()
            install_prefix_cache(model, max_bytes=2**30)
        return model

    return build


def _method(method: str) -> Callable[[str], nn.Module]:
    def build(name: str) -> nn.Module:
        model = timm.create_model(name, num_classes=CLASSES).train()
        apply_method_(model, method)
        return model

    return build


ROWS: dict[str, Callable[[str], nn.Module]] = {
    # bsr stands below; bsr_auto chooses by training batches.
    **{name: _method(name) for name in METHODS if name not in ("bsr", "bsr_auto")},
    "blocks 3,7,11, no drop": _bsr(drop=()),
    YARDSTICK: lambda name: plain_bsr(name, CLASSES, BLOCKS, [3, 6, 9], 0.5).train(),
    "BSR 3,7,11 / 3,6,9 @ 0.5, lightning-bsr": _bsr(),
    "+ exact": _bsr(lean="exact"),
    "+ exact, skip_unread": _bsr(lean="exact", skip_unread=True),
    "+ exact, skip_unread, fold_norms": _bsr(lean="exact", skip_unread=True, fold_norms=True),
    "+ exact, skip_unread, attention_by_products": _bsr(lean="exact", skip_unread=True, products=True),
    "+ exact, skip_unread, fold_norms, attention_by_products": _bsr(
        lean="exact", skip_unread=True, fold_norms=True, products=True
    ),
    "+ recompute": _bsr(lean="recompute"),
    "+ int8 activations": _bsr(lean="int8"),
    "+ int8 frozen weights": _bsr(quantize=True),
    UNCACHED: _bsr(drop=(2, 5, 8)),
    "+ 2,5,8, exact, skip_unread, fold_norms": _bsr(drop=(2, 5, 8), lean="exact", skip_unread=True, fold_norms=True),
    CACHED: _bsr(drop=(2, 5, 8), cache=True),
}


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    lower: torch.dtype | None,
) -> float:
    started = time.perf_counter()
    with torch.autocast(images.device.type, lower, enabled=lower is not None):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT of depth 12 with a class token")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="32-true", choices=AUTOCAST)
    parser.add_argument("--repeats", type=int, default=7, help="timed turns, after one that is not timed")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to run; the plain module always")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--document", type=Path, help="put the table into this page")
    args = parser.parse_args()

    torch.manual_seed(0)
    device, lower = torch.device(args.device), AUTOCAST[args.precision]
    size = timm.get_pretrained_cfg(args.model).input_size
    images = torch.randn(args.batch_size, *size, device=device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)
    chosen = [row for row in ROWS if row == YARDSTICK or any(fnmatch(row, pattern) for pattern in args.rows)]
    rows: dict[str, dict[str, float]] = {}
    models, optimizers = {}, {}
    for row in chosen:
        models[row] = ROWS[row](args.model).to(device)
        if row == CACHED:
            models[row](images)  # is computed once, and not counted
        report = measure(
            models[row], images, loss=lambda logits: F.cross_entropy(logits, labels), precision=args.precision
        )
        assert report.flops is not None
        rows[row] = {
            "activations_bytes_per_image": report.activations / args.batch_size,
            "activations_peak_bytes_per_image": report.activations_peak / args.batch_size,
            "flops_per_image": sum(report.flops) / args.batch_size,
        }
        trained = [p for p in models[row].parameters() if p.requires_grad]
        optimizers[row] = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    seconds: dict[str, list[float]] = {row: [] for row in chosen}
    for turn in range(args.repeats + 1):
        for row, model in models.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            taken = _step(model, optimizers[row], images, labels, lower)
            if turn:
                seconds[row].append(taken)
                if device.type == "cuda":
                    # Of this step alone: all models are on the device.
                    rows[row]["allocated_bytes"] = torch.cuda.max_memory_allocated(device) - before

    def ratio(row: str, to: str) -> float:
        return statistics.median(mine / other for mine, other in zip(seconds[row], seconds[to], strict=True))

    for row, figures in rows.items():
        figures["seconds_per_image"] = statistics.median(seconds[row]) / args.batch_size
        figures["ratio_to_plain"] = ratio(row, YARDSTICK)

    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    title = (
        f"{args.model}, batch {args.batch_size}, {args.precision}, torch {torch.__version__}, {device_name}, "
        f"{torch.get_num_threads()} threads, median of {args.repeats} turns"
    )
    columns = ["method", "activations, MiB / image", "at most, MiB / image", "GFLOP / image"]
    columns += ["allocated in the step, MiB"] * (device.type == "cuda") + ["ms / image", "time, ratio to plain"]
    table = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row, figures in rows.items():
        cells = [figures["activations_bytes_per_image"] / MIB, figures["activations_peak_bytes_per_image"] / MIB]
        texts = [f"{cell:.2f}" for cell in cells] + [f"{figures['flops_per_image'] / 1e9:.1f}"]
        if device.type == "cuda":
            texts.append(f"{figures['allocated_bytes'] / MIB:.0f}")
        texts += [f"{figures['seconds_per_image'] * 1e3:.1f}", f"{figures['ratio_to_plain']:.2f}"]
        table.append(f"| {row} | {' | '.join(texts)} |")
    lines = [title + ":", "", *table]
    if CACHED in rows and UNCACHED in rows:
        rows[CACHED]["ratio_to_uncached"] = ratio(CACHED, UNCACHED)
        lines += ["", f"With the cached prefix a step takes {ratio(CACHED, UNCACHED):.2f} of the time without."]
    print("\n".join(lines))
    if args.document:
        put_table(args.document, f"step {args.model} {args.precision}", lines)
    if args.output:
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.output.write_text(json.dumps({"arguments": arguments, "device": device_name, "methods": rows}, indent=2))


def processor() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


if __name__ == "__main__":
    main()
