import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lightning_bsr.models  # noqa: F401  # registers the micro ViT
from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_checkpointing, install_token_drop, select_blocks_
from lightning_bsr.functional._prefix import PrefixForward, install_prefix_cache
from lightning_bsr.functional._prefix_pass import PrefixCounts
from lightning_bsr.memory import plan
from plain_modules import tiny_vit

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(8, 3, 32, 32, generator=GENERATOR)
Y = torch.tensor([0, 1, 2, 3] * 2)
OTHERS = torch.randn(8, 3, 32, 32, generator=GENERATOR)


def selected(model=None, blocks=(3, 5)):
    model = (tiny_vit() if model is None else model).eval()
    select_blocks_(model, list(blocks))
    return model


def cached(**kwargs):
    model = selected()
    return model, install_prefix_cache(model, **kwargs)


def step(model, x=X, y=Y):
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name in theirs[1]:
        assert torch.equal(ours[1][name], theirs[1][name]), name


@pytest.fixture
def computed(monkeypatch):
    """The blocks' own forwards that ran, by how many tokens came in."""
    runs = []
    own = timm.models.vision_transformer.Block.forward
    monkeypatch.setattr(
        timm.models.vision_transformer.Block,
        "forward",
        lambda self, x, *args, **kwargs: (runs.append(x.shape[1]), own(self, x, *args, **kwargs))[1],
    )
    return runs


@pytest.mark.parametrize("drop", [False, True], ids=["no_drop", "drop"])
def test_install_prefix_cache__steps_are_equal_bit_for_bit(drop):
    plain, model = selected(), selected()
    if drop:
        install_token_drop(plain, [1, 2, 4], 0.5)
        install_token_drop(model, [1, 2, 4], 0.5)
    handle = install_prefix_cache(model)
    for order in (range(8), [3, 1, 0, 2, 7, 6, 5, 4], [3, 3, 1, 0, 2, 7, 6, 5]):
        order = list(order)
        assert_same_step(step(model, X[order], Y[order]), step(plain, X[order], Y[order]))
    assert handle.counts == PrefixCounts(hits=16, misses=8)
    assert handle.num_bytes == 8 * 32 * 4 * (19 if drop else 65)


@pytest.mark.parametrize(
    ("name", "size", "blocks", "drop"),
    [
        ("test_vit", 160, [3, 5], [1, 2, 4]),
        ("vit_micro_patch4_32.cifar100", 32, [3, 7, 11], [2, 5, 8]),
    ],
)
def test_install_prefix_cache__of_real_models_is_exact_in_any_batch(name, size, blocks, drop):
    images = torch.randn(7, 3, size, size)
    labels = torch.arange(7)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(selected(timm.create_model(name, num_classes=10), blocks))
        install_token_drop(models[-1], drop, 0.5)
    handle = install_prefix_cache(models[1])
    for order in ([0, 1, 2, 3], [4, 5, 6, 0], [6, 3, 1, 4], [5], [2, 6], [5], [2, 6]):
        theirs, ours = (step(model, images[order], labels[order]) for model in models)
        assert_same_step(ours, theirs)
    # Of the batches of four, the last is all known; those of one and two are other entries.
    assert handle.counts == PrefixCounts(hits=4 + 1 + 2, misses=8 + 1 + 2, known=1)


def test_install_prefix_cache__skips_the_blocks(computed):
    model, _ = cached()
    model(X)
    computed.clear()
    model(X)
    assert len(computed) == 3
    computed.clear()
    model(torch.cat([X[:7], OTHERS[:1]]))
    # All blocks, and those of the prefix once more, to see that the place in the batch does not matter.
    assert len(computed) == 6 + 3


def test_install_prefix_cache__blocks_chooses_how_many(computed):
    model, _ = cached(blocks=1)
    model(X)
    computed.clear()
    model(X)
    assert len(computed) == 5


def test_install_prefix_cache__of_all_blocks(computed):
    model = selected(blocks=())
    install_prefix_cache(model)
    first = step(model)
    computed.clear()
    assert_same_step(step(model), first)
    assert computed == []


def test_install_prefix_cache__goes_around_what_is_installed_later(computed):
    plain, model = selected(), selected()
    install_prefix_cache(model)
    for each in (plain, model):
        install_token_drop(each, [1], 0.5)
        install_checkpointing(each)
    assert [isinstance(block.forward, PrefixForward) for block in model.blocks] == [True] * 3 + [False] * 3
    assert_same_step(step(model), step(plain))
    assert_same_step(step(model), step(plain))


def test_install_prefix_cache__under_autocast():
    plain, (model, handle) = selected(), cached()
    step(model)  # in fp32
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert_same_step(step(model), step(plain))
    assert_same_step(step(model), step(plain))
    assert handle.counts == PrefixCounts(hits=16, misses=16)


def test_install_prefix_cache__of_a_bfloat16_model():
    plain, model = selected(tiny_vit().bfloat16()), selected(tiny_vit().bfloat16())
    handle = install_prefix_cache(model)
    for _ in range(2):
        assert_same_step(step(model, X.bfloat16()), step(plain, X.bfloat16()))
    assert handle.num_bytes == 8 * 65 * 32 * 2


