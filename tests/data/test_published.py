"""The published data sets, read by torchvision from small files in their own formats; none is downloaded."""

import functools
import hashlib
import json
import pickle
import tarfile
import threading
import urllib.error
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as tv
from torchvision.transforms import v2

from lightning_bsr import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    ConfigurationError,
    FineTune,
    Flowers102DataModule,
    Food101DataModule,
    OxfordIIITPetDataModule,
    ViTClassifier,
)
from lightning_bsr.data._synthetic import SyntheticPictures

ALL = (CIFAR10DataModule, CIFAR100DataModule, OxfordIIITPetDataModule, Flowers102DataModule, Food101DataModule)

# The tests pin the accelerator to the CPU also where there is a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches a network, also where there is one."""

    def urlopen(request, *args, **kwargs):
        if request.host.startswith("127.0.0.1"):
            return real(request, *args, **kwargs)
        raise urllib.error.URLError("no network here")

    real = urllib.request.urlopen
    monkeypatch.setattr("urllib.request.urlopen", urlopen)


@pytest.fixture
def serve(tmp_path):
    """Serve the files of a folder on this machine; gives its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


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


def module(cls, root, **options):
    return cls(root, **{"img_size": 8, "batch_size": 4, "num_workers": 0, **options})


def ready(cls, root, **options):
    data = module(cls, root, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def message(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)


def labels_of(data, part):
    dataset = data.datasets[part]
    return [dataset.dataset.targets[index] for index in dataset.indices]


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


# Downloads and damage


def test_download__unpacks_and_checks_by_torchvision(serve, tmp_path, monkeypatch):
    made = write_cifar(tmp_path / "made", tv.CIFAR10, 10, monkeypatch)
    folder, address = serve
    archive = folder / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made, made.name)
    monkeypatch.setattr(tv.CIFAR10, "url", f"{address}/cifar.tar.gz")
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", md5(archive))
    data = ready(CIFAR10DataModule, tmp_path / "root")
    assert labels_of(data, "test") == [*range(10)] * 2

    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", "0" * 32)
    assert message(lambda: ready(CIFAR10DataModule, tmp_path / "other")).startswith(
        f"CIFAR-10 in {tmp_path / 'other' / 'cifar-10-batches-py'} is not there and could not be downloaded from "
        "www.cs.toronto.edu (File not found or corrupted). Expected are "
    )


def test_download__fails_in_a_sentence_that_says_what_to_do(tmp_path):
    assert message(lambda: ready(OxfordIIITPetDataModule, tmp_path)) == (
        f"Oxford-IIIT Pet in {tmp_path / 'oxford-iiit-pet'} is not there and could not be downloaded from "
        "www.robots.ox.ac.uk (<urlopen error no network here>). Expected are its folders images and annotations, "
        "unpacked from https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz, "
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz; or your own copy as "
        f"{tmp_path}/train/<class>/<images> and {tmp_path}/test/<class>/<images>; or synthetic=True for a dry run on "
        "made-up pictures."
    )


@pytest.mark.parametrize("cls", ALL)
def test_download__not_without_leave_nor_in_setup(cls, tmp_path):
    data = module(cls, tmp_path, download=False)
    for said in (message(data.prepare_data), message(module(cls, tmp_path).setup)):
        assert said.startswith(f"{data.source.name} in {tmp_path / data.source.folder} is not there (Dataset not found")
        assert "downloaded from" not in said
    assert data.num_classes == data.source.num_classes
    assert not [*tmp_path.iterdir()]


def test_sources__are_those_that_torchvision_downloads():
    assert CIFAR10DataModule.source.urls == (tv.CIFAR10.url,)
    assert CIFAR100DataModule.source.urls == (tv.CIFAR100.url,)
    assert OxfordIIITPetDataModule.source.urls == tuple(url for url, _ in tv.OxfordIIITPet._RESOURCES)
    prefix, files = tv.Flowers102._download_url_prefix, tv.Flowers102._file_dict
    assert Flowers102DataModule.source.urls == tuple(prefix + name for name, _ in files.values())
    assert Food101DataModule.source.urls == (tv.Food101._URL,)


def test_damage__of_a_checked_file(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, tv.CIFAR10, 10, monkeypatch)
    (folder / "data_batch_3").write_bytes(b"half")
    assert message(lambda: ready(CIFAR10DataModule, tmp_path)).startswith(
        f"CIFAR-10 in {folder} is incomplete or damaged and could not be downloaded from www.cs.toronto.edu (<urlopen "
        "error no network here>). Expected are its files data_batch_1 to data_batch_5, test_batch and batches.meta, "
    )


def test_damage__of_lists(tmp_path):
    folder = write_food(tmp_path)
    (folder / "meta" / "train.json").write_text('{"apple_pie": [')
    assert message(lambda: ready(Food101DataModule, tmp_path, download=False)).startswith(
        f"Food-101 in {folder} is incomplete or damaged (Expecting value: line 1 column 16 (char 15)). Expected are "
    )
    folder = write_pets(tmp_path)
    (folder / "annotations" / "test.txt").unlink()
    assert message(lambda: ready(OxfordIIITPetDataModule, tmp_path, download=False)).startswith(
        f"Oxford-IIIT Pet in {folder} is incomplete or damaged ([Errno 2] No such file or directory: "
    )


def test_damage__missing_pictures_are_counted_and_named(tmp_path):
    folder = write_food(tmp_path)
    for number in (1, 3):
        (folder / "images" / "baklava" / f"{number}.jpg").unlink()
    assert message(lambda: ready(Food101DataModule, tmp_path)) == (
        f"2 of the 10 pictures of Food-101 (train) are missing in {tmp_path}: food-101/images/baklava/1.jpg, "
        f"food-101/images/baklava/3.jpg; remove {folder} to have it downloaded again."
    )


def test_damage__a_corrupt_picture_is_named_before_training_or_when_it_is_met(tmp_path):
    path = write_pets(tmp_path) / "images" / "Abyssinian_5.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert message(lambda: ready(OxfordIIITPetDataModule, tmp_path, check_files=True)) == (
        f"1 of the 14 image files under {tmp_path} cannot be decoded: oxford-iiit-pet/images/Abyssinian_5.jpg; repair "
        "or remove them."
    )
    data = ready(OxfordIIITPetDataModule, tmp_path)
    with pytest.raises(OSError, match=r" cannot be decoded \(") as stop:
        [*data.test_dataloader()]
    assert str(stop.value).startswith(f"The image file {path} cannot be decoded (")
    assert str(stop.value).endswith("); repair or remove it.")


# What stands in


@pytest.mark.parametrize("cls", ALL)
def test_synthetic__has_the_classes_and_sizes_and_reads_nothing(cls, tmp_path):
    data = ready(cls, tmp_path / "nowhere", synthetic=True)
    assert {*labels_of(data, "train")} == {*labels_of(data, "val")} == {*labels_of(data, "test")}
    assert {*labels_of(data, "test")} == {*range(data.num_classes)}
    assert len(data.class_names) == data.num_classes
    assert data.datasets["train"].dataset[0][0].size == data.source.picture_size
    assert next(iter(data.test_dataloader()))[0].shape == (4, 3, 8, 8)


def test_synthetic__always_the_same_and_no_two_alike():
    train, again, test = (SyntheticPictures(3, 4, (24, 16), part) for part in (0, 0, 1))
    pictures = [part[i][0].tobytes() for part in (train, test) for i in range(12)]
    assert pictures[:12] == [again[i][0].tobytes() for i in range(12)]
    assert len({*pictures}) == 24


def test_synthetic__other_pictures_of_a_class_are_recognised():
    train, test = (SyntheticPictures(102, 2, (12, 12), part) for part in (0, 1))
    features = [
        np.stack([np.asarray(part[i][0], dtype=float).reshape(-1, 3).mean(0) for i in range(len(part))])
        for part in (train, test)
    ]
    centres = features[0].reshape(2, 102, 3).mean(0)
    nearest = ((features[1][:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == np.array(test.targets)).mean() > 0.4  # by mean colour alone; chance is 0.01


def test_synthetic__a_vit_learns_it(make_trainer):
    data = CIFAR10DataModule(batch_size=30, img_size=32, scale=(0.5, 1.0), num_workers=0, synthetic=True)
    trainer = make_trainer(FineTune("head"), max_epochs=2)
    trainer.fit(ViTClassifier(num_classes=10, lr=2e-2), data)
    assert trainer.callback_metrics["val/accuracy"] >= 0.5
