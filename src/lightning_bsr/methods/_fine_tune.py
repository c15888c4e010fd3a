"""The callback that fine-tunes by one of the methods."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import FreezingCallback, Handle
from lightning_bsr.callbacks._auto import AutoConfiguration
from lightning_bsr.callbacks._conflicts import refuse_stale_average, refuse_unfreezing
from lightning_bsr.functional import SideNetworkHandle
from lightning_bsr.methods._apply import apply_method_, chosen_method
from lightning_bsr.methods._table import bsr_configuration
from lightning_bsr.vit import find_vit


class FineTune(FreezingCallback):
    """Fine-tune the module's ViT by one of :data:`METHODS`.

    The method is in place during ``fit``. What changes the function that the model computes, such as dropped tokens or
    a side network, is in place during ``validate``, ``test`` and ``predict`` too. Afterwards, however the run ended,
    layers, flags, modes and the keys of the state dict are as they were; the adapters of ``lora`` are merged into the
    weights, and the trained network of ``side_network`` is remembered for the next run of this callback.

    A checkpoint of ``lora`` or ``side_network`` holds their weights under their own keys; to load it, in the same
    process or another, have the same callback in the Trainer.

    Args:
        method: The method's name.
        options: The method's own options.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: In the constructor for an unknown method or option; at the start of a run, if the method
            does not fit the module, or another callback unfreezes the ViT or averages weights without those that the
            method adds; when training resumes from a checkpoint of another method.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import FineTune
        >>> trainer = Trainer(callbacks=[FineTune("last_blocks", {"count": 2})], accelerator="cpu", logger=False)
    """

    def __init__(self, method: str, options: dict[str, Any] | None = None, *, vit: str | None = None) -> None:
        super().__init__()
        self.method = method
        self.options = dict(options or {})
        self.vit = vit
        self._side: SideNetworkHandle | None = None
        self._auto = AutoConfiguration() if method == "bsr_auto" else None
        self._fitting = False
        if chosen_method(method, self.options).build_evaluation is None:
            self.stages = ("fit",)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(vit=self.vit)

    @property
    def _name(self) -> str:
        return f"FineTune({self.method!r})"

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> Handle:
        self._fitting = trainer.state.fn == "fit"
        if self._fitting:
            refuse_unfreezing(trainer, pl_module, find_vit(pl_module, self.vit), self._name)
        if self._auto is not None:
            budget = self.options.get("memory_budget") or bsr_configuration(find_vit(pl_module, self.vit))
            kind = self.options.get("budget_kind", "activations")
            return self._auto.attach(trainer, pl_module, budget, kind, self.vit)
        options = dict(self.options)
        if self._side is not None and find_vit(pl_module, self.vit).model is self._side.view.model:
            options["network"] = self._side.network
        handle = apply_method_(pl_module, self.method, vit=self.vit, evaluation=not self._fitting, **options)
        self._side = next((part for part in handle.parts if isinstance(part, SideNetworkHandle)), None)
        return handle

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_stale_average(trainer, pl_module, self._name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"method": self.method} | (self._auto.state_dict() if self._auto else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._auto is not None:
            self._handle = self._auto.load_state_dict(state_dict, self._handle)
        if self._fitting and state_dict.get("method") != self.method:
            raise ConfigurationError(
                f"The checkpoint was trained with FineTune({state_dict.get('method')!r}), which differs from the "
                f"present {self._name}, so the optimizer's state does not fit; resume with the same "
                "method, or load only the weights."
            )
