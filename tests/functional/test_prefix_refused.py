import pytest
import torch
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_prefix_cache, install_token_drop, select_blocks_
from plain_modules import tiny_vit

X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def selected(model=None, blocks=(3, 5)):
    model = (tiny_vit() if model is None else model).eval()
    select_blocks_(model, list(blocks))
    return model


def cached():
    model = selected()
    return model, install_prefix_cache(model)


def raised(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("kwargs", [{"proj_drop_rate": 0.1}, {"attn_drop_rate": 0.1}, {"drop_path_rate": 0.1}])
def test_refused__random_numbers_in_the_prefix(kwargs):
    model = selected(tiny_vit(**kwargs))
    handle = install_prefix_cache(model)
    model(X)
    model.train()
    assert raised(lambda: model(X)) == (
        "The first blocks of the ViT (VisionTransformer) draw random numbers, as dropout and stochastic depth do in "
        "training mode, so what they give cannot be stored; set these blocks to eval mode, as BlockSelect does."
    )
    assert handle.counts.misses == 8


def test_refused__blocks_that_look_beyond_the_image(monkeypatch):
    model = selected()
    model.blocks[1].ls2 = Centered()
    install_prefix_cache(model)
    message = raised(lambda: model(X))
    assert message.startswith("The first blocks of the ViT (VisionTransformer) give an image other tokens in another")
    assert message.endswith(
        ", so what they give cannot be stored exactly; if that is mere rounding, accept it with dtype='float32'."
    )
    other = selected()
    other.blocks[1].ls2 = Centered(1e-6)
    install_prefix_cache(other, dtype="float32")
    other(X)
    wrong = selected()
    wrong.blocks[1].ls2 = Centered()
    install_prefix_cache(wrong, dtype="float32")
    assert raised(lambda: wrong(X)) == message


class Centered(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x - self.factor * x.mean(0)


def test_refused__what_begins_to_train():
    model, _ = cached()
    model.blocks[1].norm1.weight.requires_grad_(True)
    assert raised(lambda: model(X)) == (
        "norm1.weight of block 1 of the ViT (VisionTransformer) trains, but what the block gave is stored; remove the "
        "prefix cache before unfreezing it."
    )
    model, _ = cached()
    assert raised(lambda: model(X.clone().requires_grad_())) == (
        "The tokens that enter block 0 of the ViT (VisionTransformer) require gradients, so something before it "
        "trains, and what its first blocks give cannot be stored; freeze that, or remove the prefix cache."
    )


def test_refused__no_frozen_prefix():
    model = selected(blocks=(0, 3))
    assert raised(lambda: install_prefix_cache(model)) == (
        "Block 0 of the ViT (VisionTransformer) trains, so no block before it can be stored; freeze the first blocks, "
        "such as with BlockSelect([-2, -1])."
    )
    model = selected()
    model.pos_embed.requires_grad_(True)
    model.patch_embed.proj.bias.requires_grad_(True)
    assert raised(lambda: install_prefix_cache(model)) == (
        "pos_embed, patch_embed.proj.bias of the ViT (VisionTransformer) train before its blocks, so what these give "
        "cannot be stored; freeze them."
    )


def test_refused__a_second_one_other_forwards_and_random_drops():
    model, _ = cached()
    assert raised(lambda: install_prefix_cache(model)) == (
        "The ViT (VisionTransformer) has a prefix cache already; remove that first."
    )
    model = selected()
    model.blocks[1].forward = repr.__call__
    assert raised(lambda: install_prefix_cache(model)) == (
        "Block 1 of the ViT (VisionTransformer) has its forward replaced by method-wrapper; undo that first."
    )
    model = selected()
    install_token_drop(model, [2], 0.5, score="random")
    assert raised(lambda: install_prefix_cache(model)) == (
        "Block 2 of the ViT (VisionTransformer) drops tokens by score='random', so its output cannot be stored; choose "
        "score='cls' or score='mean', or blocks before it."
    )
    assert "forward" not in vars(model.blocks[0])
    install_prefix_cache(model, blocks=2)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        *(
            (
                {"blocks": blocks},
                "None or 1 to 3, the number of blocks of the ViT (VisionTransformer) before the first that trains",
            )
            for blocks in (0, 4, True, "all")
        ),
        ({"max_bytes": 0}, "a whole number of bytes above 0"),
        ({"max_bytes": "1GiB"}, "a whole number of bytes above 0"),
        ({"dtype": "int8"}, "None or one of 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_refused__arguments(kwargs, expected):
    model = selected()
    ((name, value),) = kwargs.items()
    assert raised(lambda: install_prefix_cache(model, **kwargs)) == f"{name} is {value!r}, expected {expected}."
    assert all("forward" not in vars(block) for block in model.blocks)
    install_prefix_cache(model)
