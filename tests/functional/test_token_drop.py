import copy
import pickle
import re

import pytest
import timm
import torch
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_token_drop, num_kept_tokens, select_blocks_
from lightning_bsr.vit import find_vit
from plain_modules import tiny_vit

VARIANTS = {
    "plain": {},
    "layer_scale": {"init_values": 0.3},
    "registers": {"reg_tokens": 3},
    "no_embed_class": {"reg_tokens": 3, "no_embed_class": True},
    "qk_norm": {"qk_norm": True},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "pre_norm": {"pre_norm": True},
    "avg_with_class_token": {"global_pool": "avg"},
    "avg": {"class_token": False, "global_pool": "avg"},
    "map": {"class_token": False, "global_pool": "map"},
}


def slow_forward(model, images, rates, *, fuse=True, score="cls", normalize=False, detach=False):
    """The model's forward with the whole attention matrix and a loop over images."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    prefix = model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        batch, n, width = x.shape
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).reshape(batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        matrix = (q @ k.mT * attn.scale).softmax(-1)
        out = attn.proj(attn.norm((matrix @ v).transpose(1, 2).reshape(batch, n, width)))
        x = x + block.ls1(out)
        if index in rates:
            mean = matrix.mean(1)
            scores = mean[:, 0, prefix:] if score == "cls" else mean.mean(1)[:, prefix:]
            if detach or score == "mean":
                scores = scores.detach()
            kept, images_out = num_kept_tokens(n - prefix, rates[index]), []
            for tokens, weights in zip(x, scores, strict=True):
                chosen = weights.topk(kept).indices
                rest = torch.tensor([i for i in range(n - prefix) if i not in chosen])
                row = [tokens[:prefix], tokens[prefix:][chosen]]
                if fuse:
                    w = weights[rest] / weights[rest].sum() if normalize else weights[rest]
                    row.append((w[:, None] * tokens[prefix:][rest]).sum(0, keepdim=True))
                images_out.append(torch.cat(row))
            x = torch.stack(images_out)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fuse", [True, False])
def test_install_token_drop__equals_a_materialised_reference(variant, fuse, images):
    model = tiny_vit(**VARIANTS[variant])
    score = "cls" if model.has_class_token else "mean"
    rates = {1: 0.5, 2: 0.7, 5: 0.5}
    slow = slow_forward(model, images, rates, fuse=fuse, score=score)
    gradients = torch.autograd.grad(slow.square().sum(), list(model.parameters()))
    install_token_drop(model, list(rates), list(rates.values()), fuse=fuse, score=score)
    fast = model(images)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for (name, p), expected in zip(model.named_parameters(), gradients, strict=True):
        (gradient,) = torch.autograd.grad(fast.square().sum(), p, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{"normalize": True}, {"detach": True}, {"normalize": True, "detach": True}])
def test_install_token_drop__options_equal_a_materialised_reference(options, images):
    model = tiny_vit()
    slow = slow_forward(model, images, {2: 0.5}, **options)
    gradients = torch.autograd.grad(slow.square().sum(), list(model.parameters()))
    install_token_drop(model, [2], 0.5, **options)
    fast = model(images)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(fast.square().sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_install_token_drop__distilled_keeps_both_prefix_tokens():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=4, depth=3).eval()
    install_token_drop(model, [1], 0.5)
    seen = []
    model.blocks[1].register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(2, 3, 32, 32))
    before, after = seen[0]
    assert (before.shape[1], after.shape[1]) == (66, 2 + 32 + 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keep_rate_one__is_exactly_the_model(variant, images):
    model = tiny_vit(**VARIANTS[variant])
    out = model(images)
    gradients = torch.autograd.grad(out.sum(), list(model.parameters()))
    install_token_drop(model, [0, 2, 5], 1.0, score="cls" if model.has_class_token else "mean")
    again = model(images)
    assert torch.equal(out, again)
    for a, b in zip(gradients, torch.autograd.grad(again.sum(), list(model.parameters())), strict=True):
        assert torch.equal(a, b)


def test_remove__leaves_no_trace(images):
    model = tiny_vit()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    keys, out = list(model.state_dict()), model(images)
    handle = install_token_drop(model, [1, 3], 0.5)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(images), out)
    handle.remove()
    handle.remove()
    assert torch.equal(model(images), out)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies__drop_tokens_with_their_own_weights(copier, images):
    model = tiny_vit()
    install_token_drop(model, [1, 3], 0.5)
    twin = copier(model)
    assert torch.equal(twin(images), model(images))
    with torch.no_grad():
        twin.blocks[1].attn.proj.weight.add_(1)
    assert not torch.equal(twin(images), model(images))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing__same_gradients(reentrant, images, monkeypatch):
    model = tiny_vit()
    install_token_drop(model, [1, 3], 0.5)
    plain = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    model(images.requires_grad_()).square().sum().backward()
    for p, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.slow
def test_compile__fullgraph_before_and_after(images):
    model = tiny_vit(depth=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = model(images)
    torch.testing.assert_close(compiled(images), plain)
    handle = install_token_drop(compiled, [0, 2], 0.5)
    torch.testing.assert_close(compiled(images), model(images))
    handle.remove()
    torch.testing.assert_close(compiled(images), plain)


def test_export__equals_eager(images):
    model = tiny_vit().eval()
    install_token_drop(model, [1, 3], 0.5)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


def test_autocast__tokens_stay_float32(images):
    model = tiny_vit()
    install_token_drop(model, [1], 0.5)
    seen = []
    model.blocks[1].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert seen == [torch.float32]
    torch.testing.assert_close(low.float(), model(images), rtol=0.1, atol=0.05)


def test_random_score__drops_other_tokens_each_time(images):
    model = tiny_vit().eval()
    handle = install_token_drop(model, [1], 0.5, score="random")
    assert handle.num_tokens(64)[1] == 34
    assert not torch.equal(model(images), model(images))


def test_nothing_before_the_first_trained_block_is_kept__by_bytes(images):
    model = tiny_vit()
    select_blocks_(model, [3])
    install_token_drop(model, [1], 0.5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        x = model._pos_embed(model.patch_embed(images))
        x = model.blocks[:3](x)
        assert sum(kept) == 0
        model.blocks[3](x)
    assert sum(kept) > 0


def test_handle__says_one_rate_once_and_no_blocks():
    assert str(install_token_drop(tiny_vit(), [1, 3], 0.5)) == (
        "blocks 1, 3 of the ViT (VisionTransformer) keep 0.5 of the patch tokens: 65 -> 34 -> 19 tokens"
    )
    assert str(install_token_drop(tiny_vit(), [], 0.5)) == "no block of the ViT (VisionTransformer) drops tokens"


def test_handle__counts_and_changes_rates():
    model = tiny_vit()
    handle = install_token_drop(model, [-1, 1], [0.5, 0.25])
    assert handle.keep_rates == {1: 0.25, 5: 0.5}
    assert handle.num_tokens(64) == [65, 18, 18, 18, 18, 11]
    assert str(handle) == (
        "blocks 1, 5 of the ViT (VisionTransformer) keep 0.25, 0.5 of the patch tokens: 65 -> 18 -> 11 tokens"
    )
    handle.set_keep_rates({1: 1.0})
    assert handle.num_tokens(64) == [65, 65, 65, 65, 65, 34]
    for rates, message in (
        ({5: 0.7, 1: 7}, "keep_rate is 7, expected a number above 0 and at most 1."),
        ({5: 0.7, 4: 0.5}, "keep_rates has block 4, but tokens are dropped in blocks [1, 5]."),
    ):
        with pytest.raises(ConfigurationError) as error:
            handle.set_keep_rates(rates)
        assert str(error.value) == message
        assert handle.keep_rates == {1: 1.0, 5: 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], 0.0), "keep_rate is 0.0, expected a number above 0 and at most 1."),
        (([1], 1.5), "keep_rate is 1.5, expected a number above 0 and at most 1."),
        (([1], float("nan")), "keep_rate is nan, expected a number above 0 and at most 1."),
        (([1, 2], [0.5, -1]), "keep_rate is -1, expected a number above 0 and at most 1."),
        (([1, 2], [0.5]), "keep_rate has 1 values for 2 blocks, expected one, or one a block."),
        ((3, 0.5), "blocks is 3, expected a list of block indices."),
        (
            ([6], 0.5),
            "blocks has 6, but the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1.",
        ),
        (([2, -4], 0.5), "blocks names block 2 more than once: [2, -4]."),
    ],
)
def test_install_token_drop__errors_change_nothing(arguments, message, images):
    model = tiny_vit()
    out = model(images)
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, *arguments)
    assert str(error.value) == message
    assert torch.equal(model(images), out)


def test_install_token_drop__unknown_score():
    with pytest.raises(
        ConfigurationError, match=re.escape("score is 'max', expected one of 'auto', 'cls', 'mean', 'random'.")
    ):
        install_token_drop(tiny_vit(), [1], 0.5, score="max")


def test_install_token_drop__no_class_token():
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(tiny_vit(class_token=False, global_pool="avg"), [1], 0.5, score="cls")
    assert str(error.value) == (
        "score is 'cls', but the ViT (VisionTransformer) has no class token; use score='mean' or score='random'."
    )


def test_install_token_drop__twice():
    model = tiny_vit()
    install_token_drop(model, [1], 0.5)
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, [0, 1], 0.5)
    assert str(error.value) == "Block 1 of the ViT (VisionTransformer) drops tokens already; remove that first."
    assert "forward" not in vars(model.blocks[0])


def test_install_token_drop__foreign_forward():
    model = tiny_vit()
    model.blocks[1].forward = nn.Identity().forward
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, [1], 0.5)
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) has its forward replaced by method; undo that first."
    )


def test_install_token_drop__unfused_attention():
    model = tiny_vit()
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(model, [1], 0.5)
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) does not use scaled_dot_product_attention, where tokens get their "
        "scores; set fused_attn = True on its attention, or leave TIMM_FUSED_ATTN unset."
    )


def test_forward__attention_without_an_sdpa_call(images):
    model = tiny_vit()
    model.blocks[1].attn = nn.Linear(32, 32)
    install_token_drop(model, [1], 0.5)
    with pytest.raises(ConfigurationError) as error:
        model.blocks(torch.randn(2, 65, 32))
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) has an attention (Linear) that does not call "
        "scaled_dot_product_attention with a query and a key for each token, so it gives no scores to drop tokens by; "
        "choose other blocks, or score='random'."
    )


def test_forward__attention_of_differences_is_scored_by_the_mean_of_its_calls(images):
    diff_attention = pytest.importorskip("timm.layers.diff_attention", reason="added in timm 1.0.23")
    model = tiny_vit(depth=2)
    attention = model.blocks[0].attn = diff_attention.DiffAttention(32, num_heads=2)
    x = torch.randn(2, 65, 32)
    q, k, _ = attention.qkv(model.blocks[0].norm1(x)).chunk(3, -1)
    q, k = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k))
    scores = (q @ k.mT * 8**-0.5).softmax(-1).mean(1)[:, 0, 1:]
    kept = scores.topk(32).indices.sort().values
    whole = model.blocks[0](x)[:, 1:]
    install_token_drop(model, [0], 0.5, fuse=False)
    left = model.blocks[0](x)[:, 1:]
    expected = whole.gather(1, kept[..., None].expand(-1, -1, 32))
    order = torch.stack(
        [(a[None] - b[:, None]).square().sum(-1).argmin(1) for a, b in zip(left, expected, strict=True)]
    )
    torch.testing.assert_close(left.gather(1, order[..., None].expand(-1, -1, 32)), expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_forward__attention_mask_is_that_of_the_tokens_left(kind, images):
    """No token may attend to patch 7, which then has the lowest score; dropped alone, it changes nothing."""
    model = tiny_vit().eval()
    mask = torch.ones(65, 65, dtype=torch.bool)
    mask[:, 7] = False
    if kind == "float":
        mask = torch.zeros(65, 65).masked_fill(~mask, float("-inf"))
    out = model(images, attn_mask=mask)
    handle = install_token_drop(model, [1, 3], [63 / 64, 1.0], fuse=False)
    torch.testing.assert_close(model(images, attn_mask=mask), out)
    handle.set_keep_rates({1: 0.5, 3: 0.5})
    assert model(images, attn_mask=mask).isfinite().all()


def test_forward__causal_attention(images):
    model = tiny_vit()
    install_token_drop(model, [1], 0.5)
    with pytest.raises(ConfigurationError) as error:
        model(images, is_causal=True)
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) attends causally, by the order of its tokens, which changes where "
        "tokens are dropped; drop tokens only in a model that is called without is_causal."
    )


def test_forward__attention_mask_in_a_model_of_unknown_width(images):
    model = tiny_vit()
    del model.embed_dim
    install_token_drop(model, [1], 0.5)
    model(images)
    with pytest.raises(ConfigurationError) as error:
        model(images, attn_mask=torch.zeros(65, 65))
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) has an attention mask or bias, which must be fitted to the tokens that "
        "are left; give the module that owns the blocks an integer embed_dim, by which tokens can carry their "
        "positions."
    )


def test_forward_intermediates__refused_while_dropping(images):
    model = tiny_vit()
    handle = install_token_drop(model, [1], 0.5)
    with pytest.raises(ConfigurationError) as error:
        model.forward_intermediates(images)
    assert str(error.value) == (
        "The ViT (VisionTransformer) drops tokens, so its feature maps would miss some patches; remove the token drop "
        "before calling forward_intermediates or extracting features."
    )
    handle.remove()
    assert len(model.forward_intermediates(images)[1]) == 6


def test_install_token_drop__second_handle_on_other_blocks(images):
    model = tiny_vit()
    out = model(images)
    first, second = install_token_drop(model, [1], 0.5), install_token_drop(model, [3], 0.5, fuse=False)
    both = model(images)
    first.remove()
    assert not torch.equal(model(images), both)
    with pytest.raises(ConfigurationError, match="its feature maps would miss some patches"):
        model.forward_intermediates(images)
    second.remove()
    assert torch.equal(model(images), out)
    assert find_vit(model).model is model
