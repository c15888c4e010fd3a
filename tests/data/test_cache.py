"""The cache of decoded pictures: the same pictures, decoded once, in a bound."""

import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bsr import ConfigurationError
from lightning_bsr.data import ImageFolderDataModule
from lightning_bsr.data import _pictures as pictures

BYTES = 12 * 10 * 3  # of a picture


@pytest.fixture
def root(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """How often each file was decoded in this process."""
    counts = Counter()
    load_rgb = pictures.load_rgb

    def count(path):
        counts[path] += 1
        return load_rgb(path)

    monkeypatch.setattr(pictures, "load_rgb", count)
    return counts


def module(root, **options):
    data = ImageFolderDataModule(root, **{"img_size": 8, "batch_size": 4, "num_workers": 0, **options})
    data.check_files = False
    return data


def epochs(data, count=2):
    torch.manual_seed(0)
    loader = data.train_dataloader()
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += [images for images, _ in loader]
    return torch.cat(batches)


def test_cache__gives_the_same_pictures_and_decodes_each_once(root, decoded):
    expected = epochs(module(root))
    decoded.clear()
    data = module(root, cache="1MiB")
    assert torch.equal(epochs(data), expected)
    assert len(decoded) == 6  # two are for validation
    assert {*decoded.values()} == {1}
    [*data.val_dataloader(), *data.val_dataloader()]
    assert len(decoded) == 8
    assert {*decoded.values()} == {1}


def test_cache__keeps_what_fits(root, decoded):
    expected = epochs(module(root))
    decoded.clear()
    data = module(root, cache=3 * BYTES + 1)
    assert torch.equal(epochs(data), expected)
    cache = data.datasets["train"].dataset.cache
    assert cache.nbytes == 3 * BYTES
    kept = [path for path, _ in data.datasets["train"].dataset.samples[:3]]
    assert {decoded[path] for path in kept if path in decoded} == {1}
    assert {count for path, count in decoded.items() if path not in kept} == {2}


def test_cache__is_shared_by_loading_processes(root, decoded):
    data = module(root, cache="1MiB", num_workers=2)
    expected = epochs(module(root), 1)
    assert epochs(data, 1).shape == expected.shape
    dataset = data.datasets["train"].dataset
    decoded.clear()
    for index in data.datasets["train"].indices:  # the workers have filled what this process reads
        path, label = dataset.samples[index]
        assert dataset[index][0].tobytes() == Image.open(path).tobytes()
        assert dataset[index][1] == label
    assert not decoded


def test_cache__larger_than_shared_memory_is_refused(root, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024))
    monkeypatch.setattr("lightning_bsr.data._cache._SHARED", root)
    with pytest.raises(ConfigurationError) as stop:
        module(root, cache="1MiB", num_workers=2).setup()
    assert str(stop.value) == (
        f"The cache takes 2.8 KiB, but {root} has 1.0 KiB left for what loading processes share; give a smaller cache "
        "or num_workers=0, or enlarge it (docker run --shm-size)."
    )
    module(root, cache="1MiB").setup()


def test_cache__is_a_size(root):
    with pytest.raises(ConfigurationError) as stop:
        module(root, cache="much")
    assert str(stop.value) == (
        "cache is 'much', expected a number of bytes above 0, or a number and a unit such as '512MiB' or '1.5GB'."
    )


def test_cache__an_unreadable_file_is_named_when_it_is_met(root):
    (root / "train" / "cat" / "0.png").write_bytes(b"no picture")
    data = module(root, cache="1MiB", val_fraction=0.1)
    data.setup()
    with pytest.raises(OSError, match=r"cat/0\.png cannot be decoded \(UnidentifiedImageError: .*\); repair or remove"):
        [*data.train_dataloader(), *data.val_dataloader()]
