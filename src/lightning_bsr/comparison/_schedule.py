"""Which runs a comparison takes, given what is known so far, and where their results are kept."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_bsr.comparison._pool import Failure
from lightning_bsr.comparison._settings import Settings

Unit = Literal["epochs", "steps"]
"""In what the length of training is counted."""


def in_words(length: int, unit: Unit) -> str:
    """Write a length of training.

    Example:
        >>> in_words(20, "epochs"), in_words(1, "steps")
        ('20 epochs', '1 step')
    """
    return f"{length} {unit if length != 1 else unit[:-1]}"


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    method: str
    lr: float
    seed: int
    length: int
    unit: Unit = "epochs"

    def __str__(self) -> str:
        return f"{self.method}, lr {self.lr:g}, seed {self.seed}, {in_words(self.length, self.unit)}"


class Store:
    """Results as JSON files below a folder, each written at once or not at all.

    Args:
        folder: The folder; made when something is written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store(Path(folder))
        ...     store.write("runs/a", {"seconds": 1.0})
        ...     store.read("runs/a"), store.read("runs/b")
        ({'seconds': 1.0}, None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what was written under ``name``, unless it is missing, damaged or the record of a failure."""
        try:
            content: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return None if "error" in content else content

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write ``content`` under ``name``, in place of what was there."""
        write_atomically(self.folder / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_failure(self, name: str, failure: Failure, **more: Any) -> None:
        """Note a failure, which is read as nothing: it will be tried again."""
        self.write(name, {**more, "error": failure.message, "details": failure.details})


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half-written.

    Args:
        path: The file; its folder is made.
        text: Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def run_name(run: Run, fingerprint: str) -> str:
    """Name a run's file by all that decides its result.

    Args:
        run: The run.
        fingerprint: Hash of the rest of its configuration.

    Example:
        >>> run_name(Run("head", 1.5e-3, 0, 20), "c0ffee")
        'runs/head-lr0.0015-seed0-epochs20-c0ffee'
    """
    return f"runs/{run.method}-lr{run.lr!r}-seed{run.seed}-{run.unit}{run.length}-{fingerprint}"


def choose_lr(settings: Settings, results: Mapping[float, Mapping[str, Any]]) -> float | None:
    """Choose the rate with the best validation metric; of equal ones the smallest.

    Args:
        settings: Says which metric and which way.
        results: What the runs of the first seed gave, by learning rate; failed ones are left out.

    Returns:
        None if no run has a finite metric.

    Example:
        >>> settings = Settings(methods=("full",), lrs=(1e-3, 1e-2), seeds=(0,))
        >>> choose_lr(settings, {lr: {"validation": {"val/accuracy": 0.9}} for lr in settings.lrs})
        0.001
    """
    chosen, best = None, math.nan
    for lr in sorted(results):
        value = results[lr]["validation"].get(settings.monitor)
        if value is not None and (chosen is None or settings.better(value, best)):
            chosen, best = lr, value
    return chosen


def length_in_equal_time(settings: Settings, length: int, seconds: float, reference_seconds: float) -> int:
    """Count the epochs or steps that a method does in the time that the reference takes for ``length``.

    Args:
        settings: Has the cap.
        length: Epochs or steps of the reference.
        seconds: The method's time for an epoch, or a step.
        reference_seconds: The reference's for the same.

    Example:
        >>> settings = Settings(methods=("full", "head"), lrs=(1e-3,), seeds=(0,), max_epoch_factor=4)
        >>> [length_in_equal_time(settings, 20, seconds, 3.0) for seconds in (0.1, 1.4, 3.0, 100.0)]
        [80, 42, 20, 1]
    """
    longest = math.floor(length * settings.max_epoch_factor)
    return max(1, min(longest, math.floor(length * reference_seconds / seconds)))


@dataclass(frozen=True)
class Progress:
    """What is known of a comparison at some moment.

    Attributes:
        settings: What was asked for.
        length: Epochs or steps of each run at equal length.
        timed_lengths: The same at equal time, of the methods where they are known.
        results: What the finished runs gave.
        failures: Why the failed ones did not.
        unit: Whether the lengths are epochs or steps.
    """

    settings: Settings
    length: int
    timed_lengths: Mapping[str, int]
    results: Mapping[Run, Mapping[str, Any]]
    failures: Mapping[Run, str]
    unit: Unit = "epochs"

    def run(self, method: str, lr: float, seed: int, length: int | None = None) -> Run:
        """Name a run; at equal length unless ``length`` is given."""
        return Run(method, lr, seed, self.length if length is None else length, self.unit)

    def grid(self, method: str) -> list[Run]:
        """Return the runs that choose a method's learning rate."""
        return [self.run(method, lr, self.settings.seeds[0]) for lr in self.settings.lrs_of(method)]

    def chosen_lr(self, method: str) -> float | None:
        """Return a method's learning rate once all runs of its grid have ended, if any has succeeded."""
        grid = self.grid(method)
        if any(run not in self.results and run not in self.failures for run in grid):
            return None
        return choose_lr(self.settings, {run.lr: self.results[run] for run in grid if run in self.results})

    def repeats(self, method: str, length: int) -> list[Run]:
        """Return the runs with all seeds at the chosen learning rate; none before it is chosen."""
        lr = self.chosen_lr(method)
        return [] if lr is None else [self.run(method, lr, seed, length) for seed in self.settings.seeds]

    def wanted(self) -> list[Run]:
        """Return all runs that can be done by now, those that choose the learning rates first."""
        methods = self.settings.methods
        runs = [run for method in methods for run in self.grid(method)]
        runs += [run for method in methods for run in self.repeats(method, self.length)]
        for method in methods:
            if method in self.timed_lengths:
                runs += self.repeats(method, self.timed_lengths[method])
        return list(dict.fromkeys(runs))

    def chosen(self, method: str) -> Run | None:
        """Return the run of the grid whose learning rate was chosen."""
        lr = self.chosen_lr(method)
        return None if lr is None else self.run(method, lr, self.settings.seeds[0])

    def untested(self) -> list[Run]:
        """Return the chosen runs that have trained but were not tested yet."""
        chosen = [self.chosen(method) for method in self.settings.methods]
        return [run for run in chosen if run is not None and "test" not in self.results[run]]

    def count(self) -> int:
        """Count the runs of the whole comparison, as far as can be known by now."""
        count = 0
        for method in self.settings.methods:
            count += len(self.settings.lrs_of(method))
            ended = all(run in self.results or run in self.failures for run in self.grid(method))
            if ended and self.chosen_lr(method) is None:
                continue  # there is no learning rate to go on with
            count += len(self.settings.seeds) - 1
            if self.timed_lengths.get(method, self.length) != self.length:
                count += len(self.settings.seeds)
        return count
