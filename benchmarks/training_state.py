"""The whole training state of a ViT, lever by lever: what is in memory at the peak of a step.

    python benchmarks/training_state.py --model vit_base_patch16_224 --batch-size 8

Plans one training step on tensors without data for each row, SGD with momentum and AdamW, so it takes seconds on any
machine; ``--measure`` runs each step and says whether the plan is what was measured. Prints a Markdown table.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import nn

import lightning_bsr.models  # noqa: F401 - registers the micro ViT with timm
from lightning_bsr.functional import (
    install_lean_activations,
    install_token_drop,
    install_unread_skip,
    quantize_frozen_,
    select_blocks_,
)
from lightning_bsr.memory import MIB, measure, plan

CLASSES = 10
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}


@dataclass(frozen=True)
class Row:
    """Which levers are on."""

    name: str
    drop: tuple[int, ...] = (3, 6, 9)
    full: bool = False
    lean: str | None = None
    skip_unread: bool = False
    fold_norms: bool = False
    quantize: bool = False
    release: bool = False

    def model(self, name: str) -> nn.Module:
        """Make the model with its levers."""
        model = timm.create_model(name, num_classes=CLASSES)
        if self.full:
            return model
        select_blocks_(model, [3, 7, 11])
        install_token_drop(model, list(self.drop), 0.5)
        if self.lean:
            install_lean_activations(model, self.lean, fold_norms=self.fold_norms)
        if self.skip_unread:
            install_unread_skip(model)
        if self.quantize:
            quantize_frozen_(model)
        return model


LEAN = {"skip_unread": True, "fold_norms": True, "quantize": True, "release": True}
ROWS = [
    Row("full fine-tuning", full=True),
    Row("BSR 3,7,11 / 3,6,9 @ 0.5"),
    Row("+ exact", lean="exact"),
    Row("+ exact, skip_unread, fold_norms", lean="exact", skip_unread=True, fold_norms=True),
    Row("+ recompute", lean="recompute"),
    Row("+ int8 activations", lean="int8"),
    Row("+ int8 frozen weights", quantize=True),
    Row("+ released gradients", release=True),
    Row("+ exact and all of these", lean="exact", **LEAN),
    Row("+ recompute and all of these", lean="recompute", **LEAN),
    Row("drop 2,5,8 instead", drop=(2, 5, 8)),
    Row("drop 2,5,8, + exact", drop=(2, 5, 8), lean="exact"),
]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT of depth 12 with a class token")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--measure", action="store_true", help="run each step too, and compare")
    args = parser.parse_args()

    size = timm.get_pretrained_cfg(args.model).input_size
    labels = torch.arange(args.batch_size) % CLASSES
    print(f"{args.model}, batch {args.batch_size}, fp32, torch {torch.__version__}\n")
    columns = ["levers", "activations, MiB / image", "at most, MiB / image", "GFLOP / image"]
    columns += [f"peak with {name}, MiB" for name in OPTIMIZERS] + ["equal to measured"] * args.measure
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for row in ROWS:
        model = row.model(args.model).train()
        reports, equal = [], True
        for make in OPTIMIZERS.values():
            optimizer = make([p for p in model.parameters() if p.requires_grad])
            arguments = {
                "loss": lambda logits: F.cross_entropy(logits, labels),
                "optimizer": optimizer,
                "release_gradients": row.release,
            }
            reports.append(plan(model, (args.batch_size, *size), **arguments))
            if args.measure:
                equal &= measure(model, torch.randn(args.batch_size, *size), **arguments) == reports[-1]
        first = reports[0]
        figures = [first.activations / args.batch_size / MIB, first.activations_peak / args.batch_size / MIB]
        figures += [sum(first.flops) / args.batch_size / 1e9]
        cells = [f"{figure:.2f}" for figure in figures] + [f"{report.peak / MIB:.1f}" for report in reports]
        print(f"| {' | '.join([row.name, *cells, *(['yes' if equal else 'no'] * args.measure)])} |", flush=True)


if __name__ == "__main__":
    main()
