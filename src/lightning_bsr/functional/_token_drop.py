"""Drops tokens inside chosen blocks of a ViT, between the attention and the MLP."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._capture import AttentionCapture
from lightning_bsr.functional._forward import (
    BlockForward,
    attach_forward,
    forward_chain,
    replaced_by_others,
    unwrap_forward,
)
from lightning_bsr.functional._scores import cls_scores, mean_scores, random_scores
from lightning_bsr.functional._tokens import drop_tokens, num_kept_tokens
from lightning_bsr.vit import BlockSpec, ViTView, find_vit

Score = Literal["cls", "mean", "random"]


class TokenDropForward(BlockForward):
    """The forward of a block that drops tokens.

    It holds no state of a step, so that a block may run twice (activation checkpointing) and so that modules that
    carry it can be deep-copied, pickled, compiled and exported.
    """

    rank = 1

    def __init__(
        self,
        block: nn.Module,
        spec: BlockSpec,
        name: str,
        num_prefix_tokens: int,
        keep_rate: float,
        fuse: bool,
        score: Score,
        detach: bool,
        normalize: bool,
    ) -> None:
        super().__init__(block)
        self.spec = spec
        self.name = name
        self.num_prefix_tokens = num_prefix_tokens
        self.keep_rate = keep_rate
        self.fuse = fuse
        self.score = score
        # Without fusion the scores reach the output only through indices, which carry no gradient.
        self.detach = detach or not fuse or score == "mean"
        self.normalize = normalize

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        num_patches = x.shape[1] - self.num_prefix_tokens
        num_kept = num_kept_tokens(num_patches, self.keep_rate)
        if num_kept >= num_patches:
            return self.call_inner(x, *args, **kwargs)

        attention, scores = self.run_half("attn", partial(self._attend, args, kwargs), x)
        x = drop_tokens(
            x + attention,
            scores,
            num_kept,
            num_prefix_tokens=self.num_prefix_tokens,
            fuse=self.fuse,
            normalize=self.normalize,
        )
        return x + self.run_half("mlp", partial(self.spec.mlp_branch, self.block), x)

    def _attend(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        capture = AttentionCapture()
        with capture:
            attention = self.spec.attention_branch(self.block, x, *args, **kwargs)
        return attention, self._scores(x, capture)

    def _scores(self, x: torch.Tensor, capture: AttentionCapture) -> torch.Tensor:
        if self.score == "random":
            return random_scores(x, self.num_prefix_tokens)
        if len(capture.calls) != 1:
            raise ConfigurationError(
                f"{self.name} called scaled_dot_product_attention {len(capture.calls)} times, expected once: its "
                f"attention ({type(getattr(self.block, self.spec.self_attention)).__name__}) gives no scores to drop "
                "tokens by; choose other blocks, or score='random'."
            )
        if capture.masked:
            raise ConfigurationError(
                f"{self.name} was given an attention mask, which would not fit the tokens that are left; drop tokens "
                "only in a model that is called without a mask."
            )
        q, k, scale = capture.calls[0]
        if self.detach:
            q, k = q.detach(), k.detach()
        scores = cls_scores if self.score == "cls" else mean_scores
        return scores(q, k, scale, self.num_prefix_tokens)


class DenseOutputRefused:
    """Stands in for ``forward_intermediates`` while tokens are dropped: its feature maps would be wrong."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigurationError(
            f"The {self.name} drops tokens, so its feature maps would miss some patches; remove the token drop before "
            "calling forward_intermediates or extracting features."
        )


