"""What planning a step on fake tensors says and costs, beside measuring the same step on real ones.

    python benchmarks/planning.py --json planning.json
    python benchmarks/planning.py --models vit_micro_patch4_32 --methods full bsr --batch-sizes 8

Each line is one model, method, precision and batch size, with AdamW. "= measured" compares whole reports: every byte,
operation and kernel, block by block. Seconds to plan are those of the second plan, after everything is imported.
"""

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from torch import nn

import lightning_bsr.models  # noqa: F401  # registers the micro ViT
from lightning_bsr.memory import MIB, MemoryReport, measure, plan
from lightning_bsr.methods import METHODS, apply_method_

MODELS = ["vit_micro_patch4_32", "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"]
PRECISIONS = ["32-true", "bf16-mixed"]
# One chooses by training batches, and then does what others do.
PLAIN_METHODS = [name for name in METHODS if name != "bsr_auto"]
COLUMNS = {
    "model": "model",
    "method": "method",
    "precision": "precision",
    "batch_size": "batch",
    "activations_mib": "activations / image (MiB)",
    "peak_mib": "peak (MiB)",
    "gflop": "GFLOP / image",
    "equal": "= measured",
    "plan_s": "plan (s)",
    "measure_s": "measure (s)",
}


def build(name: str, method: str) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    apply_method_(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained), model.patch_embed.img_size[0]


def timed(run: Callable[[], MemoryReport]) -> tuple[MemoryReport, float]:
    begin = time.perf_counter()
    report = run()
    return report, time.perf_counter() - begin


def row(name: str, method: str, precision: Any, batch_size: int, *, measured: bool) -> dict[str, Any]:
    """Plan, and measure, one step."""
    model, optimizer, size = build(name, method)
    images = torch.randn(batch_size, 3, size, size)
    planned, plan_s = timed(lambda: plan(model, images, optimizer=optimizer, precision=precision))
    found: dict[str, Any] = {
        "model": name,
        "method": method,
        "precision": precision,
        "batch_size": batch_size,
        "activations_mib": planned.activations / batch_size / MIB,
        "peak_mib": (planned.peak or 0) / MIB,
        "gflop": sum(planned.flops or ()) / batch_size / 1e9,
        "equal": None,
        "plan_s": plan_s,
        "measure_s": None,
    }
    if measured:
        real, found["measure_s"] = timed(lambda: measure(model, images, optimizer=optimizer, precision=precision))
        found["equal"] = planned == real
    return found


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_table(rows: list[dict[str, Any]]) -> None:
    print("|", " | ".join(COLUMNS.values()), "|")
    print(
        "|",
        " | ".join("---:" if name in rows[0] and not isinstance(rows[0][name], str) else "---" for name in COLUMNS),
        "|",
    )
    for line in rows:
        print("|", " | ".join(cell(line[name]) for name in COLUMNS), "|")


def large() -> dict[str, Any]:
    """Plan a ViT-L/16 on 64 images, and the batch that needs more than 500 GiB."""
    model, optimizer, size = build("vit_large_patch16_224", "full")
    memory = psutil.Process().memory_info
    before = memory().rss
    report, seconds = timed(lambda: plan(model, (64, 3, size, size), optimizer=optimizer))
    assert report.peak is not None
    batch_size = 64 * (700 * 2**30 // report.peak + 1)
    huge, huge_seconds = timed(lambda: plan(model, (batch_size, 3, size, size), optimizer=optimizer))
    assert huge.peak is not None
    return {
        "model": "vit_large_patch16_224",
        "batch_size": 64,
        "plan_s": seconds,
        "peak_gib": report.peak / 2**30,
        "memory_beyond_parameters_mib": (memory().rss - before) / MIB,
        "huge_batch_size": batch_size,
        "huge_peak_gib": huge.peak / 2**30,
        "huge_plan_s": huge_seconds,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, help="names that timm knows; none for ViT-L/16 alone")
    parser.add_argument("--methods", nargs="+", default=PLAIN_METHODS, choices=PLAIN_METHODS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--plan-only", action="store_true", help="do not measure")
    parser.add_argument("--no-large", action="store_true", help="without ViT-L/16")
    parser.add_argument("--threads", type=int, help="of torch; its own default otherwise")
    parser.add_argument("--json", type=Path, default=Path("planning.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    model, optimizer, size = build("vit_micro_patch4_32", "full")
    plan(model, (1, 3, size, size), optimizer=optimizer)  # imports what planning imports
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": []}
    # First: what others leave in memory would be reused and not seen.
    results["large"] = None if args.no_large else large()
    for combination in itertools.product(args.models, args.methods, args.precisions, args.batch_sizes):
        results["rows"].append(row(*combination, measured=not args.plan_only))
        args.json.write_text(json.dumps(results, indent=2))
    args.json.write_text(json.dumps(results, indent=2))
    if results["rows"]:
        print_table(results["rows"])
        compared = [line["equal"] for line in results["rows"] if line["equal"] is not None]
        print(f"\n{sum(compared)} of {len(compared)} plans equal what was measured.")
    if found := results["large"]:
        print(
            f"\nViT-L/16, batch 64: planned in {found['plan_s']:.1f} s with "
            f"{found['memory_beyond_parameters_mib']:.0f} MiB beyond the parameters; peak {found['peak_gib']:.1f} GiB. "
            f"Batch {found['huge_batch_size']}: {found['huge_peak_gib']:.0f} GiB, "
            f"planned in {found['huge_plan_s']:.1f} s."
        )


if __name__ == "__main__":
    main()
