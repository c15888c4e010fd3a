import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    install_checkpointing,
    install_int8_activations,
    install_lean_activations,
    install_lora,
    install_token_drop,
    select_blocks_,
)
from lightning_bsr.memory import measure, plan
from plain_modules import tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])
TOKEN = 4 * 32 * 4  # bytes of one token of all images


def gradients(model, lower=None):
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", lower, enabled=lower is not None):
        loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


POLICIES = [
    "exact",
    "recompute",
    {-1: {"attn": "exact", "mlp": "recompute"}, 3: {"mlp": "exact"}, 4: "recompute"},
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("selected", [None, [1, 3], {2: ["mlp"], 5: ["attn"]}])
@pytest.mark.parametrize("drop", [None, "before", "after"])
@pytest.mark.parametrize("lower", [None, torch.bfloat16])
def test_gradients__are_equal_bit_for_bit(policy, selected, drop, lower):
    model = tiny_vit(init_values=0.1)
    if selected is not None:
        select_blocks_(model, selected)
    plain = copy.deepcopy(model)
    if drop is not None:
        install_token_drop(plain, [1, 3], 0.5)
    if drop == "before":
        install_token_drop(model, [1, 3], 0.5)
    install_lean_activations(model, policy)
    if drop == "after":
        install_token_drop(model, [1, 3], 0.5)
    assert_equal(gradients(model, lower), gradients(plain, lower))


@pytest.mark.parametrize("policy", ["exact", "recompute"])
def test_folded_norms__save_the_product_below_the_first_trained_layer(policy):
    reports, found = [], []
    for fold_norms in (False, True):
        model = tiny_vit()
        select_blocks_(model, {2: ["attn"], 5: "all"})
        install_lean_activations(model, policy, fold_norms=fold_norms)
        reports.append(plan(model, X))
        model.double()(X.double()).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-12)
    # Of queries, keys and values of all tokens; the sum over them takes one row.
    product = 2 * 4 * 65 * 96 * 32
    assert reports[0].flops.backward - reports[1].flops.backward == product - 2 * 96 * 32


@pytest.mark.parametrize("policy", ["exact", "recompute"])
def test_gradients__with_dropout_and_drop_path(policy):
    plain = tiny_vit(drop_path_rate=0.3, proj_drop_rate=0.1).train()
    model = copy.deepcopy(plain)
    install_lean_activations(model, policy)
    assert_equal(gradients(model), gradients(plain))


