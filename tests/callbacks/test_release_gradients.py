"""A fit that releases gradients is the ordinary one, bit for bit, or is refused before it begins."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import StepLR

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, ConfigurationError, FineTune, TokenDrop
from lightning_bsr.callbacks.release_gradients import ReleaseGradients
from lightning_bsr.functional._release import _RELEASED
from lightning_bsr.methods import METHODS
from plain_modules import ManualOptimization, PlainModule, RandomImages, ResumableLoader


class WithAdamW(PlainModule):
    """Has a schedule, LayerScale, and a learning rate that others may set."""

    def __init__(self, lr=1e-2):
        super().__init__(init_values=0.1)
        self.lr = lr

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), "interval": "step"}}


class Gradients(Callback):
    """Counts the parameters whose gradients are there after each step, and keeps the optimizer."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts.append(sum(p.grad is not None for p in pl_module.parameters()))
        (self.optimizer,) = trainer.optimizers


def outcome(module, optimizer):
    flat = {f"weight {name}": t for name, t in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        flat |= {f"state {index} {key}": torch.as_tensor(t) for key, t in state.items() if t is not None}
    return {name: t.clone() for name, t in flat.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def is_released(module):
    return any(p in _RELEASED for p in module.parameters())


def assert_exact(make_trainer, images, make_callbacks=list, module_class=WithAdamW, **options):
    found = []
    for release in ([], [ReleaseGradients()]):
        torch.manual_seed(0)
        module, gradients = module_class(), Gradients()
        make_trainer(*make_callbacks(), gradients, *release, **options).fit(module, images)
        assert all((count == 0) == bool(release) for count in gradients.counts)
        assert not is_released(module)
        found.append((len(gradients.counts), outcome(module, gradients.optimizer)))
    (count, ordinary), (released_count, released) = found
    assert released_count == count > 1
    assert_equal(released, ordinary)


def of_the_paper():
    return [BlockSelect([1, 3, 5]), TokenDrop([1, 3], 0.5), ActivationMemoryMonitor(every_n_steps=2)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("module_class", [PlainModule, WithAdamW])
def test_fit__is_exact(module_class, precision, make_trainer, images):
    assert_exact(make_trainer, images, of_the_paper, module_class, precision=precision, limit_val_batches=1)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "bsr_auto"])
def test_fit__is_exact_for(method, make_trainer, images):
    assert_exact(make_trainer, images, lambda: [FineTune(method)], limit_train_batches=2, limit_val_batches=0)


def test_fit__is_exact_with_averaged_weights(make_trainer, images):
    def callbacks():
        return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]

    with pytest.warns(UserWarning, match="SWA is currently only supported every epoch"):
        assert_exact(make_trainer, images, callbacks, max_epochs=3, limit_train_batches=2, limit_val_batches=0)


@pytest.mark.filterwarnings("ignore:.*The `LearningRateFinder`")
def test_fit__is_exact_after_a_search_for_the_learning_rate(make_trainer, images):
    def callbacks():
        return [LearningRateFinder(num_training_steps=3, min_lr=1e-4, max_lr=1e-2)]

    assert_exact(make_trainer, images, callbacks, limit_val_batches=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_fit__resumes_exactly(make_trainer, tmp_path):
    data = RandomImages(loader_class=ResumableLoader)
    straight, gradients = WithAdamW(), Gradients()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    options = {"max_epochs": 2, "limit_val_batches": 0}
    make_trainer(gradients, ReleaseGradients(), saving, enable_checkpointing=True, **options).fit(straight, data)
    (path,) = tmp_path.glob("*step=3.ckpt")
    for release in ([ReleaseGradients()], []):
        resumed, late = WithAdamW(), Gradients()
        make_trainer(late, *release, **options).fit(resumed, data, ckpt_path=path, weights_only=False)
        assert len(late.counts) == 5
        assert_equal(outcome(resumed, late.optimizer), outcome(straight, gradients.optimizer))


def test_fit__twice_with_one_callback(make_trainer, images, infos):
    release, modules = ReleaseGradients(), [PlainModule(), PlainModule()]
    for module in modules:
        make_trainer(release, fast_dev_run=2).fit(module, images)
        assert not is_released(module)
    assert_equal(*(module.state_dict() for module in modules))
    said = [message for message in infos if message.startswith("ReleaseGradients")]
    assert said == ["ReleaseGradients: SGD steps each of 80 parameters as soon as its gradient is there."] * 2


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_fit__that_ends_early_detaches(raised, make_trainer, images):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert is_released(pl_module)
            if batch_idx == 1:
                raise raised

    module = PlainModule()
    with pytest.raises((raised, SystemExit)):
        make_trainer(ReleaseGradients(), Fails()).fit(module, images)
    assert not is_released(module)


def test_evaluation__attaches_nothing(make_trainer, images):
    class Spy(Callback):
        def on_test_start(self, trainer, pl_module):
            assert not is_released(pl_module)

    trainer = make_trainer(ReleaseGradients(), Spy(), accumulate_grad_batches=2)
    trainer.test(PlainModule(), images, verbose=False)


def refusal(trainer, module, images):
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ConfigurationError) as error:
        trainer.fit(module, images)
    assert_equal(module.state_dict(), before)
    assert not is_released(module)
    return str(error.value)


