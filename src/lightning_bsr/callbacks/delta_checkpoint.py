"""The callback that saves only what was trained."""

import inspect
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.callbacks._base_left_out import CompletesCheckpoints, leave_out_base
from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.functional._delta import frozen_fingerprints, save_delta, trained_tensors
from lightning_bsr.functional._delta_file import non_finite, replacing


class DeltaCheckpoint(ModelCheckpoint):
    """Save the parameters that train, the buffers, and a hash of the frozen base, instead of the whole model.

    It is Lightning's ``ModelCheckpoint``, with its arguments, that writes delta files: ``monitor``, ``save_top_k``,
    ``filename``, ``every_n_epochs``, ``save_last`` and so on mean what they mean there. A delta file is a safetensors
    file; :func:`lightning_bsr.functional.load_delta` loads it into the base, :func:`~lightning_bsr.functional.
    merge_delta` and ``lightning-bsr merge`` make full weights of the two. Both refuse another base.

    With ``resumable`` each delta file has a Lightning checkpoint of the same name beside it (``.ckpt``), with the state
    of optimizers, loops and callbacks but without the frozen parameters. ``fit``, ``validate``, ``test`` and
    ``predict`` take it as ``ckpt_path`` if this callback is in the Trainer and the module has the base's weights; a
    resumed run equals an uninterrupted one bit for bit. Checkpoints that other callbacks write stay whole.

    Each file replaces the one before it at once, so that a process that is killed leaves no half of one. While a
    trained tensor has NaN or infinite values nothing is saved, and a warning says so.

    Args:
        dirpath: A local folder; as for ``ModelCheckpoint`` by default.
        filename: A pattern, without the ending.
        resumable: Whether to write what training resumes from, too.
        **kwargs: More arguments of ``ModelCheckpoint``.

    Raises:
        ConfigurationError: In the constructor for arguments of ``ModelCheckpoint`` that do not go with a delta. At the
            start of a run if the folder is not local, the strategy is not for one device or DDP, or a callback
            averages weights; and if the base is not the one that a checkpoint was trained with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import BlockSelect
        >>> callbacks = [BlockSelect([3, 7, 11]), DeltaCheckpoint(monitor="val/loss", save_top_k=2)]
        >>> trainer = Trainer(callbacks=callbacks, accelerator="cpu", logger=False)
    """

    FILE_EXTENSION = ".safetensors"

    def __init__(
        self, dirpath: str | Path | None = None, filename: str | None = None, *, resumable: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dirpath, filename, **kwargs)
        if self.save_on_exception:
            raise ConfigurationError(
                "DeltaCheckpoint was given save_on_exception=True, expected False: when training fails, other "
                "callbacks undo first what froze the base; save every few steps with every_n_train_steps instead."
            )
        if self.save_last == "link":
            raise ConfigurationError(
                "DeltaCheckpoint was given save_last='link', expected True or False: a link cannot be replaced at once."
            )
        if resumable and self.save_weights_only:
            raise ConfigurationError(
                "DeltaCheckpoint was given save_weights_only=True and resumable=True, expected one of them at most: "
                "delta files hold weights only, and training resumes from more."
            )
        self.resumable = resumable
        if resumable:
            self.FILE_EXTENSION = ".ckpt"
        self._base: dict[str, str] | None = None
        self._leaving_out = False
        self._completing: CompletesCheckpoints | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._check(trainer)
            self._base = None
        if not isinstance(vars(pl_module).get("on_load_checkpoint"), CompletesCheckpoints):
            self._completing = CompletesCheckpoints(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Callbacks that save come last, so what QuantizeFrozen rounds is rounded by now.
        now = frozen_fingerprints(pl_module)
        # What was trained once is no part of the base any more, even if it is frozen when training resumes.
        self._base = {name: now[name] for name in now if self._base is None or name in self._base}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"base": self._base or {}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._base = state_dict["base"]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._leaving_out:
            leave_out_base(pl_module, self._frozen(pl_module), checkpoint)

    @override
    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._is_finite(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    @override
    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._is_finite(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        path = Path(filepath)
        module = trainer.lightning_module
        if trainer.is_global_zero:
            # First, so that wherever there is a checkpoint there is a delta.
            configuration = {
                "epoch": trainer.current_epoch,
                "global_step": trainer.global_step,
                "callbacks": _described(trainer),
            }
            save_delta(module, delta_path(path), base=self._frozen(module), configuration=configuration)
        if self.resumable:
            self._save_resumable(trainer, path)
        trainer.strategy.barrier("DeltaCheckpoint")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if self.resumable:
            super()._remove_checkpoint(trainer, str(delta_path(filepath)))

    def _save_resumable(self, trainer: Trainer, path: Path) -> None:
        self._leaving_out = True
        try:
            if trainer.is_global_zero:
                with replacing(path) as partial:
                    trainer.save_checkpoint(partial, weights_only=False)
            else:
                trainer.save_checkpoint(path, weights_only=False)  # takes part, and writes nothing
        finally:
            self._leaving_out = False

    def _frozen(self, pl_module: LightningModule) -> dict[str, str]:
        """The fingerprints of what is frozen still."""
        assert self._base is not None
        trains = {name for name, p in pl_module.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: described for name, described in self._base.items() if name not in trains}

    def _is_finite(self, trainer: Trainer) -> bool:
        module = trainer.lightning_module
        name = non_finite(trained_tensors(module, self._frozen(module)))
        if name is not None:
            rank_zero_warn(
                f"DeltaCheckpoint saves nothing at step {trainer.global_step}: {name!r} has NaN or infinite values. "
                "EarlyStopping(check_finite=True) on the training loss stops such a run, Trainer(detect_anomaly=True) "
                "finds the operation; go on from an earlier delta with a lower learning rate."
            )
        return name is None

    def _let_go(self) -> None:
        if self._completing is not None:
            self._completing.remove()
            self._completing = None

    def _check(self, trainer: Trainer) -> None:
        if not _is_local_file_protocol(str(self.dirpath)):
            raise ConfigurationError(
                f"The folder of DeltaCheckpoint is {str(self.dirpath)!r}, expected a local one, where a file can be "
                "replaced at once."
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ConfigurationError(
                f"The strategy of the Trainer is {type(trainer.strategy).__name__}, expected SingleDeviceStrategy or "
                "DDPStrategy: others may divide the weights that DeltaCheckpoint saves."
            )
        io = trainer.strategy.checkpoint_io
        if self.resumable and type(io) is not TorchCheckpointIO:
            raise ConfigurationError(
                f"The Trainer writes checkpoints by {type(io).__name__}, expected TorchCheckpointIO, so that a "
                "resumable DeltaCheckpoint knows when a file is whole."
            )
        for callback in callbacks_of(trainer):
            if isinstance(callback, WeightAveraging):
                raise ConfigurationError(
                    f"{type(callback).__name__} evaluates averaged weights, and DeltaCheckpoint would save those that "
                    "train; leave one of the two callbacks out."
                )


def delta_path(path: str | Path) -> Path:
    """The delta file that belongs to a checkpoint."""
    return Path(path).with_suffix(".safetensors")


def _described(trainer: Trainer) -> list[dict[str, Any]]:
    """Describe this package's callbacks: their arguments, and what they made of them."""
    described = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, AttachingCallback):
            arguments = {name: getattr(callback, name) for name in inspect.signature(type(callback)).parameters}
            described.append({"class": type(callback).__name__, "arguments": arguments, "state": callback.state_dict()})
    return described
