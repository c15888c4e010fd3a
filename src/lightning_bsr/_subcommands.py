"""The subcommands beside LightningCLI's own: each is a method of this Trainer, whose signature gives its options."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from lightning.pytorch.cli import LightningCLI

from lightning_bsr._merge_command import MergeCommand
from lightning_bsr._visualize_command import VisualizeCommand, visualizing_configuration
from lightning_bsr.comparison import CompareCommand
from lightning_bsr.export._command import ExportCommand, exporting_configuration
from lightning_bsr.planning._command import PlanCommand
from lightning_bsr.planning._configuration import planning_configuration

SUBCOMMANDS = {name: {"model", "datamodule"} for name in ("compare", "export", "merge", "plan", "visualize")}
"""Each subcommand with the arguments that are no options, as ``LightningCLI.subcommands`` returns them."""

TRAINS_NOTHING = {"export", "plan", "visualize"}
"""The subcommands to which Lightning's messages on training and hardware say nothing."""


class CommandTrainer(PlanCommand, CompareCommand, ExportCommand, MergeCommand, VisualizeCommand):
    """Options of Lightning's Trainer.

    The help of the command line shows the line above. It makes this Trainer, which can also do what this package's
    subcommands ask for.
    """


def instantiating(cli: LightningCLI) -> contextlib.AbstractContextManager[None]:
    """Give the context in which model, data and Trainer of the subcommand are made.

    Args:
        cli: A command line that has parsed its arguments.
    """
    contexts = {
        "export": exporting_configuration,
        "plan": planning_configuration,
        "visualize": visualizing_configuration,
    }
    context = contexts.get(str(cli.subcommand))
    return contextlib.nullcontext() if context is None else context(cli)


@contextlib.contextmanager
def without_infos() -> Iterator[None]:
    """While the context lasts, Lightning says no more than its warnings, and not how seldom it would log."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
