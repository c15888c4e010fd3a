"""ViTs of torchvision and transformers, which do not say themselves where their blocks are and which tokens come first.

Classes go by their names, so that nothing here imports transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_bsr.vit._classes import defines_forward, full_name


@dataclass(frozen=True)
class Places:
    """Something that looks for each patch token in its place.

    Attributes:
        reader: What it is and does, such as ``Dinov2Backbone makes maps of the patch tokens``.
        blocks: The blocks whose outputs it reads; ``None`` if that is not known.
    """

    reader: str
    blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class ViTRow:
    """A class that holds the blocks of a ViT and what embeds its patches.

    Attributes:
        blocks: Dotted path of the list of blocks.
        reads_prefix: Whether its forward gives nothing but what it makes of the prefix tokens.
    """

    blocks: str
    reads_prefix: bool = False


@dataclass(frozen=True)
class HeadRow:
    """A class that puts a head on a ViT of the table.

    Attributes:
        vit: The attribute that holds the ViT.
        reads_prefix: Whether its forward gives nothing but what it makes of the prefix tokens.
    """

    vit: str
    reads_prefix: Callable[[nn.Module], bool] = lambda model: False


def _always(model: nn.Module) -> bool:
    return True


def _without_mean_pooling(model: nn.Module) -> bool:
    return not model.config.use_mean_pooling  # type: ignore[union-attr]  # a configuration of transformers


_TRANSFORMERS: dict[str, dict[str, ViTRow | HeadRow]] = {
    "vit.modeling_vit": {
        "ViTModel": ViTRow("layers"),
        "ViTForImageClassification": HeadRow("vit", _always),
    },
    "deit.modeling_deit": {
        "DeiTModel": ViTRow("layers"),
        "DeiTForImageClassification": HeadRow("deit", _always),
        "DeiTForImageClassificationWithTeacher": HeadRow("deit", _always),
    },
    "vit_msn.modeling_vit_msn": {
        "ViTMSNModel": ViTRow("layers"),
        "ViTMSNForImageClassification": HeadRow("vit", _always),
    },
    "vit_mae.modeling_vit_mae": {
        "ViTMAEModel": ViTRow("layers"),
    },
    "dinov2.modeling_dinov2": {
        "Dinov2Model": ViTRow("encoder.layer"),
        "Dinov2Backbone": ViTRow("encoder.layer"),
        "Dinov2ForImageClassification": HeadRow("dinov2"),
    },
    "dinov2_with_registers.modeling_dinov2_with_registers": {
        "Dinov2WithRegistersModel": ViTRow("encoder.layer"),
        "Dinov2WithRegistersBackbone": ViTRow("encoder.layer"),
        "Dinov2WithRegistersForImageClassification": HeadRow("dinov2_with_registers"),
    },
    "dinov3_vit.modeling_dinov3_vit": {
        "DINOv3ViTModel": ViTRow("model.layer"),
        "DINOv3ViTBackbone": ViTRow("model.layer"),
    },
    "beit.modeling_beit": {
        "BeitModel": ViTRow("layers"),
        "BeitForImageClassification": HeadRow("beit", _without_mean_pooling),
    },
    "clip.modeling_clip": {
        "CLIPVisionModel": ViTRow("encoder.layers"),
        "CLIPVisionModelWithProjection": HeadRow("vision_model"),
        "CLIPForImageClassification": HeadRow("vision_model"),
    },
    "siglip.modeling_siglip": {
        "SiglipVisionModel": ViTRow("encoder.layers"),
        "SiglipForImageClassification": HeadRow("vision_model"),
    },
    "siglip2.modeling_siglip2": {
        "Siglip2VisionModel": ViTRow("encoder.layers"),
        "Siglip2ForImageClassification": HeadRow("vision_model"),
    },
}
_ROWS: dict[str, ViTRow | HeadRow] = {
    "torchvision.models.vision_transformer.VisionTransformer": ViTRow("encoder.layers", reads_prefix=True),
    **{f"transformers.models.{file}.{name}": row for file, rows in _TRANSFORMERS.items() for name, row in rows.items()},
}

# How the names of transformers' classes end whose output has a place for each patch, and what they do.
_MAPS = "makes maps of the patch tokens"
_MASKS = "hides patches, and puts the others back to their places after the blocks"
_DENSE = {
    "Backbone": _MAPS,
    "ForDepthEstimation": _MAPS,
    "ForObjectDetection": _MAPS,
    "ForInstanceSegmentation": _MAPS,
    "ForSemanticSegmentation": _MAPS,
    "ForUniversalSegmentation": _MAPS,
    "ForMaskedImageModeling": _MASKS,
    "ForPreTraining": _MASKS,
    "MAEModel": _MASKS,
}


def vit_row(module: nn.Module) -> ViTRow | None:
    """Return what is known of ``module`` as a ViT without its head."""
    row = _row(module)
    return row if isinstance(row, ViTRow) else None


def path_to_vit(module: nn.Module) -> str | None:
    """Give the path from ``module`` to the known ViT that it is (then empty) or on which it puts a head."""
    row = _row(module)
    if isinstance(row, HeadRow):
        return row.vit if vit_row(getattr(module, row.vit)) else None
    return "" if row else None


def reads_prefix_alone(module: nn.Module) -> bool:
    """Whether ``module`` is known to give nothing but what it makes of its ViT's prefix tokens."""
    row = _row(module)
    if row is None:
        return getattr(module, "global_pool", None) == "token" and getattr(module, "attn_pool", None) is None
    # A subclass may do something else in its forward.
    if _ROWS.get(full_name(defines_forward(module))) is not row:
        return False
    return row.reads_prefix(module) if isinstance(row, HeadRow) else row.reads_prefix


