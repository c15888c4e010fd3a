"""The ``plan`` subcommand: its options, its help, and what it does with the step that ``fit`` would run."""

import contextlib
import functools
import json as json_format
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from torch.utils._pytree import tree_leaves

from lightning_bsr._cli_configuration import fit_configuration
from lightning_bsr._errors import ConfigurationError
from lightning_bsr._version import __version__
from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.memory import BudgetPlan, MemoryReport, format_bytes, largest_batch_size, reference_accounting
from lightning_bsr.planning import FitPlanner, FitStep
from lightning_bsr.planning._configuration import left_out, planned_configuration, to_yaml
from lightning_bsr.planning._plots import plot_plan
from lightning_bsr.planning._result import PlanResult, available_memory, needed
from lightning_bsr.planning._settings import PlanSettings


class PlanCommand(Trainer):
    """A Trainer with the method that LightningCLI turns into ``lightning-bsr plan``.

    Attributes:
        cli: The command line that made the Trainer.
    """

    cli: LightningCLI

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        batch_size: int | None = None,
        largest_batch: bool = False,
        memory_budget: int | str | None = None,
        budget_kind: Literal["total", "activations"] = "total",
        probe_batches: int = 4,
        output: str | None = None,
        plot: str | None = None,
        json: str | None = None,
        overwrite: bool = False,
        vit: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Say what a training step would need, whether it fits, and what fits in a budget; nothing is trained.

        Args:
            model: The configured module.
            datamodule: The configured data.
            batch_size: Plan for this many images, instead of the data's batches.
            largest_batch: Find the largest batch that fits in memory_budget, or else in what is available.
            memory_budget: Choose blocks to train, token drops and recomputation that fit in this, such as 512MiB.
            budget_kind: Whether the budget is for all memory (total) or for activations.
            probe_batches: Training batches by which the choice judges what is worth training.
            output: File for a configuration that fit takes, with what was chosen.
            plot: File for a plot, .png or .svg.
            json: File for all figures as JSON; - for standard output.
            overwrite: Whether files that exist may be replaced.
            vit: Dotted path of the ViT, for when the module holds several.
            ckpt_path: Goes to the output; weights do not matter for the plan.
            weights_only: Goes to the output.
        """
        section = self.cli.config[str(self.cli.subcommand)]
        settings = PlanSettings.of(section.as_dict())
        planner = FitPlanner(lambda step: _answer(step, settings))
        callbacks_of(self).append(planner)
        with contextlib.redirect_stdout(sys.stderr) if settings.quiet else contextlib.nullcontext():
            self.fit(model, datamodule=datamodule)
        if planner.result is None:
            raise ConfigurationError("fit would train on no batch; look at trainer.max_epochs, max_steps and limits.")
        result = replace(planner.result, notes=(*planner.result.notes, *self._notes(settings)))
        self._write(result, settings)

    def _notes(self, settings: PlanSettings) -> Iterator[str]:
        configuration = fit_configuration(self.cli)
        trainer = configuration["trainer"]
        if trainer["strategy"] != "auto" or trainer["devices"] not in ("auto", 1, "1") or trainer["num_nodes"] != 1:
            yield "Planned for one device with no strategy of its own; what trainer.strategy adds or spares is not in."
        if settings.chooses and (names := left_out(configuration)):
            yield f"Left out of trainer.callbacks: {', '.join(names)}; what the budget allows is chosen instead."

    def _write(self, result: PlanResult, settings: PlanSettings) -> None:
        written = []
        if settings.output is not None:
            size = result.report.batch_size if settings.largest_batch else settings.batch_size
            callbacks = None if result.choice is None else _callbacks(result.choice, settings.vit)
            configuration, takes_batch_size = planned_configuration(self.cli, callbacks, size)
            if not takes_batch_size:
                name = type(self.cli.datamodule).__name__
                note = f"{name} takes no batch_size; see to batches of {size} yourself."
                result = replace(result, notes=(*result.notes, note))
            header = _header(result, settings.output, self.cli.parser.args)
            Path(settings.output).write_text(to_yaml(configuration, header), encoding="utf-8")
            written.append(settings.output)
        if settings.plot is not None:
            figure = plot_plan(result.report, result.choice)
            figure.savefig(settings.plot, dpi=150)
            written.append(settings.plot)
        if settings.json is not None:
            text = json_format.dumps(result.to_dict(), indent=1)
            if settings.quiet:
                print(text)
                return
            Path(settings.json).write_text(text + "\n", encoding="utf-8")
            written.append(settings.json)
        result.print(Console())
        if written:
            print(f"Written: {', '.join(written)}.")


def _answer(step: FitStep, settings: PlanSettings) -> PlanResult:
    device = step.module.device
    available = available_memory(step.module, device)
    result = PlanResult(
        report=_EMPTY,
        reference=None,
        device=str(device),
        available=available,
        budget=settings.memory_budget,
        budget_kind=settings.budget_kind,
        largest_batch=settings.largest_batch,
    )
    if settings.chooses:
        assert settings.memory_budget is not None
        choice = step.fit_budget(
            step.first_batches(settings.probe_batches),
            settings.memory_budget,
            kind=settings.budget_kind,
            batch_size=settings.batch_size,
            vit=settings.vit,
            on_progress=functools.partial(print, file=sys.stderr, flush=True),
        )
        installed = choice.choice.install(step.module, settings.vit)
        try:
            return _with_reference(replace(result, report=choice.report, choice=choice), step, settings.vit)
        finally:
            installed.remove()
    size = settings.batch_size
    if settings.largest_batch:
        size = _largest(step, settings, available)
    return _with_reference(replace(result, report=step.plan(size, settings.vit)), step, settings.vit)


_EMPTY = MemoryReport(0, 0, 0, 0, ())


def _largest(step: FitStep, settings: PlanSettings, available: int) -> int:
    within = available if settings.memory_budget is None else settings.memory_budget

    print(f"Searching the largest batch within {format_bytes(within)}.", file=sys.stderr, flush=True)

    def plan_at(size: int) -> MemoryReport:
        report = step.plan(size, settings.vit)
        return replace(report, peak=needed(report, settings.budget_kind))

    size = largest_batch_size(plan_at, within)
    if size == 0:
        raise ConfigurationError(
            f"Not even one image fits in {format_bytes(within)}: a step with one needs "
            f"{format_bytes(plan_at(1).peak or 0)}."
        )
    return size


def _with_reference(result: PlanResult, step: FitStep, vit: str | None) -> PlanResult:
    try:
        reference = reference_accounting(
            step.module, image_size=_image_size(step.batch), batch_size=result.report.batch_size or 1, vit=vit
        )
    except ConfigurationError as error:
        return replace(result, notes=(*result.notes, f"The published formula is not evaluated. {error}"))
    return replace(result, reference=reference)


def _image_size(batch: Any) -> tuple[int, int] | None:
    shapes = [leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim == 4]
    return (shapes[0][-2], shapes[0][-1]) if shapes else None


def _callbacks(plan: BudgetPlan, vit: str | None) -> list[dict[str, Any]]:
    return [e if vit is None else {**e, "init_args": {**e["init_args"], "vit": vit}} for e in plan.choice.callbacks()]


def _header(result: PlanResult, output: str, arguments: Sequence[str]) -> list[str]:
    report = result.report
    return [
        f"Written by lightning-bsr {__version__}:",
        f"  {shlex.join(['lightning-bsr', *arguments])}",
        "To train:",
        f"  {shlex.join(['lightning-bsr', 'fit', '--config', output])}",
        f"Planned for a batch of {report.batch_size or 'unknown size'} on {result.device}: peak of the step "
        f"{format_bytes(report.peak or 0)} ({report.peak_moment}),",
        f"activations kept for backward {format_bytes(report.activations)}, gradients "
        f"{format_bytes(report.gradients)}, optimizer state {format_bytes(report.optimizer_state or 0)}.",
        *result.lines(),
    ]
