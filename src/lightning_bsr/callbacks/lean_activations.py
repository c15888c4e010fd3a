"""The callback that lets blocks hold less for backward."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.functional import BlockForwardsHandle, HalfPolicies, LeanPolicy, install_lean_activations


class LeanActivations(AttachingCallback):
    """Let the blocks of the module's ViT keep less for backward while training; the outputs are exactly what they were.

    During ``fit`` only. With ``"exact"`` gradients are the same to the last bit, with no matrix product repeated; with
    ``"recompute"`` they are the same and half-blocks are computed again; with ``"int8"`` they are approximate. See
    :func:`lightning_bsr.functional.install_lean_activations` for the details.

    Args:
        policy: ``"exact"``, ``"recompute"`` or ``"int8"`` for all blocks; or by block index, negative ones from the
            end: one for the block, or one for each half, such as ``{-1: {"attn": "exact", "mlp": "recompute"}}``.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: At the start of ``fit``, if there is no ViT, ``policy`` does not fit it, or a block has
            lean activations already or, unless its policy is ``"exact"``, packs its activations or is recomputed by
            another callback.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import LeanActivations
        >>> trainer = Trainer(callbacks=[LeanActivations()], accelerator="cpu", logger=False)
    """

    stages = ("fit",)

    def __init__(
        self, policy: LeanPolicy | Mapping[int, LeanPolicy | HalfPolicies] = "exact", *, vit: str | None = None
    ) -> None:
        super().__init__()
        self.policy = policy
        self.vit = vit

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> BlockForwardsHandle:
        return install_lean_activations(pl_module, self.policy, vit=self.vit)
