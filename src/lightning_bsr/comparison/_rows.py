"""What a comparison found out about each method: one row a method."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_bsr.comparison._methods import summary_of
from lightning_bsr.comparison._schedule import Progress, Run, Unit


@dataclass(frozen=True)
class Score:
    """The test metric over the seeds.

    Attributes:
        length: Epochs or steps of each run.
        values: One a seed that has finished.
        unit: Whether ``length`` is epochs or steps.
    """

    length: int
    values: tuple[float, ...]
    unit: Unit = "epochs"

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample deviation over the seeds; one has none."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.deviation is None else f"{self.mean:.4f} ± {self.deviation:.4f}"


@dataclass(frozen=True)
class Row:
    """What is known of one method; None is unknown.

    Attributes:
        method: Its name.
        summary: What it does.
        trained_parameters: Number of parameters that train.
        planned_activations: Bytes an image that backward keeps, as planned.
        measured_activations: The same, as measured in the first batch.
        planned_activations_peak: Bytes an image that are kept at most at one moment, with what is computed again.
        planned_peak: Bytes of the planned peak, for the whole batch.
        flops: Floating-point operations an image, forward and backward.
        step_seconds: Median time of a training step.
        step_ratio: That, relative to the first method.
        lr: The chosen learning rate.
        lr_at_edge: Whether it is the smallest or largest of several that were tried.
        validation: Validation metric that chose it.
        equal_length: Test metric after the same epochs or steps as every method.
        equal_time: Test metric after the same time as the first method.
        notes: What the reader must know, such as why runs have failed.
    """

    method: str
    summary: str
    trained_parameters: int | None = None
    planned_activations: float | None = None
    planned_activations_peak: float | None = None
    measured_activations: float | None = None
    planned_peak: int | None = None
    flops: float | None = None
    step_seconds: float | None = None
    step_ratio: float | None = None
    lr: float | None = None
    lr_at_edge: bool = False
    validation: float | None = None
    equal_length: Score | None = None
    equal_time: Score | None = None
    notes: tuple[str, ...] = ()


def make_rows(
    progress: Progress,
    plans: Mapping[str, Mapping[str, Any]],
    timings: Mapping[str, Mapping[str, Any]],
    problems: Mapping[str, Sequence[str]],
) -> list[Row]:
    """Make the rows from what the runs gave.

    Args:
        progress: Settings and results.
        plans: Planned figures by method.
        timings: Step times by method.
        problems: What went wrong beside the runs, by method.
    """
    return [
        _make_row(method, progress, plans.get(method, {}), timings, problems.get(method, ()))
        for method in progress.settings.methods
    ]


def _make_row(
    method: str,
    progress: Progress,
    planned: Mapping[str, Any],
    timings: Mapping[str, Mapping[str, Any]],
    problems: Sequence[str],
) -> Row:
    settings = progress.settings
    lr = progress.chosen_lr(method)
    best = {} if lr is None else progress.results[progress.run(method, lr, settings.seeds[0])]
    batch_size, activations = best.get("batch_size"), best.get("activations")
    seconds = timings.get(method, {}).get("step_seconds")
    reference = timings.get(settings.methods[0], {}).get("step_seconds")
    lrs = settings.lrs_of(method)
    at_edge = lr in (min(lrs), max(lrs)) and len(lrs) > 1
    timed = progress.timed_lengths.get(method)

    notes = []
    if lr is None and not any(run in progress.failures for run in progress.grid(method)):
        notes.append(f"failed: {settings.monitor} is no finite number with any learning rate")
    reasons: dict[str, list[Run]] = {}
    for run, message in progress.failures.items():
        if run.method == method:
            reasons.setdefault(message, []).append(run)
    for message, runs in reasons.items():
        which = "" if lr is None else f" ({'; '.join(str(run).removeprefix(f'{method}, ') for run in runs)})"
        notes.append(f"failed{which}: {message}")
    # A method that cannot be had says so wherever it is tried; once is enough.
    notes += [problem for problem in problems if not any(problem.endswith(f": {message}") for message in reasons)]
    if at_edge:
        notes.append(f"lr {lr:g} is at the edge of the grid: a better one may lie beyond")
    if settings.equal_time and timed is None and lr is not None:
        notes.append("no equal time: " + ("not timed" if seconds is None else f"{settings.methods[0]} was not timed"))
    return Row(
        method=method,
        summary=summary_of(method),
        trained_parameters=best.get("trained_parameters"),
        planned_activations=planned.get("activations_per_image"),
        planned_activations_peak=planned.get("activations_peak_per_image"),
        measured_activations=activations / batch_size if activations is not None and batch_size else None,
        planned_peak=planned.get("peak"),
        flops=planned.get("flops_per_image"),
        step_seconds=seconds,
        step_ratio=seconds / reference if seconds and reference else None,
        lr=lr,
        lr_at_edge=at_edge,
        validation=best["validation"][settings.monitor] if best else None,
        equal_length=_score(progress, method, progress.length),
        equal_time=None if timed is None else _score(progress, method, timed),
        notes=tuple(notes),
    )


def _score(progress: Progress, method: str, length: int) -> Score | None:
    found = [progress.results[run] for run in progress.repeats(method, length) if run in progress.results]
    values = [result.get("test", {}).get(progress.settings.test_metric) for result in found]
    numbers = tuple(value for value in values if value is not None)
    return Score(length, numbers, progress.unit) if numbers else None
