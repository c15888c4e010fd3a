"""Small files in the formats of the published data sets, and what the DataModules read of them."""

import hashlib
import json
import pickle

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as tv

from lightning_bsr import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    Flowers102DataModule,
    Food101DataModule,
    OxfordIIITPetDataModule,
)

ALL = (CIFAR10DataModule, CIFAR100DataModule, OxfordIIITPetDataModule, Flowers102DataModule, Food101DataModule)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def noise(seed, height=10, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_jpeg(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path)


def write_cifar(root, cls, classes, monkeypatch):
    """Eight pictures a class to train with, two to test, in batches as published, and their checksums."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    key = cls.meta["key"].replace("label_names", "labels")
    key = "labels" if key == "labels" else "fine_labels"

    def write(name, labels, first):
        rows = np.stack([noise(first + i, 32, 32).transpose(2, 0, 1).reshape(-1) for i in range(len(labels))])
        (folder / name).write_bytes(pickle.dumps({"data": rows, key: labels}))
        return [name, md5(folder / name)]

    names = [name for name, _ in cls.train_list]
    labels = [label for label in range(classes) for _ in range(8)]
    share = len(labels) // len(names)
    monkeypatch.setattr(
        cls,
        "train_list",
        [write(name, labels[i * share : (i + 1) * share], i * share) for i, name in enumerate(names)],
    )
    monkeypatch.setattr(cls, "test_list", [write(cls.test_list[0][0], [*range(classes)] * 2, 5000)])
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: [f"name {i}" for i in range(classes)]}))
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})
    return folder


def write_pets(root):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    breeds = ("Abyssinian", "american_bulldog")
    for part, numbers in (("trainval", range(5)), ("test", range(5, 7))):
        lines = []
        for label, breed in enumerate(breeds, 1):
            for number in numbers:
                save_jpeg(folder / "images" / f"{breed}_{number}.jpg", 10 * label + number)
                lines.append(f"{breed}_{number} {label} {label} 1\n")
        (folder / "annotations" / f"{part}.txt").write_text("".join(lines))
    return folder


def write_flowers(root, monkeypatch):
    folder = root / "flowers-102"
    labels = [1, 2, 1, 2, 1, 2, 2, 1]
    for number in range(1, 9):
        save_jpeg(folder / "jpg" / f"image_{number:05}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels])})
    savemat(folder / "setid.mat", {"trnid": [[1, 4]], "valid": [[3, 2]], "tstid": [[5, 6, 7, 8]]})
    files = {**tv.Flowers102._file_dict}
    for key in ("label", "setid"):
        files[key] = (files[key][0], md5(folder / files[key][0]))
    monkeypatch.setattr(tv.Flowers102, "_file_dict", files)
    return folder


def write_food(root):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for part, numbers in (("train", range(5)), ("test", range(5, 7))):
        names = {dish: [f"{dish}/{number}" for number in numbers] for dish in ("baklava", "apple_pie")}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(names))
        for label, dish in enumerate(names):
            for number in numbers:
                save_jpeg(folder / "images" / dish / f"{number}.jpg", 10 * label + number)
    return folder


def labels_of(data, part):
    dataset = data.datasets[part]
    return [dataset.dataset.targets[index] for index in dataset.indices]
