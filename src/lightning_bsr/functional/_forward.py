"""Replaces the forward of a block by an instance attribute; several replacements form a chain."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class BlockForward:
    """A forward that is set on a block as an instance attribute, around the block's own or around another such one.

    A class at module level rather than a closure, so that modules that carry it can be deep-copied and pickled;
    ``state_dict`` keys do not change.

    Attributes:
        block: The block whose forward it is.
        inner: The next one in the chain; ``None`` stands for the forward of the block's class.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.inner: BlockForward | None = None

    def call_inner(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run what this forward is around, on tokens ``[B, N, C]``."""
        if self.inner is None:
            return type(self.block).forward(self.block, x, *args, **kwargs)  # type: ignore[no-any-return]  # any module
        return self.inner(x, *args, **kwargs)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the block on tokens ``[B, N, C]``."""
        return self.call_inner(x, *args, **kwargs)


def forward_chain(block: nn.Module) -> Iterator[BlockForward]:
    """Yield what stands before the forward of the block's class, from the outside in."""
    forward = vars(block).get("forward")
    while isinstance(forward, BlockForward):
        yield forward
        forward = forward.inner


def replaced_by_others(block: nn.Module) -> str | None:
    """Name what replaced the forward of ``block``, if it was not this package."""
    forward = vars(block).get("forward")
    return None if forward is None or isinstance(forward, BlockForward) else type(forward).__name__


def wrap_forward(forward: BlockForward) -> None:
    """Put ``forward`` around everything that its block has now."""
    forward.inner = next(forward_chain(forward.block), None)
    forward.block.forward = forward


def insert_forward(forward: BlockForward) -> None:
    """Put ``forward`` inside everything that its block has now."""
    chain = list(forward_chain(forward.block))
    if chain:
        chain[-1].inner = forward
    else:
        forward.block.forward = forward


def unwrap_forward(forward: BlockForward) -> None:
    """Take ``forward`` out of its block's chain; nothing happens if it is not in it."""
    block = forward.block
    chain = list(forward_chain(block))
    if forward not in chain:
        return
    position = chain.index(forward)
    if position:
        chain[position - 1].inner = forward.inner
    elif forward.inner is None:
        del block.forward
    else:
        block.forward = forward.inner
    forward.inner = None
