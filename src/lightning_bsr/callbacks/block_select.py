"""The callback that trains some blocks of a ViT and freezes the rest."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import FreezingCallback, Handle
from lightning_bsr.callbacks._auto import AutoConfiguration
from lightning_bsr.callbacks._conflicts import NEW_RUN, refuse_unfreezing
from lightning_bsr.functional import select_blocks_
from lightning_bsr.memory import BudgetKind, BudgetPlan, Configuration, parse_bytes
from lightning_bsr.vit import find_vit


class BlockSelect(FreezingCallback):
    """Train some blocks of the module's ViT, its last norm and its head; freeze the rest of the ViT.

    During ``fit`` only: afterwards, however it ended, every parameter and module is as it was before. Parameters
    outside the ViT are not touched. Frozen blocks, and other parts of the ViT that have parameters but train none, are
    in eval mode while training, so that their dropout, stochastic depth and batch statistics rest. See
    :func:`lightning_bsr.functional.select_blocks_` for the details.

    A checkpoint remembers the selection; resuming from it with another one is refused, because the optimizer's state
    would not fit.

    With ``blocks="auto"`` a memory budget chooses, by the first training batches: the blocks, where tokens are dropped
    (if no ``TokenDrop`` does so already; it must come before in the list of callbacks) and the half-blocks that are
    computed again in backward, the others being lean exactly, as by ``LeanActivations``; see
    :func:`lightning_bsr.memory.fit_budget`. What was chosen is said and kept in checkpoints: a resumed run goes on with
    it, and evaluation drops tokens as training did.

    Args:
        blocks: Block indices (negative ones count from the end); or a number of blocks, evenly spaced and ending
            with the last; or a mapping from block index to the parts that train: ``"attn"``, ``"mlp"``, a list of
            them, or ``"all"``; or ``"auto"``.
        head: Whether the ViT's classifiers and attention pooling train.
        norm: Whether the norms after the blocks train.
        memory_budget: For ``"auto"``: bytes, or a number and a unit such as ``"512MiB"``.
        budget_kind: What the budget bounds: ``"total"``, the peak of the whole training step; or ``"activations"``,
            the bytes that backward keeps.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: In the constructor if ``memory_budget`` is missing, is no number of bytes, or is given
            without ``"auto"``. At the start of ``fit``, if there is no ViT, ``blocks`` does not fit it, nothing is left
            to train, another ``BlockSelect`` holds the ViT or another callback unfreezes it, or the checkpoint that
            training resumes from was made with another selection.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import BlockSelect
        >>> trainer = Trainer(callbacks=[BlockSelect(blocks=[3, 7, 11])], accelerator="cpu", logger=False)
    """

    stages: tuple[str, ...] = ("fit",)

    def __init__(
        self,
        blocks: int | Sequence[int] | Mapping[int, str | Sequence[str]] | Literal["auto"],
        *,
        head: bool = True,
        norm: bool = True,
        memory_budget: int | str | None = None,
        budget_kind: BudgetKind = "total",
        vit: str | None = None,
    ) -> None:
        super().__init__()
        if (blocks == "auto") != (memory_budget is not None):
            raise ConfigurationError(
                f"BlockSelect was given blocks={blocks!r} and memory_budget={memory_budget!r}, expected a "
                "memory_budget with blocks='auto', and only then."
            )
        if blocks == "auto":
            parse_bytes(memory_budget or 0)
            if budget_kind not in get_args(BudgetKind):
                kinds = ", ".join(map(repr, get_args(BudgetKind)))
                raise ConfigurationError(f"budget_kind is {budget_kind!r}, expected one of {kinds}.")
            if not (head and norm):
                raise ConfigurationError(
                    f"BlockSelect was given blocks='auto' with head={head} and norm={norm}, expected both to be true: "
                    "a budget always trains them."
                )
            self.stages = ("fit", "validate", "test", "predict")
        self.memory_budget = memory_budget
        self.budget_kind = budget_kind
        self._auto = AutoConfiguration()
        self.blocks = blocks
        self.head = head
        self.norm = norm
        self.vit = vit
        self._selected: dict[str, Any] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(vit=self.vit)

    @property
    def budget_plan(self) -> BudgetPlan | None:
        """What ``"auto"`` chose and what it chose from."""
        return self._auto.budget_plan

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> Handle:
        if trainer.state.fn == "fit":
            refuse_unfreezing(trainer, pl_module, find_vit(pl_module, self.vit), "BlockSelect")
        if self.blocks == "auto":
            assert self.memory_budget is not None
            return self._auto.attach(trainer, pl_module, self.memory_budget, self.budget_kind, self.vit)
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
    def state_dict(self) -> dict[str, Any]:
        return self._selected if self.blocks != "auto" else self._auto.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.blocks == "auto":
            self._handle = self._auto.load_state_dict(state_dict, self._handle)
            return
        # Nothing is attached when a checkpoint is loaded only to evaluate.
        if self._handle is not None and state_dict != self._selected:
            raise ConfigurationError(
                f"The checkpoint was trained with BlockSelect({_describe(state_dict)}), which differs from the "
                f"present BlockSelect({_describe(self._selected)}), so the optimizer's state does not fit; resume "
                f"with the same selection, or {NEW_RUN}."
            )


BlockSelectCallback = BlockSelect


def _describe(selected: dict[str, Any]) -> str:
    if "auto" in selected:
        return f"blocks='auto', which chose: {Configuration.from_dict(selected['auto'])}"
    return f"blocks={selected.get('blocks')}, head={selected.get('head')}, norm={selected.get('norm')}"
