"""What a ViT makes of its tokens after the last block, where that counts on all patches being there."""

from typing import Any, NoReturn

import torch
from timm.models._features import feature_take_indices

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._drop_forward import PositionsForward, TokenDropForward
from lightning_bsr.functional._forward import forward_chain
from lightning_bsr.functional._positions import keep_valid
from lightning_bsr.vit import ViTView

_POOLS_OF_MAPS = ("merge", "align", "soft")  # of timm's encoders for language models


class DenseOutputRefused:
    """Stands in for ``forward_intermediates`` while tokens are dropped: its feature maps would be wrong."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigurationError(
            f"The {self.name} drops tokens, so its feature maps would miss some patches; remove the token drop before "
            "calling forward_intermediates or extracting features."
        )


class RestoredIntermediates:
    """Stands in for ``forward_intermediates`` while dropped tokens are put back after the last block."""

    def __init__(self, view: ViTView, first_drop: int) -> None:
        self.view = view
        self.first_drop = first_drop

    def __call__(self, x: torch.Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own, if only outputs are asked for that have all tokens."""
        model, depth = self.view.model, len(self.view.blocks)
        taken, _ = feature_take_indices(depth, indices)
        missing = [index for index in taken if self.first_drop <= index < depth - 1]
        if missing:
            raise ConfigurationError(
                f"The {self.view.name} drops tokens in block {self.first_drop} and puts them back after block "
                f"{depth - 1}, so the feature maps of blocks {', '.join(map(str, missing))} would miss some patches; "
                "ask for those of other blocks, or remove the token drop."
            )
        return type(model).forward_intermediates(model, x, indices, *args, **kwargs)  # type: ignore[attr-defined]  # it has one


class TokenColumn:
    """Stands in for the ``forward_features`` of a ViT that lays its tokens out as a map ``[B, H, W, C]``.

    The tokens that are left are no such map; they become one of a single column, ``[B, N, 1, C]``, which is the same
    for all who then take the mean over it.
    """

    def __init__(self, view: ViTView) -> None:
        self.view = view

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        model: Any = self.view.model
        links = [link for block in self.view.blocks for link in forward_chain(block)]
        if all(link.keep_rate == 1 for link in links if isinstance(link, TokenDropForward)):
            return type(model).forward_features(model, x)  # type: ignore[no-any-return]  # what timm returns
        last = type(model).forward_intermediates(
            model, x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True
        )
        tokens: torch.Tensor = last[0]
        return tokens.unsqueeze(2)


class KeptPatches:
    """Stands in for the ``forward_features`` of a NaFlexVit, which also says which patches are no padding."""

    def __init__(self, view: ViTView) -> None:
        self.view = view

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.view.model
        (last,) = (f for f in forward_chain(self.view.blocks[-1]) if isinstance(f, PositionsForward))
        # Filled by the last block, and only while this pass runs.
        last.seen = []
        try:
            features = type(model).forward_features(model, *args, **kwargs)
            positions = last.seen[-1] if last.seen else None
        finally:
            last.seen = None
        if isinstance(features, dict) and features["patch_valid"] is not None and positions is not None:
            patches = positions[:, self.view.num_prefix_tokens :] - self.view.num_prefix_tokens
            features["patch_valid"] = keep_valid(features["patch_valid"], patches)
        return features


def check_outputs(view: ViTView) -> None:
    """Check that what follows the blocks does without some patches.

    Raises:
        ConfigurationError: If it does not.
    """
    pool = getattr(view.model, "global_pool", None)
    if pool in _POOLS_OF_MAPS:
        raise ConfigurationError(
            f"The {view.name} has global_pool={pool!r}, which joins neighbouring patches and needs all of them; "
            "give restore=True, which puts dropped tokens back to their places, or build it without that."
        )


def attach_outputs(view: ViTView, restored_from: int | None) -> None:
    """Put in place what stands in for methods of the model while tokens are dropped; what is there already stays.

    Args:
        view: The ViT.
        restored_from: The first block that drops tokens, if they are put back after the last.
    """
    own = vars(view.model)
    if hasattr(view.model, "forward_intermediates") and "forward_intermediates" not in own:
        refused = DenseOutputRefused(view.name)
        stand_in = refused if restored_from is None else RestoredIntermediates(view, restored_from)
        view.model.forward_intermediates = stand_in  # type: ignore[assignment]
    if "forward_features" in own or restored_from is not None:
        return
    if getattr(view.model, "output_fmt", None) == "NHWC":
        view.model.forward_features = TokenColumn(view)  # type: ignore[assignment]
    elif hasattr(view.model, "use_key_only_attn_mask"):
        view.model.forward_features = KeptPatches(view)  # type: ignore[assignment]


def detach_outputs(view: ViTView) -> None:
    """Give the model its own methods again."""
    intermediates, features = (DenseOutputRefused, RestoredIntermediates), (TokenColumn, KeptPatches)
    for name, kinds in (("forward_intermediates", intermediates), ("forward_features", features)):
        if isinstance(vars(view.model).get(name), kinds):
            delattr(view.model, name)
