import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_bsr import (
    BlockSelect,
    ConfigurationError,
    FineTune,
    LeanActivations,
    ReleaseGradients,
    TokenDrop,
)
from lightning_bsr.memory import plan
from lightning_bsr.planning import FitPlanner, plan_fit
from plain_modules import BuildsInConfigureModel, BuildsInSetup, ManualOptimization, PlainModule

CPU = {"accelerator": "cpu"}


class ReturnsADict(PlainModule):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


class WithMetrics(PlainModule):
    """Its metrics look at values and count what they see."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=4)
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.mean.update(loss)
        self.log("accuracy", self.accuracy)
        self.log_dict({"mean": self.mean, "now": self.accuracy.compute()})
        return loss


class LogsANumber(WithMetrics):
    def training_step(self, batch, batch_idx):
        self.log("accuracy", self.accuracy(self.model(batch[0]), batch[1]).item())
        return super().training_step(batch, batch_idx)


class LooksAtValues(PlainModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        assert loss.item() > 0
        return loss


class TrainsBlocksOnly(PlainModule):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.blocks.parameters(), lr=1e-3)


class MustNotTrain(Callback):
    def on_train_batch_start(self, *args):
        raise AssertionError("a batch was trained on")

    on_train_batch_end = on_validation_batch_start = on_train_batch_start


def state(module):
    return {
        "flags": [p.requires_grad for p in module.parameters()],
        "attributes": {name: sorted(vars(m)) for name, m in module.model.named_modules()},
        "modes": [m.training for m in module.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        "gradients": [p.grad for p in module.parameters()],
    }


def own_plan(model, batch_size=4, **options):
    def forward(images, labels):
        return F.cross_entropy(model(images), labels)

    return plan(model, torch.zeros(batch_size, 3, 32, 32), torch.zeros(batch_size).long(), forward=forward, **options)


def test_plan_fit__is_the_plan_of_the_module_and_its_optimizer(images):
    module = TrainsBlocksOnly()
    expected = own_plan(module.model, optimizer=module.configure_optimizers())
    assert plan_fit(module, images, **CPU) == expected
    assert expected.batch_size == 4


def test_plan_fit__of_a_lean_step_with_released_gradients(images):
    ordinary = plan_fit(PlainModule(), images, [BlockSelect([1, 3])], **CPU)
    levers = [ReleaseGradients(), LeanActivations("recompute"), BlockSelect([1, 3])]
    planned, measured = plan_fit(PlainModule(), images, levers, also_measure=True, **CPU)
    assert planned == measured
    assert planned.gradients < ordinary.gradients
    assert planned.activations < ordinary.activations
    assert planned.peak < ordinary.peak


@pytest.mark.parametrize(
    "module_class", [PlainModule, ReturnsADict, WithMetrics, BuildsInSetup, BuildsInConfigureModel]
)
def test_plan_fit__is_what_is_measured(module_class, images):
    levers = [BlockSelect([1, 3]), TokenDrop([2, 4], 0.5)]
    planned, measured = plan_fit(module_class(), images, levers, also_measure=True, precision="bf16-mixed", **CPU)
    assert planned == measured
    assert [line.name for line in planned.by_block if line.trained] == ["1", "3", "head"]
    assert [line.tokens for line in planned.by_block] == [65, 65, 65, 34, 34, 19, 19, None]


def test_plan_fit__leaves_everything_as_it_was(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = PlainModule()
    before, weights = state(module), {name: t.clone() for name, t in module.state_dict().items()}
    levers = [BlockSelect([1, 3]), TokenDrop([2, 4], 0.5), MustNotTrain()]
    plan_fit(module, images, levers, also_measure=True, **CPU)
    assert state(module) == before
    assert module.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[name]) for name, t in module.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_plan_fit__metrics_count_nothing(images):
    module = WithMetrics()
    plan_fit(module, images, also_measure=True, **CPU)
    assert module.mean.weight == 0
    assert module.accuracy.tp.sum() == 0
    assert all("forward" not in vars(metric) for metric in (module.mean, module.accuracy))
    assert not {"log", "log_dict"} & vars(module).keys()


def test_plan_fit__value_of_a_metric_in_the_training_step(images):
    assert plan_fit(LogsANumber(), images, **CPU).activations > 0


def test_plan_fit__order_of_callbacks_is_of_no_account(images):
    levers = [BlockSelect([1, 3]), TokenDrop([2, 4], 0.5)]
    assert plan_fit(PlainModule(), images, levers, **CPU) == plan_fit(PlainModule(), images, levers[::-1], **CPU)


def test_plan_fit__method(images):
    full, head = (plan_fit(PlainModule(), images, [FineTune(method)], **CPU) for method in ("full", "head"))
    assert head.activations < full.activations / 50
    assert head.optimizer_state == head.gradients == 4 * (32 * 4 + 4)
    assert full.optimizer_state == full.gradients == full.parameters


def test_plan_fit__options_of_the_trainer(images):
    module = PlainModule()
    usual = plan_fit(module, images, **CPU)
    mixed = plan_fit(module, images, precision="bf16-mixed", **CPU)
    accumulated = plan_fit(module, images, accumulate_grad_batches=2, **CPU)
    sgd = module.configure_optimizers()
    assert mixed == own_plan(module.model, optimizer=sgd, precision="bf16-mixed")
    assert accumulated == own_plan(module.model, optimizer=sgd, accumulate=True)
    assert accumulated.peak >= usual.peak
    assert mixed.activations < usual.activations


def test_fit_step__another_batch_size_than_the_data_has(images, make_trainer):
    planner = FitPlanner(lambda step: [step.plan(), *(step.plan(batch_size=size) for size in (4, 1024))])
    trainer = make_trainer(planner, MustNotTrain())
    trainer.fit(PlainModule(), images)
    given, same, large = planner.result
    assert given == same
    assert (given.batch_size, large.batch_size) == (4, 1024)
    assert large.activations == pytest.approx(256 * given.activations, rel=1e-3)


def test_fit_planner__training_goes_on_as_if_nothing_had_been(images, make_trainer):
    module, planned = PlainModule(), PlainModule()
    trainer = make_trainer(FitPlanner(lambda step: step.plan()))
    trainer.fit(planned, images)
    assert trainer.global_step == 0
    for each in (module, planned):
        torch.manual_seed(0)
        make_trainer().fit(each, images)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), planned.parameters(), strict=True))


def test_plan_fit__training_step_that_looks_at_values(images):
    module = LooksAtValues()
    before = state(module)
    with pytest.raises(ConfigurationError) as error:
        plan_fit(module, images, [BlockSelect([1])], **CPU)
    assert str(error.value) == (
        "The training step of LooksAtValues looks at values, which planning has not "
        "(aten._local_scalar_dense.default); plan its ViT with lightning_bsr.memory.plan, or measure one step."
    )
    assert state(module) == before


def test_fit_step__measures_a_step_that_looks_at_values(images, make_trainer):
    planner = FitPlanner(lambda step: step.measure())
    make_trainer(planner).fit(LooksAtValues(), images)
    assert planner.result == plan_fit(PlainModule(), images, **CPU)


@pytest.mark.parametrize("measured", [False, True])
def test_fit_step__manual_optimization(measured, images, make_trainer):
    module = ManualOptimization()
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    planner = FitPlanner(lambda step: step.measure() if measured else step.plan())
    with pytest.raises(ConfigurationError) as error:
        make_trainer(planner).fit(module, images)
    assert str(error.value) == (
        "ManualOptimization optimizes by itself, so its training step cannot be run without training; plan its ViT "
        "with lightning_bsr.memory.plan, or choose its blocks with lightning_bsr.memory.fit_budget."
    )
    assert all(torch.equal(t, weights[name]) for name, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
