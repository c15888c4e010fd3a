"""Holds what backward keeps of blocks in a smaller, lossy form: chooses what to pack, and installs that."""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._forward import PACKS, RECOMPUTES, BlockForward, Result
from lightning_bsr.functional._installed import BlockChoice, BlockForwardsHandle, chosen_blocks
from lightning_bsr.functional._packed_rows import Exact, Int8Rows, Rows, SparseRows
from lightning_bsr.vit import find_vit

PACK_OBSERVERS: list[Callable[[torch.Tensor], None]] = []
"""Each is called with every tensor that is really held for backward inside a block that packs."""

# Below these, the scales or indices of a tensor weigh too much, or it is a statistic that backward relies on.
_MIN_ROW, _MIN_NUMEL = 16, 1024


class Compression(Protocol):
    """Which tensors to pack, and how."""

    def wants(self, x: torch.Tensor, saved_by: Callable[..., Any] | None) -> bool:
        """Whether to pack ``x``, which the torch function ``saved_by`` keeps."""

    def pack(self, x: torch.Tensor) -> Rows:
        """Pack ``x``, whose last dimension is that of the rows."""


@dataclass(frozen=True)
class Int8Compression:
    """Packs every activation."""

    def wants(self, x: torch.Tensor, saved_by: Callable[..., Any] | None) -> bool:
        """Leave the log-sum-exp of attention, which is ``[B, H, N]`` beside ``[B, H, N, D]``."""
        return saved_by is not F.scaled_dot_product_attention or x.ndim == 4

    def pack(self, x: torch.Tensor) -> Int8Rows:
        """Pack ``[..., D]`` with one scale for each row."""
        return Int8Rows(x)


@dataclass(frozen=True)
class SparseCompression:
    """Packs the inputs of linear layers."""

    keep: float

    def wants(self, x: torch.Tensor, saved_by: Callable[..., Any] | None) -> bool:
        """Take what only the gradients of weights are made of."""
        return saved_by is F.linear

    def pack(self, x: torch.Tensor) -> SparseRows:
        """Pack ``[..., D]``, the same number of values in each row."""
        return SparseRows(x, math.ceil(self.keep * x.shape[-1]))


class _Watch(TorchFunctionMode):
    """While active, knows which torch function runs, and whether it is attention with a mask."""

    running: Callable[..., Any] | None = None
    masked = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outer = self.running, self.masked
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        self.running, self.masked = func, func is F.scaled_dot_product_attention and mask is not None
        try:
            return func(*args, **kwargs)
        finally:
            self.running, self.masked = outer


@dataclass(frozen=True)
class _Packed:
    """Rows, and how the tensor that was saved lies on them."""

    rows: Rows
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def restore(self) -> torch.Tensor:
        inverse = [self.order.index(dim) for dim in range(len(self.order))]
        return self.rows.restore().view(self.shape).permute(inverse)


class _Packer:
    """Packs what one run of a block saves, each piece of memory once."""

    def __init__(self, block: nn.Module, compression: Compression, watch: _Watch) -> None:
        self._compression = compression
        self._watch = watch
        tensors = [*block.parameters(), *block.buffers()]
        self._own = {t.untyped_storage()._cdata for t in tensors}
        self._weights = {
            (shape, t.dtype) for t in tensors if t.is_floating_point() for shape in (t.shape, t.shape[::-1])
        }
        # The keys have addresses of storages; one whose storage has died may be given to another, so each is checked.
        self._packed: dict[tuple[object, ...], tuple[weakref.ref[torch.UntypedStorage], Rows]] = {}
        self._left: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def pack(self, x: torch.Tensor) -> Exact | _Packed:
        if not self._is_activation(x):
            return self._leave(x)
        order = tuple(sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True))
        lying = x.detach().permute(order)
        storage = x.untyped_storage()
        key = (storage._cdata, x._version, x.dtype, x.storage_offset(), *_merged(lying))
        if key not in self._packed or self._packed[key][0]() is None:
            # What is in memory anyway gains nothing from a packed copy beside it.
            if storage._cdata in self._left and self._left[storage._cdata]() is not None:
                return self._leave(x)
            # A mask is saved beside q, k, v, and its infinities have no scale.
            if lying.shape[-1] < _MIN_ROW or self._watch.masked or not self._compression.wants(x, self._watch.running):
                self._left[storage._cdata] = weakref.ref(storage)
                return self._leave(x)
            with torch.no_grad():
                rows = self._compression.pack(lying)
            _observe(rows.held)
            self._packed[key] = weakref.ref(storage), rows
        return _Packed(self._packed[key][1], tuple(lying.shape), order)

    def forget(self) -> None:
        """Let go of what was packed: autograd holds on to this object as long as to the graph."""
        self._packed.clear()
        self._left.clear()

    def _is_activation(self, x: torch.Tensor) -> bool:
        if not x.is_floating_point() or x.layout is not torch.strided or x.numel() < _MIN_NUMEL:
            return False
        if x.untyped_storage()._cdata in self._own or 0 in x.stride():
            return False
        return not self._is_weight_copy(x)

    def _is_weight_copy(self, x: torch.Tensor) -> bool:
        """Whether ``x`` looks like what autocast makes of a weight: its shape, or that transposed, in another dtype."""
        return any(shape == x.shape and dtype != x.dtype for shape, dtype in self._weights)

    def _leave(self, x: torch.Tensor) -> Exact:
        exact = Exact(x)
        _observe(exact.held)
        return exact


