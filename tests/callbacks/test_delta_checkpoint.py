"""DeltaCheckpoint in a Trainer: when it saves, what a run resumes from, and what is beside it."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_bsr import (
    BlockSelect,
    ConfigurationError,
    DeltaCheckpoint,
    FineTune,
    LeanActivations,
    PrefixCache,
    QuantizeFrozen,
    ReleaseGradients,
    TokenDrop,
)
from lightning_bsr.functional import load_delta, merge_delta, read_delta
from plain_modules import BuildsInConfigureModel, PlainModule, RandomImages, ResumableLoader, state, tiny_vit

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed from",  # resumed runs write to folders of their own
)

SMALL = {"depth": 4, "embed_dim": 48}


class Small(PlainModule):
    """With a layer that has batch statistics, and dropout that selection puts to rest."""

    def __init__(self, **kwargs):
        super().__init__(**{**SMALL, **kwargs})
        self.model.head = nn.Sequential(nn.Linear(48, 4), nn.BatchNorm1d(4))


class SmallInConfigureModel(BuildsInConfigureModel):
    def configure_model(self):
        if self.model is None:
            self.model = tiny_vit(**SMALL)


def levers():
    return [BlockSelect([1, 3]), TokenDrop([2], 0.5)]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def fit(make_trainer, tmp_path):
    """Train for two epochs of two batches, with checkpoints below the test's folder."""

    def fit(module, *callbacks, ckpt_path=None, **options):
        images = RandomImages(batches=2, loader_class=ResumableLoader)
        trainer = make_trainer(*callbacks, **{"max_epochs": 2, "enable_checkpointing": True, **options})
        trainer.fit(module, images, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return fit


# When and what it saves


def test_fit__saves_what_trained_in_a_fraction_of_the_bytes(fit, tmp_path):
    module = Small()
    fit(module, *levers(), DeltaCheckpoint(tmp_path / "delta"), ModelCheckpoint(tmp_path / "whole"))
    assert files(tmp_path / "delta") == ["epoch=1-step=4.safetensors"]
    delta = tmp_path / "delta" / "epoch=1-step=4.safetensors"
    assert equal(merge_delta(Small(), delta), module.state_dict())
    assert {name.split(".")[2] for name in read_delta(delta).tensors if "blocks" in name} == {"1", "3"}
    assert "model.head.1.running_mean" in read_delta(delta).tensors
    whole = torch.load(tmp_path / "whole" / "epoch=1-step=4.ckpt", weights_only=True)
    assert equal(whole["state_dict"], module.state_dict())
    base = Small()
    handle = load_delta(base, delta)
    images = torch.randn(2, 3, 32, 32)
    dropping = handle.drops[0].keep_rates
    assert dropping == {2: 0.5}
    assert torch.equal(base.eval().model(images)[0], base.model(images)[0])


def test_configuration__tells_how_it_was_trained(fit, tmp_path):
    fit(Small(), BlockSelect({1: "mlp"}), TokenDrop([2], 0.5, fuse=False), DeltaCheckpoint(tmp_path))
    configuration = read_delta(tmp_path / "epoch=1-step=4.safetensors").configuration
    select, drop = configuration["callbacks"]
    assert (configuration["epoch"], configuration["global_step"]) == (1, 4)
    assert select["class"] == "BlockSelect"
    assert select["state"] == {"blocks": {"1": ["mlp"]}, "head": True, "norm": True}
    assert drop["arguments"]["keep_rate"] == 0.5
    assert configuration["token_drop"][0]["blocks"] == [2]


def test_monitor__keeps_the_best_and_the_last(fit, tmp_path):
    checkpoint = DeltaCheckpoint(
        tmp_path, "{epoch}-{val_loss:.3f}", monitor="val_loss", mode="max", save_top_k=1, save_last=True, resumable=True
    )
    trainer = fit(Small(), *levers(), checkpoint)
    best = Path(checkpoint.best_model_path)
    assert trainer.checkpoint_callback is checkpoint
    assert f"val_loss={checkpoint.best_model_score:.3f}.ckpt" in best.name
    assert files(tmp_path) == sorted([best.name, f"{best.stem}.safetensors", "last.ckpt", "last.safetensors"])
    deltas = [read_delta(path) for path in tmp_path.glob("*.safetensors")]
    assert equal(deltas[0].tensors, deltas[1].tensors)


def test_warm_up__is_saved_with_the_rate_of_its_epoch(fit, tmp_path):
    fit(Small(), TokenDrop([2], 0.5, warmup_epochs=2), DeltaCheckpoint(tmp_path, save_top_k=-1), max_epochs=3)
    paths = [tmp_path / f"epoch={epoch}-step={2 * epoch + 2}.safetensors" for epoch in range(3)]
    rates = [read_delta(path).configuration["token_drop"][0]["keep_rate"] for path in paths]
    assert rates == [[1.0], [0.75], [0.5]]


# Resume


@pytest.mark.parametrize(
    ("make", "extra", "options", "step"),
    [
        (Small, [], {}, 2),
        (Small, [], {}, 3),
        (SmallInConfigureModel, [], {}, 3),
        (Small, [QuantizeFrozen], {"precision": "bf16-true"}, 2),
        (Small, [LeanActivations, PrefixCache, ReleaseGradients], {}, 3),
    ],
    ids=["between_epochs", "inside_an_epoch", "configure_model", "bf16_quantize", "lean_cache_release"],
)
def test_resume__equals_an_uninterrupted_run_bit_for_bit(make, extra, options, step, fit, tmp_path):
    def callbacks(folder):
        checkpoint = DeltaCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1, resumable=True)
        return [*levers(), *(cls() for cls in extra), checkpoint]

    whole, resumed = make(), make()
    fit(whole, *callbacks("whole"), **options)
    path = tmp_path / "whole" / f"step={step}.ckpt"
    kept = torch.load(path, weights_only=True)
    assert not any("blocks.0" in name or "blocks.2" in name for name in kept["state_dict"])
    fit(resumed, *callbacks("resumed"), ckpt_path=path, **options)
    assert equal(resumed.state_dict(), whole.state_dict())
    deltas = [read_delta(tmp_path / folder / "step=4.safetensors") for folder in ("whole", "resumed")]
    assert equal(deltas[0].tensors, deltas[1].tensors)
    assert deltas[0].base_sha256 == deltas[1].base_sha256
    assert "on_load_checkpoint" not in vars(resumed)


