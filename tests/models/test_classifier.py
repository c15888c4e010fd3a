"""The classifier: what it trains, logs and predicts, its head, and what it refuses."""

import copy
import importlib.util
import pickle
import re

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_bsr import ConfigurationError
from lightning_bsr.models import ViTClassifier
from tiny_classifier import loader, tiny, trainer, write_lightning

# Most fits here look at training alone.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

BUNDLED = 'the bundled model_name="vit_micro_patch4_32.cifar100"'


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fit__learns_and_logs(tmp_path, optimizer):
    torch.manual_seed(0)
    model = tiny(optimizer=optimizer, lr=3e-3 if optimizer == "adamw" else 3e-2, label_smoothing=0.1)
    run = trainer(tmp_path, max_epochs=12)
    run.fit(model, loader(), loader())

    assert set(run.callback_metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert run.callback_metrics["val/accuracy"] > 0.9
    assert "val/accuracy" in run.progress_bar_metrics
    (tested,) = run.test(model, loader(), verbose=False)
    assert tested == pytest.approx(
        {
            "test/loss": run.callback_metrics["test/loss"].item(),
            "test/accuracy": run.callback_metrics["test/accuracy"].item(),
        }
    )
    assert tested["test/accuracy"] > 0.9


def test_validate__loss_and_accuracy_are_means_over_all_images(tmp_path):
    model = tiny(label_smoothing=0.3)
    data = loader(size=10)  # the last batch is smaller than the others
    images, targets = data.dataset.tensors

    (logged,) = trainer(tmp_path).validate(model, data, verbose=False)

    model.eval()
    with torch.inference_mode():
        logits = model(images)
    assert logged == pytest.approx(
        {
            "val/loss": torch.nn.functional.cross_entropy(logits, targets).item(),
            "val/accuracy": (logits.argmax(1) == targets).float().mean().item(),
        },
        abs=1e-5,
    )


def test_training_step__smooths_the_labels(tmp_path):
    model = tiny(label_smoothing=0.3)
    losses = []
    model.log = lambda name, value, **_: losses.append((name, value))
    images, targets = next(iter(loader()))

    loss = model.training_step((images, targets), 0)

    expected = torch.nn.functional.cross_entropy(model(images), targets, label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)
    assert losses[0] == ("train/loss", loss)


@pytest.mark.parametrize("with_targets", [True, False])
def test_predict__gives_probabilities(tmp_path, with_targets):
    model = tiny()
    data = loader()
    images = data.dataset.tensors[0]
    if not with_targets:
        data = DataLoader(images, batch_size=4)

    probabilities = torch.cat(trainer(tmp_path).predict(model, data))

    assert probabilities.shape == (16, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(16))
    with torch.inference_mode():
        torch.testing.assert_close(probabilities, model.eval()(images).softmax(-1))


def test_classifier__pickles_and_deepcopies():
    model = tiny()
    images = torch.randn(2, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(images), model(images))


# --- what cannot be built ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0, expected 2 or more."),
        ({"num_classes": 1}, "num_classes is 1, expected 2 or more."),
        ({"optimizer": "lion"}, "optimizer is 'lion', expected 'adamw' or 'sgd'."),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0."),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more."),
        ({"momentum": 1.0}, "momentum is 1.0, expected at least 0 and below 1."),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0), expected two numbers, each at least 0 and below 1."),
        ({"betas": (0.9,)}, "betas is (0.9,), expected two numbers, each at least 0 and below 1."),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, expected a number above 0 and at most 1, or None."),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected 0 or more."),
        ({"warmup_epochs": -0.5}, "warmup_epochs is -0.5, expected 0 or more."),
        (
            {"warmup_steps": 5, "warmup_epochs": 0.5},
            "warmup_steps is 5 and warmup_epochs is 0.5, expected only one of them.",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected at least 0 and below 1."),
        (
            {"model_kwargs": {"num_classes": 5}},
            "model_kwargs has num_classes, expected only further arguments of the timm model; those are "
            "arguments of ViTClassifier itself.",
        ),
        (
            {"model_kwargs": {"dept": 5}},
            "model_kwargs is {'dept': 5}, which does not fit vit_micro_patch4_32: "
            "VisionTransformer.__init__() got an unexpected keyword argument 'dept'.",
        ),
        (
            {"model_kwargs": {"num_heads": 3}},
            "model_kwargs is {'num_heads': 3}, which does not fit vit_micro_patch4_32: dim should be "
            "divisible by num_heads.",
        ),
        (
            {"model_name": "qqqqqqqqqqqqqqq"},
            "model_name is 'qqqqqqqqqqqqqqq', expected the name of a timm model; timm.list_models() has them all.",
        ),
        (
            {"model_name": "vit_micro_patch4_32.in1k"},
            "model_name is 'vit_micro_patch4_32.in1k', but vit_micro_patch4_32 has no weights with the tag "
            "'in1k'; available are vit_micro_patch4_32.cifar100.",
        ),
        (
            {"model_name": "vit_base_patch16_18x2_224", "model_kwargs": {}, "pretrained": True},
            "pretrained is True, but no weights are published for vit_base_patch16_18x2_224; give "
            "checkpoint_path=..., pretrained=False, or one of the names in timm.list_pretrained().",
        ),
    ],
)
def test_classifier__refuses(arguments, message):
    with pytest.raises(ConfigurationError) as error:
        tiny(**arguments)
    assert str(error.value) == message


def test_model_name__misspelt():
    with pytest.raises(ConfigurationError) as error:
        tiny(model_name="vit_micro_patch4_23")
    # The names after the first depend on timm's version.
    assert re.fullmatch(
        r"model_name is 'vit_micro_patch4_23', expected the name of a timm model; close matches are "
        r"vit_micro_patch4_32, \w+, \w+\.",
        str(error.value),
    )


def test_pretrained__no_network(monkeypatch, tmp_path):
    if importlib.util.find_spec("huggingface_hub"):
        # Without it, the hub is asked again and again for most of a minute.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError) as error:
        ViTClassifier("vit_tiny_patch16_224")
    assert re.fullmatch(
        r"The weights of vit_tiny_patch16_224 could not be downloaded \(.+\); give checkpoint_path=\.\.\. of "
        rf"a local file, pretrained=False, or {re.escape(BUNDLED)}\.",
        str(error.value),
    )


# --- the head ---------------------------------------------------------------------------------------------


def test_zero_head__starts_at_even_odds_and_can_be_loaded_over(tmp_path):
    model = ViTClassifier(num_classes=100, zero_head=True)  # whose weights bring a head of 100 classes
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), torch.zeros(2, 100))
    path = write_lightning(model, tmp_path / "last")  # after a step of training
    loaded = ViTClassifier.load_from_checkpoint(path)
    assert loaded.model.head.weight.any()
    assert torch.equal(loaded.model.head.weight, model.model.head.weight)


def test_zero_head__needs_one_linear_layer():
    with pytest.raises(ConfigurationError) as stop:
        ViTClassifier("deit_tiny_distilled_patch16_224", pretrained=False, model_kwargs={"depth": 1}, zero_head=True)
    assert str(stop.value) == (
        "zero_head is True, expected a head that is one linear layer; that of VisionTransformerDistilled is tuple."
    )
