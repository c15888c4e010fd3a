"""Every way of fine-tuning a ViT under one name, with its published defaults: as a function and as a callback."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import AttachingCallback, Handle
from lightning_bsr.callbacks._auto import AutoConfiguration
from lightning_bsr.callbacks._conflicts import refuse_stale_average, refuse_unfreezing
from lightning_bsr.functional import (
    SideNetwork,
    SideNetworkHandle,
    install_checkpointing,
    install_int8_activations,
    install_lora,
    install_side_network,
    install_sparse_activations,
    install_token_drop,
    select_blocks_,
    train_biases_,
)
from lightning_bsr.functional._drop_forward import Score
from lightning_bsr.functional._installed import BlockChoice, trained_share
from lightning_bsr.functional._select import Part
from lightning_bsr.memory import BudgetKind, Configuration
from lightning_bsr.memory._configuration import InstalledConfiguration
from lightning_bsr.vit import ViTView, find_vit

Parts = Iterator[Handle]


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning a ViT.

    Attributes:
        name: What it is called.
        summary: What it does, and where it is from.
        build: Called with a module, the path of its ViT and options; installs the method's parts one by one and yields
            the handle of each. Its keyword-only arguments are the options.
        build_evaluation: The same for evaluation, of what changes the function that the model computes; ``None`` if
            nothing does.
    """

    name: str
    summary: str
    build: Callable[..., Parts]
    build_evaluation: Callable[..., Parts] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options and their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


