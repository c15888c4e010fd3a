"""The prefix cache of blocks that are given positions: rotary embeddings, and biases of pairs of positions."""

import copy
import pickle

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_prefix_cache, install_token_drop, select_blocks_
from lightning_bsr.functional._prefix_pass import PrefixCounts
from vit_families import SIZE as FAMILY_SIZE
from vit_families import family

SIZE = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
ROPE = {**SIZE, "use_rot_pos_emb": True, "init_values": 0.5}
MODELS = {
    "eva": lambda: Eva(**ROPE),
    "eva_for_any_size": lambda: Eva(**ROPE, dynamic_img_size=True),
    "mixed": lambda: Eva(**ROPE, rope_type="mixed"),
    "dinov3": lambda: Eva(**ROPE, rope_type="dinov3", num_reg_tokens=4, rope_rotate_half=True, use_abs_pos_emb=False),
    "beit_shared": lambda: Beit(**SIZE, use_shared_rel_pos_bias=True),
    "relpos_shared": lambda: VisionTransformerRelPos(**SIZE, shared_rel_pos=True, class_token=True),
    "transformers_dinov3": lambda: family("dinov3").model,
    "transformers_beit": lambda: family("beit").model,
    "transformers_beit_shared": lambda: family("beit_shared_bias").model,
}
GENERATOR = torch.Generator().manual_seed(3)


def build(name, drop=True, blocks=(2, 3)):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    select_blocks_(model, list(blocks))
    if drop:
        install_token_drop(model, [0, 1, 2], 0.7)
    return model


def pictures(name, count=8):
    size = FAMILY_SIZE if name.startswith("transformers") else SIZE["img_size"]
    return torch.randn(count, 3, size, size, generator=GENERATOR)


def step(model, images):
    out = model(images)
    out = out if isinstance(out, torch.Tensor) else out.logits if "logits" in out else out.pooler_output
    loss = out.square().sum()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss, torch.autograd.grad(loss, list(trained.values()), allow_unused=True)