def _merged(lying: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Sizes and strides with neighbours joined, so that views of the same elements compare equal."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(lying.shape, lying.stride(), strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def _observe(held: Iterable[torch.Tensor]) -> None:
    for observer in PACK_OBSERVERS:
        for tensor in held:
            observer(tensor)


def _unpack(packed: Exact | _Packed) -> torch.Tensor:
    return packed.restore()


class PackForward(BlockForward):
    """The forward of a block of which backward keeps packed tensors."""

    effects = (PACKS,)

    def __init__(self, block: nn.Module, compression: Compression) -> None:
        super().__init__(block)
        self.compression = compression

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.call_inner(x, *args, **kwargs)
        run = partial(self.call_inner, x, *args, **kwargs)
        return run_packed(self.block, self.compression, run)  # type: ignore[no-any-return]  # what the function returns


# The compiler would choose by itself what is saved, and asks for it back with the strides that it had.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch annotates it not
def run_packed(block: nn.Module, compression: Compression, function: Callable[[], Result]) -> Result:
    """Run ``function``, which computes ``block`` or a part of it, and hold packed what backward keeps of it."""
    watch = _Watch()
    packer = _Packer(block, compression, watch)
    try:
        with watch, saved_tensors_hooks(packer.pack, _unpack):
            return function()
    finally:
        packer.forget()


def install_int8_activations(
    module: nn.Module, blocks: BlockChoice = "all", *, vit: str | None = None
) -> BlockForwardsHandle:
    """Hold what backward keeps of blocks as 8-bit integers (as in Mesa, arXiv 2111.11124, and GACT).

    The outputs are exactly what they were; gradients are approximate. Floating-point activations are held as one byte
    a value and, for each row of the last dimension, its smallest and largest value. Weights, statistics of norms and
    of attention, attention with a mask, and tensors that are small or have rows of fewer than 16 values stay as they
    are. Under ``torch.compile`` these blocks run uncompiled.

    Args:
        module: Any module that holds a ViT.
        blocks: ``"all"``, or indices of the blocks; negative ones count from the end.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, ``blocks`` does not fit it, or a block's activations are packed
            or recomputed already. Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_int8_activations(model)
        >>> print(handle)
        all 6 blocks of the ViT (VisionTransformer) keep 8-bit activations
        >>> handle.remove()
    """
    return _install(module, blocks, vit, Int8Compression(), "keep 8-bit activations")


def install_sparse_activations(
    module: nn.Module, keep: float = 0.1, blocks: BlockChoice = "all", *, vit: str | None = None
) -> BlockForwardsHandle:
    """Hold only the largest values of the inputs of blocks' linear layers (after BackRazor, NeurIPS 2022).

    The outputs are exactly what they were; gradients are approximate. For each token the ``keep`` share of values
    that are largest by magnitude is held, with their places. These inputs serve the gradients of the layers' weights
    alone, so the error stays there: gradients of biases, and all that flows on to earlier blocks, are exact. Inputs of
    norms and of activation functions stay as they are, and so do attention's queries, keys, values and outputs:
    backward computes the softmax from them again. Under ``torch.compile`` these blocks run uncompiled.

    Args:
        module: Any module that holds a ViT.
        keep: The share of values that is held, above 0 and at most 1.
        blocks: ``"all"``, or indices of the blocks; negative ones count from the end.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, ``keep`` or ``blocks`` does not fit, or a block's activations are
            packed or recomputed already. Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_sparse_activations(model, keep=0.1)
        >>> print(handle)
        all 6 blocks of the ViT (VisionTransformer) keep 0.1 of the inputs of linear layers
        >>> handle.remove()
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ConfigurationError(f"keep is {keep!r}, expected a number above 0 and at most 1.")
    return _install(module, blocks, vit, SparseCompression(keep), f"keep {keep:g} of the inputs of linear layers")


def _install(
    module: nn.Module, blocks: BlockChoice, vit: str | None, compression: Compression, effect: str
) -> BlockForwardsHandle:
    view = find_vit(module, vit)
    indices = chosen_blocks(view, blocks, (PACKS, RECOMPUTES))
    return BlockForwardsHandle(view, {i: PackForward(view.blocks[i], compression) for i in indices}, effect)
