"""The table of block classes: one row says what the two residual branches of a block are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import nn

from lightning_bsr._errors import ConfigurationError


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

    Example:
        >>> BlockSpec(attn=("norm1", "attn"), mlp=("norm2", "mlp")).self_attention
        'attn'
    """

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    self_attention: str = "attn"

    def attention_branch(self, block: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the attention branch of ``block`` on ``x`` ``[B, N, C]``, without the residual."""
        for name in self.attn:
            if name == self.self_attention:
                x = getattr(block, name)(x, *args, **kwargs)
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


_REGISTRY: dict[type[nn.Module], BlockSpec] = {
    Block: BlockSpec(
        attn=("norm1", "attn", "ls1", "drop_path1"),
        mlp=("norm2", "mlp", "ls2", "drop_path2"),
    ),
}


def register_block(
    block_class: type[nn.Module],
    *,
    attn: Sequence[str],
    mlp: Sequence[str],
    self_attention: str = "attn",
) -> None:
    """Teach the package a block class of your own.

    The block must compute ``x = x + attn(x)``, then ``x = x + mlp(x)``, on tokens ``[B, N, C]``, with its
    self-attention done by :func:`torch.nn.functional.scaled_dot_product_attention`. The module that owns the list of
    blocks must have an integer ``num_prefix_tokens`` (class, distillation and register tokens, which come first)
    and, if the first of them is a class token, a ``cls_token`` that is not ``None``.

    Args:
        block_class: The class whose ``forward`` the row describes; a subclass that overrides ``forward`` needs a
            row of its own.
        attn: Attribute names of the attention branch, in the order they are applied.
        mlp: Attribute names of the MLP branch, in the order they are applied.
        self_attention: The name in ``attn`` that holds the self-attention.

    Raises:
        ConfigurationError: If ``self_attention`` is not in ``attn``, or ``block_class`` has no ``forward``.

    Example:
        >>> from timm.models.vision_transformer import Block
        >>> class MyBlock(Block):
        ...     def forward(self, x):
        ...         x = x + self.attn(self.norm1(x))
        ...         return x + self.mlp(self.norm2(x))
        >>> register_block(MyBlock, attn=["norm1", "attn"], mlp=["norm2", "mlp"])
    """
    if "forward" not in vars(block_class):
        raise ConfigurationError(
            f"register_block was given {block_class.__qualname__}, which defines no forward of its own; register the "
            "class that does."
        )
    if self_attention not in attn:
        raise ConfigurationError(
            f"register_block was given self_attention={self_attention!r}, which is not in attn="
            f"{list(attn)}; name the attribute of the attention branch that holds the self-attention."
        )
    _REGISTRY[block_class] = BlockSpec(tuple(attn), tuple(mlp), self_attention)


def registered_blocks() -> list[str]:
    """List the full names of the block classes that are known.

    Example:
        >>> "timm.models.vision_transformer.Block" in registered_blocks()
        True
    """
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in _REGISTRY]


def spec_of(block: nn.Module) -> BlockSpec | None:
    """Return the row for ``block``, or ``None`` if the class that defines its forward is not registered."""
    for cls in type(block).__mro__:
        if "forward" in vars(cls):
            return _REGISTRY.get(cls)
    return None


def _apply(step: nn.Module | torch.Tensor | float | None, x: torch.Tensor) -> torch.Tensor:
    if step is None:
        return x
    return step(x) if isinstance(step, nn.Module) else x * step
