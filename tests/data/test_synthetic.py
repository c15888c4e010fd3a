"""Made-up pictures that stand in for the published ones."""

import numpy as np
import pytest

from data_modules import ready
from lightning_bsr import CIFAR10DataModule, FineTune, ViTClassifier
from lightning_bsr.data._synthetic import SyntheticPictures
from published_files import ALL, labels_of

pytestmark = pytest.mark.usefixtures("offline")


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
