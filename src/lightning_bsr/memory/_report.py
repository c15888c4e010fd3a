"""What a training step costs, as numbers and as a table."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.table import Table

MIB = 2**20
"""Bytes in a MiB."""


class Flops(NamedTuple):
    """Floating-point operations; a multiply-add counts as two.

    Attributes:
        forward: Of the forward pass and the loss.
        backward: Of the backward pass.
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
    """

    name: str
    tokens: int | None
    parameters: int
    trained: int
    activations: int


@dataclass(frozen=True)
class MemoryReport:
    """The memory of one training step.

    Attributes:
        activations: Bytes that backward keeps: unique storages, parameters and buffers excluded.
        weight_copies: Bytes of low-precision copies of weights that autocast makes and backward keeps; they do not
            grow with the batch and are not part of ``activations``.
        parameters: Bytes of all parameters.
        gradients: Bytes of the gradients of the parameters that train.
        by_block: One line a block.
        flops: Operations of the step, where they were counted.

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

    def table(self, title: str = "Activations kept for backward") -> Table:
        """Draw the report as a rich table; print it with ``rich.print``."""
        table = Table(title=title, caption=self._caption())
        table.add_column("block")
        for column in ("tokens out", "parameters", "trained", "activations (MiB)"):
            table.add_column(column, justify="right")
        for line in self.by_block:
            table.add_row(
                line.name,
                "-" if line.tokens is None else str(line.tokens),
                f"{line.parameters:,}",
                f"{line.trained:,}" if line.trained else "frozen" if line.parameters else "-",
                f"{line.activations / MIB:.2f}",
            )
        table.add_section()
        table.add_row(
            "total",
            "",
            f"{sum(line.parameters for line in self.by_block):,}",
            f"{sum(line.trained for line in self.by_block):,}",
            f"{self.activations / MIB:.2f}",
        )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain numbers, ready for JSON."""
        return asdict(self) | {"flops": self.flops._asdict() if self.flops else None}

    def _caption(self) -> str:
        caption = f"parameters {self.parameters / MIB:.1f} MiB, gradients {self.gradients / MIB:.1f} MiB"
        if self.weight_copies:
            caption += f", autocast's copies of weights {self.weight_copies / MIB:.1f} MiB"
        return caption
