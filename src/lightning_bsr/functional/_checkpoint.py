"""Recomputes blocks of a ViT in the backward pass instead of keeping their activations."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_bsr.functional._capture import active_masks
from lightning_bsr.functional._forward import PACKS, RECOMPUTES, BlockForward, Result
from lightning_bsr.functional._installed import BlockChoice, BlockForwardsHandle, chosen_blocks
from lightning_bsr.vit import find_vit

RECOMPUTE_OBSERVERS: list[Callable[[bool], None]] = []
"""Called with ``True`` when a block begins to be computed again in backward, with ``False`` when that ends."""


@runtime_checkable
class Changes(Protocol):
    """A module that may compute something else by the time of backward, such as for another task.

    Attributes:
        changes: Whether that is so.
    """

    @property
    def changes(self) -> bool: ...

    def as_it_is_now(self) -> contextlib.AbstractContextManager[None]:
        """Give a context in which the module is as it is now."""


class RecomputeContext:
    """Tells the observers when a recomputation begins and ends, also when it ends early by an exception.

    Meanwhile the parts of ``block`` that change are as they are now, in the forward pass, and masks are fitted as now.
    """

    def __init__(self, block: nn.Module) -> None:
        self._states = [*(module.as_it_is_now() for module in changing_parts(block)), *active_masks()]
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        for observer in RECOMPUTE_OBSERVERS:
            observer(True)
            self._entered.callback(observer, False)
        for state in self._states:
            self._entered.enter_context(state)

    def __exit__(self, *exc_info: object) -> None:
        self._entered.close()


class CheckpointForward(BlockForward):
    """The forward of a block that keeps its input and is computed again in backward."""

    effects = (RECOMPUTES,)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not needs_backward(x, self.block.parameters()):
            return self.call_inner(x, *args, **kwargs)
        return recompute(self.block, self.call_inner, x, *args, **kwargs)


def changing_parts(block: nn.Module) -> list[Changes]:
    """List the parts of ``block`` whose output depends on more than their input and weights."""
    return [module for module in block.modules() if isinstance(module, Changes) and module.changes]


def needs_backward(x: torch.Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether backward will need anything of a function of ``x`` and ``parameters``."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))


def recompute(block: nn.Module, function: Callable[..., Result], x: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """Run ``function``, which computes ``block`` or a part of it, so that backward computes it again."""

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), RecomputeContext(block)

    # The compiler takes no context of ours.
    context: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    result: Result = checkpoint(function, x, *args, use_reentrant=False, **context, **kwargs)
    return result


def install_checkpointing(
    module: nn.Module, blocks: BlockChoice = "all", *, vit: str | None = None
) -> BlockForwardsHandle:
    """Keep only the inputs of blocks of the ViT in ``module``; backward computes the rest again (arXiv 1604.06174).

    Gradients are exactly what they were; the blocks' forward pass runs twice. Random numbers, such as those of
    dropout, are the same both times. A block of which backward needs nothing runs as it is. May be combined with
    :func:`install_token_drop`, in either order.

    Args:
        module: Any module that holds a ViT.
        blocks: ``"all"``, or indices of the blocks; negative ones count from the end.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, ``blocks`` does not fit it, or a block is recomputed already or
            packs its activations.
            Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_checkpointing(model, [0, -1])
        >>> print(handle)
        blocks 0, 5 of 6 of the ViT (VisionTransformer) are computed again in backward
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    indices = chosen_blocks(view, blocks, (RECOMPUTES, PACKS))
    forwards = {index: CheckpointForward(view.blocks[index]) for index in indices}
    return BlockForwardsHandle(view, forwards, "are computed again in backward")
