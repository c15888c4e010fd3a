"""Follows every storage of a step from its making to its end: what is alive, at most, and what it is for."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_bsr.memory._position import Position

Category = Literal[
    "parameters",
    "buffers",
    "inputs",
    "gradients",
    "optimizer_state",
    "activations",
    "weight_copies",
    "temporaries",
]
_RESIDENT = ("parameters", "buffers")
# Not every release of torch has a formula for the kernels of the CPU; they compute what those of CUDA do.
_COUNTED_AS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass
class _Storage:
    num_bytes: int
    category: Category
    ref: weakref.ref[torch.UntypedStorage]
    is_weight_copy: bool = False


@dataclass(frozen=True)
class Peak:
    """The moment at which most was alive.

    Attributes:
        bytes: All bytes alive.
        parts: The same by what they are for.
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        line: The line of the report, such as a block's index.
    """

    bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    phase: str = "forward"
    line: str = ""


class StepTracker(TorchDispatchMode):
    """While active, follows the storages that operations make and counts floating-point operations.

    Works alike on real and on fake tensors. What a kernel allocates and frees inside itself is not seen.

    Attributes:
        bytes: Bytes alive now, by category.
        peak: The moment at which most was alive.
        activations_peak: The most bytes of category ``"activations"`` at one moment.
        flops: Operations so far, by phase and line.
        phase: ``"forward"`` or ``"backward"``; set by whoever runs the step.
        position: Where in the ViT the step is, if there is one.

    Example:
        >>> tracker = StepTracker()
        >>> with tracker:
        ...     y = torch.ones(256) + 1  # the ones are freed once y is there
        >>> tracker.peak.bytes, tracker.bytes["temporaries"]
        (2048, 1024)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.bytes: Counter[str] = Counter()
        self.peak = Peak()
        self.activations_peak = 0
        self.flops: Counter[tuple[str, str]] = Counter()
        self.phase = "forward"
        self.position: Position | None = None
        self._total = 0
        self._storages: dict[int, _Storage] = {}
        self._recomputed: set[int] | None = None
        self._recompute_ended = False

    def hold(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Say what storages are for; those that were there before the step are entered by this."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            entry = self._storages.get(storage._cdata)
            if entry is None:
                self._enter(storage, category)
            elif entry.category not in _RESIDENT:
                self._move(entry, category)
        self._note_peak()

    def hold_phantom(self, num_bytes: int, category: Category) -> None:
        """Count bytes that a real step holds and this run does not; negative to release them."""
        self.bytes[category] += num_bytes
        self._total += num_bytes
        self._note_peak()

    def is_weight_copy(self, tensor: torch.Tensor) -> bool:
        """Whether the storage of ``tensor`` was made by casting a parameter."""
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        return entry is not None and entry.is_weight_copy

    def forget_peak(self) -> None:
        """Look for the peak anew, from what is alive now."""
        self.peak = Peak()
        self._note_peak()

    def recompute(self, begins: bool) -> None:
        """Hear that a checkpointed region is computed again; what stays of it is kept for backward."""
        if begins:
            self._recomputed = set()
        else:
            self._recompute_ended = True

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # fake tensors ask for it all the time
            return func(*args, **kwargs)
        if self._recompute_ended:
            self._keep_recomputed()
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        formula = flop_registry.get(packet) or flop_registry.get(_COUNTED_AS.get(packet))
        if formula is not None:
            self.flops[self.phase, self._line] += formula(*args, **kwargs, out_val=out)
        casts_weight = func is torch.ops.aten._to_copy.default and self._category(args[0]) == "parameters"
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._enter(storage, "temporaries", casts_weight)
        self._note_peak()
        return out

    @property
    def _line(self) -> str:
        return self.position.line if self.position else ""

    def _category(self, tensor: torch.Tensor) -> str | None:
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry.category

    def _enter(self, storage: torch.UntypedStorage, category: Category, is_weight_copy: bool = False) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()

        def leave(_: object) -> None:
            entry = self._storages.pop(key)
            self.bytes[entry.category] -= entry.num_bytes
            self._total -= entry.num_bytes

        self._storages[key] = _Storage(num_bytes, category, weakref.ref(storage, leave), is_weight_copy)
        self.bytes[category] += num_bytes
        self._total += num_bytes
        if self._recomputed is not None:
            self._recomputed.add(key)

    def _move(self, entry: _Storage, category: Category) -> None:
        self.bytes[entry.category] -= entry.num_bytes
        self.bytes[category] += entry.num_bytes
        entry.category = category

    def _keep_recomputed(self) -> None:
        # Only now: when the recomputation ends, its local variables are still alive.
        for key in self._recomputed or ():
            entry = self._storages.get(key)
            if entry is not None and entry.category == "temporaries":
                self._move(entry, "weight_copies" if entry.is_weight_copy else "activations")
        self._recomputed, self._recompute_ended = None, False
        self._note_peak()

    def _note_peak(self) -> None:
        self.activations_peak = max(self.activations_peak, self.bytes["activations"])
        if self._total > self.peak.bytes:
            self.peak = Peak(self._total, dict(self.bytes), self.phase, self._line)
