"""The bundled micro ViT: registered with timm, its CIFAR-100 weights are a file of this package."""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

# register_model looks this name up in the module that defines the entry point.
default_cfgs = generate_default_cfgs(
    {
        "vit_micro_patch4_32.cifar100": {
            "file": str(Path(__file__).parent / "weights" / "vit_micro_patch4_32.cifar100.safetensors"),
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "mean": (0.5071, 0.4866, 0.4409),
            "std": (0.2673, 0.2564, 0.2762),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


def vit_micro_patch4_32(
    pretrained: bool = False,
    **kwargs: Any,
) -> VisionTransformer:
    """Build the micro ViT: 12 blocks of width 128, 4 heads, 4x4 patches of 32x32 images.

    With its 2.4 million parameters it trains on a CPU; its blocks are made of the same parts as a ViT-B's.
    Importing ``lightning_bsr.models`` registers it, after which ``timm.create_model`` knows it too.

    Args:
        pretrained: Load the bundled CIFAR-100 weights; no network is needed. A head with another number of
            classes than 100 starts anew, the position embedding is resampled to another ``img_size``.
        **kwargs: Arguments of timm's ``VisionTransformer``, such as ``num_classes`` or ``img_size``.

    Returns:
        A model from images [B, 3, 32, 32] to logits [B, num_classes].

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_micro_patch4_32.cifar100", pretrained=True, num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    geometry = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_micro_patch4_32",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**geometry, **kwargs},
    )


# timm warns when a name is registered again, as a reload of this module would do.
if not is_model("vit_micro_patch4_32"):
    register_model(vit_micro_patch4_32)
