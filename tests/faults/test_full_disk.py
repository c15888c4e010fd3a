"""A disk that is full while a checkpoint is written."""

import contextlib
import errno
import os
import resource

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from lightning_bsr import BlockSelect, DeltaCheckpoint, TokenDrop
from lightning_bsr.functional import _delta_file as delta_file
from lightning_bsr.functional import read_delta
from plain_modules import PlainModule, RandomImages, state

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@contextlib.contextmanager
def files_of_at_most(size):
    """Let the system refuse to write more than ``size`` bytes to any one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_space():
    """Let the system say that nothing is left when what was written is to reach the disk."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_file.os, "fsync", full)
        yield


class FillsUp(Checkpoint):
    """The disk is full after the first epoch; such callbacks come last, after those that save."""

    def __init__(self, full, stack):
        self.full, self.stack = full, stack

    def on_train_epoch_end(self, trainer, *_):
        if trainer.current_epoch == 0:
            self.stack.enter_context(self.full)


def callbacks(folder):
    return [BlockSelect([1]), TokenDrop([1], 0.5), DeltaCheckpoint(folder, "last", resumable=True)]


def fit(make_trainer, module, *callbacks, **kwargs):
    trainer = make_trainer(*callbacks, max_epochs=2, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(module, RandomImages(batches=2, batch_size=2), weights_only=True, **kwargs)


@pytest.mark.parametrize(
    ("full", "file", "reason"),
    [
        (lambda: files_of_at_most(20_000), "last.safetensors", "os error 27"),
        (lambda: files_of_at_most(160_000), "last.ckpt", os.strerror(errno.EFBIG)),
        (no_space, "last.safetensors", os.strerror(errno.ENOSPC)),
    ],
    ids=["delta", "state", "no_space"],
)
def test_full_disk__keeps_the_old_checkpoint_and_says_what_to_do(full, file, reason, make_trainer, tmp_path):
    class Overwrites(DeltaCheckpoint):
        """Each checkpoint has the name of the one before."""

        def _get_metric_interpolated_filepath_name(self, *_):
            return str(tmp_path / "last.ckpt")

    module = PlainModule(depth=3, embed_dim=48)
    before = state(module)
    levers = callbacks(tmp_path)[:2]
    checkpoint = Overwrites(tmp_path, "last", resumable=True)
    with contextlib.ExitStack() as stack, pytest.raises(OSError, match="could not be written") as error:
        fit(make_trainer, module, *levers, checkpoint, FillsUp(full(), stack))
    message = str(error.value)
    assert message.startswith(f"'{tmp_path}/{file}' could not be written (")
    assert reason in message
    assert message.endswith(
        "); the file of that name that was there before is untouched. Free space or choose another folder, then resume "
        "from the last checkpoint."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.safetensors"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert read_delta(tmp_path / "last.safetensors").configuration["global_step"] == (4 if file == "last.ckpt" else 2)
    assert state(module) == before

    whole, resumed = (PlainModule(depth=3, embed_dim=48) for _ in range(2))
    fit(make_trainer, whole, *callbacks(tmp_path / "whole"))
    fit(make_trainer, resumed, *levers, Overwrites(tmp_path, resumable=True), ckpt_path=tmp_path / "last.ckpt")
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_first_checkpoint__leaves_nothing_behind(make_trainer, tmp_path):
    module = PlainModule(depth=3, embed_dim=48)
    before = state(module)
    with files_of_at_most(20_000), pytest.raises(OSError, match=r"; nothing was left there\. Free space or choose"):
        fit(make_trainer, module, *callbacks(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
    assert state(module) == before
