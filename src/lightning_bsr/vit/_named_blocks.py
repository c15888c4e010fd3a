"""The rows of block classes that go by their names: those of torchvision and, as it is optional, of transformers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.vit._spec import BlockSpec, TokenTable


def beit_arguments(block: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the attention of a BEiT layer of transformers what the layer would: a mask that holds the layer's own bias.

    Args:
        block: The layer.
        kwargs: What the layer's forward was called with, beside the tokens.

    Raises:
        ConfigurationError: If the bias should be stretched to the number of tokens, which says nothing of tokens that
            are left.
    """
    rest = dict(kwargs)
    mask = rest.pop("attention_mask", None)
    height, width = rest.pop("resolution", None) or (0, 0)
    if rest.pop("interpolate_pos_encoding", False):
        raise ConfigurationError(
            "BEiT was called with interpolate_pos_encoding=True, which stretches its position bias to the number of "
            "tokens; leave it out: the bias fits images of any size without."
        )
    if block.relative_position_bias is not None:
        bias = block.relative_position_bias((height // block.patch_size, width // block.patch_size))
        mask = bias if mask is None else bias + mask
    return {**rest, "attention_mask": mask}


_VIT = BlockSpec(
    attn=("layernorm_before", "attention", "dropout"),
    mlp=("layernorm_after", "mlp", "dropout"),
    self_attention="attention",
)
_DINO = BlockSpec(
    attn=("norm1", "attention", "layer_scale1", "drop_path"),
    mlp=("norm2", "mlp", "layer_scale2", "drop_path"),
    self_attention="attention",
)
_DINO_WITH_ROPE = replace(_DINO, tables=(TokenTable("position_embeddings", neutral=(1.0, 0.0)),))  # cosine and sine
_BEIT = BlockSpec(
    attn=("layernorm_before", "attention", "dropout", "lambda_1", "drop_path"),
    mlp=("layernorm_after", "mlp", "dropout", "lambda_2", "drop_path"),
    self_attention="attention",
    biases=("attention_mask",),
    attention_arguments=beit_arguments,
)
_CLIP = BlockSpec(attn=("layer_norm1", "self_attn"), mlp=("layer_norm2", "mlp"), self_attention="self_attn")

NAMED_BLOCKS = {
    "torchvision.models.vision_transformer.EncoderBlock": BlockSpec(
        attn=("ln_1", "self_attention", "dropout"), mlp=("ln_2", "mlp"), self_attention="self_attention"
    ),
    **{
        f"transformers.models.{name}": spec
        for name, spec in {
            "vit.modeling_vit.ViTLayer": _VIT,
            "deit.modeling_deit.DeiTLayer": _VIT,
            "vit_msn.modeling_vit_msn.ViTMSNLayer": _VIT,
            "vit_mae.modeling_vit_mae.ViTMAELayer": _VIT,
            "dinov2.modeling_dinov2.Dinov2Layer": _DINO,
            "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": _DINO,
            "dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": _DINO_WITH_ROPE,
            "beit.modeling_beit.BeitLayer": _BEIT,
            "clip.modeling_clip.CLIPEncoderLayer": _CLIP,
            "siglip.modeling_siglip.SiglipEncoderLayer": _CLIP,
            "siglip2.modeling_siglip2.Siglip2EncoderLayer": _CLIP,
        }.items()
    },
}
"""Rows by the full name of the class."""
