"""What ``lightning-bsr plan`` was asked for, checked before any work is done."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.memory import parse_bytes

BudgetKind = Literal["total", "activations"]

_PLOT_SUFFIXES = (".png", ".svg")
STDOUT = "-"


@dataclass(frozen=True)
class PlanSettings:
    """The options of the subcommand.

    Attributes:
        batch_size: Images to plan for; those of the data's first batch by default.
        largest_batch: Whether to find the largest batch that fits.
        memory_budget: Bytes, if given.
        budget_kind: What the budget is for.
        probe_batches: Training batches that the choice of a configuration looks at.
        output: File for the configuration.
        plot: File for the plot.
        json: File for the figures, or ``"-"`` for standard output.
        overwrite: Whether files that exist may be replaced.
        vit: Dotted path of the ViT.

    Example:
        >>> PlanSettings.of({"memory_budget": "512MiB"}).chooses
        True
    """

    batch_size: int | None = None
    largest_batch: bool = False
    memory_budget: int | None = None
    budget_kind: BudgetKind = "total"
    probe_batches: int = 4
    output: str | None = None
    plot: str | None = None
    json: str | None = None
    overwrite: bool = False
    vit: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "PlanSettings":
        """Take and check the options as the command line has them.

        Args:
            options: By name; others are left alone.

        Raises:
            ConfigurationError: If an option is wrong, does not go with another, or would overwrite a file.
        """
        known = {name: options[name] for name in cls.__dataclass_fields__ if name in options}
        if (budget := known.get("memory_budget")) is not None:
            known["memory_budget"] = parse_bytes(budget)
        settings = cls(**known)
        settings._check(given_ckpt_path=options.get("ckpt_path"))
        return settings

    @property
    def chooses(self) -> bool:
        """Whether a configuration is to be chosen that fits the budget."""
        return self.memory_budget is not None and not self.largest_batch

    @property
    def quiet(self) -> bool:
        """Whether standard output is for the figures alone."""
        return self.json == STDOUT

    def _check(self, given_ckpt_path: str | None) -> None:
        for name, number in (("batch_size", self.batch_size), ("probe_batches", self.probe_batches)):
            least = 2 if name == "probe_batches" else 1
            if number is not None and number < least:
                raise ConfigurationError(f"{name} is {number}, expected {least} or more.")
        if self.largest_batch and self.batch_size is not None:
            raise ConfigurationError(
                f"batch_size is {self.batch_size} and largest_batch is true, expected one of them."
            )
        if self.budget_kind != "total" and self.memory_budget is None:
            raise ConfigurationError(f"budget_kind is {self.budget_kind!r}, but there is no memory_budget.")
        if self.chooses and given_ckpt_path is not None:
            raise ConfigurationError(
                f"ckpt_path is {given_ckpt_path!r}, expected none with a memory_budget: a checkpoint goes on with the "
                "selection that it was trained with."
            )
        if self.plot is not None:
            if Path(self.plot).suffix.lower() not in _PLOT_SUFFIXES:
                raise ConfigurationError(f"plot is {self.plot!r}, expected a file name that ends in .png or .svg.")
            if importlib.util.find_spec("matplotlib") is None:
                raise ConfigurationError(
                    f"plot is {self.plot!r}, but matplotlib is not installed; pip install 'lightning-bsr[plots]'."
                )
        files = {"output": self.output, "plot": self.plot, "json": None if self.quiet else self.json}
        taken: dict[Path, str] = {}
        for name, file in files.items():
            if file is None:
                continue
            path = Path(file)
            if (other := taken.setdefault(path.resolve(), name)) != name:
                raise ConfigurationError(f"{name} and {other} are both {file!r}, expected two files.")
            if not path.parent.is_dir():
                raise ConfigurationError(f"{name} is {file!r}, but there is no folder {str(path.parent)!r}.")
            if path.is_dir():
                raise ConfigurationError(f"{name} is {file!r}, which is a folder, expected a file.")
            if path.exists() and not self.overwrite:
                raise ConfigurationError(
                    f"{name} is {file!r}, which exists already; with --overwrite true it is replaced."
                )
