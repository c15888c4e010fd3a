import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import SideNetwork, install_side_network, install_token_drop, select_blocks_
from lightning_bsr.memory import measure
from plain_modules import PlainModule, tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def test_side_network__starts_as_the_model_it_is_beside():
    model = tiny_vit()
    before = model(X)
    install_side_network(model)
    assert torch.equal(model(X), before)


def test_side_network__trains_beside_the_frozen_backbone():
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    install_side_network(model)
    train(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.get(name, value))}
    assert changed == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    # The gate of the first block has nothing to mix with.
    side = {name for name, _ in model.named_parameters() if name.startswith("side_network.")}
    assert trained(model) == changed | side - {"side_network.blocks.0.gate"}
    for name in trained(model):
        assert model.get_parameter(name).grad.abs().sum() > 0, name


def test_side_network__backward_keeps_nothing_of_the_backbone():
    model = tiny_vit()
    select_blocks_(model, []).remove()
    full = measure(model, X)
    handle = install_side_network(model)
    kept = {line.name: line.activations for line in measure(model, X).by_block}
    handle.remove()
    head = measure_head(model)
    assert kept["embed"] == 0
    # Of a block: its output, which goes into the side network, and the small tensors there (width 4, hidden 8).
    tokens = 4 * 65
    for index in range(6):
        assert kept[str(index)] <= tokens * 4 * (32 + 4 * 8 + 2 * 8 + 2)
    assert kept["head"] <= head["head"] + tokens * 4 * 32
    assert sum(kept.values()) < full.activations / 4


def measure_head(model):
    selection = select_blocks_(model, [])
    lines = {line.name: line.activations for line in measure(model, X).by_block}
    selection.remove()
    return lines


def test_remove__leaves_the_backbone_and_the_trained_head():
    model = tiny_vit().train()
    flags, keys = trained(model), list(model.state_dict())
    handle = install_side_network(model)
    handle.eval_frozen()
    assert not model.blocks[0].training
    train(model)
    with_side = model(X)
    handle.remove()
    handle.remove()
    assert trained(model) == flags
    assert list(model.state_dict()) == keys
    assert all(not block._forward_hooks and block.training for block in model.blocks)
    assert not torch.equal(model(X), with_side)
    again = install_side_network(model, network=handle.network)
    assert torch.equal(model(X), with_side)
    again.remove()


def test_side_network__survives_deepcopy_and_pickle():
    model = tiny_vit()
    install_side_network(model)
    train(model)
    out = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), out)
        assert next(iter(twin.blocks[0]._forward_hooks.values())).network is twin.side_network


def test_side_network__works_under_autocast_and_in_bfloat16():
    model = tiny_vit()
    install_side_network(model)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(X).float(), Y).backward()
    half = tiny_vit().bfloat16()
    install_side_network(half)
    assert half.side_network.up.weight.dtype is torch.bfloat16
    assert half(X.bfloat16()).dtype is torch.bfloat16


def test_side_network__a_failed_forward_leaves_no_state_behind():
    model = tiny_vit()
    install_side_network(model)
    with pytest.raises(AssertionError):
        model(X[:, :, :16])
    out = model(X)
    assert model.side_network._state is None
    assert torch.equal(model(X), out)


def test_side_network__refuses_dropped_tokens():
    model = tiny_vit()
    drop = install_token_drop(model, [2], 0.5)
    with pytest.raises(ConfigurationError) as error:
        install_side_network(model)
    assert str(error.value) == (
        "Block 2 of the ViT (VisionTransformer) drops tokens, but a side network needs the same tokens after every "
        "block; remove the token drop first."
    )
    assert not hasattr(model, "side_network")
    drop.remove()
    install_side_network(model)
    install_token_drop(model, [2], 0.5)
    with pytest.raises(ConfigurationError) as error:
        model(X)
    assert str(error.value) == (
        "The side network has 65 tokens and block 2 gives 34; do not drop tokens in a ViT with a side network."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": 0}, "reduction is 0, expected 1 to 32, the width of the ViT (VisionTransformer)."),
        ({"reduction": 33}, "reduction is 33, expected 1 to 32, the width of the ViT (VisionTransformer)."),
        (
            {"network": SideNetwork(2, 16, 4)},
            "network is for 2 blocks of width 16, expected 6 of width 32 for the ViT (VisionTransformer).",
        ),
    ],
)
def test_side_network__errors_change_nothing(arguments, message):
    model = tiny_vit()
    before = trained(model)
    with pytest.raises(ConfigurationError) as error:
        install_side_network(model, **arguments)
    assert str(error.value) == message
    assert trained(model) == before


def test_side_network__refuses_a_second_one_and_a_model_without_width():
    model = tiny_vit()
    handle = install_side_network(model)
    with pytest.raises(ConfigurationError) as error:
        install_side_network(model)
    assert str(error.value) == "The ViT (VisionTransformer) has a side_network already; remove that first."
    handle.remove()
    del model.embed_dim
    with pytest.raises(ConfigurationError) as error:
        install_side_network(model)
    assert str(error.value) == (
        "The ViT (VisionTransformer) has no integer embed_dim, which says how wide a side network beside it must be; "
        "add one."
    )


def test_str__counts_parameters():
    assert str(install_side_network(PlainModule(), reduction=4)) == (
        "a side network of width 8 trains beside the ViT 'model' (VisionTransformer): 3,849 of 83,754 parameters "
        "(4.6 %)"
    )


def test_install_side_network__refuses_blocks_that_are_computed_again():
    model = tiny_vit(depth=2)
    model.set_grad_checkpointing()
    with pytest.raises(ConfigurationError) as error:
        install_side_network(model)
    assert str(error.value) == (
        "The ViT (VisionTransformer) computes its blocks again in backward (grad_checkpointing), but a side network "
        "may step after each block only once; turn it off with set_grad_checkpointing(False): backward never "
        "enters the blocks."
    )
    assert not hasattr(model, "side_network")