@pytest.mark.parametrize(
    "arguments",
    [
        {"qk_norm": True},
        {"mlp_layer": timm.layers.SwiGLU},
        {"mlp_layer": timm.layers.GluMlp},
        {"norm_layer": timm.layers.RmsNorm},
        {"act_layer": "silu", "pre_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_gradients__of_other_blocks(arguments):
    plain = tiny_vit(depth=2, **arguments)
    model = copy.deepcopy(plain)
    install_lean_activations(model)
    assert_equal(gradients(model), gradients(plain))


def test_exact__keeps_no_inputs_of_linear_layers_behind_norms_and_gelu():
    model = tiny_vit()
    before = measure(model, X)
    install_lean_activations(model)
    after = measure(model, X)
    for line, leaner in zip(before.by_block[1:-1], after.by_block[1:-1], strict=True):
        assert (line.attn - leaner.attn, line.mlp - leaner.mlp) == (65 * TOKEN, 5 * 65 * TOKEN)
    assert (after.flops, after.parameters, after.gradients) == (before.flops, before.parameters, before.gradients)
    assert after.peak < before.peak


def test_exact__changes_nothing_in_frozen_blocks():
    model = tiny_vit()
    select_blocks_(model, [1])
    before = measure(model, X)
    install_lean_activations(model)
    after = measure(model, X)
    assert before.by_block[3:] == after.by_block[3:]
    assert before.by_block[2].activations > after.by_block[2].activations


def test_recompute__keeps_the_inputs_of_half_blocks():
    model = tiny_vit()
    before = measure(model, X)
    install_lean_activations(model, "recompute")
    after = measure(model, X)
    assert [(line.attn, line.mlp) for line in after.by_block[1:-1]] == [(65 * TOKEN, 65 * TOKEN)] * 6
    # All of it, and the half that is computed again.
    largest_half = max(line.mlp for line in before.by_block)
    assert after.activations < after.activations_peak <= after.activations + largest_half
    assert before.flops.forward == after.flops.forward
    assert before.flops.backward < after.flops.backward < before.flops.backward + before.flops.forward


def test_int8__holds_a_quarter():
    model = tiny_vit(embed_dim=64)
    install_lean_activations(model)
    exact = measure(model, X)
    install_token_drop(model, [5], 1.0).remove()
    twin = tiny_vit(embed_dim=64)
    install_lean_activations(twin, "int8")
    int8 = measure(twin, X)
    assert int8.activations < 0.4 * exact.activations
    theirs, ours = gradients(model), gradients(twin)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() < 0.05 * theirs[name].norm(), name


@pytest.mark.parametrize("policy", ["exact", "recompute", "int8"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_planned_is_measured(policy, precision):
    model = tiny_vit()
    select_blocks_(model, [1, 3])
    install_token_drop(model, [1, 3], 0.5)
    install_lean_activations(model, policy)
    arguments = {"loss": lambda out: F.cross_entropy(out, Y), "precision": precision}
    assert plan(model, X, **arguments) == measure(model, X, **arguments)


def test_autocast__keeps_no_copies_of_weights():
    model = tiny_vit()
    select_blocks_(model, [1, 3])
    before = measure(model, X, precision="bf16-mixed")
    install_lean_activations(model)
    after = measure(model, X, precision="bf16-mixed")
    assert before.weight_copies > 0
    # What is left is the head's.
    assert after.weight_copies == 4 * 32 * 2


def test_composes_with_lora():
    plain = tiny_vit()
    install_lora(plain)
    model = copy.deepcopy(plain)
    install_lean_activations(model)
    assert_equal(gradients(model), gradients(plain))


def test_exact__inside_a_checkpointed_block():
    plain, model = tiny_vit(), tiny_vit()
    install_lean_activations(model)
    install_checkpointing(model)
    assert_equal(gradients(model), gradients(plain))
    assert [line.activations for line in measure(model, X).by_block[1:-1]] == [65 * TOKEN] * 6


def test_survives_deepcopy_and_pickle():
    model = tiny_vit()
    keys = list(model.state_dict())
    handle = install_lean_activations(model, {2: "exact"})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks[2].forward.block is twin.blocks[2]
        assert_equal(gradients(twin), gradients(model))
    assert keys == list(model.state_dict())
    handle.remove()
    handle.remove()
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["exact", "recompute", "int8"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, when compiling
def test_compiles(policy):
    torch._dynamo.reset()
    plain, model = tiny_vit(depth=2, embed_dim=64), tiny_vit(depth=2, embed_dim=64)
    install_token_drop(plain, [0], 0.5)
    install_token_drop(model, [0], 0.5)
    install_lean_activations(model, policy)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=policy == "exact")
    F.cross_entropy(compiled(X), Y).backward()
    tolerance = {"rtol": 0.1, "atol": 0.01} if policy == "int8" else {}
    for name, theirs in gradients(plain).items():
        torch.testing.assert_close(model.get_parameter(name).grad, theirs, **tolerance)


def test_texts():
    model = tiny_vit()
    handle = install_lean_activations(model, "recompute")
    assert str(handle) == "all 6 blocks of the ViT (VisionTransformer) keep lean activations (recompute)"
    handle.remove()
    policy = {-1: {"attn": "exact", "mlp": "recompute"}, 3: {"mlp": "exact"}, 4: "int8"}
    handle = install_lean_activations(model, policy)
    assert str(handle) == (
        "blocks 3, 4, 5 of 6 of the ViT (VisionTransformer) keep lean activations "
        "(exact: 3 (mlp), 5 (attn); recompute: 5 (mlp); int8: 4)"
    )


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("lossy", "policy is 'lossy', expected one of 'exact', 'recompute', 'int8'."),
        ({0: "some"}, "policy of block 0 is 'some', expected one of 'exact', 'recompute', 'int8'."),
        ({0: {"mlp": None}}, "policy of block 0 is None, expected one of 'exact', 'recompute', 'int8'."),
        ({0: {"head": "exact"}}, "policy of block 0 has a half 'head', expected 'attn' or 'mlp'."),
        (
            {6: "exact"},
            "policy has 6, but the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1.",
        ),
        ({0: "exact", -6: "int8"}, "policy names block 0 more than once: [0, -6]."),
    ],
)
def test_checks_the_policy(policy, message):
    model = tiny_vit()
    with pytest.raises(ConfigurationError) as error:
        install_lean_activations(model, policy)
    assert str(error.value) == message
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize(
    ("first", "policy", "effect"),
    [
        (install_lean_activations, "exact", "keeps lean activations"),
        (install_checkpointing, "recompute", "is computed again in backward"),
        (install_checkpointing, "int8", "is computed again in backward"),
        (install_int8_activations, "recompute", "packs its activations"),
    ],
)
def test_refuses_what_does_not_go_together(first, policy, effect):
    model = tiny_vit()
    first(model)
    with pytest.raises(ConfigurationError) as error:
        install_lean_activations(model, policy)
    assert str(error.value) == f"Block 0 of the ViT (VisionTransformer) {effect} already; remove that first."


@pytest.mark.parametrize("policy", ["recompute", "int8"])
def test_others_refuse_a_block_that_has_it(policy):
    model = tiny_vit()
    install_lean_activations(model, {2: policy})
    effect = {"recompute": "is computed again in backward", "int8": "packs its activations"}[policy]
    for install in (install_checkpointing, install_int8_activations):
        with pytest.raises(ConfigurationError) as error:
            install(model)
        assert str(error.value) == f"Block 2 of the ViT (VisionTransformer) {effect} already; remove that first."


def test_a_frozen_model__runs_plainly():
    model = tiny_vit().requires_grad_(False)
    install_lean_activations(model, "recompute")
    assert not model(X).requires_grad
