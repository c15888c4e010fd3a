"""The callback that lets blocks hold less for backward."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_bsr.callbacks._attach import AttachingCallback, Handle
from lightning_bsr.functional import (
    BlockForwardsHandle,
    HalfPolicies,
    LeanPolicy,
    install_lean_activations,
    install_unread_skip,
)


class LeanActivations(AttachingCallback):
    """Let the blocks of the module's ViT keep less for backward while training; the outputs are exactly what they were.

    During ``fit`` only. With ``"exact"`` gradients are the same to the last bit, with no matrix product repeated; with
    ``"recompute"`` they are the same and half-blocks are computed again; with ``"int8"`` they are approximate. See
    :func:`lightning_bsr.functional.install_lean_activations` for the details.

    Args:
        policy: ``"exact"``, ``"recompute"`` or ``"int8"`` for all blocks; or by block index, negative ones from the
            end: one for the block, or one for each half, such as ``{-1: {"attn": "exact", "mlp": "recompute"}}``.
        skip_unread: Whether the last block's MLP leaves out the patch tokens, which a head on the class token does not
            read; see :func:`lightning_bsr.functional.install_unread_skip`.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: At the start of ``fit``, if there is no ViT, ``policy`` does not fit it, a block has lean
            activations already or, unless its policy is ``"exact"``, packs its activations or is recomputed by
            another callback, or ``skip_unread`` is given for a ViT whose head reads patch tokens.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import LeanActivations
        >>> trainer = Trainer(callbacks=[LeanActivations()], accelerator="cpu", logger=False)
    """

    stages = ("fit",)

    def __init__(
        self,
        policy: LeanPolicy | Mapping[int, LeanPolicy | HalfPolicies] = "exact",
        *,
        skip_unread: bool = False,
        vit: str | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.skip_unread = skip_unread
        self.vit = vit

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> Handle:
        handles = [install_lean_activations(pl_module, self.policy, vit=self.vit)]
        if self.skip_unread:
            try:
                handles.append(install_unread_skip(pl_module, vit=self.vit))
            except BaseException:
                handles[0].remove()
                raise
        return _Handles(handles)


class _Handles:
    """Several handles as one."""

    def __init__(self, handles: list[BlockForwardsHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Undo everything."""
        for handle in reversed(self._handles):
            handle.remove()

    def __str__(self) -> str:
        return "; ".join(map(str, self._handles))
