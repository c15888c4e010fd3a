"""Any levers, in any order, on any small ViT: attached, trained, detached in any order, they leave nothing behind."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    install_checkpointing,
    install_lean_activations,
    install_token_drop,
    install_unread_skip,
    select_blocks_,
)
from lightning_bsr.functional._prefix import install_prefix_cache
from lightning_bsr.functional._quantize import quantize_frozen_
from plain_modules import tiny_vit

GENERATOR = torch.Generator().manual_seed(3)
X, Y = torch.randn(2, 3, 16, 16, generator=GENERATOR), torch.tensor([0, 1])


@st.composite
def models(draw):
    """Arguments of small ViTs: with and without class token, registers, LayerScale, norms of queries and keys."""
    class_token = draw(st.booleans())
    return {
        "img_size": 16,
        "depth": draw(st.integers(1, 4)),
        "embed_dim": draw(st.sampled_from([16, 24])),
        "num_heads": draw(st.sampled_from([1, 2, 4])),
        "class_token": class_token,
        "reg_tokens": draw(st.integers(0, 2)),
        "init_values": draw(st.sampled_from([None, 0.5])),
        "qk_norm": draw(st.booleans()),
        "global_pool": draw(st.sampled_from(["token", "avg"])) if class_token else "avg",
    }


def levers(draw, model):
    """Names and installers of some levers, in the order to install them; some need what others do first."""
    depth = len(model.blocks)
    some = st.lists(st.integers(0, depth - 1), unique=True)
    selected, dropping = draw(some), draw(some)
    rate, score = draw(st.sampled_from([0.3, 0.5, 0.9])), "cls" if model.cls_token is not None else "mean"
    policy = draw(st.sampled_from(["exact", "recompute", "int8"]))
    fuse = draw(st.booleans())
    free = {
        "drop": lambda: install_token_drop(model, dropping, rate, score=score, fuse=fuse),
        "lean": lambda: install_lean_activations(model, policy),
        "checkpoint": lambda: install_checkpointing(model, selected),
        "unread": lambda: install_unread_skip(model),
    }
    after_selection = {
        "quantize": lambda: quantize_frozen_(model),
        "prefix": lambda: install_prefix_cache(model),
    }
    early = draw(st.lists(st.sampled_from([*free]), unique=True))
    late = draw(st.permutations([name for name in (*free, *after_selection) if name not in early]))
    late = late[: draw(st.integers(0, len(late)))]
    everything = {**free, **after_selection, "select": lambda: select_blocks_(model, selected)}
    return [(name, everything[name]) for name in (*early, "select", *late)]


def state(model):
    return {
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "types": {name: (p.dtype, p.shape) for name, p in model.named_parameters()},
        "attributes": {name: sorted(vars(part)) for name, part in model.named_modules()},
        "modes": {name: part.training for name, part in model.named_modules()},
        "keys": list(model.state_dict()),
        "hooks": {
            name: [len(hooks) for key, hooks in vars(part).items() if key.endswith("_hooks")]
            for name, part in model.named_modules()
        },
    }


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_levers__leave_the_model_as_it_was(data):
    model = tiny_vit(**data.draw(models(), "model"))
    model.train(data.draw(st.booleans(), "training"))
    for block in model.blocks:
        block.requires_grad_(data.draw(st.booleans(), "trains before"))
    weights, before, expected = copy.deepcopy(model.state_dict()), state(model), model(X)

    installed = []
    for name, install in levers(data.draw, model):
        unchanged = state(model)
        try:
            installed.append((name, install()))
        except ConfigurationError:
            assert state(model) == unchanged, name

    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)
        optimizer.step()
    stepped = model.state_dict()
    if "quantize" not in dict(installed):
        assert all(torch.equal(stepped[name], weights[name]) for name in frozen)
    assert not torch.equal(stepped["head.weight"], weights["head.weight"])

    # A weight in 8 bits cannot train, so it must be in floats again before the flags are put back.
    order = data.draw(st.permutations(installed), "detach")
    order.sort(key=lambda pair: pair[0] != "quantize")
    for _, handle in order:
        handle.remove()
        handle.remove()
    assert state(model) == before
    model.load_state_dict(weights)
    assert torch.equal(model(X), expected)
