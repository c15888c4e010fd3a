"""EpochSampler alone, and inside real Lightning runs: interrupted, resumed, distributed."""

import os
import pickle
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data.distributed import DistributedSampler

from lightning_bsr import ConfigurationError
from lightning_bsr.data import DigitsDataModule, EpochSampler

# The tests pin the accelerator to the CPU also where there is a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")


def order(seed, epoch, length=50):
    sampler = EpochSampler(range(length), seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order__depends_on_seed_and_epoch_only():
    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(50))
    orders = [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_order__is_the_same_in_every_iteration_of_an_epoch():
    sampler = EpochSampler(range(20), 3)
    assert list(sampler) == list(sampler)
    assert len(sampler) == 20


def test_order__survives_pickling():
    sampler = EpochSampler(range(20), 3)
    sampler.set_epoch(4)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


def test_iteration__leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    order(0, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize("seed", [-1, 1.0, True, None])
def test_constructor__rejects_a_bad_seed(seed):
    with pytest.raises(ConfigurationError) as error:
        EpochSampler(range(3), seed)
    assert str(error.value) == f"seed is {seed!r}, expected a whole number, 0 or above."


def test_constructor__rejects_empty_data():
    with pytest.raises(ConfigurationError) as error:
        EpochSampler([])
    assert str(error.value) == "data_source is empty, expected at least one sample to shuffle."


class Recorder(pl.LightningModule):
    """Remembers the images that it saw, by epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {}
        self.samplers = set()

    def training_step(self, batch, _):
        self.samplers.add(type(self.trainer.train_dataloader.sampler))
        images, _ = batch
        self.seen.setdefault(self.current_epoch, []).extend(images.flatten(1).sum(1).tolist())
        return self.layer(images.mean().reshape(1, 1)).sum()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fit(make_trainer):
    def run(folder, *, epochs, resume_from=None, num_workers=0, at_epoch_end=True, **trainer_options):
        module = Recorder()
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
        trainer = make_trainer(checkpoints, enable_checkpointing=True, max_epochs=epochs, **trainer_options)
        data = DigitsDataModule(batch_size=300, img_size=8, num_workers=num_workers, augment=False)
        trainer.fit(module, data, ckpt_path=resume_from)
        return module

    return run


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # Python 3.12 and on
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the two runs keep their checkpoints apart
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_resumed_run__sees_the_order_of_an_uninterrupted_one(fit, tmp_path, num_workers, at_epoch_end):
    torch.manual_seed(0)
    options = {"epochs": 3, "num_workers": num_workers, "at_epoch_end": at_epoch_end}
    whole = fit(tmp_path / "whole", **options).seen
    torch.manual_seed(1)
    resumed = fit(tmp_path / "resumed", resume_from=str(tmp_path / "whole" / "epoch=0.ckpt"), **options).seen
    assert resumed == {1: whole[1], 2: whole[2]}
    assert whole[0] != whole[1] != whole[2]


# One process suffices: Lightning replaces the sampler whenever the strategy is a distributed one.
def test_distributed_run__has_the_sampler_replaced_and_still_reshuffles(fit, tmp_path):
    before = dict(os.environ)
    try:
        module = fit(tmp_path, epochs=2, strategy="ddp", devices=1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
    assert module.samplers == {DistributedSampler}
    assert sorted(module.seen[0]) == sorted(module.seen[1])
    assert module.seen[0] != module.seen[1]
