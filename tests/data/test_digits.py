"""DigitsDataModule: shapes, splits, augmentation, arguments and the command line."""

import pickle
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits

from lightning_bsr import ConfigurationError
from lightning_bsr.data import DigitsDataModule
from lightning_bsr.data._base import split_by_class

# The tests pin the accelerator to the CPU also where there is a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")


def ready(**options):
    data = DigitsDataModule(**options)
    data.setup()
    return data


def indices(data, part):
    return data.datasets[part].indices


def class_counts(positions):
    return np.bincount(load_digits().target[positions], minlength=10)


def test_loaders__give_normalised_rgb_batches():
    data = ready(batch_size=16, img_size=24)
    loaders = [
        data.train_dataloader(),
        data.val_dataloader(),
        data.test_dataloader(),
        data.predict_dataloader(),
    ]
    for loader in loaders:
        images, labels = next(iter(loader))
        assert images.shape == (16, 3, 24, 24)
        assert images.dtype == torch.float32
        assert labels.shape == (16,)
        assert labels.dtype == torch.int64


def test_images__are_the_scans_normalised_by_mean_and_std():
    data = ready(img_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    image, label = data.datasets["test"][0]
    original = indices(data, "test")[0]
    scan = torch.from_numpy(load_digits().images[original]).float() / 16
    expected = torch.stack([(scan - 0.1) / 0.5, (scan - 0.2) / 1.0, (scan - 0.3) / 2.0])
    torch.testing.assert_close(image, expected)
    assert label == load_digits().target[original]


def test_splits__are_disjoint_complete_and_stratified():
    data = ready()
    train, val, test = (indices(data, part) for part in ("train", "val", "test"))
    assert sorted([*train, *val, *test]) == list(range(1797))
    assert (len(train), len(val), len(test)) == (1200, 237, 360)
    shares = class_counts(range(1797)) / 1797
    for part in (train, val, test):
        assert np.all(np.abs(class_counts(part) - shares * len(part)) < 1)


def test_splits__same_seed_same_images_other_seed_other_images():
    first, again, other = ready(seed=3), ready(seed=3), ready(seed=4)
    assert indices(first, "val") == indices(again, "val")
    assert indices(first, "train") == indices(again, "train")
    assert indices(first, "val") != indices(other, "val")
    assert indices(first, "test") == indices(other, "test")


def test_test_split__never_changes_between_releases():
    assert indices(ready(), "test")[:8] == [1496, 188, 705, 820, 413, 744, 1466, 500]


def test_setup__leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    ready(seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_setup__twice_keeps_the_datasets():
    data = ready()
    datasets = dict(data.datasets)
    data.setup("test")
    assert data.datasets == datasets


def test_augment__moves_training_images_only():
    torch.manual_seed(0)
    augmented, plain = ready(), ready(augment=False)
    assert not torch.equal(augmented.datasets["train"][0][0], augmented.datasets["train"][0][0])
    assert torch.equal(plain.datasets["train"][0][0], plain.datasets["train"][0][0])
    assert torch.equal(augmented.datasets["val"][0][0], plain.datasets["val"][0][0])


def test_classes__are_known_before_setup():
    data = DigitsDataModule()
    assert data.num_classes == 10
    assert data.class_names == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


def test_datasets__survive_pickling():
    data = ready()
    train, val = (pickle.loads(pickle.dumps(data.datasets[part])) for part in ("train", "val"))
    assert train[0][0].shape == (3, 32, 32)
    assert torch.equal(val[5][0], data.datasets["val"][5][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected a whole number, 1 or above."),
        ({"batch_size": 2.5}, "batch_size is 2.5, expected a whole number, 1 or above."),
        ({"img_size": -8}, "img_size is -8, expected a whole number, 1 or above."),
        ({"seed": -1}, "seed is -1, expected a whole number, 0 or above."),
        ({"num_workers": -1}, "num_workers is -1, expected a whole number, 0 or above."),
        ({"val_fraction": 0}, "val_fraction is 0, expected a number above 0 and below 1."),
        ({"val_fraction": 1.0}, "val_fraction is 1.0, expected a number above 0 and below 1."),
        ({"val_fraction": "0.1"}, "val_fraction is '0.1', expected a number above 0 and below 1."),
        ({"mean": (0.5, 0.5)}, "mean is (0.5, 0.5), expected three numbers, one per colour channel."),
        ({"std": (1, 1, 0)}, "std is (1, 1, 0), expected three numbers above 0, one per colour channel."),
    ],
)
def test_constructor__rejects_bad_values(options, message):
    with pytest.raises(ConfigurationError) as error:
        DigitsDataModule(**options)
    assert str(error.value) == message


def test_split_by_class__keeps_one_of_a_rare_class_in_each_part():
    targets = [0] * 20 + [1] * 2
    first, second = split_by_class(targets, 0.1, seed=0)
    assert [targets[position] for position in second].count(0) == 2
    assert [targets[position] for position in second].count(1) == 1
    assert [targets[position] for position in first].count(1) == 1
    first, second = split_by_class(targets, 0.99, seed=0)
    assert {targets[position] for position in first} == {0, 1}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 10)

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        self.log("accuracy", (self.layer(images.flatten(1)).argmax(1) == labels).float().mean())

    def test_step(self, batch, index):
        self.validation_step(batch, index)

    def predict_step(self, batch, _):
        return self.layer(batch[0].flatten(1)).argmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_trainer__learns_tests_and_predicts(make_trainer):
    trainer = make_trainer(max_epochs=3)
    module, data = Classifier(), DigitsDataModule(img_size=8, augment=False)
    trainer.fit(module, data)
    assert trainer.callback_metrics["accuracy"] > 0.85
    (results,) = trainer.test(module, data, verbose=False)
    assert results["accuracy"] > 0.85
    assert sum(map(len, trainer.predict(module, data))) == 360


def test_cli__builds_the_module_from_yaml_and_writes_it_back(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"batch_size": 8, "mean": [0.1, 0.2, 0.3], "augment": False}}))
    monkeypatch.setattr("sys.argv", ["command", "--config", str(config)])
    cli = LightningCLI(
        Classifier,
        DigitsDataModule,
        run=False,
        seed_everything_default=False,
        trainer_defaults={"logger": False, "accelerator": "cpu"},
    )
    assert cli.datamodule.mean == (0.1, 0.2, 0.3)
    assert not cli.datamodule.augment
    written = yaml.safe_load(cli.parser.dump(cli.config))
    assert written["data"]["mean"] == [0.1, 0.2, 0.3]
    assert written["data"]["batch_size"] == 8
