"""One run, in this process."""

import math

import pytest
import torch

from lightning_bsr.comparison._configuration import base_configuration, configuration_of
from lightning_bsr.comparison._runs import _merged, metric_names, plan_once, run_once, test_once
from lightning_bsr.comparison._timing import median_of, time_steps

test_once.__test__ = False  # pytest takes it for a test by its name

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
)


@pytest.fixture
def make(configuration, make_settings):
    def make(method, **trainer):
        settings = make_settings(methods=(method,))
        base, _ = base_configuration(configuration, settings)
        base["trainer"] |= trainer
        return configuration_of(base, settings, method, 1e-2, 0, trainer.get("max_epochs", 1))

    return make


@pytest.mark.parametrize("method", ["full", "lora", "bsr"])
def test_run__tested_later_is_the_same_as_tested_at_once(method, build, make, tmp_path):
    weights = tmp_path / "weights" / "a.ckpt"
    at_once = run_once(build, make(method), None)
    later = run_once(build, make(method), weights)
    assert "test" not in later
    assert later["validation"] == at_once["validation"]
    # At once, the adapters of LoRA are merged into the weights they are beside, which rounds.
    rounding = 1e-6 if method == "lora" else 0.0
    assert test_once(build, make(method), weights)["test"] == pytest.approx(at_once["test"], rel=rounding, abs=0)


def test_run__says_what_it_trained_and_kept(build, make):
    result = run_once(build, make("head", max_epochs=2), None)
    assert result["trained_parameters"] == 1_290
    assert result["parameters"] == 809_354
    assert result["epochs_run"] == 2
    assert result["batch_size"] == 8
    planned = plan_once(build, make("head"))
    assert planned["activations_per_image"] == result["activations"] / 8
    assert planned["flops_per_image"] > 1e8 / 3
    assert planned["peak"] > 809_354 * 4
    assert {"val/loss", "val/accuracy"} <= {*result["validation"]}
    assert {"test/loss", "test/accuracy"} <= {*result["test"]}


def test_metric_names__of_both_splits(build, make):
    names = metric_names(build, make("full"))
    assert names == {"validation": ["val/accuracy", "val/loss"], "test": ["test/accuracy", "test/loss"]}


def test_merged__joins_loaders_and_has_no_infinite_numbers():
    found = _merged([{"a": 1.0, "b": math.nan}, {"c": torch.tensor(2.0)}])
    assert found == {"a": 1.0, "b": None, "c": 2.0}


@pytest.mark.parametrize(("accumulate", "steps_per_epoch"), [(1, 3), (3, 1)])
def test_time_steps__of_the_optimizer_over_several_epochs(accumulate, steps_per_epoch, build, make):
    timed = time_steps(build, make("head", accumulate_grad_batches=accumulate), 4)
    assert len(timed["seconds"]) == 4
    assert min(timed["seconds"]) > 0
    assert timed["steps_per_epoch"] == steps_per_epoch
    assert median_of([timed, timed, timed])["steps_timed"] == 12


def test_time_steps__early_stopping_does_not_miss_the_validation(build, make):
    configuration = make("head")
    configuration["trainer"]["callbacks"].append(
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    )
    assert len(time_steps(build, configuration, 3)["seconds"]) == 3
