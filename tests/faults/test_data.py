"""Data that fail while training: a worker that dies, pictures that cannot be decoded."""

import os
import signal

import pytest
import torch
from PIL import Image

from lightning_bsr import BlockSelect, ImageFolderDataModule, TokenDrop
from lightning_bsr.data import _pictures as pictures
from plain_modules import PlainModule, state

# Python 3.12 and on
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


@pytest.fixture
def root(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.jpg")
    return tmp_path


def data(root, **options):
    return ImageFolderDataModule(root, img_size=32, batch_size=2, **options)


def fails(make_trainer, data, error):
    """Fit until it fails; the module is then as it was, and trains with other data."""
    module = PlainModule(depth=3, embed_dim=48)
    before = state(module)
    callbacks = [BlockSelect([1]), TokenDrop([1], 0.5)]
    options = {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    with pytest.raises(error) as raised:
        make_trainer(*callbacks, **options).fit(module, data)
    assert state(module) == before
    return str(raised.value)


def test_killed_worker__ends_the_run_and_the_module_is_as_it_was(root, make_trainer, monkeypatch):
    main, load_rgb = os.getpid(), pictures.load_rgb

    def load(path):
        if os.getpid() != main:  # at once: a worker that dies while it hands over a batch ends in other errors of torch
            os.kill(os.getpid(), signal.SIGKILL)
        return load_rgb(path)

    monkeypatch.setattr(pictures, "load_rgb", load)
    message = fails(make_trainer, data(root, num_workers=1, val_fraction=0.01), RuntimeError)
    assert message.startswith("DataLoader worker (pid")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("keep", "reason"), [(20, "UnidentifiedImageError"), (300, "OSError: ")], ids=["unreadable", "truncated"]
)
def test_corrupt_picture__is_named_in_the_middle_of_training(keep, reason, num_workers, root, make_trainer):
    for number in range(6):
        path = root / "train" / "dog" / f"{number}.jpg"
        path.write_bytes(path.read_bytes()[:keep])
    message = fails(make_trainer, data(root, num_workers=num_workers, check_files=False), OSError)
    assert f"The image file {root}/train/dog/" in message
    assert f" cannot be decoded ({reason}" in message
    assert message.rstrip().endswith("; repair or remove it.")


def test_picture_removed_while_training__is_named(root, make_trainer):
    module = data(root, num_workers=0)
    module.prepare_data()
    for number in range(6):
        (root / "train" / "dog" / f"{number}.jpg").unlink()
    message = fails(make_trainer, module, OSError)
    assert message.startswith(f"The image file {root}/train/dog/")
    assert "No such file or directory" in message