def places_read_by(module: Any, depth: int) -> Places | None:
    """Say what ``module`` is known to do that needs each patch token in its place, with a ViT of ``depth`` blocks."""
    names = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    does = next((does for name in names for ending, does in _DENSE.items() if name.endswith(ending)), None)
    if does is None:
        return None
    blocks: tuple[int, ...] | None = (depth - 1,) if does == _MASKS else None
    if hasattr(module, "out_features") and hasattr(module, "stage_names"):
        # The first stage is what enters the blocks.
        stages = [list(module.stage_names).index(name) for name in module.out_features]
        blocks = tuple(stage - 1 for stage in stages if stage)
    return Places(f"{type(module).__name__} {does}", blocks)


def prefix_of(vit: nn.Module) -> tuple[int, bool]:
    """Count the tokens that come before the patch tokens of a ViT, and say whether the first is a class token."""
    if vit_row(vit) is None:
        given, says = getattr(vit, "num_prefix_tokens", None), getattr(vit, "has_class_token", None)
        has_class_token = says if isinstance(says, bool) else getattr(vit, "cls_token", None) is not None
        return given if isinstance(given, int) else 0, has_class_token
    holder = getattr(vit, "embeddings", vit)
    names = ("cls_token", "class_embedding", "class_token")
    has_class_token = any(getattr(holder, name, None) is not None for name in names)
    registers = getattr(holder, "register_tokens", None)
    others = hasattr(holder, "distillation_token") + (registers.shape[1] if registers is not None else 0)
    return has_class_token + others, has_class_token


def num_patch_tokens(vit: nn.Module) -> int | None:
    """Count the patch tokens of a ViT at its own image size, if it says so."""
    config = getattr(vit, "config", None)
    embeddings = getattr(vit, "embeddings", None)
    for part in (getattr(vit, "patch_embed", None), embeddings, getattr(embeddings, "patch_embeddings", None)):
        count = getattr(part, "num_patches", None)
        if isinstance(count, int):
            return int(count * (1 - getattr(config, "mask_ratio", 0)))
    if isinstance(length := getattr(vit, "seq_length", None), int):
        return length - 1
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else None


def patch_size_of(vit: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of a ViT's patches in pixels, if it says so."""
    config, embed = getattr(vit, "config", None), getattr(vit, "patch_embed", None)
    for holder in (embed, vit, config):
        size = getattr(holder, "patch_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return size[0], size[1]
    return None


def width_of(vit: nn.Module) -> int | None:
    """Return how many channels a token of a ViT has, if it says so."""
    config = getattr(vit, "config", None)
    widths = (getattr(vit, "embed_dim", None), getattr(vit, "hidden_dim", None), getattr(config, "hidden_size", None))
    return next((width for width in widths if isinstance(width, int)), None)


def draws_positions(vit: nn.Module) -> str | None:
    """Name the part of a ViT that shifts or scales positions at random in the mode that it is in, if one does."""
    return next((name for name, part in vit.named_children() if part.training and _moves_positions(part)), None)


def _moves_positions(part: nn.Module) -> bool:
    if full_name(type(part)) != "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTRopePositionEmbedding":
        return bool(getattr(part, "aug_active", False))  # timm's
    names = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
    return any(getattr(part.config, name) is not None for name in names)


def _row(module: nn.Module) -> ViTRow | HeadRow | None:
    return next((row for cls in type(module).__mro__ if (row := _ROWS.get(full_name(cls)))), None)
