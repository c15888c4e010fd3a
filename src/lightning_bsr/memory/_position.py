"""Knows in which block of the ViT a step is, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_bsr.functional._forward import HALF_OBSERVERS, Half
from lightning_bsr.vit import ViTView

EMBED, HEAD = "embed", "head"


class Position:
    """While active, follows a step through the blocks of a ViT by module hooks, and by gradient hooks if asked to.

    Attributes:
        line: ``"embed"``, the index of the block the step is in, or ``"head"``. What lies between two blocks, such as
            the input of a checkpointed one, belongs to the second.
        half: Which branch of the block it is in.
        tokens: Tokens that left each line so far.

    Example:
        >>> import timm
        >>> from lightning_bsr.vit import find_vit
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> with Position(find_vit(model)) as position:
        ...     _ = model(torch.zeros(1, 3, 160, 160))
        >>> position.line, position.tokens["0"]
        ('head', 101)
    """

    def __init__(self, view: ViTView | None, *, backward: bool = False) -> None:
        self._view = view
        self._backward = backward
        self._handles: list[RemovableHandle] = []
        self.tokens: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Start anew with what comes before the first block."""
        self.enter(EMBED if self._view else HEAD)

    def enter(self, line: str, half: Half | None = None) -> None:
        """Be in ``line`` from now on."""
        self.line = line
        self.half: Half | None = half

    def __enter__(self) -> "Position":
        if self._view is None:
            return self
        names = [str(index) for index in range(len(self._view.blocks))]
        for name, following, block, spec in zip(
            names, [*names[1:], HEAD], self._view.blocks, self._view.specs, strict=True
        ):
            self._handles.append(block.register_forward_pre_hook(_Enter(self, name, self._backward)))
            self._handles.append(block.register_forward_hook(_Leave(self, name, following, self._backward)))
            first = next((m for m in (getattr(block, part) for part in spec.mlp) if isinstance(m, nn.Module)), None)
            if first is not None:
                self._handles.append(first.register_forward_pre_hook(_EnterMlp(self, name)))
        HALF_OBSERVERS.append(self._enter_half)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._enter_half in HALF_OBSERVERS:
            HALF_OBSERVERS.remove(self._enter_half)

    def _enter_half(self, block: nn.Module, half: Half) -> None:
        self.half = half


@dataclass
class _Enter:
    position: Position
    line: str
    backward: bool

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.line == "0" and inputs:
            self.position.tokens[EMBED] = inputs[0].shape[1:-1].numel()
            if self.backward and inputs[0].requires_grad:
                inputs[0].register_hook(_enter_backward(self.position, EMBED))
        self.position.enter(self.line, "attn")


@dataclass
class _EnterMlp:
    position: Position
    line: str

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.position.enter(self.line, "mlp")


@dataclass
class _Leave:
    position: Position
    line: str
    next_line: str
    backward: bool

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.position.tokens[self.line] = output.shape[1:-1].numel()
        if self.backward and output.requires_grad:
            output.register_hook(_enter_backward(self.position, self.line))
        self.position.enter(self.next_line, "attn" if self.next_line != HEAD else None)


def _enter_backward(position: Position, line: str) -> Callable[[torch.Tensor], None]:
    def enter(_: torch.Tensor) -> None:
        position.enter(line)

    return enter
