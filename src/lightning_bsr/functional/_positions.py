"""Where the tokens that are left came from: carried with them from block to block, and what is looked up by it."""

import torch

from lightning_bsr.functional._tokens import take_tokens
from lightning_bsr.vit import TokenTable

_BASE = 256  # every whole number up to this is exact in bfloat16
_FUSED = _BASE**2 - 1  # beyond the last token of any image


def join_positions(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Append the position of each token to its channels.

    A token and its position then go the same ways: through activation checkpointing, which runs a block again long
    after others, through a store of what blocks gave, through a compiled graph.

    Args:
        x: Tokens ``[B, N, C]``.
        positions: Where the tokens came from ``[B, N]``, whole numbers below 65,536.

    Returns:
        ``[B, N, C + 2]`` of the dtype of ``x``; the numbers are exact in it.

    Example:
        >>> join_positions(torch.zeros(1, 2, 1), torch.tensor([[3, 259]]))
        tensor([[[0., 0., 3.],
                 [0., 1., 3.]]])
    """
    digits = torch.stack([positions // _BASE, positions % _BASE], dim=-1)
    return torch.cat([x, digits.to(x.dtype)], dim=-1)


def split_positions(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Undo :func:`join_positions` for tokens of ``width`` channels; positions are ``None`` if there were none.

    Example:
        >>> split_positions(torch.tensor([[[0.0, 1.0, 3.0]]]), 1)
        (tensor([[[0.]]]), tensor([[259]]))
    """
    if x.shape[-1] == width:
        return x, None
    high, low = x[..., width:].detach().long().unbind(-1)
    return x[..., :width], high * _BASE + low


def drop_positions(
    positions: torch.Tensor,
    kept: torch.Tensor,
    num_prefix_tokens: int,
    *,
    fused: bool,
    gone: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do to positions what :func:`lightning_bsr.functional.drop_tokens` does to tokens.

    Args:
        positions: ``[B, N]``, prefix tokens first.
        kept: Which patch tokens are kept ``[B, K]``, in the order in which they go on.
        num_prefix_tokens: How many prefix tokens there are, P.
        fused: Whether a fused token is appended; its position is 65,535, which is beyond all others.
        gone: Which patch tokens stand behind these ``[B, M]``, if some do.

    Returns:
        ``[B, P + K + 1 + M]`` when fusing, else ``[B, P + K + M]``.

    Example:
        >>> drop_positions(torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[3, 0]]), 1, fused=True)
        tensor([[    0,     4,     1, 65535]])
    """
    left = [positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:].gather(1, kept)]
    if fused:
        left.append(positions.new_full((len(positions), 1), _FUSED))
    if gone is not None:
        left.append(positions[:, num_prefix_tokens:].gather(1, gone))
    return torch.cat(left, dim=1)


def put_back(x: torch.Tensor, positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Put all tokens of an image in their order, and leave out those that were made by fusing.

    Args:
        x: Tokens ``[B, M, C]``, among them all those of the image.
        positions: Where they came from ``[B, M]``.
        num_tokens: How many tokens the image has, N.

    Returns:
        ``[B, N, C]``.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
        >>> put_back(x, torch.tensor([[0, 2, 65535, 1]]), 3).flatten()
        tensor([1., 4., 2.])
    """
    return take_tokens(x, positions.argsort(dim=1)[:, :num_tokens])