def test_refuses__accumulation(make_trainer, images):
    because = "because each gradient is gone before the next batch could add to it."
    assert refusal(make_trainer(ReleaseGradients(), accumulate_grad_batches=2), PlainModule(), images) == (
        "ReleaseGradients cannot be used here: the Trainer's accumulate_grad_batches is 2, expected "
        f"accumulate_grad_batches=1, {because}"
    )
    scheduler = GradientAccumulationScheduler({2: 4})
    assert refusal(make_trainer(scheduler, ReleaseGradients()), PlainModule(), images) == (
        "ReleaseGradients cannot be used here: the Trainer has the callback GradientAccumulationScheduler({2: 4, 0: 1})"
        f", expected no accumulation, {because}"
    )


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_refuses__clipping(algorithm, make_trainer, images):
    trainer = make_trainer(ReleaseGradients(), gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    assert refusal(trainer, PlainModule(), images) == (
        "ReleaseGradients cannot be used here: the Trainer's gradient_clip_val is 0.5, expected no clipping, because "
        "it comes after the backward pass, when the gradients are gone."
    )


def test_refuses__a_scaled_loss(make_trainer, images):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    assert refusal(make_trainer(ReleaseGradients(), plugins=[plugin]), PlainModule(), images) == (
        "ReleaseGradients cannot be used here: the Trainer's precision is '16-mixed' with a GradScaler, expected "
        "another one such as 'bf16-mixed', because gradients of a scaled loss must be unscaled before the step."
    )


def test_refuses__several_devices(make_trainer):
    # Not by fit, which would start processes before it asks.
    trainer = make_trainer(ReleaseGradients(), strategy="ddp", devices=2)
    with pytest.raises(ConfigurationError) as error:
        ReleaseGradients().setup(trainer, PlainModule(), "fit")
    assert str(error.value) == (
        "ReleaseGradients cannot be used here: the Trainer's strategy is DDPStrategy, expected a single device "
        "(devices=1, strategy='auto'), because several average their gradients before the step."
    )


def test_refuses__manual_optimization(make_trainer, images):
    assert refusal(make_trainer(ReleaseGradients()), ManualOptimization(), images) == (
        "ReleaseGradients cannot be used here: ManualOptimization optimizes by itself, expected automatic "
        "optimization, with one backward pass and one step a batch; in a training step of your own call "
        "lightning_bsr.functional.release_gradients_."
    )


HOOKS = ["on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"]


@pytest.mark.parametrize("hook", [*HOOKS, "configure_gradient_clipping"])
def test_refuses__modules_that_look_at_gradients(hook, make_trainer, images):
    module = type("Looks", (PlainModule,), {hook: lambda self, *args: None})()
    assert refusal(make_trainer(ReleaseGradients()), module, images) == (
        f"ReleaseGradients cannot be used here: Looks has its own {hook}, expected none, because it would find no "
        "gradients; what needs none may run in on_train_batch_end."
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_refuses__callbacks_that_look_at_gradients(hook, make_trainer, images):
    for callback in (type("Looks", (Callback,), {hook: lambda self, *args: None})(), LambdaCallback(**{hook: print})):
        name = type(callback).__name__
        assert refusal(make_trainer(ReleaseGradients(), callback), PlainModule(), images) == (
            f"ReleaseGradients cannot be used here: {name} has its own {hook}, expected none, because it would find no "
            "gradients; what needs none may run in on_train_batch_end."
        )


def test_refuses__an_optimizer_that_needs_all_gradients(make_trainer, images):
    class WithLBFGS(PlainModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    assert refusal(make_trainer(ReleaseGradients()), WithLBFGS(), images) == (
        "Gradients cannot be released into LBFGS, whose step computes the loss again and needs all gradients at once; "
        "expected one that steps each parameter by its own gradient, such as SGD, RMSprop, Adam or AdamW."
    )


def test_refuses__several_backward_passes_a_batch(make_trainer, images):
    class Twice(PlainModule):
        def backward(self, loss):
            loss.backward()
            self.model(torch.zeros(1, 3, 32, 32)).sum().backward()

    module = Twice()
    with pytest.raises(ConfigurationError, match=r"got a second gradient before optimizer.step\(\)"):
        make_trainer(ReleaseGradients()).fit(module, images)
    assert not is_released(module)
