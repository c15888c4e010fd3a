"""The callback that drops tokens inside a ViT."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.functional import TokenDropHandle, cosine_keep_rate, install_token_drop
from lightning_bsr.functional._drop_forward import Score


class TokenDrop(AttachingCallback):
    """Drop patch tokens inside blocks of the module's ViT, in training and evaluation alike.

    Attached for ``fit``, ``validate``, ``test`` and ``predict``; afterwards, however the run ended, the model is as it
    was before. See :func:`lightning_bsr.functional.install_token_drop` for the details.

    Args:
        blocks: Indices of the blocks that drop; negative ones count from the end.
        keep_rate: The share of patch tokens that is kept, above 0 and at most 1; one, or one a block.
        fuse: Whether the dropped tokens go on as one, their sum weighted by the scores.
        score: ``"cls"``, ``"mean"``, ``"auto"`` (the first where there is a class token, else the second), or
            ``"random"`` (a control).
        detach: Whether gradient is kept from flowing through the weights of the fused token.
        normalize: Whether the weights of the fused token are scaled to sum to 1.
        restore: Whether the last block's output has all tokens again, in their order and without fused ones; a dropped
            token comes back as it was when it was dropped.
        warmup_epochs: Over how many epochs of ``fit`` the keep rate falls from 1 to ``keep_rate``, along a half
            cosine, see :func:`lightning_bsr.functional.cosine_keep_rate`. Validation during these epochs drops as
            training does.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: In the constructor for a negative ``warmup_epochs``; at the start of a run, if there is no
            ViT or the arguments do not fit it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import TokenDrop
        >>> drop = TokenDrop(blocks=[3, 6, 9], keep_rate=0.5)
        >>> trainer = Trainer(callbacks=[drop], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        blocks: Sequence[int],
        keep_rate: float | Sequence[float],
        *,
        fuse: bool = True,
        score: Score = "auto",
        detach: bool = False,
        normalize: bool = False,
        restore: bool = False,
        warmup_epochs: int = 0,
        vit: str | None = None,
    ) -> None:
        super().__init__()
        if warmup_epochs < 0:
            raise ConfigurationError(f"warmup_epochs is {warmup_epochs}, expected 0 or more.")
        self.blocks = blocks
        self.keep_rate = keep_rate
        self.fuse = fuse
        self.score = score
        self.detach = detach
        self.normalize = normalize
        self.restore = restore
        self.warmup_epochs = warmup_epochs
        self.vit = vit

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> TokenDropHandle:
        handle = install_token_drop(
            pl_module,
            self.blocks,
            self.keep_rate,
            fuse=self.fuse,
            score=self.score,
            detach=self.detach,
            normalize=self.normalize,
            restore=self.restore,
            vit=self.vit,
        )
        self._final_rates = handle.keep_rates
        return handle

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warm_up(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not once an epoch: Lightning calls no epoch hook for the epoch that training resumes in.
        self._warm_up(trainer)

    def _warm_up(self, trainer: Trainer) -> None:
        if not self.warmup_epochs:
            return
        assert isinstance(self._handle, TokenDropHandle)
        self._handle.set_keep_rates(
            {
                index: cosine_keep_rate(rate, trainer.current_epoch, self.warmup_epochs)
                for index, rate in self._final_rates.items()
            }
        )


TokenDropCallback = TokenDrop
