"""What ``lightning-bsr plan`` found: as tables, as numbers, and in a few lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from torch import nn

from lightning_bsr.memory import BudgetPlan, MemoryReport, ReferenceReport, format_bytes

_FILE_WIDTH = 120


@dataclass(frozen=True)
class PlanResult:
    """The answer to what was asked.

    Attributes:
        report: The planned step.
        reference: What the published formula counts; ``None`` where it cannot be evaluated.
        device: Where the step would run, such as ``"cpu"``.
        available: Bytes that it could use there.
        budget: Bytes, if given.
        budget_kind: What the budget is for.
        choice: What was chosen for the budget, if that was asked.
        largest_batch: Whether the batch is the largest that fits.
        notes: What the reader should know beside the report's own notes.
    """

    report: MemoryReport
    reference: ReferenceReport | None
    device: str
    available: int
    budget: int | None = None
    budget_kind: Literal["total", "activations"] = "total"
    choice: BudgetPlan | None = None
    largest_batch: bool = False
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the planned peak is no more than what is available."""
        return needed(self.report, "total") <= self.available

    def verdict(self) -> str:
        """Say in a line whether the step fits on this machine.

        Example:
            >>> PlanResult(MemoryReport(0, 0, 0, 0, (), peak=3 * 2**20), None, "cpu", 2**30).verdict()
            'Fits: needs 3.0 MiB of 1.0 GiB available on cpu.'
        """
        what = f"{format_bytes(needed(self.report, 'total'))} of {format_bytes(self.available)} available"
        return f"{'Fits' if self.fits else 'Does not fit'}: needs {what} on {self.device}."

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, ready for JSON."""
        return {
            "device": self.device,
            "available": self.available,
            "fits": self.fits,
            "batch_size": self.report.batch_size,
            "largest_batch": self.largest_batch,
            "report": self.report.to_dict(),
            "reference": self.reference and self.reference.to_dict(),
            "memory_budget": self.budget,
            "budget_kind": self.budget_kind if self.budget is not None else None,
            "budget_plan": self.choice and self.choice.to_dict(),
            "notes": list(self.notes),
        }

    def print(self, console: Console) -> None:
        """Print tables, notes and the verdict."""
        if self.choice is not None:
            _print(console, self.choice.table())
        _print(console, self._blocks_table())
        _print(console, self._totals_table())
        for line in self.lines():
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    def lines(self) -> Iterator[str]:
        """Yield what is said below the tables: notes, the answer to the question asked, and the verdict."""
        yield from (f"Note: {note}" for note in (*self.report.notes, *self.notes))
        if self.largest_batch:
            of_activations = " of activations" if self.budget_kind == "activations" else ""
            within = "what is available" if self.budget is None else f"{format_bytes(self.budget)}{of_activations}"
            yield f"The largest batch within {within} has {self.report.batch_size:,} images."
        if self.choice is not None and self.budget is not None:
            what = "peak of the step" if self.budget_kind == "total" else "activations"
            used = format_bytes(needed(self.report, self.budget_kind))
            full = format_bytes(needed(self.choice.full, self.budget_kind))
            yield f"Chosen for {what} within {format_bytes(self.budget)}: {self.choice.choice}."
            yield f"It needs {used}; full fine-tuning needs {full}."
        yield self.verdict()

    def _blocks_table(self) -> Table:
        table = self.report.table(f"Activations kept for backward, batch of {self.report.batch_size or 'unknown size'}")
        table.caption = None  # the totals have a table of their own
        return table

    def _totals_table(self) -> Table:
        table = Table(title="Memory and compute of one step")
        table.add_column("")
        table.add_column("batch", justify="right")
        table.add_column("an image", justify="right")
        table.add_column("", overflow="fold")
        for label, batch, image, remark in self._totals():
            table.add_row(label, batch, image, remark)
        return table

    def _totals(self) -> Iterator[tuple[str, str, str, str]]:
        report, images = self.report, self.report.batch_size
        for kind, num_bytes in sorted(report.parameter_dtypes.items(), reverse=True):
            yield f"parameters, {kind}", format_bytes(num_bytes), "", ""
        yield "gradients", format_bytes(report.gradients), "", ""
        if report.optimizer_state is not None:
            yield "optimizer state", format_bytes(report.optimizer_state), "", ""
        each = format_bytes(report.activations / images) if images else ""
        yield "activations kept for backward", format_bytes(report.activations), each, ""
        if report.activations_peak is not None and report.activations_peak > report.activations:
            yield "with what is computed again", format_bytes(report.activations_peak), "", "at most at one moment"
        if report.weight_copies:
            yield "copies of weights", format_bytes(report.weight_copies), "", "by autocast"
        if report.temporaries is not None:
            yield "temporaries", format_bytes(report.temporaries), "", "at the peak"
        if report.peak is not None:
            yield "peak of the step", format_bytes(report.peak), "", report.peak_moment
        if report.flops:
            for name, flops in report.flops._asdict().items():
                yield f"compute, {name}", _flops(flops), _flops(flops / images) if images else "", ""
        yield "attention kernels", "", "", ", ".join(report.attention_kernels) or "none known by name"
        if self.reference is not None:
            of_batch = self.reference.total - self.reference.parameters
            yield "published formula: parameters", format_bytes(self.reference.parameters), "", "arXiv 2405.10951"
            activations = format_bytes(of_batch), format_bytes(self.reference.activations)
            yield "published formula: activations", *activations, ""
            yield (
                "published formula: total",
                format_bytes(self.reference.total),
                "",
                "without gradients, optimizer, temporaries",
            )


def needed(report: MemoryReport, kind: Literal["total", "activations"]) -> int:
    """Give the bytes of a step that a budget of this kind is for."""
    return (report.peak or 0) if kind == "total" else max(report.activations, report.activations_peak or 0)


def available_memory(module: nn.Module, device: torch.device) -> int:
    """Give the bytes that a step could use on ``device``, with those that ``module`` holds there already.

    Args:
        module: The module to train, on ``device``: a report's peak counts its parameters.
        device: Where it would train.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return psutil.virtual_memory().available + held


def _flops(count: float) -> str:
    unit, size = next((unit, size) for unit, size in (("T", 1e12), ("G", 1e9), ("M", 0)) if count >= size)
    return f"{count / (size or 1e6):.2f} {unit}FLOP"


def _print(console: Console, table: Table) -> None:
    natural = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if not console.is_terminal:
        # A file or a pipe has no width that a table would have to keep to, but readers have.
        console = Console(file=console.file, width=min(natural, _FILE_WIDTH))
    elif natural > console.width:
        table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, 0
        for column in table.columns:
            column.header = str(column.header).replace(" ", "\n")
    console.print(table)
