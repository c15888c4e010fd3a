"""Drops tokens inside chosen blocks of a ViT, between the attention and the MLP."""

from collections.abc import Sequence
from typing import get_args

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._drop_forward import (
    RESTORES,
    SKIPS,
    PositionsForward,
    Score,
    TokenDropForward,
    drops_tokens,
)
from lightning_bsr.functional._forward import attach_forward, forward_chain, replaced_by_others, unwrap_forward
from lightning_bsr.functional._outputs import attach_outputs, check_outputs, detach_outputs
from lightning_bsr.functional._restore import RestoringForward
from lightning_bsr.functional._tokens import num_kept_tokens
from lightning_bsr.vit import ViTView, find_vit


class TokenDropHandle:
    """What :func:`install_token_drop` put into a ViT, and the way back.

    Attributes:
        view: The ViT.
        forwards: The forward of each dropping block, by block index.
        restore: Whether dropped tokens are put back after the last block.
    """

    def __init__(self, view: ViTView, forwards: dict[int, TokenDropForward], restore: bool) -> None:
        self.view = view
        self.forwards = forwards
        self.restore = restore
        for forward in forwards.values():
            attach_forward(forward)
        first = min(forwards, default=len(view.blocks))
        _attach_positions(view, first, restore)
        if restore:
            _attach_restoring(view, forwards)
        attach_outputs(view, restored_from=first if restore else None)

    @property
    def keep_rates(self) -> dict[int, float]:
        """The keep rate of each dropping block; :meth:`set_keep_rates` changes them."""
        return {index: forward.keep_rate for index, forward in self.forwards.items()}

    def set_keep_rates(self, keep_rates: dict[int, float]) -> None:
        """Change the keep rates, by block index.

        Raises:
            ConfigurationError: If a rate is out of range or a block drops no tokens. Nothing has changed then.
        """
        for index, keep_rate in keep_rates.items():
            _check_rate(keep_rate)
            if index not in self.forwards:
                raise ConfigurationError(
                    f"keep_rates has block {index}, but tokens are dropped in blocks {list(self.forwards)}."
                )
        for index, keep_rate in keep_rates.items():
            self.forwards[index].keep_rate = keep_rate

    def num_tokens(self, num_patch_tokens: int) -> list[int]:
        """Count all tokens after each block, for an image of ``num_patch_tokens`` patches."""
        counts = self._num_left(num_patch_tokens)
        return [*counts[:-1], self.view.num_prefix_tokens + num_patch_tokens] if self.restore else counts

    def _num_left(self, num_patch_tokens: int) -> list[int]:
        counts = []
        for index in range(len(self.view.blocks)):
            if index in self.forwards:
                forward = self.forwards[index]
                kept = num_kept_tokens(num_patch_tokens, forward.keep_rate)
                num_patch_tokens = kept + (forward.fuse and kept < num_patch_tokens)
            counts.append(self.view.num_prefix_tokens + num_patch_tokens)
        return counts

    def remove(self) -> None:
        """Give each block its own forward again; a second call does nothing."""
        for drop in self.forwards.values():
            unwrap_forward(drop)
        if any(map(drops_tokens, self.view.blocks)):
            return
        for block in self.view.blocks:
            for forward in list(forward_chain(block)):
                if isinstance(forward, (PositionsForward, RestoringForward)):
                    unwrap_forward(forward)
        detach_outputs(self.view)

    def __str__(self) -> str:
        if not self.forwards:
            return f"no block of the {self.view.name} drops tokens"
        shares = [f"{rate:g}" for rate in self.keep_rates.values()]
        shares = shares[:1] if len(set(shares)) == 1 else shares
        blocks, keep = ("block", "keeps") if len(self.forwards) == 1 else ("blocks", "keep")
        indices = ", ".join(map(str, self.forwards))
        text = f"{blocks} {indices} of the {self.view.name} {keep} {', '.join(shares)} of the patch tokens"
        patches = self.view.num_patch_tokens
        if patches is None:
            return text
        counts = self._num_left(patches)
        whole = patches + self.view.num_prefix_tokens
        steps = [whole, *(counts[index] for index in self.forwards), *([whole] if self.restore else [])]
        return f"{text}: {' -> '.join(map(str, steps))} tokens"


