import builtins
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_lora
from plain_modules import PlainModule, tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])


@pytest.fixture(autouse=True)
def _needs_peft(request):
    if "without_peft" not in request.node.name:
        pytest.importorskip("peft")


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def test_lora__trains_adapters_and_head():
    model = tiny_vit()
    before, start = copy.deepcopy(model.state_dict()), model(X)
    install_lora(model, rank=4)
    assert torch.equal(model(X), start)
    adapters = {
        f"blocks.{i}.attn.{layer}.lora_{half}.lora.weight"
        for i in range(6)
        for layer in ("qkv", "proj")
        for half in "AB"
    }
    assert trained(model) == adapters | {"head.weight", "head.bias"}
    train(model)
    now = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert {name for name, value in before.items() if not torch.equal(now[name], value)} == {"head.weight", "head.bias"}


def test_remove__merges_and_restores():
    model = tiny_vit().train()
    model.pos_embed.requires_grad_(False)
    flags, before = trained(model), copy.deepcopy(model.state_dict())
    handle = install_lora(model)
    train(model)
    handle.eval_frozen()
    assert not model.patch_embed.training
    assert model.blocks.training
    assert model.blocks[0].training
    adapted = model(X)
    handle.remove()
    handle.remove()
    torch.testing.assert_close(model(X), adapted)
    assert list(model.state_dict()) == list(before)
    assert trained(model) == flags
    assert model.patch_embed.training
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
    again = install_lora(model)
    torch.testing.assert_close(model(X), adapted)
    again.remove()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (None, {"attn.qkv", "attn.proj"}),
        (["qkv"], {"attn.qkv"}),
        (["attn.qkv", "mlp.fc1"], {"attn.qkv", "mlp.fc1"}),
    ],
)
def test_lora__targets(targets, layers):
    handle = install_lora(tiny_vit(), targets=targets)
    assert set(handle.targets) == {f"blocks.{i}.{layer}" for i in range(6) for layer in layers}


def test_lora__without_head_and_by_path():
    module = torch.nn.ModuleDict({"a": tiny_vit(), "b": tiny_vit()})
    install_lora(module, head=False, vit="b")
    assert all("lora_" in name for name in trained(module["b"]))
    assert trained(module["a"]) == {name for name, _ in tiny_vit().named_parameters()}


def test_lora__survives_deepcopy_and_pickle():
    model = tiny_vit()
    install_lora(model)
    train(model)
    out = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1."),
        ({"dropout": 1.0}, "dropout is 1.0, expected a number of at least 0 and below 1."),
        ({"targets": "qkv"}, "targets is 'qkv', expected a list of names, such as ['qkv']."),
        (
            {"targets": ["qkv", "query"]},
            "targets has 'query', which names no linear layer in the blocks of the ViT (VisionTransformer); there are "
            "attn.proj, attn.qkv, mlp.fc1, mlp.fc2.",
        ),
        (
            {"targets": []},
            "targets is [], which names no linear layer in the blocks of the ViT (VisionTransformer); there are "
            "attn.proj, attn.qkv, mlp.fc1, mlp.fc2.",
        ),
    ],
)
def test_lora__errors_change_nothing(arguments, message):
    model = tiny_vit()
    before, keys = trained(model), list(model.state_dict())
    with pytest.raises(ConfigurationError) as error:
        install_lora(model, **arguments)
    assert str(error.value) == message
    assert trained(model) == before
    assert list(model.state_dict()) == keys


def test_lora__refuses_a_second_one():
    model = tiny_vit()
    handle = install_lora(model)
    with pytest.raises(ConfigurationError) as error:
        install_lora(model)
    assert str(error.value) == "The ViT (VisionTransformer) has adapters of peft already; remove them first."
    handle.remove()


def test_lora__without_peft(monkeypatch):
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ConfigurationError) as error:
        install_lora(tiny_vit())
    assert str(error.value) == (
        'LoRA is computed by peft, which is not installed; pip install "lightning-bsr[compare]" brings it.'
    )


def test_str__counts_parameters():
    assert str(install_lora(PlainModule(), rank=4)) == (
        "adapters of rank 4 train beside 12 layers of the ViT 'model' (VisionTransformer): 4,740 of 84,708 parameters "
        "(5.6 %)"
    )
