import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    install_lean_activations,
    install_token_drop,
    install_unread_skip,
    select_blocks_,
)
from lightning_bsr.memory import measure, plan
from plain_modules import tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])
TOKEN = 4 * 32 * 4  # bytes of one token of all images


def run(model):
    model.zero_grad()
    out = model(X)
    F.cross_entropy(out, Y).backward()
    return {"out": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("selected", [None, [1, 5], {5: ["mlp"]}])
@pytest.mark.parametrize("drop", [None, [1, 3], [3, 5]])
def test_outputs_and_gradients__are_the_same(selected, drop):
    model = tiny_vit(reg_tokens=2, init_values=0.1)
    if selected is not None:
        select_blocks_(model, selected)
    plain = copy.deepcopy(model)
    install_unread_skip(model)
    if drop is not None:
        install_token_drop(plain, drop, 0.5)
        install_token_drop(model, drop, 0.5)
    assert_close(run(model), run(plain))


def test_a_head_that_reads_two_prefix_tokens():
    torch.manual_seed(0)
    model = VisionTransformerDistilled(
        img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4, weight_init="jax"
    )
    plain = copy.deepcopy(model)
    install_unread_skip(model)
    assert_close(run(model), run(plain))


def test_skips_the_mlp_of_all_patch_tokens():
    model = tiny_vit()
    before = measure(model, X)
    install_unread_skip(model)
    install_lean_activations(model)
    after = measure(model, X)
    assert after.by_block[6].tokens == 1
    assert after.by_block[6].mlp == 5 * TOKEN + 2 * 4 * 4  # mean and deviation of the norm
    mlp = 2 * 2 * 4 * 32 * 128  # operations for one token of each image
    assert before.flops.forward - after.flops.forward == 64 * mlp
    assert plan(model, X) == after


def test_remove():
    model = tiny_vit()
    plain = run(copy.deepcopy(model))
    handle = install_unread_skip(model)
    handle.remove()
    handle.remove()
    assert "forward" not in vars(model.blocks[-1])
    assert torch.equal(run(model)["out"], plain["out"])


@pytest.mark.parametrize(
    ("arguments", "pooling"),
    [
        ({"global_pool": "avg"}, "'avg'"),
        ({"global_pool": "map"}, "'map'"),
        ({"class_token": False, "global_pool": "avg"}, "'avg'"),
        ({"global_pool": ""}, "''"),
    ],
)
def test_refuses_a_head_that_reads_patch_tokens(arguments, pooling):
    model = tiny_vit(**arguments)
    with pytest.raises(ConfigurationError) as error:
        install_unread_skip(model)
    assert str(error.value) == (
        f"The ViT (VisionTransformer) has global_pool={pooling}, expected 'token': only then does its head read no "
        "patch tokens of the last block; leave them in."
    )
    assert "forward" not in vars(model.blocks[-1])


def test_refuses_to_skip_twice():
    model = tiny_vit()
    install_unread_skip(model)
    with pytest.raises(ConfigurationError) as error:
        install_unread_skip(model)
    assert str(error.value) == (
        "Block 5 of the ViT (VisionTransformer) gives the prefix tokens alone already; remove that first."
    )
