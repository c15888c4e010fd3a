"""Accuracy beside memory: full fine-tuning, head only and BSR with the bundled micro ViT, in one run.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py cifar10 --root path/to/cifar10
    python benchmarks/accuracy.py cifar10 --root path/to/cifar10 --levers

All methods get the same data, epochs, optimizer and seeds. Each method's learning rate is the one of the grid with the
best accuracy on the validation split (first seed); the test split is looked at with that one only. Prints a Markdown
table: test accuracy as mean and standard deviation over the seeds, and the activations that backward keeps, measured by
the monitor. With ``--levers`` it is BSR with each lever that keeps or holds less, all with BSR's learning rate, and how
far the losses of the first steps are from those without. Runs are written to ``--output`` as they end, and those found
there are not run again.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    DigitsDataModule,
    ImageFolderDataModule,
    LeanActivations,
    QuantizeFrozen,
    TokenDrop,
    ViTClassifier,
)

FULL, BSR = "full fine-tuning", "BSR: blocks 3,7,11, drop 3,6,9 @ 0.5"
PUBLISHED = [(BlockSelect, {"blocks": [3, 7, 11]}), (TokenDrop, {"blocks": [3, 6, 9], "keep_rate": 0.5})]
METHODS: dict[str, list[tuple[type[Callback], dict[str, Any]]]] = {
    FULL: [],
    "head only": [(BlockSelect, {"blocks": [], "norm": False})],
    BSR: PUBLISHED,
}
LEVERS: dict[str, list[tuple[type[Callback], dict[str, Any]]]] = {
    BSR: PUBLISHED,
    "the same, exact": [*PUBLISHED, (LeanActivations, {"policy": "exact"})],
    "the same, recompute": [*PUBLISHED, (LeanActivations, {"policy": "recompute"})],
    "the same, int8 activations": [*PUBLISHED, (LeanActivations, {"policy": "int8"})],
    "the same, int8 frozen weights": [*PUBLISHED, (QuantizeFrozen, {})],
}
FIRST_STEPS = 20
MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)


def data_of(name: str, root: Path) -> LightningDataModule:
    """Make the data module; its splits are the same for every run."""
    if name == "digits":
        return DigitsDataModule()
    return ImageFolderDataModule(root, img_size=32, scale=(0.5, 1.0), mean=MEAN, std=STD, num_workers=0)


class FirstLosses(Callback):
    """Notes the losses of the first steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, if the step is one of the first."""
        if len(self.losses) < FIRST_STEPS:
            self.losses.append(outputs["loss"].item())


def run(data: str, root: Path, epochs: int, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Fine-tune once; return the accuracies on both splits and the bytes kept an image."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    seed_everything(seed, verbose=False)
    monitor, first = ActivationMemoryMonitor(), FirstLosses()
    callbacks = [monitor, first, *(make(**options) for make, options in (METHODS | LEVERS)[method])]
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = data_of(data, root)
    model = ViTClassifier(num_classes=images.num_classes, lr=lr, warmup_epochs=2)
    with contextlib.redirect_stdout(io.StringIO()):  # the monitor's table, once a run
        trainer.fit(model, images)
    validation = trainer.callback_metrics["val/accuracy"].item()
    test = trainer.test(model, images, verbose=False)[0]["test/accuracy"]
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "validation": validation,
        "test": test,
        "first_losses": first.losses,
        "activations_bytes_per_image": monitor.report.activations / images.batch_size,
    }


def spread(values: list[float]) -> str:
    """Write the mean, and the standard deviation of several."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main() -> None:
    """Run what is missing, choose the learning rates, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["digits", "cifar10"])
    parser.add_argument("--root", type=Path, default=Path("../shared/data/cifar10"), help="image folder of cifar10")
    parser.add_argument("--epochs", type=int, help="20 for digits and 5 for cifar10 by default")
    parser.add_argument("--levers", action="store_true", help="compare BSR with its levers")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="the grid; one rate for all with --levers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first chooses the learning rate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one thread")
    parser.add_argument("--output", type=Path, help="accuracy-<data>.json by default")
    args = parser.parse_args()
    epochs = args.epochs or (20 if args.data == "digits" else 5)
    output = args.output or Path(f"accuracy-{args.data}.json")
    methods = LEVERS if args.levers else METHODS
    rates = args.learning_rates or ([4.5e-3] if args.levers else [5e-4, 1.5e-3, 4.5e-3])
    first, *others = args.seeds
    done: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []

    def complete(wanted: list[tuple[str, float, int]]) -> None:
        missing = [w for w in wanted if w not in {(row["method"], row["lr"], row["seed"]) for row in done}]
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in [pool.submit(run, args.data, args.root, epochs, *each) for each in missing]:
                done.append(future.result())
                output.write_text(json.dumps(done, indent=1))

    complete([(method, lr, first) for method in methods for lr in rates])
    chosen = {
        method: max(
            (row for row in done if row["method"] == method and row["seed"] == first), key=lambda r: r["validation"]
        )
        for method in methods
    }
    complete([(method, best["lr"], seed) for method, best in chosen.items() for seed in others])

    yardstick = BSR if args.levers else FULL
    print(f"micro ViT, {args.data}, {epochs} epochs, learning rates {rates}, seeds {args.seeds}\n")
    difference = f"largest difference of a loss in the first {FIRST_STEPS} steps"
    last = f" | by seed | {difference} |" if args.levers else " |"
    print(f"| method | learning rate | test accuracy, % | activations, KiB / image | of {yardstick}{last}")
    print("|---|---|---|---|---|" + "---|---|" * args.levers)
    whole = chosen[yardstick]["activations_bytes_per_image"]
    for method, best in chosen.items():
        rows = {row["seed"]: row for row in done if row["method"] == method and row["lr"] == best["lr"]}
        tests = [100 * rows[seed]["test"] for seed in args.seeds]
        kept = best["activations_bytes_per_image"]
        line = f"| {method} | {best['lr']:g} | {spread(tests)} | {kept / 1024:.0f} | {100 * kept / whole:.1f} % |"
        if args.levers:
            published = {row["seed"]: row for row in done if row["method"] == BSR and row["lr"] == best["lr"]}
            furthest = max(
                abs(mine - theirs)
                for seed in args.seeds
                for mine, theirs in zip(rows[seed]["first_losses"], published[seed]["first_losses"], strict=True)
            )
            line += f" {', '.join(f'{test:.1f}' for test in tests)} | {furthest:.1g} |"
        print(line)


if __name__ == "__main__":
    main()
