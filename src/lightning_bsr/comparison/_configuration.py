"""Turns the user's configuration into that of each run."""

import copy
import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from lightning_bsr._errors import ConfigurationError
from lightning_bsr._version import __version__
from lightning_bsr.comparison._methods import callback_entry
from lightning_bsr.comparison._schedule import Unit
from lightning_bsr.comparison._settings import Settings

_NO_LOGGER = {"class_path": "lightning.pytorch.loggers.logger.DummyLogger"}  # some callbacks refuse to be without one


def base_configuration(configuration: Mapping[str, Any], settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Take from a ``fit`` configuration what all runs share.

    Args:
        configuration: ``seed_everything``, ``trainer``, ``model``, ``data``, ... as LightningCLI dumps them.
        settings: What the comparison was asked for.

    Returns:
        The shared configuration, and the names of the callbacks that were left out: this package's, because every
        method brings its own, and those that print or save.

    Raises:
        ConfigurationError: The configuration does not say how long to train, takes several devices, or lacks
            ``settings.lr_key``.
    """
    base = copy.deepcopy({key: value for key, value in configuration.items() if key not in ("config", "ckpt_path")})
    trainer = base["trainer"]
    _check_trainer(trainer)
    _parent_of(base, settings.lr_key)

    callbacks = trainer.get("callbacks") or []
    kept, left_out = [], []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        cls = _import(callback["class_path"])
        ours = any(base_class.__module__.split(".")[0] == "lightning_bsr" for base_class in cls.__mro__)
        if ours or issubclass(cls, (Checkpoint, ProgressBar)):
            left_out.append(cls.__name__)
        else:
            kept.append(callback)
    trainer.update(
        callbacks=kept,
        devices=1,
        logger=_NO_LOGGER,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    return base, left_out


def configuration_of(
    base: Mapping[str, Any], settings: Settings, method: str, lr: float, seed: int, length: int
) -> dict[str, Any]:
    """Write the configuration of one run.

    Args:
        base: What :func:`base_configuration` returned.
        settings: What the comparison was asked for.
        method: The method to run.
        lr: Its learning rate, put at ``settings.lr_key``.
        seed: Seed of weights and order.
        length: Epochs or steps of training, as the configuration counts.
    """
    configuration = copy.deepcopy(dict(base))
    configuration["seed_everything"] = seed
    configuration["trainer"][f"max_{length_of(base['trainer'])[1]}"] = length
    configuration["trainer"]["callbacks"].append(callback_entry(method, settings.options_of(method), settings.vit))
    parent, name = _parent_of(configuration, settings.lr_key)
    parent[name] = lr
    return configuration


def fingerprint(base: Mapping[str, Any], settings: Settings, *more: object) -> str:
    """Hash what decides a result apart from the seed, the learning rate and the length of training.

    Args:
        base: What :func:`base_configuration` returned.
        settings: What the comparison was asked for.
        *more: What else decides it.
    """
    rest = copy.deepcopy(dict(base))
    rest.pop("seed_everything", None)
    rest["trainer"].pop(f"max_{length_of(rest['trainer'])[1]}")
    parent, name = _parent_of(rest, settings.lr_key)
    del parent[name]
    decides = [rest, settings.lr_key, settings.vit, __version__, torch.__version__, *more]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:12]


def length_of(trainer: Mapping[str, Any]) -> tuple[int, Unit]:
    """Say how long each run trains.

    Args:
        trainer: The section of the configuration.

    Raises:
        ConfigurationError: It has neither ``max_epochs`` nor ``max_steps``, or both.

    Example:
        >>> length_of({"max_epochs": None, "max_steps": 20000})
        (20000, 'steps')
    """
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if steps == -1:
        if not isinstance(epochs, int) or epochs < 1:
            raise ConfigurationError(
                f"trainer.max_epochs is {epochs}, expected 1 or more, or trainer.max_steps instead: all methods train "
                "that long."
            )
        return epochs, "epochs"
    if epochs not in (None, -1):
        raise ConfigurationError(
            f"trainer.max_epochs is {epochs} and trainer.max_steps is {steps}, expected one of them: all methods train "
            "that long."
        )
    if not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"trainer.max_steps is {steps}, expected 1 or more: all methods train that long.")
    return steps, "steps"


def configured_lr(configuration: Mapping[str, Any], lr_key: str) -> Any:
    """Return the learning rate of a configuration.

    Args:
        configuration: A ``fit`` configuration.
        lr_key: The key of the learning rate.

    Raises:
        ConfigurationError: It has no such key.
    """
    parent, name = _parent_of(configuration, lr_key)
    return parent[name]


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    length_of(trainer)
    if trainer.get("fast_dev_run"):
        raise ConfigurationError(
            "trainer.fast_dev_run is set, expected false; for a short comparison set trainer.limit_train_batches."
        )
    devices = trainer.get("devices", "auto")
    one = devices in ("auto", 1, "1") or (isinstance(devices, list) and len(devices) == 1)
    if not one or trainer.get("num_nodes", 1) != 1:
        raise ConfigurationError(
            f"trainer.devices is {devices!r} and trainer.num_nodes is {trainer.get('num_nodes', 1)}, expected one "
            "device: compare gives each run a process of its own."
        )


def _parent_of(configuration: Mapping[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Find the mapping that holds the last name of a dotted key."""
    *path, name = key.split(".")
    parent: Any = configuration
    for part in path:
        parent = parent.get(part) if isinstance(parent, dict) else None
    if not isinstance(parent, dict) or name not in parent:
        found = sorted(_keys_named(configuration, name))
        hint = f"the configuration has {', '.join(found)}" if found else f"no key of it is called {name}"
        raise ConfigurationError(f"lr_key is {key!r}, expected a key of the configuration; {hint}.")
    return parent, name


def _keys_named(configuration: Any, name: str, prefix: str = "") -> list[str]:
    if not isinstance(configuration, dict):
        return []
    here = [f"{prefix}{name}"] if name in configuration else []
    return here + [
        found for key, value in configuration.items() for found in _keys_named(value, name, f"{prefix}{key}.")
    ]


def _import(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    cls: type = getattr(importlib.import_module(module), name)
    return cls