class TokenDropHandle:
    """What :func:`install_token_drop` put into a ViT, and the way back.

    Attributes:
        view: The ViT.
        forwards: The forward of each dropping block, by block index.
    """

    def __init__(self, view: ViTView, forwards: dict[int, TokenDropForward]) -> None:
        self.view = view
        self.forwards = forwards
        for forward in forwards.values():
            attach_forward(forward)
        if hasattr(view.model, "forward_intermediates") and "forward_intermediates" not in vars(view.model):
            view.model.forward_intermediates = DenseOutputRefused(view.name)  # type: ignore[assignment]

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
        for forward in self.forwards.values():
            unwrap_forward(forward)
        others_drop = any(isinstance(f, TokenDropForward) for block in self.view.blocks for f in forward_chain(block))
        if not others_drop and isinstance(vars(self.view.model).get("forward_intermediates"), DenseOutputRefused):
            del self.view.model.forward_intermediates

    def __str__(self) -> str:
        if not self.forwards:
            return f"no block of the {self.view.name} drops tokens"
        shares = [f"{rate:g}" for rate in self.keep_rates.values()]
        shares = shares[:1] if len(set(shares)) == 1 else shares
        blocks = ", ".join(map(str, self.forwards))
        text = f"blocks {blocks} of the {self.view.name} keep {', '.join(shares)} of the patch tokens"
        patches = self.view.num_patch_tokens
        if patches is None:
            return text
        counts = [patches + self.view.num_prefix_tokens, *self.num_tokens(patches)]
        steps = [counts[0], *(counts[index + 1] for index in self.forwards)]
        return f"{text}: {' -> '.join(map(str, steps))} tokens"


def install_token_drop(
    module: nn.Module,
    blocks: Sequence[int],
    keep_rate: float | Sequence[float],
    *,
    fuse: bool = True,
    score: Score = "cls",
    detach: bool = False,
    normalize: bool = False,
    vit: str | None = None,
) -> TokenDropHandle:
    """Drop patch tokens inside blocks of the ViT in ``module``, in training and evaluation alike.

    In each of ``blocks``, after the attention's residual and before the MLP, the ``ceil(keep_rate * patches)`` patch
    tokens of the highest scores go on; the others are dropped, or fused into one token (arXiv 2405.10951). Prefix
    tokens are never dropped. The defaults are exactly the published semantics. ``keep_rate=1`` leaves a block exactly
    as it is.

    Args:
        module: Any module that holds a ViT.
        blocks: Indices of the blocks that drop; negative ones count from the end.
        keep_rate: The share of patch tokens that is kept, above 0 and at most 1; one, or one a block.
        fuse: Whether the dropped tokens go on as one, their sum weighted by the scores.
        score: ``"cls"``: the attention of the class token; ``"mean"``: the attention that a token receives from all
            (for models without a class token; carries no gradient); ``"random"``: a control.
        detach: Whether gradient is kept from flowing through the weights of the fused token.
        normalize: Whether the weights of the fused token are scaled to sum to 1.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, the arguments do not fit it, or a block's forward is already
            replaced. Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_token_drop(model, [1, 3], 0.5)
        >>> print(handle)
        blocks 1, 3 of the ViT (VisionTransformer) keep 0.5 of the patch tokens: 101 -> 52 -> 28 tokens
        >>> model(torch.zeros(2, 3, 160, 160)).shape
        torch.Size([2, 10])
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    rates = _rates(view, blocks, keep_rate)
    _check_score(view, score)
    for index in rates:
        _check_block(view, index, score)
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
        )
        for index, rate in rates.items()
    }
    return TokenDropHandle(view, forwards)


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


def _check_score(view: ViTView, score: str) -> None:
    if score not in get_args(Score):
        raise ConfigurationError(f"score is {score!r}, expected one of {', '.join(map(repr, get_args(Score)))}.")
    if score == "cls" and not view.has_class_token:
        raise ConfigurationError(
            f"score is 'cls', but the {view.name} has no class token; use score='mean' or score='random'."
        )


def _check_block(view: ViTView, index: int, score: Score) -> None:
    block = view.blocks[index]
    if any(isinstance(forward, TokenDropForward) for forward in forward_chain(block)):
        raise ConfigurationError(f"Block {index} of the {view.name} drops tokens already; remove that first.")
    if (other := replaced_by_others(block)) is not None:
        raise ConfigurationError(
            f"Block {index} of the {view.name} has its forward replaced by {other}; undo that first."
        )
    attention = getattr(block, view.specs[index].self_attention)
    if score != "random" and not getattr(attention, "fused_attn", True):
        raise ConfigurationError(
            f"Block {index} of the {view.name} does not use scaled_dot_product_attention, where tokens get their "
            "scores; set fused_attn = True on its attention, or leave TIMM_FUSED_ATTN unset."
        )
