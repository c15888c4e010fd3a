"""The callback that releases each gradient into the optimizer's step as soon as it is there."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.functional import ReleasedGradients, release_gradients_

_SEE_GRADIENTS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


class ReleaseGradients(Callback):
    """Step each parameter in the backward pass, as soon as its gradient is there, and free the gradient.

    During ``fit`` only. The gradients, which else take as much memory as the parameters that train, then never live
    together. Weights, the optimizer's state, checkpoints and schedules are exactly what they were. See
    :func:`lightning_bsr.functional.release_gradients_` for the details.

    What needs all gradients at once cannot be combined with it, and is refused: accumulation over batches, clipping,
    the scaled loss of ``"16-mixed"``, several devices, manual optimization, and hooks that run between the backward
    pass and the step to look at gradients.

    Raises:
        ConfigurationError: At the start of ``fit``, if the Trainer, the module or a callback needs gradients after the
            backward pass; or before the first batch, if the optimizer does. Later, if a batch has several backward
            passes.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import BlockSelect
        >>> trainer = Trainer(callbacks=[BlockSelect([3, 7, 11]), ReleaseGradients()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        self._handle: ReleasedGradients | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_trainer(trainer)
            _check_hooks(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: callbacks that search for a learning rate or a batch size train before this and start anew.
        (optimizer,) = trainer.optimizers
        self._handle = release_gradients_(optimizer)
        rank_zero_info(f"ReleaseGradients: {self._handle}.")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def releases_gradients(trainer: Trainer) -> bool:
    """Whether ``trainer`` has the callback, attached or not yet."""
    return any(isinstance(callback, ReleaseGradients) for callback in callbacks_of(trainer))


def _check_trainer(trainer: Trainer) -> None:
    if trainer.accumulate_grad_batches > 1:
        raise _refusal(
            f"the Trainer's accumulate_grad_batches is {trainer.accumulate_grad_batches}",
            "accumulate_grad_batches=1, because each gradient is gone before the next batch could add to it",
        )
    scheduler = next((c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)), None)
    if scheduler is not None:
        raise _refusal(
            f"the Trainer has the callback GradientAccumulationScheduler({scheduler.scheduling})",
            "no accumulation, because each gradient is gone before the next batch could add to it",
        )
    if trainer.gradient_clip_val:
        raise _refusal(
            f"the Trainer's gradient_clip_val is {trainer.gradient_clip_val}",
            "no clipping, because it comes after the backward pass, when the gradients are gone",
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        raise _refusal(
            f"the Trainer's precision is {trainer.precision!r} with a {type(scaler).__name__}",
            "another one such as 'bf16-mixed', because gradients of a scaled loss must be unscaled before the step",
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise _refusal(
            f"the Trainer's strategy is {type(trainer.strategy).__name__}",
            "a single device (devices=1, strategy='auto'), because several average their gradients before the step",
        )


def _check_hooks(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise _refusal(
            f"{type(pl_module).__name__} optimizes by itself",
            "automatic optimization, with one backward pass and one step a batch; in a training step of your own call "
            "lightning_bsr.functional.release_gradients_",
        )
    _check_own(pl_module, LightningModule, (*_SEE_GRADIENTS, "configure_gradient_clipping"))
    for callback in callbacks_of(trainer):
        _check_own(callback, Callback, _SEE_GRADIENTS)


def _check_own(one: object, base: type, hooks: Sequence[str]) -> None:
    for hook in hooks:
        # Lightning's is_overridden knows no builtins, which a LambdaCallback may have.
        own = getattr(one, hook)
        if getattr(own, "__func__", own) is not getattr(base, hook):
            raise _refusal(
                f"{type(one).__name__} has its own {hook}",
                "none, because it would find no gradients; what needs none may run in on_train_batch_end",
            )


def _refusal(given: str, expected: str) -> ConfigurationError:
    return ConfigurationError(f"ReleaseGradients cannot be used here: {given}, expected {expected}.")
