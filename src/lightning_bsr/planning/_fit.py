"""Plans what ``fit`` would do, with the model, data, callbacks and optimizers that it would have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.callbacks._training_step import first_batches, optimizers_over_all, quiet_training_step
from lightning_bsr.callbacks.release_gradients import releases_gradients
from lightning_bsr.memory import BudgetPlan, MemoryReport, fit_budget, measure, plan

T = TypeVar("T")


@dataclass(frozen=True)
class FitStep:
    """The first training step of a ``fit``, all set but not run.

    Attributes:
        trainer: The Trainer that fits.
        module: The module, with everything attached.
        batch: The first batch, on the module's device.
    """

    trainer: Trainer
    module: LightningModule
    batch: Any

    def plan(self, batch_size: int | None = None, vit: str | None = None) -> MemoryReport:
        """Plan the step; for ``batch_size`` images, if given.

        Raises:
            ConfigurationError: If the module's training step cannot run on fake tensors, or optimizes by itself.
        """
        with quiet_training_step(self.module) as training_step:
            return plan(self.module, self.batch, batch_size=batch_size, **self._step_options(training_step, vit))

    def measure(self, vit: str | None = None) -> MemoryReport:
        """Measure the step on the real batch."""
        with quiet_training_step(self.module) as training_step:
            return measure(self.module, self.batch, **self._step_options(training_step, vit))

    def first_batches(self, count: int) -> list[Any]:
        """Load the first ``count`` training batches, or as many as there are, to the module's device."""
        return first_batches(self.trainer, self.module, self.trainer.fit_loop._combined_loader, count)

    def fit_budget(self, batches: Sequence[Any], budget: int, **options: Any) -> BudgetPlan:
        """Choose what trains, drops and is computed again so that the step fits in ``budget`` bytes.

        Args:
            batches: Training batches that tell what is worth training.
            budget: Bytes.
            **options: More arguments of :func:`lightning_bsr.memory.fit_budget`.

        Raises:
            ConfigurationError: If nothing fits.
        """
        with quiet_training_step(self.module) as training_step:
            # The Trainer's own are over what the configuration trains, not over what may be chosen.
            optimizers = optimizers_over_all(self.module)
            options = {**self._options(training_step, options.get("vit")), "optimizer": optimizers, **options}
            return fit_budget(self.module, batches, budget, **options)

    def _step_options(self, training_step: Callable[[Any], Any], vit: str | None) -> dict[str, Any]:
        return {**self._options(training_step, vit), "release_gradients": releases_gradients(self.trainer)}

    def _options(self, training_step: Callable[[Any], Any], vit: str | None) -> dict[str, Any]:
        return {
            "forward": training_step,
            "optimizer": self.trainer.optimizers,
            "precision": self.trainer.precision,
            "accumulate": self.trainer.accumulate_grad_batches > 1,
            "vit": vit,
        }


class FitPlanner(Callback, Generic[T]):
    """Stops ``fit`` at the moment when its first batch would be trained on, and hands the step to a function.

    By then everything is attached: selection, dropping, precision, optimizers. Put it last among the callbacks.

    Args:
        use: What to do with the step.

    Attributes:
        result: What ``use`` returned.

    Example:
        >>> from lightning_bsr import DigitsDataModule, ViTClassifier
        >>> planner = FitPlanner(lambda step: step.plan(batch_size=8))
        >>> trainer = Trainer(callbacks=[planner], max_epochs=1, logger=False, enable_checkpointing=False,
        ...                   accelerator="cpu", enable_model_summary=False, enable_progress_bar=False)
        >>> trainer.fit(ViTClassifier(), DigitsDataModule())
        >>> round(planner.result.activations / 2**20, 1)
        49.5
    """

    def __init__(self, use: Callable[[FitStep], T]) -> None:
        self._use = use
        self.result: T | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.num_sanity_val_steps = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True
        # Else they would overrule it.
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = 0
        (batch,) = first_batches(trainer, pl_module, trainer.fit_loop._combined_loader, 1)
        for callback in callbacks_of(trainer):
            if isinstance(callback, AttachingCallback):
                # Some set modes and keep rates batch by batch.
                callback.on_train_batch_start(trainer, pl_module, batch, 0)
        self.result = self._use(FitStep(trainer, pl_module, batch))


def plan_fit(
    model: LightningModule,
    datamodule: LightningDataModule,
    callbacks: Sequence[Callback] = (),
    *,
    also_measure: bool = False,
    **trainer_options: Any,
) -> MemoryReport | tuple[MemoryReport, MemoryReport]:
    """Plan the training step that ``fit`` would run.

    Args:
        model: Any LightningModule that holds a ViT; it is not changed.
        datamodule: Its first training batch is loaded.
        callbacks: Those of this package that would be attached.
        also_measure: Whether one real step is measured too.
        **trainer_options: More arguments of the Trainer: ``precision``, ``accumulate_grad_batches``, ...

    Returns:
        The plan; with ``also_measure`` the plan and the measurement.

    Example:
        >>> from lightning_bsr import BlockSelect, DigitsDataModule, ViTClassifier
        >>> report = plan_fit(ViTClassifier(), DigitsDataModule(batch_size=8), [BlockSelect(blocks=[3, 7, 11])])
        >>> [line.name for line in report.by_block if line.trained]
        ['3', '7', '11', 'head']
    """
    planner = FitPlanner(lambda step: (step.plan(), step.measure() if also_measure else None))
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(callbacks=[*callbacks, planner], **{**defaults, **trainer_options})
    trainer.fit(model, datamodule)
    assert planner.result is not None
    planned, measured = planner.result
    return planned if measured is None else (planned, measured)
