"""Runs with and without PrefixCache, for comparing them."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_bsr import BlockSelect, ConfigurationError, TokenDrop
from lightning_bsr.functional._prefix import PrefixForward
from plain_modules import PlainModule, RandomImages


class Losses(Callback):
    """Notes the loss of each batch, what the cache did by the end, and what was attached."""

    def __init__(self):
        self.losses, self.counts, self.wrapped = [], None, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() if outputs else None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        blocks = pl_module.model.blocks
        self.wrapped = [i for i, block in enumerate(blocks) if isinstance(vars(block).get("forward"), PrefixForward)]

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(trainer.callback_metrics["val_loss"].item())

    def on_train_end(self, trainer, pl_module):
        if isinstance(forward := vars(pl_module.model.blocks[0]).get("forward"), PrefixForward):
            self.counts = forward.prefix.counts


class Shuffled(RandomImages):
    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)


def bsr():
    return [BlockSelect([3, 5]), TokenDrop([1, 2, 4], 0.5)]


def fit(make_trainer, data, *callbacks, module_class=PlainModule, max_epochs=3, module=None, **kwargs):
    torch.manual_seed(5)
    module, losses = module or module_class(), Losses()
    make_trainer(*callbacks, losses, max_epochs=max_epochs, **kwargs).fit(module, data)
    return module, losses


def assert_same_run(ours, theirs):
    assert ours[1].losses == theirs[1].losses
    for (name, a), b in zip(ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def raised(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)
