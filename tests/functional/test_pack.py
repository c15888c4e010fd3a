import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import lightning_bsr.models  # noqa: F401  # registers the micro ViT
from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    install_checkpointing,
    install_int8_activations,
    install_sparse_activations,
    install_token_drop,
)
from lightning_bsr.functional._pack import PACK_OBSERVERS
from lightning_bsr.memory import measure
from plain_modules import tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])
INSTALLERS = [install_int8_activations, install_sparse_activations]


@pytest.fixture
def held():
    """Storages that packs hold, by their address; they are kept alive so that none counts twice."""
    storages = {}

    def observe(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage, tuple(tensor.shape), tensor.dtype

    PACK_OBSERVERS.append(observe)
    yield storages
    PACK_OBSERVERS.remove(observe)


def num_bytes(held, model):
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for key, (storage, _, _) in held.items() if key not in own)


def step(model, autocast=False):
    """Return the output and all gradients as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(X)
    F.cross_entropy(out.float(), Y).backward()
    return out.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters()])


def micro_vit():
    return timm.create_model("vit_micro_patch4_32.cifar100", pretrained=True)


def fake(model):
    mode = FakeTensorMode()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(p.detach()))
    return mode


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("install", "cosine", "error"),
    [(install_int8_activations, 0.9999, 0.02), (install_sparse_activations, 0.85, 0.5)],
)
def test_packing__outputs_exact_gradients_near(install, cosine, error, autocast):
    model = micro_vit()
    plain_out, plain = step(model, autocast)
    install(model)
    out, packed = step(model, autocast)
    assert torch.equal(out, plain_out)
    assert F.cosine_similarity(packed, plain, dim=0) > cosine
    assert (packed - plain).norm() / plain.norm() < error


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_sparse__changes_only_gradients_of_weights_of_linear_layers(keep):
    plain = micro_vit()
    model = copy.deepcopy(plain)
    install_sparse_activations(model, keep)
    step(model)
    step(plain)
    inside = {f"blocks.{name}.weight" for name, m in plain.blocks.named_modules() if isinstance(m, nn.Linear)}
    for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        # The projection's input is attention's output, which is kept exactly anyway.
        exact = name not in inside or name.endswith("attn.proj.weight")
        assert torch.equal(p.grad, other.grad) == exact, name


def test_sparse__keep_all_is_exact():
    plain, model = tiny_vit(), tiny_vit()
    install_sparse_activations(model, 1.0)
    assert torch.equal(step(model)[1], step(plain)[1])


def test_int8__holds_each_value_once_as_a_byte(held):
    model = micro_vit()
    install_int8_activations(model, [0])
    step(model)
    values = 4 * 65 * 128
    # Inputs of norm1, qkv, norm2, fc1 (1 each); q, k, v, and the output of attention (1 each); fc1's output and fc2's
    # input (4 each).
    codes = [storage.nbytes() for storage, _, dtype in held.values() if dtype is torch.uint8]
    assert sum(codes) == 16 * values
    # Two ends for each row: 6 rows a token of the width or more, and q, k, v, out with 4 heads each; the norms' mean
    # and deviation; attention's log-sum-exp.
    tokens = 4 * 65
    ends = 2 * (6 + 4 * 4) * tokens * 4
    statistics = (2 * 2 + 4) * tokens * 4
    assert num_bytes(held, model) == 16 * values + ends + statistics


@pytest.mark.parametrize(
    ("install", "autocast", "share"),
    [
        (install_int8_activations, False, 0.29),
        (install_int8_activations, True, 0.49),
        (install_sparse_activations, False, 0.70),
        (install_sparse_activations, True, 0.75),
    ],
)
def test_packing__bytes_fall(install, autocast, share, held):
    model = micro_vit()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return forward(x)

    def in_blocks():
        return sum(line.activations for line in measure(Wrapped(), X).by_block[1:-1])

    before = in_blocks()
    install(model)
    assert in_blocks() < share * before


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__leaves_no_float_copy_alive(install):
    """What is packed is freed when the forward pass has gone by, though it is needed in backward."""
    model = tiny_vit(num_heads=2)
    install(model)
    outputs = []

    def note(module, inputs, output):
        outputs.append(weakref.ref(output.untyped_storage()))

    for block in model.blocks:
        block.norm2.register_forward_hook(note)
    loss = model(X).sum()
    assert [ref() for ref in outputs] == [None] * 6
    loss.backward()


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__all_is_freed_without_the_garbage_collector(install, held):
    model = tiny_vit()
    install(model)
    gc.collect()
    gc.disable()
    try:
        loss = model(X).sum()
        refs = [weakref.ref(storage) for storage, _, _ in held.values()]
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        refs = [ref for ref in refs if ref()._cdata not in own]
        held.clear()
        assert all(ref() is not None for ref in refs)
        del loss
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__same_on_fake_tensors(install, held):
    def seen():
        return [(storage.nbytes(), shape, dtype) for storage, shape, dtype in held.values()]

    model = tiny_vit()
    install(model)
    loss = model(X).sum()
    real = seen()
    held.clear()
    del loss
    mode = fake(model)
    with mode:
        loss = model(mode.from_tensor(X)).sum()
        assert seen() == real
        loss.backward()


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__composes_with_token_drop(install):
    plain, model = tiny_vit(), tiny_vit()
    install_token_drop(plain, [1, 3], 0.5)
    install(model)
    install_token_drop(model, [1, 3], 0.5)
    (plain_out, plain_gradient), (out, gradient) = step(plain), step(model)
    assert torch.equal(out, plain_out)
    assert F.cosine_similarity(gradient, plain_gradient, dim=0) > 0.75


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__without_fused_attention(install):
    plain, model = tiny_vit(), tiny_vit()
    for vit in (plain, model):
        for block in vit.blocks:
            block.attn.fused_attn = False
    install(model)
    (plain_out, plain_gradient), (out, gradient) = step(plain), step(model)
    assert torch.equal(out, plain_out)
    assert F.cosine_similarity(gradient, plain_gradient, dim=0) > 0.75


def test_int8__attention_with_a_mask_is_exact():
    model = tiny_vit(depth=1)
    block = copy.deepcopy(model.blocks[0])
    install_int8_activations(model)
    mask = torch.zeros(4, 2, 65, 65).masked_fill(torch.rand(4, 2, 65, 65) < 0.3, -torch.inf)
    x = torch.randn(4, 65, 32, requires_grad=True)
    out = model.blocks[0](x, attn_mask=mask)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(out, block(x, attn_mask=mask))


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__an_in_place_change_is_noticed(install):
    model = tiny_vit()
    install(model)
    loss = model(X).sum()
    with torch.no_grad():
        model.blocks[3].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    assert "[32, 128] that backward needs was changed by an in-place operation" in str(error.value)


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__backward_twice(install):
    model = tiny_vit()
    install(model)
    loss = model(X).sum()
    loss.backward(retain_graph=True)
    once = model.blocks[0].mlp.fc1.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.blocks[0].mlp.fc1.weight.grad, 2 * once)


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__survives_deepcopy_and_pickle(install):
    model = tiny_vit()
    handle = install(model, blocks=[2, -1])
    gradient = step(model)[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks[2].forward.block is twin.blocks[2]
        assert torch.equal(step(twin)[1], gradient)
    keys = list(model.state_dict())
    handle.remove()
    handle.remove()
    assert all("forward" not in vars(block) for block in model.blocks)
    assert keys == list(model.state_dict())


@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__keeps_nothing_without_grad(install, held):
    model = tiny_vit()
    install(model)
    with torch.no_grad():
        model(X)
    assert not held


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, when compiling
@pytest.mark.parametrize("install", INSTALLERS)
def test_packing__blocks_stay_uncompiled(install, held):
    model = tiny_vit(depth=2)
    install(model)
    gradient = step(model)[1]
    held.clear()
    compiled = torch.compile(model, backend="aot_eager")
    try:
        torch.testing.assert_close(step(compiled)[1], gradient)
    finally:
        # Else the compiler goes on breaking its graph in other tests where it had to here.
        torch.compiler.reset()
    assert held


def test_packing__refuses_packed_and_recomputed_blocks():
    model = tiny_vit()
    handle = install_int8_activations(model, [1])
    with pytest.raises(ConfigurationError) as error:
        install_sparse_activations(model)
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) packs its activations already; remove that first."
    )
    handle.remove()
    install_checkpointing(model, [2])
    with pytest.raises(ConfigurationError) as error:
        install_int8_activations(model)
    assert str(error.value) == (
        "Block 2 of the ViT (VisionTransformer) is computed again in backward already; remove that first."
    )


@pytest.mark.parametrize("keep", [0, 1.5, True, "0.1"])
def test_sparse__checks_keep(keep):
    with pytest.raises(ConfigurationError) as error:
        install_sparse_activations(tiny_vit(), keep)
    assert str(error.value) == f"keep is {keep!r}, expected a number above 0 and at most 1."


def test_str():
    model = tiny_vit()
    handle = install_int8_activations(model)
    assert str(handle) == "all 6 blocks of the ViT (VisionTransformer) keep 8-bit activations"
    handle.remove()
    assert str(install_sparse_activations(model, 0.25, [0])) == (
        "blocks 0 of 6 of the ViT (VisionTransformer) keep 0.25 of the inputs of linear layers"
    )
