"""One model for several tasks against one for each, dense and with mixtures of experts, with and without BSR.

    python benchmarks/multitask.py --cifar10 ../shared/data/cifar10

Three tasks of real pictures: scikit-learn's digits (10 classes), a folder with a subset of CIFAR-10 (10 classes), and
the same CIFAR-10 pictures as animals or vehicles (2 classes): the third task is derived from the second. The bundled
micro ViT; every task gets the same number of optimizer steps, whether alone or in turns with the others. Learning rates
are those that benchmarks/accuracy.py chose for the digits, one for whole models and one for BSR. Accuracies are on test
splits, at the end of training. What a step of one task needs, and what all models together weigh, is planned.

Runs are written to ``--output`` as they end, and those found there are not run again. Prints a Markdown table.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from lightning_bsr import (
    BlockSelect,
    DigitsDataModule,
    ImageFolderDataModule,
    MultiTaskClassifier,
    MultiTaskDataModule,
    TokenDrop,
)
from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.memory import MIB, plan

SEEDS = (0, 1, 2)
BATCH, BLOCKS, DROPS, KEEP = 32, [3, 7, 11], [3, 6, 9], 0.5
EXPERTS = {"blocks": BLOCKS, "num_experts": 16, "top_k": 4}
LEARNING_RATES = {False: 5e-4, True: 4.5e-3}
CLASSES = {"digits": 10, "cifar10": 10, "animal or vehicle": 2}
VEHICLES = ("airplane", "automobile", "ship", "truck")
PICTURES = {"img_size": 32, "mean": (0.5071, 0.4866, 0.4409), "std": (0.2673, 0.2564, 0.2762), "scale": (0.5, 1.0)}


@dataclass(frozen=True)
class Method:
    """What is compared."""

    name: str
    together: bool
    experts: bool
    bsr: bool


METHODS = [
    Method(f"{name}{', BSR' if bsr else ''}", together, experts, bsr)
    for bsr in (False, True)
    for name, together, experts in (
        ("a model for each task", False, False),
        ("one model", True, False),
        ("one model with experts", True, True),
    )
]


def data_of(task: str, cifar10: Path, links: Path) -> LightningDataModule:
    """Make the data module of a task."""
    if task == "digits":
        return DigitsDataModule(batch_size=BATCH)
    root = cifar10 if task == "cifar10" else _animals_and_vehicles(cifar10, links)
    return ImageFolderDataModule(root, batch_size=BATCH, num_workers=0, check_files=False, **PICTURES)


def _animals_and_vehicles(cifar10: Path, links: Path) -> Path:
    """Link the pictures of ten classes into folders of two."""
    for split in ("train", "test"):
        for folder in (cifar10 / split).iterdir():
            kind = links / split / ("vehicle" if folder.name in VEHICLES else "animal")
            kind.mkdir(parents=True, exist_ok=True)
            for picture in folder.iterdir():
                link = kind / f"{folder.name}-{picture.name}"
                if not link.exists():
                    link.symlink_to(picture.resolve())
    return links


def model_of(method: Method, tasks: list[str]) -> MultiTaskClassifier:
    return MultiTaskClassifier(
        {task: CLASSES[task] for task in tasks},
        experts=EXPERTS if method.experts else None,
        lr=LEARNING_RATES[method.bsr],
        warmup_steps=10,
    )


def run(method: Method, tasks: list[str], seed: int, steps: int, cifar10: Path) -> dict[str, Any]:
    """Train once; return the accuracy of each task."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_steps=steps * len(tasks),
        callbacks=[BlockSelect(BLOCKS), TokenDrop(DROPS, KEEP)] if method.bsr else [],
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with tempfile.TemporaryDirectory() as links:
        modules = {task: data_of(task, cifar10, Path(links)) for task in tasks}
        data, model = MultiTaskDataModule(modules, alpha=0), model_of(method, tasks)
        trainer.fit(model, data)
        results = trainer.test(model, data, verbose=False)
    accuracies = {task: result[f"test/{task}/accuracy"] for task, result in zip(tasks, results, strict=True)}
    return {"method": method.name, "seed": seed, "steps": steps, "accuracies": accuracies}


def costs(method: Method) -> tuple[float, float, float, float]:
    """Plan a step: MiB kept an image, GFLOP an image, MiB of all weights for all tasks, MiB at the peak."""
    tasks = list(CLASSES) if method.together else ["cifar10"]
    model = model_of(method, tasks)
    if method.bsr:
        select_blocks_(model, BLOCKS)
        install_token_drop(model, DROPS, KEEP)
    labels = torch.zeros(BATCH, dtype=torch.long)
    report = plan(
        model,
        (BATCH, 3, 32, 32),
        forward=lambda images: F.cross_entropy(model(images, "cifar10"), labels),
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
    )
    weights = report.parameters * (1 if method.together else len(CLASSES))
    each = report.activations / BATCH / MIB, sum(report.flops) / BATCH / 1e9
    return *each, weights / MIB, report.peak / MIB


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, default=Path("../shared/data/cifar10"), help="image folder of CIFAR-10")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps for each task")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=Path("multitask.json"))
    args = parser.parse_args()
    done: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []

    def key(method: str, tasks: list[str], seed: int) -> tuple[Any, ...]:
        return method, tuple(tasks), seed, args.steps

    known = {key(row["method"], list(row["accuracies"]), row["seed"]) for row in done if row["steps"] == args.steps}
    wanted = [
        (method, tasks, seed)
        for seed in args.seeds
        for method in METHODS
        for tasks in ([list(CLASSES)] if method.together else [[task] for task in CLASSES])
    ]
    missing = [(method, tasks, seed) for method, tasks, seed in wanted if key(method.name, tasks, seed) not in known]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(run, *each, args.steps, args.cifar10) for each in missing]:
            done.append(future.result())
            args.output.write_text(json.dumps(done, indent=1))

    print(f"micro ViT, {args.steps} steps of {BATCH} images for each task, seeds {args.seeds}; test accuracy, %\n")
    columns = [
        *CLASSES,
        "activations, KiB / image",
        "GFLOP / image",
        "weights for all tasks, MiB",
        "peak of a step, MiB",
    ]
    print(f"| method | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for method in METHODS:
        rows = [row for row in done if row["method"] == method.name and row["steps"] == args.steps]
        cells = []
        for task in CLASSES:
            values = [
                100 * row["accuracies"][task] for row in rows if task in row["accuracies"] and row["seed"] in args.seeds
            ]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        activations, operations, weights, peak = costs(method)
        cells += [f"{1024 * activations:.0f}", f"{operations:.3f}", f"{weights:.1f}", f"{peak:.1f}"]
        print(f"| {method.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
