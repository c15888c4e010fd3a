import re

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.vit import find_vit, registered_blocks
from plain_modules import PlainModule, tiny_vit


@pytest.fixture
def few_blocks(monkeypatch):
    """A table of few block classes, and how the messages that list them end."""
    timm_names = [f"timm.models.{name}.{name.title()}Block" for name in ("eva", "beit", "convit", "xcit", "twins")]
    others = ["torchvision.models.vision_transformer.EncoderBlock", "transformers.models.vit.modeling_vit.ViTLayer"]
    names = [*timm_names, "mine.blocks.Mine", *others]
    monkeypatch.setattr("lightning_bsr.vit._find.registered_blocks", lambda: names)
    return """
Supported block classes, to which lightning_bsr.register_block adds others:
  timm: eva.EvaBlock, beit.BeitBlock, convit.ConvitBlock, xcit.XcitBlock, twins.TwinsBlock
  mine: blocks.Mine
  torchvision: vision_transformer.EncoderBlock
  transformers: vit.modeling_vit.ViTLayer"""


def test_find_vit__supported_blocks_are_listed_by_library():
    with pytest.raises(ConfigurationError) as error:
        find_vit(nn.Linear(2, 2))
    first, title, *lines = str(error.value).split("\n")
    assert first == "No supported Vision Transformer was found in Linear. Its children are: none."
    assert title == "Supported block classes, to which lightning_bsr.register_block adds others:"
    assert max(map(len, lines)) <= 120
    listed = re.findall(r"[^\s,]+[.][^\s,]+", "\n".join(lines))
    assert listed == [name.partition(".")[2].removeprefix("models.") for name in registered_blocks()]


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda vit: vit, ""),
        (lambda vit: nn.Sequential(nn.Identity(), vit), "1"),
        (lambda vit: nn.ModuleDict({"deep": nn.ModuleDict({"er": vit})}), "deep.er"),
        (lambda vit: nn.ModuleDict({"a": vit, "same": vit}), "a"),
        (torch.compile, "_orig_mod"),
    ],
    ids=["itself", "sequential", "nested", "twice", "compiled"],
)
def test_find_vit__wherever_it_is(wrap, path):
    vit = tiny_vit()
    view = find_vit(wrap(vit))
    assert view.model is vit
    assert view.path == path
    assert view.blocks == tuple(vit.blocks)


@pytest.mark.parametrize(
    ("kwargs", "prefix", "class_token", "norms", "heads"),
    [
        ({}, 1, True, ["norm"], ["head"]),
        ({"init_values": 1e-5}, 1, True, ["norm"], ["head"]),
        ({"reg_tokens": 4}, 5, True, ["norm"], ["head"]),
        ({"reg_tokens": 4, "no_embed_class": True}, 5, True, ["norm"], ["head"]),
        ({"qk_norm": True}, 1, True, ["norm"], ["head"]),
        ({"class_token": False, "global_pool": "avg"}, 0, False, ["fc_norm"], ["head"]),
        ({"global_pool": "avg"}, 1, True, ["fc_norm"], ["head"]),
        ({"class_token": False, "global_pool": "map"}, 0, False, ["norm"], ["attn_pool", "head"]),
        ({"num_classes": 0}, 1, True, ["norm"], []),
    ],
    ids=[
        "plain",
        "layer_scale",
        "registers",
        "no_embed_class",
        "qk_norm",
        "avg",
        "avg_cls",
        "map",
        "no_head",
    ],
)
def test_find_vit__variants(kwargs, prefix, class_token, norms, heads):
    vit = tiny_vit(**kwargs)
    view = find_vit(vit)
    assert (view.num_prefix_tokens, view.has_class_token) == (prefix, class_token)
    assert view.norms == tuple(getattr(vit, name) for name in norms)
    assert set(view.heads) == {getattr(vit, name) for name in heads}
    assert view.num_patch_tokens == 64


def test_find_vit__distilled():
    view = find_vit(timm.create_model("deit_tiny_distilled_patch16_224"))
    assert view.num_prefix_tokens == 2
    assert view.heads == (view.model.head, view.model.head_dist)


def test_find_vit__several_need_a_path():
    module = nn.ModuleDict({"student": tiny_vit(), "teacher": nn.Sequential(tiny_vit(depth=2))})
    with pytest.raises(ConfigurationError) as error:
        find_vit(module)
    assert str(error.value) == (
        "ModuleDict holds 2 Vision Transformers: 'student' (VisionTransformer, 6 blocks), 'teacher.0' "
        "(VisionTransformer, 2 blocks); name one of them with vit=, such as vit='student'."
    )
    assert find_vit(module, "teacher.0").model is module["teacher"][0]
    assert find_vit(module, "teacher").path == "teacher.0"


