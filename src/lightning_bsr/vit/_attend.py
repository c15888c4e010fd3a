"""Calls the self-attention of a block, whatever it wants to be given and gives back."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def call_attention(attention: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the self-attention of ``x`` ``[B, N, C]``, without its weights.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(1, 5, 8)
        >>> torch.allclose(call_attention(attention, x), attention(x, x, x)[0], atol=1e-6)
        True
    """
    if isinstance(attention, nn.MultiheadAttention):
        return _multihead(attention, x)
    out: torch.Tensor | tuple[torch.Tensor, ...] = attention(x, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _multihead(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    # Its own forward is one call for torch functions modes, in which they see no linear layer and no fused attention.
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=attention.dropout if attention.training else 0.0)
    return F.linear(out.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)
