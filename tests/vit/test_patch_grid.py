"""In how many rows and columns patches lie."""

import pytest
import timm
import torch
from torchvision.models import VisionTransformer

from lightning_bsr import ConfigurationError
from lightning_bsr.vit import find_vit
from plain_modules import tiny_vit


@pytest.mark.parametrize(
    ("model", "num_patches", "size", "grid"),
    [
        (tiny_vit, 64, (32, 32), (8, 8)),
        (tiny_vit, 128, (32, 64), (8, 16)),
        # Patches that are no squares, of an image that is one.
        (lambda: tiny_vit(patch_size=(4, 8)), 32, (32, 32), (8, 4)),
        # The module makes an image of 16 x 24 pixels of a larger one.
        (tiny_vit, 24, (170, 250), (4, 6)),
        (lambda: VisionTransformer(32, 8, 1, 2, 16, 32), 16, (32, 32), (4, 4)),
        # Patches of what a stem of convolutions makes of the image.
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224", img_size=64), 4, (64, 64), (2, 2)),
    ],
)
def test_patch_grid__has_the_shape_of_the_image(model, num_patches, size, grid):
    assert find_vit(model()).patch_grid(num_patches, *size) == grid


def test_patch_grid__of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    assert find_vit(transformers.ViTModel(config)).patch_grid(8, 16, 32) == (2, 4)


def test_patch_grid__is_where_a_patch_changes_the_tokens():
    model = tiny_vit(img_size=(16, 24), patch_size=(4, 8))
    image = torch.zeros(1, 3, 16, 24)
    before = model.patch_embed(image)
    image[..., 4:8, 16:24] = 1  # row 1, column 2
    rows, columns = find_vit(model).patch_grid(12, 16, 24)
    changed = (model.patch_embed(image) != before).any(dim=-1).view(rows, columns)
    assert changed.nonzero().tolist() == [[1, 2]]


def test_patch_grid__that_no_image_fills_is_refused():
    with pytest.raises(ConfigurationError) as error:
        find_vit(tiny_vit()).patch_grid(67, 32, 32)
    assert str(error.value) == (
        "The ViT (VisionTransformer) makes 67 patches of an image of 32 x 32 pixels, which fill no grid of that shape."
    )
