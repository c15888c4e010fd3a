"""Counts the bytes that backward keeps, while a forward pass runs."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from lightning_bsr.memory._report import BlockReport, MemoryReport
from lightning_bsr.vit import ViTView

_EMBED, _HEAD = "embed", "head"


@dataclass
class _Kept:
    storage: StorageWeakRef
    num_bytes: int
    line: str
    is_weight_copy: bool


class ActivationRecorder:
    """A context in which every tensor that autograd saves for backward is counted.

    Each storage counts once, to the block that saved it first, and only while it is alive. Tensors inside a region
    with saved-tensor hooks of its own, such as ``save_on_cpu``, are not seen; of checkpointed blocks the inputs are,
    which is what they keep.

    Args:
        module: The module that trains; its parameters and buffers are not counted.
        view: Its ViT, for numbers by block.

    Example:
        >>> linear = nn.Linear(4, 2)
        >>> with ActivationRecorder(linear) as recorder:
        ...     out = linear(torch.zeros(8, 4, requires_grad=True)).exp()
        >>> recorder.report().activations  # the input, 8 x 4 floats, and the output of exp, 8 x 2
        192
    """

    def __init__(self, module: nn.Module, view: ViTView | None = None) -> None:
        self._module = module
        self._view = view
        self._kept: dict[int, _Kept] = {}
        self._line = _EMBED if view else _HEAD
        self._tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "ActivationRecorder":
        self._own = {p.untyped_storage()._cdata for p in self._tensors_of_module()}
        self._weights: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for parameter in self._module.parameters():
            self._weights[parameter.shape].append(parameter.detach())
            if parameter.ndim == 2:
                self._weights[parameter.mT.shape].append(parameter.detach().mT)
        blocks = self._view.blocks if self._view else ()
        for index, block in enumerate(blocks):
            # What is saved between two blocks, such as the input of a checkpointed one, belongs to the second.
            following = str(index + 1) if index + 1 < len(blocks) else _HEAD
            self._handles.append(block.register_forward_pre_hook(_Enter(self, str(index))))
            self._handles.append(block.register_forward_hook(_Leave(self, str(index), following)))
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def report(self) -> MemoryReport:
        """Report what is kept now; call it between forward and backward."""
        alive = [kept for kept in self._kept.values() if not kept.storage.expired()]  # type: ignore[no-untyped-call]
        by_line: dict[str, int] = defaultdict(int)
        for kept in alive:
            if not kept.is_weight_copy:
                by_line[kept.line] += kept.num_bytes
        parameters = list(self._module.parameters())
        return MemoryReport(
            activations=sum(by_line.values()),
            weight_copies=sum(kept.num_bytes for kept in alive if kept.is_weight_copy),
            parameters=sum(p.nbytes for p in parameters),
            gradients=sum(p.nbytes for p in parameters if p.requires_grad),
            by_block=tuple(self._lines(by_line)),
        )

    def clear(self) -> None:
        """Forget what was counted so far, and begin anew with what comes before the first block."""
        self._kept.clear()
        self._line = _EMBED if self._view else _HEAD

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor``, unless it is a parameter's or was counted before."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._own or storage._cdata in self._kept:
            return
        self._kept[storage._cdata] = _Kept(
            StorageWeakRef(storage),  # type: ignore[no-untyped-call]
            storage.nbytes(),
            self._line,
            self._is_weight_copy(tensor),
        )

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count(tensor)
        # The tensor itself may be the result of the operation that saves it: a cycle that would outlive its graph.
        return tensor.detach()

    def _is_weight_copy(self, tensor: torch.Tensor) -> bool:
        same_shape = self._weights.get(tensor.shape, ())
        return any(
            weight.dtype != tensor.dtype and torch.equal(weight.to(tensor.dtype), tensor.detach())
            for weight in same_shape
        )

    def _tensors_of_module(self) -> Iterator[torch.Tensor]:
        yield from self._module.parameters()
        yield from self._module.buffers()

    def _lines(self, activations: dict[str, int]) -> Iterator[BlockReport]:
        blocks = self._view.blocks if self._view else ()
        inside = {id(p) for block in blocks for p in block.parameters()}
        after = {id(p) for m in (*self._view.norms, *self._view.heads) for p in m.parameters()} if self._view else set()
        in_vit = {id(p) for p in self._view.model.parameters()} if self._view else set()
        everything = list(self._module.parameters())
        if self._view:
            embed = [p for p in everything if id(p) in in_vit - inside - after]
            yield _line(_EMBED, embed, activations, self._tokens)
        for index, block in enumerate(blocks):
            yield _line(str(index), list(block.parameters()), activations, self._tokens)
        head = [p for p in everything if id(p) in after or id(p) not in in_vit]
        yield _line(_HEAD, head, activations, self._tokens)


def _line(
    name: str, parameters: list[nn.Parameter], activations: dict[str, int], tokens: dict[str, int]
) -> BlockReport:
    return BlockReport(
        name=name,
        tokens=tokens.get(name),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        activations=activations.get(name, 0),
    )


@dataclass
class _Enter:
    recorder: ActivationRecorder
    line: str

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.line == "0" and inputs:
            self.recorder._tokens[_EMBED] = inputs[0].shape[1]
        self.recorder._line = self.line


@dataclass
class _Leave:
    recorder: ActivationRecorder
    line: str
    next_line: str

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.recorder._tokens[self.line] = output.shape[1]
        self.recorder._line = self.next_line


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