class FullTraining:
    """Lets everything in a ViT train; its ``remove()`` restores the flags."""

    def __init__(self, module: nn.Module, vit: str | None) -> None:
        self.view = find_vit(module, vit)
        self._flags = [(p, p.requires_grad) for p in self.view.model.parameters() if p.is_floating_point()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(True)

    def remove(self) -> None:
        """Put back each parameter's ``requires_grad``; a second call does nothing."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags.clear()

    def __str__(self) -> str:
        return f"everything trains in the {self.view.name}: {trained_share(self.view.model)}"


def _full(module: nn.Module, vit: str | None) -> Parts:
    yield FullTraining(module, vit)


def _head(module: nn.Module, vit: str | None) -> Parts:
    yield select_blocks_(module, [], norm=False, vit=vit)


def _bitfit(module: nn.Module, vit: str | None, *, head: bool = True) -> Parts:
    yield train_biases_(module, head=head, vit=vit)


def _lora(
    module: nn.Module,
    vit: str | None,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    head: bool = True,
) -> Parts:
    yield install_lora(module, rank=rank, alpha=alpha, dropout=dropout, targets=targets, head=head, vit=vit)


def _checkpoint(module: nn.Module, vit: str | None, *, blocks: BlockChoice = "all") -> Parts:
    yield FullTraining(module, vit)
    yield install_checkpointing(module, blocks, vit=vit)


def _int8_activations(module: nn.Module, vit: str | None, *, blocks: BlockChoice = "all") -> Parts:
    yield FullTraining(module, vit)
    yield install_int8_activations(module, blocks, vit=vit)


def _sparse_activations(module: nn.Module, vit: str | None, *, keep: float = 0.1, blocks: BlockChoice = "all") -> Parts:
    yield FullTraining(module, vit)
    yield install_sparse_activations(module, keep, blocks, vit=vit)


def _side_network(
    module: nn.Module, vit: str | None, *, reduction: int = 8, network: SideNetwork | None = None
) -> Parts:
    yield install_side_network(module, reduction=reduction, network=network, vit=vit)


def _token_drop_only(
    module: nn.Module,
    vit: str | None,
    *,
    drop_blocks: Sequence[int] | None = None,
    keep_rate: float | Sequence[float] = 0.7,
    fuse: bool = True,
    score: Score = "auto",
) -> Parts:
    view = find_vit(module, vit)
    at = _quarters(view) if drop_blocks is None else drop_blocks
    yield install_token_drop(module, at, keep_rate, fuse=fuse, score=score, vit=vit)


def _token_drop(
    module: nn.Module,
    vit: str | None,
    *,
    drop_blocks: Sequence[int] | None = None,
    keep_rate: float | Sequence[float] = 0.7,
    fuse: bool = True,
    score: Score = "auto",
) -> Parts:
    yield FullTraining(module, vit)
    yield from _token_drop_only(module, vit, drop_blocks=drop_blocks, keep_rate=keep_rate, fuse=fuse, score=score)


def _last_blocks(module: nn.Module, vit: str | None, *, count: int = 3) -> Parts:
    depth = len(find_vit(module, vit).blocks)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= depth:
        raise ConfigurationError(f"count is {count!r}, expected 0 to {depth}, the number of blocks.")
    yield select_blocks_(module, list(range(depth - count, depth)), vit=vit)


def _bsr(
    module: nn.Module,
    vit: str | None,
    *,
    blocks: int | Sequence[int] | Mapping[int, str | Sequence[str]] = 3,
    drop_blocks: Sequence[int] | None = None,
    keep_rate: float | Sequence[float] = 0.5,
    fuse: bool = True,
    score: Score = "auto",
) -> Parts:
    yield select_blocks_(module, blocks, vit=vit)
    yield from _token_drop_only(module, vit, drop_blocks=drop_blocks, keep_rate=keep_rate, fuse=fuse, score=score)


def _bsr_evaluation(
    module: nn.Module,
    vit: str | None,
    *,
    blocks: object = 3,
    drop_blocks: Sequence[int] | None = None,
    keep_rate: float | Sequence[float] = 0.5,
    fuse: bool = True,
    score: Score = "auto",
) -> Parts:
    yield from _token_drop_only(module, vit, drop_blocks=drop_blocks, keep_rate=keep_rate, fuse=fuse, score=score)


def _bsr_auto(
    module: nn.Module,
    vit: str | None,
    *,
    memory_budget: int | str | None = None,
    budget_kind: BudgetKind = "activations",
) -> Parts:
    raise ConfigurationError(
        "The method 'bsr_auto' chooses by training batches, which a module alone has not; use it with the callback "
        "FineTune, or give batches to lightning_bsr.memory.fit_budget."
    )
    yield


def _published(view: ViTView) -> Configuration:
    """What the method ``bsr`` does to a ViT."""
    depth = len(view.blocks)
    return Configuration(
        dict.fromkeys(((i + 1) * depth // 3 - 1 for i in range(3)), get_args(Part)),
        dict.fromkeys(_quarters(view), 0.5),
        drop_options={} if view.has_class_token else {"score": "mean"},
    )


def _quarters(view: ViTView) -> list[int]:
    """Blocks 3, 6 and 9 of 12, and their like at other depths."""
    depth = len(view.blocks)
    return sorted({depth // 4, depth // 2, 3 * depth // 4})


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "Everything trains.", _full),
        Method("head", "Only the head trains.", _head),
        Method("bitfit", "Biases and the head train (BitFit, arXiv 2106.10199).", _bitfit),
        Method("lora", "Low-rank adapters and the head train (LoRA, arXiv 2106.09685).", _lora, build_evaluation=_lora),
        Method(
            "checkpoint",
            "Everything trains; blocks are computed again in backward (arXiv 1604.06174).",
            _checkpoint,
        ),
        Method(
            "int8_activations",
            "Everything trains; backward keeps 8-bit activations of the blocks (as Mesa, arXiv 2111.11124).",
            _int8_activations,
        ),
        Method(
            "sparse_activations",
            "Everything trains; backward keeps the largest inputs of linear layers (after BackRazor, NeurIPS 2022).",
            _sparse_activations,
        ),
        Method(
            "side_network",
            "A small network beside the frozen blocks, the last norm and the head train (LST, arXiv 2206.06522).",
            _side_network,
            build_evaluation=_side_network,
        ),
        Method(
            "token_drop",
            "Everything trains; patch tokens are dropped at three blocks (EViT, arXiv 2202.07800).",
            _token_drop,
            build_evaluation=_token_drop_only,
        ),
        Method("last_blocks", "The last blocks, the last norm and the head train.", _last_blocks),
        Method(
            "bsr",
            "Three evenly spaced blocks, the last norm and the head train; patch tokens are dropped at three blocks "
            "(Block Selective Reprogramming, arXiv 2405.10951).",
            _bsr,
            build_evaluation=_bsr_evaluation,
        ),
        Method(
            "bsr_auto",
            "A memory budget, by default the activations of bsr, chooses what trains, where tokens are dropped and "
            "what is computed again.",
            _bsr_auto,
            build_evaluation=_bsr_auto,
        ),
    )
}
"""Every method by its name."""


class MethodHandle:
    """What :func:`apply_method_` did to a module, and the way back.

    Attributes:
        method: The method.
        parts: The handles of what was installed, in order.
    """

    def __init__(self, method: Method, parts: Sequence[Handle]) -> None:
        self.method = method
        self.parts = tuple(parts)

    def eval_frozen(self) -> None:
        """Set to eval mode what the method froze, where it froze whole parts of the ViT."""
        for part in self.parts:
            if hasattr(part, "eval_frozen"):
                part.eval_frozen()

    def remove(self) -> None:
        """Undo all parts, the last first; a second call does nothing."""
        for part in reversed(self.parts):
            part.remove()

    def __str__(self) -> str:
        return f"{self.method.name}: {'; '.join(map(str, self.parts))}"


def apply_method_(
    module: nn.Module, method: str, *, vit: str | None = None, evaluation: bool = False, **options: Any
) -> MethodHandle:
    """Make the ViT in ``module`` train by one of :data:`METHODS`.

    Args:
        module: Any module that holds a ViT.
        method: Its name.
        vit: Dotted path of the ViT, for when ``module`` holds several.
        evaluation: Install only what changes the function that the model computes.
        **options: The method's own, see :attr:`Method.options`.

    Returns:
        A handle; its ``remove()`` undoes everything, but for what was trained.

    Raises:
        ConfigurationError: If there is no such method or option, or a part of the method does not fit the module.
            Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = apply_method_(model, "last_blocks", count=2)
        >>> print(handle)
        last_blocks: blocks 4, 5 of 6 train in the ViT (VisionTransformer): 84,234 of 306,890 parameters (27.4 %)
        >>> handle.remove()
    """
    chosen = _check(method, options)
    build = chosen.build_evaluation if evaluation else chosen.build
    parts: list[Handle] = []
    with ExitStack() as undo:
        for part in build(module, vit, **options) if build else ():
            undo.callback(part.remove)
            parts.append(part)
        undo.pop_all()
    return MethodHandle(chosen, parts)


def _check(method: str, options: Mapping[str, Any]) -> Method:
    if method not in METHODS:
        raise ConfigurationError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    known = METHODS[method].options
    for option in options:
        if option not in known:
            raise ConfigurationError(
                f"The method {method!r} has no option {option!r}; its options are {', '.join(known) or 'none'}."
            )
    return METHODS[method]


class FineTune(AttachingCallback):
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
        if _check(method, self.options).build_evaluation is None:
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
            budget = self.options.get("memory_budget") or _published(find_vit(pl_module, self.vit))
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
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not when attaching: Lightning warns of modules in eval mode when training starts. And each time: a module may
        # call train() itself after a validation.
        assert isinstance(self._handle, (MethodHandle, InstalledConfiguration))
        self._handle.eval_frozen()

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
