import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_bsr import ActivationCheckpoint, BlockSelect, ConfigurationError, FineTune, TokenDrop
from lightning_bsr.callbacks.quantize_frozen import QuantizeFrozen
from lightning_bsr.functional import select_blocks_
from lightning_bsr.functional._quantize import quantize_frozen_
from plain_modules import (
    BuildsInConfigureModel,
    BuildsInSetup,
    ManualOptimization,
    PlainModule,
    RandomImages,
    ResumableLoader,
)

ORDERS = pytest.mark.parametrize("order", [1, -1], ids=["in_order", "reversed"])


def levers():
    return [BlockSelect([1, 3]), TokenDrop([2, 4], 0.5), QuantizeFrozen()]


class Spy(Callback):
    """Notes which blocks hold 8-bit weights while a run is on, and may break it."""

    def __init__(self, raise_at=None):
        self.held, self.raise_at = {}, raise_at

    def look(self, name, pl_module):
        named = pl_module.model.blocks.named_parameters()
        self.held[name] = {key.split(".")[0] for key, p in named if p.dtype == torch.int8}

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.look("validation", pl_module)

    def on_test_batch_start(self, trainer, pl_module, *_):
        self.look("test", pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look("training", pl_module)
        if batch_idx == 2 and self.raise_at:
            raise self.raise_at


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def assert_as_before(module):
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert all(m.training and "forward" not in vars(m) for m in module.model.modules())
    assert all("weight_scale" not in m._buffers for m in module.model.modules())


def in_a_plain_loop(images):
    module = PlainModule()
    selection = select_blocks_(module, [1, 3])
    handle = quantize_frozen_(module)
    optimizer = module.configure_optimizers()
    for pictures, labels in images.train_dataloader():
        optimizer.zero_grad()
        F.cross_entropy(module.model(pictures), labels).backward()
        optimizer.step()
    handle.remove()
    selection.remove()
    return module


@ORDERS
@pytest.mark.parametrize("module_class", [PlainModule, BuildsInConfigureModel, BuildsInSetup, ManualOptimization])
def test_fit__equals_the_functional_api_in_a_plain_loop(module_class, order, make_trainer, images):
    module, spy = module_class(), Spy()
    make_trainer(*[BlockSelect([1, 3]), QuantizeFrozen()][::order], spy).fit(module, images)
    assert spy.held == {"training": {"0", "2", "4", "5"}, "validation": {"0", "2", "4", "5"}}
    assert_same(module.state_dict(), in_a_plain_loop(images).state_dict())
    assert_as_before(module)


def test_fit__says_what_it_does(make_trainer, images, infos):
    make_trainer(BlockSelect([1, -1]), QuantizeFrozen(), fast_dev_run=True).fit(PlainModule(), images)
    assert (
        "QuantizeFrozen: 16 frozen weights in blocks of the ViT 'model' (VisionTransformer) are held in 8 bits: "
        "0.19 -> 0.05 MiB; they stay rounded afterwards."
    ) in infos


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fit__leaves_what_it_computed_with(precision, make_trainer, images):
    module = PlainModule()
    trainer = make_trainer(*levers(), precision=precision)
    trainer.fit(module, images)
    in_fit = trainer.callback_metrics["val_loss"]
    assert trainer.validate(module, images, verbose=False)[0]["val_loss"] == in_fit.item()
    plain = PlainModule()
    plain.load_state_dict(module.state_dict())
    again = make_trainer(TokenDrop([2, 4], 0.5), precision=precision)
    assert again.validate(plain, images, verbose=False)[0]["val_loss"] == in_fit.item()


def test_fit__twice_is_like_once(make_trainer, images):
    once, twice, callbacks = PlainModule(), PlainModule(), levers()
    make_trainer(*callbacks).fit(twice, images)
    make_trainer(*levers()).fit(once, images)
    assert_same(twice.state_dict(), once.state_dict())
    spy = Spy()
    make_trainer(*callbacks, spy).fit(twice, images)
    assert spy.held["training"] == {"0", "2", "4", "5"}
    # Only what trains has moved: what is rounded stays when it is rounded again.
    moved = {name for name, t in twice.state_dict().items() if not torch.equal(t, once.state_dict()[name])}
    trained = ("model.blocks.1.", "model.blocks.3.", "model.norm.", "model.head.")
    assert moved == {name for name in twice.state_dict() if name.startswith(trained)}
    assert_as_before(twice)


@ORDERS
@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt()], ids=["exception", "ctrl_c"])
def test_fit__that_breaks_leaves_a_usable_module(error, order, make_trainer, images):
    module = PlainModule()
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        make_trainer(*levers()[::order], Spy(raise_at=error)).fit(module, images)
    assert_as_before(module)
    make_trainer().fit(module, images)


