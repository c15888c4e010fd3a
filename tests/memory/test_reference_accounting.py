import copy
import functools
import re

import pytest
import timm
import torch
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.functional._forward import BlockForward, attach_forward, forward_chain, unwrap_forward
from lightning_bsr.memory._reference import reference_accounting
from lightning_bsr.memory._report import MIB
from lightning_bsr.models import convert_to_moe_
from plain_modules import PlainModule, tiny_vit

BASE, SMALL = "vit_base_patch16_224", "deit_small_patch16_224"
# Model, trained blocks, dropping blocks, keep rate; what the published code gives, printed.
PUBLISHED = [
    (BASE, None, None, None, "133.29", "327.6", "17,388"),
    (BASE, [3, 7, 11], None, None, "68.51", "143.0", "8,913"),
    (BASE, [3, 7, 11], [3, 6, 9], 0.5, "21.84", "143.0", "2,938"),
    (BASE, [3, 7, 11], [3, 6, 9], 0.7, "35.55", "143.0", "4,694"),
    (BASE, [3, 7, 11], [2, 5, 8], 0.5, "16.91", "143.0", "2,308"),
    (BASE, [4, 7, 11], [3, 6, 9], 0.5, "16.30", "143.0", "2,230"),
    (BASE, [9, 10, 11], [3, 6, 9], 0.5, "4.64", "143.0", "737"),
    (SMALL, None, None, None, "66.93", "82.8", "8,650"),
    (SMALL, [3, 7, 11], None, None, "34.26", "36.0", "4,421"),
    (SMALL, [3, 7, 11], [3, 6, 9], 0.5, "10.92", "36.0", "1,434"),
    (SMALL, [3, 7, 11], [3, 6, 9], 0.7, "17.78", "36.0", "2,311"),
    (SMALL, [3, 7, 11], [2, 5, 8], 0.5, "8.46", "36.0", "1,119"),
    (SMALL, [4, 7, 11], [3, 6, 9], 0.5, "8.15", "36.0", "1,080"),
    (SMALL, [9, 10, 11], [3, 6, 9], 0.5, "2.32", "36.0", "333"),
]


@functools.cache
def built(name: str, **kwargs) -> nn.Module:
    # Not under torch.device("meta"): older releases of timm look at values while they build.
    return timm.create_model(name, **kwargs).to("meta")


def micro(**kwargs) -> nn.Module:
    return copy.deepcopy(built("vit_micro_patch4_32", num_classes=10, **kwargs))


@pytest.mark.parametrize(("name", "trained", "dropping", "rate", "activations", "parameters", "total"), PUBLISHED)
def test_reference_accounting__published_figures(name, trained, dropping, rate, activations, parameters, total):
    model = copy.deepcopy(built(name, num_classes=100))
    if trained:
        select_blocks_(model, trained)
    if dropping:
        install_token_drop(model, dropping, rate)
    report = reference_accounting(model, batch_size=128)
    printed = (f"{report.activations / MIB:.2f}", f"{report.parameters / MIB:.1f}", f"{report.total / MIB:,.0f}")
    assert printed == (activations, parameters, total)


def block_numbers(tokens: int, after: int, *, trains: bool, width: int = 128, heads: int = 4) -> int:
    attention = heads * tokens**2 + 3 * width * tokens + trains * 3 * width * tokens
    return attention + 4 * width * after + trains * (1 + 1 + 4) * width * after


def test_reference_accounting__micro_vit_without_drops():
    model = micro()
    select_blocks_(model, [9, 11])
    report = reference_accounting(model, batch_size=3)
    blocks = sum(block_numbers(65, 65, trains=trains) for trains in (True, False, True))
    assert report.activations == 4 * (blocks + 65 * 128 + 128 + 10)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert report.parameters == sum(n * (4 if trains else 1) for n, trains in sizes)
    assert report.total == report.parameters + 3 * report.activations
    assert report.to_dict() == {
        "activations": report.activations,
        "parameters": report.parameters,
        "total": report.total,
    }


def test_reference_accounting__drop_counts_from_the_mlp_on():
    model = micro()
    select_blocks_(model, [10, 11])
    install_token_drop(model, [10], 0.5, fuse=False)
    blocks = block_numbers(65, 33, trains=True) + block_numbers(33, 33, trains=True)
    assert reference_accounting(model).activations == 4 * (blocks + 33 * 128 + 128 + 10)