def test_install_prefix_cache__without_gradients():
    plain, (model, handle) = selected(), cached()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(X), plain(X))
    # What inference computed is of use to training no less than what training computed.
    assert_same_step(step(model), step(plain))
    assert handle.counts == PrefixCounts(hits=8, misses=16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_install_prefix_cache__a_smaller_dtype_takes_half_and_is_close(dtype):
    plain, (model, handle) = selected(), cached(dtype=dtype)
    assert_same_step(step(model), step(plain))
    loss, _ = step(model)
    assert loss.dtype == torch.float32
    assert not torch.equal(loss, step(plain)[0])
    torch.testing.assert_close(loss, step(plain)[0], atol=1e-2, rtol=0)
    assert handle.num_bytes == 8 * 65 * 32 * 2


def test_install_prefix_cache__bound():
    row = 65 * 32 * 4
    plain, (model, handle) = selected(), cached(max_bytes=5 * row + 1)
    for _ in range(2):
        assert_same_step(step(model), step(plain))
    assert handle.num_bytes == 5 * row
    assert handle.counts == PrefixCounts(misses=16, known=5, rejected=6)
    step(model, X[:5], Y[:5])  # another batch size, for which there is no room
    assert handle.counts.hits == 0


@pytest.mark.parametrize("how", ["in_place", "replaced", "keep_rate", "data"])
def test_install_prefix_cache__a_changed_prefix_is_computed_anew(how):
    plain, model = selected(), selected()
    drops = [install_token_drop(each, [1], 0.5) for each in (plain, model)]
    handle = install_prefix_cache(model)
    step(model)
    for each, drop in zip((plain, model), drops, strict=True):
        weight = each.blocks[1].mlp.fc1.weight
        if how == "in_place":
            with torch.no_grad():
                weight[0, 0] += 1
        elif how == "replaced":
            each.blocks[1].mlp.fc1.weight = nn.Parameter(weight.detach() * 2, requires_grad=False)
        elif how == "keep_rate":
            drop.set_keep_rates({1: 0.25})
        else:
            weight.data[0, 0] += 1  # by which autograd counts no version
    before = handle.fingerprint
    if how == "data":
        handle.verify()
    for hits in (0, 8):
        assert_same_step(step(model), step(plain))
        assert handle.counts.hits == hits
    assert handle.fingerprint != before
    assert handle.num_bytes == 8 * 32 * 4 * (18 if how == "keep_rate" else 34)


def test_install_prefix_cache__verify_keeps_what_has_not_changed():
    model, handle = cached()
    handle.verify()  # nothing is stored yet
    assert handle.fingerprint == b""
    step(model)
    handle.verify()
    step(model)
    assert handle.counts.hits == 8


def test_install_prefix_cache__attention_masks_are_not_cached():
    plain, (model, handle) = selected(), cached()
    mask = torch.ones(65, 65, dtype=torch.bool).tril()
    step(model)
    assert torch.equal(model.forward_features(X, attn_mask=mask), plain.forward_features(X, attn_mask=mask))
    assert handle.counts == PrefixCounts(misses=8)


def test_install_prefix_cache__forward_intermediates_sees_every_block():
    plain, (model, handle) = selected(), cached()
    model(X)
    ours, theirs = model.forward_intermediates(X)[1], plain.forward_intermediates(X)[1]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    model(X)
    assert handle.counts == PrefixCounts(hits=8, misses=8)
    install_token_drop(model, [4], 0.5)
    with pytest.raises(ConfigurationError, match="drops tokens, so its feature maps would miss some patches"):
        model.forward_intermediates(X)


def test_install_prefix_cache__plans_as_without():
    model, _ = cached()
    assert plan(model, X.shape).activations == plan(selected(), X.shape).activations


def test_install_prefix_cache__copies_have_an_empty_cache(computed):
    model, handle = cached()
    first = step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks[0].forward.prefix.blocks[0] is twin.blocks[0]
        assert twin.blocks[0].forward.prefix is twin.blocks[2].forward.prefix
        computed.clear()
        assert_same_step(step(twin), first)
        assert len(computed) >= 6
    assert handle.counts == PrefixCounts(misses=8)


def test_remove__leaves_nothing():
    model = selected()
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    handle = install_prefix_cache(model)
    assert list(model.state_dict()) == keys
    step(model)
    handle.remove()
    handle.remove()
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes
    assert handle.num_bytes == 0
    install_prefix_cache(model)


def test_remove__of_an_old_handle_leaves_the_new_one():
    model, old = cached()
    old.remove()
    handle = install_prefix_cache(model)
    old.remove()
    step(model)
    step(model)
    assert handle.counts.hits == 8


def test_str():
    model, handle = cached()
    text = "blocks 0 to 2 of 6 of the ViT (VisionTransformer) run once for each image, then their output is read"
    assert str(handle) == f"{text}; 0.0 of at most 1024.0 MiB"
    for _ in range(3):
        model(X)
    assert str(handle) == f"{text}: 16 read, 8 computed; 0.1 of at most 1024.0 MiB"
    assert str(cached(blocks=1)[1]).startswith("block 0 of 6 of the ViT (VisionTransformer) run")
