import pytest
import timm
import torch

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import select_blocks_, train_biases_
from lightning_bsr.memory import measure
from plain_modules import PlainModule, tiny_vit


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("head", [True, False])
def test_train_biases__trains_exactly_those(head):
    model = tiny_vit(qkv_bias=True)
    train_biases_(model, head=head)
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{i}.{layer}.bias" for i in range(6) for layer in block}
    expected |= {"patch_embed.proj.bias", "norm.bias"} | ({"head.weight", "head.bias"} if head else set())
    assert trained(model) == expected


def test_train_biases__knows_biases_that_attention_holds_itself():
    model = tiny_vit()
    model.blocks[0].attn.q_bias = torch.nn.Parameter(torch.zeros(32))
    train_biases_(model)
    assert "blocks.0.attn.q_bias" in trained(model)


def test_train_biases__keeps_less_than_full_training():
    model, x = timm.create_model("test_vit", num_classes=10), torch.randn(2, 3, 160, 160)
    full = measure(model, x).activations
    train_biases_(model)
    assert measure(model, x).activations < 0.8 * full


def test_remove__restores_flags():
    model = tiny_vit()
    model.pos_embed.requires_grad_(False)
    before = trained(model)
    biases = train_biases_(model)
    biases.remove()
    assert trained(model) == before
    model.requires_grad_(False)
    biases.remove()
    assert trained(model) == set()


def test_train_biases__finds_the_vit_by_path():
    module = torch.nn.ModuleDict({"a": tiny_vit(), "b": tiny_vit()})
    train_biases_(module, vit="b")
    assert {name for name, p in module["a"].named_parameters() if p.requires_grad} == {
        name for name, _ in module["a"].named_parameters()
    }
    assert not module["b"].pos_embed.requires_grad


def test_train_biases__refuses_a_second_choice():
    model = tiny_vit()
    select_blocks_(model, 2)
    with pytest.raises(ConfigurationError) as error:
        train_biases_(model)
    assert str(error.value) == (
        "The ViT (VisionTransformer) has its blocks selected already; remove that selection first."
    )


def test_str__counts_parameters():
    assert str(train_biases_(PlainModule())) == (
        "biases train in the ViT 'model' (VisionTransformer): 2,308 of 80,100 parameters (2.9 %)"
    )
