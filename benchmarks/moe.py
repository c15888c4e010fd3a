"""Time of a mixture of experts against what its floating-point operations predict from the dense MLP.

    python benchmarks/moe.py
    python benchmarks/moe.py --plan

The first times one step (forward, and backward into inputs and weights) of one MLP layer of a ViT, dense and as 16
experts of which each token is sent to 4, for the tokens of 8 images at 197 tokens and after each drop of 3,6,9 @ 0.5.
Dense and mixture take turns, so that a machine that slows down slows both. A ratio of 1 says that the mixture is as
fast as the dense layer for each operation. Times are CPU seconds of the process with ``--cpu-time``, which other
processes disturb less, but only with one thread.

The second prints the planned step of a whole multi-task ViT with mixtures of experts, with and without BSR, and
whether it is what is measured if ``--measure`` is given.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_bsr.models  # noqa: F401 - registers the micro ViT with timm
from lightning_bsr.functional import install_lean_activations, install_token_drop, select_blocks_
from lightning_bsr.memory import MIB, measure, plan
from lightning_bsr.models import MoEMlp, convert_to_moe_

BLOCKS, DROPS, EXPERTS, TOP_K, TASKS, CLASSES = [3, 7, 11], [3, 6, 9], 16, 4, 5, 100
TOKENS = [197, 100, 52, 28]  # of one image, before and after the drops


def seconds_of_step(layer: nn.Module, x: torch.Tensor, clock: Callable[[], float]) -> float:
    layer.zero_grad()
    started = clock()
    layer(x).sum().backward()
    return clock() - started


def operations(layer: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


def time_layers(args: argparse.Namespace) -> None:
    """Time dense and mixture in turns."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    dense = Mlp(args.width, 4 * args.width)
    moe = MoEMlp(dense, args.experts, args.top_k)
    print(
        f"width {args.width}, {args.images} images, {args.experts} experts, top {args.top_k}, fp32, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| tokens an image | dense, ms | mixture, ms | operations, times dense | time / predicted time |")
    print("|---:|---:|---:|---:|---:|")
    for tokens in args.tokens:
        x = torch.randn(args.images, tokens, args.width, requires_grad=True)
        more = operations(moe, x) / operations(dense, x)
        pairs = []
        for _ in range(args.repeats + 1):
            before = seconds_of_step(dense, x, clock)
            mixture = seconds_of_step(moe, x, clock)
            pairs.append(((before + seconds_of_step(dense, x, clock)) / 2, mixture))
        plain, mixed = (statistics.median(times) * 1e3 for times in zip(*pairs[1:], strict=True))
        ratio = statistics.median(mixture / (plain * more) for plain, mixture in pairs[1:])
        print(f"| {tokens} | {plain:.1f} | {mixed:.1f} | {more:.2f} | {ratio:.2f} |", flush=True)


def plan_models(args: argparse.Namespace) -> None:
    """Plan a step of one task's batch, of a model with a head and a gate for each task."""
    size = timm.get_pretrained_cfg(args.model).input_size
    labels = torch.arange(args.images) % CLASSES
    print(f"{args.model}, {TASKS} tasks of {CLASSES} classes, batch {args.images} of one task, fp32, AdamW\n")
    columns = ["model", "parameters, million", "trained", "activations, MiB / image", "GFLOP / image", "peak, MiB"]
    print(f"| {' | '.join(columns + ['equal to measured'] * args.measure)} |")
    print(f"|---|{'---:|' * (len(columns) - 1 + args.measure)}")
    for name, mixture, bsr, lean in (
        ("dense", False, False, False),
        ("mixture of experts", True, False, False),
        ("dense, BSR 3,7,11 / 3,6,9 @ 0.5", False, True, False),
        ("mixture of experts, BSR 3,7,11 / 3,6,9 @ 0.5", True, True, False),
        ('mixture of experts, BSR, LeanActivations("exact")', True, True, True),
    ):
        backbone = timm.create_model(args.model, num_classes=0)
        model = nn.ModuleDict(
            {
                "backbone": backbone,
                "heads": nn.ModuleList(nn.Linear(backbone.num_features, CLASSES) for _ in range(TASKS)),
            }
        )
        if mixture:
            convert_to_moe_(backbone, BLOCKS, EXPERTS, TOP_K, tasks=TASKS).select_task(0)
        if bsr:
            select_blocks_(backbone, BLOCKS)
            install_token_drop(backbone, DROPS, 0.5)
        if lean:
            install_lean_activations(backbone, "exact")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

        def step(images: torch.Tensor, labels: torch.Tensor, model: nn.ModuleDict = model) -> torch.Tensor:
            return F.cross_entropy(model["heads"][0](model["backbone"](images)), labels)

        arguments = {"forward": step, "optimizer": optimizer}
        report = plan(model, (args.images, *size), labels, **arguments)
        total, trained = (
            sum(p.numel() for p in model.parameters() if all_ or p.requires_grad) for all_ in (True, False)
        )
        cells = [name, f"{total / 1e6:.1f}", f"{trained / 1e6:.1f}", f"{report.activations / args.images / MIB:.2f}"]
        cells += [f"{sum(report.flops) / args.images / 1e9:.1f}", f"{report.peak / MIB:.0f}"]
        if args.measure:
            images = torch.randn(args.images, *size)
            cells.append("yes" if measure(model, images, labels, **arguments) == report else "no")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="plan a whole model instead of timing a layer")
    parser.add_argument("--measure", action="store_true", help="with --plan: run each step too, and compare")
    parser.add_argument("--model", default="vit_base_patch16_224", help="with --plan: a timm ViT of depth 12")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--top-k", type=int, default=TOP_K)
    parser.add_argument("--repeats", type=int, default=7, help="timed turns, after one that is not timed")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of those of the clock")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.plan:
        plan_models(args)
    else:
        time_layers(args)


if __name__ == "__main__":
    main()
