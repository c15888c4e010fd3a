import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    attention_gradients,
    install_attention_by_products,
    install_checkpointing,
    install_lean_activations,
    install_token_drop,
    select_blocks_,
)
from lightning_bsr.memory import measure, plan
from plain_modules import tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])


def step(model, lower=torch.bfloat16):
    """Output and gradients of a step under autocast; ``None`` for fp32."""
    model.zero_grad()
    with torch.autocast("cpu", lower, enabled=lower is not None):
        out = model(X)
        loss = F.cross_entropy(out, Y)
    loss.backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(ours, exact):
    """The largest error of a gradient, relative to its norm."""
    return max(((ours[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact)


@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_attention_gradients__are_those_of_autograd(tokens):
    q, k, v = torch.randn(3, 2, 3, tokens, 8, dtype=torch.float64, requires_grad=True)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.7)
    grad = torch.randn_like(out)
    ours = attention_gradients(q, k, v, out, grad, 0.7)
    for mine, theirs in zip(ours, torch.autograd.grad(out, [q, k, v], grad), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_step__outputs_are_equal_and_gradients_no_worse(lower):
    model = tiny_vit()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model)
    install_attention_by_products(model)
    out, gradients = step(model, lower)
    plain_out, plain_gradients = step(plain, lower)
    _, exact_gradients = step(exact, None)
    assert torch.equal(out, plain_out)
    assert error(gradients, exact_gradients) <= 1.3 * error(plain_gradients, exact_gradients)
    assert error(gradients, plain_gradients) > 0


def test_step__in_fp32_nothing_changes():
    model = tiny_vit()
    plain = copy.deepcopy(model)
    install_attention_by_products(model)
    ours, theirs = step(model, None), step(plain, None)
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize("policy", ["exact", "recompute", "int8"])
def test_step__composes_with_other_levers_in_any_order(policy, order):
    installers = [
        install_attention_by_products,
        lambda model: install_lean_activations(model, policy),
        lambda model: install_token_drop(model, [1, 3], 0.5),
    ]
    model, plain = tiny_vit(), tiny_vit()
    for each in (model, plain):
        select_blocks_(each, [1, 5])
    handles = [installers[index](model) for index in order]
    install_token_drop(plain, [1, 3], 0.5)
    out, gradients = step(model)
    plain_out, plain_gradients = step(plain)
    assert torch.equal(out, plain_out)
    assert 0 < error(gradients, plain_gradients) < (0.15 if policy == "int8" else 0.06)
    for handle in handles:
        handle.remove()
    assert all("forward" not in vars(block) for block in model.blocks)


def test_step__is_the_same_when_blocks_are_computed_again():
    model, again = tiny_vit(), tiny_vit()
    for each in (model, again):
        install_attention_by_products(each)
    install_checkpointing(again)
    ours, theirs = step(again)[1], step(model)[1]
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


def test_bytes__planned_are_measured_and_no_more_than_before():
    model = tiny_vit()
    before = measure(model, X, precision="bf16-mixed")
    install_attention_by_products(model)
    measured = measure(model, X, precision="bf16-mixed")
    planned = plan(model, X, precision="bf16-mixed")
    assert planned == measured
    assert measured.activations < before.activations
    assert measured.flops == before.flops


def test_handle__survives_deepcopy_and_pickle_and_compiles():
    model = tiny_vit()
    handle = install_attention_by_products(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = step(model)[1]
    for each in copies:
        ours = step(each)[1]
        assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))
    handle.remove()
    assert all("forward" not in vars(block) for block in model.blocks)


def test_install__refuses_a_second_time():
    model = tiny_vit()
    install_attention_by_products(model)
    with pytest.raises(ConfigurationError) as refused:
        install_attention_by_products(model)
    assert str(refused.value) == (
        "Block 0 of the ViT (VisionTransformer) has attention's gradients by matrix products already; remove that "
        "first."
    )
