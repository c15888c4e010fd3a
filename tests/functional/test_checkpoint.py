import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_checkpointing, install_token_drop, select_blocks_
from lightning_bsr.functional._checkpoint import RECOMPUTE_OBSERVERS
from lightning_bsr.memory import measure
from plain_modules import tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])


def gradients(model):
    model.zero_grad()
    torch.manual_seed(1)
    F.cross_entropy(model(X), Y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal(ours, theirs):
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture
def recomputed():
    seen = []
    RECOMPUTE_OBSERVERS.append(seen.append)
    yield seen
    RECOMPUTE_OBSERVERS.remove(seen.append)


def test_install_checkpointing__gradients_are_equal_bit_for_bit(recomputed):
    plain = tiny_vit(drop_path_rate=0.3, proj_drop_rate=0.1).train()
    model = copy.deepcopy(plain)
    install_checkpointing(model)
    assert_equal(gradients(model), gradients(plain))
    # Begun and ended once for each block, though torch ends a recomputation early by an exception.
    assert recomputed == [True, False] * 6


@pytest.mark.parametrize("first", ["checkpoint", "drop"])
def test_install_checkpointing__composes_with_token_drop(first):
    plain = tiny_vit()
    install_token_drop(plain, [1, 3], 0.5)
    model = tiny_vit()
    if first == "checkpoint":
        handle = install_checkpointing(model)
        drop = install_token_drop(model, [1, 3], 0.5)
    else:
        drop = install_token_drop(model, [1, 3], 0.5)
        handle = install_checkpointing(model)
    assert_equal(gradients(model), gradients(plain))
    handle.remove()
    assert_equal(gradients(model), gradients(plain))
    drop.remove()
    assert all("forward" not in vars(block) for block in model.blocks)


def test_install_checkpointing__keeps_only_the_inputs():
    model = tiny_vit()
    before = measure(model, X)
    install_checkpointing(model)
    after = measure(model, X)
    assert [line.activations for line in after.by_block[1:-1]] == [4 * 65 * 32 * 4] * 6
    assert after.activations < before.activations / 8


def test_install_checkpointing__runs_nothing_twice_where_nothing_is_kept(recomputed):
    model = tiny_vit()
    select_blocks_(model, [4])
    install_checkpointing(model)
    with torch.no_grad():
        model(X)
    gradients(model)
    assert recomputed == [True, False] * 2


def test_install_checkpointing__works_under_autocast():
    plain, model = tiny_vit(), tiny_vit()
    install_checkpointing(model, [0, -1])
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(model), gradients(plain)
    assert_equal(ours, theirs)


def test_install_checkpointing__runs_on_fake_tensors(recomputed):
    model = tiny_vit()
    install_checkpointing(model)
    mode = FakeTensorMode()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(p.detach()))
    with mode:
        model(mode.from_tensor(X)).sum().backward()
    assert recomputed == [True, False] * 6


def test_install_checkpointing__survives_deepcopy_and_pickle(recomputed):
    model = tiny_vit()
    handle = install_checkpointing(model, [2])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks[2].forward.block is twin.blocks[2]
        gradients(twin)
    assert recomputed == [True, False] * 2
    keys = list(model.state_dict())
    handle.remove()
    handle.remove()
    assert "forward" not in vars(model.blocks[2])
    assert keys == list(model.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, when compiling
def test_install_checkpointing__compiles():
    plain, model = tiny_vit(depth=2), tiny_vit(depth=2)
    install_checkpointing(model)
    compiled = torch.compile(model, backend="aot_eager")
    F.cross_entropy(compiled(X), Y).backward()
    for name, theirs in gradients(plain).items():
        torch.testing.assert_close(model.get_parameter(name).grad, theirs)


def test_install_checkpointing__refuses():
    model = tiny_vit()
    handle = install_checkpointing(model, [1])
    with pytest.raises(ConfigurationError) as error:
        install_checkpointing(model)
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) is computed again in backward already; remove that first."
    )
    assert "forward" not in vars(model.blocks[0])
    handle.remove()
    model.blocks[1].forward = repr.__call__
    with pytest.raises(ConfigurationError) as error:
        install_checkpointing(model)
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) has its forward replaced by method-wrapper; undo that first."
    )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("some", "blocks is 'some', expected 'all' or a list of block indices."),
        (3, "blocks is 3, expected 'all' or a list of block indices."),
        ([6], "blocks has 6, but the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1."),
    ],
)
def test_install_checkpointing__checks_blocks(blocks, message):
    with pytest.raises(ConfigurationError) as error:
        install_checkpointing(tiny_vit(), blocks)
    assert str(error.value) == message


def test_str():
    model = tiny_vit()
    assert str(install_checkpointing(model, [-1, 0])) == (
        "blocks 0, 5 of 6 of the ViT (VisionTransformer) are computed again in backward"
    )
    assert str(install_checkpointing(model, [])) == (
        "none of 6 blocks of the ViT (VisionTransformer) are computed again in backward"
    )
