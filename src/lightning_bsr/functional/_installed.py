"""What installers that replace the forward of blocks have in common."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._forward import (
    BlockForward,
    attach_forward,
    forward_chain,
    replaced_by_others,
    unwrap_forward,
)
from lightning_bsr.vit import ViTView

BlockChoice = Literal["all"] | Sequence[int]


class BlockForwardsHandle:
    """What an installer put around blocks of a ViT, and the way back.

    Attributes:
        view: The ViT.
        forwards: What was put around each block, by block index.
    """

    def __init__(self, view: ViTView, forwards: Mapping[int, BlockForward], effect: str) -> None:
        self.view = view
        self.forwards = dict(forwards)
        self._effect = effect
        for forward in self.forwards.values():
            attach_forward(forward)

    def remove(self) -> None:
        """Take the forwards out again; a second call does nothing."""
        for forward in self.forwards.values():
            unwrap_forward(forward)

    def __str__(self) -> str:
        depth = len(self.view.blocks)
        some = f"blocks {', '.join(map(str, self.forwards))} of {depth}" if self.forwards else f"none of {depth} blocks"
        which = f"all {depth} blocks" if len(self.forwards) == depth else some
        return f"{which} of the {self.view.name} {self._effect}"


def chosen_blocks(view: ViTView, blocks: BlockChoice, refused: Collection[str]) -> list[int]:
    """Turn the user's choice of blocks into sorted positions.

    Args:
        view: The ViT.
        blocks: ``"all"``, or block indices; negative ones count from the end.
        refused: Effects that the forwards of a chosen block may not have already.

    Raises:
        ConfigurationError: If the choice does not fit the ViT, or a block's forward has such an effect or is somebody
            else's.
    """
    if isinstance(blocks, Sequence) and not isinstance(blocks, str):
        indices = view.block_indices(blocks)
    elif blocks == "all":
        indices = list(range(len(view.blocks)))
    else:
        raise ConfigurationError(f"blocks is {blocks!r}, expected 'all' or a list of block indices.")
    for index in indices:
        block = view.blocks[index]
        if (other := replaced_by_others(block)) is not None:
            raise ConfigurationError(
                f"Block {index} of the {view.name} has its forward replaced by {other}; undo that first."
            )
        for forward in forward_chain(block):
            for effect in forward.effects:
                if effect in refused:
                    raise ConfigurationError(f"Block {index} of the {view.name} {effect} already; remove that first.")
    return indices


def refuse_sharded(view: ViTView, problem: str, remedy: str) -> None:
    """Refuse a ViT whose parameters are divided among processes, such as by ``fully_shard``.

    Raises:
        ConfigurationError: If they are; its message has ``problem`` and ``remedy``.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor  # takes long to import, and some builds of torch have none

    if any(isinstance(p, DTensor) for p in view.model.parameters()):
        raise ConfigurationError(f"The {view.name} is divided among processes, so {problem}; {remedy}.")


def trained_share(model: nn.Module) -> str:
    """Say how many parameters train, such as ``125,962 of 306,890 parameters (41.0 %)``."""
    numels = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in numels), sum(n for n, trains in numels if trains)
    return f"{trained:,} of {total:,} parameters ({100 * trained / total:.1f} %)"
