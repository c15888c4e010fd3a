"""Runs a comparison from start to end, or from where it was."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.comparison._configuration import base_configuration, configuration_of, fingerprint, length_of
from lightning_bsr.comparison._plots import plot
from lightning_bsr.comparison._pool import Failure, Pool
from lightning_bsr.comparison._rows import Row, make_rows
from lightning_bsr.comparison._runs import Build, metric_names, plan_once, run_once, test_once
from lightning_bsr.comparison._schedule import (
    Progress,
    Run,
    Store,
    length_in_equal_time,
    run_name,
)
from lightning_bsr.comparison._settings import Settings
from lightning_bsr.comparison._table import print_table, write_tables
from lightning_bsr.comparison._timing import TURNS, median_of, time_steps


def compare(configuration: Mapping[str, Any], settings: Settings, build: Build) -> list[Row]:
    """Fine-tune with every method, write table and plots to ``settings.output``, and print the table.

    Results that are there already are not computed again, so an interrupted comparison goes on where it was.

    Args:
        configuration: A ``fit`` configuration as LightningCLI dumps it.
        settings: What to compare, and how.
        build: Makes model, data and Trainer from a configuration of one run, in another process.

    Returns:
        One row a method, in the order of ``settings.methods``.

    Raises:
        ConfigurationError: The configuration cannot be compared, or does not log the metrics; nothing was trained then.
        RuntimeError: The configuration cannot even be evaluated, for a reason that is not the user's mistake.
    """
    with Pool(settings.output / "log.txt") as pool:
        comparison = _Comparison(configuration, settings, build, pool)
        comparison.check_metrics()
        plans = comparison.plan()
        timings = comparison.time()
        progress = comparison.run(timings)
    rows = make_rows(progress, plans, timings, comparison.problems)
    write_tables(rows, progress, settings.output)
    print_table(rows, progress)
    plotted = plot(rows, settings)
    print(f"Written to {settings.output}: table.md, table.csv, table.json{plotted}.")
    return rows


class _Comparison:
    def __init__(self, configuration: Mapping[str, Any], settings: Settings, build: Build, pool: Pool) -> None:
        self.settings, self.build, self.pool = settings, build, pool
        self.store = Store(settings.output)
        self.base, left_out = base_configuration(configuration, settings)
        self.problems: dict[str, list[str]] = {method: [] for method in settings.methods}
        self.length, self.unit = length_of(self.base["trainer"])
        if left_out:
            print(f"Left out of trainer.callbacks: {', '.join(left_out)}; each method brings its own.")

    def _note(self, method: str, problem: str) -> None:
        self.problems[method].append(problem)
        print(f"{method}: {problem}", flush=True)

    def configuration_of(self, run: Run) -> dict[str, Any]:
        return configuration_of(self.base, self.settings, run.method, run.lr, run.seed, run.length)

    def example_of(self, method: str) -> dict[str, Any]:
        return self.configuration_of(Run(method, self.settings.lrs_of(method)[0], self.settings.seeds[0], self.length))

    def check_metrics(self) -> None:
        """Refuse metrics that the module does not log, before anything trains."""
        settings, name = self.settings, f"metrics/{fingerprint(self.base, self.settings)}"
        names = self.store.read(name)
        if names is None:
            names = self.pool.call(metric_names, self.build, self.example_of(settings.methods[0]))
            if isinstance(names, Failure):
                if names.mistake:
                    raise ConfigurationError(names.message)
                raise RuntimeError(f"The model could not be evaluated. {names.message}\n{names.details}")
            self.store.write(name, names)
        for option, metric, split in (
            ("monitor", settings.monitor, "validation"),
            ("test_metric", settings.test_metric, "test"),
        ):
            if metric not in names[split]:
                raise ConfigurationError(
                    f"{option} is {metric!r}, but {split} does not log that; it logs "
                    f"{', '.join(names[split]) or 'nothing'}."
                )

    def plan(self) -> dict[str, dict[str, Any]]:
        """Plan each method; those that cannot be planned are left out."""
        plans = {}
        for method in self.settings.methods:
            name = f"plans/{method}-{self._fingerprint(method)}"
            planned = self.store.read(name)
            if planned is None:
                print(f"Planning a step of {method}.", flush=True)
                planned = self.pool.call(plan_once, self.build, self.example_of(method))
                if isinstance(planned, Failure):
                    self._note(method, f"not planned: {planned.message}")
                    continue
                self.store.write(name, planned)
            plans[method] = planned
        return plans

    def time(self) -> dict[str, dict[str, Any]]:
        """Time a step of each method, one after the other and several times around, so that all see the same load."""
        settings = self.settings
        whole = fingerprint(
            self.base, settings, settings.timing_steps, [self._fingerprint(m) for m in settings.methods]
        )
        medians: dict[str, dict[str, Any]] = (self.store.read(f"timing/{whole}") or {"methods": {}})["methods"]
        turns: dict[str, list[dict[str, Any]]] = {method: [] for method in settings.methods if method not in medians}
        if turns:
            print(f"Timing {settings.timing_steps} steps of each method, {TURNS} times around.", flush=True)
        for number in range(1, TURNS + 1):
            for method in [*turns]:
                turn = self.pool.call(time_steps, self.build, self.example_of(method), settings.timing_steps)
                if isinstance(turn, Failure):
                    del turns[method]
                    self._note(method, f"not timed: {turn.message}")
                else:
                    turns[method].append(turn)
                    step = median_of([turn])["step_seconds"]
                    print(f"Timed {method}, {number} of {TURNS}: {1000 * step:.1f} ms a step.", flush=True)
        medians |= {method: median_of(of_method) for method, of_method in turns.items()}
        self.store.write(f"timing/{whole}", {"methods": medians})
        return medians

    def run(self, timings: Mapping[str, Mapping[str, Any]]) -> Progress:
        """Do all runs that are missing, and test those that are chosen."""
        results: dict[Run, dict[str, Any]] = {}
        failures: dict[Run, str] = {}
        progress = Progress(self.settings, self.length, self._timed_lengths(timings), results, failures, self.unit)
        while True:
            self._read_finished(progress, results)
            self._forget_weights(progress)
            jobs = [job for job in self._jobs(progress) if job not in self.pool.running]
            for job in jobs[: self.settings.jobs - len(self.pool.running)]:
                self._start(job)
            if not self.pool.running:
                return progress
            (kind, run), result = self.pool.wait()
            if isinstance(result, Failure):
                failures[run] = result.message
                if kind != "test":  # the training need not be repeated
                    self.store.write_failure(self._name(run), result, **asdict(run))
            else:
                results[run] = results.get(run, {}) | result
                self.store.write(self._name(run), asdict(run) | results[run])
            self._say(kind, run, progress)

    def _jobs(self, progress: Progress) -> list[tuple[str, Run]]:
        """Say what can be done now: ``test`` what is chosen; ``run`` with a test; ``try`` a learning rate without."""
        jobs = []
        for run in progress.untested():
            if run not in progress.failures:
                jobs.append(("test" if self._weights(run).exists() else "run", run))
        for run in progress.wanted():
            if run not in progress.results and run not in progress.failures:
                trial = len(self.settings.lrs_of(run.method)) > 1 and run in progress.grid(run.method)
                jobs.append(("try" if trial else "run", run))
        return jobs

    def _start(self, job: tuple[str, Run]) -> None:
        kind, run = job
        function = test_once if kind == "test" else run_once
        weights = None if kind == "run" else self._weights(run)
        self.pool.start(job, self.settings.jobs, function, self.build, self.configuration_of(run), weights)

    def _say(self, kind: str, run: Run, progress: Progress) -> None:
        if run in progress.failures:
            said = f"failed: {progress.failures[run]}"
        elif kind == "test":
            return
        else:
            result = progress.results[run]
            metric = result["validation"].get(self.settings.monitor)
            said = f"{self.settings.monitor} {'is not finite' if metric is None else f'{metric:.4f}'}"
            said += f", {result['seconds']:.1f} s"
        print(f"[{len({*progress.results, *progress.failures})} of {progress.count()}] {run}: {said}", flush=True)

    def _read_finished(self, progress: Progress, results: dict[Run, dict[str, Any]]) -> None:
        before = -1
        while before != len(results):  # what is read may tell of more runs: those with the rate that it chooses
            before = len(results)
            for run in progress.wanted():
                if run not in results and run not in progress.failures:
                    result = self.store.read(self._name(run))
                    if result is not None:
                        results[run] = result

    def _forget_weights(self, progress: Progress) -> None:
        for method in self.settings.methods:
            chosen = progress.chosen(method)
            if chosen is not None and "test" in progress.results[chosen]:
                for run in progress.grid(method):
                    self._weights(run).unlink(missing_ok=True)

    def _weights(self, run: Run) -> Path:
        return self.settings.output / "weights" / f"{self._name(run)}.ckpt"  # a name has dots: no with_suffix

    def _timed_lengths(self, timings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        reference = timings.get(self.settings.methods[0])
        if not self.settings.equal_time or reference is None:
            return {}
        return {
            method: length_in_equal_time(self.settings, self.length, timing["step_seconds"], reference["step_seconds"])
            for method, timing in timings.items()
        }

    def _name(self, run: Run) -> str:
        return run_name(run, self._fingerprint(run.method))

    def _fingerprint(self, method: str) -> str:
        return fingerprint(self.base, self.settings, method, self.settings.options_of(method))


def resume_hint(settings: Settings) -> str:
    """Say how to go on after an interruption.

    Args:
        settings: Of the comparison.
    """
    return (
        f"lightning-bsr: interrupted; what has finished is kept in {settings.output}. "
        f"The same command goes on from there: {' '.join(['lightning-bsr', *sys.argv[1:]])}"
    )