@pytest.mark.parametrize("method", ["lora", "side_network", "bsr"])
def test_resume__of_other_methods(method, fit, tmp_path):
    def callbacks(folder):
        return [FineTune(method), DeltaCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, resumable=True)]

    whole = PlainModule(**SMALL)
    fit(whole, *callbacks("whole"))
    resumed = PlainModule(**SMALL)
    fit(resumed, *callbacks("resumed"), ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())
    deltas = [read_delta(tmp_path / folder / "step=4.safetensors") for folder in ("whole", "resumed")]
    assert equal(deltas[0].tensors, deltas[1].tensors)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation__takes_a_resumable_checkpoint(stage, fit, make_trainer, tmp_path):
    trained = Small()
    fit(trained, *levers(), DeltaCheckpoint(tmp_path, save_last=True, resumable=True))
    module = Small()
    trainer = make_trainer(*levers(), DeltaCheckpoint(tmp_path, resumable=True), enable_checkpointing=True)
    getattr(trainer, stage)(module, datamodule=RandomImages(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert equal(module.state_dict(), trained.state_dict())
    assert "on_load_checkpoint" not in vars(module)


def test_resume__from_a_whole_checkpoint_beside_it(fit, tmp_path):
    def callbacks():
        return [*levers(), ModelCheckpoint(tmp_path / "whole", "{step}", save_top_k=-1), DeltaCheckpoint(tmp_path)]

    whole, resumed = Small(), Small()
    fit(whole, *callbacks())
    first = read_delta(tmp_path / "epoch=1-step=4.safetensors")
    fit(resumed, *callbacks(), ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())
    assert read_delta(tmp_path / "epoch=1-step=4.safetensors").base_sha256 == first.base_sha256


def test_resume__with_another_base_is_refused_and_changes_nothing(fit, tmp_path):
    fit(Small(), *levers(), DeltaCheckpoint(tmp_path, save_last=True, resumable=True))
    other = Small()
    nn.init.ones_(other.model.blocks[0].norm1.bias)
    before, as_it_was = copied(other), state(other)
    with pytest.raises(ConfigurationError) as error:
        fit(other, *levers(), DeltaCheckpoint(tmp_path), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    message = "The base is another one than the checkpoint was trained from: 1 of its 28 frozen tensors differ, such as"
    assert str(error.value).startswith(f"{message} 'model.blocks.0.norm1.bias', which is float32[48]:")
    assert equal(copied(other), before)
    assert state(other) == as_it_was


def test_resume__without_the_callback_is_refused_by_strict_loading(fit, tmp_path):
    fit(Small(), *levers(), DeltaCheckpoint(tmp_path, save_last=True, resumable=True))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        fit(Small(), *levers(), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)


def test_on_load_checkpoint_of_the_module__sees_a_whole_checkpoint(fit, tmp_path):
    seen = []

    class Looks(Small):
        def on_load_checkpoint(self, checkpoint):
            seen.append(checkpoint["state_dict"].keys() == self.state_dict().keys())

    for path in (None, tmp_path / "last.ckpt"):
        two = [DeltaCheckpoint(tmp_path, save_last=True, resumable=True), DeltaCheckpoint(tmp_path, monitor="loss")]
        module = Looks()
        module.on_load_checkpoint = own = module.on_load_checkpoint
        fit(module, *levers(), *two, ckpt_path=path, max_epochs=2 if path is None else 3)
        assert vars(module)["on_load_checkpoint"] is own
    assert seen == [True]


def test_second_fit__starts_from_what_the_first_one_left(fit, tmp_path):
    module, checkpoint = Small(), DeltaCheckpoint(tmp_path, save_top_k=-1)
    fit(module, BlockSelect([1]), checkpoint)
    between = copied(module)
    fit(module, BlockSelect([3]), checkpoint, max_epochs=3)
    base = Small()
    base.load_state_dict(between)
    assert equal(merge_delta(base, tmp_path / "epoch=2-step=6.safetensors"), module.state_dict())


# NaN


class Diverges(Small):
    """Its loss is NaN from the third batch on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 2 else 1)
        self.log("loss", loss)
        return loss


def test_nan_loss__stops_early_and_the_last_good_delta_stays(fit, tmp_path):
    module = Diverges()
    as_it_was = state(module)
    stopping = EarlyStopping("loss", check_finite=True, patience=100)
    checkpoint = DeltaCheckpoint(tmp_path, resumable=True, save_last=True)
    with pytest.warns(UserWarning, match="DeltaCheckpoint saves nothing at step 4") as warnings:
        trainer = fit(module, *levers(), stopping, checkpoint, max_epochs=5)
    assert trainer.global_step == 4
    assert "Monitored metric loss = nan is not finite" in stopping.stopping_reason_message
    assert next(str(w.message) for w in warnings if "DeltaCheckpoint" in str(w.message)) == (
        "DeltaCheckpoint saves nothing at step 4: 'model.blocks.1.norm1.weight' has NaN or infinite values. "
        "EarlyStopping(check_finite=True) on the training loss stops such a run, Trainer(detect_anomaly=True) finds "
        "the operation; go on from an earlier delta with a lower learning rate."
    )
    assert files(tmp_path) == ["epoch=0-step=2.ckpt", "epoch=0-step=2.safetensors", "last.ckpt", "last.safetensors"]
    assert read_delta(tmp_path / "last.safetensors").configuration["global_step"] == 2
    assert state(module) == as_it_was
    resumed = Small()
    stopping = EarlyStopping("loss", check_finite=True, patience=100)
    fit(resumed, *levers(), stopping, DeltaCheckpoint(tmp_path, save_last=True), ckpt_path=tmp_path / "last.ckpt")
    assert all(t.isfinite().all() for t in resumed.state_dict().values())


@pytest.mark.filterwarnings("ignore:Error detected in")  # torch's, with the traceback of the forward call
def test_nan_loss__detect_anomaly_names_the_operation(fit, tmp_path):
    module = Diverges()
    as_it_was = state(module)
    with pytest.raises(RuntimeError, match="returned nan values"):
        fit(module, *levers(), DeltaCheckpoint(tmp_path), detect_anomaly=True)
    assert files(tmp_path) == ["epoch=0-step=2.safetensors"]
    assert state(module) == as_it_was


# What is refused


def refused(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"save_on_exception": True},
            "DeltaCheckpoint was given save_on_exception=True, expected False: when training fails, other callbacks "
            "undo first what froze the base; save every few steps with every_n_train_steps instead.",
        ),
        (
            {"save_last": "link"},
            "DeltaCheckpoint was given save_last='link', expected True or False: a link cannot be replaced at once.",
        ),
        (
            {"save_weights_only": True, "resumable": True},
            "DeltaCheckpoint was given save_weights_only=True and resumable=True, expected one of them at most: delta "
            "files hold weights only, and training resumes from more.",
        ),
    ],
)
def test_constructor__refuses_what_does_not_go_with_a_delta(arguments, message):
    assert refused(lambda: DeltaCheckpoint(**arguments)) == message


def test_trainer__that_does_not_fit_is_refused(fit, make_trainer, tmp_path):
    module = Small()
    as_it_was = state(module)
    averaging = refused(lambda: fit(module, WeightAveraging(), DeltaCheckpoint(tmp_path)))
    assert averaging == (
        "WeightAveraging evaluates averaged weights, and DeltaCheckpoint would save those that train; leave one of the "
        "two callbacks out."
    )
    io = refused(lambda: fit(module, DeltaCheckpoint(tmp_path, resumable=True), plugins=[AsyncCheckpointIO()]))
    assert io == (
        "The Trainer writes checkpoints by AsyncCheckpointIO, expected TorchCheckpointIO, so that a resumable "
        "DeltaCheckpoint knows when a file is whole."
    )
    assert refused(lambda: fit(module, DeltaCheckpoint("memory://folder"))) == (
        "The folder of DeltaCheckpoint is 'memory://folder', expected a local one, where a file can be replaced at "
        "once."
    )
    checkpoint, trainer = DeltaCheckpoint(tmp_path), make_trainer(enable_checkpointing=True)
    trainer.strategy.__class__ = FSDPStrategy  # which would need devices
    assert refused(lambda: checkpoint._check(trainer)) == (
        "The strategy of the Trainer is FSDPStrategy, expected SingleDeviceStrategy or DDPStrategy: others may divide "
        "the weights that DeltaCheckpoint saves."
    )
    assert state(module) == as_it_was
