"""What a worker process does: one run, a look at the metrics' names, or a plan."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from lightning_bsr.callbacks import ActivationMemoryMonitor
from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.memory import MemoryReport
from lightning_bsr.methods import FineTune
from lightning_bsr.planning import plan_fit

Build = Callable[..., LightningCLI]
"""Makes model, data and Trainer from ``args``, a configuration; it is pickled, so a class or a module's function."""

_PLANNED_WITH = ("accelerator", "devices", "precision", "accumulate_grad_batches")


def metric_names(build: Build, configuration: dict[str, Any]) -> dict[str, list[str]]:
    """Evaluate one batch of each split and name the metrics that the module logs.

    Args:
        build: Makes model, data and Trainer.
        configuration: That of a run.
    """
    configuration["trainer"] |= {"limit_val_batches": 1, "limit_test_batches": 1, "callbacks": None}
    cli = build(args=configuration)
    return {
        "validation": sorted(_merged(cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False))),
        "test": sorted(_merged(cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False))),
    }


def run_once(build: Build, configuration: dict[str, Any], weights: Path | None) -> dict[str, Any]:
    """Train once, then validate the final weights; test them too, or keep them to be tested if they are chosen.

    Args:
        build: Makes model, data and Trainer.
        configuration: That of the run.
        weights: Where to keep the final weights; without it they are tested.

    Returns:
        ``validation`` and ``test``: metrics by name; ``seconds`` of training with its validations; ``epochs_run``;
        ``parameters`` and ``trained_parameters``: how many; ``batch_size``; ``activations``: bytes that backward kept
        for the first batch.
    """
    cli = build(args=configuration)
    # Only the first batch is measured: it is a whole one, and the others are not slowed.
    monitor, witness = ActivationMemoryMonitor(every_n_steps=sys.maxsize), _Witness()
    callbacks_of(cli.trainer).extend([monitor, witness, *([] if weights is None else [_Saver(weights)])])
    started = time.monotonic()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.monotonic() - started
    epochs_run = cli.trainer.current_epoch
    validation = _merged(cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False))
    tested = {} if weights is not None else _tested(cli)
    return tested | {
        "validation": validation,
        "seconds": seconds,
        "epochs_run": epochs_run,
        "parameters": witness.parameters,
        "trained_parameters": witness.trained,
        "batch_size": witness.batch_size,
        "activations": None if monitor.report is None else monitor.report.activations,
    }


def test_once(build: Build, configuration: dict[str, Any], weights: Path) -> dict[str, Any]:
    """Test the weights that a run has kept.

    Args:
        build: Makes model, data and Trainer.
        configuration: That of the run.
        weights: Where it kept them.

    Returns:
        ``test``: metrics by name.
    """
    # The file is the comparison's own: it may hold what a module has put into its checkpoint, of any type.
    return _tested(build(args=configuration), ckpt_path=weights, weights_only=False)


def plan_once(build: Build, configuration: dict[str, Any]) -> dict[str, Any]:
    """Plan a run without training.

    Args:
        build: Makes model, data and Trainer.
        configuration: That of the run.

    Returns:
        Activations an image, also at most at one moment, ``peak`` bytes and operations an image.
    """
    cli, trainer = build(args=configuration), configuration["trainer"]
    report = plan_fit(
        cli.model,
        cli.datamodule,
        # Others may want loggers or validations, which planning has not; they keep nothing for backward.
        [callback for callback in callbacks_of(cli.trainer) if isinstance(callback, FineTune)],
        **{name: trainer[name] for name in _PLANNED_WITH if name in trainer},
    )
    assert isinstance(report, MemoryReport)
    return {
        "activations_per_image": report.activations / report.batch_size if report.batch_size else None,
        "activations_peak_per_image": (
            report.activations_peak / report.batch_size if report.activations_peak and report.batch_size else None
        ),
        "peak": report.peak,
        "flops_per_image": sum(report.flops) / report.batch_size if report.flops and report.batch_size else None,
    }


class _Saver(Callback):
    """Keeps the final weights while all that the method has added is still part of the module."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Whole, for the states of the callbacks: a method may have chosen something that its evaluation needs.
        trainer.save_checkpoint(self._path)


class _Witness(Callback):
    """Notes what only shows while everything is attached."""

    parameters = 0
    trained = 0
    batch_size: int | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = sum(p.numel() for p in pl_module.parameters())
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.batch_size is None:
            self.batch_size = extract_batch_size(batch)


def _tested(cli: LightningCLI, **options: Any) -> dict[str, Any]:
    return {"test": _merged(cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False, **options))}


def _merged(results: list[Any]) -> dict[str, float | None]:
    """Join the metrics of all data loaders; what is no finite number is none in JSON."""
    return {
        name: float(value) if math.isfinite(value) else None
        for result in results
        for name, value in result.items()
        if isinstance(value, (int, float, torch.Tensor))
    }
