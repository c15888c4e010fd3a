"""The published data sets, read by torchvision from small files in their own formats; none is downloaded."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import datasets as tv
from torchvision.transforms import v2

from data_modules import message, ready
from lightning_bsr import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    Flowers102DataModule,
    Food101DataModule,
    OxfordIIITPetDataModule,
)
from published_files import labels_of, noise, save_jpeg, write_cifar, write_flowers, write_food, write_pets

pytestmark = pytest.mark.usefixtures("offline")


def files_of(data, part):
    dataset = data.datasets[part]
    return [Path(dataset.dataset.samples[index][0]).name for index in dataset.indices]


# The real readers


@pytest.mark.parametrize(("cls", "reader", "classes"), [
    (CIFAR10DataModule, tv.CIFAR10, 10),
    (CIFAR100DataModule, tv.CIFAR100, 100),
])  # fmt: skip
def test_cifar__splits_by_class_and_keeps_its_test_part(cls, reader, classes, tmp_path, monkeypatch):
    write_cifar(tmp_path, reader, classes, monkeypatch)
    data = ready(cls, tmp_path, img_size=32, val_fraction=0.25)
    assert labels_of(data, "val") == [label for label in range(classes) for _ in range(2)]
    assert labels_of(data, "train") == [label for label in range(classes) for _ in range(6)]
    assert not {*data.datasets["train"].indices} & {*data.datasets["val"].indices}
    assert (data.num_classes, data.class_names[-1]) == (classes, f"name {classes - 1}")
    images, labels = next(iter(data.test_dataloader()))
    assert labels.tolist() == [0, 1, 2, 3]
    pixels = torch.from_numpy(noise(5000, 32, 32)).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[0], (pixels - 0.5) / 0.5)


def test_pets__trainval_is_split_and_test_is_apart(tmp_path):
    write_pets(tmp_path)
    data = ready(OxfordIIITPetDataModule, tmp_path, val_fraction=0.2)
    assert labels_of(data, "val") == [0, 1]
    assert labels_of(data, "train") == [0] * 4 + [1] * 4
    assert files_of(data, "test") == [
        f"{breed}_{i}.jpg" for breed in ("Abyssinian", "american_bulldog") for i in (5, 6)
    ]
    assert data.class_names == ["Abyssinian", "American Bulldog"]
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 8, 8)


def test_flowers__has_its_own_validation_part(tmp_path, monkeypatch):
    write_flowers(tmp_path, monkeypatch)
    data = ready(Flowers102DataModule, tmp_path)
    names = {part: files_of(data, part) for part in ("train", "val", "test")}
    assert names == {
        "train": ["image_00001.jpg", "image_00004.jpg"],
        "val": ["image_00003.jpg", "image_00002.jpg"],
        "test": [f"image_0000{i}.jpg" for i in (5, 6, 7, 8)],
    }
    assert [labels_of(data, part) for part in names] == [[0, 1], [0, 1], [0, 1, 1, 0]]
    assert (len(data.class_names), data.class_names[0]) == (102, "1")


def test_food__labels_are_sorted_by_name(tmp_path):
    write_food(tmp_path)
    data = ready(Food101DataModule, tmp_path, val_fraction=0.2)
    assert data.class_names == ["apple_pie", "baklava"]
    assert sorted(labels_of(data, "val")) == [0, 1]
    assert sorted(labels_of(data, "test")) == [0, 0, 1, 1]


def test_transforms__are_the_recipe_s(tmp_path):
    write_pets(tmp_path)
    data = ready(OxfordIIITPetDataModule, tmp_path)
    crop, *rest = data.datasets["train"].transform.transforms
    assert isinstance(crop, v2.RandomResizedCrop)
    assert crop.scale == (0.05, 1.0)
    assert not any(isinstance(step, v2.RandomHorizontalFlip) for step in rest)
    image, _ = data.datasets["test"].dataset[0]
    resized = v2.functional.to_dtype(
        v2.functional.to_image(image.resize((8, 8), Image.Resampling.BILINEAR)), scale=True
    )
    torch.testing.assert_close(data.datasets["test"][0][0], (resized - 0.5) / 0.5, atol=0.01, rtol=0)


# One folder per class


def test_class_folders__are_used_where_they_are(tmp_path):
    for part, count in (("train", 3), ("test", 1)):
        for label in range(10):
            for number in range(count):
                save_jpeg(tmp_path / part / f"class{label}" / f"{number}.jpg", label)
    data = ready(CIFAR10DataModule, tmp_path)
    assert data.class_names == [f"class{label}" for label in range(10)]
    assert labels_of(data, "test") == [*range(10)]
    assert message(lambda: ready(CIFAR100DataModule, tmp_path)) == (
        f"{tmp_path / 'train'} has 10 class folders, but CIFAR-100 has 100 classes; ImageFolderDataModule takes any "
        "number."
    )


def test_class_folders__without_a_test_part_say_so_when_it_is_asked_for(tmp_path):
    for label in range(10):
        for number in range(2):
            save_jpeg(tmp_path / "train" / f"class{label}" / f"{number}.jpg", label)
    data = ready(CIFAR10DataModule, tmp_path)
    assert message(data.test_dataloader) == (
        f"{tmp_path / 'test'} does not exist, expected the test images in one folder per class; {tmp_path} holds train."
    )