def assert_same_step(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("drop", [False, True], ids=["no_drop", "drop"])
@pytest.mark.parametrize("name", MODELS)
def test_install_prefix_cache__steps_are_equal_bit_for_bit(name, drop):
    plain, model = build(name, drop), build(name, drop)
    images = pictures(name)
    handle = install_prefix_cache(model)
    for order in (range(8), [3, 1, 0, 2, 7, 6, 5, 4], [3, 3, 1, 0, 2, 7, 6, 5]):
        order = list(order)
        assert_same_step(step(model, images[order]), step(plain, images[order]))
    assert handle.counts == PrefixCounts(hits=16, misses=8)


def test_install_prefix_cache__stores_where_tokens_came_from():
    model = build("eva")
    handle = install_prefix_cache(model)
    model(pictures("eva"))
    # 36 patches, then 26 and one fused, then 19 and one; a class token; two channels for the position of each.
    assert handle.num_bytes == 8 * 21 * (32 + 2) * 4


def test_install_prefix_cache__in_a_file_and_in_half(tmp_path):
    plain, images = build("eva"), pictures("eva")
    for computed in (8, 0):
        model = build("eva")
        handle = install_prefix_cache(model, place=tmp_path)
        assert_same_step(step(model, images), step(plain, images))
        assert handle.counts.misses == computed
        handle.remove()
    model = build("eva")
    install_prefix_cache(model, dtype="bfloat16")
    model(images)
    torch.testing.assert_close(model(images), plain(images), rtol=0.1, atol=0.1)


def test_install_prefix_cache__another_table_is_another_entry():
    plain, model = build("eva_for_any_size"), build("eva_for_any_size")
    handle = install_prefix_cache(model)
    # As many patches, so as many tokens, of images that look the same there.
    wide, high = torch.zeros(2, 3, 16, 36), torch.zeros(2, 3, 36, 16)
    for each in (plain, model):
        each.pos_embed = None
    for _ in range(2):
        for images in (wide, high):
            assert_same_step(step(model, images), step(plain, images))
    assert not torch.equal(plain(wide), plain(high))
    assert handle.counts == PrefixCounts(hits=4, misses=4)


def test_install_prefix_cache__a_changed_table_of_a_later_block_is_another_entry():
    plain, model = build("mixed"), build("mixed")
    images = pictures("mixed")
    handle = install_prefix_cache(model)
    step(model, images)
    for each in (plain, model):
        with torch.no_grad():
            each.rope.freqs[:, 1] += 1  # of block 1 alone
    for hits in (0, 8):
        assert_same_step(step(model, images), step(plain, images))
        assert handle.counts.hits == hits


def test_install_prefix_cache__without_gradients_and_under_autocast():
    plain, model = build("mixed"), build("mixed")
    images = pictures("mixed")
    handle = install_prefix_cache(model)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            for _ in range(2):
                assert torch.equal(model(images), plain(images))
    # Without gradients is without gradients, whether by no_grad or by inference_mode.
    assert handle.counts == PrefixCounts(hits=32, misses=16)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_install_prefix_cache__copies(copier):
    model, images = build("eva"), pictures("eva")
    install_prefix_cache(model)
    expected = step(model, images)
    twin = copier(model)
    assert twin.blocks[0].forward.prefix.view.model is twin
    assert_same_step(step(twin, images), expected)


def test_uncached__tables_of_each_image():
    """As timm gives them where it leaves out patches of each image at random."""
    plain, model = build("eva", drop=False), build("eva", drop=False)
    handle = install_prefix_cache(model)
    x, table = torch.randn(2, 37, 32), torch.randn(2, 1, 36, 32)
    for _ in range(2):
        ours, theirs = x, x
        for a, b in zip(model.blocks, plain.blocks, strict=True):
            ours, theirs = a(ours, rope=table), b(theirs, rope=table)
        assert torch.equal(ours, theirs)
    assert handle.counts == PrefixCounts()


def test_uncached__blocks_that_are_given_other_tables_than_the_first():
    plain, model = build("eva", drop=False), build("eva", drop=False)
    handle = install_prefix_cache(model)
    x, tables = torch.randn(2, 37, 32), torch.randn(2, 36, 32)

    def run(vit, second):
        return vit.blocks[1](vit.blocks[0](x, rope=tables[0]), rope=second)

    for second in (torch.randn(36, 32), torch.randn(36, 32)):
        assert torch.equal(run(model, second), run(plain, second))
    assert handle.counts == PrefixCounts()
    for _ in range(2):
        assert torch.equal(run(model, tables[1]), run(plain, tables[1]))
    assert handle.counts == PrefixCounts(hits=2, misses=2)
    with pytest.raises(ConfigurationError) as error:
        run(model, torch.randn(36, 32))
    assert str(error.value) == (
        "Block 1 of the ViT (Eva) is given another mask or table of positions than when its output was stored; give "
        "all blocks the same ones, or remove the prefix cache."
    )


@pytest.mark.parametrize("name", ["eva", "transformers_dinov3"])
def test_refused__random_positions(name):
    model = build(name)
    if name == "eva":
        model.rope = Eva(**ROPE, rope_shift_coords=0.5).eval().rope
        part, vit = "rope", "Eva"
    else:
        part, vit = "rope_embeddings", "DINOv3ViTModel"
    images = pictures(name)
    handle = install_prefix_cache(model)
    step(model, images)
    model.get_submodule(part).train()
    with pytest.raises(ConfigurationError) as error:
        model(images)
    assert str(error.value) == (
        f"The {part} of the ViT ({vit}) moves positions at random in training mode, so what its first blocks give "
        f"cannot be stored; turn this augmentation off where the model is built, set the {part} to eval mode, or "
        "remove the prefix cache."
    )
    model.get_submodule(part).eval()
    step(model, images)
    assert handle.counts == PrefixCounts(hits=8, misses=8)


def test_refused__tables_that_train():
    model = build("mixed")
    install_prefix_cache(model)
    model.rope.freqs.requires_grad_(True)
    with pytest.raises(ConfigurationError) as error:
        model(pictures("mixed"))
    assert str(error.value) == (
        "The positions given to block 0 of the ViT (Eva) require gradients, so something before it trains, and what "
        "its first blocks give cannot be stored; freeze that, or remove the prefix cache."
    )
