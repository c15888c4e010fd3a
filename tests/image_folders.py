"""Folders of small pictures, and the ImageFolderDataModule on them."""

import functools

import numpy as np
from PIL import Image

import data_modules
from lightning_bsr.data import ImageFolderDataModule


def save_pictures(folder, count, *, suffix=".png", size=(12, 10), mode="RGB", first=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    for number in range(first, first + count):
        pixels = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        pixels.convert(mode).save(folder / f"{number}{suffix}")


def spoil(root):
    """Write a file of noise, cut a JPEG short, and empty a PNG."""
    save_pictures(root / "train" / "dog", 1, suffix=".jpeg", size=(200, 200), first=50)
    photo = root / "train" / "dog" / "50.jpeg"
    photo.write_bytes(photo.read_bytes()[:2000])
    (root / "train" / "cat" / "0.png").write_bytes(b"not a picture")
    (root / "train" / "cat" / "1.png").write_bytes(b"")


module = functools.partial(data_modules.module, ImageFolderDataModule)
ready = functools.partial(data_modules.ready, ImageFolderDataModule)
