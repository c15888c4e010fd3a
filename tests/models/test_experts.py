"""Conversion of a ViT's MLPs to mixtures of experts, and the converted model with every other lever."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    install_checkpointing,
    install_int8_activations,
    install_lean_activations,
    install_prefix_cache,
    install_token_drop,
    install_unread_skip,
    select_blocks_,
)
from lightning_bsr.memory import measure, plan
from lightning_bsr.models import MoEMlp, convert_to_moe_, find_experts
from plain_modules import tiny_vit

DEEP = {"depth": 4, "embed_dim": 48}


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def randomise_(experts):
    """Tell experts apart, as training does."""
    for layer in experts.layers.values():
        for part in (layer.fc1, layer.fc2):
            part.weight.data += 0.05 * torch.randn_like(part.weight)


# --- conversion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [None, 3, ["a", "b"]])
def test_convert__changes_no_output(tasks):
    model = tiny_vit(**DEEP, init_values=0.1)
    model.blocks[0].requires_grad_(False)
    expected = model(images())
    experts = convert_to_moe_(model, [0, 1, -1], 16, 4, tasks=tasks)
    for task in range(len(experts.layers[1].tasks)):
        experts.select_task(task)
        torch.testing.assert_close(model(images()), expected, rtol=1e-6, atol=1e-6)
    if not tasks:
        torch.testing.assert_close(model(images()), expected, rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    keys = [f"gates.{i}.weight" for i in range(len(experts.layers[1].gates))]
    keys += ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert [*model.blocks[1].mlp.state_dict()] == keys
    convert_to_moe_(unnormalised := tiny_vit(**DEEP), [1], 16, 4, renormalize=False)
    assert (unnormalised(images()) - tiny_vit(**DEEP)(images())).abs().max() > 1e-4


def test_convert__says_what_it_did():
    experts = convert_to_moe_(nn.ModuleDict({"net": tiny_vit(**DEEP)}), [1, 3], tasks=5)
    assert str(experts) == (
        "the MLPs of blocks 1, 3 of the ViT 'net' (VisionTransformer) are 16 experts each, 4 for each token, with a "
        "gate for each of 5 tasks"
    )


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: timm.create_model("test_vit", num_classes=10), id="plain"),
        pytest.param(lambda: timm.create_model("test_vit2", num_classes=10), id="layer scale, registers"),
        pytest.param(lambda: timm.create_model("test_vit3", num_classes=10), id="third"),
    ],
)
def test_convert__other_vits(model):
    model = model().eval()
    x = torch.randn(1, 3, 160, 160)
    expected = model(x)
    convert_to_moe_(model, [0, 2], 4, 2)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": []}, "blocks is [], expected a list of one block index or more."),
        ({"blocks": [9]}, "blocks has 9, but the ViT (VisionTransformer) has 4 blocks, numbered 0 to 3 or -4 to -1."),
        ({"num_experts": 0}, "num_experts is 0, expected a whole number, 1 or above."),
        ({"top_k": 17}, "top_k is 17, expected a whole number from 1 to num_experts=16."),
        ({"noise_std": -1.0}, "noise_std is -1.0, expected 0 or more."),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0, expected a number above 0, or None."),
        (
            {"tasks": ["a", "a"]},
            "tasks is ['a', 'a'], expected different names, a number of tasks, 1 or above, or None for a shared gate.",
        ),
    ],
)
def test_convert__refuses(arguments, message):
    model = tiny_vit(**DEEP)
    before = [*model.state_dict()]
    with pytest.raises(ConfigurationError) as error:
        convert_to_moe_(model, **{"blocks": [1], **arguments})
    assert str(error.value) == message
    assert [*model.state_dict()] == before


def test_convert__refuses_other_mlps_by_name_and_changes_nothing():
    model = tiny_vit(**DEEP)
    expected = "expected a plain timm.layers.Mlp: two linear layers (fc1, fc2) and an activation function between them."
    start = "The MLP branch of block 2 of the ViT (VisionTransformer) has norm2 (LayerNorm), mlp ("
    end = "), ls2 (Identity), drop_path2 (Identity), "
    for part, what in (
        (GluMlp(48, 96), "GluMlp"),
        (Mlp(48, 96, norm_layer=nn.LayerNorm), "Mlp with norm=LayerNorm"),
        (Mlp(48, 96, use_conv=True), "Mlp with fc1=Conv2d"),
    ):
        model.blocks[2].mlp = part
        with pytest.raises(ConfigurationError) as error:
            convert_to_moe_(model, [1, 2])
        assert str(error.value) == start + what + end + expected
        assert isinstance(model.blocks[1].mlp, Mlp)
    with pytest.raises(ConfigurationError) as error:
        find_experts(model)
    assert str(error.value) == (
        "The ViT (VisionTransformer) has no mixtures of experts; make some with convert_to_moe_."
    )
    convert_to_moe_(model, [1])
    with pytest.raises(ConfigurationError) as error:
        convert_to_moe_(model, [1])
    assert str(error.value) == "The MLP of block 1 of the ViT (VisionTransformer) is a mixture of experts already."
    with pytest.raises(ConfigurationError) as error:
        MoEMlp(nn.Linear(3, 3))
    assert str(error.value) == f"The MLP is Linear, {expected}"


def test_task__is_refused_by_name_and_must_be_selected():
    model = tiny_vit(**DEEP)
    experts = convert_to_moe_(model, [1], 4, 2, tasks=["digits", "pets"])
    with pytest.raises(ConfigurationError) as error:
        model(images())
    assert str(error.value) == "No task is selected, expected one of 'digits', 'pets': call select_task first."
    for unknown in ("cars", 2, -1, True):
        with pytest.raises(ConfigurationError) as error:
            experts.select_task(unknown)
        assert str(error.value) == f"The task is {unknown!r}, expected one of 'digits', 'pets'."
    with pytest.raises(ConfigurationError) as error:
        convert_to_moe_(tiny_vit(**DEEP), [1], 4, 2).select_task("pets")
    assert str(error.value) == "The task is 'pets', but there is one gate for all tasks; convert with tasks=."


def test_task__survives_copies_pickles_and_checkpoints():
    model = tiny_vit(**DEEP)
    experts = convert_to_moe_(model, [1, 2], 4, 2, tasks=["digits", "pets"])
    randomise_(experts)
    experts.select_task("pets")
    expected = model(images())
    torch.testing.assert_close(copy.deepcopy(model)(images()), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images()), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = tiny_vit(**DEEP)
    convert_to_moe_(other, [1, 2], 4, 2, tasks=["digits", "pets"])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    find_experts(other).select_task("pets")
    torch.testing.assert_close(other(images()), expected)
    find_experts(other).select_task("digits")
    assert not torch.allclose(other(images()), expected, atol=1e-5)


# --- with the levers --------------------------------------------------------------------------------------


def prepared(noise_std=0.0):
    model = tiny_vit(**DEEP)
    experts = convert_to_moe_(model, [1, 3], 4, 2, tasks=["a", "b"], noise_std=noise_std)
    randomise_(experts)
    select_blocks_(model, [1, 3])
    install_token_drop(model, [1, 2], 0.5)
    return model, experts


def joint_step(model, experts):
    """Both tasks forward before backward: by then the second one is selected."""
    torch.manual_seed(5)
    loss = 0.0
    for position, task in enumerate(("a", "b")):
        experts.select_task(task)
        loss = loss + F.cross_entropy(model(images(2 + position)), torch.arange(2 + position))
        loss = loss + 0.1 * experts.balance_loss()
    loss.backward()
    return [loss.detach(), *(p.grad for p in trained(model))]


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
@pytest.mark.parametrize(
    ("install", "exact"),
    [
        (lambda model: install_lean_activations(model, "exact"), True),
        (lambda model: install_lean_activations(model, "recompute"), True),
        (install_checkpointing, True),
        (lambda model: install_lean_activations(model, "int8"), False),
        (install_int8_activations, False),
    ],
    ids=["exact", "recompute", "checkpoint", "lean int8", "int8"],
)
def test_levers__give_the_gradients_of_the_plain_step(install, exact, noise_std):
    expected = joint_step(*prepared(noise_std))
    model, experts = prepared(noise_std)
    install(model)
    for mine, theirs in zip(joint_step(model, experts), expected, strict=True):
        if exact:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        else:
            assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.98
    assert experts.layers[1].use.sum(1).tolist() == [2 * 2 * 34, 3 * 2 * 34]  # once, though computed twice


def test_lean__exact_keeps_no_inputs_of_the_experts_layers():
    def kept(policy):
        model = tiny_vit(**DEEP)
        convert_to_moe_(model, [1], 4, 2)
        select_blocks_(model, [1])
        if policy:
            install_lean_activations(model, policy)
        return plan(model, (2, 3, 32, 32)).by_block[2].mlp

    tokens, width = 2 * 65, 48
    plain, exact = kept(None), kept("exact")
    assert plain - exact == 4 * tokens * (width + 2 * 4 * width)  # input of fc1 once, of fc2 for both choices


def test_unread_skip__leaves_out_tokens_of_a_mixture_too():
    model = tiny_vit(**DEEP)
    experts = convert_to_moe_(model, [-1], 4, 2)
    randomise_(experts)
    expected = model(images())
    experts.reset_use()
    install_unread_skip(model)
    torch.testing.assert_close(model(images()), expected)
    assert int(experts.layers[3].use.sum()) == 2 * 2


def test_prefix_cache__refuses_blocks_that_depend_on_the_task():
    model = tiny_vit(**DEEP)
    convert_to_moe_(model, [1], 4, 2, tasks=2)
    select_blocks_(model, [3])
    with pytest.raises(ConfigurationError) as error:
        install_prefix_cache(model)
    assert str(error.value) == (
        "Block 1 of the ViT (VisionTransformer) has a MoEMlp that computes something else for each task, so its output "
        "cannot be stored by image; choose blocks before it."
    )
    install_prefix_cache(model, blocks=1)


@pytest.mark.parametrize(
    ("policy", "precision", "capacity_factor"),
    [
        (None, "32-true", None),
        (None, "bf16-mixed", 1.0),
        ("exact", "32-true", None),
        ("exact", "bf16-mixed", None),
        ("recompute", "32-true", 1.0),
    ],
)
def test_plan__is_what_is_measured(policy, precision, capacity_factor):
    model = tiny_vit(**DEEP)
    experts = convert_to_moe_(model, [1, 3], 8, 2, tasks=2, capacity_factor=capacity_factor)
    randomise_(experts)
    experts.select_task(1)
    select_blocks_(model, [1, 3])
    install_token_drop(model, [1, 2], 0.5)
    if policy:
        install_lean_activations(model, policy)

    def step(x):
        return F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)) + 0.01 * experts.balance_loss()

    options = {"forward": step, "optimizer": torch.optim.AdamW(trained(model)), "precision": precision}
    planned = plan(model, (3, 3, 32, 32), **options)
    measured = measure(model, images(3), **options)
    assert planned == measured
    tokens, width = 34 * 3, 48
    if policy is None:
        dense = tiny_vit(**DEEP)
        select_blocks_(dense, [1, 3])
        install_token_drop(dense, [1, 2], 0.5)
        dense = plan(dense, (3, 3, 32, 32), precision=precision).by_block[2].flops
        # One more MLP, of 16 * width ** 2 operations a token and as many twice in backward, and the gate.
        mlp, gate = 16 * tokens * width**2, 2 * tokens * width * 8
        assert measured.by_block[2].flops == (dense.forward + mlp + gate, dense.backward + 2 * (mlp + gate))