def install_token_drop(
    module: nn.Module,
    blocks: Sequence[int],
    keep_rate: float | Sequence[float],
    *,
    fuse: bool = True,
    score: Score = "auto",
    detach: bool = False,
    normalize: bool = False,
    restore: bool = False,
    vit: str | None = None,
) -> TokenDropHandle:
    """Drop patch tokens inside blocks of the ViT in ``module``, in training and evaluation alike.

    In each of ``blocks``, after the attention's residual and before the MLP, the ``ceil(keep_rate * patches)`` patch
    tokens of the highest scores go on; the others are dropped, or fused into one token (arXiv 2405.10951). Prefix
    tokens are never dropped. The defaults are exactly the published semantics. ``keep_rate=1`` leaves a block exactly
    as it is. A block that computes attention and MLP in one branch drops at its output.

    What later blocks are given for each position, such as rotary embeddings, attention masks and relative-position
    biases, is looked up for the tokens that are left. For that, tokens carry their positions in two more channels from
    one block to the next. A fused token has no position: its rotation is by no angle and its bias is zero.

    Args:
        module: Any module that holds a ViT.
        blocks: Indices of the blocks that drop; negative ones count from the end.
        keep_rate: The share of patch tokens that is kept, above 0 and at most 1; one, or one a block.
        fuse: Whether the dropped tokens go on as one, their sum weighted by the scores.
        score: ``"cls"``: the attention of the class token; ``"mean"``: the attention that a token receives from all,
            which carries no gradient; ``"auto"``: the first if there is a class token, else the second; ``"random"``:
            a control.
        detach: Whether gradient is kept from flowing through the weights of the fused token.
        normalize: Whether the weights of the fused token are scaled to sum to 1.
        restore: Whether the last block's output has all tokens again, in their order and without fused ones, for heads
            that need each patch in its place. A dropped token comes back as it was when it was dropped, after that
            block's attention.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, the arguments do not fit it, or a block's forward is already
            replaced. Nothing has changed then.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_token_drop(model, [1, 3], 0.5)
        >>> print(handle)
        blocks 1, 3 of the ViT (VisionTransformer) keep 0.5 of the patch tokens: 101 -> 52 -> 28 tokens
        >>> model(torch.zeros(2, 3, 160, 160)).shape
        torch.Size([2, 10])
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    view.check_drops_tokens()
    if not restore:
        check_outputs(view)
    rates = _rates(view, blocks, keep_rate)
    score = _resolve_score(view, score)
    for index in rates:
        _check_block(view, index, score)
    if rates:
        _check_places(view, min(rates), restore)
        _check_restore(view, restore)
    forwards = {
        index: TokenDropForward(
            view.blocks[index],
            view.specs[index],
            f"Block {index} of the {view.name}",
            view.num_prefix_tokens,
            rate,
            fuse,
            score,
            detach,
            normalize,
            restore,
            gives_hidden_states=view.places is not None,
        )
        for index, rate in rates.items()
    }
    return TokenDropHandle(view, forwards, restore)


def _rates(view: ViTView, blocks: Sequence[int], keep_rate: float | Sequence[float]) -> dict[int, float]:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise ConfigurationError(f"blocks is {blocks!r}, expected a list of block indices.")
    rates = list(keep_rate) if isinstance(keep_rate, Sequence) else [keep_rate] * len(blocks)
    if len(rates) != len(blocks):
        raise ConfigurationError(
            f"keep_rate has {len(rates)} values for {len(blocks)} blocks, expected one, or one a block."
        )
    for rate in rates:
        _check_rate(rate)
    indices = view.block_indices(blocks)
    given = dict(zip((index % len(view.blocks) for index in blocks), rates, strict=True))
    return {index: float(given[index]) for index in indices}


def _check_rate(rate: object) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise ConfigurationError(f"keep_rate is {rate!r}, expected a number above 0 and at most 1.")


def _resolve_score(view: ViTView, score: Score) -> Score:
    if score not in get_args(Score):
        raise ConfigurationError(f"score is {score!r}, expected one of {', '.join(map(repr, get_args(Score)))}.")
    if score == "cls" and not view.has_class_token:
        raise ConfigurationError(
            f"score is 'cls', but the {view.name} has no class token; use score='mean' or score='random'."
        )
    if score == "auto":
        return "cls" if view.has_class_token else "mean"
    return score


def _check_block(view: ViTView, index: int, score: Score) -> None:
    block = view.blocks[index]
    if drops_tokens(block):
        raise ConfigurationError(f"Block {index} of the {view.name} drops tokens already; remove that first.")
    if (other := replaced_by_others(block)) is not None:
        raise ConfigurationError(
            f"Block {index} of the {view.name} has its forward replaced by {other}; undo that first."
        )
    if view.specs[index].tables and view.width is None:
        names = ", ".join(table.name for table in view.specs[index].tables)
        raise ConfigurationError(
            f"The {view.name} has no integer embed_dim, by which its tokens could carry the positions that {names} "
            "is looked up by; add one."
        )
    attentions = list(view.specs[index].attentions(block))
    if score != "random" and not all(getattr(attention, "fused_attn", True) for attention in attentions):
        raise ConfigurationError(
            f"Block {index} of the {view.name} does not use scaled_dot_product_attention, where tokens get their "
            "scores; set fused_attn = True on its attention, or leave TIMM_FUSED_ATTN unset."
        )
    implementations = {getattr(getattr(a, "config", None), "_attn_implementation", "sdpa") for a in attentions}
    if score != "random" and implementations != {"sdpa"}:
        raise ConfigurationError(
            f"Block {index} of the {view.name} has attn_implementation={min(implementations)!r}, expected 'sdpa', "
            "which calls scaled_dot_product_attention, where tokens get their scores; build the model with "
            "attn_implementation='sdpa', or call its set_attn_implementation('sdpa')."
        )


def _check_places(view: ViTView, first: int, restore: bool) -> None:
    """Refuse to leave out tokens that something is known to look for in their places."""
    if view.places is None:
        return
    last = len(view.blocks) - 1
    if not restore:
        raise ConfigurationError(
            f"A token drop would leave the {view.name} with fewer tokens, but {view.places.reader}; give restore=True, "
            "by which dropped tokens are put back to their places after the last block."
        )
    if view.places.blocks is None or any(first <= block < last for block in view.places.blocks):
        raise ConfigurationError(
            f"A token drop in block {first} of the {view.name} would leave out tokens until the last block, {last}, "
            f"but {view.places.reader}, also of blocks in between; drop tokens in no block before these."
        )


def _check_restore(view: ViTView, restore: bool) -> None:
    present = [forward for block in view.blocks for forward in forward_chain(block)]
    restores = any(RESTORES in forward.effects for forward in present)
    if restores or (restore and any(map(drops_tokens, view.blocks))):
        raise ConfigurationError(
            f"The {view.name} drops tokens already, {'with' if restores else 'without'} restore=True; give all blocks "
            "that drop at once where dropped tokens are to be put back."
        )
    if not restore:
        return
    if view.width is None:
        raise ConfigurationError(
            f"The {view.name} has no integer embed_dim, by which its tokens could carry the positions to which they "
            "are put back; add one."
        )
    if any(SKIPS in forward.effects for forward in forward_chain(view.blocks[-1])):
        raise ConfigurationError(
            f"The last block of the {view.name} {SKIPS}, so dropped tokens cannot be put back after it; remove that "
            "first."
        )


def _attach_positions(view: ViTView, first: int, restore: bool) -> None:
    """Let every block from the first that drops tokens on find what belongs to the tokens that are left."""
    if view.width is None:
        return
    last = len(view.blocks) - 1
    for index, (block, spec) in enumerate(zip(view.blocks, view.specs, strict=True)):
        if index >= first and not any(isinstance(f, PositionsForward) for f in forward_chain(block)):
            is_end = index == last and not restore
            attach_forward(PositionsForward(block, spec, view.width, view.num_prefix_tokens, is_end))


def _attach_restoring(view: ViTView, drops: dict[int, TokenDropForward]) -> None:
    assert view.width is not None
    last = len(view.blocks) - 1
    for index in range(min(drops, default=len(view.blocks)), len(view.blocks)):
        before = [drop for block, drop in drops.items() if block < index]
        attach_forward(
            RestoringForward(view.blocks[index], view.width, view.num_prefix_tokens, before, is_last=index == last)
        )
