"""The configurations of ``lightning-bsr plan``: the quiet one that it plans with, and the one that it writes."""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import dict_to_namespace
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningCLI

from lightning_bsr._cli_configuration import fit_configuration
from lightning_bsr.callbacks import (
    ActivationCheckpoint,
    ActivationMemoryMonitor,
    BlockSelect,
    LeanActivations,
    QuantizeFrozen,
    TokenDrop,
    TokenDropVisualizer,
)
from lightning_bsr.methods import FineTune
from lightning_bsr.planning._settings import PlanSettings

_WRITES_OR_PRINTS = (Checkpoint, ModelSummary, ProgressBar, ActivationMemoryMonitor, TokenDropVisualizer)
_CHOSEN = (ActivationCheckpoint, BlockSelect, FineTune, LeanActivations, TokenDrop)
_QUIET: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "fast_dev_run": False,
    "barebones": False,  # refuses the logger below
    "profiler": None,
    # What one device needs is what is planned.
    "num_nodes": 1,
    "strategy": "auto",
}


@contextlib.contextmanager
def planning_configuration(cli: LightningCLI) -> Iterator[None]:
    """Check the options of ``plan``; while the context lasts, ``cli`` makes a Trainer that writes nothing.

    Args:
        cli: A command line that has parsed its arguments but made nothing yet.

    Raises:
        ConfigurationError: An option is wrong.
    """
    settings = PlanSettings.of(cli.config[str(cli.subcommand)].as_dict())
    # What is frozen is not known before the choice.
    with (
        quiet_configuration(cli, (*_CHOSEN, QuantizeFrozen) if settings.chooses else ()),
        # Standard output is for the figures alone, whatever the model and the data have to say.
        contextlib.redirect_stdout(sys.stderr) if settings.quiet else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def quiet_configuration(
    cli: LightningCLI, leave_out: tuple[type, ...] = (), *, keep_logger: bool = False
) -> Iterator[None]:
    """While the context lasts, ``cli`` makes a Trainer for one device that prints and writes nothing by itself.

    Args:
        cli: A command line that has parsed its arguments but made nothing yet.
        leave_out: Kinds of callbacks to leave out beside those that write or print.
        keep_logger: Whether a logger that the configuration names stays.
    """
    section = cli.config[str(cli.subcommand)]
    given, save_config_callback = section["trainer"], cli.save_config_callback
    changes: dict[str, Any] = {**_QUIET, "devices": _one_device(given["devices"])}
    if not keep_logger or isinstance(given["logger"], (bool, type(None))):
        # Some callbacks refuse to be without a logger.
        changes["logger"] = {"class_path": "lightning.pytorch.loggers.logger.DummyLogger", "init_args": {}}
    quiet = given.clone()
    quiet.update(dict_to_namespace(changes))
    left = (*_WRITES_OR_PRINTS, *leave_out)
    quiet["callbacks"] = [entry for entry in _listed(given["callbacks"]) if not _is_a(entry, left)]
    section["trainer"], cli.save_config_callback = quiet, None
    try:
        yield
    finally:
        section["trainer"], cli.save_config_callback = given, save_config_callback


def left_out(configuration: Mapping[str, Any]) -> list[str]:
    """Name the callbacks of a ``fit`` configuration that a chosen one replaces.

    Args:
        configuration: As :func:`fit_configuration` gives it.
    """
    entries = _listed(configuration["trainer"]["callbacks"])
    return [str(entry["class_path"]).rpartition(".")[2] for entry in entries if _is_a(entry, _CHOSEN)]


def planned_configuration(
    cli: LightningCLI, callbacks: Sequence[Mapping[str, Any]] | None, batch_size: int | None
) -> tuple[dict[str, Any], bool]:
    """Write the user's configuration with what was planned in it.

    Args:
        cli: The command line.
        callbacks: The chosen callbacks, instead of the user's own of their kind; ``None`` leaves those.
        batch_size: Images; ``None`` leaves the data's.

    Returns:
        What ``fit`` takes, and whether the data take the batch size.
    """
    configuration = fit_configuration(cli)
    section = cli.config[str(cli.subcommand)]
    # They are options of plan too, which fit_configuration leaves out.
    configuration |= {key: section[key] for key in ("ckpt_path", "weights_only") if section[key] is not None}
    if callbacks is not None:
        others = [e for e in _listed(configuration["trainer"]["callbacks"]) if not _is_a(e, _CHOSEN)]
        configuration["trainer"]["callbacks"] = [dict(entry) for entry in callbacks] + others
    takes = True
    if batch_size is not None:
        arguments = configuration["data"].get("init_args", {})
        takes = "batch_size" in arguments
        if takes:
            arguments["batch_size"] = batch_size
    return configuration, takes


def to_yaml(configuration: Mapping[str, Any], header: Sequence[str]) -> str:
    """Write a configuration with lines of comment above it.

    Example:
        >>> print(to_yaml({"data": {"blocks": [1, 2]}}, ["Planned."]), end="")
        # Planned.
        data:
          blocks: [1, 2]
    """
    text = yaml.dump(dict(configuration), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}".rstrip() + "\n" for line in header) + text


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values in one line, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = not any(isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


def _one_device(devices: Any) -> Any:
    if isinstance(devices, list):
        return devices[:1]
    if isinstance(devices, str) and "," in devices:
        return [int(devices.split(",")[0])]
    return 1


def _listed(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _is_a(entry: Mapping[str, Any], classes: tuple[type, ...]) -> bool:
    module, _, name = entry["class_path"].rpartition(".")
    return issubclass(getattr(importlib.import_module(module), name), classes)