def test_find_vit__two_lists_of_blocks_in_one_model():
    vit = tiny_vit()
    vit.decoder_blocks = tiny_vit(depth=2).blocks
    with pytest.raises(ConfigurationError) as error:
        find_vit(vit)
    assert str(error.value) == (
        "VisionTransformer holds 2 Vision Transformers: 'blocks' (VisionTransformer, 6 blocks), 'decoder_blocks' "
        "(VisionTransformer, 2 blocks); name one of them with vit=, such as vit='blocks'."
    )
    assert len(find_vit(vit, "decoder_blocks").blocks) == 2


def test_find_vit__path_that_names_nothing():
    with pytest.raises(ConfigurationError) as error:
        find_vit(PlainModule(), "backbone")
    assert str(error.value) == (
        "vit='backbone' names no module of PlainModule; Vision Transformers found: 'model' (VisionTransformer, 6 "
        "blocks)."
    )


def test_find_vit__path_to_no_vit():
    with pytest.raises(ConfigurationError, match=re.escape("was found in 'model.head' in PlainModule. ")):
        find_vit(PlainModule(), "model.head")


def test_find_vit__unsupported_blocks_are_named(few_blocks):
    class OwnBlock(Block):
        def forward(self, x):
            return x

    with pytest.raises(ConfigurationError) as error:
        find_vit(nn.ModuleDict({"backbone": tiny_vit(block_fn=OwnBlock)}))
    assert str(error.value) == (
        "No supported Vision Transformer was found in ModuleDict. Found blocks that are not registered: "
        f"'backbone.blocks' (6 x {__name__}.{OwnBlock.__qualname__}).{few_blocks}"
    )


STAGED = {
    "swin_tiny_patch4_window7_224": (
        "ViT (SwinTransformer)", "layers", 12,
        "(SwinTransformerBlock) attend within windows or between neighbours of the image, so each patch must stay in "
        "its place.",
    ),
    "pit_ti_224": (
        "ViT (PoolingVisionTransformer)", "transformers", 12,
        "(Block) lie in several stages, between which patches are laid out as an image.",
    ),
    "xcit_nano_12_p16_224": (
        "ViT (Xcit)", "blocks", 12,
        "(XCABlock) let channels attend to each other, not tokens, so no token has a score.",
    ),
    "cait_xxs24_224": (
        "ViT (Cait)", "blocks", 24,
        "(LayerScaleBlock) compute the whole attention matrix themselves, so no query and key can be seen to score "
        "tokens by.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGED)
def test_find_vit__blocks_whose_tokens_stay(name):
    title, path, depth, reason = STAGED[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    view = find_vit(nn.ModuleDict({"model": model}))
    assert (view.path, view.blocks_path, len(view.blocks)) == ("model", f"model.{path}", depth)
    selection = select_blocks_(model, [0, -1])
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for i in (0, -1) for p in view.blocks[i].parameters()} < trained
    assert {id(p) for p in model.get_classifier().parameters()} < trained
    assert not trained & {id(p) for block in view.blocks[1:-1] for p in block.parameters()}
    selection.remove()
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, [1], 0.5)
    assert str(error.value) == f"The {title} drops no tokens: its blocks {reason}"


def test_find_vit__two_staged_models_need_a_path():
    with torch.device("meta"):
        module = nn.ModuleDict({name: timm.create_model("swin_tiny_patch4_window7_224") for name in "ab"})
    with pytest.raises(ConfigurationError, match=r"holds 2 Vision Transformers: 'a' .SwinTransformer, 12 blocks.*'b'"):
        find_vit(module)
    assert find_vit(module, "b").model is module["b"]


def test_find_vit__blocks_without_prefix_tokens(few_blocks):
    with pytest.raises(ConfigurationError) as error:
        find_vit(nn.ModuleDict({"blocks": tiny_vit().blocks}))
    assert str(error.value) == (
        "No supported Vision Transformer was found in ModuleDict. Found blocks whose owner has no integer "
        f"num_prefix_tokens: 'blocks' of ModuleDict.{few_blocks}"
    )


def test_find_vit__no_blocks_at_all(few_blocks):
    with pytest.raises(ConfigurationError) as error:
        find_vit(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert str(error.value) == (
        "No supported Vision Transformer was found in Sequential. Its children are: '0' (Linear), '1' (ReLU)."
        f"{few_blocks}"
    )


def test_block_indices__sorted_positions():
    assert find_vit(tiny_vit()).block_indices([-1, 0, np.int64(3)]) == [0, 3, 5]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([6], "blocks has 6, but the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1."),
        ([-7], "blocks has -7, but the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1."),
        ([5, -1], "blocks names block 5 more than once: [5, -1]."),
        (
            [1.0],
            "blocks has 1.0, expected whole numbers: the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or "
            "-6 to -1.",
        ),
    ],
)
def test_block_indices__errors(blocks, message):
    with pytest.raises(ConfigurationError) as error:
        find_vit(tiny_vit()).block_indices(blocks)
    assert str(error.value) == message
