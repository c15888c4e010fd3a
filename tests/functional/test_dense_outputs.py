"""Outputs that have a place for each patch: refused while tokens are dropped, right where they are put back."""

import pytest
import torch
import torch.nn.functional as F

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_token_drop, install_unread_skip, select_blocks_
from lightning_bsr.functional._restore import count_rows
from vit_families import COMMON, family, reference

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def tokens_of(made, rates):
    """All tokens after the last block, by the reference."""
    made.finish = lambda x: x
    return reference(made, IMAGES, rates, restore=True)


@pytest.mark.parametrize("rate", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("fuse", [False, True])
def test_count_rows__is_what_the_drops_left(rate, fuse):
    for patches in range(1, 60):
        left, fused = patches, 0
        for drops in range(4):
            assert count_rows(2 + patches + fused, 2, [(rate, fuse)] * drops) == (2 + left, 2 + patches)
            kept = -int(-rate * left // 1)
            if kept < left:
                left, fused = kept + fuse, fused + fuse


def test_restore__dense_head_on_forward_features_of_timm():
    made = family("timm")
    expected = made.model.norm(tokens_of(made, {1: 0.5, 2: 0.5}))
    install_token_drop(made.model, [1, 2], 0.5, restore=True)
    tokens = made.model.forward_features(IMAGES)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    patches = tokens[:, 3:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    # Every patch has its place: each pixel of an enlarged map comes from the token that saw it.
    assert F.interpolate(patches, scale_factor=8).shape == (2, 48, 32, 32)


def test_restore__forward_intermediates_of_timm():
    made = family("timm")
    whole = made.model.forward_intermediates(IMAGES, indices=[0], intermediates_only=True)
    expected = made.model.norm(tokens_of(made, {1: 0.5, 2: 0.5}))[:, 3:].mT.unflatten(2, (4, 4))
    handle = install_token_drop(made.model, [1, 2], 0.5, restore=True)
    first, last = made.model.forward_intermediates(IMAGES, indices=[0, 3], intermediates_only=True, norm=True)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.model.forward_intermediates(IMAGES, [0], intermediates_only=True), whole)
    assert first.shape == (2, 48, 4, 4)
    torch.testing.assert_close(made.model.get_intermediate_layers(IMAGES, 1, reshape=True, norm=True)[0], expected)
    with pytest.raises(ConfigurationError) as error:
        made.model.forward_intermediates(IMAGES)
    assert str(error.value) == (
        "The ViT (VisionTransformer) drops tokens in block 1 and puts them back after block 3, so the feature maps of "
        "blocks 1, 2 would miss some patches; ask for those of other blocks, or remove the token drop."
    )
    handle.remove()
    assert len(made.model.forward_intermediates(IMAGES)[1]) == 4


def test_restore__second_handle_is_refused():
    made = family("timm")
    first = install_token_drop(made.model, [1], 0.5, restore=True)
    assert str(first) == ("block 1 of the ViT (VisionTransformer) keeps 0.5 of the patch tokens: 19 -> 12 -> 19 tokens")
    assert first.num_tokens(16) == [19, 12, 12, 19]
    for restore in (False, True):
        with pytest.raises(ConfigurationError) as error:
            install_token_drop(made.model, [2], 0.5, restore=restore)
        assert str(error.value) == (
            "The ViT (VisionTransformer) drops tokens already, with restore=True; give all blocks that drop at once "
            "where dropped tokens are to be put back."
        )
    first.remove()
    second = install_token_drop(made.model, [1], 0.5)
    with pytest.raises(ConfigurationError, match="drops tokens already, without restore=True; give all blocks"):
        install_token_drop(made.model, [2], 0.5, restore=True)
    second.remove()


def test_restore__and_skipping_what_is_not_read_exclude_each_other():
    made = family("timm")
    skip = install_unread_skip(made.model)
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(made.model, [1], 0.5, restore=True)
    assert str(error.value) == (
        "The last block of the ViT (VisionTransformer) gives the prefix tokens alone, so dropped tokens cannot be put "
        "back after it; remove that first."
    )
    skip.remove()
    install_token_drop(made.model, [1], 0.5, restore=True)
    with pytest.raises(ConfigurationError) as error:
        install_unread_skip(made.model)
    assert str(error.value) == (
        "Block 3 of the ViT (VisionTransformer) puts dropped tokens back to their places already; remove that first."
    )


def test_restore__changed_keep_rates():
    made = family("timm")
    handle = install_token_drop(made.model, [1, 2], 0.5, restore=True)
    handle.set_keep_rates({1: 1.0, 2: 0.7})
    expected = made.model.norm(tokens_of(family("timm"), {2: 0.7}))
    torch.testing.assert_close(made.model.forward_features(IMAGES), expected, rtol=1e-5, atol=1e-5)


def models_of_places():
    import transformers

    beit = transformers.BeitConfig(**COMMON, out_indices=[1, 2, 3, 4], num_labels=3)
    return {
        "masks": transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**COMMON, encoder_stride=8)),
        "mae": transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**COMMON)),
        "backbone": transformers.Dinov2Backbone(transformers.Dinov2Config(**COMMON, out_features=["stage4"])),
        "segmentation": transformers.BeitForSemanticSegmentation(beit),
    }


