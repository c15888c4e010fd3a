"""Time and memory of a training step, every way of fine-tuning in one run.

    python benchmarks/step.py --model vit_base_patch16_224 --batch-size 8

The methods take turns, so that a machine that slows down slows all of them; times are medians, and each is also given
as the median of its ratios to the plain module of the same turn. Bytes and operations are measured by
``lightning_bsr.memory.measure``. Prints a Markdown table and, with ``--output``, writes JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import lightning_bsr.models  # noqa: F401 - registers the micro ViT with timm
from lightning_bsr.functional import (
    LeanPolicy,
    install_lean_activations,
    install_token_drop,
    install_unread_skip,
    quantize_frozen_,
    select_blocks_,
)
from lightning_bsr.memory import MIB, measure
from plain_bsr import plain_bsr

CLASSES = 10
YARDSTICK = "BSR 3,7,11 / 3,6,9 @ 0.5, plain module"


def _model(
    name: str,
    blocks: list[int] | int,
    drop: list[int] | None = None,
    lean: LeanPolicy | None = None,
    skip_unread: bool = False,
    quantize: bool = False,
) -> nn.Module:
    model = timm.create_model(name, num_classes=CLASSES)
    select_blocks_(model, blocks)
    if drop:
        install_token_drop(model, drop, 0.5)
    if lean:
        install_lean_activations(model, lean)
    if skip_unread:
        install_unread_skip(model)
    if quantize:
        quantize_frozen_(model)
    return model


METHODS: dict[str, Callable[[str], nn.Module]] = {
    "full fine-tuning": lambda name: timm.create_model(name, num_classes=CLASSES),
    "head and last norm": lambda name: _model(name, []),
    "blocks 3,7,11, no drop": lambda name: _model(name, [3, 7, 11]),
    YARDSTICK: lambda name: plain_bsr(name, CLASSES, [3, 7, 11], [3, 6, 9], 0.5),
    "BSR 3,7,11 / 3,6,9 @ 0.5, lightning-bsr": lambda name: _model(name, [3, 7, 11], [3, 6, 9]),
    "- exact": lambda name: _model(name, [3, 7, 11], [3, 6, 9], "exact"),
    "- exact, skip_unread": lambda name: _model(name, [3, 7, 11], [3, 6, 9], "exact", skip_unread=True),
    "- recompute": lambda name: _model(name, [3, 7, 11], [3, 6, 9], "recompute"),
    "- int8 activations": lambda name: _model(name, [3, 7, 11], [3, 6, 9], "int8"),
    "- int8 frozen weights": lambda name: _model(name, [3, 7, 11], [3, 6, 9], quantize=True),
    "BSR 3,7,11 / 2,5,8 @ 0.5, lightning-bsr": lambda name: _model(name, [3, 7, 11], [2, 5, 8]),
    "- exact, skip_unread, 2,5,8": lambda name: _model(name, [3, 7, 11], [2, 5, 8], "exact", skip_unread=True),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    started = time.perf_counter()
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
    parser.add_argument("--repeats", type=int, default=7, help="timed turns, after one that is not timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    size = timm.get_pretrained_cfg(args.model).input_size
    images = torch.randn(args.batch_size, *size, device=device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)
    rows: dict[str, dict[str, float]] = {}
    models, optimizers = {}, {}
    for method, build in METHODS.items():
        models[method] = build(args.model).to(device).train()
        report = measure(models[method], images, loss=lambda logits: F.cross_entropy(logits, labels))
        assert report.flops is not None
        rows[method] = {
            "activations_bytes_per_image": report.activations / args.batch_size,
            "activations_peak_bytes_per_image": report.activations_peak / args.batch_size,
            "flops_per_image": sum(report.flops) / args.batch_size,
        }
        trained = [p for p in models[method].parameters() if p.requires_grad]
        optimizers[method] = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(args.repeats + 1):
        for method, model in models.items():
            taken = _step(model, optimizers[method], images, labels)
            if turn:
                seconds[method].append(taken)
    for method, row in rows.items():
        row["seconds_per_image"] = statistics.median(seconds[method]) / args.batch_size
        row["ratio_to_plain"] = statistics.median(
            mine / plain for mine, plain in zip(seconds[method], seconds[YARDSTICK], strict=True)
        )

    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(
        f"{args.model}, batch {args.batch_size}, fp32, torch {torch.__version__}, {device_name}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print(
        "| method | activations, MiB / image | at most, MiB / image | GFLOP / image | ms / image | "
        "time, ratio to the plain module |"
    )
    print("|---|---|---|---|---|---|")
    for method, row in rows.items():
        print(
            f"| {method} | {row['activations_bytes_per_image'] / MIB:.2f} | "
            f"{row['activations_peak_bytes_per_image'] / MIB:.2f} | {row['flops_per_image'] / 1e9:.1f} | "
            f"{row['seconds_per_image'] * 1e3:.0f} | {row['ratio_to_plain']:.2f} |"
        )
    if args.output:
        args.output.write_text(json.dumps({"arguments": {**vars(args), "output": None}, "methods": rows}, indent=2))


if __name__ == "__main__":
    main()
