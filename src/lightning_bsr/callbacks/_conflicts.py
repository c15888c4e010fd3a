"""What else a Trainer may have that does not go together with our callbacks: found, and said, before training."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.vit import ViTView

AVERAGES = (WeightAveraging, StochasticWeightAveraging)
NEW_RUN = (
    "start a new run from its weights, which load_from_checkpoint of the module takes in Python, and "
    "--model.checkpoint_path instead of --ckpt_path on the command line"
)
"""What to do with a checkpoint that training cannot resume from."""


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Give the list of callbacks that ``trainer`` goes by; what is appended to it takes part."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # set by one of the Trainer's connectors


def has_whole_weights(trainer: Trainer) -> bool:
    """Whether each process holds all weights, undivided."""
    return isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))


def refuse_unfreezing(trainer: Trainer, pl_module: LightningModule, view: ViTView, name: str) -> None:
    """Refuse callbacks that unfreeze the ViT later on, against what ``name`` relies on.

    Raises:
        ConfigurationError: If the Trainer has one.
    """
    inside = {id(p) for p in view.model.parameters()}
    for callback in callbacks_of(trainer):
        if isinstance(callback, BackboneFinetuning):
            backbone = getattr(pl_module, "backbone", None)
            unfreezes = isinstance(backbone, torch.nn.Module) and any(id(p) in inside for p in backbone.parameters())
        else:
            # It thaws by a schedule, which by default names every parameter.
            origins = {cls.__module__.split(".")[0] for cls in type(callback).__mro__}
            unfreezes = isinstance(callback, BaseFinetuning) and "finetuning_scheduler" in origins
        if unfreezes:
            raise ConfigurationError(
                f"{type(callback).__name__} freezes the {view.name} and unfreezes it later on, which {name} cannot go "
                "together with; leave one of the two callbacks out."
            )


def refuse_batch_size_search(trainer: Trainer) -> None:
    """Refuse a search for the batch size where a memory budget chooses for the present one.

    Raises:
        ConfigurationError: If the Trainer has one.
    """
    if any(isinstance(callback, BatchSizeFinder) for callback in callbacks_of(trainer)):
        raise ConfigurationError(
            "A memory budget chooses for the present batch size, which BatchSizeFinder would change; leave one of the "
            "two out: lightning-bsr plan finds the largest batch in a budget."
        )


def refuse_stale_average(trainer: Trainer, pl_module: LightningModule, name: str) -> None:
    """Refuse a copy of the module for its average weights that was made before ``name`` added parameters.

    Raises:
        ConfigurationError: If a callback holds one.
    """
    shapes = [p.shape for p in pl_module.parameters()]
    for callback in callbacks_of(trainer):
        average = callback._average_model if isinstance(callback, AVERAGES) else None
        if average is not None and [p.shape for p in average.parameters()] != shapes:
            raise ConfigurationError(
                f"{type(callback).__name__} copied {type(pl_module).__name__} before {name} added its parameters, and "
                f"would not average them; put {name} before it in the list of callbacks, and build the ViT in the "
                "constructor of the module."
            )
