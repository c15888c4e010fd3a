"""What the command line makes of the file that ``ckpt_path`` names."""

import fractions
import re
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from lightning_bsr import DigitsDataModule, TokenDrop, ViTClassifier
from lightning_bsr.cli import main
from lightning_bsr.functional import save_delta, select_blocks_

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # tests do, with pytest's sys.argv
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",
)
SMALL = {"model_name": "test_vit", "pretrained": False, "model_kwargs": {"img_size": 32, "patch_size": 8, "depth": 2}}
MODEL = [
    "--model.model_name=test_vit",
    "--model.pretrained=false",
    "--model.model_kwargs={img_size: 32, patch_size: 8, depth: 2}",
]
DROPPING = ["--trainer.callbacks+=TokenDrop", "--trainer.callbacks.blocks=[0]", "--trainer.callbacks.keep_rate=0.5"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.limit_test_batches=1"]


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def printed_loss(capsys):
    return float(re.search(r"test/loss\W+([\d.]+)", capsys.readouterr().out)[1])


@pytest.mark.parametrize(
    ("subcommand", "advice"),
    [
        ("fit", "training resumes from the .ckpt that DeltaCheckpoint writes beside it with resumable=true"),
        ("test", "make full weights of it with 'lightning-bsr merge' and give those as --model.checkpoint_path"),
        ("export", "give the file as --delta"),
        ("visualize", "make full weights of it with 'lightning-bsr merge' and give those as --model.checkpoint_path"),
    ],
)
def test_a_delta__is_refused_before_anything_is_made(subcommand, advice, here, capsys, monkeypatch):
    module = ViTClassifier(num_classes=10, **SMALL)
    select_blocks_(module, [1])
    save_delta(module, "delta.safetensors")
    monkeypatch.setattr(DigitsDataModule, "__init__", lambda self: pytest.fail("the data were made"))
    more = ["--output=model.onnx"] if subcommand == "export" else []
    assert refusal([subcommand, "--ckpt_path=delta.safetensors", *more], capsys) == (
        "lightning-bsr: error: ckpt_path is 'delta.safetensors', which holds only what was trained, expected a "
        f"Lightning checkpoint; {advice}, or load it in Python with load_delta."
    )


@pytest.mark.parametrize("damaged", [False, True])
def test_weights_alone__are_refused(damaged, here, capsys):
    save_file({"head.weight": torch.zeros(2)}, "weights.safetensors")
    if damaged:
        (here / "weights.safetensors").write_bytes(b"0")
    assert refusal(["test", "--ckpt_path=weights.safetensors"], capsys) == (
        "lightning-bsr: error: ckpt_path is 'weights.safetensors', which holds weights alone, expected a Lightning "
        "checkpoint; give the file as --model.checkpoint_path if the model is a ViTClassifier, or load it in Python "
        "with load_state_dict."
    )


def test_the_advice_for_a_delta__gives_what_was_trained(here, capsys, make_trainer):
    module = ViTClassifier(num_classes=10, **SMALL)
    select_blocks_(module, [1])
    torch.nn.init.ones_(module.model.head.bias)
    save_delta(module, "delta.safetensors")
    base = ViTClassifier(num_classes=10, **SMALL)
    base.load_state_dict(module.state_dict())
    save_file(base.model.state_dict(), "base.safetensors")
    main(["merge", "--base=base.safetensors", "--delta=delta.safetensors", "--output=full.safetensors"])
    main(["test", *MODEL, "--model.checkpoint_path=full.safetensors", *QUIET])
    (expected,) = make_trainer(limit_test_batches=1).test(module, DigitsDataModule(), verbose=False)
    assert printed_loss(capsys) == pytest.approx(expected["test/loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("subcommand", "hyperparameters"),
    [("test", {"lr": 0.1}), ("test", {"ratio": fractions.Fraction(1, 2)}), ("export", {"lr": 0.1})],
    ids=["test", "test-objects", "export"],
)
def test_a_checkpoint_of_a_script__is_taken_for_its_weights(subcommand, hyperparameters, here, capsys, make_trainer):
    module = ViTClassifier(num_classes=10, **SMALL)
    torch.nn.init.normal_(module.model.head.weight, std=0.1)
    trainer = make_trainer(TokenDrop([0], 0.5), limit_test_batches=1)
    (expected,) = trainer.test(module, DigitsDataModule(), verbose=False)
    trainer.save_checkpoint("script.ckpt")
    checkpoint = torch.load("script.ckpt", weights_only=True)
    assert "_class_path" not in checkpoint["hyper_parameters"]
    torch.save({**checkpoint, "hyper_parameters": hyperparameters}, "script.ckpt")
    given = ["--ckpt_path=script.ckpt", "--weights_only=false", *MODEL, *DROPPING]
    if subcommand == "test":
        main(["test", *given, *QUIET])
        assert printed_loss(capsys) == pytest.approx(expected["test/loss"], abs=1e-5)
    else:
        main(["export", *given, "--output=model.pt2"])
        written = torch.export.load("model.pt2").state_dict
        torch.testing.assert_close(written["model.head.weight"], module.model.head.weight.data)


FIT = [
    "fit",
    *MODEL,
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=0",
    "--trainer.callbacks+=BlockSelect",
]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("limit", "other"), [("max_epochs", "max_steps"), ("max_steps", "max_epochs")])
def test_resuming__says_that_nothing_is_left_and_how_to_go_on(limit, other, here, infos):
    fit = [*FIT, "--trainer.callbacks.blocks=[1]", f"--trainer.{other}=-1"]
    main([*fit, f"--trainer.{limit}=1"])
    (checkpoint,) = here.rglob("*.ckpt")
    said = (
        f"Nothing is left to train: {limit} is 1, and the checkpoint has 1 already; a larger --trainer.{limit} goes on."
    )
    assert said not in infos
    main([*fit, f"--trainer.{limit}=1", f"--ckpt_path={checkpoint}"])
    assert infos.count(said) == 1
    main([*fit, f"--trainer.{limit}=2", f"--ckpt_path={checkpoint}"])
    assert infos.count(said) == 1
    assert len([*here.rglob("*.ckpt")]) > 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resuming_with_another_selection__is_refused_with_what_goes_on(here, capsys, monkeypatch):
    main([*FIT, "--trainer.callbacks.blocks=[1]", "--trainer.max_epochs=1"])
    (checkpoint,) = here.rglob("*.ckpt")
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    other = [*FIT, "--trainer.callbacks.blocks=[0]", "--trainer.max_epochs=2"]
    assert refusal([*other, f"--ckpt_path={checkpoint}"], capsys).endswith(
        "; resume with the same selection, or start a new run from its weights, which load_from_checkpoint of the "
        "module takes in Python, and --model.checkpoint_path instead of --ckpt_path on the command line."
    )
    started_with = []
    monkeypatch.setattr(ViTClassifier, "on_fit_start", lambda self: started_with.append(deepcopy(self.state_dict())))
    main([*other, f"--model.checkpoint_path={checkpoint}"])
    (started_with,) = started_with
    for name, tensor in trained.items():
        torch.testing.assert_close(started_with[name], tensor, msg=name)
