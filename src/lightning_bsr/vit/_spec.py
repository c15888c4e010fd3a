"""One row of the table of block classes: what the residual branches of a block are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_bsr.vit._attend import call_attention


@dataclass(frozen=True)
class BlockSpec:
    """The two residual branches of a transformer block, as attribute names in the order they are applied.

    A block described by a row computes ``x = x + attn(x)`` and then ``x = x + mlp(x)``. Of the attributes
    named, a module is called, a parameter or a number is multiplied, and ``None`` is skipped.

    Attributes:
        attn: Attribute names of the attention branch.
        mlp: Attribute names of the MLP branch.
        self_attention: The name in ``attn`` that holds the self-attention; it is given the extra arguments of
            the block's forward (attention mask and the like).
        attention_arguments: What makes of these keyword arguments those of the self-attention, given the block, where
            they differ.

    Example:
        >>> BlockSpec(attn=("norm1", "attn"), mlp=("norm2", "mlp")).self_attention
        'attn'
    """

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    self_attention: str = "attn"
    attention_arguments: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]] | None = None

    def attention_branch(self, block: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the attention branch of ``block`` on ``x`` ``[B, N, C]``, without the residual."""
        for name in self.attn:
            if name == self.self_attention:
                if self.attention_arguments is not None:
                    kwargs = self.attention_arguments(block, kwargs)
                x = call_attention(getattr(block, name), x, *args, **kwargs)
            else:
                x = _apply(getattr(block, name), x)
        return x

    def mlp_branch(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Compute the MLP branch of ``block`` on ``x`` ``[B, N, C]``, without the residual."""
        for name in self.mlp:
            x = _apply(getattr(block, name), x)
        return x

    def part_parameters(self, block: nn.Module, part: Literal["attn", "mlp"]) -> list[nn.Parameter]:
        """List the parameters of one branch of ``block``."""
        values = [getattr(block, name) for name in (self.attn if part == "attn" else self.mlp)]
        parameters = [value for value in values if isinstance(value, nn.Parameter)]
        return parameters + [p for value in values if isinstance(value, nn.Module) for p in value.parameters()]


def _apply(step: nn.Module | torch.Tensor | float | None, x: torch.Tensor) -> torch.Tensor:
    if step is None:
        return x
    return step(x) if isinstance(step, nn.Module) else x * step