def take_table(
    value: torch.Tensor | tuple[torch.Tensor, ...], spec: TokenTable, positions: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Give each sample the rows of its tokens, of a table that has one for each patch token.

    Args:
        value: ``[..., N, D]``, or a tuple of such tensors.
        spec: What is known of the table.
        positions: Positions of the patch tokens ``[B, M]``, counted without prefix tokens; N or more if fused.

    Returns:
        ``[B, M, D]``, or ``[B, 1 or H, M, D]`` if the table goes with queries; a tuple for a tuple.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> take_table(table, TokenTable("rope", neutral=(0.0, 1.0), per_head=False), torch.tensor([[1, 2]]))
        tensor([[[3., 4.],
                 [0., 1.]]])
    """
    if isinstance(value, tuple):
        pairs = zip(value, spec.neutral, strict=True)
        return tuple(_take_rows(table, (fill,), spec.per_head, positions) for table, fill in pairs)
    return _take_rows(value, spec.neutral, spec.per_head, positions)


def _take_rows(
    table: torch.Tensor, neutral: tuple[float, ...], per_head: bool, positions: torch.Tensor
) -> torch.Tensor:
    positions = positions.clamp(max=table.shape[-2])
    share = table.shape[-1] // len(neutral)
    row = torch.cat([table.new_full((share,), value) for value in neutral])
    table = torch.cat([table, row.expand(*table.shape[:-2], 1, -1)], dim=-2)
    if per_head and table.ndim == 3:  # a table for each head
        return table[:, positions].transpose(0, 1)
    if table.ndim == 2:
        return table[positions].unsqueeze(1) if per_head else table[positions]
    index = positions.view(len(positions), *(1,) * (table.ndim - 3), -1, 1)
    shape = (len(positions), *table.shape[1:-2])
    return table.expand(*shape, -1, -1).gather(-2, index.expand(*shape, -1, table.shape[-1]))


def take_mask(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Give each sample the rows and columns of its tokens, of a mask or a bias of all tokens.

    A fused token has no position: nothing is added to its attention, but what no token may attend, it may not either.

    Args:
        mask: Bool or float, ``[1 or N, N]``, or that with heads or with a batch and heads before.
        positions: Positions of the tokens ``[B, M]``; N or more if fused.

    Returns:
        ``[B, 1 or H, 1 or M, M]``.

    Example:
        >>> take_mask(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 2]]))
        tensor([[[[4., 0.],
                  [0., 0.]]]])
    """
    mask = mask[(None,) * (4 - mask.ndim)]
    row, column = _neutral(mask, -2), _neutral(mask, -1)
    mask = torch.cat([mask, column], dim=-1)
    positions = positions.clamp(max=mask.shape[-1] - 1)
    columns = positions.unsqueeze(1)
    rows = torch.zeros_like(columns[:, :, :1])
    if mask.shape[-2] > 1:
        corner = torch.ones_like(row[..., :1]) if mask.dtype == torch.bool else torch.zeros_like(row[..., :1])
        mask = torch.cat([mask, torch.cat([row, corner], dim=-1)], dim=-2)
        rows = positions.unsqueeze(2)
    if len(mask) == 1:
        return mask[0][:, rows, columns].transpose(0, 1)
    batch = torch.arange(len(mask), device=mask.device).view(-1, 1, 1)
    return mask[batch, :, rows, columns].permute(0, 3, 1, 2)


def _neutral(mask: torch.Tensor, dim: int) -> torch.Tensor:
    """Make a row or column that adds nothing, and allows nothing where all the others allow nothing."""
    if mask.dtype == torch.bool:
        return mask.any(dim=dim, keepdim=True)
    highest = mask.detach().amax(dim=dim, keepdim=True)
    return torch.zeros_like(highest).masked_fill(is_masked(highest), torch.finfo(mask.dtype).min)


def is_masked(mask: torch.Tensor) -> torch.Tensor:
    """Say where a mask, bool or added, allows no attention."""
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2


def keep_valid(valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Give each sample what is said of its tokens, of what is said of all patches; a fused token of padding is padding.

    Args:
        valid: Which patches are no padding ``[B, N]``.
        positions: Positions of the patch tokens ``[B, M]``, counted without prefix tokens; N or more if fused.

    Returns:
        ``[B, M]``.

    Example:
        >>> keep_valid(torch.tensor([[True, True, False]]), torch.tensor([[2, 0, 9]]))
        tensor([[False,  True,  True]])
    """
    fused = positions >= valid.shape[1]
    kept = valid.gather(1, positions.clamp(max=valid.shape[1] - 1)) & ~fused
    some_left = valid.sum(dim=1, keepdim=True) > kept.sum(dim=1, keepdim=True)
    return kept | (fused & some_left)
