"""Mixtures of experts against plain loops over tokens, and what keeps their use even."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from lightning_bsr.functional import (
    select_blocks_,
)
from lightning_bsr.models import MoEMlp, convert_to_moe_
from lightning_bsr.models._routing import importance_loss, load_loss
from plain_modules import tiny_vit

DEEP = {"depth": 4, "embed_dim": 48}


def mlp(in_features=6, hidden=10, **kwargs):
    return Mlp(in_features, hidden, **kwargs)


def moe_of(num_experts=4, top_k=2, **kwargs):
    """A mixture whose experts differ."""
    moe = MoEMlp(mlp(), num_experts, top_k, **kwargs)
    for layer in (moe.fc1, moe.fc2):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    return moe


def one_by_one(moe, x, noise=0.0):
    """The definition: token by token and expert by expert, first choices first where experts are limited."""
    tokens = x.flatten(0, -2)
    scores = F.linear(tokens, moe.gates[moe.task].weight) + noise
    gates, experts = scores.softmax(-1).topk(moe.top_k)
    if moe.renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    room = [len(tokens)] * moe.num_experts
    if moe.capacity_factor is not None:
        share = len(tokens) * moe.top_k / moe.num_experts
        room = [-(-share * moe.capacity_factor // 1)] * moe.num_experts
    outputs = [torch.zeros_like(token) for token in tokens]
    passed = set(range(len(tokens)))
    for choice in range(moe.top_k):
        for t, token in enumerate(tokens):
            e = int(experts[t, choice])
            if room[e] == 0:
                continue
            room[e] -= 1
            passed.discard(t)
            hidden = F.gelu(F.linear(token, moe.fc1.weight[e], moe.fc1.bias[e]))
            outputs[t] = outputs[t] + gates[t, choice] * F.linear(hidden, moe.fc2.weight[e], moe.fc2.bias[e])
    return torch.stack(outputs).view(x.shape), len(passed)


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def gradients(module, x, out):
    return torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum(), [x, *trained(module)])


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


# --- the layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": False},
        {"num_experts": 5, "top_k": 5},
        {"top_k": 1},
        {"num_experts": 7, "top_k": 3, "capacity_factor": 1.0},
        {"capacity_factor": 0.4},
        {"tasks": ["a", "b"]},
    ],
    ids=str,
)
def test_moe__equals_a_loop_over_tokens_in_outputs_and_gradients(options):
    moe = moe_of(**options)
    if moe.tasks:
        moe.select_task("b")
        moe.gates[0].requires_grad_(False)
    x = torch.randn(2, 9, 6, requires_grad=True)
    out = moe(x)
    expected, passed = one_by_one(moe, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert int(moe.passed.sum()) == passed
    for mine, theirs in zip(gradients(moe, x, out), gradients(moe, x, expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False, (True, False)])
def test_moe__one_expert_is_the_mlp(bias):
    plain = mlp(bias=bias)
    moe = MoEMlp(plain, num_experts=1, top_k=1)
    x = torch.randn(3, 7, 6, requires_grad=True)
    out, expected = moe(x), plain(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    moe.gates.requires_grad_(False)
    for mine, theirs in zip(gradients(moe, x, moe(x)), gradients(plain, x, expected), strict=True):
        torch.testing.assert_close(mine.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-5)


def test_moe__noise_chooses_other_experts_while_training_only():
    moe = moe_of(noise_std=2.0)
    x = torch.randn(2, 9, 6)
    assert not torch.equal(moe(x), moe(x))
    torch.manual_seed(7)
    out = moe(x)
    torch.manual_seed(7)
    torch.testing.assert_close(out, one_by_one(moe, x, 2.0 * torch.randn(18, 4))[0])
    assert torch.equal(moe.eval()(x), moe(x))


@pytest.mark.parametrize("frozen", ["fc1.weight", "fc2.weight", "fc1.bias", "gates", "fc", "x"])
def test_moe__frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    moe = moe_of()
    x = torch.randn(2, 9, 6, requires_grad=True)
    names = [name for name, _ in moe.named_parameters()]
    everything = dict(zip(["x", *names], gradients(moe, x, moe(x)), strict=True))
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x = x.detach().requires_grad_(frozen != "x")
    (moe(x) * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum().backward()
    for name, tensor in {"x": x, **dict(moe.named_parameters())}.items():
        if name.startswith(frozen):
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, everything[name], rtol=1e-5, atol=1e-6)


def test_moe__keeps_no_row_of_an_input_that_frozen_weights_do_not_need():
    moe = moe_of().requires_grad_(False)
    kept = []
    x = torch.randn(50, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moe(x)
    floats = sorted(tuple(t.shape) for t in kept if t.is_floating_point() and t.ndim == 2 and t.shape[-1] >= 6)
    # The gate's weight; the input of GELU, and of fc2 for the gates' gradient; not the tokens.
    assert floats == [(4, 6), (100, 10), (100, 10)]


def test_moe__experts_compute_in_the_type_of_autocast_and_gates_sum_in_32_bits():
    moe = moe_of()
    x = torch.randn(2, 9, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe(x)
        assert out.dtype is torch.bfloat16
        assert moe.act(x.new_ones(1)).dtype is torch.float32
    out.float().sum().backward()
    assert {p.grad.dtype for p in moe.parameters()} == {torch.float32}
    torch.testing.assert_close(out.float(), one_by_one(moe, x)[0], rtol=0.05, atol=0.05)
    low = copy.deepcopy(moe).to(torch.bfloat16)
    assert low(x.detach().to(torch.bfloat16)).dtype is torch.bfloat16


def test_moe__counts_what_experts_took_until_it_is_reset():
    moe = moe_of(tasks=["a", "b"])
    moe.select_task("a")
    moe(torch.randn(2, 9, 6))
    moe.select_task(1)
    with torch.no_grad():
        moe(torch.randn(1, 4, 6))
    assert moe.use.sum(1).tolist() == [36, 8]
    assert "use" not in moe.state_dict()
    moe.reset_use()
    assert not moe.use.any()


@pytest.mark.slow
def test_moe__compiles_to_one_graph():
    moe = moe_of()
    x = torch.randn(2, 9, 6, requires_grad=True)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), moe(x)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(gradients(moe, x, out), gradients(moe, x, expected), strict=True):
        torch.testing.assert_close(mine, theirs)


# --- balance ----------------------------------------------------------------------------------------------


def test_importance_loss__is_the_squared_coefficient_of_variation():
    logits = torch.randn(20, 4)
    importance = logits.softmax(-1).sum(0)
    expected = ((importance - importance.mean()) ** 2).mean() / importance.mean() ** 2
    torch.testing.assert_close(importance_loss(logits), expected)


def test_load_loss__counts_the_chance_of_being_chosen_with_new_noise():
    logits, std = torch.tensor([[1.0, 0.5, -2.0], [0.3, 0.1, 0.2]]), 0.7
    noisy = logits + torch.tensor([[0.0, 0.3, 0.1], [0.2, 0.0, -0.4]])
    drawn = logits + std * torch.randn(200_000, 2, 3)
    threshold = noisy.topk(2).values[:, -1:]
    load = (drawn >= threshold).float().mean(0).sum(0)
    torch.testing.assert_close(
        load_loss(logits, noisy, 2, std), load.var(correction=0) / load.mean() ** 2, rtol=0.02, atol=1e-3
    )


@pytest.mark.parametrize("noise_std", [0.0, 0.25])
def test_balance_loss__evens_out_what_the_task_alone_does_not(noise_std):
    def most_used(weight):
        torch.manual_seed(1)
        moe = moe_of(4, 1, renormalize=False, noise_std=noise_std)
        moe.gates[0].weight.data[2] = 0.8
        x, target = torch.rand(1, 64, 6), torch.randn(1, 64, 6)
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.05)
        for _ in range(60):
            loss = F.mse_loss(moe(x), target) + weight * moe.pop_balance_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moe.reset_use()
        moe.eval()(x)
        return float((moe.use / moe.use.sum()).max())

    assert most_used(0.0) > 0.9
    assert most_used(3.0) < 0.5


def test_balance_loss__is_there_once_and_only_while_a_gate_trains():
    model = tiny_vit(**DEEP)
    experts = convert_to_moe_(model, [1, -1], 4, 2)
    model(images())
    assert experts.balance_loss().requires_grad
    assert not experts.balance_loss().requires_grad
    model.eval()(images())
    assert float(experts.balance_loss()) == 0
    select_blocks_(model.train(), [-1])
    model(images())
    assert experts.layers[1].pop_balance_loss() is None
    experts.balance_loss().backward()
    assert experts.layers[3].gates[0].weight.grad.any()
