"""Scores of patch tokens, from the queries and keys of one attention layer."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lightning_bsr.functional._positions import is_masked


class _Logits(torch.autograd.Function):
    """``scale q k^T`` for one query, keeping for backward no copy of the keys, which a product of matrices would."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = scale
        return ((q * scale) @ k.transpose(-2, -1))[:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k = ctx.saved_tensors
        # Autocast multiplies in its own type what rotary embeddings have left in fp32.
        grad = grad.to(k.dtype)
        return grad.unsqueeze(2) @ k * ctx.scale, grad.unsqueeze(-1) * (q * ctx.scale), None


def cls_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, num_prefix_tokens: int, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Score each patch token by the attention that the class token pays it, mean over heads.

    The softmax runs over all tokens and the prefix tokens are cut off afterwards, as in the published code of Block
    Selective Reprogramming (arXiv 2405.10951). Only the class token's row is computed, so the cost is O(N).

    Args:
        q: Queries ``[B, H, N, D]``; the class token is the first.
        k: Keys ``[B, H, N, D]``.
        scale: The factor on ``q @ k.T``.
        num_prefix_tokens: How many tokens come before the patch tokens, at least 1.
        mask: What is added to ``q @ k.T * scale``, or where attention is allowed; it goes with ``[B, H, N, N]``.

    Returns:
        Scores ``[B, N - num_prefix_tokens]``.

    Example:
        >>> q, k = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)
        >>> cls_scores(q, k, 0.5, num_prefix_tokens=1)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        row = _Logits.apply(q[:, :, :1], k, scale)
    else:
        # A product of matrices may differ in the last bit with the image's place in the batch; what frozen blocks give
        # may be stored, and must not. A compiler makes no copy of the keys for this sum, and none of the products.
        row = (q[:, :, :1] * k).sum(dim=-1) * scale
    attention = _softmax(row.unsqueeze(2), None if mask is None else mask[..., :1, :]).squeeze(2)
    scores: torch.Tensor = attention[:, :, num_prefix_tokens:].mean(dim=1)
    return scores


def mean_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    num_prefix_tokens: int,
    chunk_size: int = 64,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score each patch token by the attention that it receives, mean over heads and queries.

    For models without a class token. The N x N matrix is never held: queries are taken ``chunk_size`` at a time. A
    token that no token may attend, such as padding, does not count as a query.

    Args:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, N, D]``.
        scale: The factor on ``q @ k.T``.
        num_prefix_tokens: How many tokens come before the patch tokens.
        chunk_size: Queries handled at a time.
        mask: What is added to ``q @ k.T * scale``, or where attention is allowed; it goes with ``[B, H, N, N]``.

    Returns:
        Scores ``[B, N - num_prefix_tokens]``.

    Example:
        >>> q, k = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)
        >>> mean_scores(q, k, 0.5, num_prefix_tokens=0)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000, 0.2000]])
    """
    keys = k.transpose(-2, -1)
    parts = torch.split(q, chunk_size, dim=2)
    if mask is None:
        received = sum(((part * scale) @ keys).softmax(dim=-1).sum(dim=(1, 2)) for part in parts)
        assert isinstance(received, torch.Tensor)
        return received[:, num_prefix_tokens:] / (q.shape[1] * q.shape[2])
    masks = [mask] * len(parts) if mask.shape[-2] == 1 else torch.split(mask, chunk_size, dim=-2)
    asks = (~is_masked(mask)).any(dim=-2).expand(q.shape[:3])
    received = sum(
        (_softmax((part * scale) @ keys, its_mask) * its_asks.unsqueeze(-1)).sum(dim=(1, 2))
        for part, its_mask, its_asks in zip(parts, masks, torch.split(asks, chunk_size, dim=2), strict=True)
    )
    assert isinstance(received, torch.Tensor)
    return received[:, num_prefix_tokens:] / asks.sum(dim=(1, 2)).unsqueeze(1)


def random_scores(x: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Score patch tokens at random, as a control for the other scores.

    Like a row of attention the scores are positive and, over all N tokens, sum to 1, so that a fused token has the
    size that it has with the other scores.

    Args:
        x: Tokens ``[B, N, C]``; only the shape and the device are used.
        num_prefix_tokens: How many tokens come before the patch tokens.

    Returns:
        Scores ``[B, N - num_prefix_tokens]``.

    Example:
        >>> random_scores(torch.zeros(1, 5, 4), num_prefix_tokens=1).shape
        torch.Size([1, 4])
    """
    scores = torch.rand(x.shape[:2], device=x.device)
    return (scores / scores.sum(dim=1, keepdim=True))[:, num_prefix_tokens:]


def _softmax(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return logits.softmax(dim=-1)
    if mask.dtype != torch.bool:
        logits = logits + mask
    # Not infinite, so that a row in which all is masked holds numbers.
    return logits.masked_fill(is_masked(mask), torch.finfo(logits.dtype).min).softmax(dim=-1)
