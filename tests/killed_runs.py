"""A run with checkpoints that may be killed at any moment, each in a process of its own.

The processes come from multiprocessing's fork server, which imports this once and starts no threads: forking the
process of the tests, which has threads, may never end.
"""

import os
import signal
import sys
import warnings

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_bsr import BlockSelect, DeltaCheckpoint, TokenDrop
from plain_modules import PlainModule, RandomImages

EPOCHS = 30
BATCHES = 2  # an epoch


class Small(PlainModule):
    def __init__(self):
        super().__init__(depth=3, embed_dim=48)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Reports(Checkpoint):
    """Tells the parent of each batch, and of each epoch once its checkpoints are written: these callbacks come last."""

    def __init__(self, connection):
        self.connection = connection

    def on_train_batch_start(self, trainer, *_):
        self.connection.send("batch")

    def on_train_epoch_end(self, trainer, *_):
        self.connection.send(f"saved {trainer.global_step}")


def run(folder, connection, ckpt_path, file_event):
    """Train and write checkpoints to ``folder``; kill this process at a file event there if one is given."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if file_event is not None:
        _kill_at_file_event(folder, file_event)
    trainer = Trainer(
        callbacks=[
            BlockSelect([1]),
            TokenDrop([1], 0.5),
            ModelCheckpoint(folder / "whole", "{step}"),
            DeltaCheckpoint(folder / "delta", "{step}", resumable=True, save_last=True),
            Reports(connection),
        ],
        max_epochs=EPOCHS,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Small(), RandomImages(batches=BATCHES, batch_size=2), ckpt_path=ckpt_path, weights_only=True)


def _kill_at_file_event(folder, number):
    """Kill this process just before it opens, renames or removes a file of ``folder`` for the ``number``th time."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.chmod", "shutil.move") and any(
            str(argument).startswith(str(folder)) for argument in arguments
        ):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
