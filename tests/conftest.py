"""Fixtures for all tests."""

import logging
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_bsr.memory import ActivationRecorder
from plain_modules import RandomImages

# Tiny models gain nothing from a second thread, and lose much when something else wants the core; nor do those in
# processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# lightning 2.6 calls what jsonargparse 4.49 deprecates, with a warning that is too long for a filter.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def infos():
    """The messages that Lightning logs; it may or may not hand them on to the root logger, where caplog listens."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def recorder_listens() -> bool:
    """Whether some recorder's hooks still see what autograd saves."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationRecorder, "count", lambda self, tensor: seen.append(tensor))
        torch.ones(1, requires_grad=True).exp()
    return bool(seen)


@pytest.fixture(autouse=True)
def _no_hooks_left():
    yield
    assert not recorder_listens()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test's own folder, as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def short_frontier(monkeypatch):
    """A budget's choice with two points of its frontier, not fourteen, each of which takes a plan of the whole step.

    The choice is made before the frontier and does not depend on it.
    """
    monkeypatch.setattr("lightning_bsr.memory._budget._FRONTIER_SHARES", (0.35,))


@pytest.fixture
def images() -> RandomImages:
    return RandomImages()


@pytest.fixture
def make_trainer(tmp_path):
    """Make a quiet CPU Trainer that writes below the test's own folder."""

    def make(*callbacks, **kwargs) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})

    return make
