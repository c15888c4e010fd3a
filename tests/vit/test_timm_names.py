"""Every timm VisionTransformer, by name, without its weights."""

import pytest
import timm
import torch
from timm.models.vision_transformer import Block

from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.vit import find_vit

SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 64}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vision_transformer", "deit"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm, about names that it deprecates
def test_every_name_built_of_block__is_found_selected_and_dropped(family):
    attached = 0
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10, depth=3)  # all blocks of a model are alike
        if not all(type(block) is Block for block in model.blocks):
            continue
        view = find_vit(model)
        assert view.blocks == tuple(model.blocks), name
        assert view.num_prefix_tokens == model.num_prefix_tokens, name
        selection = select_blocks_(model, 2)
        trained = {p for p in model.parameters() if p.requires_grad}
        assert trained >= set(model.blocks[-1].parameters()) | set(model.head.parameters()), name
        assert not any(p.requires_grad for p in model.patch_embed.parameters()), name
        handle = install_token_drop(model, [0, -1], 0.5, score="cls" if view.has_class_token else "mean")
        assert handle.num_tokens(100)[0] == view.num_prefix_tokens + 51, name
        handle.remove()
        selection.remove()
        attached += 1
    assert attached > {"vision_transformer": 100, "deit": 10}[family]


@pytest.mark.parametrize(
    ("name", "arguments", "score"),
    [
        ("naflexvit_base_patch16_gap", {"embed_dim": 48, "depth": 4, "num_heads": 2}, "mean"),
        ("vit_base_patch16_siglip_224", {"embed_dim": 48, "depth": 4, "num_heads": 2, "img_size": 64}, "mean"),
        ("vit_small_patch14_reg4_dinov2", {"embed_dim": 48, "depth": 4, "num_heads": 2, "img_size": 56}, "cls"),
        ("deit3_small_patch16_224", {"embed_dim": 48, "depth": 4, "num_heads": 2, "img_size": 64}, "cls"),
        ("vit_tiny_r_s16_p8_224", {"embed_dim": 48, "depth": 4, "num_heads": 2, "img_size": 64}, "cls"),
        ("vit_small_patch16_18x2_224", SMALL, "cls"),
        ("vit_relpos_small_patch16_224", SMALL, "mean"),
        ("beit_base_patch16_224", SMALL, "cls"),
        ("eva02_tiny_patch14_224", {**SMALL, "img_size": 56}, "cls"),
        ("vit_small_patch16_dinov3", SMALL, "cls"),
        ("vit_small_patch16_rope_mixed_224", SMALL, "cls"),
    ],
)
def test_families__train_a_step_with_fewer_tokens(name, arguments, score):
    model = timm.create_model(name, num_classes=10, **arguments)
    select_blocks_(model, [1, 3])
    handle = install_token_drop(model, [1, 2], 0.5)
    assert handle.forwards[1].score == score
    tokens = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, output: tokens.append(output.shape[1]))
    size = arguments.get("img_size", 64)
    model(torch.randn(2, 3, size, size)).sum().backward()
    assert tokens == handle.num_tokens(tokens[0] - handle.view.num_prefix_tokens)
    assert tokens[-1] < tokens[0]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
