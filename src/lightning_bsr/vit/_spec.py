"""One row of the table of block classes: what the residual branches of a block are made of."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_bsr.vit._attend import call_attention


@dataclass(frozen=True)
class TokenTable:
    """An argument of a block's forward that has a row for each patch token, such as rotary embeddings.

    Once tokens are dropped, each sample gets the rows of the tokens that it has left. A fused token has no position of
    its own; its row is the one that changes nothing.

    Attributes:
        name: The name of the argument: a tensor ``[..., N, D]``, or a tuple of such tensors.
        neutral: What the row of a fused token holds: each value fills an equal share of the D columns, or one tensor
            of the tuple. A rotation by no angle is ``(0, 1)`` for a sine beside a cosine.
        per_head: Whether the tensor goes with queries ``[B, H, N, D]``, and not with tokens ``[B, N, D]``.

    Example:
        >>> TokenTable("rope", neutral=(0.0, 1.0))
        TokenTable(name='rope', neutral=(0.0, 1.0), per_head=True)
    """

    name: str
    neutral: tuple[float, ...]
    per_head: bool = True


@dataclass(frozen=True)
class BlockSpec:
    """The two residual branches of a transformer block, as attribute names in the order they are applied.

    A block described by a row computes ``x = x + attn(x)`` and then ``x = x + mlp(x)``. Of the attributes
    named, a module is called, a parameter or a number is multiplied, and ``None`` is skipped; of a list of modules,
    each is called on the same tokens and the results are added.

    A row whose ``mlp`` is empty stands for a block that computes both in one branch; it is only ever run whole.

    Attributes:
        attn: Attribute names of the attention branch.
        mlp: Attribute names of the MLP branch.
        self_attention: The name in ``attn`` that holds the self-attention; it is given the extra arguments of
            the block's forward (attention mask and the like). In a list of modules, it is their child ``attn`` that is.
        tables: The arguments of the block's forward that have a row for each patch token.
        biases: Those that hold a bias for each pair of positions, the same for all images.
        attention_arguments: What makes of these keyword arguments those of the self-attention, given the block, where
            they differ.
        keeps_tokens: Why tokens cannot be dropped in such blocks, as the end of a sentence; empty where they can.

    Example:
        >>> BlockSpec(attn=("norm1", "attn"), mlp=("norm2", "mlp")).self_attention
        'attn'
    """

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    self_attention: str = "attn"
    tables: tuple[TokenTable, ...] = ()
    biases: tuple[str, ...] = ()
    attention_arguments: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]] | None = None
    keeps_tokens: str = ""

    @property
    def is_one_branch(self) -> bool:
        """Whether the attention and the MLP are computed in one branch."""
        return not self.mlp

    def attention_branch(self, block: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the attention branch of ``block`` on ``x`` ``[B, N, C]``, without the residual."""
        for name in self.attn:
            step = getattr(block, name)
            if name != self.self_attention:
                x = _apply(step, x)
            elif isinstance(step, nn.ModuleList):
                x = torch.stack([_attend(branch, x, *args, **kwargs) for branch in step]).sum(dim=0)
            else:
                if self.attention_arguments is not None:
                    kwargs = self.attention_arguments(block, kwargs)
                x = call_attention(step, x, *args, **kwargs)
        return x

    def mlp_branch(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Compute the MLP branch of ``block`` on ``x`` ``[B, N, C]``, without the residual."""
        for name in self.mlp:
            x = _apply(getattr(block, name), x)
        return x

    def attentions(self, block: nn.Module) -> Iterator[nn.Module]:
        """Yield what computes the self-attention of ``block``: the block itself if it has one branch."""
        if self.is_one_branch:
            yield block
            return
        attention = getattr(block, self.self_attention)
        if isinstance(attention, nn.ModuleList):
            yield from (branch.get_submodule("attn") for branch in attention)
        else:
            yield attention

    def part_parameters(self, block: nn.Module, part: Literal["attn", "mlp"]) -> list[nn.Parameter]:
        """List the parameters of one branch of ``block``; those of its only branch count as the attention's."""
        if self.is_one_branch:
            return list(block.parameters()) if part == "attn" else []
        values = [getattr(block, name) for name in (self.attn if part == "attn" else self.mlp)]
        parameters = [value for value in values if isinstance(value, nn.Parameter)]
        return parameters + [p for value in values if isinstance(value, nn.Module) for p in value.parameters()]


def _apply(step: nn.Module | torch.Tensor | float | None, x: torch.Tensor) -> torch.Tensor:
    if step is None:
        return x
    if isinstance(step, nn.ModuleList):
        return torch.stack([branch(x) for branch in step]).sum(dim=0)
    return step(x) if isinstance(step, nn.Module) else x * step


def _attend(branch: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    for name, step in branch.named_children():
        x = step(x, *args, **kwargs) if name == "attn" else step(x)
    return x
