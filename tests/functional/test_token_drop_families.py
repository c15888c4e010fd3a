"""Dropping tokens in each family of timm's ViTs equals a loop over images with the whole attention matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

from lightning_bsr.functional import install_token_drop, num_kept_tokens
from lightning_bsr.vit import find_vit

SIZE = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
RATES = {0: 0.5, 2: 0.5}


def rotate(x, table, half):
    """Rotate pairs of channels of x [H, N, D] by the angles whose sines and cosines table [..., N, 2 D] holds."""
    sine, cosine = table.chunk(2, -1)
    if half:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cosine + turned * sine


def heads_of(attention, x):
    """q, k, v [H, N, D] of one image."""
    if getattr(attention, "qkv", None) is None:
        q, k, v = (layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    else:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, v = nn.functional.linear(x, attention.qkv.weight, bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for y in (q, k, v))
    return (
        attention.q_norm(q) if hasattr(attention, "q_norm") else q,
        attention.k_norm(k) if hasattr(attention, "k_norm") else k,
        v,
    )


def attend(attention, x, where, prefix, table=None, bias=None):
    """The attention of one image, whose tokens were at ``where`` (``None``: fused), and its matrix [H, N, N]."""
    q, k, v = heads_of(attention, x)
    if table is not None:
        width = table.shape[-1] // 2
        neutral = torch.cat([torch.zeros(width), torch.ones(width)]).to(table).expand(*table.shape[:-2], -1)
        rows = [neutral if at is None or at < prefix else table[..., at - prefix, :] for at in where]
        half = getattr(attention, "rotate_half", False)
        q, k = (rotate(y, torch.stack(rows, -2), half) for y in (q, k))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        index = torch.tensor([bias.shape[-1] if at is None else at for at in where])
        logits = logits + nn.functional.pad(bias, (0, 1, 0, 1))[:, index][:, :, index]
    matrix = logits.softmax(-1)
    out = (matrix @ v).transpose(0, 1).flatten(1)
    out = attention.norm(out) if hasattr(attention, "norm") else out
    return attention.proj(out), matrix


def scaled(block, name, x):
    """``x`` times what the block scales its branch by."""
    number = name[-1]
    if getattr(block, f"gamma_{number}", None) is not None:
        return getattr(block, f"gamma_{number}") * x
    return getattr(block, f"ls{number}")(x) if hasattr(block, f"ls{number}") else x


def pre_norm(block, x, look):
    y, matrix = look(block.attn, block.norm1(x))
    return x + scaled(block, "1", y), matrix, lambda x: x + scaled(block, "2", block.mlp(block.norm2(x)))


def post_norm(block, x, look):
    y, matrix = look(block.attn, x)
    return x + block.norm1(y), matrix, lambda x: x + block.norm2(block.mlp(x))


def parallel_things(block, x, look):
    found = [look(branch.attn, branch.norm(x)) for branch in block.attns]
    matrix = torch.stack([matrix for _, matrix in found]).mean(0)
    return x + sum(y for y, _ in found), matrix, lambda x: x + sum(ffn.mlp(ffn.norm(x)) for ffn in block.ffns)


def one_branch(block, x, look):
    """Drops at the output of the block."""
    hidden, q, k, v = block.in_proj(block.in_norm(x)).split(block.in_split, -1)
    q, k, v = (y.unflatten(-1, (block.num_heads, -1)).transpose(0, 1) for y in (q, k, v))
    matrix = (block.q_norm(q) @ block.k_norm(k).mT * q.shape[-1] ** -0.5).softmax(-1)
    hidden = block.mlp_act(hidden if block.mlp_bias is None else hidden + block.mlp_bias)
    out = (matrix @ v).transpose(0, 1).flatten(1)
    if block.out_proj is not None:
        return x + block.out_proj(torch.cat([out, hidden], -1)), matrix, lambda x: x
    return x + block.attn_out_proj(out) + block.mlp_out_proj(hidden), matrix, lambda x: x


def one_branch_of_differences(block, x, look):
    """Each head attends with the difference of two softmaxes, whose mean is what a token is scored by."""
    hidden, q, k, v = block.in_proj(block.in_norm(x)).split(block.in_split, -1)
    q, k = (norm(y.unflatten(-1, (-1, 2, block.head_dim))) for norm, y in ((block.q_norm, q), (block.k_norm, k)))
    v = v.unflatten(-1, (block.num_heads, -1)).transpose(0, 1)
    pair = [
        (q[:, :, i].transpose(0, 1) @ k[:, :, i].permute(1, 2, 0) * block.head_dim**-0.5).softmax(-1) for i in (0, 1)
    ]
    out = pair[0] @ v - block._compute_lambda() * (pair[1] @ v)
    out = (block.sub_norm(out) * (1 - block.lambda_init)).transpose(0, 1).flatten(1)
    hidden = block.mlp_act(hidden if block.mlp_bias is None else hidden + block.mlp_bias)
    return x + block.out_proj(torch.cat([out, hidden], -1)), (pair[0] + pair[1]) / 2, lambda x: x


def four_norms(block, x, look):
    y, matrix = look(block.attn, block.norm1(x))
    return x + block.norm2(y), matrix, lambda x: x + block.norm4(block.mlp(block.norm3(x)))


def gemma_attend(attention, x, where, prefix, table, bias):
    q, k, v = (layer(x).unflatten(-1, (2, -1)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    cosine, sine = table
    cosine = torch.stack([torch.ones_like(cosine[0]) if at is None else cosine[at] for at in where])[:, None]
    sine = torch.stack([torch.zeros_like(sine[0]) if at is None else sine[at] for at in where])[:, None]

    def turn(y):  # the first half of the channels by the column, the second by the row
        pairs = [part.chunk(2, -1) for part in y.chunk(2, -1)]
        return y * cosine + torch.cat([torch.cat([-b, a], -1) for a, b in pairs], -1) * sine

    q, k, v = turn(attention.q_norm(q)), turn(attention.k_norm(k)), attention.v_norm(v)
    matrix = (q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(-1)
    return attention.o_proj((matrix @ v.transpose(0, 1)).transpose(0, 1).flatten(1)), matrix


@dataclass
class Family:
    build: Callable[[], nn.Module]
    block: Callable = pre_norm
    tables: Callable = lambda model, index: None
    biases: Callable = lambda model, index: None
    embed: Callable = None
    finish: Callable = lambda model, x: model.forward_head(model.norm(x))
    attend: Callable = attend


def eva_embed(model, images):
    return model.norm_pre(model._pos_embed(model.patch_embed(images))[0])


def with_class_token(model, images):
    x = model.patch_embed(images)
    return x if model.cls_token is None else torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)


def rope(model, index):
    table = model.rope.get_embed()
    return table[index] if table.ndim == 4 else table


def vit_embed(model, images):
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def map_embed(model, images):
    return model.encoder._pos_embed(model.encoder.patch_embed(images))[0]


def gemma_tables(model, index):
    x, positions, _ = model.encoder.patch_embed(torch.zeros(1, 3, 24, 24, dtype=torch.float64))
    return [table[0] for table in model.encoder.rotary_emb(x, positions)]


eva = partial(Family, embed=eva_embed, tables=rope)
relpos = partial(
    Family,
    embed=with_class_token,
    biases=lambda model, index: (model.shared_rel_pos or model.blocks[index].attn.rel_pos).get_bias()[0],
)
beit = partial(
    Family,
    embed=with_class_token,
    biases=lambda m, i: m.rel_pos_bias() if m.rel_pos_bias is not None else m.blocks[i].attn._get_rel_pos_bias()[0],
)
vit = partial(Family, embed=vit_embed)


def of_newer_timm(name):
    """A class that the oldest timm that is admitted lacks; the test is skipped there."""
    module, _, name = name.partition(".")
    return getattr(pytest.importorskip(f"timm.models.{module}"), name)


FAMILIES = {
    "eva": eva(lambda: Eva(**SIZE, use_rot_pos_emb=True, init_values=0.5, swiglu_mlp=True, qkv_fused=False)),
    "eva_registers_half": eva(
        lambda: Eva(
            **SIZE, use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=3, attn_type="rope"
        )
    ),
    "eva_mixed": eva(
        lambda: Eva(**SIZE, use_rot_pos_emb=True, rope_type="mixed", class_token=False, global_pool="avg")
    ),
    "eva_post_norm": eva(lambda: Eva(**SIZE, use_rot_pos_emb=True, use_post_norm=True), block=post_norm),
    "beit": beit(lambda: Beit(**SIZE, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5)),
    "beit_shared": beit(lambda: Beit(**SIZE, use_abs_pos_emb=False, use_shared_rel_pos_bias=True)),
    "relpos": relpos(lambda: VisionTransformerRelPos(**SIZE, rel_pos_type="bias", init_values=0.5)),
    "relpos_shared_mlp": relpos(
        lambda: VisionTransformerRelPos(**SIZE, shared_rel_pos=True, class_token=True, global_pool="token")
    ),
    "relpos_post_norm": relpos(lambda: VisionTransformerRelPos(**SIZE, block_fn=ResPostRelPosBlock), block=post_norm),
    "post_norm": vit(lambda: VisionTransformer(**SIZE, block_fn=ResPostBlock), block=post_norm),
    "parallel_things": vit(lambda: VisionTransformer(**SIZE, block_fn=ParallelThingsBlock), block=parallel_things),
    "one_branch_of_differences": vit(
        lambda: VisionTransformer(**SIZE, block_fn=DiffParallelScalingBlock), block=one_branch_of_differences
    ),
    "qwen3": Family(
        lambda: of_newer_timm("qwen3_vit.Qwen3VitClassifier")(**SIZE),
        embed=map_embed,
        tables=lambda model, index: model.encoder.rope.get_embed((6, 6)),
        finish=lambda model, x: model.forward_head(x),
    ),
    "deepseek": Family(
        lambda: of_newer_timm("deepseek_vit.DeepseekVitClassifier")(**SIZE),
        embed=map_embed,
        tables=lambda model, index: model.encoder.rope.get_embed((6, 6)),
        finish=lambda model, x: model.forward_head(model.encoder.norm(x)),
    ),
    "gemma4": Family(
        lambda: of_newer_timm("gemma4_vit.Gemma4VitClassifier")(**SIZE, head_dim=16, intermediate_size=64),
        block=four_norms,
        attend=gemma_attend,
        embed=lambda model, images: model.encoder.patch_embed(images)[0],
        tables=gemma_tables,
        finish=lambda model, x: model.forward_head(x),
    ),
    "one_branch": vit(lambda: VisionTransformer(**SIZE, block_fn=ParallelScalingBlock), block=one_branch),
}


def slow_forward(family, model, images, score, fuse=True):
    vit = find_vit(model)
    prefix = vit.num_prefix_tokens
    start = family.embed(model, images)
    outs = []
    for x in start:
        where = list(range(len(x)))
        for index, block in enumerate(vit.blocks):
            look = partial(
                family.attend,
                where=where,
                prefix=prefix,
                table=family.tables(model, index),
                bias=family.biases(model, index),
            )
            x, matrix, mlp = family.block(block, x, look)
            if index in RATES:
                scores = (matrix.mean(0)[0] if score == "cls" else matrix.mean((0, 1)).detach())[prefix:]
                kept = scores.topk(num_kept_tokens(len(scores), RATES[index])).indices
                rest = [i for i in range(len(scores)) if i not in kept]
                fused = (scores[rest, None] * x[prefix:][rest]).sum(0, keepdim=True)
                x = torch.cat([x[:prefix], x[prefix:][kept], fused])
                where = [*where[:prefix], *(where[prefix + i] for i in kept), None]
            x = mlp(x)
        outs.append(x)
    return family.finish(model, torch.stack(outs))


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family].build().double().eval()
    for parameter in model.parameters():  # as they are initialised, attention is nearly even and some are zero
        nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(2, 3, 24, 24, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_install_token_drop__equals_a_materialised_reference(family):
    model, images = build(family)
    score = "cls" if find_vit(model).has_class_token else "mean"
    slow = slow_forward(FAMILIES[family], model, images, score)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(slow.square().sum(), parameters, allow_unused=True)
    whole = model(images)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    handle = install_token_drop(model, list(RATES), list(RATES.values()))
    fast = model(images)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-8)
    gradients = torch.autograd.grad(fast.square().sum(), parameters, allow_unused=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8, msg=name)
    assert not torch.allclose(fast, whole, rtol=1e-3)

    handle.set_keep_rates(dict.fromkeys(RATES, 1.0))
    assert torch.equal(model(images), whole)
    handle.remove()
    assert torch.equal(model(images), whole)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}


def padded_batch():
    """A batch of two images of 4 x 4 and 3 x 3 patches, the second of which is padded."""
    valid = torch.arange(16) < torch.tensor([[16], [9]])
    coordinates = torch.stack([torch.cartesian_prod(torch.arange(4), torch.arange(4))] * 2)
    coordinates[1, :9] = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    coordinates[1, 9:] = 0
    patches = torch.randn(2, 16, 4 * 4 * 3, dtype=torch.float64)
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


@pytest.mark.parametrize("pool", ["avg", "map"])
@pytest.mark.parametrize("rope_type", ["", "axial", "mixed"])
def test_install_token_drop__naflex_with_padding_does_not_see_it(pool, rope_type):
    torch.manual_seed(0)
    model = NaFlexVit(
        patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=3, global_pool=pool, rope_type=rope_type,
        reg_tokens=1,
    )  # fmt: skip
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = padded_batch()
    whole = model(batch)
    handle = install_token_drop(model, [0, 2], 0.5)
    out = model(batch)
    other = {**batch, "patches": torch.where(batch["patch_valid"][..., None], batch["patches"], 7.0)}
    torch.testing.assert_close(model(other), out)
    # Of the second image 8 of 9 patches go on, then 5 of 9 tokens: what it gives alone, with rates that keep as many.
    handle.set_keep_rates({0: 8 / 9, 2: 5 / 9})
    alone = {name: value[1:, :9] for name, value in batch.items()}
    torch.testing.assert_close(model(alone), out[1:])
    handle.remove()
    assert torch.equal(model(batch), whole)
    assert "forward_features" not in vars(model)
