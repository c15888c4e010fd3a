"""The table of methods: what each attaches to a ViT, and its published defaults."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import Handle
from lightning_bsr.functional import (
    SideNetwork,
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


def bsr_configuration(view: ViTView) -> Configuration:
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
