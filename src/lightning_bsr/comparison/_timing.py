"""How long a training step takes, measured while nothing else of the comparison runs."""

import contextlib
import math
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override

from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.comparison._runs import Build

TURNS = 3
_WARM_UP_STEPS = 2
_NEVER_REACHED = 1000  # epochs; where the data have too few batches for one turn, the next epoch goes on


def time_steps(build: Build, configuration: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train for a few optimizer steps and time each.

    A step is all that happens from the start of its first batch to the end of its last: the batches' transfer is not
    part of it, nor is loading them.

    Args:
        build: Makes model, data and Trainer.
        configuration: That of a run.
        steps: How many to time, after two that are not.

    Returns:
        ``seconds``: of each step; ``steps_per_epoch``, if the data have a length.
    """
    configuration["trainer"] |= {"max_epochs": _NEVER_REACHED, "max_steps": -1, "limit_val_batches": 0}
    cli = build(args=configuration)
    clock = _Clock(steps)
    # What stops early looks for metrics of the validation, which is left out here.
    callbacks = callbacks_of(cli.trainer)
    others = [callback for callback in callbacks if not isinstance(callback, EarlyStopping)]
    callbacks[:] = [_ClockStart(clock), *others, clock]
    with contextlib.suppress(_EnoughError):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return {"seconds": clock.seconds[_WARM_UP_STEPS:], "steps_per_epoch": clock.steps_per_epoch}


def median_of(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the median step of several turns.

    Args:
        turns: What :func:`time_steps` returned, once a turn.

    Example:
        >>> median_of([{"seconds": [3.0, 1.0], "steps_per_epoch": 10}, {"seconds": [2.0], "steps_per_epoch": 10}])
        {'step_seconds': 2.0, 'steps_timed': 3, 'steps_per_epoch': 10}
    """
    seconds = [second for turn in turns for second in turn["seconds"]]
    return {
        "step_seconds": statistics.median(seconds),
        "steps_timed": len(seconds),
        "steps_per_epoch": turns[0]["steps_per_epoch"],
    }


class _EnoughError(Exception):
    """Ends a fit without the epoch's validation, checkpoints and early stopping."""


class _Clock(Callback):
    """The last callback: it stops the time that :class:`_ClockStart`, the first, has started."""

    def __init__(self, steps: int) -> None:
        self.wanted = steps + _WARM_UP_STEPS
        self.seconds: list[float] = []
        self.steps_per_epoch: float | None = None
        self._of_step = 0.0
        self._batches = 0

    def start(self, device: torch.device) -> None:
        _synchronize(device)
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _synchronize(pl_module.device)
        self._of_step += time.perf_counter() - self._started
        self._batches += 1
        if self._batches % trainer.accumulate_grad_batches == 0:
            self.seconds.append(self._of_step)
            self._of_step = 0.0
        if len(self.seconds) == self.wanted:
            if not math.isinf(trainer.num_training_batches):
                self.steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
            raise _EnoughError


class _ClockStart(Callback):
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._clock.start(pl_module.device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
