"""Sees the queries and keys of an attention layer, and fits its mask, at the moment it calls the fused attention."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lightning_bsr.functional._positions import take_mask


class AttentionCall(NamedTuple):
    """What a softmax is taken of: ``q @ k.T * scale + mask``.

    Attributes:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, N, D]``.
        scale: The factor on their products.
        mask: A bias, or what may be attended, that goes with ``[B, H, N, N]``; or ``None``.
        is_causal: Whether each token attends only those before it.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    mask: torch.Tensor | None
    is_causal: bool


class PositionedMasks(TorchFunctionMode):
    """While active, masks that ``scaled_dot_product_attention`` is called with are those of the tokens that are left.

    So a bias of all positions fits, even one that the attention builds itself.

    Args:
        positions: Positions of the tokens that are left ``[B, N]``; ``None`` if all are.
    """

    def __init__(self, positions: torch.Tensor | None) -> None:
        super().__init__()
        self.positions = positions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        run = self.attend if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """Call ``scaled_dot_product_attention``, with the mask that fits."""
        if attn_mask is not None and self.positions is not None:
            attn_mask = take_mask(attn_mask, self.positions)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def active_masks() -> list[PositionedMasks]:
    """List what fits masks now, for those who will call a function again when it is no longer active."""
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, PositionedMasks)]


class AttentionCapture(PositionedMasks):
    """While active, also keeps what each ``scaled_dot_product_attention`` call was given.

    The layer's own attention runs unchanged, so query and key arrive as the softmax sees them: after biases, norms
    and rotary embeddings.

    Attributes:
        calls: What each call was given.

    Example:
        >>> capture = AttentionCapture()
        >>> q = torch.zeros(1, 2, 5, 4)
        >>> with capture:
        ...     _ = F.scaled_dot_product_attention(q, q, q)
        >>> [(call.q.shape, call.scale) for call in capture.calls]
        [(torch.Size([1, 2, 5, 4]), 0.5)]
    """

    def __init__(self, positions: torch.Tensor | None = None) -> None:
        super().__init__(positions)
        self.calls: list[AttentionCall] = []

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """Call ``scaled_dot_product_attention``, with the mask that fits, and keep what the softmax is taken of."""
        if attn_mask is not None and self.positions is not None:
            attn_mask = take_mask(attn_mask, self.positions)
        scale = options.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.calls.append(AttentionCall(query, key, scale, attn_mask, is_causal))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
