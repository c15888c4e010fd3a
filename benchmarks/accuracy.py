"""Accuracy beside memory: full fine-tuning, head only and BSR with the bundled micro ViT, in one run.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py cifar10 --root ../shared/data/cifar10

All methods get the same data, epochs, optimizer and seeds. Each method's learning rate is the one of the grid with the
best accuracy on the validation split (seed 0); the test split is looked at with that one only. Prints a Markdown table:
test accuracy as mean and standard deviation over the seeds, and the activations that backward keeps, measured by the
monitor. Runs are written to ``--output`` as they end, and those found there are not run again.
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
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything

from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    DigitsDataModule,
    ImageFolderDataModule,
    TokenDrop,
    ViTClassifier,
)

METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {},
    "head only": {"select": {"blocks": [], "norm": False}},
    "BSR: blocks 3,7,11, drop 3,6,9 @ 0.5": {
        "select": {"blocks": [3, 7, 11]},
        "drop": {"blocks": [3, 6, 9], "keep_rate": 0.5},
    },
}
LEARNING_RATES = (5e-4, 1.5e-3, 4.5e-3)
SEEDS = (0, 1, 2)
MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)


def data_of(name: str, root: Path) -> LightningDataModule:
    """Make the data module; its splits are the same for every run."""
    if name == "digits":
        return DigitsDataModule()
    return ImageFolderDataModule(root, img_size=32, scale=(0.5, 1.0), mean=MEAN, std=STD, num_workers=0)


def run(data: str, root: Path, epochs: int, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Fine-tune once; return the accuracies on both splits and the bytes kept an image."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    seed_everything(seed, verbose=False)
    options, monitor = METHODS[method], ActivationMemoryMonitor()
    callbacks: list[Callback] = [monitor]
    if "select" in options:
        callbacks.append(BlockSelect(**options["select"]))
    if "drop" in options:
        callbacks.append(TokenDrop(**options["drop"]))
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
        "activations_bytes_per_image": monitor.report.activations / images.batch_size,
    }


def main() -> None:
    """Run what is missing, choose the learning rates, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["digits", "cifar10"])
    parser.add_argument("--root", type=Path, default=Path("../shared/data/cifar10"), help="image folder of cifar10")
    parser.add_argument("--epochs", type=int, help="20 for digits and 5 for cifar10 by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one thread")
    parser.add_argument("--output", type=Path, help="accuracy-<data>.json by default")
    args = parser.parse_args()
    epochs = args.epochs or (20 if args.data == "digits" else 5)
    output = args.output or Path(f"accuracy-{args.data}.json")
    done: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []

    def complete(wanted: list[tuple[str, float, int]]) -> None:
        missing = [w for w in wanted if w not in {(row["method"], row["lr"], row["seed"]) for row in done}]
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in [pool.submit(run, args.data, args.root, epochs, *each) for each in missing]:
                done.append(future.result())
                output.write_text(json.dumps(done, indent=1))

    complete([(method, lr, 0) for method in METHODS for lr in LEARNING_RATES])
    chosen = {
        method: max(
            (row for row in done if row["method"] == method and row["seed"] == 0), key=lambda r: r["validation"]
        )
        for method in METHODS
    }
    complete([(method, best["lr"], seed) for method, best in chosen.items() for seed in SEEDS[1:]])

    print(f"micro ViT, {args.data}, {epochs} epochs, learning rates {LEARNING_RATES}, seeds {SEEDS}\n")
    print("| method | learning rate | test accuracy, % | activations, KiB / image | of full fine-tuning |")
    print("|---|---|---|---|---|")
    full = chosen["full fine-tuning"]["activations_bytes_per_image"]
    for method, best in chosen.items():
        tests = [100 * row["test"] for row in done if row["method"] == method and row["lr"] == best["lr"]]
        kept = best["activations_bytes_per_image"]
        print(
            f"| {method} | {best['lr']:g} | {statistics.mean(tests):.1f} ± {statistics.stdev(tests):.1f} | "
            f"{kept / 1024:.0f} | {100 * kept / full:.1f} % |"
        )


if __name__ == "__main__":
    main()
