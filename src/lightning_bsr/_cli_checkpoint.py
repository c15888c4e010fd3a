"""What the command line makes of the file that ``ckpt_path`` names, and what it says of it."""

import pickle
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._delta_file import DELTA_FORMAT

_NAMES = ("last", "hpc")  # not "best": no process knows another's
_FOR_A_DELTA = {
    "fit": "training resumes from the .ckpt that DeltaCheckpoint writes beside it with resumable=true",
    "export": "give the file as --delta",
}
_FULL_WEIGHTS = "make full weights of it with 'lightning-bsr merge' and give those as --model.checkpoint_path"


def check_ckpt_path(path: str, subcommand: str) -> None:
    """Refuse what is no checkpoint, and say what to do with it.

    Args:
        path: The option ``ckpt_path``.
        subcommand: Who was given it.

    Raises:
        ConfigurationError: There is no such file, or it is a safetensors file.
    """
    if path in _NAMES or "://" in path:
        return
    if not Path(path).exists():
        raise ConfigurationError(
            f"ckpt_path is {path!r}, but there is no such file; expected a checkpoint file or one of "
            f"{', '.join(map(repr, _NAMES))}."
        )
    if Path(path).suffix != ".safetensors":
        return
    if _is_delta(path):
        advice = _FOR_A_DELTA.get(subcommand, _FULL_WEIGHTS)
        raise ConfigurationError(
            f"ckpt_path is {path!r}, which holds only what was trained, expected a Lightning checkpoint; {advice}, or "
            "load it in Python with load_delta."
        )
    raise ConfigurationError(
        f"ckpt_path is {path!r}, which holds weights alone, expected a Lightning checkpoint; give the file as "
        "--model.checkpoint_path if the model is a ViTClassifier, or load it in Python with load_state_dict."
    )


def names_model(path: str) -> bool:
    """Whether the file is a checkpoint whose hyperparameters say which class they are of.

    Those of a run of the command line do. A Trainer in a script saves the arguments of some class, which is not named.

    Args:
        path: The option ``ckpt_path``.
    """
    if not Path(path).is_file():
        return False
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:  # more than plain data, which is for the Trainer to refuse or to load
        return False
    return "_class_path" in checkpoint.get("hyper_parameters", {})


class FinishedRun(Callback):
    """Says when ``fit`` trained nothing because the checkpoint is of a run that had ended."""

    def __init__(self) -> None:
        self._trains = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trains = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trains:
            return
        for name, done in (("max_epochs", trainer.current_epoch), ("max_steps", trainer.global_step)):
            limit = getattr(trainer, name)
            if limit is not None and 0 <= limit <= done:
                rank_zero_info(
                    f"Nothing is left to train: {name} is {limit}, and the checkpoint has {done} already; a larger "
                    f"--trainer.{name} goes on."
                )


def _is_delta(path: str) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == DELTA_FORMAT
    except SafetensorError:  # damaged, and no checkpoint either
        return False
