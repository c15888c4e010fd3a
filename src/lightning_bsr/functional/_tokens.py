"""Which tokens go on: counting, splitting and fusing, as functions of tensors."""

import math

import torch


def num_kept_tokens(num_patch_tokens: int, keep_rate: float) -> int:
    """Count the patch tokens that are kept: ``ceil(keep_rate * num_patch_tokens)`` (arXiv 2405.10951).

    Example:
        >>> num_kept_tokens(196, 0.5), num_kept_tokens(99, 0.5)
        (98, 50)
    """
    return math.ceil(keep_rate * num_patch_tokens)


def drop_tokens(
    x: torch.Tensor,
    scores: torch.Tensor,
    num_kept: int,
    *,
    num_prefix_tokens: int,
    fuse: bool = True,
    normalize: bool = False,
) -> torch.Tensor:
    """Keep the prefix tokens and the best patch tokens, and fuse the others into one.

    Args:
        x: Tokens ``[B, N, C]``, prefix tokens first.
        scores: Scores of the patch tokens ``[B, N - num_prefix_tokens]``.
        num_kept: How many patch tokens are kept, K.
        num_prefix_tokens: How many prefix tokens there are, P.
        fuse: Whether the dropped tokens are appended as one, see :func:`fuse_tokens`.
        normalize: Whether the weights of the fused token are scaled to sum to 1.

    Returns:
        ``[B, P + K + 1, C]`` when fusing, else ``[B, P + K, C]``, in the order prefix tokens, kept tokens from the
        highest score to the lowest, fused token.

    Example:
        >>> x = torch.tensor([[[9.0], [1.0], [2.0], [3.0], [4.0]]])
        >>> scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
        >>> drop_tokens(x, scores, 2, num_prefix_tokens=1).flatten()
        tensor([9.0000, 2.0000, 4.0000, 0.7000])
    """
    return drop_in_order(
        x,
        scores,
        order_tokens(scores),
        num_kept,
        num_prefix_tokens=num_prefix_tokens,
        fuse=fuse,
        normalize=normalize,
    )


def order_tokens(scores: torch.Tensor) -> torch.Tensor:
    """Order patch tokens from the highest score to the lowest: indices ``[B, N - num_prefix_tokens]``."""
    return scores.argsort(dim=1, descending=True, stable=True)


def drop_in_order(
    x: torch.Tensor,
    scores: torch.Tensor,
    order: torch.Tensor,
    num_kept: int,
    *,
    num_prefix_tokens: int,
    fuse: bool,
    normalize: bool,
) -> torch.Tensor:
    """Do what :func:`drop_tokens` does, by an order that is known already."""
    prefix = torch.arange(num_prefix_tokens, device=x.device).expand(x.shape[0], -1)
    kept = take_tokens(x, torch.cat([prefix, order[:, :num_kept] + num_prefix_tokens], dim=1))
    if not fuse:
        return kept
    dropped = order[:, num_kept:]
    fused = fuse_tokens(take_tokens(x, dropped + num_prefix_tokens), scores.gather(1, dropped), normalize=normalize)
    return torch.cat([kept, fused], dim=1)


def fuse_tokens(tokens: torch.Tensor, weights: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """Sum tokens, each times its weight.

    Args:
        tokens: ``[B, M, C]``.
        weights: ``[B, M]``; gradient flows through them.
        normalize: Whether the weights are scaled to sum to 1; published BSR does not.

    Returns:
        The fused token ``[B, 1, C]``.

    Example:
        >>> fuse_tokens(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[0.1, 0.3]]), normalize=True)
        tensor([[[2.5000]]])
    """
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return (tokens * weights.unsqueeze(-1)).sum(dim=1, keepdim=True)


def take_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take tokens of ``x`` ``[B, N, C]`` by their indices ``[B, M]``."""
    # index_select copies whole rows and keeps only the index for backward, where gather would keep all of x.
    start = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + start).flatten()).view(*index.shape, -1)
