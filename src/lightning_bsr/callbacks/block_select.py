"""The callback that trains some blocks of a ViT and freezes the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.functional import BlockSelection, select_blocks_


class BlockSelect(AttachingCallback):
    """Train some blocks of the module's ViT, its last norm and its head; freeze the rest of the ViT.

    During ``fit`` only: afterwards, however it ended, every parameter and module is as it was before. Parameters
    outside the ViT are not touched. Frozen blocks, and other parts of the ViT that have parameters but train none, are
    in eval mode while training, so that their dropout, stochastic depth and batch statistics rest. See
    :func:`lightning_bsr.functional.select_blocks_` for the details.

    A checkpoint remembers the selection; resuming from it with another one is refused, because the optimizer's state
    would not fit.

    Args:
        blocks: Block indices (negative ones count from the end); or a number of blocks, evenly spaced and ending
            with the last; or a mapping from block index to the parts that train: ``"attn"``, ``"mlp"``, a list of
            them, or ``"all"``.
        head: Whether the ViT's classifiers and attention pooling train.
        norm: Whether the norms after the blocks train.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: At the start of ``fit``, if there is no ViT, ``blocks`` does not fit it, nothing is left
            to train, another ``BlockSelect`` holds the ViT, or the checkpoint that training resumes from was made with
            another selection.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import BlockSelect
        >>> trainer = Trainer(callbacks=[BlockSelect(blocks=[3, 7, 11])], accelerator="cpu", logger=False)
    """

    stages = ("fit",)

    def __init__(
        self,
        blocks: int | Sequence[int] | Mapping[int, str | Sequence[str]],
        *,
        head: bool = True,
        norm: bool = True,
        vit: str | None = None,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.head = head
        self.norm = norm
        self.vit = vit
        self._selected: dict[str, Any] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(vit=self.vit)

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> BlockSelection:
        selection = select_blocks_(pl_module, self.blocks, head=self.head, norm=self.norm, vit=self.vit)
        if not any(p.requires_grad for p in pl_module.parameters()):
            selection.remove()
            raise ConfigurationError(
                f"BlockSelect(blocks={self.blocks}, head={self.head}, norm={self.norm}) leaves nothing to train in "
                f"{type(pl_module).__name__}; select a block, the head or the norm."
            )
        parts = {index: list(parts) for index, parts in selection.parts.items()}
        self._selected = {"blocks": parts, "head": self.head, "norm": self.norm}
        return selection

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not when attaching: Lightning warns of modules in eval mode when training starts. And each time: a module may
        # call train() itself after a validation.
        assert isinstance(self._handle, BlockSelection)
        self._handle.eval_frozen()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._selected

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Nothing is attached when a checkpoint is loaded only to evaluate.
        if self._handle is not None and state_dict != self._selected:
            raise ConfigurationError(
                f"The checkpoint was trained with BlockSelect({_describe(state_dict)}), which differs from the "
                f"present BlockSelect({_describe(self._selected)}), so the optimizer's state does not fit; resume "
                "with the same selection, or load only the weights."
            )


BlockSelectCallback = BlockSelect


def _describe(selected: dict[str, Any]) -> str:
    return f"blocks={selected.get('blocks')}, head={selected.get('head')}, norm={selected.get('norm')}"