@pytest.mark.parametrize(
    ("kind", "name", "reader"),
    [
        (
            "masks",
            "ViT 'vit' (ViTModel)",
            "ViTForMaskedImageModeling hides patches, and puts the others back to their places after the blocks",
        ),
        (
            "mae",
            "ViT 'vit' (ViTMAEModel)",
            "ViTMAEModel hides patches, and puts the others back to their places after the blocks",
        ),
        ("backbone", "ViT (Dinov2Backbone)", "Dinov2Backbone makes maps of the patch tokens"),
        ("segmentation", "ViT 'beit' (BeitModel)", "BeitForSemanticSegmentation makes maps of the patch tokens"),
    ],
)
def test_places__a_drop_is_refused_and_selection_is_not(kind, name, reader):
    model = models_of_places()[kind]
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, [1], 0.5)
    assert str(error.value) == (
        f"A token drop would leave the {name} with fewer tokens, but {reader}; give restore=True, by which dropped "
        "tokens are put back to their places after the last block."
    )
    select_blocks_(model, [3]).remove()


def test_places__heads_that_read_the_last_block_work_with_restore():
    models = models_of_places()
    backbone = models["backbone"].eval()
    handle = install_token_drop(backbone, [1, 2], 0.5, restore=True)
    (features,) = backbone(IMAGES).feature_maps
    handle.remove()
    made = family("dinov2")
    made.blocks, made.embed = backbone.encoder.layer, backbone.embeddings
    expected = backbone.layernorm(tokens_of(made, {1: 0.5, 2: 0.5}))[:, 1:].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)

    masks = models["masks"]
    install_token_drop(masks, [1, 2], 0.5, restore=True)
    out = masks(IMAGES, bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))
    assert out.reconstruction.shape == IMAGES.shape


@pytest.mark.parametrize("kind", ["backbone", "segmentation"])
def test_places__blocks_in_between_are_refused_even_with_restore(kind):
    model = models_of_places()[kind]
    if kind == "backbone":
        model.out_features = ["stage2", "stage4"]
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, [1], 0.5, restore=True)
    name, reader = {
        "backbone": ("ViT (Dinov2Backbone)", "Dinov2Backbone"),
        "segmentation": ("ViT 'beit' (BeitModel)", "BeitForSemanticSegmentation"),
    }[kind]
    assert str(error.value) == (
        f"A token drop in block 1 of the {name} would leave out tokens until the last block, 3, but {reader} makes "
        "maps of the patch tokens, also of blocks in between; drop tokens in no block before these."
    )
    if kind == "backbone":
        install_token_drop(model, [2], 0.5, restore=True)
