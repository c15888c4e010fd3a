"""Stores what the frozen first blocks of a ViT give for each sample, and skips those blocks from then on."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch._subclasses import FakeTensor

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._checkpoint import changing_parts
from lightning_bsr.functional._drop_forward import TokenDropForward, drops_tokens
from lightning_bsr.functional._forward import (
    BlockForward,
    attach_forward,
    forward_chain,
    replaced_by_others,
    unwrap_forward,
)
from lightning_bsr.functional._outputs import DenseOutputRefused
from lightning_bsr.functional._prefix_given import given_to_all
from lightning_bsr.functional._prefix_pass import CachedPrefix, PrefixCounts
from lightning_bsr.functional._prefix_store import DTYPES, FileStore, MemoryStore, TokenStore
from lightning_bsr.vit import BlockSpec, ViTView, find_vit

StoredDtype = Literal["float32", "bfloat16", "float16"]
"""The names of the dtypes that tokens may be stored in."""

_MARK = "_lightning_bsr_prefix_cache"


class PrefixForward(BlockForward):
    """The forward of a block of the prefix: it runs what it is around only if a sample's tokens are not stored."""

    rank = -1

    def __init__(self, block: nn.Module, spec: BlockSpec, prefix: CachedPrefix) -> None:
        super().__init__(block)
        self.spec = spec
        self.prefix = prefix
        self._names = list(inspect.signature(type(block).forward).parameters)[2:]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        prefix = self.prefix
        if prefix.suspended or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
            return self.call_inner(x, *args, **kwargs)
        given = given_to_all(self.spec, self._names, args, kwargs)
        if self.block is prefix.blocks[0]:
            prefix.begin(x, given)
        prefix.enter(given, args, kwargs)
        if not prefix.skips:
            x = self.call_inner(x, *args, **kwargs)
        return prefix.end(x) if self.block is prefix.blocks[-1] else x


class UncachedIntermediates:
    """Stands in for ``forward_intermediates``, which needs what comes out of every block."""

    def __init__(self, view: ViTView, prefix: CachedPrefix) -> None:
        self.view = view
        self.prefix = prefix

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.view.model
        if any(map(drops_tokens, self.view.blocks)):
            DenseOutputRefused(self.view.name)()
        self.prefix.bring_back()
        self.prefix.suspended = True
        try:
            return type(model).forward_intermediates(model, *args, **kwargs)  # type: ignore[attr-defined]  # it has one
        finally:
            self.prefix.suspended = False


class PrefixCacheHandle:
    """What :func:`install_prefix_cache` put around the first blocks of a ViT, and the way back.

    Attributes:
        view: The ViT.
    """

    def __init__(self, view: ViTView, prefix: CachedPrefix) -> None:
        self.view = view
        self._prefix = prefix
        specs = view.specs[: len(prefix.blocks)]
        self._forwards = [PrefixForward(*each, prefix) for each in zip(prefix.blocks, specs, strict=True)]
        for forward in self._forwards:
            attach_forward(forward)
        if hasattr(view.model, "forward_intermediates") and "forward_intermediates" not in vars(view.model):
            view.model.forward_intermediates = UncachedIntermediates(view, prefix)  # type: ignore[assignment]
        setattr(view.model, _MARK, True)

    @property
    def counts(self) -> PrefixCounts:
        """How many samples were read, computed and stored so far."""
        return self._prefix.counts

    @property
    def num_bytes(self) -> int:
        """How many bytes are stored."""
        return self._prefix.store.num_bytes

    @property
    def fingerprint(self) -> bytes:
        """What the stored tokens belong to: a hash of the blocks' weights and settings; empty before the first use."""
        return self._prefix.fingerprint

    def verify(self) -> None:
        """Look whether the blocks are still what the stored tokens were computed by; forget them if not.

        Before each use that is done by the version counters of the weights; this compares all their bytes.
        """
        self._prefix.verify()

    def remove(self) -> None:
        """Give each block its own forward and its weights again; a second call does nothing."""
        for forward in self._forwards:
            unwrap_forward(forward)
        if vars(self.view.model).pop(_MARK, None) is None:
            return
        if isinstance(vars(self.view.model).get("forward_intermediates"), UncachedIntermediates):
            del self.view.model.forward_intermediates
        self._prefix.close()

    def __str__(self) -> str:
        depth, count = len(self.view.blocks), len(self._forwards)
        which = "block 0" if count == 1 else f"blocks 0 to {count - 1}"
        text = f"{which} of {depth} of the {self.view.name} run once for each image, then their output is read"
        used = f"{self.num_bytes / 2**20:.1f} of at most {self._prefix.store.max_bytes / 2**20:.1f} MiB"
        counts = self.counts
        if not counts.hits and not counts.misses:
            return f"{text}; {used}"
        return f"{text}: {counts.hits} read, {counts.misses} computed; {used}"


