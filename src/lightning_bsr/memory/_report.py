"""What a training step costs, as numbers and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from rich.table import Table

MIB = 2**20
"""Bytes in a MiB."""


class Flops(NamedTuple):
    """Floating-point operations; a multiply-add counts as two.

    Attributes:
        forward: Of the forward pass and the loss.
        backward: Of the backward pass, with what it computes again.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class BlockReport:
    """One line of a report: a block of the ViT, or what comes before or after the blocks.

    Attributes:
        name: ``"embed"``, the block's index, or ``"head"``. Parameters outside the ViT count to the head; activations
            to the embedding until the first block runs, and to the head after the last.
        tokens: Tokens that leave the block; ``None`` where there are none to count.
        parameters: Number of parameters.
        trained: Number of parameters that train.
        activations: Bytes that backward keeps.
        attn: The part of ``activations`` that the attention half of the block keeps, with its residual and its drop.
        mlp: The part that the MLP half keeps.
        flops: Operations, where they were counted.
    """

    name: str
    tokens: int | None
    parameters: int
    trained: int
    activations: int
    attn: int = 0
    mlp: int = 0
    flops: Flops | None = None


@dataclass(frozen=True)
class MemoryReport:
    """The memory of one training step. Figures are bytes of the whole batch.

    Attributes:
        activations: Bytes that backward keeps once the forward pass is over: unique storages, parameters and buffers
            excluded.
        weight_copies: Bytes of low-precision copies of weights that autocast makes and backward keeps; they do not
            grow with the batch and are not part of ``activations``.
        parameters: Bytes of all parameters.
        gradients: Bytes of the gradients of the parameters that train.
        by_block: One line a block.
        flops: Operations of the step, where they were counted.
        activations_peak: The most bytes kept for backward at one moment; more than ``activations`` only where
            checkpointed blocks are computed again.
        optimizer_state: Bytes of the optimizer's state; ``None`` where no optimizer was given.
        peak: The most bytes alive at one moment of the step, everything included; ``None`` where it was not followed.
        peak_parts: What is alive at that moment, by what it is for: ``"parameters"``, ``"buffers"``, ``"inputs"``,
            ``"gradients"``, ``"optimizer_state"``, ``"activations"``, ``"weight_copies"``, ``"temporaries"``.
        peak_moment: When that is, such as ``"backward, block 3"``.
        parameter_dtypes: Bytes of the parameters by ``"trained float32"``, ``"frozen int8"`` and the like.
        batch_size: Images in the batch; ``None`` where unknown.
        attention_kernels: Names of the attention kernels that ran.
        notes: What the reader should know about these figures.

    Example:
        >>> report = MemoryReport(3 * MIB, 0, MIB, MIB, (BlockReport("0", 65, 262_144, 262_144, 3 * MIB),))
        >>> report.to_dict()["activations"]
        3145728
    """

    activations: int
    weight_copies: int
    parameters: int
    gradients: int
    by_block: tuple[BlockReport, ...]
    flops: Flops | None = None
    activations_peak: int | None = None
    optimizer_state: int | None = None
    peak: int | None = None
    peak_parts: Mapping[str, int] = field(default_factory=dict)
    peak_moment: str = ""
    parameter_dtypes: Mapping[str, int] = field(default_factory=dict)
    batch_size: int | None = None
    attention_kernels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def temporaries(self) -> int | None:
        """Bytes alive at the peak that are neither kept for backward nor there for longer than the step's work."""
        return None if self.peak is None else self.peak_parts.get("temporaries", 0)

    def with_notes(self, notes: Sequence[str]) -> "MemoryReport":
        """Return the report with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def table(self, title: str = "Activations kept for backward") -> Table:
        """Draw the report as a rich table; print it with ``rich.print``."""
        table = Table(title=title, caption=self._caption())
        table.add_column("block")
        columns = ["tokens out", "parameters", "trained", "activations (MiB)"]
        if self.flops:
            columns += ["attention", "MLP", "GFLOP forward", "backward"]
        for column in columns:
            table.add_column(column, justify="right")
        for line in self.by_block:
            table.add_row(
                line.name,
                "-" if line.tokens is None else str(line.tokens),
                f"{line.parameters:,}",
                f"{line.trained:,}" if line.trained else "frozen" if line.parameters else "-",
                _mib(line.activations),
                *((_mib(line.attn), _mib(line.mlp)) if self.flops else ()),
                *((f"{count / 1e9:.2f}" for count in line.flops) if line.flops else ()),
            )
        table.add_section()
        table.add_row(
            "total",
            "",
            f"{sum(line.parameters for line in self.by_block):,}",
            f"{sum(line.trained for line in self.by_block):,}",
            _mib(self.activations),
            *(
                (_mib(sum(x.attn for x in self.by_block)), _mib(sum(x.mlp for x in self.by_block)))
                if self.flops
                else ()
            ),
            *((f"{count / 1e9:.2f}" for count in self.flops) if self.flops else ()),
        )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain numbers, ready for JSON."""
        lines = [asdict(line) | {"flops": line.flops and line.flops._asdict()} for line in self.by_block]
        return asdict(self) | {
            "flops": self.flops and self.flops._asdict(),
            "temporaries": self.temporaries,
            "by_block": lines,
        }

    def _caption(self) -> str:
        parts = [f"parameters {self.parameters / MIB:.1f} MiB", f"gradients {self.gradients / MIB:.1f} MiB"]
        if self.optimizer_state is not None:
            parts.append(f"optimizer state {self.optimizer_state / MIB:.1f} MiB")
        if self.weight_copies:
            parts.append(f"autocast's copies of weights {self.weight_copies / MIB:.1f} MiB")
        if self.activations_peak is not None and self.activations_peak > self.activations:
            parts.append(f"activations with what is computed again {self.activations_peak / MIB:.1f} MiB")
        text = ", ".join(parts)
        if self.peak is not None:
            text += f"\npeak of the step {self.peak / MIB:.1f} MiB ({self.peak_moment})"
        return "\n".join([text, *self.notes])


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.2f}"
