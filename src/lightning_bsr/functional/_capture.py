"""Sees the queries and keys of an attention layer at the moment it calls the fused attention."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class AttentionCapture(TorchFunctionMode):
    """While active, keeps the query, key and scale of each ``scaled_dot_product_attention`` call.

    The layer's own attention runs unchanged, so query and key arrive as the softmax sees them: after biases, norms
    and rotary embeddings.

    Attributes:
        calls: One ``(q, k, scale)`` a call, with q and k ``[B, H, N, D]``.
        masked: Whether a call had an attention mask or was causal.

    Example:
        >>> capture = AttentionCapture()
        >>> q = torch.zeros(1, 2, 5, 4)
        >>> with capture:
        ...     _ = F.scaled_dot_product_attention(q, q, q)
        >>> [(q.shape, scale) for q, k, scale in capture.calls]
        [(torch.Size([1, 2, 5, 4]), 0.5)]
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        self.masked = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.masked = self.masked or attn_mask is not None or is_causal
        self.calls.append((query, key, query.shape[-1] ** -0.5 if scale is None else scale))
