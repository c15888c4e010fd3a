"""Which patches survive: held against a computation token by token, and watched without a trace."""

import math

import pytest
import torch

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_drop_watch, install_prefix_cache, install_token_drop, select_blocks_
from lightning_bsr.functional._drop_forward import DROP_OBSERVERS
from plain_modules import tiny_vit

HEIGHT, WIDTH, PATCHES = 16, 24, 24  # 4 rows of 6 patches


def vit(**options):
    """Of double precision, so that no two scores are in another order for rounding; with attention that is not even."""
    model = tiny_vit(img_size=(HEIGHT, WIDTH), embed_dim=16, **options).double().eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.4)
    return model


def images(count=5):
    return torch.randn(count, 3, HEIGHT, WIDTH, dtype=torch.float64)


@torch.no_grad()
def token_by_token(model, image, rates, fuse):
    """Run a ViT on one image with each token in a list beside the name of the patch it came from.

    Returns the logits, the patches whose tokens go on from each drop, and each patch's score there.
    """
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image.unsqueeze(0))))[0]
    tokens = [(None if place < prefix else place - prefix, row) for place, row in enumerate(x)]
    drops = {}
    for index, block in enumerate(model.blocks):
        rows = torch.stack([row for _, row in tokens])
        heads, received = [], []
        q, k, v = block.attn.qkv(block.norm1(rows)).chunk(3, dim=-1)
        width = q.shape[1] // block.attn.num_heads
        for head in range(block.attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            attention = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(dim=-1)
            heads.append(attention @ v[:, part])
            received.append(attention[0])
        rows = rows + block.attn.proj(torch.cat(heads, dim=-1))
        tokens = [(name, row) for (name, _), row in zip(tokens, rows, strict=True)]
        if rates.get(index, 1) < 1:
            scores = (sum(received) / len(received))[prefix:].tolist()
            patches = sorted(zip(scores, tokens[prefix:], strict=True), key=lambda pair: -pair[0])
            num_kept = math.ceil(rates[index] * len(patches))
            kept, dropped = patches[:num_kept], patches[num_kept:]
            tokens = tokens[:prefix] + [token for _, token in kept]
            if fuse:
                tokens.append(("fused", sum(score * row for score, (_, row) in dropped)))
            drops[index] = (
                {name for _, (name, _) in kept if name != "fused"},
                {name: score for score, (name, _) in patches if name != "fused"},
            )
        rows = torch.stack([row for _, row in tokens])
        rows = rows + block.mlp(block.norm2(rows))
        tokens = [(name, row) for (name, _), row in zip(tokens, rows, strict=True)]
    first = torch.stack([row for _, row in tokens])[:1]
    return model.head(model.fc_norm(model.norm(first)))[0], drops


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("reg_tokens", [0, 3])
def test_survivors__are_those_of_a_computation_token_by_token(fuse, reg_tokens):
    model, batch, rates = vit(reg_tokens=reg_tokens), images(), {1: 0.6, 2: 1.0, 3: 0.5, 4: 0.4}
    expected = [token_by_token(model, image, rates, fuse) for image in batch]
    install_token_drop(model, [*rates], [*rates.values()], fuse=fuse)
    watch = install_drop_watch(model)
    with torch.no_grad():
        logits = model(batch)
    torch.testing.assert_close(logits, torch.stack([own for own, _ in expected]))

    (survivors,) = watch.take()
    assert [*survivors] == [1, 3, 4]
    fused_survived = 0
    for block, (kept, scores) in survivors.items():
        assert kept.shape == scores.shape == (len(batch), PATCHES)
        for row, (_, drops) in enumerate(expected):
            names, by_patch = drops[block]
            assert set(kept[row].nonzero().flatten().tolist()) == names
            own = torch.tensor([by_patch.get(patch, math.nan) for patch in range(PATCHES)], dtype=torch.float64)
            torch.testing.assert_close(scores[row], own, equal_nan=True)
        fused_survived += int((kept.sum(dim=1) < kept.sum(dim=1).max()).sum())
    if fuse:
        assert fused_survived  # else this says nothing of fused tokens that outlive patches
    watch.remove()


def test_survivors__are_the_same_where_dropped_tokens_are_put_back():
    batch, found = images(), []
    for restore in (False, True):
        model = vit()
        install_token_drop(model, [1, 3, 4], 0.5, restore=restore)
        watch = install_drop_watch(model)
        model(batch)
        found += watch.take()
        watch.remove()
    for block in (1, 3, 4):
        for one, other in zip(found[0][block], found[1][block], strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
    assert not found[0][1].scores.requires_grad


def test_watch__tells_passes_apart_forgets_what_was_taken_and_goes_without_a_trace():
    model, batch = vit(), images()
    handle = install_token_drop(model, [1, 3], 0.5)
    before = model(batch)
    watch = install_drop_watch(model)
    assert torch.equal(model(batch), before)
    model(batch[:2])
    assert [len(survivors[3].kept) for survivors in watch.take()] == [5, 2]
    assert watch.take() == []
    handle.set_keep_rates({1: 1.0})
    model(batch)
    assert [[*survivors] for survivors in watch.take()] == [[3]]
    assert watch.scored_by == {1: "cls", 3: "cls"}
    watch.remove()
    watch.remove()
    assert DROP_OBSERVERS == []
    model(batch)
    assert watch.take() == []


def test_watch__sees_no_other_model():
    one, other = vit(), vit()
    for model in (one, other):
        install_token_drop(model, [1], 0.5)
    watch = install_drop_watch(one)
    other(images())
    assert watch.take() == []
    watch.remove()


def test_watch__of_a_model_without_a_class_token_says_how_it_scores():
    model = vit(class_token=False, global_pool="avg")
    install_token_drop(model, [1, 3], 0.5)
    watch = install_drop_watch(model)
    model(images())
    (survivors,) = watch.take()
    torch.testing.assert_close(survivors[1].scores.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert watch.scored_by == {1: "mean", 3: "mean"}
    watch.remove()


def test_watch__lets_a_prefix_cache_rest():
    model, batch = vit().float(), images().float()
    select_blocks_(model, [4])
    install_token_drop(model, [1, 3], 0.5)
    cache = install_prefix_cache(model)
    before = model(batch)
    watch = install_drop_watch(model)
    assert torch.equal(model(batch), before)
    assert [[*survivors] for survivors in watch.take()] == [[1, 3]]
    assert (cache.counts.hits, cache.counts.misses) == (0, 5)
    watch.remove()
    assert torch.equal(model(batch), before)
    assert (cache.counts.hits, cache.counts.misses) == (5, 5)


@pytest.mark.slow
def test_watch__sees_what_compiled_code_drops():
    model, batch = vit(), images()
    install_token_drop(model, [1, 3], 0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(batch)
        watch = install_drop_watch(compiled)
        torch.testing.assert_close(compiled(batch), before)
        (seen,) = watch.take()
        model(batch)
        (expected,) = watch.take()
    assert all(torch.equal(seen[block].kept, expected[block].kept) for block in (1, 3))
    watch.remove()


def test_watch__of_a_model_that_drops_nothing_is_refused():
    with pytest.raises(ConfigurationError) as error:
        install_drop_watch(tiny_vit())
    assert str(error.value) == (
        "No block of the ViT (VisionTransformer) drops tokens; install_token_drop, or the callback TokenDrop, lets "
        "some do so."
    )
