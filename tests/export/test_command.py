"""``lightning-bsr export``: the configured model with a checkpoint's or a delta's weights, in one file."""

import numpy as np
import onnxruntime
import pytest
import torch

from lightning_bsr import BlockSelect, ConfigurationError, DigitsDataModule, LeanActivations, TokenDrop, ViTClassifier
from lightning_bsr.cli import main
from lightning_bsr.export._command import ExportCommand
from lightning_bsr.functional import install_token_drop, quantize_frozen_, save_delta, select_blocks_
from plain_modules import PlainModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # tests do, with pytest's sys.argv
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",
    "ignore:The number of .* batches",
)
DROP = {"blocks": [3, 6, 9], "keep_rate": 0.5}
DROPPING = ["--trainer.callbacks+=TokenDrop", "--trainer.callbacks.blocks=[3,6,9]", "--trainer.callbacks.keep_rate=0.5"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def data():
    return DigitsDataModule(batch_size=20, augment=False, num_workers=0)


def trainer_with(*callbacks):
    """What the command line makes."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return ExportCommand(accelerator="cpu", limit_val_batches=1, callbacks=[*callbacks], **quiet)


def trained(module):
    with torch.no_grad():
        module.model.head.weight.normal_()
    return module


def run(path, pictures):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {"images": pictures.numpy()})[0]


def test_export__takes_a_checkpoint_and_the_drop_from_the_configuration(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0", *QUIET])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    main(["export", "--output=model.onnx", f"--ckpt-path={checkpoint}", "--batch-size=2", *DROPPING])
    out = capsys.readouterr().out
    assert "Written: model.onnx, " in out
    assert "takes [2, 3, 32, 32]; differs from the module by at most " in out
    assert "No tokens are dropped" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lightning_logs", "model.onnx"]
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    module = ViTClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    install_token_drop(module, **DROP)
    pictures = next(iter(data.val_dataloader()))[0][:2]
    with torch.no_grad():
        np.testing.assert_allclose(run("model.onnx", pictures), module.eval()(pictures).numpy(), atol=1e-4)


@pytest.mark.parametrize("configured", [True, False])
def test_export__takes_a_delta(configured, data, tmp_path, capsys):
    base, module = ViTClassifier(num_classes=10), ViTClassifier(num_classes=10)
    module.load_state_dict(base.state_dict())
    select_blocks_(module, [3])
    install_token_drop(module, **DROP)
    quantize_frozen_(module)
    save_delta(trained(module), tmp_path / "delta.safetensors")
    # Levers of training alone change nothing.
    levers = [BlockSelect([3]), LeanActivations("exact"), *([TokenDrop(**DROP)] if configured else [])]
    path = tmp_path / "model.pt2"
    trainer_with(*levers).export(base, str(path), data, delta=str(tmp_path / "delta.safetensors"))
    assert "on 16 pictures" in capsys.readouterr().out
    pictures = next(iter(data.val_dataloader()))[0][:1]
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(pictures), module.eval()(pictures))


@pytest.mark.parametrize("trained_with_drop", [True, False])
def test_export__refuses_a_delta_that_was_trained_with_another_drop(trained_with_drop, data, tmp_path):
    base, module = PlainModule(num_classes=10), PlainModule(num_classes=10)
    module.load_state_dict(base.state_dict())
    select_blocks_(module, [3])
    if trained_with_drop:
        install_token_drop(module, [2, 4], [0.7, 0.5], detach=True)
    save_delta(module, tmp_path / "delta.safetensors")
    what_trained = (
        "TokenDrop(blocks=[2, 4], fuse=True, keep_rate=[0.7, 0.5], normalize=False, restore=False, score='cls', "
        "vit='model.blocks')"
    )
    with pytest.raises(ConfigurationError) as error:
        trainer_with(TokenDrop([2, 4], 0.5)).export(
            base, str(tmp_path / "model.pt2"), data, delta=str(tmp_path / "delta.safetensors")
        )
    assert str(error.value) == (
        "The configuration drops tokens by TokenDrop(blocks=[2, 4], fuse=True, keep_rate=[0.5, 0.5], "
        f"normalize=False, restore=False, score='cls', vit='model.blocks'), but '{tmp_path / 'delta.safetensors'}' was "
        f"trained with {what_trained if trained_with_drop else 'no TokenDrop'}; give the same TokenDrop, or leave it "
        "out of trainer.callbacks to drop tokens as in training."
    )


def test_export__of_a_module_without_drops_says_so(data, tmp_path, capsys):
    path = tmp_path / "model.pt2"
    trainer_with().export(PlainModule(num_classes=10), str(path), data, batch_size=16)
    assert capsys.readouterr().out.startswith("No tokens are dropped; TokenDrop in trainer.callbacks would do so.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=old.onnx"], "The file is 'old.onnx', which exists already; with --overwrite true it is replaced."),
        (
            ["--output=model.tflite"],
            "The file is 'model.tflite', expected a name that goes with one of 'onnx' (.onnx), 'pt2' (.pt2), "
            "'executorch' (.pte).",
        ),
        (
            ["--output=model.onnx", "--format=pt2"],
            "The file is 'model.onnx' with format 'pt2', expected a name that goes with one of 'onnx' (.onnx), 'pt2' "
            "(.pt2), 'executorch' (.pte).",
        ),
        (["--output=no/model.pt2"], "The file is 'no/model.pt2', but there is no folder 'no'; make it first."),
        (["--output=folder.pt2", "--overwrite=true"], "The file is 'folder.pt2', which is a folder."),
        (["--output=model.pt2", "--batch_size=0"], "batch_size is 0, expected 1 or more."),
        (
            ["--output=model.pt2", "--delta=none.safetensors"],
            "delta is 'none.safetensors', but there is no such file.",
        ),
    ],
)
def test_mistakes__end_in_one_line_before_anything_is_made(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.onnx").touch()
    (tmp_path / "folder.pt2").mkdir()
    monkeypatch.setattr(DigitsDataModule, "__init__", lambda self: pytest.fail("the data were made"))
    with pytest.raises(SystemExit) as stop:
        main(["export", *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lightning-bsr: error: {message}"


def test_export__refuses_a_batch_of_more_pictures_than_there_are(data, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        trainer_with().export(PlainModule(num_classes=10), str(tmp_path / "model.pt2"), data, batch_size=500)
    assert str(error.value) == "batch_size is 500, but there are only 237 validation pictures to check on."
    assert not any(tmp_path.iterdir())
