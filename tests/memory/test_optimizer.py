import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop
from torch.utils._pytree import tree_leaves

from lightning_bsr.memory._live import StepTracker
from lightning_bsr.memory._optimizer import OptimizerCost, optimizer_cost, optimizers_cost

OPTIMIZERS = {
    "AdamW": (AdamW, {}),
    "AdamW amsgrad": (AdamW, {"amsgrad": True}),
    "AdamW foreach": (AdamW, {"foreach": True}),
    "Adam fused": (Adam, {"fused": True}),
    "SGD": (SGD, {}),
    "SGD momentum": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "RMSprop": (RMSprop, {}),
    "RMSprop centered": (RMSprop, {"centered": True, "momentum": 0.9}),
}


def make(name, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).to(dtype)
    model[0].bias.requires_grad_(False)
    kind, options = OPTIMIZERS[name]
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.2}]
    return model, kind(groups, lr=0.1, **options)


def state_of(optimizer):
    return [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_cost__is_that_of_the_real_one(name, dtype):
    model, optimizer = make(name, dtype)
    planned = optimizer_cost(optimizer)
    assert not optimizer.state
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    assert planned.state == sum(t.nbytes for t in state_of(optimizer))
    with StepTracker() as tracker:
        tracker.hold(model.parameters(), "parameters")
        tracker.hold([p.grad for p in trained], "gradients")
        tracker.hold(state_of(optimizer), "optimizer_state")
        tracker.forget_peak()
        resident = tracker.peak.bytes
        optimizer.step()
    assert planned.temporaries == tracker.peak.bytes - resident
    # And so it is known from an optimizer that has state already, which keeps it.
    state = {id(p): id(s) for p, s in optimizer.state.items()}
    assert optimizer_cost(optimizer) == planned
    assert {id(p): id(s) for p, s in optimizer.state.items()} == state


def test_optimizer_cost__of_parameters_that_will_have_another_dtype():
    assert optimizer_cost(make("AdamW")[1], torch.bfloat16) == optimizer_cost(make("AdamW", torch.bfloat16)[1])


def test_optimizer_cost__by_hand():
    weights = [nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(300))]
    assert optimizer_cost(SGD(weights, lr=0.1)) == OptimizerCost(0, 0)
    assert optimizer_cost(SGD(weights, lr=0.1, momentum=0.9)) == OptimizerCost(1600, 0)
    # Two moments, and a 32-bit count of steps for each parameter.
    assert optimizer_cost(AdamW(weights, lr=0.1)).state == 2 * 1600 + 2 * 4


def test_optimizers_cost__states_add_up_and_temporaries_take_turns():
    both = [make(name)[1] for name in ("AdamW", "SGD momentum")]
    costs = [optimizer_cost(optimizer) for optimizer in both]
    assert optimizers_cost(both) == OptimizerCost(sum(c.state for c in costs), max(c.temporaries for c in costs))


def test_optimizers_cost__unknown():
    weights = [nn.Parameter(torch.zeros(4))]
    assert optimizers_cost([]) is None
    assert optimizer_cost(LBFGS(weights)) is None
    assert optimizers_cost([SGD(weights, lr=0.1), LBFGS(weights)]) is None
