"""What a block is given beside tokens, as far as it says the same of every image: positions, not masks of padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_bsr.vit import BlockSpec

Given = torch.Tensor | tuple[int, ...]
"""Positions, or the size of an image."""


def given_to_all(
    spec: BlockSpec, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Given] | None:
    """List the values that a block's forward is given beside tokens, if all of them hold for every image of the batch.

    Args:
        spec: What the block is made of.
        names: The names of the forward's arguments after the tokens.
        args: Values by their place.
        kwargs: Values by their name.

    Returns:
        Tensors and tuples of whole numbers; ``None`` if there is something else, such as a mask of each image's own.

    Example:
        >>> from lightning_bsr.vit import TokenTable
        >>> spec = BlockSpec((), (), tables=(TokenTable("rope", neutral=(0.0, 1.0)),))
        >>> given_to_all(spec, ["rope", "attn_mask"], [torch.ones(1, 2)], {"attn_mask": None})
        [tensor([[1., 1.]])]
        >>> given_to_all(spec, ["rope", "attn_mask"], [torch.ones(1, 2)], {"attn_mask": torch.ones(8, 1, 1, 1)})
    """
    most_dims = {table.name: 3 if table.per_head else 2 for table in spec.tables} | dict.fromkeys(spec.biases, 3)
    if len(args) > len(names):
        return None
    found: list[Given] = []
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if value is None or value is False:
            continue
        if isinstance(value, tuple) and all(type(one) is int for one in value):
            found.append(value)
            continue
        tensors = value if isinstance(value, tuple) else (value,)
        # A dimension more than positions need is that of the batch.
        if name not in most_dims or any(tensor.ndim > most_dims[name] and len(tensor) > 1 for tensor in tensors):
            return None
        found += tensors
    return found
