"""Lets the memory budget choose, at the start of a Trainer's fit."""

from typing import Any

import rich
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import Handle
from lightning_bsr.callbacks._conflicts import NEW_RUN, callbacks_of, has_whole_weights, refuse_batch_size_search
from lightning_bsr.callbacks._training_step import first_batches, optimizers_over_all, quiet_training_step
from lightning_bsr.callbacks.lean_activations import LeanActivations
from lightning_bsr.callbacks.token_drop import TokenDrop
from lightning_bsr.functional._installed import refuse_sharded
from lightning_bsr.memory import BudgetKind, BudgetPlan, Configuration, fit_budget
from lightning_bsr.vit import find_vit

PROBE_BATCHES = 4


def choose_configuration(
    trainer: Trainer,
    pl_module: LightningModule,
    budget: int | str | Configuration,
    kind: BudgetKind,
    *,
    vit: str | None = None,
) -> BudgetPlan:
    """Probe the module on its first training batches and let the budget choose; the run's random numbers do not change.

    Args:
        trainer: At the start of ``fit``.
        pl_module: Built, but with nothing selected yet.
        budget: As for :func:`lightning_bsr.memory.fit_budget`.
        kind: What the budget bounds.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: If nothing fits in the budget, or the module or the data cannot be probed.
    """
    strategy = trainer.strategy
    if has_whole_weights(trainer):
        # What is going to be done anyway, a little later.
        trainer.precision_plugin.convert_module(pl_module)
        pl_module.to(strategy.root_device)
    # The device: a module may be built inside of Lightning's context for the accelerator, where loaders do not work.
    with torch.device("cpu"), isolate_rng(), quiet_training_step(pl_module) as training_step:
        loaders = trainer.fit_loop._data_source.dataloader()
        found = fit_budget(
            pl_module,
            first_batches(trainer, pl_module, loaders, PROBE_BATCHES),
            budget,
            kind=kind,
            forward=training_step,
            optimizer=optimizers_over_all(pl_module) if kind == "total" else (),
            precision=trainer.precision,  # type: ignore[arg-type]  # an unknown one is refused by name
            accumulate=trainer.accumulate_grad_batches > 1,
            vit=vit,
            on_progress=rank_zero_info,
        )
    return strategy.broadcast(found)


class NothingInstalled:
    """Stands for a run in which there is nothing to install."""

    def remove(self) -> None:
        """Do nothing."""

    def __str__(self) -> str:
        return "nothing to do in this run"


class AutoConfiguration:
    """The configuration that a budget chooses for a callback: once, then kept, also in checkpoints.

    Attributes:
        budget_plan: What was chosen from; ``None`` before, and after a resume.
        chosen: The configuration; ``None`` before.
    """

    def __init__(self) -> None:
        self.budget_plan: BudgetPlan | None = None
        self.chosen: Configuration | None = None

    def attach(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        budget: int | str | Configuration,
        kind: BudgetKind,
        vit: str | None,
    ) -> Handle:
        """Choose if need be, and install: everything for ``fit``, otherwise only the dropping."""
        self._attached = (pl_module, vit, trainer.state.fn == "fit")
        if trainer.state.fn == "fit":
            _check_others(trainer)
            refuse_batch_size_search(trainer)
            refuse_sharded(find_vit(pl_module, vit), "a memory budget cannot choose", "choose before it is")
            self.budget_plan = choose_configuration(trainer, pl_module, budget, kind, vit=vit)
            self.chosen = self.budget_plan.choice
            if trainer.is_global_zero:
                rich.print(self.budget_plan.table())
        return self._install()

    def state_dict(self) -> dict[str, Any]:
        """Give the choice as a checkpoint holds it."""
        return {"auto": self.chosen.to_dict()} if self.chosen else {}

    def load_state_dict(self, state_dict: dict[str, Any], handle: Handle | None) -> Handle | None:
        """Take the choice of a checkpoint, and put it in place of what ``handle`` installed.

        Lightning tells what it resumes from, or evaluates, only after everything was attached, but before the
        optimizers are made.
        """
        if handle is None:
            return handle
        if "auto" not in state_dict:
            if self._attached[2] and state_dict:
                raise ConfigurationError(
                    "The checkpoint was trained with a fixed choice, and now a memory budget chooses, so the state of "
                    f"the optimizer may not fit; resume with what it was trained with, or {NEW_RUN}."
                )
            return handle
        restored = Configuration.from_dict(state_dict["auto"])
        if restored == self.chosen:
            return handle
        handle.remove()
        self.budget_plan, self.chosen = None, restored
        installed = self._install()
        rank_zero_info(f"As in the checkpoint, not as chosen now: {installed}.")
        return installed

    def _install(self) -> Handle:
        pl_module, vit, fitting = self._attached
        if self.chosen is None or not (fitting or self.chosen.drop):
            return NothingInstalled()
        return self.chosen.install(pl_module, vit) if fitting else self.chosen.install_drop(pl_module, vit)


def _check_others(trainer: Trainer) -> None:
    for callback in callbacks_of(trainer):
        if isinstance(callback, LeanActivations) and callback.policy != {}:
            raise ConfigurationError(
                "A memory budget chooses what each half-block keeps, and so does "
                f"LeanActivations({callback.policy!r}); leave that callback out, or give it policy={{}} for its "
                "skip_unread alone."
            )
        if isinstance(callback, TokenDrop) and not callback.is_attached:
            raise ConfigurationError(
                "A memory budget chooses by what TokenDrop leaves over, so TokenDrop must come first; put it before in "
                "the list of callbacks, or leave it out to let the budget choose the drops too."
            )