def test_fit__with_a_checkpointed_block_and_biases(make_trainer, images):
    plain, module = PlainModule(), PlainModule()
    make_trainer(FineTune("bitfit"), QuantizeFrozen()).fit(plain, images)
    make_trainer(QuantizeFrozen(), ActivationCheckpoint(), FineTune("bitfit")).fit(module, images)
    assert_same(module.state_dict(), plain.state_dict())
    bias = "model.blocks.0.attn.qkv.bias"
    assert not torch.equal(module.state_dict()[bias], PlainModule().state_dict()[bias])
    assert_as_before(module)


checkpoints = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@checkpoints
@pytest.mark.parametrize(("stop_at", "order"), [(4, 1), (6, -1)], ids=["between_epochs", "inside_an_epoch"])
def test_resume__equals_an_uninterrupted_run_bit_for_bit(stop_at, order, make_trainer, tmp_path):
    images = RandomImages(loader_class=ResumableLoader)
    options = {"max_epochs": 3, "enable_checkpointing": True}

    def saves(folder):
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")

    whole, resumed = PlainModule(), PlainModule()
    make_trainer(*levers()[::order], saves("whole"), **options).fit(whole, images)
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(*levers()[::order], saves("cut"), StopAfter(stop_at + 1), **options).fit(PlainModule(), images)
    path = tmp_path / "cut" / f"step={stop_at}.ckpt"
    make_trainer(*levers()[::order], saves("cut"), **options).fit(resumed, images, ckpt_path=path, weights_only=True)
    assert_same(resumed.state_dict(), whole.state_dict())


@checkpoints
def test_checkpoint__loads_without_the_callback(make_trainer, images, tmp_path):
    module = PlainModule()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    make_trainer(*levers(), saves, enable_checkpointing=True).fit(module, images)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    start = PlainModule().state_dict()
    assert {name: (t.dtype, t.shape) for name, t in saved.items()} == {n: (t.dtype, t.shape) for n, t in start.items()}
    frozen = "model.blocks.0.attn.qkv.weight"
    assert torch.equal(saved[frozen], module.state_dict()[frozen])
    assert not torch.equal(saved[frozen], start[frozen])
    plain = PlainModule()
    plain.load_state_dict(torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"])
    assert_same(plain.state_dict(), module.state_dict())
    spy = Spy()
    make_trainer(*levers(), spy).test(plain, images, verbose=False)
    assert spy.held == {"test": set()}


def test_load_state_dict__in_the_middle_of_fit(make_trainer, images):
    weights = {name: t * 0.9 for name, t in PlainModule().state_dict().items()}

    class Loads(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.load_state_dict(weights)

    module, plain = PlainModule(), PlainModule()
    make_trainer(*levers(), Loads()).fit(module, images)
    plain.load_state_dict(weights)
    make_trainer(*levers()).fit(plain, images)
    assert_same(module.state_dict(), plain.state_dict())


@ORDERS
@pytest.mark.parametrize(
    ("callback", "name"),
    [(StochasticWeightAveraging(1e-3), "StochasticWeightAveraging"), (WeightAveraging(), "WeightAveraging")],
    ids=["swa", "averaging"],
)
def test_averaged_weights__are_refused(callback, name, order, make_trainer, images):
    module = PlainModule()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(*[*levers(), copy.deepcopy(callback)][::order]).fit(module, images)
    assert str(error.value) == (
        f"{name} would average the 8-bit codes of QuantizeFrozen as if they were weights; leave one of the two "
        "callbacks out."
    )
    assert_same(module.state_dict(), PlainModule().state_dict())
    assert_as_before(module)


def test_strategy__that_divides_weights_is_refused(make_trainer):
    trainer, module = make_trainer(), PlainModule().requires_grad_(False)
    trainer._accelerator_connector.strategy = DDPStrategy()
    QuantizeFrozen().attach(trainer, module).remove()
    trainer._accelerator_connector.strategy = ModelParallelStrategy()
    with pytest.raises(ConfigurationError) as error:
        QuantizeFrozen().attach(trainer, module)
    assert str(error.value) == (
        "The strategy of the Trainer is ModelParallelStrategy, expected SingleDeviceStrategy or DDPStrategy: others "
        "may divide the weights that QuantizeFrozen rounds."
    )


def test_nothing_frozen__is_refused(make_trainer, images):
    module = PlainModule()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(QuantizeFrozen()).fit(module, images)
    assert str(error.value) == (
        "No linear layer in the blocks of the ViT 'model' (VisionTransformer) has a frozen weight to hold in 8 bits; "
        "freeze some before, for example with BlockSelect or select_blocks_."
    )
    assert_same(module.state_dict(), PlainModule().state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_of_the_callback__work(copier, make_trainer, images):
    spy = Spy()
    make_trainer(BlockSelect([1]), copier(QuantizeFrozen(vit="model")), spy, fast_dev_run=True).fit(
        PlainModule(), images
    )
    assert spy.held["training"] == {"0", "2", "3", "4", "5"}
