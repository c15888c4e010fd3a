import itertools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, ConfigurationError, LeanActivations, TokenDrop
from lightning_bsr.functional._forward import forward_chain
from lightning_bsr.functional._lean import LeanForward
from lightning_bsr.memory import measure
from plain_modules import BuildsInConfigureModel, PlainModule


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def fit(make_trainer, images, *callbacks, **arguments):
    module = PlainModule()
    make_trainer(*callbacks, limit_train_batches=3, **arguments).fit(module, images)
    assert all("forward" not in vars(block) for block in module.model.blocks)
    return weights(module)


def assert_equal(ours, theirs):
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("policy", ["exact", "recompute"])
@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_fit__weights_are_equal_bit_for_bit(make_trainer, images, policy, arguments):
    plain = fit(make_trainer, images, BlockSelect([1, 3]), TokenDrop([1, 3], 0.5), **arguments)
    ours = [BlockSelect([1, 3]), TokenDrop([1, 3], 0.5), LeanActivations(policy)]
    assert_equal(fit(make_trainer, images, *ours, **arguments), plain)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_fit__in_any_order_of_the_callbacks(make_trainer, images, order):
    class Kept(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert any(isinstance(block.forward, LeanForward) for block in pl_module.model.blocks)
            kept.append(trainer.callback_metrics["memory/activations_mib"].item())

    kept = []
    levers = [BlockSelect([1, 3]), TokenDrop([1, 3], 0.5), LeanActivations()]
    fit(make_trainer, images, *[levers[index] for index in order], ActivationMemoryMonitor(), Kept())
    expected = []
    kept, expected = expected, kept
    fit(make_trainer, images, *levers, ActivationMemoryMonitor(), Kept())
    assert kept == expected != []


def test_fit__skips_unread_tokens(make_trainer, images, infos):
    plain = fit(make_trainer, images, BlockSelect([1, 5]))
    ours = fit(make_trainer, images, LeanActivations(skip_unread=True, fold_norms=True), BlockSelect([1, 5]))
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)
    vit = "the ViT 'model' (VisionTransformer)"
    message = (
        f"blocks 5 of 6 of {vit} give the prefix tokens alone; all 6 blocks of {vit} keep lean activations (exact)"
    )
    assert f"LeanActivations: {message}." in infos


def test_fit__attention_by_products(make_trainer, images, infos):
    seen = []

    class Spy(Callback):
        def on_after_backward(self, trainer, pl_module):
            seen.extend(type(f).__name__ for f in forward_chain(pl_module.model.blocks[3]))

    levers = [TokenDrop([1, 3], 0.5), BlockSelect([1, 3])]
    lean = LeanActivations(attention_by_products=True)
    trainer = make_trainer(lean, *levers, Spy(), precision="bf16-mixed", fast_dev_run=True)
    module = PlainModule()
    trainer.fit(module, images)
    assert seen == ["PositionsForward", "TokenDropForward", "LeanForward", "AttentionByProductsForward"]
    assert all("forward" not in vars(block) for block in module.model.blocks)
    assert any("have attention's gradients by matrix products" in message for message in infos)


def test_fit__skips_nothing_where_the_head_reads_patch_tokens(make_trainer, images):
    module = PlainModule(global_pool="avg")
    with pytest.raises(ConfigurationError) as error:
        make_trainer(LeanActivations(skip_unread=True)).fit(module, images)
    assert str(error.value) == (
        "The ViT 'model' (VisionTransformer) has global_pool='avg', expected 'token': only then does its head read no "
        "patch tokens of the last block; leave them in."
    )
    assert all("forward" not in vars(block) for block in module.model.blocks)


def test_fit__int8_trains(make_trainer, images):
    before = weights(PlainModule())
    after = fit(make_trainer, images, BlockSelect([1]), LeanActivations("int8"))
    assert not torch.equal(before["model.blocks.1.attn.qkv.weight"], after["model.blocks.1.attn.qkv.weight"])
    assert torch.equal(before["model.blocks.2.attn.qkv.weight"], after["model.blocks.2.attn.qkv.weight"])


def test_fit__says_what_it_does(make_trainer, images, infos):
    make_trainer(LeanActivations({0: "recompute"}), fast_dev_run=True).fit(PlainModule(), images)
    message = "blocks 0 of 6 of the ViT 'model' (VisionTransformer) keep lean activations (recompute)"
    assert f"LeanActivations: {message}." in infos


def test_fit__of_a_module_that_builds_late(make_trainer, images):
    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.extend(isinstance(block.forward, LeanForward) for block in pl_module.model.blocks)

    seen = []
    make_trainer(LeanActivations(), Spy(), fast_dev_run=True).fit(BuildsInConfigureModel(), images)
    assert seen == [True] * 6


def test_fit__checks_the_policy(make_trainer, images):
    module = PlainModule()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(LeanActivations({9: "exact"})).fit(module, images)
    assert str(error.value) == (
        "policy has 9, but the ViT 'model' (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1."
    )
    assert all("forward" not in vars(block) for block in module.model.blocks)


def test_evaluation__attaches_nothing(make_trainer, images):
    class Spy(Callback):
        def on_test_start(self, trainer, pl_module):
            assert all("forward" not in vars(block) for block in pl_module.model.blocks)

    make_trainer(LeanActivations(), Spy()).test(PlainModule(), images, verbose=False)


class Report(Callback):
    """Measures a step as the run would do it."""

    def on_train_start(self, trainer, pl_module):
        batch = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
        self.report = measure(pl_module.model, batch[0], loss=lambda out: F.cross_entropy(out, batch[1]))


def test_fit__within_a_budget__in_any_order_of_the_callbacks(make_trainer, images, infos):
    plain = fit(make_trainer, images, BlockSelect([1, 3]), TokenDrop([1, 3], 0.5))
    bounds = []
    for policy in ("exact", "recompute"):
        report = Report()
        fit(make_trainer, images, BlockSelect([1, 3]), TokenDrop([1, 3], 0.5), LeanActivations(policy), report)
        bounds.append(report.report.activations_peak)
    budget = sum(bounds) // 2
    lean = LeanActivations("recompute", memory_budget=budget, budget_kind="activations")
    report = Report()
    ours = fit(make_trainer, images, lean, TokenDrop([1, 3], 0.5), BlockSelect([1, 3]), report)
    assert bounds[1] < report.report.activations_peak <= budget
    assert_equal(ours, plain)
    assert any("LeanActivations: " in message and "exact: " in message for message in infos)


def test_fit__of_a_module_that_builds_late__within_a_budget(make_trainer, images):
    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.extend(isinstance(block.forward, LeanForward) for block in pl_module.model.blocks)

    seen = []
    lean = LeanActivations("recompute", memory_budget="1GiB", skip_unread=True)
    make_trainer(lean, Spy(), fast_dev_run=True).fit(BuildsInConfigureModel(), images)
    # The last block's is inside of the one that skips.
    assert seen == [True] * 5 + [False]


def test_constructor__checks_the_budget():
    with pytest.raises(ConfigurationError) as error:
        LeanActivations(memory_budget="1GiB")
    assert str(error.value) == (
        "LeanActivations was given memory_budget='1GiB' and policy='exact', expected policy='recompute', which a "
        "budget tells what to compute again."
    )
    with pytest.raises(ConfigurationError) as error:
        LeanActivations("recompute", memory_budget="1GiB", budget_kind="peak")
    assert str(error.value) == "budget_kind is 'peak', expected one of 'total', 'activations'."
