import pytest
import torch
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import select_blocks_
from lightning_bsr.functional._quantize import quantize_frozen_
from plain_modules import tiny_vit


def not_frozen(model):
    model.blocks.requires_grad_(True)


def twice(model):
    quantize_frozen_(model)


def replaced(model):
    model.blocks[2].mlp.fc1.forward = repr.__call__


def of_integers(model):
    model.blocks[2].mlp.fc1.weight = nn.Parameter(torch.zeros(128, 32, dtype=torch.int16), requires_grad=False)


def tied_to_a_trained_one(model):
    model.blocks[2].mlp.fc1.weight.data = model.blocks[3].mlp.fc1.weight.data


def shared_with_a_buffer(model):
    model.register_buffer("copy", model.blocks[2].mlp.fc1.weight.detach()[:2])


def with_nan(model):
    model.blocks[5].mlp.fc2.weight.data[3, 3] = torch.nan


def with_infinity(model):
    model.blocks[5].mlp.fc2.weight.data[3, 3] = -torch.inf


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            not_frozen,
            "No linear layer in the blocks of the ViT (VisionTransformer) has a frozen weight to hold in 8 bits; "
            "freeze some before, for example with BlockSelect or select_blocks_.",
        ),
        (twice, "The weight of 'blocks.0.attn.qkv' is held in 8 bits already; remove that first."),
        (
            replaced,
            "'blocks.2.mlp.fc1' has its forward replaced by method-wrapper; undo that before its weight is held in 8 "
            "bits.",
        ),
        (
            of_integers,
            "The weight of 'blocks.2.mlp.fc1' is a Parameter of torch.int16, expected a plain Parameter of "
            "torch.float16, torch.bfloat16, torch.float32, torch.float64.",
        ),
        (
            tied_to_a_trained_one,
            "The weight of 'blocks.2.mlp.fc1' shares its memory with 'blocks.3.mlp.fc1.weight', so it cannot be held "
            "in 8 bits; give one of them a copy.",
        ),
        (
            shared_with_a_buffer,
            "The weight of 'blocks.2.mlp.fc1' shares its memory with 'copy', so it cannot be held in 8 bits; give one "
            "of them a copy.",
        ),
        (with_nan, "The weight of 'blocks.5.mlp.fc2' has NaN or infinite values, which cannot be held in 8 bits."),
        (with_infinity, "The weight of 'blocks.5.mlp.fc2' has NaN or infinite values, which cannot be held in 8 bits."),
    ],
)
def test_quantize_frozen__refuses_and_changes_nothing(spoil, message):
    model = tiny_vit()
    select_blocks_(model, [3])
    spoil(model)
    before = {name: (p, p.dtype, p.clone()) for name, p in model.named_parameters()}
    own = {name: set(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(ConfigurationError) as error:
        quantize_frozen_(model)
    assert str(error.value) == message
    assert {name: set(vars(m)) for name, m in model.named_modules()} == own
    for name, parameter in model.named_parameters():
        same, dtype, value = before[name]
        assert parameter is same
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter, value, rtol=0, atol=0, equal_nan=True)
