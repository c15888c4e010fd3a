"""What ImageFolderDataModule says of wrong arguments, folders and files."""

import os
from pathlib import Path

import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS

from data_modules import message
from image_folders import module, ready, save_pictures, spoil
from lightning_bsr.data import _pictures as pictures


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": -1}, "batch_size is -1, expected a whole number, 1 or above."),
        ({"img_size": 0}, "img_size is 0, expected a whole number, 1 or above."),
        ({"val_fraction": 1.5}, "val_fraction is 1.5, expected a number above 0 and below 1."),
        (
            {"scale": (0.5, 0.1)},
            "scale is (0.5, 0.1), expected two numbers above 0 and at most 1, the smaller one first.",
        ),
        (
            {"scale": (0.0, 1.0)},
            "scale is (0.0, 1.0), expected two numbers above 0 and at most 1, the smaller one first.",
        ),
    ],
)
def test_constructor__rejects_bad_values(tmp_path, options, expected):
    assert message(lambda: module(tmp_path, **options)) == expected


def test_missing_root__is_named_with_what_lies_beside(tmp_path):
    (tmp_path / "pets").mkdir()
    data = module(tmp_path / "pest")
    expected = (
        f"{tmp_path}/pest does not exist, expected a folder with train/<class>/<images> in it; {tmp_path} holds pets."
    )
    for call in (data.prepare_data, data.setup, lambda: data.num_classes):
        assert message(call) == expected


def test_root_that_is_a_file__is_named(tmp_path):
    (tmp_path / "pets.zip").touch()
    assert message(module(tmp_path / "pets.zip").prepare_data) == (
        f"{tmp_path}/pets.zip is not a folder, expected a folder with train/<class>/<images> in it; "
        f"{tmp_path} holds pets.zip."
    )


def test_missing_train_folder__tells_what_root_holds(tmp_path):
    for name in ("cat", "dog", "eel", "fox", "gnu", "hen", "ibex"):
        (tmp_path / name).mkdir()
    assert message(module(tmp_path).prepare_data) == (
        f"{tmp_path}/train does not exist, expected the training images in one folder per class; "
        f"{tmp_path} holds cat, dog, eel, fox, gnu and 2 more."
    )


def test_empty_root__says_so(tmp_path):
    assert message(module(tmp_path).prepare_data) == (
        f"{tmp_path}/train does not exist, expected the training images in one folder per class; "
        f"{tmp_path} holds nothing."
    )


def test_train_without_class_folders__says_what_is_expected(tmp_path):
    save_pictures(tmp_path / "train", 2)
    assert message(module(tmp_path).prepare_data) == (
        f"{tmp_path}/train holds no class folders, expected one folder of images per class, "
        f"such as {tmp_path}/train/cat."
    )


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_empty_class_folders__are_named_with_the_extensions(root, part):
    for name in ("cat", "dog"):
        save_pictures(root / part / name, 1, first=20)
    for name in ("eel", "fox"):
        (root / part / name).mkdir()
    (root / part / "fox" / "fox.heic").touch()
    assert message(module(root).prepare_data) == (
        f"{root}/{part} has no image for 2 of its 4 classes: eel, fox; "
        f"expected files that end in {', '.join(IMG_EXTENSIONS)}."
    )


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize(
    ("classes", "difference"),
    [
        (["cat"], "missing are dog"),
        (["cat", "dog", "eel"], "unknown are eel"),
        (["cat", "dogs"], "missing are dog; unknown are dogs"),
    ],
)
def test_other_classes__are_named(root, part, classes, difference):
    for name in classes:
        save_pictures(root / part / name, 1)
    expected = f"The class folders in {root}/{part} differ from those in {root}/train: {difference}."
    assert message(module(root).setup) == expected


def test_class_with_one_image__cannot_be_split(root):
    save_pictures(root / "train" / "eel", 1)
    assert message(module(root).prepare_data) == (
        f"{root}/train has a single image for eel, expected at least 2 a class, one to train and one to "
        f"validate; or add {root}/val."
    )
    for name in ("cat", "dog", "eel"):
        save_pictures(root / "val" / name, 1)
    assert len(ready(root).datasets["train"]) == 17


def test_missing_test_folder__is_named_when_it_is_asked_for(root):
    data = ready(root)
    assert message(data.test_dataloader) == (
        f"{root}/test does not exist, expected the test images in one folder per class; {root} holds train."
    )


@pytest.mark.parametrize("folder", ["train", "train/dog"])
def test_unreadable_folder__is_named(root, monkeypatch, folder):
    # Permissions do not stop the super user, whom tests in a container often run as.
    scandir = os.scandir

    def guarded(path="."):
        if Path(path) == root / folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(pictures.os, "scandir", guarded)
    assert message(module(root).prepare_data) == (
        f"{root}/{folder} cannot be read (Permission denied), expected a folder that this user may list."
    )


def test_corrupt_and_truncated_files__are_named_and_counted(root):
    spoil(root)
    data = module(root)
    expected = (
        f"3 of the 17 image files under {root} cannot be decoded: train/cat/0.png, train/cat/1.png, "
        "train/dog/50.jpeg; repair or remove them."
    )
    assert message(data.prepare_data) == expected
    assert message(data.prepare_data) == expected


def test_many_corrupt_files__name_the_first_few(root):
    for number in range(8):
        (root / "train" / "cat" / f"{number}.png").write_bytes(b"not a picture")
    assert message(module(root).prepare_data) == (
        f"8 of the 16 image files under {root} cannot be decoded: train/cat/0.png, train/cat/1.png, "
        "train/cat/2.png, train/cat/3.png, train/cat/4.png and 3 more; repair or remove them."
    )


def test_check_files__can_be_turned_off(root):
    spoil(root)
    assert len(ready(root, check_files=False, val_fraction=0.3).datasets["train"]) == 12


def test_check_files__decodes_once(root, monkeypatch):
    decoded = []
    load_rgb = pictures.load_rgb
    monkeypatch.setattr(pictures, "load_rgb", lambda path: decoded.append(path) or load_rgb(path))
    data = ready(root)
    data.prepare_data()
    data.setup("test")
    assert len(decoded) == 16
