"""The callback that recomputes blocks in the backward pass instead of keeping their activations."""

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.functional import BlockForwardsHandle, install_checkpointing
from lightning_bsr.functional._installed import BlockChoice


class ActivationCheckpoint(AttachingCallback):
    """Keep only the inputs of blocks of the module's ViT while training; backward computes the rest again.

    During ``fit`` only. Gradients are exactly what they were; the blocks' forward pass runs twice. See
    :func:`lightning_bsr.functional.install_checkpointing` for the details.

    Args:
        blocks: ``"all"``, or indices of the blocks; negative ones count from the end.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: At the start of ``fit``, if there is no ViT, ``blocks`` does not fit it, or a block is
            recomputed already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import ActivationCheckpoint
        >>> trainer = Trainer(callbacks=[ActivationCheckpoint(blocks=[0, 1, 2])], accelerator="cpu", logger=False)
    """

    stages = ("fit",)

    def __init__(self, blocks: BlockChoice = "all", *, vit: str | None = None) -> None:
        super().__init__()
        self.blocks = blocks
        self.vit = vit

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> BlockForwardsHandle:
        return install_checkpointing(pl_module, self.blocks, vit=self.vit)
