"""Carries dropped tokens past the blocks that do without them, and puts them back to their places at the end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_bsr.functional._drop_forward import RESTORES, TokenDropForward
from lightning_bsr.functional._forward import BlockForward
from lightning_bsr.functional._positions import put_back, split_positions
from lightning_bsr.functional._tokens import num_kept_tokens


def count_rows(num_rows: int, num_prefix_tokens: int, drops: Sequence[tuple[float, bool]]) -> tuple[int, int]:
    """Count the tokens that go on, where those that are gone stand behind them, and the tokens of the image.

    Args:
        num_rows: The tokens that go on and those that are gone, with each that was made by fusing.
        num_prefix_tokens: How many tokens come before the patch tokens.
        drops: The keep rate of each drop so far, and whether it fuses.

    Example:
        >>> count_rows(17, 1, []), count_rows(18, 1, [(0.5, True)]), count_rows(17, 1, [(0.5, False)])
        ((17, 17), (10, 17), (9, 17))
    """
    for num_fused in range(len(drops) + 1):
        left = num_rows - num_prefix_tokens - num_fused
        made = 0
        for keep_rate, fuse in drops:
            kept = num_kept_tokens(left, keep_rate)
            if kept < left:
                left = kept + fuse
                made += fuse
        # More patches never make fewer fused tokens, so just one number fits.
        if made == num_fused:
            return num_prefix_tokens + left, num_rows - num_fused
    raise AssertionError(f"{num_rows} rows do not come from these drops.")


class RestoringForward(BlockForward):
    """The forward of a block from the first that drops tokens on: it leaves the block those that are left.

    The others stand behind them, with their positions, between one block and the next; the last block gives all tokens
    in their order, without those that were made by fusing.
    """

    rank = 0
    effects = (RESTORES,)

    def __init__(
        self,
        block: nn.Module,
        width: int,
        num_prefix_tokens: int,
        drops_before: Sequence[TokenDropForward],
        is_last: bool,
    ) -> None:
        super().__init__(block)
        self.width = width
        self.num_prefix_tokens = num_prefix_tokens
        self.drops_before = list(drops_before)
        self.is_last = is_last

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        has_positions = x.shape[2] > self.width
        drops = [(drop.keep_rate, drop.fuse) for drop in self.drops_before] if has_positions else []
        num_left, num_tokens = count_rows(x.shape[1], self.num_prefix_tokens, drops)
        if num_left < x.shape[1]:
            # A copy, so that backward does not hold what stands behind.
            x = torch.cat([self.call_inner(x[:, :num_left].contiguous(), *args, **kwargs), x[:, num_left:]], dim=1)
        else:
            x = self.call_inner(x, *args, **kwargs)
        if not self.is_last:
            return x
        tokens, positions = split_positions(x, self.width)
        return tokens if positions is None else put_back(tokens, positions, num_tokens)