def test_reference_accounting__full_fine_tuning_again_after_removal():
    model = micro()
    before = reference_accounting(model)
    selection, handle = select_blocks_(model, [3, 7, 11]), install_token_drop(model, [3, 6, 9], 0.5)
    assert reference_accounting(model).activations < before.activations / 4
    handle.remove()
    selection.remove()
    assert reference_accounting(model) == before


def test_reference_accounting__head_only_needs_the_widest_layer():
    model = micro()
    select_blocks_(model, [])
    assert reference_accounting(model).activations == 4 * 65 * 128 * 5


def test_reference_accounting__frozen_altogether_needs_the_widest_layer():
    model = micro().requires_grad_(False)
    assert reference_accounting(model).activations == 4 * 65 * 128 * 5


def test_reference_accounting__biases_keep_no_inputs():
    model = micro().requires_grad_(False)
    model.blocks[11].mlp.fc1.bias.requires_grad_(True)
    attention = 4 * 65**2 + 3 * 128 * 65
    # At the last linear layer of the last block, its GELU's input kept.
    assert reference_accounting(model).activations == 4 * (attention + 4 * 128 * 65 + (4 + 1) * 128 * 65)


def test_reference_accounting__embedding_that_trains_keeps_every_block():
    model = micro()
    select_blocks_(model, [11])
    without = reference_accounting(model)
    model.pos_embed.requires_grad_(True)
    frozen = 11 * block_numbers(65, 65, trains=False)
    assert reference_accounting(model).activations == without.activations + 4 * frozen


def test_reference_accounting__image_size():
    model = micro(dynamic_img_size=True)
    report = reference_accounting(model, image_size=(16, 32))
    blocks = 12 * block_numbers(33, 33, trains=True)
    assert report.activations == 4 * (3 * 16 * 32 + blocks + 33 * 128 + 128 + 10)


def test_reference_accounting__leaves_the_module_as_it_is():
    module = PlainModule(proj_drop_rate=0.1, drop_path_rate=0.1).train().bfloat16()
    select_blocks_(module, [3, 5])
    install_token_drop(module, [2], 0.5, score="random")
    forwards = [list(forward_chain(block)) for block in module.model.blocks]
    weights = {name: (id(p), p.clone(), p.requires_grad) for name, p in module.named_parameters()}
    generator = torch.get_rng_state()
    first = reference_accounting(module)
    assert reference_accounting(module) == first
    assert torch.equal(torch.get_rng_state(), generator)
    for name, p in module.named_parameters():
        assert (id(p), p.requires_grad) == (weights[name][0], weights[name][2])
        assert torch.equal(p, weights[name][1])
    assert [list(forward_chain(block)) for block in module.model.blocks] == forwards
    assert forwards[2]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Silent(BlockForward):
    def __call__(self, x, *args, **kwargs):
        raise AssertionError("runs in the walk")


def test_reference_accounting__other_replaced_forwards_stand_aside():
    model = tiny_vit()
    handle = install_token_drop(model, [1], 0.5)
    expected = reference_accounting(model)
    silent = [Silent(model.blocks[1]), Silent(model.blocks[4])]
    for forward in silent:
        attach_forward(forward)
    assert reference_accounting(model) == expected
    assert [vars(model.blocks[i])["forward"] for i in (1, 4)] == silent
    assert list(forward_chain(model.blocks[1]))[-1] is handle.forwards[1]
    for forward in silent:
        unwrap_forward(forward)
    assert reference_accounting(model) == expected


def test_reference_accounting__one_of_two_vits():
    module = nn.ModuleDict({"large": tiny_vit(), "small": tiny_vit(depth=2)})
    assert reference_accounting(module, vit="small") == reference_accounting(module["small"])


def test_reference_accounting__refuses_what_it_cannot_count():
    model = tiny_vit()
    with pytest.raises(ConfigurationError, match=r"^batch_size is 0, expected at least 1\.$"):
        reference_accounting(model, batch_size=0)
    del model.blocks[2].attn.num_heads
    message = (
        r"^The attention of the ViT \(VisionTransformer\) \(\w+\) has no num_heads, by which the formula counts\.$"
    )
    with pytest.raises(ConfigurationError, match=message):
        reference_accounting(model)
    model = tiny_vit()
    del model.patch_embed.img_size
    message = r"^The ViT \(VisionTransformer\) does not say the size of its images; give image_size\.$"
    with pytest.raises(ConfigurationError, match=message):
        reference_accounting(model)


def test_reference_accounting__refuses_mixtures_of_experts():
    model = micro()
    convert_to_moe_(model, blocks=[3], num_experts=4, top_k=2)
    message = "The ViT (VisionTransformer) has mixtures of experts, which the formula does not know."
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        reference_accounting(model)
