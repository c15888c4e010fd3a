"""Token drops in ViTs of torchvision and transformers, against a forward that holds the whole attention matrix."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    install_lean_activations,
    install_token_drop,
    install_unread_skip,
    select_blocks_,
)
from lightning_bsr.memory import measure, plan
from vit_families import FAMILIES, family, reference

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
RATES = {1: 0.5, 2: 0.7}


def gradients(made, out):
    parameters = dict(made.model.named_parameters())
    found = torch.autograd.grad(out.square().sum(), list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def assert_same(made, fast, slow):
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(made, fast), gradients(made, slow)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-5 * (expected.norm() + 1), name


@pytest.mark.parametrize("name", FAMILIES)
def test_token_drop__equals_a_materialised_reference(name):
    made = family(name)
    slow = reference(made, IMAGES, RATES)
    install_token_drop(made.model, list(RATES), list(RATES.values()))
    assert_same(made, made(IMAGES), slow)


@pytest.mark.parametrize("name", ["torchvision", "dinov3", "beit"])
def test_token_drop__without_fusion(name):
    made = family(name)
    slow = reference(made, IMAGES, RATES, fuse=False)
    install_token_drop(made.model, list(RATES), list(RATES.values()), fuse=False)
    assert_same(made, made(IMAGES), slow)


@pytest.mark.parametrize("name", FAMILIES)
def test_restore__equals_a_materialised_reference(name):
    made = family(name)
    rates = {1: 0.5, 3: 0.5}
    slow = reference(made, IMAGES, rates, restore=True)
    install_token_drop(made.model, list(rates), 0.5, restore=True)
    assert_same(made, made(IMAGES), slow)


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_rate_one__is_exactly_the_model(name):
    made = family(name)
    out = made(IMAGES)
    before = gradients(made, out)
    install_token_drop(made.model, [0, 2, 3], 1.0, restore=name in ("timm", "vit"))
    again = made(IMAGES)
    assert torch.equal(again, out)
    after = gradients(made, again)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("restore", [False, True])
def test_remove__leaves_no_trace(restore):
    made = family("vit")
    attributes = {name: set(vars(module)) for name, module in made.model.named_modules()}
    out, keys = made(IMAGES), list(made.model.state_dict())
    handle = install_token_drop(made.model, [1, 3], 0.5, restore=restore)
    assert not torch.equal(made(IMAGES), out)
    assert list(made.model.state_dict()) == keys
    handle.remove()
    handle.remove()
    assert torch.equal(made(IMAGES), out)
    assert {name: set(vars(module)) for name, module in made.model.named_modules()} == attributes


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies__restore_with_their_own_weights(copier):
    made = family("dinov3")
    install_token_drop(made.model, [0, 2], 0.5, restore=True)
    twin = copier(made.model)
    assert torch.equal(twin(IMAGES).pooler_output, made(IMAGES))
    with torch.no_grad():
        twin.model.layer[1].attention.o_proj.weight.add_(1)
    assert not torch.equal(twin(IMAGES).pooler_output, made(IMAGES))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vit", "dinov3", "beit"])
def test_gradient_checkpointing_of_transformers__same_gradients(name, reentrant, restore, monkeypatch):
    made = family(name)
    for module in made.model.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = torch.nn.Identity()
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    made.model.train()
    if made.rope is not None:
        made.model.rope_embeddings.eval()  # it moves the patches at random
    install_token_drop(made.model, [1, 2], 0.5, restore=restore)
    plain = gradients(made, made(IMAGES))

    made.model._set_gradient_checkpointing(
        True, lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)
    )
    calls = []
    for block in made.blocks:
        attention = getattr(block, made.branches[1])
        attention.register_forward_hook(lambda module, *_: calls.append(module))
    made(IMAGES.clone().requires_grad_()).square().sum().backward()
    assert len(calls) == 2 * len(made.blocks)
    for key, parameter in made.model.named_parameters():
        if key in plain:
            torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-4, atol=1e-4)  # of gradients of some tens


def test_gradient_checkpointing_of_transformers__keeps_only_inputs():
    made = family("vit")
    made.model.train()
    install_token_drop(made.model, [1], 0.5)
    install_lean_activations(made.model, {2: "exact"})
    made.model.activation_checkpointing_enable()
    report = measure(made.model, IMAGES, loss=lambda out: out.logits.sum())
    # Each block keeps its input, of 17 or 10 tokens of 48 channels, for two images.
    bytes_of = {17: 17 * 48 * 4 * 2, 10: 10 * 48 * 4 * 2}
    lines = {line.name: line.activations for line in report.by_block}
    assert [lines[str(index)] for index in range(1, 4)] == [bytes_of[17], bytes_of[10], bytes_of[10]]


def test_eager_attention__is_refused():
    made = family("vit")
    made.model.set_attn_implementation("eager")
    with pytest.raises(ConfigurationError) as error:
        install_token_drop(made.model, [1], 0.5)
    assert str(error.value) == (
        "Block 1 of the ViT (ViTForImageClassification) has attn_implementation='eager', expected 'sdpa', which calls "
        "scaled_dot_product_attention, where tokens get their scores; build the model with attn_implementation='sdpa', "
        "or call its set_attn_implementation('sdpa')."
    )
    handle = install_token_drop(made.model, [1], 0.5, score="random")
    assert made(IMAGES).isfinite().all()
    handle.remove()
    made.model.set_attn_implementation("sdpa")
    install_token_drop(made.model, [1], 0.5)


def test_beit__stretching_its_bias_is_refused():
    made = family("beit")
    install_token_drop(made.model, [1], 0.5)
    with pytest.raises(ConfigurationError) as error:
        made.model(IMAGES, interpolate_pos_encoding=True)
    assert str(error.value) == (
        "BEiT was called with interpolate_pos_encoding=True, which stretches its position bias to the number of "
        "tokens; leave it out: the bias fits images of any size without."
    )


def test_hidden_states__are_refused():
    made = family("vit")
    drop = install_token_drop(made.model, [1], 0.5)
    with pytest.raises(ConfigurationError) as error:
        made.model(IMAGES, output_hidden_states=True)
    message = (
        "Block 1 of the ViT (ViTForImageClassification) drops tokens, so what output_hidden_states=True asks for would "
        "miss patches; leave it out, or remove the token drop."
    )
    assert str(error.value) == message
    made.model.config.output_hidden_states = True
    with pytest.raises(ConfigurationError) as error:
        made(IMAGES)
    assert str(error.value) == message
    drop.set_keep_rates({1: 1.0})
    assert len(made.model(IMAGES).hidden_states) == 5
    drop.remove()
    install_unread_skip(made.model)
    with pytest.raises(ConfigurationError) as error:
        made(IMAGES)
    assert str(error.value) == (
        "The last block gives the prefix tokens alone, so what output_hidden_states=True asks for would miss patches; "
        "leave it out, or leave the patch tokens in."
    )


@pytest.mark.parametrize("name", ["vit", "deit", "torchvision", "beit_shared_bias"])
def test_unread_skip__same_outputs_and_gradients(name):
    made = family(name)
    install_token_drop(made.model, [1], 0.5)
    out = made(IMAGES)
    expected = gradients(made, out)
    install_unread_skip(made.model)
    skipped = made(IMAGES)
    torch.testing.assert_close(skipped, out, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients(made, skipped).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["beit", "dinov2", "dinov3", "clip"])
def test_unread_skip__refused_where_patch_tokens_may_be_read(name):
    made = family(name)
    with pytest.raises(ConfigurationError) as error:
        install_unread_skip(made.model)
    assert str(error.value) == (
        f"The ViT ({type(made.model).__name__}) is not known to give only what it makes of the prefix tokens, as "
        "classifiers on the class token do; leave the patch tokens of its last block in."
    )


def test_unread_skip__refused_for_a_subclass_with_another_forward():
    made = family("vit")

    class Mine(type(made.model)):
        def forward(self, images):
            return self.vit(images).last_hidden_state.mean(dim=1)

    made.model.__class__ = Mine
    with pytest.raises(ConfigurationError, match="is not known to give only what it makes of the prefix tokens"):
        install_unread_skip(made.model)


@pytest.mark.parametrize("policy", ["exact", "recompute"])
@pytest.mark.parametrize("name", ["torchvision", "vit", "dinov3", "beit", "siglip"])
def test_lean_activations__same_gradients_as_with_the_drop_alone(name, policy):
    made = family(name)
    install_token_drop(made.model, [1, 2], 0.5)
    out = made(IMAGES)
    plain = gradients(made, out)
    install_lean_activations(made.model, policy)
    lean = made(IMAGES)
    found = gradients(made, lean)
    if name == "torchvision":  # sums go another order than in nn.MultiheadAttention
        torch.testing.assert_close(lean, out)
        assert all((found[key] - plain[key]).norm() <= 1e-5 * (plain[key].norm() + 1) for key in plain)
    else:
        assert torch.equal(lean, out)
        assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "restore"), [("torchvision", False), ("siglip", True)])
def test_plan__is_what_is_measured(name, restore):
    made = family(name)
    select_blocks_(made.model, [1, 3])
    drop = install_token_drop(made.model, [1, 2], 0.5, restore=restore)

    def loss(out):
        return (out if isinstance(out, torch.Tensor) else out.pooler_output).sum()

    planned = plan(made.model, IMAGES, loss=loss)
    assert planned == measure(made.model, IMAGES, loss=loss)
    left = drop.num_tokens(16)
    assert left[-1] == (16 + made.prefix if restore else left[2])
    if not restore:
        assert [line.tokens for line in planned.by_block[1:-1]] == left


def test_plan__leaves_no_tensors_without_data_in_the_model():
    made = family("dinov3")
    plan(made.model, IMAGES, loss=lambda out: out.pooler_output.sum())
    assert made(IMAGES).tolist()


def test_plan__and_measurement_see_the_tables_that_a_model_keeps():
    made = family("dinov3")
    reports = []
    for run in (plan, measure, measure, plan):
        reports.append(run(made.model, IMAGES, loss=lambda out: out.pooler_output.sum()))
        made(IMAGES)  # makes the table of the patches' places, if there is none
    assert all(report == reports[0] for report in reports)


def test_plan__of_a_model_that_looks_at_values():
    made = family("siglip2")
    with pytest.raises(ConfigurationError) as error:
        plan(made.model, IMAGES, loss=lambda out: out.pooler_output.sum())
    assert str(error.value) == (
        "_OfPictures looks at values of tensors in its forward pass, and a plan has tensors without values; use "
        "lightning_bsr.memory.measure."
    )


def test_select_blocks__head_norm_and_embeddings():
    made = family("vit")
    made.model.train()
    selection = select_blocks_(made.model, {1: "mlp", -1: "attn"}, head=False)
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    parts = {"vit.layernorm", "vit.layers.1.layernorm_after", "vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"}
    attention = {f"vit.layers.3.attention.{name}_proj" for name in "qkvo"}
    expected = parts | attention | {"vit.layers.3.layernorm_before"}
    assert {name.rpartition(".")[0] for name in trained} == expected
    selection.eval_frozen()
    modes = {name: module.training for name, module in made.model.named_modules()}
    assert not modes["vit.embeddings"]
    assert not modes["vit.embeddings.dropout"]
    assert [modes[f"vit.layers.{index}"] for index in range(4)] == [False, True, False, True]
    selection.remove()
    assert all(p.requires_grad for p in made.model.parameters())
    assert all(module.training for module in made.model.modules())
    assert select_blocks_(made.model, [3]).view.heads == (made.model.classifier,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "timm", "vit", "dinov3"])
def test_compile__fullgraph_with_restore(name):
    made = family(name)
    install_token_drop(made.model, [1, 2], 0.5, restore=True)
    plain = made(IMAGES)
    made.model = torch.compile(made.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(made(IMAGES), plain)


def test_autocast__restored_tokens_are_close():
    made = family("vit")
    install_token_drop(made.model, [1, 2], 0.5, restore=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = made(IMAGES)
    assert F.cosine_similarity(low.float().flatten(), made(IMAGES).flatten(), dim=0) > 0.99
