"""Tokens carry their positions through whatever runs blocks again, copies them, or compiles them."""

import copy
import pickle

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    install_checkpointing,
    install_lean_activations,
    install_prefix_cache,
    install_token_drop,
    select_blocks_,
)
from lightning_bsr.memory import measure, plan

SIZE = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
MODELS = {
    "eva": lambda: Eva(**SIZE, use_rot_pos_emb=True, init_values=0.5),
    "mixed": lambda: Eva(**SIZE, use_rot_pos_emb=True, rope_type="mixed"),
    "beit": lambda: Beit(**SIZE, use_rel_pos_bias=True),
    "shared": lambda: Beit(**SIZE, use_shared_rel_pos_bias=True),
}
BLOCKS, RATE = [0, 2], 0.5


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 24)


def gradients(model, out):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(out.square().sum(), trained, allow_unused=True)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["timm", "ours", "lean_recompute", "lean_exact"])
def test_recomputation__two_forwards_before_their_backwards(name, how, images):
    model, others = build(name), torch.randn(2, 3, 24, 24)
    install_token_drop(model, BLOCKS, RATE)
    first, second = model(images), model(others)
    expected = gradients(model, first), gradients(model, second)
    if how == "ours":
        install_checkpointing(model)
    elif how.startswith("lean"):
        install_lean_activations(model, how.removeprefix("lean_"))
    else:
        model.set_grad_checkpointing()
    outs = model(images), model(others)
    assert torch.equal(outs[0], first)
    assert_same(gradients(model, outs[0]), expected[0])
    assert_same(gradients(model, outs[1]), expected[1])


@pytest.mark.parametrize("name", ["eva", "shared"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies__after_a_forward(name, copier, images):
    model = build(name)
    install_token_drop(model, BLOCKS, RATE)
    out = model(images)
    assert torch.equal(copier(model)(images), out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eva", "beit"])
def test_compile__fullgraph_with_gradients(name, images):
    model = build(name)
    install_token_drop(model, BLOCKS, RATE)
    out = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(compiled, out, rtol=1e-4, atol=1e-5)
    assert_same(gradients(model, compiled), gradients(model, out), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mixed", "shared"])
def test_export__equals_eager(name, images):
    model = build(name)
    install_token_drop(model, BLOCKS, RATE)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)
    pickle.dumps(model)  # no tensor of the trace is left in it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision__positions_are_exact(dtype):
    """Beyond 256 tokens, whole numbers are not exact in these types."""
    torch.manual_seed(0)
    model = Eva(**{**SIZE, "img_size": 80, "depth": 2}, use_rot_pos_emb=True).eval().to(dtype)
    seen = []
    model.blocks[1].attn.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["rope"]), with_kwargs=True)
    model.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    install_token_drop(model, [0], 0.9, fuse=False)
    model(torch.randn(2, 3, 80, 80, dtype=dtype))
    carried, tables = seen
    assert carried.shape == (2, 361, 34)
    high, low = carried[0, 1:, 32:].long().unbind(-1)
    assert torch.equal(tables[0, 0], model.rope.get_embed()[high * 256 + low - 1])
    assert len(set((high * 256 + low).tolist())) == 360


def test_lean_activations__exact_and_planned(images):
    model = build("eva")
    select_blocks_(model, [1, 3])
    install_token_drop(model, BLOCKS, RATE)
    plain = gradients(model, model(images))
    kept = measure(model, images, loss=lambda out: out.square().sum()).activations
    install_lean_activations(model)
    for ours, theirs in zip(gradients(model, model(images)), plain, strict=True):
        assert torch.equal(ours, theirs)
    measured = measure(model, images, loss=lambda out: out.square().sum())
    planned = plan(model, images, loss=lambda out: out.square().sum())
    assert measured.activations < kept
    assert (planned.activations, planned.gradients) == (measured.activations, measured.gradients)


def test_prefix_cache__blocks_after_it_know_the_positions(images):
    model = build("beit")
    select_blocks_(model, [-1])
    install_token_drop(model, BLOCKS, RATE)
    out = model(images)
    handle = install_prefix_cache(model)
    assert torch.equal(model(images), out)
    assert torch.equal(model(images), out)
    assert handle.counts.hits == 2


def test_random_score__in_blocks_with_a_bias(images):
    model = build("beit")
    install_token_drop(model, BLOCKS, RATE, score="random")
    assert model(images).isfinite().all()


def test_install_token_drop__tables_need_a_width():
    model = build("eva")
    del model.embed_dim
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, BLOCKS, RATE)
    assert str(error.value) == (
        "The ViT (Eva) has no integer embed_dim, by which its tokens could carry the positions that rope is looked up "
        "by; add one."
    )


def test_install_token_drop__pool_of_neighbours():
    qwen3_vit = pytest.importorskip("timm.models.qwen3_vit")
    model = qwen3_vit.Qwen3VitEncoder(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, out_features=8)
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, [0], RATE)
    assert str(error.value) == (
        "The ViT (Qwen3VitEncoder) has global_pool='merge', which joins neighbouring patches and needs all of them; "
        "give restore=True, which puts dropped tokens back to their places, or build it without that."
    )
    assert "forward" not in vars(model.blocks[0])
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    handle = install_token_drop(model, [0], RATE, restore=True)
    restored = model(images)
    assert restored.shape == expected.shape
    assert not torch.equal(restored, expected)
    handle.remove()
    assert torch.equal(model(images), expected)


def test_install_token_drop__naflex_with_images_drops_as_ever(images):
    torch.manual_seed(0)
    model = NaFlexVit(patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=3, class_token=True).eval()
    handle = install_token_drop(model, [0], RATE)
    assert handle.forwards[0].score == "cls"
    assert model.forward_features(images).shape == (2, 20, 32)
