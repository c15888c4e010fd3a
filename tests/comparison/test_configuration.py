"""What a run keeps of the user's configuration, and what decides its result."""

import copy

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bsr import ConfigurationError, TokenDrop
from lightning_bsr.comparison._configuration import base_configuration, configuration_of, fingerprint, length_of


class MyDrop(TokenDrop):
    """A user's variant of one of this package's callbacks."""


def test_base__keeps_callbacks_that_change_no_comparison(configuration, make_settings):
    configuration["trainer"]["callbacks"].append({"class_path": f"{__name__}.MyDrop", "init_args": {"blocks": [3]}})
    before = copy.deepcopy(configuration)
    base, left_out = base_configuration(configuration, make_settings())
    assert configuration == before
    assert left_out == ["BlockSelect", ModelCheckpoint.__name__, "MyDrop"]
    assert [callback["class_path"].split(".")[-1] for callback in base["trainer"]["callbacks"]] == [
        "LearningRateMonitor"
    ]


@pytest.mark.parametrize("callbacks", [None, [], {"class_path": "lightning_bsr.ActivationMemoryMonitor"}])
def test_base__all_forms_of_callbacks(callbacks, configuration, make_settings):
    configuration["trainer"]["callbacks"] = callbacks
    assert base_configuration(configuration, make_settings())[0]["trainer"]["callbacks"] == []


def test_run__has_its_method_rate_seed_and_epochs(configuration, make_settings):
    settings = make_settings(methods=("bsr",), method_options={"bsr": {"blocks": [5]}}, vit="model")
    base, _ = base_configuration(configuration, settings)
    run = configuration_of(base, settings, "bsr", 0.5, 7, 3)
    assert (run["model"]["init_args"]["lr"], run["seed_everything"], run["trainer"]["max_epochs"]) == (0.5, 7, 3)
    assert run["trainer"]["callbacks"][-1] == {
        "class_path": "lightning_bsr.methods.FineTune",
        "init_args": {"method": "bsr", "options": {"blocks": [5]}, "vit": "model"},
    }
    assert len(base["trainer"]["callbacks"]) == 1


def test_run__counts_in_steps_where_the_configuration_does(configuration, make_settings):
    configuration["trainer"] |= {"max_epochs": None, "max_steps": 9}
    settings = make_settings()
    base, _ = base_configuration(configuration, settings)
    assert length_of(base["trainer"]) == (9, "steps")
    trainer = configuration_of(base, settings, "head", 0.5, 7, 3)["trainer"]
    assert (trainer["max_epochs"], trainer["max_steps"]) == (None, 3)
    longer = {**base, "trainer": {**base["trainer"], "max_steps": 8}}
    assert fingerprint(longer, settings) == fingerprint(base, settings)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"max_epochs": None},
            "trainer.max_epochs is None, expected 1 or more, or trainer.max_steps instead: all methods train that "
            "long.",
        ),
        (
            {"max_epochs": -1},
            "trainer.max_epochs is -1, expected 1 or more, or trainer.max_steps instead: all methods train that long.",
        ),
        (
            {"max_steps": 9},
            "trainer.max_epochs is 2 and trainer.max_steps is 9, expected one of them: all methods train that long.",
        ),
        (
            {"max_epochs": None, "max_steps": 0},
            "trainer.max_steps is 0, expected 1 or more: all methods train that long.",
        ),
        (
            {"fast_dev_run": True},
            "trainer.fast_dev_run is set, expected false; for a short comparison set trainer.limit_train_batches.",
        ),
        (
            {"devices": 2},
            "trainer.devices is 2 and trainer.num_nodes is 1, expected one device: compare gives each run a process of "
            "its own.",
        ),
    ],
)
def test_base__refuses_what_cannot_be_compared(trainer, message, configuration, make_settings):
    configuration["trainer"] |= trainer
    with pytest.raises(ConfigurationError) as stop:
        base_configuration(configuration, make_settings())
    assert str(stop.value) == message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.init_args.lr", "the configuration has model.init_args.lr"),
        ("model.init_args.rate", "no key of it is called rate"),
    ],
)
def test_lr_key__must_be_a_key(key, hint, configuration, make_settings):
    with pytest.raises(ConfigurationError) as stop:
        base_configuration(configuration, make_settings(lr_key=key))
    assert str(stop.value) == f"lr_key is {key!r}, expected a key of the configuration; {hint}."


@pytest.mark.parametrize(
    ("path", "value", "matters"),
    [
        (("model", "init_args", "lr"), 0.7, False),
        (("seed_everything",), 5, False),
        (("trainer", "max_epochs"), 9, False),
        (("model", "init_args", "weight_decay"), 0.0, True),
        (("data", "init_args", "batch_size"), 16, True),
        (("trainer", "limit_train_batches"), 4, True),
    ],
)
def test_fingerprint__of_the_rest_only(path, value, matters, configuration, make_settings):
    settings = make_settings()
    before = fingerprint(base_configuration(configuration, settings)[0], settings)
    inner = configuration
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert (fingerprint(base_configuration(configuration, settings)[0], settings) != before) is matters
