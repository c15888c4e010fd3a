"""Fixtures for the comparison: a small configuration, and a pool that runs its jobs in this process."""

import functools

import pytest

from lightning_bsr.cli import BSRCLI
from lightning_bsr.comparison import Settings
from lightning_bsr.comparison._pool import Failure


@pytest.fixture
def build():
    return functools.partial(BSRCLI, run=False)


@pytest.fixture
def configuration():
    """A ``fit`` configuration as it is dumped: four blocks of the micro ViT see 8 digits three times."""
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 3,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "callbacks": [
                {"class_path": "lightning_bsr.BlockSelect", "init_args": {"blocks": [3]}},
                {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
            ],
        },
        "model": {
            "class_path": "lightning_bsr.ViTClassifier",
            "init_args": {"pretrained": False, "model_kwargs": {"depth": 4}, "lr": 1e-3, "weight_decay": 0.05},
        },
        "data": {"class_path": "lightning_bsr.DigitsDataModule", "init_args": {"batch_size": 8}},
    }


@pytest.fixture
def make_settings(tmp_path):
    def make(**given):
        defaults = {"methods": ("full", "head"), "lrs": (1e-3, 1e-2), "seeds": (0, 1), "timing_steps": 1}
        return Settings(**{**defaults, "output": tmp_path / "compared", **given})

    return make


class InProcess:
    """A pool whose jobs run here, when they are waited for."""

    def __init__(self, log):
        self.jobs = {}
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    @property
    def running(self):
        return list(self.jobs)

    def start(self, name, share, function, *args):
        self.jobs[name] = (function, args)

    def wait(self):
        name = next(iter(self.jobs))
        function, args = self.jobs.pop(name)
        self.calls.append(function.__name__)
        try:
            return name, function(*args)
        except Exception as error:
            return name, Failure.of(error)

    def call(self, function, *args):
        self.start("call", 1, function, *args)
        return self.wait()[1]


@pytest.fixture
def pools(monkeypatch):
    """The pools that ``compare`` has made, all of them in this process."""
    made = []

    def make(log):
        made.append(InProcess(log))
        return made[-1]

    monkeypatch.setattr("lightning_bsr.comparison._compare.Pool", make)
    return made