def install_prefix_cache(
    module: nn.Module,
    *,
    blocks: int | None = None,
    place: str | Path = "memory",
    max_bytes: int = 2**30,
    dtype: StoredDtype | None = None,
    offload: bool = False,
    vit: str | None = None,
) -> PrefixCacheHandle:
    """Compute the frozen first blocks of the ViT in ``module`` once for each image, and read their output afterwards.

    The blocks before the first one that trains, the prefix, are a fixed function of the tokens that enter block 0. What
    they give, after the tokens that they drop, is stored under a hash of these tokens, so images are known again in any
    order, and with any change that reaches block 0 they are computed anew. A batch of which something is not stored is
    computed as a whole, because kernels may give other bits for another batch size; for the same reason an image in a
    batch of another size is another entry. Losses and gradients are then those of the uncached run, bit for bit.

    What is stored belongs to the weights and settings of the prefix, the tokens dropped in it, the autocast dtype, the
    device and the version of torch; when one of these changes, it is forgotten. Install it after
    :func:`select_blocks_`. Forward hooks on blocks of the prefix see wrong tokens where blocks are skipped.
    Rotary embeddings and position biases that are the same for all images of a batch are part of the hash; the blocks
    after the prefix get theirs from the model as ever, for the tokens that are left. Compiled code,
    ``forward_intermediates`` and calls with an attention mask, or with positions of each image's own, run uncached.

    Args:
        module: Any module that holds a ViT.
        blocks: How many blocks make up the prefix; by default all before the first that trains.
        place: ``"memory"``, or a folder for a memory-mapped file, which a later process with the same prefix goes on
            with. What was damaged there is computed anew.
        max_bytes: How many bytes to store at most. What does not fit is computed each time.
        dtype: By default tokens are stored as the blocks give them, and a prefix whose output depends, if only by
            rounding, on an image's place in its batch is refused. ``"float32"`` accepts such rounding; ``"bfloat16"``
            and ``"float16"`` also take half of float32's bytes, and round. Losses are then not the same bit for bit.
        offload: Whether the weights of the prefix go to the CPU after 16 batches in a row were read, and come back to
            the device for the next that must be computed.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, has a prefix cache already or no frozen prefix, a parameter before
            its blocks trains, the prefix drops tokens at random, or an argument is out of range. Nothing has changed
            then. Later, from the forward pass: if the prefix draws random numbers, begins to train, is given tokens
            or positions that need gradients or positions that are random, or gives an image other tokens in another
            batch.

    Example:
        >>> import timm
        >>> from lightning_bsr.functional import select_blocks_
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> selection = select_blocks_(model, [3, 5])
        >>> handle = install_prefix_cache(model)
        >>> images = torch.zeros(2, 3, 160, 160)
        >>> torch.equal(model(images), model(images))
        True
        >>> print(handle)
        blocks 0 to 2 of 6 of the ViT (VisionTransformer) run once for each image, then their output is read: 2 read, 2
        computed; 0.0 of at most 1024.0 MiB
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    if view.keeps_tokens:
        raise ConfigurationError(
            f"The {view.name} has no prefix that could be stored: what lies between its blocks "
            f"({type(view.blocks[0]).__name__}) is not known to leave their output as it is."
        )
    prefix_blocks = _prefix_blocks(view, blocks)
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise ConfigurationError(f"max_bytes is {max_bytes!r}, expected a whole number of bytes above 0.")
    if dtype is not None and dtype not in get_args(StoredDtype):
        names = ", ".join(map(repr, get_args(StoredDtype)))
        raise ConfigurationError(f"dtype is {dtype!r}, expected None or one of {names}.")
    stored = {str(known): known for known in DTYPES}.get(f"torch.{dtype}")
    store: TokenStore = MemoryStore(max_bytes) if place == "memory" else FileStore(Path(place), max_bytes)
    return PrefixCacheHandle(view, CachedPrefix(view, prefix_blocks, PrefixForward, store, stored, offload))


def _prefix_blocks(view: ViTView, blocks: int | None) -> Sequence[nn.Module]:
    if _MARK in vars(view.model):
        raise ConfigurationError(f"The {view.name} has a prefix cache already; remove that first.")
    frozen = 0
    while frozen < len(view.blocks) and not any(p.requires_grad for p in view.blocks[frozen].parameters()):
        frozen += 1
    if not frozen:
        raise ConfigurationError(
            f"Block 0 of the {view.name} trains, so no block before it can be stored; freeze the first blocks, such as "
            "with BlockSelect([-2, -1])."
        )
    if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= frozen):
        raise ConfigurationError(
            f"blocks is {blocks!r}, expected None or 1 to {frozen}, the number of blocks of the {view.name} before the "
            "first that trains."
        )
    later = {id(p) for part in (*view.blocks, *view.norms, *view.heads) for p in part.parameters()}
    trained = [name for name, p in view.model.named_parameters() if p.requires_grad and id(p) not in later]
    if trained:
        raise ConfigurationError(
            f"{', '.join(trained)} of the {view.name} train before its blocks, so what these give cannot be stored; "
            "freeze them."
        )
    prefix = view.blocks[: frozen if blocks is None else blocks]
    for index, block in enumerate(prefix):
        if (other := replaced_by_others(block)) is not None:
            raise ConfigurationError(
                f"Block {index} of the {view.name} has its forward replaced by {other}; undo that first."
            )
        if parts := changing_parts(block):
            raise ConfigurationError(
                f"Block {index} of the {view.name} has a {type(parts[0]).__name__} that computes something else for "
                "each task, so its output cannot be stored by image; choose blocks before it."
            )
        if any(isinstance(f, TokenDropForward) and f.score == "random" for f in forward_chain(block)):
            raise ConfigurationError(
                f"Block {index} of the {view.name} drops tokens by score='random', so its output cannot be stored; "
                "choose score='cls' or score='mean', or blocks before it."
            )
    return prefix
