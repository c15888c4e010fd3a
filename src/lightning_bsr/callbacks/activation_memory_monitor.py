"""The callback that shows how much memory training takes."""

from typing import Any

import psutil
import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._conflicts import has_whole_weights
from lightning_bsr.memory import MIB, ActivationRecorder, MemoryReport
from lightning_bsr.vit import ViTView, find_vit


class ActivationMemoryMonitor(Callback):
    """Log the bytes of activations that backward keeps, and the memory of the device or the process.

    Logged, and shown in the progress bar, at the first training batch and then every ``every_n_steps`` batches:

    - ``memory/activations_mib``: activations that backward keeps for one batch, in MiB (2**20 bytes): unique
      storages, parameters excluded. With several backward passes a batch, those of the largest.
    - ``memory/peak_mib``: on an accelerator, the most memory its tensors held at once since training started.
    - ``memory/rss_mib``: on the CPU, the resident memory of the process now.

    After the first batch a table of the activations by block is printed, if the module holds a ViT that is not compiled
    as a whole. The other batches cost nothing. Strategies that divide weights (FSDP) leave only the memory in use to
    log. Tensors saved inside a region with saved-tensor hooks of its own are not seen.

    Args:
        every_n_steps: How many batches from one measurement to the next.
        vit: Dotted path of the ViT, for when the module holds several.

    Attributes:
        report: The latest measurement, a :class:`lightning_bsr.memory.MemoryReport`; ``None`` before the first.

    Raises:
        ConfigurationError: In the constructor if ``every_n_steps`` is below 1; at the start of training if ``vit``
            does not name a ViT.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import ActivationMemoryMonitor
        >>> trainer = Trainer(callbacks=[ActivationMemoryMonitor()], accelerator="cpu", logger=False)
    """

    def __init__(self, every_n_steps: int = 50, *, vit: str | None = None) -> None:
        if every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps is {every_n_steps}, expected 1 or more.")
        self.every_n_steps = every_n_steps
        self.vit = vit
        self.report: MemoryReport | None = None
        self._recorder: ActivationRecorder | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._view = self._find(pl_module)
        self._counts = has_whole_weights(trainer)
        if not self._counts:
            rank_zero_info(
                f"ActivationMemoryMonitor: {type(trainer.strategy).__name__} divides weights, and what it gathers of "
                "them cannot be told from activations; only the memory in use is logged."
            )
        self._batches = 0
        self.report = None
        device_module = _accelerator_module(pl_module.device)
        if device_module is not None:
            device_module.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._measures = self._batches % self.every_n_steps == 0
        if self._measures and self._counts:
            self._recorder = ActivationRecorder(pl_module, self._view)
            self._recorder.__enter__()
            self._batch_is_new = True
        self._batches += 1

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._recorder is None:
            return
        first = self.report is None
        report = self._recorder.report()
        self._recorder.clear()
        if self.report is None or self._batch_is_new or report.activations > self.report.activations:
            self.report = report
        self._batch_is_new = False
        if first and self._view is not None and trainer.is_global_zero:
            rich.print(self.report.table(f"Activations kept for backward, {self._view.name}"))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._measures:
            return
        self._stop()
        values = _memory_in_use(pl_module.device)
        if self.report is not None:
            values = {"memory/activations_mib": self.report.activations / MIB} | values
        pl_module.log_dict(values, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)
        # Not by log_dict: it would wait for the Trainer's logging interval, and be forgotten if the epoch ends before.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A module that skips a batch skips the rest of its epoch, and no hook ends that batch.
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def _find(self, pl_module: LightningModule) -> ViTView | None:
        try:
            view = find_vit(pl_module, self.vit)
        except ConfigurationError as error:
            if self.vit is not None:
                raise
            rank_zero_info(f"ActivationMemoryMonitor: there will be no table by block. {error}")
            return None
        # A compiled graph saves all its tensors at once, at its end: there is nothing to tell by block.
        return None if "_orig_mod" in view.path.split(".") else view


def _memory_in_use(device: torch.device) -> dict[str, float]:
    device_module = _accelerator_module(device)
    if device_module is not None:
        return {"memory/peak_mib": device_module.max_memory_allocated(device) / MIB}
    return {"memory/rss_mib": psutil.Process().memory_info().rss / MIB}


def _accelerator_module(device: torch.device) -> Any:
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None
