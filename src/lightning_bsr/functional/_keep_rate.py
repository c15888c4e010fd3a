"""The keep rate as a function of the epoch."""

import math


def cosine_keep_rate(keep_rate: float, epoch: int, warmup_epochs: int) -> float:
    """Lower the keep rate from 1 to ``keep_rate`` along a half cosine, as EViT does (arXiv 2202.07800, section 4.1).

    Args:
        keep_rate: The rate from ``warmup_epochs`` on.
        epoch: Zero-based epoch.
        warmup_epochs: How many epochs the warm-up lasts; 0 for none.

    Returns:
        The keep rate of ``epoch``.

    Example:
        >>> [round(cosine_keep_rate(0.5, epoch, 4), 3) for epoch in range(6)]
        [1.0, 0.927, 0.75, 0.573, 0.5, 0.5]
    """
    if epoch >= warmup_epochs:
        return keep_rate
    return keep_rate + (1 - keep_rate) * (1 + math.cos(math.pi * epoch / warmup_epochs)) / 2
