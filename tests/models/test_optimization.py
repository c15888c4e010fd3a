"""The classifier's optimizer and schedule: learning rates, decay, what is left out."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset

from lightning_bsr import ConfigurationError
from tiny_classifier import loader, tiny, trainer

# Most fits here look at training alone.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class LearningRates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def groups_by_name(model):
    optimizer = model.trainer.optimizers[0]
    names = {parameter: name for name, parameter in model.model.named_parameters()}
    return {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize(
    ("warmup", "warmup_steps"),
    [({}, 0), ({"warmup_steps": 3}, 3), ({"warmup_epochs": 1.5}, 6)],
    ids=["none", "steps", "epochs"],
)
def test_schedule__warms_up_then_follows_the_cosine(tmp_path, warmup, warmup_steps):
    rates = LearningRates()
    model = tiny(lr=0.01, **warmup)
    trainer(tmp_path, max_epochs=3, callbacks=[rates]).fit(model, loader())

    expected = [
        0.01 * (step + 1) / (warmup_steps + 1)
        if step < warmup_steps
        else 0.005 * (1 + math.cos(math.pi * (step - warmup_steps) / (12 - warmup_steps)))
        for step in range(12)
    ]
    assert [seen[0] for seen in rates.seen] == pytest.approx(expected)
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_schedule__counts_optimizer_steps_not_batches(tmp_path):
    rates = LearningRates()
    model = tiny(lr=0.01, warmup_epochs=1)
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[rates])
    run.fit(model, loader(size=20))  # 5 batches, so 3 optimizer steps an epoch, 3 of 6 to warm up

    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    factors = [1 / 4, 2 / 4, 3 / 4, 1, 0.75, 0.25]
    assert [seen[0] for seen in rates.seen] == pytest.approx([0.01 * factors[step] for step in steps])


def test_schedule__warmup_longer_than_the_run_still_runs(tmp_path):
    model = tiny(warmup_steps=500)
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(model, loader(), loader())
    assert run.global_step == 1


def test_schedule__resumes(tmp_path):
    model = tiny(lr=0.01, warmup_steps=2)
    straight = LearningRates()
    trainer(tmp_path, max_epochs=2, callbacks=[straight]).fit(model, loader())

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    first, second = LearningRates(), LearningRates()
    run = trainer(tmp_path, max_epochs=2, callbacks=[first, Stop()])
    run.fit(tiny(lr=0.01, warmup_steps=2), loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=2, callbacks=[second]).fit(
        tiny(lr=0.01, warmup_steps=2), loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert len(first.seen) == len(second.seen) == 4
    assert first.seen + second.seen == straight.seen


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_optimizer__spares_biases_norms_and_embeddings_the_decay(tmp_path, weight_decay):
    model = tiny(weight_decay=weight_decay)
    trainer(tmp_path, fast_dev_run=True).fit(model, loader())

    groups = groups_by_name(model)
    assert set(groups) == {name for name, _ in model.model.named_parameters()}
    for name, group in groups.items():
        spared = name in ("cls_token", "pos_embed") or name.endswith("bias") or "norm" in name
        assert group["weight_decay"] == (0.0 if spared else weight_decay), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_optimizer__leaves_frozen_parameters_out(tmp_path, weight_decay, layer_decay):
    model = tiny(weight_decay=weight_decay, layer_decay=layer_decay)
    model.model.requires_grad_(False)
    model.model.head.requires_grad_(True)
    model.model.blocks[1].attn.requires_grad_(True)
    before = copy.deepcopy(model.model.state_dict())
    trainer(tmp_path, max_epochs=1).fit(model, loader())

    trained = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert set(groups_by_name(model)) == trained
    changed = {name for name, value in model.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained


def test_optimizer__layer_decay_scales_the_rate_with_depth(tmp_path):
    rates = LearningRates()
    model = tiny(lr=0.01, layer_decay=0.5)
    trainer(tmp_path, max_epochs=1, callbacks=[rates]).fit(model, loader())

    expected = {"head": 0, "norm": 1, "blocks.2": 1, "blocks.1": 2, "blocks.0": 3, "patch_embed": 4}
    groups = groups_by_name(model)
    for name, group in groups.items():
        power = next((p for prefix, p in expected.items() if name.startswith(f"{prefix}.")), 4)
        assert group["initial_lr"] == pytest.approx(0.01 * 0.5**power), name
    assert rates.seen[0] == [group["initial_lr"] for group in model.trainer.optimizers[0].param_groups]
    for first, later in zip(rates.seen[0], rates.seen[2], strict=True):
        assert later == pytest.approx(first / 2)


def test_optimizer__arguments_arrive(tmp_path):
    model = tiny(betas=(0.8, 0.98), weight_decay=0.3)
    trainer(tmp_path, fast_dev_run=True).fit(model, loader())
    assert isinstance(model.trainer.optimizers[0], torch.optim.AdamW)
    assert {group["betas"] for group in model.trainer.optimizers[0].param_groups} == {(0.8, 0.98)}

    model = tiny(optimizer="sgd", momentum=0.7)
    trainer(tmp_path, fast_dev_run=True).fit(model, loader())
    assert isinstance(model.trainer.optimizers[0], torch.optim.SGD)
    assert {group["momentum"] for group in model.trainer.optimizers[0].param_groups} == {0.7}


def test_fit__all_frozen(tmp_path):
    model = tiny()
    model.model.requires_grad_(False)
    with pytest.raises(ConfigurationError) as error:
        trainer(tmp_path, max_epochs=1).fit(model, loader())
    assert str(error.value) == (
        "No parameter of the model requires gradients, expected at least one to train; unfreeze a part of it."
    )


def test_fit__endless(tmp_path):
    with pytest.raises(ConfigurationError) as error:
        trainer(tmp_path, max_epochs=-1).fit(tiny(), loader())
    assert str(error.value) == (
        "The Trainer has no last step, expected one for the cosine schedule to end at; give it max_epochs or max_steps."
    )


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(3, 32, 32), 0


def test_fit__data_without_length(tmp_path):
    data = DataLoader(Endless(), batch_size=2)
    run = trainer(tmp_path, max_steps=3)
    run.fit(tiny(warmup_steps=1), data)
    assert run.global_step == 3

    with pytest.raises(ConfigurationError) as error:
        trainer(tmp_path, max_steps=3).fit(tiny(warmup_epochs=0.5), data)
    assert str(error.value) == (
        "warmup_epochs is 0.5, but the training data have no length to count epochs by; give warmup_steps instead."
    )
