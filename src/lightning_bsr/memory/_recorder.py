"""Counts the bytes that backward keeps, while a forward pass runs."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_bsr.functional._forward import Half
from lightning_bsr.functional._pack import PACK_OBSERVERS
from lightning_bsr.memory._live import StepTracker
from lightning_bsr.memory._position import EMBED, HEAD, Position
from lightning_bsr.memory._report import BlockReport, MemoryReport
from lightning_bsr.vit import ViTView


@dataclass
class _Kept:
    storage: weakref.ref[torch.UntypedStorage]
    num_bytes: int
    line: str
    half: Half | None
    is_weight_copy: bool


class ActivationRecorder:
    """A context in which every tensor that autograd saves for backward is counted.

    Each storage counts once, to the block that saved it first, and only while it is alive. Of checkpointed blocks the
    inputs are seen, which is what they keep, and of this package's compressed activations what they hold; tensors
    inside a region with other saved-tensor hooks of its own, such as ``save_on_cpu``, are not seen.

    Args:
        module: The module that trains; its parameters and buffers are not counted.
        view: Its ViT, for numbers by block.
        tracker: Follows all storages of the same step; it is told which ones are kept.
        ignored: Tensors whose storages are not counted either.

    Example:
        >>> linear = nn.Linear(4, 2)
        >>> with ActivationRecorder(linear) as recorder:
        ...     out = linear(torch.zeros(8, 4, requires_grad=True)).exp()
        >>> recorder.report().activations  # the input, 8 x 4 floats, and the output of exp, 8 x 2
        192
    """

    def __init__(
        self,
        module: nn.Module,
        view: ViTView | None = None,
        *,
        tracker: StepTracker | None = None,
        ignored: Iterable[torch.Tensor] = (),
    ) -> None:
        self._module = module
        self._view = view
        self._tracker = tracker
        self._ignored = list(ignored)
        self._kept: dict[int, _Kept] = {}
        self.position = Position(view, backward=tracker is not None)

    def __enter__(self) -> "ActivationRecorder":
        self._own = {
            tensor.untyped_storage()._cdata
            for tensor in chain(self._module.parameters(), self._module.buffers(), self._ignored)
        }
        self._is_weight_copy = self._tracker.is_weight_copy if self._tracker else _WeightCopies(self._module)
        self.position.__enter__()
        PACK_OBSERVERS.append(self.count)
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)
        PACK_OBSERVERS.remove(self.count)
        self.position.__exit__(*exc_info)

    def report(self) -> MemoryReport:
        """Report what is kept now; call it between forward and backward."""
        alive = [kept for kept in self._kept.values() if kept.storage() is not None]
        kept_by: dict[tuple[str, Half | None], int] = defaultdict(int)
        for kept in alive:
            if not kept.is_weight_copy:
                kept_by[kept.line, kept.half] += kept.num_bytes
        parameters = list(self._module.parameters())
        return MemoryReport(
            activations=sum(kept_by.values()),
            weight_copies=sum(kept.num_bytes for kept in alive if kept.is_weight_copy),
            parameters=sum(p.nbytes for p in parameters),
            gradients=sum(p.nbytes for p in parameters if p.requires_grad),
            by_block=tuple(self._lines(kept_by)),
        )

    def clear(self) -> None:
        """Forget what was counted so far, and begin anew with what comes before the first block."""
        self._kept.clear()
        self.position.reset()

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor``, unless it is a parameter's or was counted before."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._own:
            return
        before = self._kept.get(storage._cdata)
        # One that is gone may have had the same address.
        if before is not None and before.storage() is not None:
            return
        is_weight_copy = self._is_weight_copy(tensor)
        self._kept[storage._cdata] = _Kept(
            # A StorageWeakRef would keep the tracker from hearing, in torch 2.6, that the storage is gone.
            weakref.ref(storage),
            storage.nbytes(),
            self.position.line,
            self.position.half,
            is_weight_copy,
        )
        if self._tracker is not None:
            self._tracker.hold([tensor], "weight_copies" if is_weight_copy else "activations")

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        # Of several recorders only the innermost is told by autograd.
        for observer in PACK_OBSERVERS:
            observer(tensor)
        # The tensor itself may be the result of the operation that saves it: a cycle that would outlive its graph.
        return tensor.detach()

    def _lines(self, kept: dict[tuple[str, Half | None], int]) -> Iterator[BlockReport]:
        blocks = self._view.blocks if self._view else ()
        inside = {id(p) for block in blocks for p in block.parameters()}
        after = {id(p) for m in (*self._view.norms, *self._view.heads) for p in m.parameters()} if self._view else set()
        in_vit = {id(p) for p in self._view.model.parameters()} if self._view else set()
        everything = list(self._module.parameters())
        if self._view:
            embed = [p for p in everything if id(p) in in_vit - inside - after]
            yield self._line(EMBED, embed, kept)
        for index, block in enumerate(blocks):
            yield self._line(str(index), list(block.parameters()), kept)
        head = [p for p in everything if id(p) in after or id(p) not in in_vit]
        yield self._line(HEAD, head, kept)

    def _line(self, name: str, parameters: list[nn.Parameter], kept: dict[tuple[str, Half | None], int]) -> BlockReport:
        attn, mlp = kept.get((name, "attn"), 0), kept.get((name, "mlp"), 0)
        return BlockReport(
            name=name,
            tokens=self.position.tokens.get(name),
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            activations=attn + mlp + kept.get((name, None), 0),
            attn=attn,
            mlp=mlp,
        )


class _WeightCopies:
    """Recognises autocast's copies of weights by shape and value, where nothing follows how they are made."""

    def __init__(self, module: nn.Module) -> None:
        self._weights: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for parameter in module.parameters():
            self._weights[parameter.shape].append(parameter.detach())
            if parameter.ndim == 2:
                self._weights[parameter.mT.shape].append(parameter.detach().mT)

    def __call__(self, tensor: torch.Tensor) -> bool:
        return any(
            weight.dtype != tensor.dtype and torch.equal(weight.to(tensor.dtype), tensor.detach())
            for weight in self._weights.get(tensor.shape, ())
        )


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
