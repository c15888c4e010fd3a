"""ImageFolderDataModule on real files: splits, transforms, and what can be wrong with pictures."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_bsr import ConfigurationError
from lightning_bsr.data import ImageFolderDataModule
from lightning_bsr.data import _pictures as pictures

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"

# The tests pin the accelerator to the CPU also where there is a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")


def save_pictures(folder, count, *, suffix=".png", size=(12, 10), mode="RGB", first=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    for number in range(first, first + count):
        pixels = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        pixels.convert(mode).save(folder / f"{number}{suffix}")


@pytest.fixture
def root(tmp_path):
    """Ten pictures of cats, six of dogs, to train with."""
    save_pictures(tmp_path / "train" / "cat", 10)
    save_pictures(tmp_path / "train" / "dog", 6, suffix=".jpg")
    return tmp_path


def module(root, **options):
    return ImageFolderDataModule(root, **{"img_size": 8, "batch_size": 4, "num_workers": 0, **options})


def ready(root, **options):
    data = module(root, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def files(data, part):
    dataset = data.datasets[part]
    return {dataset.dataset.samples[index][0] for index in dataset.indices}


def message(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)


# Splits and loaders


def test_val_split__is_disjoint_complete_and_stratified(root):
    data = ready(root, val_fraction=0.3)
    train, val = files(data, "train"), files(data, "val")
    assert not train & val
    assert len(train | val) == 16
    assert sorted(Path(path).parent.name for path in val) == ["cat"] * 3 + ["dog"] * 2


def test_val_split__same_seed_same_files_other_seed_other_files(root):
    first, again, other = (ready(root, val_fraction=0.3, seed=seed) for seed in (1, 1, 2))
    assert files(first, "val") == files(again, "val")
    assert files(first, "val") != files(other, "val")


def test_val_split__leaves_the_global_generators_alone(root):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    ready(root, seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_val_folder__is_used_whole_and_training_keeps_all_files(root):
    save_pictures(root / "val" / "cat", 1)
    save_pictures(root / "val" / "dog", 2)
    data = ready(root)
    assert len(files(data, "train")) == 16
    assert {Path(path).parents[1].name for path in files(data, "val")} == {"val"}
    assert len(files(data, "val")) == 3


def test_predict__takes_the_test_folder_if_there_else_val(root):
    without = ready(root)
    assert files(without, "predict") == files(without, "val")
    save_pictures(root / "test" / "cat", 1)
    save_pictures(root / "test" / "dog", 1)
    assert files(ready(root), "predict") == {
        str(root / "test" / "cat" / "0.png"),
        str(root / "test" / "dog" / "0.png"),
    }


def test_loaders__give_rgb_batches(root):
    save_pictures(root / "test" / "cat", 2)
    save_pictures(root / "test" / "dog", 2)
    data = ready(root, val_fraction=0.3)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert type(images) is torch.Tensor
        assert images.shape == (4, 3, 8, 8)
        assert images.dtype == torch.float32
        assert labels.shape == (4,)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # Python 3.12 and on
def test_loaders__work_in_other_processes(root):
    loader = ready(root, num_workers=1).train_dataloader()
    assert loader.persistent_workers
    assert sum(len(labels) for _, labels in loader) == 14
    assert sum(len(labels) for _, labels in loader) == 14


@pytest.mark.parametrize(("cpus", "workers"), [(4, 3), (100, 8)])
def test_workers__default_to_what_lightning_suggests(root, monkeypatch, cpus, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)), raising=False)
    assert ready(root, num_workers=None).val_dataloader().num_workers == workers


def test_datasets__survive_pickling(root):
    data = ready(root)
    train, val = (pickle.loads(pickle.dumps(data.datasets[part])) for part in ("train", "val"))
    assert train[0][0].shape == (3, 8, 8)
    assert torch.equal(val[0][0], data.datasets["val"][0][0])


# Transforms


def test_val_images__are_resized_and_normalised_without_chance(root):
    data = ready(root, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    image, _ = data.datasets["val"][0]
    (path, *_) = sorted(files(data, "val"))
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR))
    expected = (torch.tensor(pixels / 255.0) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(image, expected.permute(2, 0, 1).float())
    assert torch.equal(image, data.datasets["val"][0][0])


def test_train_images__are_cropped_at_random(root):
    dataset = ready(root).datasets["train"]
    assert not torch.equal(dataset[0][0], dataset[0][0])


def test_hflip__mirrors_half_of_the_time_or_never(tmp_path):
    for name in ("cat", "dog"):
        save_pictures(tmp_path / "train" / name, 2, size=(8, 8))
    flipped, upright = (
        {tuple(dataset[0][0].flatten().tolist()) for _ in range(20)}
        for dataset in (ready(tmp_path, hflip=hflip, scale=(1.0, 1.0)).datasets["train"] for hflip in (True, False))
    )
    assert len(flipped) == 2
    assert len(upright) == 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".png"), ("P", ".png"), ("RGBA", ".png"), ("1", ".png"), ("CMYK", ".jpg"), ("L", ".jpg")],
)
def test_other_colour_modes__become_rgb(root, mode, suffix):
    save_pictures(root / "test" / "cat", 1, mode=mode, suffix=suffix)
    save_pictures(root / "test" / "dog", 1)
    with Image.open(root / "test" / "cat" / f"0{suffix}") as saved:
        assert saved.mode == mode
    images, _ = next(iter(ready(root).test_dataloader()))
    assert images.shape == (2, 3, 8, 8)


def test_palette_with_transparency__is_read_without_a_warning(root):
    save_pictures(root / "test" / "dog", 1)
    (root / "test" / "cat").mkdir()
    picture = Image.new("P", (4, 4))
    picture.save(root / "test" / "cat" / "0.png", transparency=bytes(range(4)))
    assert len(ready(root).datasets["test"]) == 2


# Classes


def test_classes__are_known_right_after_construction(root):
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data = module(root)
    assert data.class_names == ["cat", "dog"]
    assert data.num_classes == 2
    data.prepare_data()
    data.setup("fit")
    assert {int(label) for _, labels in data.train_dataloader() for label in labels} == {0, 1}


# What can be wrong


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


def spoil(root):
    """Write a file of noise, cut a JPEG short, and empty a PNG."""
    save_pictures(root / "train" / "dog", 1, suffix=".jpeg", size=(200, 200), first=50)
    photo = root / "train" / "dog" / "50.jpeg"
    photo.write_bytes(photo.read_bytes()[:2000])
    (root / "train" / "cat" / "0.png").write_bytes(b"not a picture")
    (root / "train" / "cat" / "1.png").write_bytes(b"")


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


class MeanColour(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].mean((2, 3))), batch[1])

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def predict_step(self, batch, _):
        return self.layer(batch[0].mean((2, 3))).argmax(1)


def test_trainer__fits_and_predicts(root, make_trainer):
    trainer = make_trainer(limit_val_batches=0)
    data, model = module(root, val_fraction=0.3), MeanColour()
    trainer.fit(model, data)
    assert trainer.global_step == 3
    assert sum(map(len, trainer.predict(model, data))) == 5


def test_trainer__stops_before_training_when_a_file_is_corrupt(root, make_trainer):
    spoil(root)
    trainer = make_trainer()
    with pytest.raises(ConfigurationError, match="3 of the 17 image files"):
        trainer.fit(MeanColour(), module(root))
    assert trainer.global_step == 0


def test_cli__builds_the_module_from_yaml_and_writes_it_back(root, tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    options = {"root": str(root), "mean": [0.1, 0.2, 0.3], "scale": [0.5, 1.0], "hflip": False}
    config.write_text(yaml.safe_dump({"data": options}))
    # Lightning 2.6 calls a method that newer jsonargparse has renamed.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["command", "--config", str(config)])
    cli = LightningCLI(
        MeanColour,
        ImageFolderDataModule,
        run=False,
        seed_everything_default=False,
        trainer_defaults={"logger": False, "accelerator": "cpu"},
    )
    assert cli.datamodule.mean == (0.1, 0.2, 0.3)
    assert cli.datamodule.scale == (0.5, 1.0)
    assert cli.datamodule.class_names == ["cat", "dog"]
    written = yaml.safe_load(cli.parser.dump(cli.config))
    assert {name: written["data"][name] for name in options} == options


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"{CIFAR10} does not exist")
def test_cifar10__loads():
    data = ready(CIFAR10, img_size=32, scale=(0.5, 1.0), batch_size=50)
    assert data.num_classes == 10
    assert data.class_names[:2] == ["airplane", "automobile"]
    assert {part: len(dataset) for part, dataset in data.datasets.items()} == {
        "train": 4500,
        "val": 500,
        "test": 1000,
        "predict": 1000,
    }
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (50, 3, 32, 32)
    assert 0.1 < images.std() < 2
    assert labels.unique().numel() > 5
