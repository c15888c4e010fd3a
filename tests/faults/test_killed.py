"""A run that is killed again and again, at any moment, ends with the weights of one that never was."""

import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_bsr import BlockSelect, DeltaCheckpoint, TokenDrop
from lightning_bsr.functional import merge_delta, read_delta
from plain_modules import PlainModule, RandomImages

KILLS = 24
EPOCHS = 30
BATCHES = 2  # an epoch


class Small(PlainModule):
    def __init__(self):
        super().__init__(depth=3, embed_dim=48)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Reports(Checkpoint):
    """Tells the parent of each batch, and of each epoch once its checkpoints are written: these callbacks come last."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_batch_start(self, trainer, *_):
        os.write(self.pipe, b"batch\n")

    def on_train_epoch_end(self, trainer, *_):
        os.write(self.pipe, b"saved %d\n" % trainer.global_step)


def train(make_trainer, folder=None, *, reports=None, ckpt_path=None):
    module = Small()
    callbacks = [BlockSelect([1]), TokenDrop([1], 0.5)]
    if folder is not None:
        callbacks += [
            ModelCheckpoint(folder / "whole", "{step}"),
            DeltaCheckpoint(folder / "delta", "{step}", resumable=True, save_last=True),
            Reports(reports),
        ]
    trainer = make_trainer(*callbacks, max_epochs=EPOCHS, limit_val_batches=0, enable_checkpointing=folder is not None)
    trainer.fit(module, RandomImages(batches=BATCHES, batch_size=2), ckpt_path=ckpt_path, weights_only=True)
    return module


def kill_at_file_event(folder, number):
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


def fork(run):
    """Run in a child, which has everything imported already; give its process number and what it reports."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            warnings.simplefilter("ignore")
            run(writing)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    return child, os.fdopen(reading, "rb", buffering=0)


def checkpoints(folder):
    """Read all that is called a checkpoint or a delta: each must be whole. Newest first."""
    found = []
    for path in folder.rglob("*.ckpt"):
        found.append((torch.load(path, weights_only=True)["global_step"], path))
        if path.parent.name == "delta":
            assert path.with_suffix(".safetensors").exists()
    for path in folder.rglob("*.safetensors"):
        read_delta(path)
    return sorted(found, reverse=True)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a busy machine has much to do for each of the processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads for a GPU do not survive a fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # Python 3.12 and on
def test_killed_at_random_moments__ends_as_if_it_never_was(make_trainer, tmp_path):
    chance = random.Random(0)
    moments = [(("file", "wall")[number % 2], chance.randint(1, 30), chance.random()) for number in range(KILLS)]
    killed, while_saving, resumed_from, found = 0, 0, [], []
    for kind, number, share in [*moments, ("never", 0, 0.0)]:
        newest = [path for step, path in found if step == found[0][0]]
        ckpt_path = chance.choice(sorted(newest)) if newest else None
        resumed_from.append(ckpt_path.parent.name if ckpt_path else "nothing")

        def run(pipe, kind=kind, number=number, ckpt_path=ckpt_path):
            if kind == "file":
                kill_at_file_event(tmp_path, number)
            train(make_trainer, tmp_path, reports=pipe, ckpt_path=ckpt_path)

        child, reports = fork(run)
        lines = []
        if kind == "wall":
            while len(lines) < number % 4 + 1 and (line := reports.readline()):
                lines.append(line)
            time.sleep(0.03 * share)
            os.kill(child, signal.SIGKILL)
        lines += reports.readlines()
        reports.close()
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        while_saving += any(tmp_path.rglob("*.partial"))
        # Nothing is lost but what came after the last checkpoint.
        saved = [int(line.split()[1]) for line in lines if line.startswith(b"saved")]
        before, found = found, checkpoints(tmp_path)
        assert not saved or found[0][0] >= saved[-1]
        assert not before or found[0][0] >= before[0][0]

    assert killed >= 20
    assert while_saving >= 1
    assert {"nothing", "whole", "delta"} == set(resumed_from)
    expected = train(make_trainer).state_dict()
    step = found[0][0]
    assert step == EPOCHS * BATCHES
    whole = torch.load(Path(tmp_path, "whole", f"step={step}.ckpt"), weights_only=True)["state_dict"]
    merged = merge_delta(Small(), tmp_path / "delta" / f"step={step}.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor), name
        assert torch.equal(merged[name], tensor), name
