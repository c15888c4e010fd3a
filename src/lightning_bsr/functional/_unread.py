"""Leaves out the MLP of the last block for tokens that the head does not read."""

from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._drop_forward import RESTORES, SKIPS, asks_for_hidden_states
from lightning_bsr.functional._forward import BlockForward
from lightning_bsr.functional._installed import BlockForwardsHandle, chosen_blocks
from lightning_bsr.vit import BlockSpec, find_vit


class PrefixOnlyForward(BlockForward):
    """The forward of a last block that gives the prefix tokens alone."""

    rank = 2
    # Around one that drops tokens: what it would keep is not read either.
    effects = (SKIPS,)

    def __init__(self, block: nn.Module, spec: BlockSpec, num_prefix_tokens: int) -> None:
        super().__init__(block)
        self.spec = spec
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if asks_for_hidden_states(self.block, self.spec, kwargs):
            raise ConfigurationError(
                "The last block gives the prefix tokens alone, so what output_hidden_states=True asks for would miss "
                "patches; leave it out, or leave the patch tokens in."
            )

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.spec.attention_branch(self.block, x, *args, **kwargs)[:, : self.num_prefix_tokens]

        x = x[:, : self.num_prefix_tokens] + self.run_half("attn", attend, x)
        return x + self.run_half("mlp", partial(self.spec.mlp_branch, self.block), x)


def install_unread_skip(module: nn.Module, *, vit: str | None = None) -> BlockForwardsHandle:
    """Compute the MLP of the last block only for the tokens that the head reads: the prefix tokens.

    For a ViT whose pooling reads the class token alone, the last block's patch tokens end nowhere once its attention is
    done. Outputs and gradients are the same but for rounding (and, with dropout, for which random numbers are drawn);
    the last block gives ``[B, P, C]``, P prefix tokens, so nothing else may read its patch tokens, such as a loss on
    ``forward_features``. May be combined with :func:`install_token_drop`, in either order; a drop in the last block is
    then needless and left out.

    Args:
        module: Any module that holds a ViT.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, its pooling reads patch tokens, or its last block skips them
            already. Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_unread_skip(model)
        >>> print(handle)
        blocks 5 of 6 of the ViT (VisionTransformer) give the prefix tokens alone
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    if not view.reads_prefix_alone:
        pooling = getattr(view.model, "global_pool", None)
        if pooling is None:
            raise ConfigurationError(
                f"The {view.name} is not known to give only what it makes of the prefix tokens, as classifiers on the "
                "class token do; leave the patch tokens of its last block in."
            )
        raise ConfigurationError(
            f"The {view.name} has global_pool={pooling!r}, expected 'token': only then does its head read no patch "
            "tokens of the last block; leave them in."
        )
    if view.specs[-1].is_one_branch:
        raise ConfigurationError(
            f"The last block of the {view.name} ({type(view.blocks[-1]).__name__}) computes attention and MLP in one "
            "branch, so its MLP cannot be left out for some tokens; leave them in."
        )
    (last,) = chosen_blocks(view, [-1], (SKIPS, RESTORES))
    forward = PrefixOnlyForward(view.blocks[last], view.specs[last], view.num_prefix_tokens)
    return BlockForwardsHandle(view, {last: forward}, "give the prefix tokens alone")
