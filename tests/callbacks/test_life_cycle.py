"""What holds for the callbacks in every kind of run."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, ConfigurationError, TokenDrop
from lightning_bsr.functional._drop_forward import drops_tokens
from plain_modules import (
    BuildsInConfigureModel,
    BuildsInSetup,
    ManualOptimization,
    PlainModule,
    RandomImages,
    ResumableLoader,
    state,
)


def levers(**kwargs):
    return [BlockSelect([1, 3]), TokenDrop([2, 4], 0.5, **kwargs), ActivationMemoryMonitor(every_n_steps=2)]


class Spy(Callback):
    """Notes what trains and where tokens are dropped while a run is on."""

    def __init__(self, raise_at=None):
        self.trained, self.dropping, self.modes, self.raise_at = set(), set(), [], raise_at

    def _look(self, pl_module):
        self.trained = {n.split(".")[2] for n, p in pl_module.named_parameters() if p.requires_grad and "blocks" in n}
        self.dropping = {i for i, block in enumerate(pl_module.model.blocks) if drops_tokens(block)}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._look(pl_module)
        self.modes = [block.training for block in pl_module.model.blocks]
        if batch_idx == 2 and self.raise_at:
            raise self.raise_at

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._look(pl_module)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start


def weights(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("module_class", [PlainModule, BuildsInConfigureModel, BuildsInSetup, ManualOptimization])
@pytest.mark.parametrize("order", [1, -1], ids=["in_order", "reversed"])
def test_fit__trains_the_chosen_blocks_of_any_module(module_class, order, make_trainer, images):
    module, spy = module_class(), Spy()
    before = None if module_class in (BuildsInConfigureModel, BuildsInSetup) else weights(module)
    make_trainer(*levers()[::order], spy).fit(module, images)
    assert spy.trained == {"1", "3"}
    assert spy.dropping == {2, 4}
    assert spy.modes == [False, True, False, True, False, False]
    assert state(module) == state(PlainModule())
    if before:
        changed = {name for name, t in module.state_dict().items() if not torch.equal(t, before[name])}
        expected = ("model.blocks.1.", "model.blocks.3.", "model.norm.", "model.head.")
        assert changed == {name for name in before if name.startswith(expected)}


def test_fit__equals_the_functional_api_in_a_plain_loop(make_trainer, images):
    from lightning_bsr.functional import install_token_drop, select_blocks_

    module, plain = PlainModule(), PlainModule()
    make_trainer(*levers()).fit(module, images)
    select_blocks_(plain, [1, 3])
    install_token_drop(plain, [2, 4], 0.5)
    optimizer = plain.configure_optimizers()
    for pictures, labels in images.train_dataloader():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain.model(pictures), labels).backward()
        optimizer.step()
    for (name, ours), theirs in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation__drops_tokens_and_freezes_nothing(stage, make_trainer, images):
    module, spy = PlainModule(), Spy()
    before = state(module)
    getattr(make_trainer(*levers(), spy), stage)(module, datamodule=images)
    assert spy.dropping == {2, 4}
    assert len(spy.trained) == 6
    assert state(module) == before


def test_evaluation__same_numbers_in_fit_and_alone(make_trainer, images):
    module = PlainModule()
    trainer = make_trainer(*levers())
    trainer.fit(module, images)
    in_fit = trainer.callback_metrics["val_loss"]
    alone = trainer.validate(module, images, verbose=False)[0]["val_loss"]
    assert in_fit.item() == alone
    without = make_trainer().validate(module, images, verbose=False)[0]["val_loss"]
    assert without != alone


def test_two_fits_in_a_row__behave_like_one(make_trainer, images):
    once, twice = PlainModule(), PlainModule()
    make_trainer(*levers(), max_epochs=1).fit(once, images)
    callbacks = levers()
    trainer = make_trainer(*callbacks, max_epochs=1)
    trainer.fit(twice, images)
    assert weights(once).keys() == weights(twice).keys()
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    second = make_trainer(*callbacks, max_epochs=1)
    for t, module in ((second, twice), (make_trainer(*levers(), max_epochs=1), once)):
        t.fit(module, images)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    assert state(twice) == state(PlainModule())


@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt()], ids=["exception", "ctrl_c"])
def test_interrupted_fit__cleans_up_and_the_next_run_works(error, make_trainer, images):
    module, callbacks = PlainModule(), levers()
    before = state(module)
    trainer = make_trainer(*callbacks, Spy(raise_at=error))
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        trainer.fit(module, images)
    assert state(module) == before
    spy = Spy()
    make_trainer(*callbacks, spy).fit(module, images)
    assert spy.trained == {"1", "3"}
    assert state(module) == before


def test_failed_configure_model__leaves_the_module_as_it_was(make_trainer, images):
    class Fails(PlainModule):
        def configure_model(self):
            raise RuntimeError("cannot build")

    module = Fails()
    before = state(module)
    with pytest.raises(RuntimeError, match="cannot build"):
        make_trainer(*levers()).fit(module, images)
    assert state(module) == before


def test_configure_model_of_an_instance__is_kept(make_trainer, images):
    module, built = PlainModule(), []
    module.configure_model = lambda: built.append(True)
    own = module.configure_model
    make_trainer(*levers()).fit(module, images)
    assert built == [True]
    assert vars(module)["configure_model"] is own


def test_gradient_accumulation__equals_one_large_batch(make_trainer):
    small, large = PlainModule(), PlainModule()
    make_trainer(*levers(), accumulate_grad_batches=2).fit(small, RandomImages(batches=4, batch_size=4))
    make_trainer(*levers()).fit(large, RandomImages(batches=2, batch_size=8))
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_mixed__trains(make_trainer, images):
    module, spy, monitor = PlainModule(), Spy(), ActivationMemoryMonitor()
    before = weights(module)
    make_trainer(*levers()[:2], monitor, spy, precision="bf16-mixed").fit(module, images)
    assert spy.trained == {"1", "3"}
    assert not torch.equal(module.model.blocks[1].attn.qkv.weight, before["model.blocks.1.attn.qkv.weight"])
    assert torch.equal(module.model.blocks[2].attn.qkv.weight, before["model.blocks.2.attn.qkv.weight"])
    assert monitor.report.weight_copies > 0


resumes = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@resumes
@pytest.mark.parametrize("stop_at", [4, 6], ids=["between_epochs", "inside_an_epoch"])
@pytest.mark.parametrize("module_class", [PlainModule, BuildsInConfigureModel])
def test_resume__equals_an_uninterrupted_run_bit_for_bit(stop_at, module_class, make_trainer, tmp_path):
    images = RandomImages(loader_class=ResumableLoader)
    options = {"max_epochs": 3, "enable_checkpointing": True}

    def checkpoints(folder):
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")

    whole = module_class()
    make_trainer(*levers(warmup_epochs=2), checkpoints("whole"), **options).fit(whole, images)
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(*levers(warmup_epochs=2), checkpoints("cut"), StopAfter(stop_at + 1), **options).fit(
            module_class(), images
        )
    resumed = module_class()
    path = tmp_path / "cut" / f"step={stop_at}.ckpt"
    make_trainer(*levers(warmup_epochs=2), checkpoints("cut"), **options).fit(
        resumed, images, ckpt_path=path, weights_only=True
    )
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_resume__with_another_selection_is_refused(make_trainer, images, tmp_path):
    options = {"enable_checkpointing": True}
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(BlockSelect([1, 3]), checkpoint, **options).fit(PlainModule(), images)
    with pytest.raises(ConfigurationError) as error:
        make_trainer(BlockSelect({2: "mlp"}, norm=False), max_epochs=2, **options).fit(
            PlainModule(), images, ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
    assert str(error.value) == (
        "The checkpoint was trained with BlockSelect(blocks={1: ['attn', 'mlp'], 3: ['attn', 'mlp']}, head=True, "
        "norm=True), which differs from the present BlockSelect(blocks={2: ['mlp']}, head=True, norm=False), so the "
        "optimizer's state does not fit; resume with the same selection, or start a new run from its weights, which "
        "load_from_checkpoint of the module takes in Python, and --model.checkpoint_path instead of --ckpt_path on the "
        "command line."
    )


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation__from_a_checkpoint_of_fit(stage, make_trainer, images, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trained = PlainModule()
    make_trainer(*levers(), checkpoint, enable_checkpointing=True).fit(trained, images)
    module = PlainModule()
    trainer = make_trainer(*levers(), checkpoint, enable_checkpointing=True)
    getattr(trainer, stage)(module, datamodule=images, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            BlockSelect([12]),
            "blocks has 12, but the ViT 'model' (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1.",
        ),
        (TokenDrop([3], 2.0), "keep_rate is 2.0, expected a number above 0 and at most 1."),
        (
            ActivationMemoryMonitor(vit="backbone"),
            "vit='backbone' names no module of PlainModule; Vision Transformers found: 'model' (VisionTransformer, 6 "
            "blocks).",
        ),
    ],
    ids=["block", "keep_rate", "path"],
)
def test_bad_arguments__stop_before_the_first_step(callback, message, make_trainer, images):
    module = PlainModule()
    before, spy = weights(module), Spy()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(TokenDrop([1], 0.5), callback, spy).fit(module, images)
    assert str(error.value) == message
    assert spy.modes == []
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert state(module) == state(PlainModule())


def test_module_of_another_lightning__is_refused(make_trainer):
    with pytest.raises(ConfigurationError) as error:
        BlockSelect([1]).setup(make_trainer(), torch.nn.Linear(2, 2), "fit")
    assert str(error.value) == (
        "BlockSelect was given a Linear that is no lightning.pytorch.LightningModule; import module and Trainer from "
        "lightning.pytorch, not from pytorch_lightning."
    )


@pytest.mark.parametrize("callback", levers(), ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_of_callbacks__work(callback, copier, make_trainer, images):
    make_trainer(copier(callback), Spy()).fit(PlainModule(), images)


def test_long_names__are_the_same_classes():
    import lightning_bsr

    assert lightning_bsr.BlockSelectCallback is BlockSelect
    assert lightning_bsr.TokenDropCallback is TokenDrop
