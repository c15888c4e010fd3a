"""The callback that lets blocks hold less for backward."""

from collections.abc import Mapping
from functools import partial
from typing import get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import AttachingCallback, Handle
from lightning_bsr.callbacks._conflicts import has_whole_weights, refuse_batch_size_search
from lightning_bsr.callbacks._training_step import first_batches, quiet_training_step
from lightning_bsr.callbacks.release_gradients import releases_gradients
from lightning_bsr.functional import (
    BlockForwardsHandle,
    HalfPolicies,
    LeanPolicy,
    install_attention_by_products,
    install_lean_activations,
    install_unread_skip,
)
from lightning_bsr.memory import BudgetKind, LeanPolicies, fit_lean, parse_bytes, plan


class LeanActivations(AttachingCallback):
    """Let the blocks of the module's ViT keep less for backward while training; the outputs are exactly what they were.

    During ``fit`` only. With ``"exact"`` gradients are the same to the last bit, with no matrix product repeated; with
    ``"recompute"`` they are the same and half-blocks are computed again; with ``"int8"`` they are approximate. See
    :func:`lightning_bsr.functional.install_lean_activations` for the details.

    Args:
        policy: ``"exact"``, ``"recompute"`` or ``"int8"`` for all blocks; or by block index, negative ones from the
            end: one for the block, or one for each half, such as ``{-1: {"attn": "exact", "mlp": "recompute"}}``.
        memory_budget: With ``"recompute"``: computes only so many half-blocks again, the others being ``"exact"``, as
            the step needs to fit in these bytes (a number, or one with a unit such as ``"512MiB"``), as planned when
            ``fit`` starts; see :func:`lightning_bsr.memory.fit_lean`.
        budget_kind: What the budget bounds: ``"total"``, the peak of the whole training step; or ``"activations"``,
            the bytes that backward keeps.
        attention_by_products: Whether the gradients of attention are computed by matrix products on the CPU in bf16 and
            fp16, which is several times faster there; gradients differ by rounding. See
            :func:`lightning_bsr.functional.install_attention_by_products`.
        skip_unread: Whether the last block's MLP leaves out the patch tokens, which a head on the class token does not
            read; see :func:`lightning_bsr.functional.install_unread_skip`.
        fold_norms: Whether the first trained norm gets its gradient without a matrix product of its own; gradients of
            it and of the layer behind it differ by rounding. See
            :func:`lightning_bsr.functional.install_lean_activations`.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: In the constructor if ``memory_budget`` is no number of bytes or is given with another
            policy than ``"recompute"``. At the start of ``fit``, if nothing fits in the budget, the
            strategy divides weights or the batch size is searched for beside a budget, there is no ViT,
            ``policy`` does not fit it, a block has lean activations already or, unless its policy is ``"exact"``,
            packs its activations or is recomputed by another callback, or ``skip_unread`` is given for a ViT whose
            head reads patch tokens.

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
        memory_budget: int | str | None = None,
        budget_kind: BudgetKind = "total",
        attention_by_products: bool = False,
        skip_unread: bool = False,
        fold_norms: bool = False,
        vit: str | None = None,
    ) -> None:
        super().__init__()
        if memory_budget is not None:
            if policy != "recompute":
                raise ConfigurationError(
                    f"LeanActivations was given memory_budget={memory_budget!r} and policy={policy!r}, expected "
                    "policy='recompute', which a budget tells what to compute again."
                )
            parse_bytes(memory_budget)
        if budget_kind not in get_args(BudgetKind):
            kinds = ", ".join(map(repr, get_args(BudgetKind)))
            raise ConfigurationError(f"budget_kind is {budget_kind!r}, expected one of {kinds}.")
        self.memory_budget = memory_budget
        self.budget_kind = budget_kind
        self.policy = policy
        self.attention_by_products = attention_by_products
        self.skip_unread = skip_unread
        self.fold_norms = fold_norms
        self.vit = vit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.memory_budget is None:
            super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now everything else is attached, whatever the order of the callbacks, and counts in the plan.
        if self.memory_budget is not None:
            refuse_batch_size_search(trainer)
            if not has_whole_weights(trainer):
                raise ConfigurationError(
                    f"The strategy of the Trainer is {type(trainer.strategy).__name__}, expected a single device or "
                    "DDP: a plan for a memory budget needs undivided weights."
                )
            self._attach(trainer, pl_module)

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> Handle:
        handles = self._install_others(pl_module)
        try:
            policy = self.policy if self.memory_budget is None else self._within(trainer, pl_module, self.memory_budget)
            handles.add(install_lean_activations(pl_module, policy, fold_norms=self.fold_norms, vit=self.vit))
        except BaseException:
            handles.remove()
            raise
        return handles

    def _install_others(self, pl_module: LightningModule) -> "_Handles":
        """Install what does not depend on a budget, but counts in its plans."""
        handles = _Handles()
        try:
            if self.attention_by_products:
                handles.add(install_attention_by_products(pl_module, vit=self.vit))
            if self.skip_unread:
                handles.add(install_unread_skip(pl_module, vit=self.vit))
        except BaseException:
            handles.remove()
            raise
        return handles

    def _within(self, trainer: Trainer, pl_module: LightningModule, budget: int | str) -> LeanPolicies:
        """Plan the step on the first training batch and choose what to compute again."""
        with isolate_rng(), quiet_training_step(pl_module) as training_step:
            (batch,) = first_batches(trainer, pl_module, trainer.fit_loop._data_source.dataloader(), 1)
            step = partial(
                plan,
                pl_module,
                batch,
                forward=training_step,
                optimizer=trainer.optimizers,
                precision=trainer.precision,  # type: ignore[arg-type]  # an unknown one is refused by name
                accumulate=trainer.accumulate_grad_batches > 1,
                release_gradients=releases_gradients(trainer),
                vit=self.vit,
            )
            return fit_lean(pl_module, step, budget, kind=self.budget_kind, vit=self.vit)


class _Handles:
    """Several handles as one."""

    def __init__(self) -> None:
        self._handles: list[BlockForwardsHandle] = []

    def add(self, handle: BlockForwardsHandle) -> None:
        """Take one more."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Undo everything."""
        for handle in reversed(self._handles):
            handle.remove()

    def __str__(self) -> str:
        return "; ".join(map(str, self._handles))
