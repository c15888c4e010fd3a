"""Replaces the forward of a block by an instance attribute; several replacements form a chain."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

Half = Literal["attn", "mlp"]
RECOMPUTES, PACKS = "is computed again in backward", "packs its activations"

HALF_OBSERVERS: list[Callable[[nn.Module, Half], None]] = []
"""Each is called with a block and a half of it before something keeps the input of that half."""
Result = TypeVar("Result")


class BlockForward:
    """A forward that is set on a block as an instance attribute, around the block's own or around another such one.

    A class at module level rather than a closure, so that modules that carry it can be deep-copied and pickled;
    ``state_dict`` keys do not change.

    Attributes:
        rank: Where in a chain such forwards stand: those of a lower rank are around those of a higher one.
        effects: What the block does with what backward needs, for those that do not go together.
        block: The block whose forward it is.
        inner: The next one in the chain; ``None`` stands for the forward of the block's class.
    """

    rank: ClassVar[int] = 0
    effects: tuple[str, ...] = ()

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.inner: BlockForward | None = None

    def call_inner(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run what this forward is around, on tokens ``[B, N, C]``."""
        if self.inner is None:
            return _own_forward(self.block)(self.block, x, *args, **kwargs)  # type: ignore[no-any-return]  # any module
        return self.inner(x, *args, **kwargs)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the block on tokens ``[B, N, C]``."""
        return self.call_inner(x, *args, **kwargs)

    def run_half(self, half: Half, function: Callable[[torch.Tensor], Result], x: torch.Tensor) -> Result:
        """Run ``function``, which computes one branch of the block on ``x``, as the forwards further inside want it."""
        return function(x) if self.inner is None else self.inner.run_half(half, function, x)


class SelfCheckpointForward(BlockForward):
    """The forward of a block of transformers whose class wraps its own forward in gradient checkpointing.

    An instance's forward takes the place of that wrapper; this one does its work, around all the others.
    """

    rank = -1

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        block: Any = self.block
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            return block._gradient_checkpointing_func(partial(self.call_inner, **kwargs), x, *args)  # type: ignore[no-any-return]  # any function
        return self.call_inner(x, *args, **kwargs)


def _checkpoints_itself(block: nn.Module) -> bool:
    layers = (cls for cls in type(block).__mro__ if cls.__name__ == "GradientCheckpointingLayer")
    # Up to transformers 5.22 it is __call__ that does, which an instance's forward does not replace.
    return any("__call__" not in vars(cls) for cls in layers)


def _own_forward(block: nn.Module) -> Callable[..., Any]:
    forward: Callable[..., Any] = type(block).forward
    return getattr(forward, "__wrapped__", forward) if _checkpoints_itself(block) else forward


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


def attach_forward(forward: BlockForward) -> None:
    """Put ``forward`` into its block's chain, around all that have its rank or a higher one."""
    outer = [other for other in forward_chain(forward.block) if other.rank < forward.rank]
    if outer:
        forward.inner, outer[-1].inner = outer[-1].inner, forward
    else:
        forward.inner = next(forward_chain(forward.block), None)
        forward.block.forward = forward
        if _checkpoints_itself(forward.block) and not isinstance(forward, SelfCheckpointForward):
            attach_forward(SelfCheckpointForward(forward.block))


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
    if isinstance(left := vars(block).get("forward"), SelfCheckpointForward) and left.inner is None:
        del block.forward
