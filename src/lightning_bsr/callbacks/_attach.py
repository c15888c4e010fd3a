"""When in a Trainer's life to attach to the ViT, and when to let go of it."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._conflicts import callbacks_of


class Handle(Protocol):
    """What an installer returns."""

    def remove(self) -> None:
        """Undo what was installed."""


@runtime_checkable
class FreezingHandle(Handle, Protocol):
    """What an installer returns that freezes some of the ViT."""

    def eval_frozen(self) -> None:
        """Put what is frozen into eval mode."""


class AttachingCallback(Callback):
    """Attaches once the module is built, before the strategy wraps it, and detaches however the run ends."""

    stages: tuple[str, ...] = ("fit", "validate", "test", "predict")
    late = False
    """Whether it attaches after all others, when the fit starts; it then detaches before them."""

    def __init__(self) -> None:
        self._handle: Handle | None = None

    @property
    def is_attached(self) -> bool:
        """Whether the lever is installed now."""
        return self._handle is not None

    @abstractmethod
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> Handle:
        """Install the lever on ``pl_module`` and return its handle."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, LightningModule):
            raise ConfigurationError(
                f"{type(self).__name__} was given a {type(pl_module).__name__} that is no lightning.pytorch."
                "LightningModule; import module and Trainer from lightning.pytorch, not from pytorch_lightning."
            )

        if stage in self.stages:
            _when_built(pl_module, partial(self._attach, trainer, pl_module))

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handle = self.attach(trainer, pl_module)
        rank_zero_info(f"{type(self).__name__}: {self._handle}.")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach_in_order(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach_in_order(trainer, pl_module)

    def _detach_in_order(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in callbacks_of(trainer):
            if isinstance(callback, AttachingCallback) and callback.late:
                callback._detach(pl_module)
        self._detach(pl_module)

    def _detach(self, pl_module: LightningModule) -> None:
        deferred = vars(pl_module).get("configure_model")
        if deferred is not None and hasattr(deferred, "_replaced"):
            _put_back(pl_module, deferred._replaced)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class FreezingCallback(AttachingCallback):
    """Also keeps what is frozen in eval mode while training."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not when attaching: Lightning warns of modules in eval mode when training starts. And each time: a module may
        # call train() itself after a validation.
        assert isinstance(self._handle, FreezingHandle)
        self._handle.eval_frozen()


def _when_built(pl_module: LightningModule, attach: Callable[[], None]) -> None:
    """Call ``attach`` now, or after ``configure_model`` if the module may still build or replace its ViT.

    A module may do so in its ``setup`` or its ``configure_model``, both of which run after the callbacks' ``setup``.
    The replaced ``configure_model`` is for one call: it puts the module's own back.
    """
    if not (is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)):
        attach()
        return
    build = pl_module.configure_model
    replaced = vars(pl_module).get("configure_model")

    def configure_model() -> None:
        _put_back(pl_module, replaced)
        build()
        attach()

    configure_model._replaced = replaced  # type: ignore[attr-defined]  # a note for _detach
    pl_module.configure_model = configure_model  # type: ignore[method-assign]  # on this instance only


def _put_back(pl_module: LightningModule, configure_model: Callable[[], None] | None) -> None:
    """Give the instance the ``configure_model`` that it had, or its class's again."""
    del pl_module.configure_model
    if configure_model is not None:
        pl_module.configure_model = configure_model  # type: ignore[method-assign]  # it was the instance's own
