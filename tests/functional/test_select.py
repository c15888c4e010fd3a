import pytest
import torch
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import select_blocks_
from plain_modules import PlainModule, tiny_vit


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def names(module, *prefixes):
    return {name for name, _ in module.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("blocks", "prefixes"),
    [
        ([1, -1], ("blocks.1.", "blocks.5.")),
        ((2,), ("blocks.2.",)),
        (3, ("blocks.1.", "blocks.3.", "blocks.5.")),
        (6, ("blocks.",)),
        (0, ()),
        ([], ()),
        ({1: "all", -2: ["mlp"]}, ("blocks.1.", "blocks.4.norm2", "blocks.4.mlp")),
        ({0: "attn"}, ("blocks.0.norm1", "blocks.0.attn")),
        ({0: ["mlp", "attn"]}, ("blocks.0.",)),
    ],
)
def test_select_blocks__trains_just_those(blocks, prefixes):
    model = tiny_vit()
    select_blocks_(model, blocks)
    assert trained(model) == names(model, "norm.", "head.", *prefixes)


@pytest.mark.parametrize(("head", "norm"), [(True, False), (False, True), (False, False)])
def test_select_blocks__head_and_norm(head, norm):
    model = tiny_vit(class_token=False, global_pool="map")
    select_blocks_(model, [5], head=head, norm=norm)
    expected = ("blocks.5.",) + ("norm.",) * norm + ("head.", "attn_pool.") * head
    assert trained(model) == names(model, *expected)


def test_select_blocks__evenly_spaced_as_published_at_depth_12():
    selection = select_blocks_(tiny_vit(depth=12), 3)
    assert list(selection.parts) == [3, 7, 11]


def test_select_blocks__leaves_the_rest_of_the_module_alone():
    module = nn.ModuleDict({"vit": tiny_vit(num_classes=0), "own_head": nn.Linear(32, 4), "frozen": nn.Linear(2, 2)})
    module["frozen"].requires_grad_(False)
    select_blocks_(module, [])
    assert trained(module) == {"vit.norm.weight", "vit.norm.bias", "own_head.weight", "own_head.bias"}


def test_select_blocks__trains_what_it_names_even_if_frozen_before():
    model = tiny_vit().requires_grad_(False)
    selection = select_blocks_(model, [2])
    assert trained(model) == names(model, "blocks.2.", "norm.", "head.")
    selection.remove()
    assert trained(model) == set()


def test_select_blocks__tied_parameter_trains_if_one_place_does():
    model = tiny_vit()
    model.blocks[0].mlp.fc1.weight = model.blocks[2].mlp.fc1.weight
    select_blocks_(model, [2])
    assert model.blocks[0].mlp.fc1.weight.requires_grad


def test_remove__restores_flags_and_modes():
    model = tiny_vit(drop_path_rate=0.1).train()
    model.blocks[1].eval()
    model.patch_embed.proj.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    selection = select_blocks_(model, [1, 3])
    selection.eval_frozen()
    assert flags != {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes != {name: m.training for name, m in model.named_modules()}
    selection.remove()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: m.training for name, m in model.named_modules()}


def test_eval_frozen__rests_frozen_parts_only():
    model = tiny_vit(drop_path_rate=0.5, pos_drop_rate=0.5).train()
    select_blocks_(model, {1: "attn", 3: "all"}).eval_frozen()
    assert [block.training for block in model.blocks] == [False, True, False, True, False, False]
    assert not model.patch_embed.training
    assert model.pos_drop.training
    assert model.training
    assert model.head.training


def test_remove__twice_does_nothing_more():
    model = tiny_vit()
    selection = select_blocks_(model, [1])
    selection.remove()
    model.requires_grad_(False)
    selection.remove()
    assert trained(model) == set()


def test_select_blocks__twice_is_refused():
    model = tiny_vit()
    selection = select_blocks_(model, [1])
    before = trained(model)
    with pytest.raises(ConfigurationError) as error:
        select_blocks_(model, [2])
    assert str(error.value) == (
        "The ViT (VisionTransformer) has its blocks selected already; remove that selection first."
    )
    assert trained(model) == before
    selection.remove()
    select_blocks_(model, [2])


def test_str__counts_parameters():
    selection = select_blocks_(PlainModule(), {1: "all", 3: "mlp"})
    assert str(selection) == (
        "blocks 1, 3 (mlp only) of 6 train in the ViT 'model' (VisionTransformer): 21,316 of 80,100 parameters (26.6 %)"
    )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([6], "blocks has 6, but the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1."),
        (
            7,
            "blocks is the number 7, expected 0 to 6, as the ViT (VisionTransformer) has 6 blocks; to select block 7 "
            "write blocks=[7].",
        ),
        (
            "3,7",
            "blocks is '3,7', expected a list of block indices, a number of blocks, or a mapping from block index to "
            "the parts that train.",
        ),
        ({1: "ffn"}, "blocks[1] is 'ffn', expected 'all', 'attn', 'mlp', or a list of the last two."),
        ({1: []}, "blocks[1] is [], expected 'all', 'attn', 'mlp', or a list of the last two."),
        ({5: "all", -1: "mlp"}, "blocks names block 5 more than once: [5, -1]."),
    ],
)
def test_select_blocks__errors_change_nothing(blocks, message):
    model = tiny_vit()
    with pytest.raises(ConfigurationError) as error:
        select_blocks_(model, blocks)
    assert str(error.value) == message
    assert trained(model) == names(model, "")


def test_select_blocks__gradients_equal_those_of_the_whole_model():
    whole, part = tiny_vit(), tiny_vit()
    part.load_state_dict(whole.state_dict())
    select_blocks_(part, [1, 4])
    x = torch.randn(2, 3, 32, 32)
    for model in (whole, part):
        model(x).square().sum().backward()
    for (name, a), b in zip(whole.named_parameters(), part.parameters(), strict=True):
        if b.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, msg=name)
        else:
            assert b.grad is None
