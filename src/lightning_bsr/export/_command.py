"""The ``export`` subcommand: the module that ``validate`` would run, with everything attached, written to a file."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import dict_to_namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.callbacks._training_step import load_batches
from lightning_bsr.export._export import Exported, check_path, export_model
from lightning_bsr.export._formats import Format, check_format
from lightning_bsr.export._ties import token_drops
from lightning_bsr.functional import load_delta, read_delta
from lightning_bsr.functional._delta import merge, what_it_computes
from lightning_bsr.functional._delta_file import Delta
from lightning_bsr.vit import find_vit

_MIN_PICTURES = 16
_TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    # Some callbacks refuse to be without a logger.
    "logger": {"class_path": "lightning.pytorch.loggers.logger.DummyLogger", "init_args": {}},
    "limit_val_batches": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "fast_dev_run": False,
    "barebones": False,
    "profiler": None,
}


class ExportCommand(Trainer):
    """A Trainer with the method that LightningCLI turns into ``lightning-bsr export``."""

    def export(
        self,
        model: LightningModule,
        output: str,
        datamodule: LightningDataModule | None = None,
        format: Format | None = None,
        batch_size: int = 1,
        overwrite: bool = False,
        delta: str | None = None,
        vit: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the model with its token drop for inference elsewhere, and check the file on validation pictures.

        Args:
            model: The configured module.
            output: The file to write, .onnx, .pt2 or .pte.
            datamodule: The configured data.
            format: onnx, pt2 or executorch; by default as the file's name ends.
            batch_size: Images that the file takes at a time, always as many.
            overwrite: Whether the output may be replaced.
            delta: A file of DeltaCheckpoint (.safetensors), whose base is the configured model.
            vit: Dotted path of the ViT that is exported where the module has no forward and holds several.
            ckpt_path: A checkpoint of fit.
            weights_only: As validate has it.
        """
        path = Path(output)
        exporter = _Exporter(path, check_format(path, format), batch_size, overwrite, delta, vit)
        callbacks_of(self).append(exporter)
        with warnings.catch_warnings():
            # No checkpoint is written.
            warnings.filterwarnings("ignore", "The dirpath has changed from")
            self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=weights_only)
        if exporter.exported is None:
            raise ConfigurationError("There is no validation data to check the exported model on.")
        if not exporter.drops:
            print("No tokens are dropped; TokenDrop in trainer.callbacks would do so.")
        print(f"Written: {exporter.exported}.")


class _Exporter(Callback):
    """Exports when all callbacks have attached and the weights are there, before the first validation batch."""

    def __init__(
        self, path: Path, format: Format, batch_size: int, overwrite: bool, delta: str | None, vit: str | None
    ) -> None:
        self.path = path
        self.format: Format = format
        self.batch_size = batch_size
        self.overwrite = overwrite
        self.delta = delta
        self.vit = vit
        self.exported: Exported | None = None
        self.drops = False

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False):
            if self.delta is not None and token_drops(pl_module):
                trained = read_delta(self.delta)
                _check_drop(pl_module, trained, self.delta)
                pl_module.load_state_dict(merge(pl_module.state_dict(), trained, f"'{self.delta}'"))
            elif self.delta is not None:
                print(load_delta(pl_module, self.delta))
            self.drops = bool(token_drops(pl_module))
            example, *more = self._pictures(trainer, pl_module)
            has_forward = is_overridden("forward", pl_module)
            module = pl_module if has_forward else find_vit(pl_module, self.vit).model
            self.exported = export_model(module, example, self.path, self.format, check=more, overwrite=self.overwrite)

    def _pictures(self, trainer: Trainer, pl_module: LightningModule) -> list[Tensor]:
        wanted = max(self.batch_size, _MIN_PICTURES)
        found: list[Tensor] = []
        for batch in load_batches(trainer, pl_module, trainer.val_dataloaders):
            images = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 4]
            if not images:
                raise ConfigurationError("The validation batches hold no images [B, C, H, W].")
            found += images[0].clone()
            if len(found) >= wanted:
                break
        if len(found) < self.batch_size:
            raise ConfigurationError(
                f"batch_size is {self.batch_size}, but there are only {len(found)} validation pictures to check on."
            )
        return list(torch.stack(found[: wanted - wanted % self.batch_size]).split(self.batch_size))


def _check_drop(pl_module: LightningModule, delta: Delta, path: str) -> None:
    """Refuse to drop other tokens than training did, which would give another model than was trained."""
    configured = _described(what_it_computes(pl_module)["token_drop"])
    trained = _described(delta.configuration.get("token_drop", ()))
    if configured != trained:
        raise ConfigurationError(
            f"The configuration drops tokens by {configured}, but '{path}' was trained with {trained}; give the same "
            "TokenDrop, or leave it out of trainer.callbacks to drop tokens as in training."
        )


def _described(drops: Sequence[Mapping[str, Any]]) -> str:
    """Say in one line which tokens are dropped; ``detach`` is left out, as it changes gradients alone."""
    each = (
        ", ".join(f"{name}={value!r}" for name, value in sorted(drop.items()) if name != "detach") for drop in drops
    )
    return " and ".join(f"TokenDrop({arguments})" for arguments in each) or "no TokenDrop"


@contextlib.contextmanager
def exporting_configuration(cli: LightningCLI) -> Iterator[None]:
    """Check the options of ``export``; while the context lasts, ``cli`` makes a Trainer on the CPU that writes nothing.

    Args:
        cli: A command line that has parsed its arguments but made nothing yet.

    Raises:
        ConfigurationError: An option is wrong.
    """
    section = cli.config[str(cli.subcommand)]
    path = Path(section["output"])
    check_format(path, section["format"])
    check_path(path, overwrite=section["overwrite"], by="--overwrite true")
    if section["batch_size"] < 1:
        raise ConfigurationError(f"batch_size is {section['batch_size']}, expected 1 or more.")
    if section["delta"] is not None and not Path(section["delta"]).is_file():
        raise ConfigurationError(f"delta is {section['delta']!r}, but there is no such file.")
    section["trainer"].update(dict_to_namespace(_TRAINER))
    cli.save_config_callback = None
    yield
