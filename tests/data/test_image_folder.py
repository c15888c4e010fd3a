"""ImageFolderDataModule on real files: splits, loaders, transforms, classes; from a Trainer and from YAML."""

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

from image_folders import module, ready, save_pictures, spoil
from lightning_bsr import ConfigurationError
from lightning_bsr.data import ImageFolderDataModule

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def files(data, part):
    dataset = data.datasets[part]
    return {dataset.dataset.samples[index][0] for index in dataset.indices}


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
