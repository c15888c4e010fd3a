"""Steps with released gradients are the ordinary ones, bit for bit; and what cannot be combined with them says so."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import Lamb, Lookahead
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

import lightning_bsr.models  # noqa: F401  # registers the micro ViT
from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_checkpointing, install_token_drop, select_blocks_
from lightning_bsr.functional._release import _RELEASED, release_gradients_, releases_suspended
from plain_modules import tiny_vit

EXPECTED = "expected one that steps each parameter by its own gradient, such as SGD, RMSprop, Adam or AdamW"
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "RMSprop foreach": (torch.optim.RMSprop, {"momentum": 0.9, "foreach": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


def warm_up(step):
    return step / 3


class Run:
    """A model in training, with two parameter groups and a learning rate that begins at zero."""

    def __init__(self, model, optimizer="SGD momentum", *, release, size=32, precision=torch.float32):
        self.model, self.precision, self.release = model, precision, release
        trained = [p for p in model.parameters() if p.requires_grad]
        kind, options = OPTIMIZERS[optimizer]
        groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim < 2]}]
        self.optimizer = kind(groups, lr=0.01, **options)
        self.optimizer.param_groups[1]["weight_decay"] = 0.0
        self.scheduler = LambdaLR(self.optimizer, warm_up)
        self.handle = release_gradients_(self.optimizer) if release else None
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(4, 3, size, size, generator=generator)
        self.labels = torch.arange(4)

    def step(self, count=3):
        for _ in range(count):
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, self.precision is torch.bfloat16):
                loss = F.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            assert all((p.grad is None) == self.release for p in self.model.parameters() if p.requires_grad)
            self.optimizer.step()
            self.scheduler.step()
        return self

    def state(self):
        flat = {f"weight {name}": t for name, t in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            flat |= {f"state {index} {key}": value for key, value in state.items()}
        return {name: torch.as_tensor(t).clone() for name, t in flat.items() if t is not None}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_exact(make_model, optimizer="SGD momentum", **options):
    plain = Run(make_model(), optimizer, release=False, **options)
    first = plain.state()
    released = Run(make_model(), optimizer, release=True, **options).step().state()
    assert_equal(released, plain.step().state())
    unmoved = [
        name
        for name, p in plain.model.named_parameters()
        if p.requires_grad and torch.equal(p, first[f"weight {name}"])
    ]
    assert not unmoved


def rich_vit():
    """LayerScale, normed queries and keys, register tokens: many kinds of parameters."""
    return tiny_vit(init_values=0.1, qk_norm=True, reg_tokens=2)


def shared_mlp():
    """Three blocks have the same MLP; two of them are computed again in backward."""
    model = tiny_vit()
    model.blocks[1].mlp = model.blocks[3].mlp = model.blocks[4].mlp
    install_checkpointing(model, [1, 3])
    return model


def of_the_paper():
    model = rich_vit().train()
    select_blocks_(model, [1, 3, 5])
    install_token_drop(model, [1, 3], 0.5)
    return model


def of_the_paper_computed_again():
    model = of_the_paper()
    install_checkpointing(model)
    return model


def with_reentrant_checkpoints():
    model = tiny_vit()
    inner = model.blocks
    model.blocks = nn.Sequential(_Reentrant(inner[:3]), _Reentrant(inner[3:]))
    return model


class _Reentrant(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_release__is_exact_with(optimizer):
    assert_exact(rich_vit, optimizer)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("make", [shared_mlp, of_the_paper, of_the_paper_computed_again, with_reentrant_checkpoints])
def test_release__is_exact_for(make, optimizer, precision):
    assert_exact(make, optimizer, precision=precision)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("vit_micro_patch4_32", 32)])
def test_release__is_exact_for_models_of_timm(name, size):
    def make():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=10)

    assert_exact(make, "AdamW", size=size, precision=torch.bfloat16)


def test_release__steps_in_backward_and_frees_the_gradient_before_the_next():
    run = Run(tiny_vit(), release=True).step(1)
    before, alive = run.state(), []

    def count(_):
        alive.append(sum(p.grad is not None for p in run.model.parameters()))

    for p in run.model.parameters():
        p.register_post_accumulate_grad_hook(count)
    F.cross_entropy(run.model(run.images), run.labels).backward()
    assert alive == [0] * len(list(run.model.parameters()))
    moved = run.state()
    assert all(
        not torch.equal(moved[f"weight {name}"], before[f"weight {name}"]) for name, _ in run.model.named_parameters()
    )
    run.optimizer.step()
    assert_equal(run.state(), moved)


def test_release__a_tied_weight_steps_once():
    weight = nn.Parameter(torch.full((3, 3), 0.5))
    optimizer = torch.optim.AdamW([weight])
    release_gradients_(optimizer)
    (torch.ones(1, 3) @ weight @ weight).sum().backward()
    assert optimizer.state[weight]["step"] == 1


def test_release__what_gets_no_gradient_does_not_step():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, unused], lr=0.1, weight_decay=0.5)
    release_gradients_(optimizer)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state
    assert not torch.equal(used, torch.ones(2))


def test_release__several_optimizers():
    def train(release):
        model = tiny_vit()
        optimizers = [
            torch.optim.SGD(model.blocks.parameters(), lr=0.1, momentum=0.9),
            torch.optim.AdamW(model.head.parameters(), lr=0.1),
        ]
        for optimizer in optimizers if release else ():
            release_gradients_(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            model(torch.randn(2, 3, 32, 32, generator=generator)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    assert_equal(train(True), train(False))


def test_release__what_was_added_later_steps_as_ever():
    def train(release):
        model = tiny_vit()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        if release:
            release_gradients_(optimizer)
        optimizer.add_param_group({"params": list(model.blocks.parameters()), "lr": 0.01})
        model(torch.ones(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        return model.state_dict()

    assert_equal(train(True), train(False))


def test_release__hooks_of_the_optimizer_run_once_a_step():
    run = Run(tiny_vit(), release=True)
    calls = []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run.step(2)
    assert calls == ["before", "after"] * 2


def test_release__a_step_with_a_closure():
    plain, run = Run(tiny_vit(), release=False), Run(tiny_vit(), release=True)

    def closure():
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(run.images), run.labels)
        loss.backward()
        return loss

    for _ in range(3):
        run.optimizer.step(closure)
        run.scheduler.step()
    assert_equal(run.state(), plain.step().state())


def test_release__goes_on_from_a_state_dict():
    straight = Run(tiny_vit(), "AdamW", release=True).step(3).state()
    first = Run(tiny_vit(), "AdamW", release=True).step(1)
    second = Run(tiny_vit(), "AdamW", release=True)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    assert_equal(second.step(2).state(), straight)


def test_release__removed_is_ordinary_again():
    run = Run(tiny_vit(), release=True).step(1)
    run.handle.remove()
    run.handle.remove()
    run.release = False
    plain = Run(tiny_vit(), release=False).step(3)
    assert_equal(run.step(2).state(), plain.state())
    assert not any(p in _RELEASED for p in run.model.parameters())
    release_gradients_(run.optimizer).remove()


def test_release__suspended():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    release_gradients_(optimizer)
    with releases_suspended():
        weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2))
    assert torch.equal(weight, torch.ones(2))


def two_backward_passes(linear, x):
    linear(x).sum().backward()
    linear(x).sum().backward()


def reentrant_checkpoints_that_share_a_weight(linear, x):
    checkpoint(linear, checkpoint(linear, x, use_reentrant=True), use_reentrant=True).sum().backward()


@pytest.mark.parametrize("backward", [two_backward_passes, reentrant_checkpoints_that_share_a_weight])
def test_release__a_second_gradient_is_an_error(backward):
    linear = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    release_gradients_(optimizer)
    with pytest.raises(ConfigurationError) as error:
        backward(linear, torch.ones(1, 3, requires_grad=True))
    shape = str(error.value).split("of shape ")[1].split(" got")[0]
    assert shape in ("[3]", "[3, 3]")
    assert str(error.value) == (
        f"A parameter of shape {shape} got a second gradient before optimizer.step(), but the first is gone already: "
        "it was released into SGD. Expected optimizer.step() after each backward pass; to accumulate gradients, do "
        "not release them."
    )


def test_release__a_weight_used_outside_of_the_graph_is_an_error_of_autograd():
    scale, weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.eye(3))
    release_gradients_(torch.optim.SGD([scale, weight], lr=0.1))
    loss = ((scale[None] @ weight.detach()) @ weight).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def refused(optimizer):
    generator = torch.get_rng_state()
    with pytest.raises(ConfigurationError) as error:
        release_gradients_(optimizer)
    assert torch.equal(torch.get_rng_state(), generator)
    return str(error.value)


def test_release__refuses_optimizers_that_need_all_gradients():
    model = tiny_vit()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    weights = list(model.parameters())
    assert refused(torch.optim.LBFGS(weights)) == (
        "Gradients cannot be released into LBFGS, whose step computes the loss again and needs all gradients at once; "
        f"{EXPECTED}."
    )
    lamb = Lamb(weights)
    assert refused(lamb) == (
        "Gradients cannot be released into Lamb, which steps a parameter otherwise when it is alone than together with "
        f"others; {EXPECTED}."
    )
    assert not lamb.state
    assert refused(torch.optim.SparseAdam(weights)) == (
        "Gradients cannot be released into SparseAdam, which does not step copies of its parameters (SparseAdam does "
        f"not support dense gradients, please consider Adam instead); {EXPECTED}."
    )
    assert refused(Lookahead(torch.optim.SGD(weights, lr=0.1))) == (
        f"Gradients cannot be released into Lookahead, which wraps SGD as its _base_optimizer; {EXPECTED}."
    )
    assert_equal(model.state_dict(), before)
    assert not any(p in _RELEASED or p.grad is not None for p in weights)


def test_release__refuses_steps_that_count_or_draw_for_all_together():
    class Counts(torch.optim.SGD):
        """Each step is half of the one before."""

        @torch.no_grad()
        def step(self, closure=None):
            self.halvings = getattr(self, "halvings", 0) + 1
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p -= group["lr"] * p.grad / 2**self.halvings

    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p -= group["lr"] * torch.randn_like(p)

    for kind in (Counts, Noisy):
        optimizer = kind(tiny_vit().parameters(), lr=0.0)
        assert refused(optimizer) == (
            f"Gradients cannot be released into {kind.__name__}, which steps a parameter otherwise when it is alone "
            f"than together with others; {EXPECTED}."
        )
        assert not hasattr(optimizer, "halvings")


def test_release__refuses_what_it_cannot_reach():
    weight = nn.Parameter(torch.ones(2))
    assert refused([torch.optim.SGD([weight], lr=0.1)]) == "optimizer is a list, expected a torch.optim.Optimizer."
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert refused(torch.optim.SGD([frozen], lr=0.1)) == (
        "SGD holds no parameter that trains, so there is no gradient to release."
    )
    elsewhere = nn.Parameter(torch.ones(2, device="meta"))
    assert refused(torch.optim.SGD([weight, elsewhere], lr=0.1)) == (
        "SGD holds parameters on cpu, meta, expected one device to release gradients on."
    )
    release_gradients_(torch.optim.SGD([weight], lr=0.1))
    assert refused(torch.optim.AdamW([weight])) == (
        "Gradients of parameters of AdamW are released already; remove that first."
    )
