"""The callback that holds frozen weights of a ViT as 8-bit integers."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.callbacks._conflicts import AVERAGES, callbacks_of, has_whole_weights, refuse_unfreezing
from lightning_bsr.functional._quantize import QuantizedHandle, quantize_frozen_
from lightning_bsr.vit import find_vit


class QuantizeFrozen(AttachingCallback):
    """Hold the frozen weights of linear layers in the blocks of the module's ViT as 8-bit integers while training.

    During ``fit`` only. ``BlockSelect`` or another callback says what is frozen; the order in the list of callbacks is
    free. The original weights are lost: checkpoints, and the module after ``fit``, have floats again, but the rounded
    ones that the rest was trained with. Checkpoints have the keys and types that they always have, and ordinary ones
    load. See :func:`lightning_bsr.functional.quantize_frozen_` for the details.

    Args:
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: At the start of ``fit``, if there is no ViT, no linear layer in its blocks is frozen, a
            weight cannot be quantised, the strategy is not for one device or DDP, or a callback averages weights or
            unfreezes the ViT.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import BlockSelect, QuantizeFrozen
        >>> trainer = Trainer(callbacks=[BlockSelect([3, 7, 11]), QuantizeFrozen()], accelerator="cpu", logger=False)
    """

    # Not when it is set up: until the fit starts, others choose what is frozen and read the checkpoint to resume from.
    stages = ()
    late = True

    def __init__(self, *, vit: str | None = None) -> None:
        super().__init__()
        self.vit = vit

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handle = self.attach(trainer, pl_module)
        rank_zero_info(f"{type(self).__name__}: {self._handle}.")

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> QuantizedHandle:
        if not has_whole_weights(trainer):
            raise ConfigurationError(
                f"The strategy of the Trainer is {type(trainer.strategy).__name__}, expected SingleDeviceStrategy or "
                "DDPStrategy: others may divide the weights that QuantizeFrozen rounds."
            )
        for callback in callbacks_of(trainer):
            if isinstance(callback, AVERAGES):
                raise ConfigurationError(
                    f"{type(callback).__name__} would average the 8-bit codes of QuantizeFrozen as if they were "
                    "weights; leave one of the two callbacks out."
                )
        refuse_unfreezing(trainer, pl_module, find_vit(pl_module, self.vit), "QuantizeFrozen")
        return quantize_frozen_(pl_module, vit=self.vit)
