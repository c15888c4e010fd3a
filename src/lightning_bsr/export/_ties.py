"""Tells where rounding alone could change which tokens a model drops."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_bsr.functional import num_kept_tokens
from lightning_bsr.functional._drop_forward import TokenDropForward
from lightning_bsr.functional._forward import forward_chain


def token_drops(module: nn.Module) -> list[TokenDropForward]:
    """List what drops tokens in ``module``."""
    chains = (forward_chain(each) for each in module.modules())
    return [forward for chain in chains for forward in chain if isinstance(forward, TokenDropForward)]


@contextlib.contextmanager
def watched_margins(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While active, note how clearly the last kept token of each picture is ahead of the first dropped one.

    Yields:
        A list; each drop that runs appends ``[B]``: by which part of the kept token's score the dropped one's is lower.
    """
    margins: list[torch.Tensor] = []
    drops = token_drops(module)
    for drop in drops:
        vars(drop)["_attend"] = partial(_attend, drop, margins)
    try:
        yield margins
    finally:
        for drop in drops:
            del vars(drop)["_attend"]


def _attend(drop: TokenDropForward, margins: list[torch.Tensor], *args: Any) -> Any:
    result = TokenDropForward._attend(drop, *args)
    scores = result[1].sort(dim=1, descending=True).values
    kept = num_kept_tokens(scores.shape[1], drop.keep_rate)
    margins.append(1 - scores[:, kept] / scores[:, kept - 1])
    return result
